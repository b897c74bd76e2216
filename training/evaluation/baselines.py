"""Two trivial predictors that a network has to beat: the district's mean, and a look-up from HU to SUV.

Both are fitted on the training studies, per district, in units of [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.types import District, FloatVolume, LabelVolume
from training.prepared import PreparedStudy

BINS = 256  # of the scaled CT: 8 HU each with the fixed range
BASELINES = ("hu_lookup", "district_mean")


@dataclass(frozen=True, slots=True)
class Baselines:
    """`means` [5] by district label, `lookup` [5, BINS] by district label and scaled HU."""

    means: NDArray[np.float32]
    lookup: NDArray[np.float32]

    def predict(self, method: str, ct_unit: FloatVolume, districts: LabelVolume) -> FloatVolume:
        """The volume [z, y, x] in [0, 1] of one of BASELINES; 0 outside the body."""
        return self.predict_mean(districts) if method == "district_mean" else self.predict_lookup(ct_unit, districts)

    def predict_mean(self, districts: LabelVolume) -> FloatVolume:
        """Every voxel gets its district's mean."""
        return self.means[districts]

    def predict_lookup(self, ct_unit: FloatVolume, districts: LabelVolume) -> FloatVolume:
        """Every voxel gets the mean of the training voxels of its district and HU."""
        return self.lookup[districts, _bin(ct_unit)]


def _bin(ct_unit: NDArray[np.floating]) -> NDArray[np.intp]:
    return np.minimum((ct_unit * BINS).astype(np.intp), BINS - 1)


def fit_baselines(
    studies: Iterable[PreparedStudy], *, on_study: Callable[[int], None] = lambda _done: None
) -> Baselines:
    """Means per district and per (district, HU bin); an empty bin takes its nearest filled neighbor's value.

    One study is held at a time. A district that no study has predicts 0.
    """
    size = len(District) + 1
    sums, counts = np.zeros((size, BINS)), np.zeros((size, BINS))
    for number, study in enumerate(studies, start=1):
        labels = np.asarray(study.districts)
        body = labels > 0
        flat = labels[body].astype(np.intp) * BINS + _bin(np.asarray(study.ct)[body].astype(np.float32))
        pet = np.asarray(study.pet)[body].astype(np.float64)
        counts += np.bincount(flat, minlength=size * BINS).reshape(size, BINS)
        sums += np.bincount(flat, pet, minlength=size * BINS).reshape(size, BINS)
        on_study(number)
    means = np.divide(sums.sum(1), counts.sum(1), out=np.zeros(size), where=counts.sum(1) > 0)
    lookup = np.zeros((size, BINS))
    for label in range(1, size):
        filled = np.flatnonzero(counts[label])
        if filled.size:
            nearest = filled[np.abs(np.arange(BINS)[:, None] - filled[None, :]).argmin(axis=1)]
            lookup[label] = sums[label, nearest] / counts[label, nearest]
    return Baselines(means.astype(np.float32), lookup.astype(np.float32))
