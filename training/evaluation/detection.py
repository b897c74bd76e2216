"""Lesions in a synthetic PET: found, missed, invented; and the seams between districts.

A synthetic PET shows a lesion at threshold t (SUV) when its highest voxel inside the lesion is at least t. What
normal uptake around a lesion reaches counts too, so a low threshold finds lesions that nobody would see: read the
sensitivity only together with the false positives.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from pipeline.types import FloatVolume, Grid, LabelVolume

THRESHOLDS_SUV = (1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0, 10.0)
FALSE_POSITIVES_PER_STUDY = (1, 2, 4, 8)
HOT_SUV, COLD_SUV = 4.0, 2.5  # false-positive volume: synthetic at least HOT where the true PET is under COLD
SHELL_MM = (4.0, 16.0)  # background of a lesion: from so far to so far outside of it
_CONNECTED = np.ones((3, 3, 3), dtype=bool)  # 26 neighbors

Mask = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, slots=True)
class Lesion:
    """One lesion in the true and in one synthetic PET. `contrast` is SUVmax over the mean of the shell around it."""

    volume_ml: float
    true_suv_max: float
    suv_max: float
    true_contrast: float | None
    contrast: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class FrocPoint:
    """At one threshold: the share of all lesions that are shown, and false positives per study."""

    threshold_suv: float
    sensitivity: float
    false_positives: float


def label_lesions(lesions: Mask) -> tuple[NDArray[np.int32], int]:
    """Connected components (26 neighbors) of a lesion mask [z, y, x], numbered from 1, and how many."""
    labels, count = ndimage.label(lesions, structure=_CONNECTED)
    return labels.astype(np.int32), int(count)


def measure_lesions(
    labels: NDArray[np.int32], fake_suv: FloatVolume, real_suv: FloatVolume, body: Mask, grid: Grid
) -> list[Lesion]:
    """Every lesion of a study, in the order of its label; SUV in g/ml on `grid`."""
    pad = [int(np.ceil(SHELL_MM[1] / s)) for s in grid.spacing_mm]
    found = []
    for number, box in enumerate(ndimage.find_objects(labels), start=1):
        wide = tuple(
            slice(max(side.start - by, 0), min(side.stop + by, size))
            for side, by, size in zip(box, pad, labels.shape, strict=True)
        )
        inside = labels[wide] == number
        distance = ndimage.distance_transform_edt(~inside, sampling=grid.spacing_mm)
        shell = (distance > SHELL_MM[0]) & (distance <= SHELL_MM[1]) & body[wide] & (labels[wide] == 0)
        true_max, fake_max = float(real_suv[wide][inside].max()), float(fake_suv[wide][inside].max())
        found.append(
            Lesion(
                volume_ml=float(inside.sum()) * grid.voxel_ml,
                true_suv_max=true_max,
                suv_max=fake_max,
                true_contrast=_over_mean(true_max, real_suv[wide][shell]),
                contrast=_over_mean(fake_max, fake_suv[wide][shell]),
            )
        )
    return found


def _over_mean(value: float, around: FloatVolume) -> float | None:
    mean = float(around.mean(dtype=np.float64)) if around.size else 0.0
    return value / mean if mean > 0 else None


def false_positives(
    fake_suv: FloatVolume, real_suv: FloatVolume, lesions: Mask, thresholds: Sequence[float] = THRESHOLDS_SUV
) -> list[int]:
    """How many hot spots of the synthetic PET are invented, per threshold.

    A hot spot is a connected component (26 neighbors) of {synthetic >= t}. It is invented when no voxel of it is a
    voxel of {true PET >= t}, nor of a lesion grown by one voxel.
    """
    excused_anyway = ndimage.binary_dilation(lesions, structure=_CONNECTED)
    counts = []
    for threshold in thresholds:
        spots, count = ndimage.label(fake_suv >= threshold, structure=_CONNECTED)
        excused = np.unique(spots[excused_anyway | (real_suv >= threshold)])
        counts.append(int(count - np.count_nonzero(excused)))
    return counts


def false_positive_ml(fake_suv: FloatVolume, real_suv: FloatVolume, body: Mask, voxel_ml: float) -> float:
    """Volume in ml where the synthetic PET is at least HOT_SUV and the true one is under COLD_SUV, inside the body.

    For negative controls, where nothing hot may be invented. The gap between the two thresholds keeps the rim of
    organs that are truly hot (brain, bladder, heart) out, where a voxel's shift would count otherwise.
    """
    return float(np.count_nonzero((fake_suv >= HOT_SUV) & (real_suv < COLD_SUV) & body)) * voxel_ml


def froc(studies: Iterable[tuple[Sequence[float], Mapping[float, int]]]) -> list[FrocPoint]:
    """The FROC curve over studies (and seeds): each gives its lesions' synthetic SUVmax, and false positives by SUV.

    Empty when no study has a lesion.
    """
    given = list(studies)
    maxima = np.array([value for lesions, _ in given for value in lesions])
    if maxima.size == 0:
        return []
    return [
        FrocPoint(
            threshold_suv=t,
            sensitivity=float((maxima >= t).mean()),
            false_positives=float(np.mean([counts[t] for _, counts in given])),
        )
        for t in THRESHOLDS_SUV
    ]


def sensitivity_at(points: Sequence[FrocPoint], false_positives_per_study: float) -> float | None:
    """The best sensitivity with at most so many false positives per study; None where no threshold has so few."""
    allowed = [p.sensitivity for p in points if p.false_positives <= false_positives_per_study]
    return max(allowed) if allowed else None


def seam_index(fake: FloatVolume, real: FloatVolume, labels: LabelVolume) -> float:
    """How much more a synthetic PET jumps where two districts meet than the true PET does there; 0 is no seam.

    In each volume: the mean absolute difference of neighboring voxels (6 neighbors) across borders between
    districts, over the same inside districts next to the border (pairs of one district with a voxel at the border).
    The index is that ratio in the synthetic PET minus the ratio in the true one. Each volume is measured against
    itself, so that the true PET's noise, which a synthetic one does not have, is not taken for a border. 0.1 says
    that the borders jump by a tenth of the usual difference beside them more than they truly do; a step raises it.

    Returns:
        NaN when no two districts touch, or a volume is flat beside the border.
    """
    border = _border(labels)
    if not border.any():
        return math.nan
    ratios = []
    for volume in (fake, real):
        across, beside = _jumps(volume, labels, border)
        if beside == 0:
            return math.nan
        ratios.append(across / beside)
    return ratios[0] - ratios[1]


def _pairs(axis: int) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    first, second = [slice(None)] * 3, [slice(None)] * 3
    first[axis], second[axis] = slice(None, -1), slice(1, None)
    return tuple(first), tuple(second)


def _border(labels: LabelVolume) -> Mask:
    """Voxels of a district with a neighbor of another."""
    border = np.zeros(labels.shape, dtype=bool)
    for axis in range(3):
        a, b = _pairs(axis)
        meet = (labels[a] != labels[b]) & (labels[a] > 0) & (labels[b] > 0)
        border[a] |= meet
        border[b] |= meet
    return border


def _jumps(volume: FloatVolume, labels: LabelVolume, border: Mask) -> tuple[float, float]:
    """Mean absolute difference of neighbors across borders, and inside districts next to them."""
    sums, counts = np.zeros(2), np.zeros(2)
    for axis in range(3):
        a, b = _pairs(axis)
        touching = border[a] | border[b]
        inside = touching & (labels[a] > 0) & (labels[b] > 0)
        left, right = volume[a][inside].astype(np.float64), volume[b][inside]
        other = labels[a][inside] != labels[b][inside]
        jump = np.abs(left - right)
        sums += jump[other].sum(), jump[~other].sum()
        counts += other.sum(), (~other).sum()
    across, beside = sums / np.maximum(counts, 1)
    return float(across), float(beside)
