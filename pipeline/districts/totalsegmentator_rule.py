"""From TotalSegmentator's label maps of the tasks `total` (117 classes) and `body` to districts.

    trunk of `body`         head above the border between neck and chest, trunk below it
    extremities of `body`   each loose part goes to the bone in it: humerus - arms, femur - legs
    neither                 the organs of `total` speak for themselves, so that they can be grown over the rest

The border is the slice that parts skull, brain and cervical vertebrae from thoracic and lumbar vertebrae, sacrum and
hips with the fewest voxels on the wrong side. The humerus is always arms: its head lies in the trunk of `body`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.segmentation import watershed

from pipeline.types import District, LabelVolume

Mask = NDArray[np.bool_]

# classes of task "total", TotalSegmentator 2 (map_to_binary.py)
TOTAL_CLASSES = range(1, 118)
HEAD_BONES = (*range(44, 51), 90, 91)  # vertebrae C7 to C1, brain, skull
TRUNK_BONES = (*range(25, 44), 77, 78)  # sacrum, vertebrae S1 to T1, hips
HUMERI, FEMORA = (69, 70), (75, 76)
# and of task "body"
BODY_CLASSES = (BODY_TRUNK, BODY_EXTREMITIES) = (1, 2)
CONTACT_MM = 6.0  # a hand on a thigh touches it with less than twice this depth; a wrist is thicker


def combined(total: LabelVolume, body: LabelVolume, spacing_mm: tuple[float, float, float]) -> LabelVolume:
    """Districts [z, y, x], 0 where neither map says anything; both maps and the result are uint8 on one grid."""
    border = head_border(np.isin(total, HEAD_BONES), np.isin(total, TRUNK_BONES))
    slices = np.where(np.arange(total.shape[0]) >= border, District.HEAD, District.TRUNK).astype(np.uint8)
    core = (body == BODY_TRUNK) | (total > 0)
    labels = np.where(core, slices[:, None, None], 0).astype(np.uint8)
    labels[np.isin(total, FEMORA) & (body != BODY_TRUNK)] = District.LEGS
    limbs = body == BODY_EXTREMITIES
    labels[limbs] = limb_districts(limbs, total, body == BODY_TRUNK, spacing_mm)[limbs]
    labels[np.isin(total, HUMERI)] = District.ARMS
    return labels


def head_border(head: Mask, trunk: Mask) -> int:
    """The first slice of the head: the fewest voxels of `head` lie below it and of `trunk` above.

    Without any of `head` it is the depth (no head), without any of `trunk` 0 (nothing else).
    """
    up, down = (np.concatenate(([0], np.cumsum(m.sum(axis=(1, 2))))) for m in (head, trunk))
    if not up[-1]:
        return head.shape[0]
    if not down[-1]:
        return 0
    wrong = up + (down[-1] - down)
    best = np.flatnonzero(wrong == wrong.min())
    return int(best[len(best) // 2])  # in the middle of a gap between the bones


def limb_districts(limbs: Mask, total: LabelVolume, core: Mask, spacing_mm: tuple[float, float, float]) -> LabelVolume:
    """ARMS or LEGS for every voxel of `limbs` [z, y, x], by the bones of each part; 0 elsewhere.

    Parts are what is left of the limbs less `CONTACT_MM`, so that fingers that touch a thigh are not one part with it.
    A part with both bones is flooded from them and divided where it is thinnest. One with neither is a leg if it lies
    below the trunk `core`, or if there is no trunk, and else an arm.
    """
    result = np.zeros(limbs.shape, dtype=np.uint8)
    if not limbs.any():
        return result
    depth = ndimage.distance_transform_edt(limbs, spacing_mm)
    parts, _ = ndimage.label(depth > CONTACT_MM, structure=np.ones((3, 3, 3)))
    if not parts.any():
        parts, _ = ndimage.label(limbs, structure=np.ones((3, 3, 3)))
    arm, leg = np.isin(total, HUMERI), np.isin(total, FEMORA)
    lowest = int(np.flatnonzero(core.any(axis=(1, 2)))[0]) if core.any() else limbs.shape[0]
    for index, box in enumerate(ndimage.find_objects(parts), start=1):
        part = parts[box] == index
        of_arm, of_leg = bool((part & arm[box]).any()), bool((part & leg[box]).any())
        if of_arm and of_leg:
            seeds = np.where(arm[box], District.ARMS, np.where(leg[box], District.LEGS, 0))
            result[box][part] = watershed(-depth[box], seeds, mask=part)[part]
            continue
        below = box[0].start + float(np.nonzero(part)[0].mean()) < lowest
        result[box][part] = District.ARMS if of_arm or not (of_leg or below) else District.LEGS
    near = ndimage.distance_transform_edt(result == 0, spacing_mm, return_distances=False, return_indices=True)
    return np.where(limbs, result[tuple(near)], 0).astype(np.uint8)
