"""NIfTI files: `<case>/<study>/{CT,CTres,PET,SUV,SEG}.nii.gz` as the published conversion writes them."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import nibabel
import numpy as np
from nibabel.filebasedimages import ImageFileError
from numpy.typing import NDArray

from pipeline.types import Grid
from training.cases.ids import patient_hash, study_id
from training.cases.metadata import Metadata
from training.cases.orient import lps_axes, to_lps
from training.cases.types import Study
from training.errors import StudyError
from training.prepared import RefusedStudy

SUFFIXES = (".nii.gz", ".nii")
# The files that make a folder a study, by name without suffix in lower case; the first of a part's names wins.
NAMES: Mapping[str, tuple[str, ...]] = {
    "ct": ("ct", "ctres"),
    "pet": ("suv",),
    "lesions": ("seg",),
    "districts": ("districts",),
    "organs": ("organs",),
}
ACTIVITY = "pet"  # Bq/ml without the header that would make SUV of it
STUDY_NAMES = {"ct", "ctres", "suv", ACTIVITY}
RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def stem(path: Path) -> str:
    """The file's name without a NIfTI suffix; "" when it has none."""
    return next((path.name[: -len(s)] for s in SUFFIXES if path.name.lower().endswith(s)), "")


def find_nifti(
    root: Path, files: Sequence[Path], metadata: Metadata, on_file: Callable[[], None]
) -> tuple[list[Study], list[RefusedStudy]]:
    """The studies among the NIfTI files below `root`, from names and headers."""
    folders: dict[Path, dict[str, Path]] = {}
    for path in files:
        folders.setdefault(path.parent, {})[stem(path).lower()] = path
    studies, refused = [], []
    for folder, members in sorted(folders.items()):
        if members.keys() & STUDY_NAMES:
            case, study = _case_and_study(root, folder)
            name = study_id(case, f"{case}/{study}")
            try:
                studies.append(_study(name, case, study, members, metadata))
            except StudyError as error:
                refused.append(RefusedStudy(study=name, code=error.code, text=error.text))
        for _ in members:
            on_file()
    return studies, refused


def _case_and_study(root: Path, folder: Path) -> tuple[str, str]:
    parts = folder.relative_to(root).parts or (root.resolve().name,)
    return (parts[-2], parts[-1]) if len(parts) > 1 else (parts[0], parts[0])


def _study(name: str, case: str, study: str, members: Mapping[str, Path], metadata: Metadata) -> Study:
    parts = {part: (members[n],) for part, names in NAMES.items() for n in names[::-1] if n in members}
    if "pet" not in parts and ACTIVITY in members:
        text = "there is PET.nii.gz but no SUV.nii.gz: NIfTI keeps nothing of the header that SUV is computed from"
        raise StudyError("suv_missing", text)
    if "pet" not in parts:
        raise StudyError("no_pet", "there is no SUV.nii.gz in the study")
    if "ct" not in parts:
        raise StudyError("no_ct", "there is no CT.nii.gz (nor CTres.nii.gz) in the study")
    notes: tuple[str, ...] = ()
    if "ct" not in members:
        notes = ("no CT.nii.gz: CTres.nii.gz is used, which was resampled before by a spline",)
    if "lesions" not in parts:
        notes += ("no SEG.nii.gz of lesions",)
    known = metadata.of(case, study=study)
    check_headers(parts)
    return Study(
        id=name,
        patient=patient_hash(case),
        layout="nifti",
        parts=parts,
        diagnosis=known.diagnosis,
        age=known.age,
        sex=known.sex,
        notes=(*notes, *known.notes),
    )


def check_headers(parts: Mapping[str, Iterable[Path]]) -> None:
    """Open every part's header and check its geometry. Raises StudyError as `read_nifti` does."""
    for part, paths in parts.items():
        for path in paths:
            what = _what(part, path)
            image = _open(path, what)
            steps, _ = _lps(image, what)
            lps_axes(steps, _shape(image, what), what)


def read_nifti(path: Path, part: str, frame_uid: str) -> tuple[NDArray[np.float32], Grid]:
    """A NIfTI volume with its scaling applied, turned to axis-aligned LPS [z, y, x].

    NIfTI has no Frame of Reference: `frame_uid` is the one that all volumes of the study are given.

    Raises StudyError: unreadable, geometry_invalid, geometry_oblique.
    """
    what = _what(part, path)
    image = _open(path, what)
    shape = _shape(image, what)
    try:
        volume = np.asarray(image.dataobj, dtype=np.float32).reshape(shape)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise StudyError("unreadable", f"{what}: its voxels cannot be read ({type(error).__name__})") from error
    steps, origin = _lps(image, what)
    return to_lps(volume, steps, origin, frame_uid, what)


def _what(part: str, path: Path) -> str:
    """A part in messages; the file's own name only where it is one of the layout's."""
    return path.name if stem(path).lower() in STUDY_NAMES | {"seg", "districts", "organs"} else f"the {part} file"


def _open(path: Path, what: str) -> nibabel.Nifti1Image:
    try:
        image = nibabel.load(path)
    except (OSError, EOFError, ValueError, zlib.error, ImageFileError) as error:
        raise StudyError("unreadable", f"{what}: it is no readable NIfTI file ({type(error).__name__})") from error
    if not isinstance(image, nibabel.Nifti1Image):
        raise StudyError("unreadable", f"{what}: it is {type(image).__name__}, NIfTI is expected")
    return image


def _shape(image: nibabel.Nifti1Image, what: str) -> tuple[int, int, int]:
    shape = image.shape
    if len(shape) < 3 or any(n != 1 for n in shape[3:]) or min(shape) < 1:
        raise StudyError("geometry_invalid", f"{what}: its size is {shape}, one volume is expected")
    return shape[0], shape[1], shape[2]


def _lps(image: nibabel.Nifti1Image, what: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """LPS steps by array axis (columns) and the position of the first voxel, in mm."""
    if not (int(image.header["sform_code"]) or int(image.header["qform_code"])):
        raise StudyError("geometry_invalid", f"{what}: neither its sform nor its qform says where it lies")
    affine = RAS_TO_LPS @ np.asarray(image.affine, np.float64)
    return affine[:3, :3], affine[:3, 3]
