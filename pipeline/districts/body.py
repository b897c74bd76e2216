"""The body mask: what is patient, without table, mattress, blanket and headrest.

Arrays are [z, y, x] on the working grid (about 4 mm); radii are in its voxels, never in mm, so that a header
with a wrong spacing gives the same mask.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from pipeline.types import FloatVolume

Mask = NDArray[np.bool_]

SKIN_HU = -350.0  # half-way between air and fat, less some partial volume
THIN_VOXELS = 2.0  # table shells, blankets and cushions' covers are thinner than twice this (about 16 mm)
SOFT_HU = (-200.0, 250.0)
MIN_PART = 0.002  # a separate part of the body below this share of the largest one is a cable or a pad
RIND_VOXELS = 2.0  # a limb's bone lies deeper; a table's bright shell does not
MIN_SOFT_SHARE = 0.6  # of a part's inner voxels: foam and wood are lighter
MIN_BONE_SHARE = 0.005  # a separate limb holds bone, a cushion does not
MIN_BODY_VOXELS = 500


def body_mask(hu: FloatVolume) -> Mask:
    """True inside the patient, cavities included; all False when there is no patient in `hu` [z, y, x]."""
    solid = np.asarray(hu > SKIN_HU)
    core = without_thin_parts(solid, THIN_VOXELS)
    parts, sizes = labeled_parts(core)
    if not sizes.size or sizes.max() < MIN_BODY_VOXELS:
        return np.zeros_like(solid)
    kept = np.zeros_like(solid)
    for index, (size, box) in enumerate(zip(sizes, ndimage.find_objects(parts), strict=True), start=1):
        part = parts[box] == index
        if size >= MIN_PART * sizes.max() and is_patient(hu[box], part, largest=bool(size == sizes.max())):
            kept[box] |= part
    return filled_by_slice(grown_within(kept, solid, THIN_VOXELS))


def without_thin_parts(mask: Mask, radius: float) -> Mask:
    """Opening by a ball of `radius` voxels; the volume's ends count as body, so that slabs do not erode."""
    padded = np.pad(mask, int(radius) + 1, mode="edge")
    inside = ndimage.distance_transform_edt(padded) > radius
    opened = ndimage.distance_transform_edt(~inside) <= radius
    inner = slice(int(radius) + 1, -int(radius) - 1)
    return np.asarray(opened[inner, inner, inner] & mask)


def grown_within(seed: Mask, mask: Mask, radius: float) -> Mask:
    """`seed` and the voxels of `mask` at most `radius` away: skin folds, ears and fingertips come back."""
    if not seed.any():
        return seed
    return np.asarray((ndimage.distance_transform_edt(~seed) <= radius) & mask) | seed


def labeled_parts(mask: Mask) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """26-connected parts of a mask, and their sizes in voxels, part 1 first."""
    parts, count = ndimage.label(mask, structure=np.ones((3, 3, 3)))
    return parts.astype(np.int32), np.bincount(parts.ravel(), minlength=count + 1)[1:]


def is_patient(hu: FloatVolume, part: Mask, *, largest: bool) -> bool:
    """Whether one connected part is tissue: mostly soft inside, and with bone there unless it is the largest."""
    depth = ndimage.distance_transform_edt(np.pad(part, ((0, 0), (1, 1), (1, 1))))[:, 1:-1, 1:-1]
    inside = hu[depth > RIND_VOXELS]
    if not inside.size:
        return False
    soft = np.mean((inside > SOFT_HU[0]) & (inside < SOFT_HU[1]))
    bone = np.mean(inside > SOFT_HU[1])
    return bool(soft + bone >= MIN_SOFT_SHARE and (largest or bone >= MIN_BONE_SHARE))


def filled_by_slice(mask: Mask) -> Mask:
    """Lungs, airways and bowel gas belong to the body; filled in each axial slice, as lungs are open at the ends."""
    return np.stack([ndimage.binary_fill_holes(plane) for plane in mask]) if mask.any() else mask
