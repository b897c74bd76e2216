"""A CT volume made small for the input gate: means over blocks of about 5 mm, in one slice of every 5 mm.

Block means are free of noise, thin beds and blankets vanish in them, and a volume of 100 million voxels takes a
fraction of a second.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from pipeline.types import CtVolume, FloatVolume

Mask = NDArray[np.bool_]

BLOCK_MM = 5.0
SLICE_STEP_MM = 5.0
TISSUE_HU = -500.0  # above: not air, and hardly lung
RIM_BLOCKS = (1.0, 3.0)  # inside the border of the field: its outermost block is half padding
CONSTANT_HU = 1.0  # corners that vary by less were filled in, not reconstructed
_PATCH = np.ones((1, 3, 3), dtype=bool)  # the shell of a bed or a blanket is thinner


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockView:
    """Block means of a CT [z, y, x] and what of it is tissue.

    `step` is how many slices of the CT lie between two of the view, `slice_mm` the CT's slice spacing and
    `block_mm` the size (y, x) of a block. `tissue` are the blocks above `TISSUE_HU` in patches of at least 3x3.
    """

    blocks: FloatVolume
    tissue: Mask
    step: int
    slices: int
    slice_mm: float
    block_mm: tuple[float, float]

    @classmethod
    def of(cls, ct: CtVolume) -> BlockView:
        dz, dy, dx = ct.grid.spacing_mm
        slices, rows, columns = ct.hu.shape
        step = max(1, round(SLICE_STEP_MM / dz))
        by, bx = min(max(1, round(BLOCK_MM / dy)), rows), min(max(1, round(BLOCK_MM / dx)), columns)
        some = ct.hu[::step, : rows // by * by, : columns // bx * bx]
        means = some.reshape(len(some), rows // by, by, columns // bx, bx).mean(axis=(2, 4), dtype=np.float32)
        return cls(
            blocks=means,
            tissue=in_patches(means > TISSUE_HU),
            step=step,
            slices=slices,
            slice_mm=dz,
            block_mm=(by * dy, bx * dx),
        )

    @property
    def body_slices(self) -> NDArray[np.intp]:
        """The slices of the view that show tissue."""
        return np.flatnonzero(self.tissue.any(axis=(1, 2)))

    @property
    def body_extent_mm(self) -> float:
        """How far tissue reaches along the table, edge to edge; as far as it may reach between the view's slices."""
        found = self.body_slices
        if not found.size:
            return 0.0
        first = max(int(found[0] - 1) * self.step + 1, 0)
        last = min(int(found[-1] + 1) * self.step, self.slices)
        return (last - first) * self.slice_mm

    @property
    def body_diameter_mm(self) -> float:
        """The diameter of a circle with the area of the body in its larger slices (90th percentile), lungs included."""
        areas = [np.count_nonzero(ndimage.binary_fill_holes(self.tissue[z])) for z in self.body_slices]
        if not areas:
            return 0.0
        area_mm2 = float(np.percentile(areas, 90)) * self.block_mm[0] * self.block_mm[1]
        return 2 * float(np.sqrt(area_mm2 / np.pi))

    @property
    def cut_share(self) -> float:
        """The share of the field's rim that is tissue, the mean over the slices with a body."""
        rim = field_rim(self.blocks)
        found = self.body_slices
        if not found.size or not rim.any():
            return 0.0
        return float(self.tissue[found][:, rim].mean())


def in_patches(mask: Mask) -> Mask:
    """What of a mask [z, y, x] lies in patches of at least 3x3 in its slice; the image's border does not eat at it."""
    padded = np.pad(mask, ((0, 0), (1, 1), (1, 1)), mode="edge")
    return np.asarray(ndimage.binary_opening(padded, _PATCH)[:, 1:-1, 1:-1] & mask)


def interior(mask: Mask) -> Mask:
    """A mask [z, y, x] without the outermost block in every slice, which is part air."""
    return np.asarray(ndimage.binary_erosion(mask, _PATCH))


def smoothed(blocks: FloatVolume) -> FloatVolume:
    """Means over 3x3 blocks: free of noise where the CT's own voxels are as large as blocks."""
    return np.asarray(ndimage.uniform_filter(blocks, size=(1, 3, 3), mode="nearest"), dtype=np.float32)


def field_rim(blocks: FloatVolume) -> Mask:
    """The rim [y, x] of what was reconstructed: an inscribed ellipse where the corners are filled in, else all."""
    rows, columns = blocks.shape[1:]
    y, x = np.abs(np.arange(rows) - (rows - 1) / 2), np.abs(np.arange(columns) - (columns - 1) / 2)
    half_y, half_x = rows / 2, columns / 2
    radius = np.hypot(y[:, None] / half_y, x[None, :] / half_x)
    corners = blocks[:, radius > 1 + 2 / min(half_y, half_x)]
    if corners.size and float(np.ptp(corners)) < CONSTANT_HU:
        inside = (1 - radius) * min(half_y, half_x)
    else:
        inside = np.minimum((half_y - y)[:, None], (half_x - x)[None, :])
    return np.asarray((inside >= RIM_BLOCKS[0]) & (inside < RIM_BLOCKS[1]))
