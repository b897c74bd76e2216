"""Tissues that the CT alone tells: their mean SUV in the training studies bounds that of a result."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from pipeline.types import District, FloatVolume, LabelVolume

MIN_TISSUE_ML = 50.0  # in less, a neighbor's blur decides the mean


@dataclass(frozen=True, kw_only=True, slots=True)
class Tissue:
    """HU from `low` to below `high`, inside `districts`."""

    name: str
    low: float
    high: float
    districts: tuple[District, ...]

    @property
    def text(self) -> str:
        """For a person."""
        sides = [f"from {self.low:.0f}"] if math.isfinite(self.low) else []
        sides += [f"below {self.high:.0f}"] if math.isfinite(self.high) else []
        return f"{self.name.replace('_', ' ')} ({' and '.join(sides)} HU)"


# The head is left out: its soft tissue is the brain, which `district_uptake` bounds, and at the resolution of a PET
# the skull glows with the brain beneath it.
_BELOW_HEAD = (District.TRUNK, District.ARMS, District.LEGS)
TISSUES = (
    Tissue(name="lung", low=-math.inf, high=-500.0, districts=(District.TRUNK,)),
    Tissue(name="fat", low=-140.0, high=-40.0, districts=_BELOW_HEAD),
    Tissue(name="soft_tissue", low=0.0, high=150.0, districts=_BELOW_HEAD),
    Tissue(name="dense_bone", low=700.0, high=math.inf, districts=_BELOW_HEAD),
)


def tissue_means(hu: FloatVolume, suv: FloatVolume, labels: LabelVolume, voxel_ml: float) -> Mapping[Tissue, float]:
    """Mean SUV of each tissue of which there is enough.

    Args:
        hu, suv: [z, y, x] on one grid with `labels`; HU may be clipped at -1000 and 1000.
        labels: the districts, 0 where nothing is to be counted.
        voxel_ml: volume of a voxel.
    """
    means = {}
    for tissue in TISSUES:
        mask = np.isin(labels, tissue.districts) & (hu >= tissue.low) & (hu < tissue.high)
        if np.count_nonzero(mask) * voxel_ml >= MIN_TISSUE_ML:
            means[tissue] = float(suv[mask].mean(dtype=np.float64))
    return means
