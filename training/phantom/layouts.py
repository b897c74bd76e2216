"""One study of a cohort in each of the published layouts.

tcia    manifest-<n>/FDG-PET-CT-Lesions/PETCT_<subject>/<study>/<number>.000000-<series>-<last 5>/1-001.dcm
nifti   PETCT_<subject>/<study>/{CT,CTres,PET,SUV,SEG}.nii.gz, and our DISTRICTS and ORGANS on the PET's grid
nnunet  imagesTr/fdg_<subject>_<study>_0000.nii.gz (CT on the PET's grid) and _0001 (SUV), labelsTr, our districtsTr

A writer puts the files under a temporary folder with the paths that they will have in the cohort.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy.ndimage import affine_transform

from pipeline.types import FloatVolume, Grid
from training.cases.types import Layout
from training.phantom.dicom import (
    SERIES_NUMBERS,
    StudyHeader,
    activity_per_suv,
    study_uid,
    uid_of,
    write_ct_volume,
    write_pet_series,
)
from training.phantom.nifti import write_nifti
from training.phantom.paint import draw_anatomy, scan, scan_ct
from training.phantom.plan import DESCRIPTION, PlannedStudy
from training.phantom.segments import write_lesion_seg, write_seg
from training.phantom.spec import Phantom

COLLECTION = "FDG-PET-CT-Lesions"
CT_DESCRIPTION, PET_DESCRIPTION = "PHANTOM WB CT", "PHANTOM WB PET"
NAME = "1-{number:03d}.dcm"


@dataclass(frozen=True, kw_only=True, slots=True)
class Scanned:
    """A painted study: the phantom on the PET's grid, and its CT on its own."""

    plan: PlannedStudy
    phantom: Phantom
    hu: FloatVolume
    ct_grid: Grid

    @property
    def study(self) -> str:
        """The study folder's name, as the collection's download has it."""
        last = study_uid(self.phantom)[-5:]
        return f"{self.plan.scanned:%m-%d-%Y}-NA-{DESCRIPTION}-{last}"


def paint_study(plan: PlannedStudy, ct_pixel_mm: float) -> Scanned:
    """Draw the person once; scan the PET on the plan's grid and the CT with finer pixels in the same slices."""
    anatomy = draw_anatomy(plan.spec)
    phantom = scan(anatomy, plan.spec)
    fine = replace(plan.spec, spacing_mm=(plan.spec.spacing_mm[0], ct_pixel_mm, ct_pixel_mm))
    hu, ct_grid = scan_ct(anatomy, fine)
    np.rint(hu, out=hu)  # scanners store whole HU
    return Scanned(plan=plan, phantom=phantom, hu=hu, ct_grid=ct_grid)


def ct_on_pet_grid(scanned: Scanned) -> FloatVolume:
    """The published `CTres`: cubic splines. Slices coincide, so it only works in the plane; steps of 1/4 HU."""
    fine, coarse = scanned.ct_grid, scanned.phantom.grid
    ratio = [c / f for c, f in zip(coarse.spacing_mm, fine.spacing_mm, strict=True)]
    starts = zip(coarse.origin_mm[::-1], fine.origin_mm[::-1], fine.spacing_mm, strict=True)
    offset = [(c - f) / spacing for c, f, spacing in starts]
    out = np.empty(coarse.shape, np.float32)
    for source, target in zip(scanned.hu, out, strict=True):
        affine_transform(source, np.array(ratio[1:]), offset[1:], target.shape, target, order=3, mode="nearest")
    resampled: FloatVolume = (np.rint(np.clip(out, -1024, 3071) * 4) / 4).astype(np.float32)
    return resampled


def _write_tcia(scanned: Scanned, root: Path, manifest: str) -> list[str]:
    plan, phantom = scanned.plan, scanned.phantom
    study = root / manifest / COLLECTION / f"PETCT_{plan.subject}" / scanned.study
    header = StudyHeader(
        patient_id=f"PETCT_{plan.subject}",
        patient_name=f"PHANTOM^PETCT_{plan.subject}",
        scanned=plan.scanned,
        sex=plan.sex,
        age_years=plan.age_years,
        description=DESCRIPTION,
    )
    folders = {s.kind: study / f"{s.number}.000000-{s.description}-{s.uid[-5:]}" for s in series_of(scanned)}
    ct = write_ct_volume(phantom, scanned.hu, scanned.ct_grid, folders["ct"], header=header, name=NAME)
    pet = write_pet_series(phantom, folders["pet"], header=header, name=NAME)
    write_seg(phantom, folders["seg"], ct, header=header, name="1-1.dcm")
    if phantom.lesions.any():
        write_lesion_seg(phantom, folders["lesions"], pet, header=header, name="1-1.dcm")
    return [str(study.relative_to(root))]


def _write_nifti(scanned: Scanned, root: Path, manifest: str) -> list[str]:
    del manifest
    phantom, grid = scanned.phantom, scanned.phantom.grid
    study = root / f"PETCT_{scanned.plan.subject}" / scanned.study
    study.mkdir(parents=True)
    write_nifti(study / "CT.nii.gz", scanned.hu, scanned.ct_grid)
    volumes: Mapping[str, np.ndarray] = {
        "CTres": ct_on_pet_grid(scanned),
        "PET": phantom.suv * np.float32(activity_per_suv(phantom)),
        "SUV": phantom.suv,
        "SEG": (phantom.lesions > 0).astype(np.uint8),
        "DISTRICTS": phantom.districts,
        "ORGANS": phantom.organs,
    }
    for name, volume in volumes.items():
        write_nifti(study / f"{name}.nii.gz", volume, grid)
    return [str(study.relative_to(root))]


def _write_nnunet(scanned: Scanned, root: Path, manifest: str) -> list[str]:
    del manifest
    phantom = scanned.phantom
    case = f"fdg_{scanned.plan.subject}_{scanned.study}"
    volumes: Mapping[str, np.ndarray] = {
        f"imagesTr/{case}_0000.nii.gz": ct_on_pet_grid(scanned),
        f"imagesTr/{case}_0001.nii.gz": phantom.suv,
        f"labelsTr/{case}.nii.gz": (phantom.lesions > 0).astype(np.uint8),
        f"districtsTr/{case}.nii.gz": phantom.districts,
    }
    for name, volume in volumes.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        write_nifti(root / name, volume, phantom.grid)
    return list(volumes)


# Each writes a study under `root` and returns the paths to be moved into the cohort: one folder, or several files.
WRITERS: Mapping[Layout, Callable[[Scanned, Path, str], list[str]]] = {
    "tcia": _write_tcia,
    "nifti": _write_nifti,
    "nnunet": _write_nnunet,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """One series of a study as the metadata table lists it."""

    kind: str  # ct, pet, seg, lesions
    modality: str
    number: int
    description: str
    uid: str
    images: int


def series_of(scanned: Scanned) -> list[Series]:
    """The series that the tcia layout holds; the others list them too, as the published table is of DICOM."""
    phantom, slices = scanned.phantom, scanned.phantom.grid.shape[0]
    rows = [
        ("ct", "CT", CT_DESCRIPTION, uid_of(phantom, "ct", scanned.ct_grid.shape), slices),
        ("pet", "PT", PET_DESCRIPTION, uid_of(phantom, "pet", phantom.grid.shape), slices),
        ("seg", "SEG", "PHANTOM DISTRICTS", uid_of(phantom, "seg"), 1),
    ]
    if phantom.lesions.any():
        rows.append(("lesions", "SEG", "PHANTOM LESIONS", uid_of(phantom, "lesions"), 1))
    return [
        Series(kind=kind, modality=modality, number=SERIES_NUMBERS[kind], description=text, uid=uid, images=images)
        for kind, modality, text, uid, images in rows
    ]
