"""How near found districts are to the true ones. Pure: label volumes in, numbers out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from pipeline.types import OUTSIDE, District, LabelVolume

Mask = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, slots=True)
class DistrictScore:
    """One volume: `dice` of each district that is truly there, `border_mm` and `border_p95_mm` between districts.

    `invented` is the share of the found body in districts that are not in the field; `body_dice` that of the
    patient's outline. A border that only one of the two has counts as nothing: it shows in `dice`.
    """

    dice: Mapping[District, float]
    body_dice: float
    border_mm: float
    border_p95_mm: float
    invented: float


def score_districts(found: LabelVolume, true: LabelVolume, spacing_mm: tuple[float, float, float]) -> DistrictScore:
    """Compare two label volumes [z, y, x] of one shape; `spacing_mm` is (z, y, x).

    Raises:
        ValueError: the shapes differ, or the true labels are empty.
    """
    if found.shape != true.shape or not (true > OUTSIDE).any():
        raise ValueError(f"districts {found.shape} cannot be compared with {true.shape}, or no body is there")
    here = [d for d in District if (true == d).any()]
    body = int((found > OUTSIDE).sum())
    strange = sum(int((found == d).sum()) for d in District if d not in here)
    distances = border_distances(found, true, spacing_mm)
    return DistrictScore(
        dice={d: dice(found == d, true == d) for d in here},
        body_dice=dice(found > OUTSIDE, true > OUTSIDE),
        border_mm=float(distances.mean()) if distances.size else float("nan"),
        border_p95_mm=float(np.quantile(distances, 0.95)) if distances.size else float("nan"),
        invented=strange / body if body else 0.0,
    )


def dice(a: Mask, b: Mask) -> float:
    """2 |a and b| / (|a| + |b|); 1 where both are empty."""
    total = int(a.sum()) + int(b.sum())
    return 2.0 * int((a & b).sum()) / total if total else 1.0


def border_distances(
    found: LabelVolume, true: LabelVolume, spacing_mm: tuple[float, float, float]
) -> NDArray[np.float64]:
    """Distances in mm from each border voxel of one to the nearest of the other, both ways; empty without both."""
    ours, theirs = border(found), border(true)
    if not ours.any() or not theirs.any():
        return np.empty(0)
    to_true = ndimage.distance_transform_edt(~theirs, sampling=spacing_mm)[ours]
    to_found = ndimage.distance_transform_edt(~ours, sampling=spacing_mm)[theirs]
    return np.concatenate([to_true, to_found])


def border(labels: LabelVolume) -> Mask:
    """Body voxels that share a face with a voxel of another district; the skin is no border."""
    found = np.zeros(labels.shape, bool)
    for axis in range(labels.ndim):
        ahead = tuple(slice(1, None) if a == axis else slice(None) for a in range(labels.ndim))
        behind = tuple(slice(None, -1) if a == axis else slice(None) for a in range(labels.ndim))
        change = (labels[ahead] != labels[behind]) & (labels[ahead] != OUTSIDE) & (labels[behind] != OUTSIDE)
        found[ahead] |= change
        found[behind] |= change
    return found
