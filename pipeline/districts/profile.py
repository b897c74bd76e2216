"""What every axial slice looks like, in numbers without a unit.

All features are shares of the slice or of the volume's own medians: a header whose spacing is wrong by any
factor gives the same profile.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.segmentation import watershed

from pipeline.districts.body import Mask
from pipeline.types import FloatVolume

FloatArray = NDArray[np.float64]

BONE_HU = 200.0  # on the working grid, where thin cortex is averaged with its surroundings
SKULL_HU = 150.0  # a thin skull must stay a closed ring
AIR_HU = -500.0
SPINE_STRIP = 0.09  # half-width of the midline strip, in widths of the body: vertebrae fit, hips do not
BRIDGE_VOXELS = 5.0  # skin on skin; a neck or a wrist is thicker
SMOOTH_SLICES = 2.0  # one vertebra and its disc: the spine is never gone for a slice


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """One value per slice, foot to head, smoothed along z."""

    area: FloatArray  # voxels of the core: body without loose arms
    spine: FloatArray  # bone in the midline strip, as a share of the strip
    bone: FloatArray  # bone anywhere, as a share of the core
    air: FloatArray  # lung, airways and bowel gas, as a share of the core
    skull: FloatArray  # what bone encloses in the slice (brain), as a share of the core
    hips: FloatArray  # largest bone beside the midline strip, as a share of the core: iliac wing, femur, no rib
    cleft: FloatArray  # share of the midline, front to back, that is not body: the gap between the legs
    width: FloatArray  # left to right extent of the core in voxels
    midline: FloatArray  # x index of the midline


def make_profile(hu: FloatVolume, body: Mask, core: Mask, midline: FloatArray) -> Profile:
    """Measure every slice of `core` (body without loose arms), all [z, y, x]; `midline` from `find_midline`."""
    area = core.sum(axis=(1, 2)).astype(np.float64)
    safe = np.maximum(area, 1.0)
    bone = (hu > BONE_HU) & core
    width = np.array([_extent(plane.any(axis=0)) for plane in core])
    strip = _strip(core.shape, midline, SPINE_STRIP * np.median(width[area > 0]))
    thin = _strip(core.shape, midline, 1.0)
    return Profile(
        area=_smooth(area),
        spine=_smooth((bone & strip).sum(axis=(1, 2)) / np.maximum((core & strip).sum(axis=(1, 2)), 1)),
        bone=_smooth(bone.sum(axis=(1, 2)) / safe),
        air=_smooth(((hu < AIR_HU) & core).sum(axis=(1, 2)) / safe),
        skull=_smooth(np.array([_enclosed(plane) for plane in (hu > SKULL_HU) & core]) / safe),
        hips=_smooth(np.array([_largest(plane) for plane in bone & ~strip]) / safe),
        cleft=_smooth(np.array([_gap(b & t, p) for b, t, p in zip(body, thin, core, strict=True)])),
        width=_smooth(width),
        midline=midline,
    )


def find_midline(body: Mask) -> FloatArray:
    """x index of the patient's middle per slice: a straight line through the slices' centers (Theil-Sen)."""
    z = np.flatnonzero(body.any(axis=(1, 2)))
    columns = body[z].sum(axis=1)
    x = (columns * np.arange(body.shape[2])).sum(axis=1) / columns.sum(axis=1)
    half = len(z) // 2
    slope = float(np.median((x[half:] - x[: len(x) - half]) / half)) if half >= 4 else 0.0
    offset = float(np.median(x - slope * z))
    return np.asarray(offset + slope * np.arange(body.shape[0]), dtype=np.float64)


def central_parts(body: Mask, midline: FloatArray) -> Mask:
    """The body without parts of a slice that lie loose beside its middle: separate arms and hands.

    Where one part of the slice holds the midline (head, trunk, closed legs), that part is the core; where none
    does (legs apart), the nearest part on each side is. Parts that only touch are told apart first.
    """
    core = np.zeros_like(body)
    for z, plane in enumerate(body):
        parts = touching_parts(plane)
        if parts.any():
            core[z] = np.isin(parts, _central(parts, midline[z]))
    return core


def touching_parts(plane: Mask) -> NDArray[np.int32]:
    """Parts of one slice, cut where they are joined by less than `BRIDGE_VOXELS`; every voxel belongs to one."""
    inside = ndimage.distance_transform_edt(np.pad(plane, 1))[1:-1, 1:-1]
    seeds, count = ndimage.label(inside > BRIDGE_VOXELS / 2)
    if count == 0:
        return np.asarray(ndimage.label(plane)[0], dtype=np.int32)
    return np.asarray(watershed(-inside, seeds, mask=plane), dtype=np.int32)


def _central(parts: NDArray[np.int32], middle: float) -> list[int]:
    boxes = ndimage.find_objects(parts)
    sizes = np.bincount(parts.ravel())[1:]
    spans = [(i, box[1].start - 0.5, box[1].stop - 0.5) for i, box in enumerate(boxes, start=1)]
    holding = [(i, lo, hi) for i, lo, hi in spans if lo <= middle <= hi]
    if holding:
        return [max(holding, key=lambda span: sizes[span[0] - 1])[0]]
    left = [(lo, i) for i, lo, _ in spans if lo > middle and sizes[i - 1] > 0.05 * sizes.max()]
    right = [(-hi, i) for i, _, hi in spans if hi < middle and sizes[i - 1] > 0.05 * sizes.max()]
    return [min(side)[1] for side in (left, right) if side]


def _strip(shape: tuple[int, ...], midline: FloatArray, half_width: float) -> Mask:
    """True within `half_width` voxels of the midline, broadcast to [z, 1, x]."""
    return np.asarray(np.abs(np.arange(shape[2])[None, None, :] - midline[:, None, None]) <= half_width)


def _enclosed(bone: Mask) -> int:
    """Voxels that a closed ring of bone holds; small gaps (sutures, foramina) are bridged."""
    closed = ndimage.binary_closing(np.pad(bone, 2), iterations=1)
    return int(ndimage.binary_fill_holes(closed).sum() - closed.sum())


def _largest(plane: Mask) -> int:
    parts, count = ndimage.label(ndimage.binary_fill_holes(plane))
    return int(np.bincount(parts.ravel())[1:].max()) if count else 0


def _gap(middle: Mask, core: Mask) -> float:
    """Share of the core's front-to-back extent that the midline columns do not fill."""
    depth = _extent(np.asarray(core.any(axis=1)))
    return 1.0 - min(1.0, float(middle.any(axis=1).sum()) / depth) if depth else 0.0


def _extent(occupied: NDArray[np.bool_]) -> float:
    where = np.flatnonzero(occupied)
    return float(where[-1] - where[0] + 1) if where.size else 0.0


def _smooth(values: FloatArray) -> FloatArray:
    return np.asarray(ndimage.gaussian_filter1d(values.astype(np.float64), SMOOTH_SLICES, mode="nearest"))
