"""Seams between districts in one SUV volume, without a true PET to compare with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.types import District, FloatVolume, LabelVolume

MIN_PLACES = 100  # fewer places where two districts meet say nothing
VISIBLE_SUV = 0.25  # a step that is larger than those beside it by less than this does not show


@dataclass(frozen=True, kw_only=True, slots=True)
class Seam:
    """Where two districts meet: the mean absolute step in SUV across the border, and of the steps beside it."""

    first: District
    second: District
    across: float
    beside: float

    @property
    def index(self) -> float:
        """How many times larger the step across the border is than those beside it; 1 is no seam."""
        return self.across / max(self.beside, 1e-6)


def worst_seam(suv: FloatVolume, labels: LabelVolume, districts: tuple[District, ...]) -> Seam | None:
    """The seam with the highest index between two of `districts`, or None where no border shows.

    Across are the differences of neighbors (6 neighbors) of two districts; beside are those of the next neighbors on
    the same line, inside either district.

    Args:
        suv, labels: [z, y, x].
    """
    found = [_steps(suv, labels, axis) for axis in range(3)]
    pairs, across, beside = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return max(_visible(pairs, across, beside, districts), key=lambda seam: seam.index, default=None)


def _visible(
    pairs: NDArray[np.uint8], across: FloatVolume, beside: FloatVolume, districts: tuple[District, ...]
) -> Iterator[Seam]:
    for index, first in enumerate(districts):
        for second in districts[index + 1 :]:
            chosen = (pairs == [first, second]).all(axis=1)
            if np.count_nonzero(chosen) < MIN_PLACES:
                continue
            seam = Seam(
                first=first,
                second=second,
                across=float(across[chosen].mean(dtype=np.float64)),
                beside=float(beside[chosen].mean(dtype=np.float64)),
            )
            if seam.across - seam.beside > VISIBLE_SUV:
                yield seam


def _steps(suv: FloatVolume, labels: LabelVolume, axis: int) -> tuple[NDArray[np.uint8], FloatVolume, FloatVolume]:
    """Every place where two districts meet along `axis`: both labels, the lower first; the step across; beside."""
    values, marks = np.moveaxis(suv, axis, -1), np.moveaxis(labels, axis, -1)
    here, there = marks[..., 1:-2], marks[..., 2:-1]
    meet = (here != there) & (here > 0) & (there > 0) & (marks[..., :-3] == here) & (marks[..., 3:] == there)
    *lines, along = np.nonzero(meet)
    before, first, second, after = (values[(*lines, along + k)] for k in range(4))
    pairs = np.sort(np.stack([here[meet], there[meet]], axis=1), axis=1)
    return pairs, np.abs(second - first), (np.abs(first - before) + np.abs(after - second)) / 2
