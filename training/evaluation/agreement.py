"""Bland-Altman agreement of SUVmean (Lancet 1986): bias and 95 % limits of agreement, per district and organ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from training.evaluation.aggregate import Value, of_region, per_patient
from training.evaluation.measure import Measure

LIMIT_SD = 1.96
SHOWN_ORGANS = (  # where readers look first; what a cohort labels beyond these is in organs.csv
    "grey_matter",
    "cerebellum",
    "myocardium",
    "blood",
    "lung",
    "liver",
    "spleen",
    "kidney",
    "bowel",
    "bladder",
    "red_marrow",
    "muscle",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """`means` and `differences` (synthetic minus true) of SUVmean in g/ml, one per patient."""

    place: str
    means: tuple[float, ...]
    differences: tuple[float, ...]

    @property
    def n(self) -> int:
        return len(self.differences)

    @property
    def bias(self) -> float:
        return float(np.mean(self.differences))

    @property
    def sd(self) -> float | None:
        return float(np.std(self.differences, ddof=1)) if self.n > 1 else None

    @property
    def limits(self) -> tuple[float, float] | None:
        """Bias ± 1.96 SD; None for one patient."""
        if self.sd is None:
            return None
        return self.bias - LIMIT_SD * self.sd, self.bias + LIMIT_SD * self.sd


def region_agreement(measures: Sequence[Measure], region: str) -> Agreement | None:
    """Of one method's measures; None when no patient has the region."""
    return _agreement(region, measures, of_region(region, "suv_mean"), of_region(region, "true_suv_mean"))


def organ_agreement(measures: Sequence[Measure], organ: str) -> Agreement | None:
    """Of one method's measures; None when no patient has the organ."""
    return _agreement(organ, measures, _of_organ(organ, "suv_mean"), _of_organ(organ, "true_suv_mean"))


def organs_of(measures: Sequence[Measure]) -> list[str]:
    """Every organ that any study has, in the order of the labels."""
    return list(dict.fromkeys(organ for row in measures for organ in row.organs))


def shown_organs(measures: Sequence[Measure]) -> list[str]:
    """The organs for figures and the report: SHOWN_ORGANS, or the cohort's first ones where its names are others."""
    found = organs_of(measures)
    return [organ for organ in SHOWN_ORGANS if organ in found] or found[: len(SHOWN_ORGANS)]


def _of_organ(organ: str, name: str) -> Value:
    return lambda row: row.organs.get(organ, {}).get(name)


def _agreement(place: str, measures: Sequence[Measure], fake: Value, real: Value) -> Agreement | None:
    found, true = per_patient(measures, fake), per_patient(measures, real)
    shared = sorted(found.keys() & true.keys())
    if not shared:
        return None
    return Agreement(
        place=place,
        means=tuple((found[p] + true[p]) / 2 for p in shared),
        differences=tuple(found[p] - true[p] for p in shared),
    )
