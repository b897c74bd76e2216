"""One study's voxels: HU, SUV and label maps, each on its own grid, axis-aligned LPS."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from pipeline.ct_pixels import AIR_HU
from pipeline.ct_reader import derived_uid, read_ct
from pipeline.errors import UnsupportedSeries
from pipeline.types import FloatVolume, Grid
from training.cases.dicom_headers import scan
from training.cases.dicom_volume import read_pet, read_segments
from training.cases.nifti import read_nifti
from training.cases.nnunet import CT_BELOW_HU
from training.cases.segments import Kind
from training.cases.tcia import check_pet
from training.cases.types import Labels, Layout, Study, StudyVolumes
from training.errors import StudyError

MAX_SLICES = 3000
GIVEN_AS_SUV: Mapping[str, Any] = {"rule": "given as SUV by the data", "units": "GML", "factor": 1.0}


def read_study(study: Study) -> StudyVolumes:
    """Read the study's files.

    Raises:
        StudyError: nan_voxels, unreadable, geometry_*, suv_*, channels_swapped, seg_elsewhere, no_overlap,
            labels_invalid, and the codes of `pipeline.errors.UnsupportedSeries` for a CT that cannot be used.
    """
    volumes = READERS[study.layout](study)
    _check_values(volumes)
    _check_places(volumes)
    np.maximum(volumes.hu, np.float32(AIR_HU), out=volumes.hu)  # NIfTI keeps padding such as -3024; `read_ct` does not
    return volumes


def _read_dicom(study: Study) -> StudyVolumes:
    try:
        ct = read_ct(study.parts["ct"], max_slices=MAX_SLICES)
    except UnsupportedSeries as error:
        raise StudyError(error.code, f"CT: {error.text}") from error
    except OSError as error:
        raise StudyError("unreadable", f"CT: a file cannot be read ({error.strerror})") from error
    headers, unreadable = scan(study.parts["pet"], lambda: None)
    if unreadable or not headers:
        raise StudyError("unreadable", f"PET: {len(unreadable)} of {len(study.parts['pet'])} files cannot be read")
    scale = check_pet(headers)
    # `find_studies` saw that CT, PET and SEG share their Frame of Reference, or have none; then the CT's was derived
    frame_uid = ct.grid.frame_of_reference_uid
    values, pet_grid = read_pet(headers, frame_uid)
    labels: dict[str, Labels] = {}
    notes: tuple[str, ...] = (*study.notes, *ct.source.notes, *scale.notes)
    kinds: tuple[Kind, ...] = ("lesions", "districts")
    for kind in kinds:
        if paths := study.parts.get(kind):
            labels[kind], more = read_segments(paths, kind, frame_uid, pet_grid)
            notes += more
    return StudyVolumes(
        hu=ct.hu,
        ct_grid=ct.grid,
        suv=values * np.float32(scale.factor),
        pet_grid=pet_grid,
        labels=labels,
        suv_details=scale.record(),
        notes=notes,
    )


def _read_niftis(study: Study) -> StudyVolumes:
    frame_uid = derived_uid(f"nifti {study.id}")
    hu, ct_grid = read_nifti(study.parts["ct"][0], "CT", frame_uid)
    suv, pet_grid = read_nifti(study.parts["pet"][0], "SUV", frame_uid)
    if (suv < CT_BELOW_HU).any():
        text = f"the SUV volume holds values under {CT_BELOW_HU:.0f}: it is a CT, the channels are swapped"
        raise StudyError("channels_swapped", text)
    labels = {}
    for part, highest in (("lesions", None), ("districts", 4), ("organs", 255)):
        if paths := study.parts.get(part):
            labels[part] = _label_map(*read_nifti(paths[0], part, frame_uid), part, highest)
    return StudyVolumes(
        hu=hu,
        ct_grid=ct_grid,
        suv=suv,
        pet_grid=pet_grid,
        labels=labels,
        suv_details=GIVEN_AS_SUV,
        notes=study.notes,
    )


READERS: Mapping[Layout, Callable[[Study], StudyVolumes]] = {
    "tcia": _read_dicom,
    "nifti": _read_niftis,
    "nnunet": _read_niftis,
}


def _label_map(values: FloatVolume, grid: Grid, part: str, highest: int | None) -> Labels:
    """Whole numbers up to `highest`; with None everything above 0.5 is 1. Raises StudyError labels_invalid."""
    if highest is None:
        return Labels(labels=(values > 0.5).astype(np.uint8), grid=grid)
    if not np.isfinite(values).all():
        raise StudyError("labels_invalid", f"{part}: NaN or infinite voxels, labels from 0 to {highest} are expected")
    whole = np.rint(values)
    if whole.min() < 0 or whole.max() > highest or np.abs(values - whole).max() > 0.01:
        text = f"{part}: values from {values.min():g} to {values.max():g}, labels from 0 to {highest} are expected"
        raise StudyError("labels_invalid", text)
    return Labels(labels=whole.astype(np.uint8), grid=grid)


def _check_values(volumes: StudyVolumes) -> None:
    for name, volume in (("CT", volumes.hu), ("SUV", volumes.suv)):
        if count := int(np.count_nonzero(~np.isfinite(volume))):
            text = f"{name}: {count} of {volume.size} voxels are NaN or infinite, numbers are expected"
            raise StudyError("nan_voxels", text)


def _check_places(volumes: StudyVolumes) -> None:
    """CT and label maps must lie where the PET lies; how much they share is for the preparation to see."""
    if not _overlap(volumes.ct_grid, volumes.pet_grid):
        raise StudyError("no_overlap", "CT and PET do not overlap in space: one of them lies elsewhere")
    for part, labels in volumes.labels.items():
        if not _overlap(labels.grid, volumes.pet_grid):
            text = f"{part}: the label map does not overlap the PET in space: it lies elsewhere"
            raise StudyError("seg_elsewhere", text)


def _overlap(one: Grid, other: Grid) -> bool:
    """Whether two grids share some space along every axis (edge to edge)."""
    for axis in range(3):  # x, y, z
        low, high = zip(*(_span(grid, axis) for grid in (one, other)), strict=True)
        if max(low) >= min(high):
            return False
    return True


def _span(grid: Grid, axis: int) -> tuple[float, float]:
    step = grid.spacing_mm[2 - axis]
    first = grid.origin_mm[axis] - step / 2
    return first, first + step * grid.shape[2 - axis]
