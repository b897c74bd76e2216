"""From planes in any order to one regular stack, and from the stack to an axis-aligned LPS grid.

Pure geometry. A stack is described by the three LPS steps (mm) that lead from one voxel to its neighbor along a
row, along a column and along the slices; with a tilted gantry the last is not at right angles to the others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.ct_headers import Frame
from pipeline.errors import UnsupportedSeries
from pipeline.types import Grid

MIN_SLICES = 3  # two steps: with one there is nothing to compare the spacing with
DUPLICATE_MM = 0.01  # closer planes are the same position; the thinnest CT slices step by 0.1 mm
ORIENTATION_TOLERANCE = 1e-3  # of a direction cosine: 0.25 mm at the edge of a 500 mm field
SPACING_TOLERANCE = 1e-3  # relative, of the pixel spacing: 0.5 mm over a 500 mm field
JITTER = 0.1  # of the slice spacing: rounded positions and table jitter; more would bend the anatomy
GAP = 1.5  # times the median step: from here on a slice must be missing
MAX_GAP_SHARE = 0.1  # more gaps than this share of the slices is another spacing, not a loss
IN_PLANE_DRIFT_MM = 0.5  # how far a plane may lie beside the line through the first and last one
SNAP_VOXELS = 0.5  # an axis that ends less than half a voxel beside an LPS axis is taken as parallel to it
MAX_SHEAR_DEG = 45.0  # gantries tilt to 30 degrees
MAX_VOXELS = 1_600_000_000  # 6.4 GB of float32; 1,500 slices of 1024x1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Stack:
    """A regular stack of `frames`, foot to head (or along +x, +y for sagittal and coronal stacks).

    `steps` is 3x3: its columns are the LPS steps (mm) along a row, along a column, and from slice to slice.
    """

    frames: tuple[Frame, ...]
    origin_mm: NDArray[np.float64]
    steps: NDArray[np.float64]
    tilt_deg: float  # between the slice step and the normal of the planes
    notes: tuple[str, ...] = ()

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Columns, rows, slices: how many voxels each step is taken through."""
        pixels = self.frames[0].pixels
        return pixels.columns, pixels.rows, len(self.frames)


def check_same(frames: Sequence[Frame]) -> None:
    """Raises UnsupportedSeries unless all frames share series, study, Frame of Reference, matrix and orientation."""
    first = frames[0]
    for code, what, values in (
        ("mixed_series", "Series Instance UIDs", {f.series_uid for f in frames}),
        ("mixed_series", "Study Instance UIDs", {f.study_uid for f in frames}),
        ("mixed_series", "SOP Class UIDs", {f.sop_class_uid for f in frames}),
        ("mixed_frame_of_reference", "Frame of Reference UIDs", {f.frame_of_reference_uid for f in frames}),
        ("mixed_spacing", "matrix sizes", {(f.pixels.rows, f.pixels.columns) for f in frames}),
    ):
        if len(values) > 1:
            raise UnsupportedSeries(code, f"series {first.series_uid} mixes {len(values)} {what}, 1 is expected")
    spacing = np.array([f.pixel_spacing_mm for f in frames])
    if np.any(np.ptp(spacing, axis=0) > SPACING_TOLERANCE * spacing[0]):
        low, high = spacing.min(axis=0), spacing.max(axis=0)
        text = f"series {first.series_uid} mixes pixel spacings from {low.tolist()} to {high.tolist()} mm"
        raise UnsupportedSeries("mixed_spacing", text)
    orientation = np.array([f.orientation for f in frames])
    if np.abs(orientation - orientation[0]).max() > ORIENTATION_TOLERANCE:
        raise UnsupportedSeries("mixed_orientation", f"series {first.series_uid} holds planes of several orientations")


def sort_along_normal(frames: Sequence[Frame]) -> list[list[Frame]]:
    """The frames in the order of their planes along the normal, those at one position together.

    Positions alone decide (PS3.3 C.7.6.2.1.1), never the instance number. Raises unsupported_geometry.
    """
    _, _, normal = axes_of(frames[0])
    along = {id(f): float(np.dot(f.position, normal)) for f in frames}
    ordered = sorted(frames, key=lambda f: (along[id(f)], f.sop_instance_uid, f.index))
    groups: list[list[Frame]] = []
    for frame in ordered:
        if groups and along[id(frame)] - along[id(groups[-1][0])] < DUPLICATE_MM:
            groups[-1].append(frame)
        else:
            groups.append([frame])
    return groups


def axes_of(frame: Frame) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Unit vectors along a row, along a column, and their normal. Raises unsupported_geometry."""
    row, column = np.array(frame.orientation[:3]), np.array(frame.orientation[3:])
    lengths = np.array([np.linalg.norm(row), np.linalg.norm(column)])
    if np.abs(lengths - 1).max() > 1e-2 or abs(float(row @ column)) > 1e-2:
        text = f"series {frame.series_uid}: the image orientation is not two unit vectors at right angles"
        raise UnsupportedSeries("unsupported_geometry", text)
    row = row / lengths[0]
    column = column - row * float(row @ column)
    column = column / np.linalg.norm(column)
    return row, column, np.cross(row, column)


def stack_of(frames: Sequence[Frame]) -> Stack:
    """The regular stack of `frames`, which are sorted along their normal and have no duplicates.

    Raises UnsupportedSeries: single_slice, too_few_slices, missing_slices, mixed_spacing, unsupported_geometry.
    """
    series = frames[0].series_uid
    if len(frames) < MIN_SLICES:
        code = "single_slice" if len(frames) == 1 else "too_few_slices"
        raise UnsupportedSeries(code, f"series {series} has {len(frames)} slices, at least {MIN_SLICES} are needed")
    row, column, normal = axes_of(frames[0])
    positions = np.array([f.position for f in frames])
    notes = _check_regular(frames, positions, normal)
    step = (positions[-1] - positions[0]) / (len(frames) - 1)
    tilt = math.degrees(math.acos(min(1.0, float(step @ normal) / float(np.linalg.norm(step)))))
    if tilt > MAX_SHEAR_DEG:
        text = f"series {series}: the slices step {tilt:.0f} degrees beside the normal of their planes"
        raise UnsupportedSeries("unsupported_geometry", text)
    ordered = tuple(frames)
    if step[np.argmax(np.abs(step))] < 0:  # the normal points down: foot to head all the same
        ordered, positions, step = ordered[::-1], positions[::-1], -step
    between_rows, between_columns = frames[0].pixel_spacing_mm
    return Stack(
        frames=ordered,
        origin_mm=positions[0],
        steps=np.round(np.column_stack([row * between_columns, column * between_rows, step]), 9),
        tilt_deg=tilt,
        notes=notes,
    )


def _check_regular(
    frames: Sequence[Frame], positions: NDArray[np.float64], normal: NDArray[np.float64]
) -> tuple[str, ...]:
    """Steps must be one step: a gap, two spacings or planes beside the line are refused, jitter is noted."""
    series = frames[0].series_uid
    along = positions @ normal
    steps = np.diff(along)
    median = float(np.median(steps))
    gaps = np.flatnonzero(steps >= GAP * median)
    if 0 < len(gaps) <= max(1, MAX_GAP_SHARE * len(frames)):
        below, above = frames[gaps[0]].position, frames[gaps[0] + 1].position
        missing = sum(round(float(steps[g]) / median) - 1 for g in gaps)
        text = (
            f"series {series}: {missing} slices are missing, first between {_place(below)} and {_place(above)} "
            f"(a step of {steps[gaps[0]]:.2f} mm, the others are {median:.2f} mm)"
        )
        raise UnsupportedSeries("missing_slices", text)
    line = np.linspace(positions[0], positions[-1], len(frames))
    beside = positions - line
    along_error = np.abs(beside @ normal).max()
    if along_error > JITTER * median or np.abs(steps - median).max() > JITTER * median:
        text = f"series {series}: slice steps from {steps.min():.3f} to {steps.max():.3f} mm, one spacing is expected"
        raise UnsupportedSeries("mixed_spacing", text)
    in_plane = np.linalg.norm(beside - np.outer(beside @ normal, normal), axis=1).max()
    if in_plane > IN_PLANE_DRIFT_MM:
        text = f"series {series}: planes lie up to {in_plane:.2f} mm beside a straight stack"
        raise UnsupportedSeries("unsupported_geometry", text)
    jitter = max(float(along_error), float(in_plane))
    return (f"slice positions jitter by up to {jitter:.3f} mm: taken as regular",) if jitter > DUPLICATE_MM else ()


def _place(position: tuple[float, float, float]) -> str:
    x, y, z = position
    return f"({x:.1f}, {y:.1f}, {z:.1f}) mm"


def aligned_axes(stack: Stack) -> tuple[int, int, int] | None:
    """The LPS axis (0 x, 1 y, 2 z) of the row, column and slice step, or None if one is parallel to no axis."""
    axes = tuple(int(a) for a in np.argmax(np.abs(stack.steps), axis=0))
    if sorted(axes) != [0, 1, 2]:
        return None
    voxel = float(np.linalg.norm(stack.steps, axis=0).min())
    for step, axis, size in zip(stack.steps.T, axes, stack.sizes, strict=True):
        beside = np.abs(np.delete(step, axis)) * (size - 1)
        if beside.max() > SNAP_VOXELS * voxel:
            return None
    return axes[0], axes[1], axes[2]


def aligned_grid(stack: Stack, axes: tuple[int, int, int], frame_of_reference_uid: str) -> Grid:
    """The grid of an aligned stack: its own voxels, with flipped and permuted axes."""
    origin, spacing, shape = stack.origin_mm.copy(), [0.0] * 3, [0] * 3
    for step, axis, size in zip(stack.steps.T, axes, stack.sizes, strict=True):
        shape[2 - axis], spacing[2 - axis] = size, abs(float(step[axis]))
        if step[axis] < 0:
            origin[axis] += step[axis] * (size - 1)
    return _grid(shape, spacing, origin, frame_of_reference_uid)


def enclosing_grid(stack: Stack, frame_of_reference_uid: str) -> Grid:
    """The axis-aligned grid around an oblique or tilted stack, edge to edge, at nearly the stack's own spacing.

    Raises too_large when the box around it has more than MAX_VOXELS.
    """
    sizes = np.array(stack.sizes)
    corners = np.array(np.meshgrid(*[(-0.5, n - 0.5) for n in sizes], indexing="ij")).reshape(3, -1)
    points = stack.origin_mm[:, None] + stack.steps @ corners
    low, high = points.min(axis=1), points.max(axis=1)
    spacing = np.array([_spacing_along(stack.steps, axis) for axis in range(3)])
    counts = np.maximum(1, np.ceil((high - low) / spacing - 1e-3)).astype(int)
    check_size(int(np.prod(counts.astype(np.int64))), stack.frames[0].series_uid)
    origin = (low + high) / 2 - (counts - 1) / 2 * spacing
    return _grid(counts[::-1].tolist(), spacing[::-1].tolist(), origin, frame_of_reference_uid)


def _spacing_along(steps: NDArray[np.float64], axis: int) -> float:
    """Along one LPS axis: the length of the step that goes most along it; a sheared slice step counts by its part."""
    lengths = np.linalg.norm(steps, axis=0)
    best = int(np.argmax(np.abs(steps[axis]) / lengths))
    return float(abs(steps[axis, best]) if best == 2 else lengths[best])


def check_size(voxels: int, series: str) -> None:
    """Raises too_large beyond MAX_VOXELS."""
    if voxels > MAX_VOXELS:
        text = f"series {series} makes a volume of {voxels:,} voxels, at most {MAX_VOXELS:,} are accepted"
        raise UnsupportedSeries("too_large", text)


def _grid(shape: Sequence[int], spacing: Sequence[float], origin: NDArray[np.float64], frame_uid: str) -> Grid:
    return Grid(
        shape=(shape[0], shape[1], shape[2]),
        spacing_mm=(spacing[0], spacing[1], spacing[2]),
        origin_mm=(float(origin[0]), float(origin[1]), float(origin[2])),
        frame_of_reference_uid=frame_uid,
    )
