"""From a scaled CT to a scaled PET with one network: its input, then sliding windows where the district is, blended.

Pure: arrays, a network and a device in, one array out. The windows lie on a lattice over the mask's bounding box;
those without a voxel of the mask are never computed, and memory is bounded by that box, not by the volume. What
lies outside the volume is air, 0, so any shape works, also one smaller than a window.

channels_last_3d was tried and is not used: with the interleaved last layer of `networks.UNet3d` it lost up to 10 %
at widths 16 to 64 on a CPU with AVX512, at every batch but the largest.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import EllipsisType
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.geometry import bounding_box
from pipeline.types import OUTSIDE, WHOLE_BODY, District, DistrictMap, FloatVolume, GeometryError

GAUSSIAN_SIGMA = 0.125  # of the window's side, as in MONAI's and nnU-Net's importance maps
SMALLEST_WEIGHT = 1e-3  # as in MONAI: a voxel that only a window's corner covers still has a sound quotient

Scalar = TypeVar("Scalar", bound=np.generic)

INPUT_MASKS = ("body", "district", "channel", "districts")  # as `bundle.Manifest.input_mask` tells them
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True, slots=True)
class Lattice:
    """Where the windows lie: `starts` [n, 3] are indices (z, y, x) into the box that `origin` and `shape` span.

    `origin` is the box's first voxel in the volume; it may be negative, and the box may end beyond the volume.
    """

    origin: tuple[int, int, int]
    shape: tuple[int, int, int]
    starts: NDArray[np.int64]


def network_input(
    ct_unit: FloatVolume, districts: DistrictMap, district: District, key: str, input_mask: str
) -> FloatVolume:
    """What the network `key` was trained to see of one volume, for `district`: float32 [c, z, y, x].

    Channel 0 is the scaled CT, 0 (air) where the network may not look; the others are masks of 0 and 1. Which is
    which is told by `bundle.Manifest`, whose `input_mask` this takes ("district" is the paper's eq. 7). The
    whole-body network always sees the whole body, also when it stands in for a district's own.

    Raises:
        GeometryError: shapes do not fit, or there is no such input mask.
    """
    if ct_unit.shape != districts.grid.shape:
        raise GeometryError(f"network input: CT {ct_unit.shape} does not fit districts {districts.grid.shape}")
    if input_mask not in INPUT_MASKS:
        raise GeometryError(f"network input: input_mask {input_mask!r} is not one of {INPUT_MASKS}")
    body = districts.labels != OUTSIDE
    own = districts.mask(district) if depends_on_district(key, input_mask) else body
    if input_mask == "channel":
        return np.stack([ct_unit, own.astype(np.float32)])
    masked = np.where(own, ct_unit, np.float32(0.0))
    if input_mask == "districts":
        return np.stack([masked, *(districts.mask(d).astype(np.float32) for d in District)])
    return masked[np.newaxis]


def depends_on_district(key: str, input_mask: str) -> bool:
    """Whether the network `key` sees another input for each district; if not, one pass serves all of them."""
    return key != WHOLE_BODY and input_mask in ("district", "channel")


def synthesize(
    channels: FloatVolume,
    mask: NDArray[np.bool_],
    network: nn.Module,
    *,
    window: int,
    overlap: int,
    blending: str,
    batch: int,
    device: torch.device,
    precision: str = "fp32",
    margin: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> FloatVolume:
    """The network's output over the windows that contain a voxel of `mask`.

    Args:
        channels: float32 [c, z, y, x] in [0, 1], see `network_input`; 0 is air.
        mask: where the output is wanted, [z, y, x].
        network: on `device`, in eval mode; (N, c, w, w, w) to (N, 1, w, w, w).
        window: side of a window in voxels.
        overlap: voxels that neighboring windows share along an axis, 0 to window - 1.
        blending: "mean" (the paper's eq. 14) or "gaussian".
        batch: windows at once; the last batch may be smaller.
        precision: "fp32", or "bf16" by autocast.
        margin: voxels by which the lattice reaches beyond the mask's box; None: `context_voxels`.
        on_progress: called with (windows done, windows in all).

    Returns:
        float32 [z, y, x] in [0, 1]; 0 where no window looked.

    Raises:
        GeometryError: shapes or dtype do not fit, or the settings make no windows.
        torch.OutOfMemoryError and its kin: see `device.with_fallbacks`.
    """
    _check(channels, mask, window, overlap, batch, precision)
    result = np.zeros(mask.shape, dtype=np.float32)
    lattice = place_windows(mask, window=window, overlap=overlap, margin=margin)
    if lattice is None:
        return result
    weights = window_weights(window, blending)
    with torch.inference_mode():
        box = torch.from_numpy(cut_out(channels, lattice.origin, lattice.shape)).to(device)
        blended = _blend(box, lattice.starts, network, weights.to(device), batch, precision, on_progress).cpu().numpy()
    inside, source = overlap_of(mask.shape, lattice.origin, lattice.shape)
    result[inside] = blended[source]
    return result


def _check(
    channels: FloatVolume, mask: NDArray[np.bool_], window: int, overlap: int, batch: int, precision: str
) -> None:
    if channels.ndim != 4 or channels.shape[1:] != mask.shape or not channels.shape[0]:
        raise GeometryError(
            f"synthesis: input {channels.shape}, mask {mask.shape}; [c, z, y, x] and [z, y, x] are needed"
        )
    if channels.dtype != np.float32 or mask.dtype != np.bool_:
        raise GeometryError(f"synthesis: input is {channels.dtype}, mask {mask.dtype}; float32 and bool are expected")
    if not 0 <= overlap < window or batch < 1:
        raise GeometryError(f"synthesis: window {window}, overlap {overlap}, batch {batch} make no windows")
    if precision not in PRECISIONS:
        raise GeometryError(f"synthesis: precision {precision!r} is not one of {sorted(PRECISIONS)}")


def context_voxels(overlap: int) -> int:
    """How far the lattice reaches beyond a mask's box, so that its border is not only seen by a window's last voxels.

    On a network of 250 steps, half the overlap lowered the MAE of a district by 1 to 6 % against none, for up to
    twice the windows. No window without a voxel of the mask is added.
    """
    return overlap // 2


def place_windows(mask: NDArray[np.bool_], *, window: int, overlap: int, margin: int | None = None) -> Lattice | None:
    """The windows that contain a voxel of the mask, in lattice order; None for an empty mask.

    The lattice is centered on the mask's bounding box grown by `margin`, and covers all of it.
    """
    margin = context_voxels(overlap) if margin is None else margin
    box = bounding_box(mask)
    if box is None:
        return None
    stride = window - overlap
    counts = [-(-max(s.stop - s.start + 2 * margin - window, 0) // stride) + 1 for s in box]
    shape = tuple(window + (n - 1) * stride for n in counts)
    origin = tuple(s.start - (size - (s.stop - s.start)) // 2 for s, size in zip(box, shape, strict=True))
    assert len(shape) == 3 and len(origin) == 3  # for the type checker  # noqa: PT018
    looks = cut_out(mask, origin, shape)
    for axis, count in enumerate(counts):
        slabs = [np.take(looks, range(i * stride, i * stride + window), axis).any(axis) for i in range(count)]
        looks = np.stack(slabs, axis)
    return Lattice(origin=origin, shape=shape, starts=np.argwhere(looks) * stride)


def overlap_of(
    volume_shape: tuple[int, ...], origin: tuple[int, int, int], shape: tuple[int, int, int]
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """What a box and a volume share, as slices into the volume and as slices into the box."""
    first = [max(o, 0) for o in origin]
    last = [min(o + n, size) for o, n, size in zip(origin, shape, volume_shape, strict=True)]
    in_volume = tuple(slice(a, b) for a, b in zip(first, last, strict=True))
    in_box = tuple(slice(a - o, b - o) for a, b, o in zip(first, last, origin, strict=True))
    return in_volume, in_box


def cut_out(volume: NDArray[Scalar], origin: tuple[int, int, int], shape: tuple[int, int, int]) -> NDArray[Scalar]:
    """A copy of the box of a volume [..., z, y, x], 0 (air, False) where it lies outside the volume."""
    box = np.zeros((*volume.shape[:-3], *shape), dtype=volume.dtype)
    in_volume, in_box = overlap_of(volume.shape[-3:], origin, shape)
    target: tuple[EllipsisType | slice, ...] = (..., *in_box)
    source: tuple[EllipsisType | slice, ...] = (..., *in_volume)
    box[target] = volume[source]
    return box


def window_weights(window: int, blending: str) -> Tensor:
    """How much each voxel of a window counts, float32 [window, window, window], at most 1.

    "mean" weighs all the same (eq. 14); "gaussian" trusts the middle, where the network saw context on all sides.

    Raises:
        GeometryError: no such blending.
    """
    if blending == "mean":
        return torch.ones((window,) * 3, dtype=torch.float32)
    if blending != "gaussian":
        raise GeometryError(f"synthesis: blending {blending!r} is neither 'mean' nor 'gaussian'")
    offset = torch.arange(window, dtype=torch.float64) - (window - 1) / 2
    line = torch.exp(-0.5 * (offset / (GAUSSIAN_SIGMA * window)) ** 2)
    cube = line[:, None, None] * line[None, :, None] * line[None, None, :]
    return cube.clamp(min=SMALLEST_WEIGHT).to(torch.float32)


def _blend(
    box: Tensor,
    starts: NDArray[np.int64],
    network: nn.Module,
    weights: Tensor,
    batch: int,
    precision: str,
    on_progress: Callable[[int, int], None] | None,
) -> Tensor:
    """Sum of weighted windows over sum of weights, [z, y, x] for a box [c, z, y, x]; 0 where no window looked."""
    total = torch.zeros_like(box[0])
    weight = torch.zeros_like(total)
    side = weights.shape[0]
    corners = [tuple(slice(int(i), int(i) + side) for i in start) for start in starts]
    for first in range(0, len(corners), batch):
        chosen = corners[first : first + batch]
        patches = torch.stack([box[(slice(None), *corner)] for corner in chosen])
        with _autocast(box.device, precision):
            predicted = network(patches)
        for corner, patch in zip(chosen, predicted.to(torch.float32)[:, 0] * weights, strict=True):
            total[corner] += patch
            weight[corner] += weights
        if on_progress is not None:
            on_progress(first + len(chosen), len(corners))
    return total.div_(torch.where(weight > 0, weight, 1.0))


def _autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=PRECISIONS[precision])
