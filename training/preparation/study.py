"""One study: CT, PET, districts, lesions and organs on one grid, scaled, cropped to the body. Arrays in, arrays out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import SimpleITK as sitk  # noqa: N813 - the name its own manual uses
from numpy.typing import NDArray
from pydicom import Dataset

from pipeline.districts import find_districts
from pipeline.errors import DistrictError, PipelineError
from pipeline.geometry import bounding_box, grid_at_spacing, resample, resample_image, to_sitk
from pipeline.types import CtVolume, District, DistrictMap, DistrictOptions, Grid, LabelVolume, SourceSeries
from training.cases.types import Labels, StudyVolumes
from training.errors import StudyError
from training.preparation.registration import identity, register
from training.preparation.statistics import study_statistics
from training.recipe import PrepareRecipe, Recipe

AIR_HU = -1024.0  # what the CT did not scan, as in the pipeline
GIVEN = "given"
MARGIN_VOXELS = 4  # of air kept around the body
MIN_SHARED_MM = 50.0  # of CT and PET along every axis; less holds no window of any recipe
SPACING_TOLERANCE = 0.01
Triple = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """What `prepare_volumes` makes: `arrays` by name, as in `training.prepared`, on `grid`."""

    arrays: Mapping[str, NDArray[Any]]
    grid: Grid
    segmenter: str
    registration: dict[str, Any]
    statistics: dict[str, Any]
    notes: tuple[str, ...]


def prepare_volumes(volumes: StudyVolumes, recipe: Recipe, *, spacing_mm: Triple | None) -> Prepared:
    """Bring a study onto its grid: registered, resampled, with districts, scaled to [0, 1], cropped to the body.

    The CT is interpolated trilinearly (paper, section IV), labels take the nearest voxel. Districts and organs were
    drawn on the CT and move with it; lesions were drawn on the PET and stay. Scaling by a volume's own minimum and
    maximum takes the whole field, as inference does, not the crop.

    Args:
        spacing_mm: without a spacing in the recipe, the PET spacing (z, y, x) that this one must have; None: any.

    Raises:
        StudyError: nan_voxels, no_overlap, frames_differ, spacing_differs, labels_elsewhere, labels_unknown,
            districts_empty, or a code of the pipeline.
    """
    try:
        return _prepare(volumes, recipe, spacing_mm)
    except PipelineError as error:
        raise StudyError(error.code, error.text) from error


def _prepare(volumes: StudyVolumes, recipe: Recipe, spacing_mm: Triple | None) -> Prepared:
    _check(volumes, recipe.prepare, spacing_mm)
    transform, registration = _registered(volumes, recipe.prepare)
    grid = _target(volumes, recipe.prepare)
    hu = _moved(volumes.hu, volumes.ct_grid, grid, transform, fill=AIR_HU)
    suv = resample(volumes.suv, volumes.pet_grid, grid, fill=0.0)
    districts, segmenter, notes = _districts(volumes, recipe.prepare.districts, grid, transform)
    arrays: dict[str, NDArray[Any]] = {
        "ct": recipe.normalization.ct_to_unit(hu),
        "pet": recipe.normalization.suv_to_unit(suv),
        "districts": districts,
        "lesions": np.zeros(grid.shape, np.uint8),
    }
    if "lesions" in volumes.labels:
        arrays["lesions"] = (_labels(volumes, "lesions", grid, identity()) > 0).astype(np.uint8)
    if "organs" in volumes.labels:
        arrays["organs"] = _labels(volumes, "organs", grid, transform)
    box = body_box(districts, MARGIN_VOXELS)
    halved = {name: a.astype(np.float16) if a.dtype == np.float32 else a for name, a in arrays.items()}
    return Prepared(
        arrays={name: np.ascontiguousarray(array[box]) for name, array in halved.items()},
        grid=_cropped(grid, box),
        segmenter=segmenter,
        registration=registration,
        statistics=study_statistics(hu, suv, districts),
        notes=(*volumes.notes, *notes),
    )


def body_box(districts: LabelVolume, margin: int) -> tuple[slice, ...]:
    """The smallest box [z, y, x] around everything that is not 0, with a margin inside the volume.

    Raises:
        StudyError: districts_empty.
    """
    box = bounding_box(districts, margin)
    if box is None:
        raise StudyError("districts_empty", "no voxel of the PET's field is in any district")
    return box


def same_spacing(a: Triple, b: Triple) -> bool:
    """Within 1 % along every axis."""
    return bool(np.allclose(a, b, rtol=SPACING_TOLERANCE, atol=0))


def _check(volumes: StudyVolumes, recipe: PrepareRecipe, spacing_mm: Triple | None) -> None:
    pet, ct = volumes.pet_grid, volumes.ct_grid
    if recipe.spacing_mm is None and spacing_mm is not None and not same_spacing(pet.spacing_mm, spacing_mm):
        text = f"PET voxels of {_mm(pet.spacing_mm)}, the first study's are {_mm(spacing_mm)}"
        raise StudyError("spacing_differs", f"{text}; set prepare.spacing_mm in the recipe to resample both")
    for name, values in (("CT", volumes.hu), ("PET", volumes.suv)):
        if bad := int(np.count_nonzero(~np.isfinite(values))):
            raise StudyError("nan_voxels", f"{name}: {bad} of {values.size} voxels are not finite numbers")
    if ct.frame_of_reference_uid != pet.frame_of_reference_uid:
        text = f"CT in Frame of Reference {ct.frame_of_reference_uid}, PET in {pet.frame_of_reference_uid}"
        raise StudyError("frames_differ", f"{text}: their positions have nothing to do with each other")
    if min(_shared_mm(ct, pet)) < MIN_SHARED_MM:
        z, y, x = (max(0.0, shared) for shared in _shared_mm(ct, pet))
        text = f"CT and PET share {z:.0f} x {y:.0f} x {x:.0f} mm (z, y, x)"
        raise StudyError("no_overlap", f"{text}, at least {MIN_SHARED_MM:.0f} along each axis are expected")
    for name, labels in volumes.labels.items():
        same_frame = labels.grid.frame_of_reference_uid == pet.frame_of_reference_uid
        if not same_frame or min(_shared_mm(labels.grid, pet)) <= 0:
            raise StudyError("labels_elsewhere", f"the {name} labels lie on a grid that does not overlap the PET")
    if GIVEN in recipe.districts and (given := volumes.labels.get("districts")) is not None:
        highest = int(given.labels.max())
        if highest > max(District):
            text = f"district labels up to {highest}, 0 to {max(District):d} are expected"
            raise StudyError("labels_unknown", f"{text} (1 head, 2 trunk, 3 arms, 4 legs)")


def _shared_mm(a: Grid, b: Grid) -> tuple[float, ...]:
    """Size (z, y, x) of the box that both fields cover, edge to edge; negative: how far they are apart."""
    shared = []
    for axis in range(3):
        (low_a, high_a), (low_b, high_b) = _edges(a, axis), _edges(b, axis)
        shared.append(min(high_a, high_b) - max(low_a, low_b))
    return tuple(shared)


def _edges(grid: Grid, axis: int) -> tuple[float, float]:
    low = grid.origin_mm[2 - axis] - grid.spacing_mm[axis] / 2
    return low, low + grid.extent_mm[axis]


def _target(volumes: StudyVolumes, recipe: PrepareRecipe) -> Grid:
    return grid_at_spacing(volumes.pet_grid, recipe.spacing_mm) if recipe.spacing_mm else volumes.pet_grid


def _registered(volumes: StudyVolumes, recipe: PrepareRecipe) -> tuple[sitk.Transform, dict[str, Any]]:
    """The transform from PET points to CT points, and its log; the identity and nothing if the recipe wants none."""
    if not recipe.registration:
        return identity(), {}
    found = register(
        volumes.hu,
        volumes.ct_grid,
        volumes.suv,
        volumes.pet_grid,
        max_shift_mm=recipe.max_shift_mm,
        max_rotation_deg=recipe.max_rotation_deg,
    )
    return found.transform, found.details


def _moved(
    volume: NDArray[Any], own: Grid, grid: Grid, transform: sitk.Transform, *, fill: float, nearest: bool = False
) -> NDArray[Any]:
    return resample_image(to_sitk(volume, own), grid, transform, fill=fill, nearest=nearest)


def _labels(volumes: StudyVolumes, name: str, grid: Grid, transform: sitk.Transform) -> LabelVolume:
    found: Labels = volumes.labels[name]
    return _moved(found.labels, found.grid, grid, transform, fill=0, nearest=True)


def _districts(
    volumes: StudyVolumes, wanted: tuple[str, ...], grid: Grid, transform: sitk.Transform
) -> tuple[LabelVolume, str, tuple[str, ...]]:
    """Labels on `grid` from the first of `wanted` that finds a body, its name, and why others did not serve.

    Raises:
        StudyError: districts_empty.
    """
    notes: list[str] = []
    for name in wanted:
        if name == GIVEN:
            if "districts" not in volumes.labels:
                notes.append("no district labels beside the study")
                continue
            labels, segmenter = _labels(volumes, "districts", grid, transform), GIVEN
        else:
            try:
                found = _segmented(volumes, name, grid, transform)
            except DistrictError as error:
                notes.append(f"{name}: {error.text}")
                continue
            labels, segmenter = found.labels, f"{found.segmenter} {found.version}"
            notes += [*found.notes, *_unsure(found)]
        if labels.any():
            return labels, segmenter, tuple(notes)
        notes.append(f"{name}: no district in the PET's field")
    raise StudyError("districts_empty", f"no districts from {', '.join(wanted)}: {'; '.join(notes)}")


def _segmented(volumes: StudyVolumes, name: str, grid: Grid, transform: sitk.Transform) -> DistrictMap:
    """One segmenter of the pipeline on the CT as it was scanned; its labels then move with the CT."""
    source = SourceSeries(study_uid="", series_uid="", header=Dataset(), instances=(), earliest_acquisition=("", ""))
    ct = CtVolume(hu=np.asarray(volumes.hu, np.float32), grid=volumes.ct_grid, source=source)
    if not isinstance(transform, sitk.Euler3DTransform):  # the identity: CT and PET agree
        return find_districts(ct, grid, options=DistrictOptions(chain=(name,)))
    own = grid_at_spacing(volumes.ct_grid, grid.spacing_mm)
    found = find_districts(ct, own, options=DistrictOptions(chain=(name,)))
    return replace(found, labels=_moved(found.labels, own, grid, transform, fill=0, nearest=True), grid=grid)


def _unsure(found: DistrictMap) -> list[str]:
    return [f"{d.key}: confidence {found.confidence[d]:.2f}" for d in found.present if found.confidence[d] < 0.5]


def _cropped(grid: Grid, box: tuple[slice, ...]) -> Grid:
    z, y, x = ((s.start, s.stop - s.start) for s in box)
    dz, dy, dx = grid.spacing_mm
    ox, oy, oz = grid.origin_mm
    return Grid(
        shape=(z[1], y[1], x[1]),
        spacing_mm=grid.spacing_mm,
        origin_mm=(ox + x[0] * dx, oy + y[0] * dy, oz + z[0] * dz),
        frame_of_reference_uid=grid.frame_of_reference_uid,
    )


def _mm(spacing: Triple) -> str:
    return " x ".join(f"{s:.4g}" for s in spacing) + " mm"
