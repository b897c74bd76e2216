"""What the training studies looked like, per district: for the bundle's manifest and whoever compares with it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.types import District, FloatVolume, LabelVolume

# A study keeps these percentiles of each district: enough to pool percentiles over studies, each study counting
# the same whatever its size, without its voxels.
PERCENTS = np.array([0.05, 0.1, 0.2, 0.5, *range(1, 100), 99.5, 99.8, 99.9, 99.95])
_HU_PERCENTS = (0.1, 1, 5, 25, 50, 75, 95, 99, 99.9)


def study_statistics(hu: FloatVolume, suv: FloatVolume, districts: LabelVolume) -> dict[str, Any]:
    """One study's figures per district that it has: voxels, SUV mean and maximum, percentiles of HU and SUV.

    Args:
        hu, suv: not clipped, [z, y, x] on one grid with `districts`.
    """
    result: dict[str, Any] = {}
    for district in District:
        mask = districts == district
        if not mask.any():
            continue
        inside = suv[mask]
        result[district.key] = {
            "voxels": int(inside.size),
            "suv_mean": round(float(inside.mean(dtype=np.float64)), 4),
            "suv_max": round(float(inside.max()), 3),
            "suv": np.percentile(inside, PERCENTS).round(3).tolist(),
            "hu": np.percentile(hu[mask], PERCENTS).round(1).tolist(),
        }
    return result


def pooled_statistics(studies: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Per district: studies, SUV mean with its spread between studies, 99.9 percentile, maximum; HU percentiles.

    Args:
        studies: what `study_statistics` gave for each.
    """
    found = list(studies)
    result: dict[str, Any] = {}
    for key in (district.key for district in District):
        rows = [study[key] for study in found if key in study]
        if not rows:
            continue
        means = [row["suv_mean"] for row in rows]
        hu = _pooled([row["hu"] for row in rows], _HU_PERCENTS)
        result[key] = {
            "studies": len(rows),
            "suv_mean": round(float(np.mean(means)), 4),
            "suv_mean_sd": round(float(np.std(means)), 4),
            "suv_mean_range": [min(means), max(means)],
            "suv_p99_9": round(_pooled([row["suv"] for row in rows], (99.9,))[0], 3),
            "suv_max": max(row["suv_max"] for row in rows),
            "hu_percentiles": {str(p): round(v, 1) for p, v in zip(_HU_PERCENTS, hu, strict=True)},
        }
    return result


def _pooled(values: list[list[float]], percents: Iterable[float]) -> list[float]:
    """Percentiles of the mixture of all studies, each with the same weight.

    The share of the mixture below a value is the mean over the studies of the share below it in each.
    """
    tables = [np.asarray(row) for row in values]
    levels: NDArray[np.float64] = np.unique(np.concatenate(tables))
    shares = np.mean([np.interp(levels, row, PERCENTS, left=0.0, right=100.0) for row in tables], axis=0)
    return [float(np.interp(p, shares, levels)) for p in percents]
