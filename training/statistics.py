"""What the training cases looked like, per district: for the bundle's manifest and the gates that read it."""

from __future__ import annotations

from typing import Any

import numpy as np

from pipeline.types import District
from training.phantom import Phantom

SAMPLES_PER_CASE = 20_000


class CaseStatistics:
    """Gathers HU and SUV per district over cases; a fixed sample per case keeps it small."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng([seed, 99])
        self._hu: dict[District, list[np.ndarray]] = {d: [] for d in District}
        self._suv: dict[District, list[np.ndarray]] = {d: [] for d in District}
        self._means: dict[District, list[float]] = {d: [] for d in District}
        self._max: dict[District, float] = dict.fromkeys(District, 0.0)

    def add(self, phantom: Phantom) -> None:
        for district in District:
            mask = phantom.districts == district
            if not mask.any():
                continue
            hu, suv = phantom.hu[mask], phantom.suv[mask]
            self._means[district].append(float(suv.mean()))
            self._max[district] = max(self._max[district], float(suv.max()))
            chosen = self._rng.integers(0, hu.size, min(hu.size, SAMPLES_PER_CASE))
            self._hu[district].append(hu[chosen])
            self._suv[district].append(suv[chosen])

    def summary(self) -> dict[str, Any]:
        """Per district key: cases, SUV mean with its spread between cases, 99.9 percentile, maximum; HU percentiles."""
        result: dict[str, Any] = {}
        for district in District:
            if not self._means[district]:
                continue
            hu, suv = np.concatenate(self._hu[district]), np.concatenate(self._suv[district])
            means = self._means[district]
            percentiles = (0.1, 1, 5, 25, 50, 75, 95, 99, 99.9)
            values = np.percentile(hu, percentiles)
            result[district.key] = {
                "cases": len(means),
                "suv_mean": round(float(np.mean(means)), 4),
                "suv_mean_sd": round(float(np.std(means)), 4),
                "suv_mean_range": [round(min(means), 4), round(max(means), 4)],
                "suv_p99_9": round(float(np.percentile(suv, 99.9)), 3),
                "suv_max": round(self._max[district], 3),
                "hu_percentiles": {str(p): round(float(v), 1) for p, v in zip(percentiles, values, strict=True)},
            }
        return result
