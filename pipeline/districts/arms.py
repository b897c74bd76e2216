"""The arms: parts that lie loose beside the body, and bones outside the trunk's own hull with the flesh around them.

Arrays are [z, y, x] on the working grid (about 4 mm); lengths are in its voxels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.morphology import convex_hull_image
from skimage.segmentation import watershed

from pipeline.districts.body import Mask, labeled_parts
from pipeline.districts.landmarks import Landmarks, Level
from pipeline.districts.profile import AIR_HU, BONE_HU, FloatArray
from pipeline.types import FloatVolume

ARM_BONE_HU = 220.0
WALL_VOXELS = 4.0  # lung to the outside of the ribs
GAP_VOXELS = 3.0  # an arm's bone keeps at least this from the hull: skin, fat and muscle of arm and trunk
MEDIAL = 0.25  # a bone nearer to the midline than this, in half-widths of the trunk, is no arm's
AXIS_SHARE = 0.8  # of the greatest depth within NEAR_VOXELS: on a limb's axis it is 1, at a rib about a half
NEAR_VOXELS = 6
SLIM_LIMB = 0.6  # an arm's depth is at most this share of the trunk's
MIN_BONE_VOXELS = 25  # about 1.6 ml: less is noise or a calcification
STOUT_VOXELS = 2.0  # half a humerus' shaft; twice half a shoulder blade
MIN_LENGTH_VOXELS = 15  # a shoulder at the volume's end is no arm yet
ROOT_SHARE = 0.2
WAIST_SLICES = 14  # half the distance from the ribs to the pelvis


@dataclass(frozen=True, kw_only=True, slots=True)
class Arms:
    """`mask` [z, y, x]; `loose` is the share of it that was separate already, which makes its border certain."""

    mask: Mask
    loose: float


def find_arms(hu: FloatVolume, body: Mask, core: Mask, landmarks: Landmarks, midline: FloatArray) -> Arms:
    """Arms and hands of a body; `core` and `midline` from `profile`, `landmarks` from `find_landmarks`."""
    levels = landmarks.levels
    apart = loose_limbs(hu, body & ~without_hands_at_head(core, landmarks, midline), levels, midline)
    rest = body & ~apart
    hull = trunk_hull(hu, rest, levels, midline)
    depth = skin_depth(rest)
    bones = arm_bones(hu, rest, hull, depth, levels)
    fused = flesh_around(bones, rest, hull, depth)
    mask = apart | fused
    total = int(mask.sum())
    return Arms(mask=mask, loose=float(apart.sum() / total) if total else 1.0)


def without_hands_at_head(core: Mask, landmarks: Landmarks, midline: FloatArray) -> Mask:
    """The core without parts beside the head and above the crown, which without legs can only be raised arms."""
    kept = core.copy()
    kept[landmarks.crown :] = False
    for z in np.flatnonzero(landmarks.levels >= Level.NECK):
        parts, _ = ndimage.label(kept[z])
        x = int(np.clip(round(midline[z]), 0, core.shape[2] - 1))
        across = np.unique(parts[:, max(x - 1, 0) : x + 2])
        kept[z] = np.isin(parts, across[across > 0])
    return kept


def loose_limbs(hu: FloatVolume, loose: Mask, levels: NDArray[np.int64], midline: FloatArray) -> Mask:
    """Those loose parts that hold bone, are not a chin, and do not lie among the legs alone."""
    parts, sizes = labeled_parts(loose)
    keep = np.zeros(len(sizes) + 1, dtype=bool)
    for index, box in enumerate(ndimage.find_objects(parts), start=1):
        part = parts[box] == index
        middle, level = midline[box[0]], levels[box[0]]
        one_side = bool((box[2].start > middle).all() or (box[2].stop - 1 < middle).all())
        chin = not one_side and level.min() >= Level.NECK and box[0].stop - box[0].start < MIN_LENGTH_VOXELS
        hanging = level.max() > Level.LEGS or box[0].stop == len(levels)
        bone = int((part & (hu[box] > ARM_BONE_HU)).sum())
        keep[index] = not chin and hanging and bone >= MIN_BONE_VOXELS
    return keep[parts]


def trunk_hull(hu: FloatVolume, core: Mask, levels: NDArray[np.int64], midline: FloatArray) -> Mask:
    """Per slice the convex hull of what cannot be an arm: lungs with their wall, and bones near the midline."""
    bone = (hu > BONE_HU) & core
    lung = (hu < AIR_HU) & ndimage.binary_erosion(core, iterations=3)
    limit = MEDIAL * _half_width(core, levels)
    hull = np.zeros_like(core)
    for z in range(core.shape[0]):
        parts, _ = ndimage.label(bone[z])
        near = np.abs(np.arange(core.shape[2]) - midline[z]) <= limit
        if levels[z] == Level.BELLY:  # nothing but the spine: a forearm may lie across the front
            parts[: int(ndimage.center_of_mass(core[z])[0]) if core[z].any() else 0] = 0
        found = np.unique(parts[:, near])
        medial = np.isin(parts, found[found > 0])
        hull[z] = _hull(medial | _grown(lung[z], WALL_VOXELS)) & core[z]
    return _spanned(hull, lung, levels) & core


def _half_width(core: Mask, levels: NDArray[np.int64]) -> float:
    trunk = (levels > Level.LEGS) & (levels < Level.NECK)
    chosen = core[trunk] if trunk.any() else core
    widths = chosen.any(axis=1).sum(axis=1)
    return float(np.median(widths[widths > 0])) / 2.0 if (widths > 0).any() else 0.0


def _hull(points: Mask) -> Mask:
    return np.asarray(convex_hull_image(points)) if points.sum() >= 3 else points


def _grown(mask: Mask, radius: float) -> Mask:
    return np.asarray(ndimage.distance_transform_edt(~mask) <= radius) if mask.any() else mask


def _spanned(hull: Mask, lung: Mask, levels: NDArray[np.int64]) -> Mask:
    """Below the lungs the hull is carried over the waist, from the ribs down and from the pelvis up."""
    breathing = np.flatnonzero(lung.sum(axis=(1, 2)) > 0.02 * np.maximum(hull.sum(axis=(1, 2)), 1))
    low = breathing[0] if breathing.size else len(levels)
    wide = ndimage.maximum_filter1d(hull.astype(np.uint8), 2 * WAIST_SLICES + 1, axis=0).astype(bool)
    waist = (levels > Level.LEGS) & (levels < Level.NECK) & (np.arange(len(levels)) < low)
    return np.where(waist[:, None, None], wide, hull)


def arm_bones(hu: FloatVolume, core: Mask, hull: Mask, depth: FloatVolume, levels: NDArray[np.int64]) -> Mask:
    """Bones outside the hull that lie on the axis of a limb, or in front of the trunk: humerus, radius, ulna, hand.

    `depth` is each voxel's distance to the skin. Along a limb's bone it is the greatest there is near by, and small
    next to the trunk's; a rib or a shoulder blade has deeper voxels on its inner side.
    """
    bone = filled_bone(hu, core)
    outside = np.stack([_distance(plane) for plane in hull])
    axis = depth >= AXIS_SHARE * ndimage.maximum_filter(depth, size=2 * NEAR_VOXELS + 1)
    slim = depth <= SLIM_LIMB * trunk_depth(depth, levels)
    chest, trunk, legs = (_slices(m) for m in (levels == Level.CHEST, _is_belly_or_chest(levels), levels == Level.LEGS))
    on_axis = np.where(chest, stout(bone), axis & slim) & (outside > GAP_VOXELS)
    candidates = bone & (on_axis | ((outside > 1) & in_front(hull) & trunk)) & ~legs
    candidates &= ~_rooted_in(bone & _slices(levels < Level.CHEST), hull)
    parts, sizes = labeled_parts(candidates)
    keep = np.zeros(len(sizes) + 1, dtype=bool)
    for index, box in enumerate(ndimage.find_objects(parts), start=1):
        upright = box[0].stop == len(levels)  # at the upper end only a shaft tells an arm from a shoulder
        length = max(side.stop - side.start for side in (box[:1] if upright else box))
        apart = int(((parts[box] == index) & (outside[box] > GAP_VOXELS)).sum())
        keep[index] = length >= min(MIN_LENGTH_VOXELS, len(levels) - 2) and apart >= MIN_BONE_VOXELS
    return keep[parts]


def filled_bone(hu: FloatVolume, body: Mask) -> Mask:
    """Bones with their marrow, by slice."""
    bone = ndimage.binary_closing(np.pad(hu > ARM_BONE_HU, 1, mode="edge"), iterations=1)[1:-1, 1:-1, 1:-1] & body
    return np.stack([ndimage.binary_fill_holes(plane) for plane in bone])


def stout(bone: Mask) -> Mask:
    """What an opening leaves of bones: the humerus, but no shoulder blade, collar bone or rib."""
    padded = np.pad(bone, ((2, 2), (0, 0), (0, 0)), mode="edge")
    inner = ndimage.distance_transform_edt(padded) > STOUT_VOXELS
    if not inner.any():
        return np.zeros_like(bone)
    return np.asarray((ndimage.distance_transform_edt(~inner) <= STOUT_VOXELS)[2:-2] & bone)


def _slices(which: NDArray[np.bool_]) -> Mask:
    return which[:, None, None]


def _is_belly_or_chest(levels: NDArray[np.int64]) -> NDArray[np.bool_]:
    return np.asarray((levels == Level.BELLY) | (levels == Level.CHEST))


def _rooted_in(bone: Mask, hull: Mask) -> Mask:
    """Bones with a good share inside the hull: below the chest no arm's bone has one, but a femur has."""
    parts, sizes = labeled_parts(bone)
    inside = np.bincount(parts[hull], minlength=len(sizes) + 1)[1:]
    rooted = np.concatenate([[False], inside > ROOT_SHARE * np.maximum(sizes, 1)])
    return rooted[parts]


def trunk_depth(depth: FloatVolume, levels: NDArray[np.int64]) -> float:
    """Half the thickness of the trunk in voxels: the median of its slices' deepest voxels."""
    trunk = (levels > Level.LEGS) & (levels < Level.NECK)
    deepest = depth.max(axis=(1, 2))
    return float(np.median(deepest[trunk])) if trunk.any() else 0.0


def in_front(hull: Mask) -> Mask:
    """Voxels in front of the hull (less y), in the columns that it fills."""
    return np.asarray(np.cumsum(hull, axis=1) == 0) & hull.any(axis=1, keepdims=True)


def _distance(plane: Mask) -> FloatArray:
    return np.asarray(ndimage.distance_transform_edt(~plane)) if plane.any() else np.full(plane.shape, np.inf)


def flesh_around(bones: Mask, body: Mask, hull: Mask, depth: FloatVolume) -> Mask:
    """Watershed of the body's depth from the arms' bones against the trunk's hull: borders run along constrictions."""
    if not bones.any():
        return bones
    markers = np.zeros(body.shape, dtype=np.int32)
    markers[hull] = 1
    markers[bones] = 2
    return np.asarray(watershed(-depth, markers, mask=body) == 2)


def skin_depth(body: Mask) -> FloatVolume:
    """Each body voxel's distance to the skin in voxels, a little smoothed; the volume's ends are no skin."""
    padded = np.pad(body, ((0, 0), (1, 1), (1, 1)))
    depth = ndimage.distance_transform_edt(padded)[:, 1:-1, 1:-1]
    return np.asarray(ndimage.gaussian_filter(depth, 1.0), dtype=np.float32)
