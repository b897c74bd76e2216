"""Which study is for training, validation or test: by patient, stratified by diagnosis, the same every time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from itertools import product
from typing import Literal, get_args

from training.errors import DataError
from training.prepared import Diagnosis, Split, StudyRecord
from training.recipe import SplitRecipe

SIDES: tuple[Split, ...] = get_args(Split)
_DIAGNOSES: tuple[Diagnosis, ...] = get_args(Diagnosis)
# A patient with several studies counts under the first of these that one of them has: a control study of a
# patient with a lymphoma does not make them a negative control.
_STRATA = (*(d for d in _DIAGNOSES if d not in ("negative", "unknown")), "negative", "unknown")


def split_studies(
    records: Iterable[StudyRecord], recipe: SplitRecipe, profile: Literal["robust", "paper"]
) -> dict[str, Split]:
    """The side of every study, by id. A function of ids, patients, diagnoses and the recipe, not of their order.

    The whole is divided by the shares to the nearest patient (largest remainder), and so is every diagnosis, rounded
    up or down such that the parts sum to the whole. With three patients or more no side with a share is empty.

    Raises:
        DataError: split_leaks: `unit = "study"` outside the profile "paper", which alone needs it to repeat the
            paper's own split (1,014 studies of 900 patients: the same patient is in training and test).
    """
    if recipe.unit == "study" and profile != "paper":
        text = f"split.unit = 'study' in the profile {profile!r}: the same patient would be in training and test"
        raise DataError("split_leaks", f"{text}; 'patient' is expected, 'study' is for the profile 'paper' only")
    units: dict[str, list[StudyRecord]] = {}
    for record in records:
        units.setdefault(record.patient if recipe.unit == "patient" else record.id, []).append(record)
    strata: dict[str, list[str]] = {}
    for unit in sorted(units, key=lambda u: _drawn(recipe.seed, u)):
        strata.setdefault(_stratum(units[unit]), []).append(unit)
    sizes: dict[str, int] = {name: len(strata[name]) for name in _STRATA if name in strata}
    counts = side_counts(sizes, recipe.shares)
    result: dict[str, Split] = {}
    for name, row in counts.items():
        sides = [side for side, count in zip(SIDES, row, strict=True) for _ in range(count)]
        for unit, side in zip(strata[name], sides, strict=True):
            result |= {record.id: side for record in units[unit]}
    return dict(sorted(result.items()))


def side_counts(sizes: Mapping[str, int], shares: Sequence[float]) -> dict[str, list[int]]:
    """How many of each stratum go to each side: rows sum to the sizes, columns to the shares of the whole.

    A cell is its exact share rounded up or down (controlled rounding, which always exists), save where an empty
    side had to get somebody. Of all such roundings it is the one that rounds up where the remainders are largest.
    """
    total = sum(map(Fraction, shares))
    exact_shares = [(Fraction(share) / total).limit_denominator(10_000) for share in shares]
    exact_shares = [share / sum(exact_shares) for share in exact_shares]
    whole = _largest_remainder([sum(sizes.values()) * share for share in exact_shares], sum(sizes.values()))
    exact = {name: [size * share for share in exact_shares] for name, size in sizes.items()}
    # few enough to try all: at most 3 roundings of each of 6 diagnoses
    fitting = [
        rows
        for rows in product(*(_roundings(row) for row in exact.values()))
        if all(sum(row[i] for row in rows) == n for i, n in enumerate(whole))
    ]
    best = max(fitting, key=lambda rows: _gain(rows, list(exact.values())))
    counts = {name: list(row) for name, row in zip(sizes, best, strict=True)}
    _fill_empty_sides(counts, exact_shares)
    return counts


def _roundings(row: Sequence[Fraction]) -> list[tuple[int, ...]]:
    """Every way to round the cells up or down (a whole number stays) that keeps the row's sum."""
    cells = [(int(cell),) if cell.denominator == 1 else (int(cell), int(cell) + 1) for cell in row]
    return [rounded for rounded in product(*cells) if sum(rounded) == sum(row)]


def _gain(rows: Sequence[Sequence[int]], exact: Sequence[Sequence[Fraction]]) -> Fraction:
    """The remainders of all cells that were rounded up."""
    cells = ((n, value) for row, values in zip(rows, exact, strict=True) for n, value in zip(row, values, strict=True))
    return sum((value - int(value) for n, value in cells if n > value), Fraction(0))


def _fill_empty_sides(counts: dict[str, list[int]], shares: Sequence[Fraction]) -> None:
    """Three patients or more: a side that has a share but nobody gets one from the fullest side."""
    wanted = [i for i, share in enumerate(shares) if share > 0]
    if sum(map(sum, counts.values())) < len(wanted):
        return
    for empty in wanted:
        totals = [sum(row[i] for row in counts.values()) for i in range(len(shares))]
        if totals[empty] == 0:
            fullest = totals.index(max(totals))
            row = max(counts.values(), key=lambda r: r[fullest])
            row[fullest] -= 1
            row[empty] += 1


def _largest_remainder(exact: Sequence[Fraction], total: int) -> list[int]:
    """Hamilton's apportionment: round down, then one more for the largest remainders (the earlier side on a tie)."""
    counts = [int(value) for value in exact]
    order = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
    for i in order[: total - sum(counts)]:
        counts[i] += 1
    return counts


def _stratum(studies: Iterable[StudyRecord]) -> str:
    found = {study.diagnosis for study in studies}
    return next(diagnosis for diagnosis in _STRATA if diagnosis in found)


def _drawn(seed: int, unit: str) -> str:
    """A place in the order of drawing that depends on the seed and this patient only."""
    return hashlib.sha256(f"{seed}:{unit}".encode()).hexdigest()
