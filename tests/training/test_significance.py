from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from training.evaluation.significance import Comparison, compare, corrected, holm


def values(numbers: list[float]) -> dict[str, float]:
    return {f"patient-{i}": number for i, number in enumerate(numbers)}


def mae_of(numbers: list[float], others: list[float]) -> Comparison:
    return compare("trunk", "mae", "a", "b", values(numbers), values(others))


def test_the_t_test_is_paired_and_two_tailed_and_the_effect_is_d_z() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 1, 20), rng.normal(0.3, 1, 20)
    found = mae_of(list(a), list(b))
    assert found.n == 20
    assert found.p_t == pytest.approx(stats.ttest_rel(a, b).pvalue)
    assert found.p_wilcoxon == pytest.approx(stats.wilcoxon(a, b).pvalue)
    assert found.effect_dz == pytest.approx((a - b).mean() / (a - b).std(ddof=1))


def test_only_patients_of_both_methods_are_compared() -> None:
    others = values([2.0, 3.5, 4.2, 5.1])
    del others["patient-0"]
    found = compare("arms", "psnr", "a", "b", values([1.0, 2.0, 3.0, 4.0]), others)
    assert (found.n, found.difference) == (3, pytest.approx(-1.2666667))


@pytest.mark.parametrize(
    ("a", "b", "said"),
    [
        ([], [], "not tested: n=0"),
        ([1.0, 2.0], [2.0, 4.0], "not tested: n=2"),
        ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], "not tested: all differences are 0 (n=3)"),
        ([1.1, 2.1, 3.1], [1.0, 2.0, 3.0], "not tested: all differences are equal (n=3)"),
    ],
)
def test_what_cannot_be_tested_is_said_by_name(a: list[float], b: list[float], said: str) -> None:
    found = mae_of(a, b)
    assert (found.not_tested, found.p_t, found.verdict) == (said, None, "not tested")


def test_tied_pairs_among_others_are_ranked_and_do_not_warn() -> None:
    found = mae_of([1.0, 2.0, 3.0, 4.0, 5.0], [1.0, 2.0, 3.5, 4.5, 5.7])
    assert 0 < found.p_wilcoxon < 1


def test_holm_is_the_published_step_down() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_what_was_not_tested_does_not_count_in_the_family() -> None:
    rng = np.random.default_rng(1)
    tested = mae_of(list(rng.normal(0, 1, 10)), list(rng.normal(1, 1, 10)))
    alone, skipped = corrected([tested, mae_of([1.0], [2.0])])
    assert alone.holm_t == pytest.approx(tested.p_t)
    assert skipped.verdict == "not tested"


@pytest.mark.parametrize(
    ("metric", "shift", "verdict"),
    [
        ("mae", -1.0, "win"),
        ("mae", 1.0, "loss"),
        ("psnr", 1.0, "win"),
        ("psnr", -1.0, "loss"),
        ("ssim", 0.0, "undecided"),
    ],
)
def test_a_method_that_is_worse_loses(metric: str, shift: float, verdict: str) -> None:
    rng = np.random.default_rng(5)
    b = rng.normal(0, 1, 12)
    noise = rng.normal(0, 0.1, 12)
    a = b + shift + noise - noise.mean()
    found = corrected([compare("trunk", metric, "a", "b", values(list(a)), values(list(b)))])
    assert found[0].verdict == verdict
