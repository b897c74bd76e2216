"""The voxels of a DICOM PET series and of DICOM SEG objects, on axis-aligned LPS grids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom import Dataset

from pipeline.ct_stack import Stack
from pipeline.geometry import resample
from pipeline.types import FloatVolume, Grid
from training.cases.dicom_headers import Header, quiet_pydicom, stack_planes
from training.cases.orient import lps_axes, to_lps
from training.cases.segments import Kind, kind_of
from training.cases.types import Labels
from training.errors import StudyError

FRACTION = 0.5  # of MaximumFractionalValue: from here on a voxel of a FRACTIONAL segment belongs to it
SAME_PLACE_MM = 0.05  # closer frames are at one place; the thinnest CT slices step by 0.1 mm
OFF_GRID = 0.2  # of a slice step: how far a SEG frame may lie beside its own grid


def steps_of(stack: Stack) -> NDArray[np.float64]:
    """The stack's LPS steps by array axis [slice, row, column], as columns."""
    return stack.steps[:, [2, 1, 0]]


def check_pet_stack(stack: Stack) -> None:
    """Raises StudyError geometry_oblique unless the planes can be turned to LPS without resampling."""
    columns, rows, slices = stack.sizes
    lps_axes(steps_of(stack), (slices, rows, columns), "PET")


def read_pet(headers: Sequence[Header], frame_uid: str) -> tuple[FloatVolume, Grid]:
    """The rescaled values (not yet SUV) of a PET series, every slice by its own slope and intercept.

    Raises StudyError: unreadable, and what `stack_planes` and `to_lps` raise.
    """
    stack = stack_planes(headers, "PET", drop_duplicates=False)
    columns, rows, slices = stack.sizes
    volume = np.empty((slices, rows, columns), np.float32)
    for k, plane in enumerate(stack.frames):
        stored = _pixels(plane.path, f"instance {plane.sop_instance_uid}")
        if stored.shape != (rows, columns):
            text = f"PET: instance {plane.sop_instance_uid} holds {stored.shape} pixels, {(rows, columns)} expected"
            raise StudyError("unreadable", text)
        np.multiply(stored, np.float32(plane.slope), out=volume[k], casting="unsafe")
        volume[k] += np.float32(plane.intercept)
    return to_lps(volume, steps_of(stack), stack.origin_mm, frame_uid, "PET")


def read_segments(paths: Sequence[Path], kind: Kind, frame_uid: str, fallback: Grid) -> tuple[Labels, tuple[str, ...]]:
    """The segments of one kind of all SEG objects `paths`: lesions as 0 and 1, districts as 1 to 4, with notes.

    Several objects are united on the grid of the first if they share it, else on `fallback`.

    Raises StudyError: unreadable, geometry_oblique, geometry_seg.
    """
    maps = [_read_seg(path, kind, frame_uid, fallback) for path in paths]
    if len(maps) == 1:
        return maps[0], ()
    grid = maps[0].grid if all(m.grid == maps[0].grid for m in maps) else fallback
    united = np.zeros(grid.shape, np.uint8)
    for m in maps:
        labels = m.labels if m.grid == grid else resample(m.labels, m.grid, grid, fill=0, nearest=True)
        united = np.maximum(united, labels)
    return Labels(labels=united, grid=grid), (f"{kind}: {len(maps)} SEG objects united",)


def _read_seg(path: Path, kind: Kind, frame_uid: str, pet: Grid) -> Labels:
    with quiet_pydicom():
        try:
            volume, steps, origin = _seg_volume(pydicom.dcmread(path), kind, pet)
        except StudyError:
            raise
        except Exception as error:  # hostile bytes: parsers and decoders raise anything, elements may be missing
            text = f"SEG: the file with the {kind} cannot be read ({type(error).__name__})"
            raise StudyError("unreadable", text) from error
    labels, grid = to_lps(volume, steps, origin, frame_uid, "SEG")
    return Labels(labels=labels, grid=grid)


def _seg_volume(
    ds: Dataset, kind: Kind, pet: Grid
) -> tuple[NDArray[np.uint8], NDArray[np.float64], NDArray[np.float64]]:
    """Labels [slice, row, column] of the segments of one kind, their LPS steps and the first voxel's position."""
    values = {int(s.SegmentNumber): label for s in ds.SegmentSequence if (label := _label(s, kind))}
    groups = list(ds.get("PerFrameFunctionalGroupsSequence") or ())
    if not groups or len(groups) != int(ds.get("NumberOfFrames") or 0):
        raise StudyError("unreadable", f"SEG: instance {ds.SOPInstanceUID} does not place each of its frames")
    places = [_macro(ds, group, "PlanePositionSequence", "ImagePositionPatient") for group in groups]
    steps, origin, slices = _seg_steps(ds, groups[0], np.array(places, np.float64), pet)
    volume = np.zeros((int(slices.max()) + 1, int(ds.Rows), int(ds.Columns)), np.uint8)
    stored = ds.pixel_array.reshape(len(groups), int(ds.Rows), int(ds.Columns))
    for group, k, pixels in zip(groups, slices, stored, strict=True):
        if str(ds.get("SegmentationType")) == "LABELMAP":  # one frame holds all segments by number (PS3.3 C.8.20.2)
            for number, label in values.items():
                volume[k][pixels == number] = label
            continue
        number = int(_macro(ds, group, "SegmentIdentificationSequence", "ReferencedSegmentNumber"))
        if number in values:
            volume[k][_inside(pixels, ds)] = values[number]
    return volume, steps, origin


def _label(segment: Dataset, kind: Kind) -> int:
    found, district = kind_of(segment)
    return 0 if found != kind else int(district or 1)


def _seg_steps(
    ds: Dataset, group: Dataset, places: NDArray[np.float64], pet: Grid
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.intp]]:
    """LPS steps by array axis [slice, row, column], the first plane's position, and the slice of each frame.

    Frames without a voxel are often left out, so that the step is the smallest distance and not the mean; and less
    where no two neighbors are left: what the object says of its slices, if the frames lie on that.
    """
    cosines = np.array(_macro(ds, group, "PlaneOrientationSequence", "ImageOrientationPatient"), np.float64)
    between_rows, between_columns = (float(v) for v in _macro(ds, group, "PixelMeasuresSequence", "PixelSpacing"))
    row, column = cosines[:3], cosines[3:]
    normal = np.cross(row, column)
    along = places @ normal
    gaps = np.diff(np.sort(along))
    gaps = gaps[gaps > SAME_PLACE_MM]
    step = float(gaps[gaps < 1.5 * gaps.min()].mean()) if len(gaps) else _slice_step(ds, group)
    own = _value(ds, group, "SpacingBetweenSlices")
    if not own:  # a thickness may be more or less than the step, but not where it is the PET's step too
        thickness, pet_step = _value(ds, group, "SliceThickness"), pet.spacing_mm[2 - int(np.argmax(np.abs(normal)))]
        own = pet_step if abs(thickness / pet_step - 1) < OFF_GRID / 2 else 0.0
    if len(gaps) and own and _lies_on(gaps, own):
        step = own
    for _ in range(2):  # the fit over all planes mends what rounded positions did to the first guess
        whole = np.rint((along - along.min()) / step)
        step = float(np.polyfit(whole, along, 1)[0]) if len(gaps) else step
    off = np.abs((along - along.min()) / step - whole).max()
    if off > OFF_GRID:
        text = f"SEG: instance {ds.SOPInstanceUID}: frames lie {off * step:.2f} mm beside planes {step:.2f} mm apart"
        raise StudyError("geometry_seg", text)
    steps = np.column_stack([normal * step, column * between_rows, row * between_columns])
    return steps, places[int(np.argmin(along))], whole.astype(np.intp)


def _lies_on(gaps: NDArray[np.float64], step: float) -> bool:
    """Whether every gap is several whole steps: none of them is the step itself."""
    whole = np.rint(gaps / step)
    return bool(whole.min() >= 2 and np.abs(gaps - whole * step).max() < OFF_GRID / 2 * step)


def _slice_step(ds: Dataset, group: Dataset) -> float:
    spacing = _value(ds, group, "SpacingBetweenSlices")
    return spacing or float(_macro(ds, group, "PixelMeasuresSequence", "SliceThickness"))


def _value(ds: Dataset, group: Dataset, keyword: str) -> float:
    """A length of the Pixel Measures in mm; 0 where it is not said."""
    try:
        return abs(float(_macro(ds, group, "PixelMeasuresSequence", keyword)))
    except StudyError:
        return 0.0


def _macro(ds: Dataset, group: Dataset, sequence: str, keyword: str) -> Any:
    """A value of a functional group: of the frame, else shared by all (PS3.3 C.7.6.16)."""
    for holder in (group, *(ds.get("SharedFunctionalGroupsSequence") or ())):
        for item in holder.get(sequence) or ():
            if item.get(keyword) is not None:
                return item.get(keyword)
    raise StudyError("unreadable", f"SEG: instance {ds.SOPInstanceUID} has a frame without {keyword}")


def _inside(pixels: NDArray[Any], ds: Dataset) -> NDArray[np.bool_]:
    if str(ds.get("SegmentationType")) == "FRACTIONAL":
        inside: NDArray[np.bool_] = pixels >= FRACTION * int(ds.get("MaximumFractionalValue") or 1)
        return inside
    return pixels > 0


def _pixels(path: Path, name: str) -> NDArray[Any]:
    with quiet_pydicom():
        try:
            return pydicom.dcmread(path).pixel_array
        except Exception as error:  # decoders raise anything on broken data
            text = f"PET: {name}: pixel data cannot be decoded ({type(error).__name__})"
            raise StudyError("unreadable", text) from error
