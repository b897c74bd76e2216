"""Patients are on one side only, the shares are kept, every diagnosis is spread."""

from __future__ import annotations

import random
from collections import Counter, defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.errors import DataError
from training.preparation.split import SIDES, side_counts, split_studies
from training.prepared import Diagnosis, StudyRecord
from training.recipe import SplitRecipe

DIAGNOSES: tuple[Diagnosis, ...] = ("negative", "lymphoma", "lung_cancer", "melanoma", "unknown")
SHARES = (0.7, 0.1, 0.2)


def record(name: str, patient: str, diagnosis: Diagnosis = "negative") -> StudyRecord:
    return StudyRecord(
        id=name,
        patient=patient,
        diagnosis=diagnosis,
        shape=(1, 1, 1),
        spacing_mm=(4, 4, 4),
        origin_mm=(0, 0, 0),
        files={},
        segmenter="given",
    )


@st.composite
def cohorts(draw: st.DrawFn) -> list[StudyRecord]:
    """Up to 120 patients with one to three studies each, whose diagnoses may differ."""
    patients = draw(st.lists(st.tuples(st.sampled_from(DIAGNOSES), st.integers(1, 3)), min_size=1, max_size=120))
    return [
        record(f"s{p}-{n}", f"p{p}", diagnosis if n == 0 else "negative")
        for p, (diagnosis, studies) in enumerate(patients)
        for n in range(studies)
    ]


def sides_of_patients(records: list[StudyRecord], split: dict[str, str]) -> dict[str, set[str]]:
    sides: dict[str, set[str]] = defaultdict(set)
    for study in records:
        sides[study.patient].add(split[study.id])
    return sides


@given(cohorts(), st.integers(0, 5))
def test_no_patient_is_on_two_sides_and_every_study_is_on_one(records: list[StudyRecord], seed: int) -> None:
    split = split_studies(records, SplitRecipe(seed=seed), "robust")
    assert set(split) == {study.id for study in records}
    assert all(len(sides) == 1 for sides in sides_of_patients(records, split).values())


@given(cohorts())
def test_shares_are_kept_to_the_patient(records: list[StudyRecord]) -> None:
    sides = sides_of_patients(records, split_studies(records, SplitRecipe(), "robust"))
    found = Counter(next(iter(side)) for side in sides.values())
    for side, share in zip(SIDES, SHARES, strict=True):
        # 1 off where an empty side had to get somebody
        assert abs(found[side] - share * len(sides)) <= (1 if len(sides) >= 10 else 2)


@given(cohorts())
def test_three_patients_leave_no_side_empty(records: list[StudyRecord]) -> None:
    split = split_studies(records, SplitRecipe(), "robust")
    if len({study.patient for study in records}) >= 3:
        assert set(split.values()) == set(SIDES)


@given(st.dictionaries(st.sampled_from(DIAGNOSES), st.integers(1, 200), min_size=1))
def test_every_diagnosis_is_spread_by_the_shares(sizes: dict[str, int]) -> None:
    counts = side_counts(sizes, SHARES)
    total = sum(sizes.values())
    for name, row in counts.items():
        assert sum(row) == sizes[name]
        if total >= 10:  # else an empty side may have taken one
            assert all(abs(n - share * sizes[name]) < 1 for n, share in zip(row, SHARES, strict=True))


@given(cohorts(), st.randoms(use_true_random=False))
def test_the_order_of_the_studies_does_not_matter(records: list[StudyRecord], shuffler: random.Random) -> None:
    shuffled = list(records)
    shuffler.shuffle(shuffled)
    assert split_studies(shuffled, SplitRecipe(), "robust") == split_studies(records, SplitRecipe(), "robust")


def test_the_published_cohort_is_divided_by_patient() -> None:
    sizes = {"lymphoma": 144, "lung_cancer": 168, "melanoma": 188, "negative": 400}
    counts = side_counts(sizes, SHARES)
    assert [sum(row[i] for row in counts.values()) for i in range(3)] == [630, 90, 180]


def test_a_share_that_is_a_whole_number_is_not_rounded() -> None:
    counts = side_counts({"negative": 5, "lymphoma": 10}, SHARES)  # 3.5, 0.5, 1 and 7, 1, 2
    assert counts["lymphoma"] == [7, 1, 2]
    assert counts["negative"][2] == 1


def test_another_seed_gives_another_split() -> None:
    records = [record(f"s{n}", f"p{n}") for n in range(40)]
    first, second = (split_studies(records, SplitRecipe(seed=seed), "robust") for seed in (0, 1))
    assert first != second
    assert Counter(first.values()) == Counter(second.values())


def test_a_control_study_of_a_patient_with_lymphoma_follows_the_lymphoma() -> None:
    records = [record(f"a{n}", f"p{n}", "lymphoma") for n in range(10)]
    records += [record(f"b{n}", f"p{n}", "negative") for n in range(10)]
    split = split_studies(records, SplitRecipe(), "robust")
    assert Counter(split[f"a{n}"] for n in range(10)) == {"train": 7, "validation": 1, "test": 2}
    assert all(split[f"a{n}"] == split[f"b{n}"] for n in range(10))


def test_a_side_without_a_share_stays_empty() -> None:
    records = [record(f"s{n}", f"p{n}") for n in range(10)]
    split = split_studies(records, SplitRecipe(shares=(0.8, 0.0, 0.2)), "robust")
    assert Counter(split.values()) == {"train": 8, "test": 2}


def test_splitting_by_study_is_for_the_profile_paper_only() -> None:
    records = [record(f"s{n}", "same patient") for n in range(10)]
    recipe = SplitRecipe(unit="study")
    with pytest.raises(DataError, match="training and test") as error:
        split_studies(records, recipe, "robust")
    assert error.value.code == "split_leaks"
    assert Counter(split_studies(records, recipe, "paper").values()) == {"train": 7, "validation": 1, "test": 2}
