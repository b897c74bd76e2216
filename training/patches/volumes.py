"""Where training patches are cut from: the studies' mapped files, or one device's memory.

Both give the same voxels. On a GPU all volumes lie in its memory as half precision and bytes, 5 bytes a voxel: 710
scans cropped to the body, some 9 million voxels each at PET resolution, take about 32 GB. Where they do not fit,
patches are cut from the mapped files and uploaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.prepared import PreparedStudy

DEVICE_SHARE = 0.6  # of the GPU memory that is free: the rest is the networks'
LESION = 8  # added to the district's label: both in one byte
Triple = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Placement:
    """What a sample's entropy decided. `start` is the window's first voxel; before turning, `flips` mirror [z, y, x].

    `matrix` takes offsets from the window's centre to offsets in the volume, in voxels, (x, y, z).
    """

    study: int
    start: Triple
    flips: tuple[bool, bool, bool]
    matrix: NDArray[np.float64]
    noise_seed: int


class Volumes(Protocol):
    """Where patches are cut from."""

    def cut(self, places: Sequence[Placement], sides: Triple, window: int) -> tuple[Tensor, Tensor]:
        """Boxes of `sides` voxels around each window, flipped, 0 beyond the volume.

        Returns (N, 2, *sides) float16, CT and PET, and (N, 1, *sides) uint8, the district plus `LESION`.
        """


def volumes_on(studies: Sequence[PreparedStudy], device: torch.device) -> Volumes:
    """On the GPU when they fit there, else the mapped files."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if DeviceVolumes.bytes_of(studies) <= DEVICE_SHARE * free:
            return DeviceVolumes(studies, device)
    return MappedVolumes(studies)


class MappedVolumes:
    """Cuts from the studies' own arrays, which are mapped and not read: only the pages of a patch are."""

    def __init__(self, studies: Sequence[PreparedStudy]) -> None:
        self._studies = studies

    def cut(self, places: Sequence[Placement], sides: Triple, window: int) -> tuple[Tensor, Tensor]:
        """See `Volumes.cut`; the tensors are in main memory."""
        images = np.zeros((len(places), 2, *sides), dtype=np.float16)
        labels = np.zeros((len(places), 1, *sides), dtype=np.uint8)
        for image, label, place in zip(images, labels, places, strict=True):
            study = self._studies[place.study]
            spans = [_span(*axis) for axis in zip(_box_start(place, sides, window), sides, study.ct.shape, strict=True)]
            source, target = tuple(s for s, _ in spans), tuple(t for _, t in spans)
            mirror = tuple(slice(None, None, -1 if flip else 1) for flip in place.flips)
            image[0][mirror][target] = study.ct[source]
            image[1][mirror][target] = study.pet[source]
            inside = label[0][mirror][target]
            np.multiply(study.lesions[source] > 0, np.uint8(LESION), out=inside, dtype=np.uint8)
            inside |= study.districts[source]
        return torch.from_numpy(images), torch.from_numpy(labels)


class DeviceVolumes:
    """All studies end to end in two buffers on one device; a batch is cut by one gather from each.

    The first element of either buffer is a 0 that stands for every voxel beyond a volume.
    """

    def __init__(self, studies: Sequence[PreparedStudy], device: torch.device) -> None:
        sizes = [study.ct.size for study in studies]
        self._device = device
        self._offsets = 1 + np.concatenate([[0], np.cumsum(sizes)[:-1]])[:, None]
        self._shapes = np.array([study.ct.shape for study in studies])
        self._images = torch.zeros(2, 1 + sum(sizes), dtype=torch.float16, device=device)
        self._labels = torch.zeros(1 + sum(sizes), dtype=torch.uint8, device=device)
        for study, offset, size in zip(studies, self._offsets[:, 0].tolist(), sizes, strict=True):
            here = slice(offset, offset + size)
            labels = study.districts + np.uint8(LESION) * (study.lesions > 0)
            self._images[0, here] = torch.from_numpy(np.array(study.ct).ravel())
            self._images[1, here] = torch.from_numpy(np.array(study.pet).ravel())
            self._labels[here] = torch.from_numpy(labels.ravel())

    @staticmethod
    def bytes_of(studies: Sequence[PreparedStudy]) -> int:
        """What the buffers take."""
        return 5 * (1 + sum(study.ct.size for study in studies))

    def cut(self, places: Sequence[Placement], sides: Triple, window: int) -> tuple[Tensor, Tensor]:
        """See `Volumes.cut`; the tensors are on the device."""
        starts = [_box_start(place, sides, window) for place in places]
        studies = [place.study for place in places]
        numbers = np.hstack([starts, [place.flips for place in places], self._shapes[studies], self._offsets[studies]])
        # one small upload per batch, not waited for
        table = torch.from_numpy(numbers.astype(np.int64)).to(self._device, non_blocking=True)
        start, flip, shape, offset = (part[:, :, None, None, None] for part in torch.split(table, [3, 3, 3, 1], dim=1))
        z, y, x = (
            start[:, axis] + torch.where(flip[:, axis] > 0, side - 1 - steps, steps)
            for axis, (side, steps) in enumerate(zip(sides, self._steps(sides), strict=True))
        )
        depth, height, width = shape.unbind(1)
        inside = (z >= 0) & (z < depth) & (y >= 0) & (y < height) & (x >= 0) & (x < width)
        index = torch.where(inside, offset[:, 0] + (z * height + y) * width + x, 0)
        return torch.stack([buffer[index] for buffer in self._images], dim=1), self._labels[index][:, None]

    def _steps(self, sides: Triple) -> list[Tensor]:
        """0 .. side - 1 along z, y and x, each shaped to lie along its axis of (N, z, y, x)."""
        views = ((1, -1, 1, 1), (1, 1, -1, 1), (1, 1, 1, -1))
        return [torch.arange(n, device=self._device).view(view) for n, view in zip(sides, views, strict=True)]


def _box_start(place: Placement, sides: Triple, window: int) -> list[int]:
    """First voxel of the box around the window; each side differs from the window by an even number."""
    return [first - (side - window) // 2 for first, side in zip(place.start, sides, strict=True)]


def _span(start: int, side: int, size: int) -> tuple[slice, slice]:
    """The part of start .. start + side that lies in 0 .. size: in the volume's indices, and in the box's."""
    low = min(max(start, 0), size)
    high = max(low, min(start + side, size))
    return slice(low, high), slice(low - start, high - start)
