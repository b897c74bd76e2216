"""Grids and resampling: the only place that turns an axis order or a spacing into another.

Arrays are [z, y, x]; SimpleITK images are (x, y, z) with the identity direction, because every `Grid` is
axis-aligned in LPS, which is SimpleITK's own frame too.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import SimpleITK as sitk  # noqa: N813 - the name its own manual uses
from numpy.typing import NDArray

from pipeline.types import GeometryError, Grid

if TYPE_CHECKING:  # torch takes seconds and 250 MB: who only reads and writes objects does without
    import torch
    from torch import Tensor

# A field of 400.0000001 mm at 4 mm is 100 voxels, not 101: less than a thousandth of a voxel is rounding.
_ROUNDING_VOXELS = 1e-3


def grid_at_spacing(
    grid: Grid, spacing_mm: tuple[float, float, float], *, multiples: tuple[int, int, int] = (1, 1, 1)
) -> Grid:
    """The grid of `spacing_mm` (z, y, x) over the same field, edge to edge, centered on it.

    The size is rounded up to `multiples` of voxels (z, y, x), so with ones the new field is at most one new voxel
    larger (half a voxel on either side).
    Raises GeometryError for a spacing that is not positive.
    """
    if not all(math.isfinite(s) and s > 0 for s in spacing_mm):
        raise GeometryError(f"grid spacing {spacing_mm} mm needs three positive numbers")
    shape = [
        m * max(1, math.ceil(extent / s / m - _ROUNDING_VOXELS))
        for extent, s, m in zip(grid.extent_mm, spacing_mm, multiples, strict=True)
    ]
    origin = []
    for axis in (2, 1, 0):  # x, y, z
        middle = grid.origin_mm[2 - axis] + (grid.shape[axis] - 1) / 2 * grid.spacing_mm[axis]
        origin.append(middle - (shape[axis] - 1) / 2 * spacing_mm[axis])
    return Grid(
        shape=(shape[0], shape[1], shape[2]),
        spacing_mm=spacing_mm,
        origin_mm=(origin[0], origin[1], origin[2]),
        frame_of_reference_uid=grid.frame_of_reference_uid,
    )


def result_grid(ct_grid: Grid, spacing_mm: tuple[float, float, float]) -> Grid:
    """The grid of a job's PET: the CT's field at the bundle's spacing, with rows and columns in fours.

    A SEG has one bit a voxel and packs its frames without a gap (PS3.5 section 8.1.1). Viewers that look for each
    frame at a whole byte, as OHIF 3.13 does, would tear the districts where rows times columns is no multiple of 8.
    What the field has more than the CT's (less than four voxels) is air.
    """
    return grid_at_spacing(ct_grid, spacing_mm, multiples=(1, 4, 4))


def bounding_box(mask: NDArray[Any], margin: int = 0) -> tuple[slice, ...] | None:
    """The smallest box around everything that is not 0, grown by `margin` voxels within the volume; None if empty."""
    box = []
    for axis, size in enumerate(mask.shape):
        hits = np.flatnonzero(mask.any(axis=tuple(a for a in range(mask.ndim) if a != axis)))
        if not hits.size:
            return None
        box.append(slice(max(int(hits[0]) - margin, 0), min(int(hits[-1]) + 1 + margin, size)))
    return tuple(box)


def to_sitk(volume: NDArray[Any], grid: Grid) -> sitk.Image:
    """A SimpleITK image (a copy) of `volume` [z, y, x] on `grid`. Raises GeometryError if they do not fit."""
    if volume.shape != grid.shape:
        raise GeometryError(f"volume {volume.shape} does not fit grid {grid.shape}")
    image = sitk.GetImageFromArray(volume.view(np.uint8) if volume.dtype == np.bool_ else volume)
    image.SetSpacing([float(s) for s in reversed(grid.spacing_mm)])
    image.SetOrigin([float(o) for o in grid.origin_mm])
    return image


def from_sitk(image: sitk.Image, frame_of_reference_uid: str = "") -> tuple[NDArray[Any], Grid]:
    """The array [z, y, x] (a copy) and grid of a 3-D image. Raises GeometryError if it is not axis-aligned in LPS."""
    if image.GetDimension() != 3 or not np.allclose(image.GetDirection(), np.eye(3).ravel(), atol=1e-6):
        raise GeometryError("the image is not a volume with axes along x, y and z")
    array = sitk.GetArrayFromImage(image)
    x, y, z = image.GetSpacing()
    ox, oy, oz = image.GetOrigin()
    grid = Grid(
        shape=array.shape,
        spacing_mm=(z, y, x),
        origin_mm=(ox, oy, oz),
        frame_of_reference_uid=frame_of_reference_uid,
    )
    return array, grid


def resample(volume: NDArray[Any], grid: Grid, target: Grid, *, fill: float, nearest: bool = False) -> NDArray[Any]:
    """`volume` [z, y, x] on `grid`, sampled at the voxel centers of `target`: trilinear, or `nearest` for labels.

    Inside the edges of `grid` (half a voxel beyond its outer centers) the border value is continued; outside it
    is `fill`. The dtype is kept. Raises GeometryError if the volume does not fit its grid or the grids have
    different Frames of Reference (PS3.3 C.7.4.1: their coordinates have nothing to do with each other).
    """
    if grid.frame_of_reference_uid != target.frame_of_reference_uid:
        raise GeometryError(
            f"cannot resample from Frame of Reference {grid.frame_of_reference_uid} to {target.frame_of_reference_uid}"
        )
    if grid == target and volume.shape == grid.shape:
        return volume.copy()
    image = to_sitk(volume, grid)
    resampled = resample_image(image, target, sitk.Transform(3, sitk.sitkIdentity), fill=fill, nearest=nearest)
    return resampled.view(np.bool_) if volume.dtype == np.bool_ else resampled


def resample_on(
    device: torch.device, volume: NDArray[np.float32], grid: Grid, target: Grid, *, fill: float
) -> NDArray[np.float32]:
    """`resample`, trilinear, by torch on `device`: the GPU's way. The same values as SimpleITK's to rounding.

    The grids are axis-aligned, so it is one linear interpolation along each axis. Raises GeometryError as `resample`
    does, and torch's errors when the device has no memory for the volume.
    """
    if grid.frame_of_reference_uid != target.frame_of_reference_uid or volume.shape != grid.shape:
        return resample(volume, grid, target, fill=fill)  # which says what does not fit
    import torch

    sampled = torch.from_numpy(np.ascontiguousarray(volume)).to(device)
    inside = torch.ones((1, 1, 1), dtype=torch.bool, device=device)
    for axis in range(3):
        below, above, share, seen = _linear_taps(grid, target, axis, device)
        view = [-1 if a == axis else 1 for a in range(3)]
        sampled = torch.lerp(sampled.index_select(axis, below), sampled.index_select(axis, above), share.view(view))
        inside = inside & seen.view(view)
    filled = torch.where(inside, sampled, torch.tensor(fill, dtype=sampled.dtype, device=device))
    result: NDArray[np.float32] = filled.cpu().numpy()
    return result


def _linear_taps(grid: Grid, target: Grid, axis: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per target voxel along an axis: the indices below and above, the share of the one above, and if it is seen."""
    import torch

    n, first = grid.shape[axis], target.origin_mm[2 - axis] - grid.origin_mm[2 - axis]
    steps = torch.arange(target.shape[axis], dtype=torch.float64, device=device)
    place = (first + steps * target.spacing_mm[axis]) / grid.spacing_mm[axis]
    seen = (place >= -0.5) & (place < n - 0.5)
    place = place.clamp(0, n - 1)
    below = place.floor().long()
    return below, (below + 1).clamp(max=n - 1), (place - below).float(), seen


def resample_image(
    image: sitk.Image, target: Grid, transform: sitk.Transform, *, fill: float, nearest: bool = False
) -> NDArray[Any]:
    """The array [z, y, x] of `image` at the voxel centers of `target`; `transform` maps target points to its points."""
    resampler = sitk.ResampleImageFilter()
    resampler.SetSize([int(n) for n in reversed(target.shape)])
    resampler.SetOutputSpacing([float(s) for s in reversed(target.spacing_mm)])
    resampler.SetOutputOrigin([float(o) for o in target.origin_mm])
    resampler.SetInterpolator(sitk.sitkNearestNeighbor if nearest else sitk.sitkLinear)
    resampler.SetDefaultPixelValue(float(fill))
    resampler.SetTransform(transform)
    array: NDArray[Any] = sitk.GetArrayFromImage(resampler.Execute(image))
    return array
