"""The built-in segmenter: head, trunk, arms and legs from the CT alone, without outside weights.

It works on a grid of at most 128 x 128 voxels in the plane (about 4 mm for a usual field of view), cubic, and in
voxels of it: a header whose spacing is wrong by any factor gives the same districts.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from pipeline.districts.arms import Arms, find_arms
from pipeline.districts.body import Mask, body_mask
from pipeline.districts.landmarks import Landmarks, find_landmarks
from pipeline.districts.profile import central_parts, find_midline, make_profile
from pipeline.errors import DistrictError
from pipeline.geometry import bounding_box, grid_at_spacing, resample
from pipeline.types import CtVolume, District, DistrictMap, DistrictOptions, FloatVolume, Grid, LabelVolume

NAME = "builtin"
VERSION = "1"
MATRIX = 128  # voxels across the larger side of the field of view
MARGIN = 3  # voxels of air around the body, where the field has them
MIN_SHARE = 0.005  # of the body; a smaller district is a slip of a border, not a district
AIR_HU = -1024.0


def segment(ct: CtVolume, grid: Grid, _: DistrictOptions) -> DistrictMap:
    """Districts of `ct` on `grid`. Raises DistrictError (code no_body) where there is no patient."""
    coarse = working_grid(ct.grid)
    hu = shrink(ct.hu, ct.grid, coarse)
    labels, confidence, notes = segment_coarse(hu)
    return DistrictMap(
        labels=resample(labels, coarse, grid, fill=0, nearest=True),
        grid=grid,
        segmenter=NAME,
        version=VERSION,
        confidence=confidence,
        notes=notes,
    )


def segment_coarse(hu: FloatVolume) -> tuple[LabelVolume, dict[District, float], tuple[str, ...]]:
    """Labels, confidence and notes for HU [z, y, x] on cubic voxels of about 4 mm. Raises DistrictError."""
    body = body_mask(hu)
    box = bounding_box(body, MARGIN)
    if box is None:
        raise DistrictError("no_body", f"segmenting districts: no patient in a volume of {hu.shape} voxels")
    labels = np.zeros(hu.shape, dtype=np.uint8)
    labels[box], confidence, notes = segment_body(hu[box], body[box])
    return labels, confidence, notes


def segment_body(hu: FloatVolume, body: Mask) -> tuple[LabelVolume, dict[District, float], tuple[str, ...]]:
    """The same inside the body's own box."""
    midline = find_midline(body)
    core = central_parts(body, midline)
    landmarks = find_landmarks(make_profile(hu, body, core, midline))
    arms = find_arms(hu, body, core, landmarks, midline)
    labels = without_slivers(joined(body, landmarks, arms))
    return labels, confidences(labels, landmarks, arms), ()


def working_grid(grid: Grid) -> Grid:
    """Cubic voxels over the same field: `MATRIX` across its larger in-plane side, or fewer if the input has fewer."""
    side = max(max(grid.extent_mm[1:]) / MATRIX, *grid.spacing_mm[1:])
    return grid_at_spacing(grid, (side, side, side))


def shrink(hu: FloatVolume, grid: Grid, coarse: Grid) -> FloatVolume:
    """HU on the coarse grid: means over whole blocks of voxels first, against noise, then trilinear."""
    factors = [max(1, int(new / old)) for new, old in zip(coarse.spacing_mm, grid.spacing_mm, strict=True)]
    blocks, block_grid = block_means(hu, grid, (factors[0], factors[1], factors[2]))
    return np.asarray(resample(blocks, block_grid, coarse, fill=AIR_HU), dtype=np.float32)


def block_means(hu: FloatVolume, grid: Grid, factors: tuple[int, int, int]) -> tuple[FloatVolume, Grid]:
    """Means over blocks of `factors` (z, y, x) voxels, and their grid; the last block is filled up with its edge."""
    fz, fy, fx = factors
    nz, ny, nx = (-(-n // f) for n, f in zip(grid.shape, factors, strict=True))
    missing = [(0, blocks * f - n) for blocks, f, n in zip((nz, ny, nx), factors, grid.shape, strict=True)]
    whole = np.pad(hu, missing, mode="edge") if any(end for _, end in missing) else hu
    means = whole.reshape(nz, fz, ny, fy, nx, fx).mean(axis=(1, 3, 5), dtype=np.float32)
    dz, dy, dx = grid.spacing_mm
    ox, oy, oz = grid.origin_mm
    return means, Grid(
        shape=(nz, ny, nx),
        spacing_mm=(dz * fz, dy * fy, dx * fx),
        origin_mm=(ox + (fx - 1) / 2 * dx, oy + (fy - 1) / 2 * dy, oz + (fz - 1) / 2 * dz),
        frame_of_reference_uid=grid.frame_of_reference_uid,
    )


def joined(body: Mask, landmarks: Landmarks, arms: Arms) -> LabelVolume:
    """Every body voxel gets its slice's district, or arms (eq. 2)."""
    labels = np.where(body, landmarks.districts()[:, None, None], 0).astype(np.uint8)
    labels[arms.mask & body] = District.ARMS
    return labels


def without_slivers(labels: LabelVolume) -> LabelVolume:
    """Districts under `MIN_SHARE` of the body go to the nearest other district."""
    counts = np.bincount(labels.ravel(), minlength=len(District) + 1)
    small = [d for d in District if 0 < counts[d] < MIN_SHARE * counts[1:].sum()]
    if not small:
        return labels
    lost = np.isin(labels, small)
    hidden = lost | (labels == 0)
    near = ndimage.distance_transform_edt(hidden, return_distances=False, return_indices=True)
    return np.where(lost, labels[tuple(near)], labels).astype(np.uint8)


def confidences(labels: LabelVolume, landmarks: Landmarks, arms: Arms) -> dict[District, float]:
    """0..1 for every district present: how clearly slices spoke; for arms, how much of them lay loose."""
    present = [d for d in District if (labels == d).any()]
    arms_certainty = 0.4 + 0.55 * arms.loose
    return {d: arms_certainty if d is District.ARMS else landmarks.certainty.get(d, 0.3) for d in present}
