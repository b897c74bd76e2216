"""Is one method better than another over the same patients? Paired tests, corrected for how many were made.

Per comparison: the paper's paired two-tailed t-test, Wilcoxon's signed-rank test beside it, Cohen's d_z (mean over
SD of the paired differences). Holm's step-down correction over the family, which is every comparison of one table
(each test is a family of its own). The verdict follows the corrected t-test; what cannot be tested says why.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy import stats

ALPHA = 0.05
SMALLEST_N = 3
HIGHER_IS_BETTER: Mapping[str, bool] = {"mae": False, "psnr": True, "ssim": True}

Verdict = Literal["win", "loss", "undecided", "not tested"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """`method` against `other` in one group (region or condition) and metric over `n` patients that both have.

    `difference` is the mean of method minus other. `p_t` and `p_wilcoxon` are as computed, `holm_*` corrected.
    `not_tested` says why there is no p.
    """

    group: str
    metric: str
    method: str
    other: str
    n: int
    difference: float | None = None
    effect_dz: float | None = None
    p_t: float | None = None
    p_wilcoxon: float | None = None
    holm_t: float | None = None
    holm_wilcoxon: float | None = None
    not_tested: str = ""

    @property
    def verdict(self) -> Verdict:
        """Whether `method` wins or loses: Holm-corrected t-test under ALPHA, in which direction."""
        if self.holm_t is None or self.difference is None:
            return "not tested"
        if self.holm_t >= ALPHA:
            return "undecided"
        return "win" if (self.difference > 0) == HIGHER_IS_BETTER[self.metric] else "loss"


def compare(
    group: str, metric: str, method: str, other: str, values: Mapping[str, float], others: Mapping[str, float]
) -> Comparison:
    """One comparison from one value per patient and method; patients that only one of them has are left out."""
    shared = sorted(values.keys() & others.keys())
    differences = np.array([values[p] - others[p] for p in shared])
    result = Comparison(group=group, metric=metric, method=method, other=other, n=len(shared))
    if not shared:
        return replace(result, not_tested="not tested: n=0")
    mean = float(differences.mean())
    if len(shared) < SMALLEST_N:
        return replace(result, difference=mean, not_tested=f"not tested: n={len(shared)}")
    sd = float(differences.std(ddof=1))
    largest = float(np.abs(differences).max())
    # rounding of equal differences leaves an SD of some 1e-17, which no test may take for a spread
    if largest <= 1e-12 or sd <= 1e-9 * largest:
        tied = "all differences are 0" if largest <= 1e-12 else "all differences are equal"
        return replace(result, difference=mean, not_tested=f"not tested: {tied} (n={len(shared)})")
    return replace(
        result,
        difference=mean,
        effect_dz=mean / sd,
        p_t=float(stats.ttest_1samp(differences, 0.0).pvalue),
        # zsplit keeps tied pairs in the ranking and gives half of each rank to either side
        p_wilcoxon=float(stats.wilcoxon(differences, zero_method="zsplit").pvalue),
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values (Scand J Stat 1979), in the order given."""
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def corrected(family: Sequence[Comparison]) -> list[Comparison]:
    """The family with `holm_t` and `holm_wilcoxon` filled in; what was not tested does not count."""
    tested = [i for i, c in enumerate(family) if c.p_t is not None and c.p_wilcoxon is not None]
    by_t = holm([family[i].p_t or 0.0 for i in tested])
    by_wilcoxon = holm([family[i].p_wilcoxon or 0.0 for i in tested])
    result = list(family)
    for place, i in enumerate(tested):
        result[i] = replace(family[i], holm_t=by_t[place], holm_wilcoxon=by_wilcoxon[place])
    return result
