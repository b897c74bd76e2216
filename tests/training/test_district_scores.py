"""Trying a segmenter on phantoms: the cases, the figures, the report."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.types import AIR_HU, District, DistrictOptions
from training.evaluation.districts.cases import CHANGES, DistrictCase, district_cases, make_case
from training.evaluation.districts.report import CaseResult, measure_case, scores_of, write_report
from training.evaluation.districts.scores import border, dice, score_districts
from training.phantom import PhantomSpec

SPEC = PhantomSpec(seed=3, spacing_mm=(12.0, 8.0, 8.0), pose="sides", coverage=(0.4, 1.02), blanket=False)


def case(*changes: str, spec: PhantomSpec = SPEC) -> DistrictCase:
    return DistrictCase(name="a case", group="a group", spec=spec, changes=changes)


def halves(cut: int) -> np.ndarray:
    labels = np.zeros((20, 6, 6), np.uint8)
    labels[:cut, 1:-1, 1:-1], labels[cut:, 1:-1, 1:-1] = District.LEGS, District.TRUNK
    return labels


def test_the_same_districts_score_one_and_no_distance() -> None:
    score = score_districts(halves(8), halves(8), (3.0, 2.0, 2.0))
    assert score.dice == {District.TRUNK: 1.0, District.LEGS: 1.0}
    assert (score.border_mm, score.border_p95_mm, score.invented, score.body_dice) == (0, 0, 0, 1)


def test_a_border_that_lies_higher_is_so_many_millimeters_off() -> None:
    score = score_districts(halves(11), halves(8), (3.0, 2.0, 2.0))
    # two voxels thick each: 7, 8 against 10, 11; the nearest of the other are 2 and 3 slices away
    assert score.border_mm == pytest.approx((9 + 6) / 2)
    assert score.dice[District.LEGS] == pytest.approx(2 * 8 / (8 + 11))


def test_a_district_that_is_not_in_the_field_counts_as_invented() -> None:
    found = halves(8)
    found[:2][found[:2] > 0] = District.ARMS
    score = score_districts(found, halves(8), (3.0, 2.0, 2.0))
    assert score.invented == pytest.approx(2 / 20)
    assert set(score.dice) == {District.TRUNK, District.LEGS}


def test_one_district_alone_has_no_border_distance() -> None:
    one = np.full((4, 4, 4), District.TRUNK, np.uint8)
    assert math.isnan(score_districts(one, one, (1.0, 1.0, 1.0)).border_mm)


def test_the_skin_is_no_border() -> None:
    assert set(np.nonzero(border(halves(8)))[0]) == {7, 8}


def test_volumes_that_do_not_fit_or_hold_nobody_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot be compared"):
        score_districts(halves(8)[:3], halves(8), (1.0, 1.0, 1.0))
    with pytest.raises(ValueError, match="no body"):
        score_districts(halves(8), np.zeros_like(halves(8)), (1.0, 1.0, 1.0))


def test_two_empty_masks_agree() -> None:
    nothing = np.zeros(3, bool)
    assert dice(nothing, nothing) == 1.0


def test_cases_are_many_people_in_every_pose_and_every_change_is_tried() -> None:
    cases = district_cases(200)
    assert len({c.spec.seed for c in cases}) == 200
    assert len({c.name for c in cases}) == 200
    assert {c.spec.pose for c in cases} == {"raised", "sides", "touching", "folded"}
    assert {change for c in cases for change in c.changes} == set(CHANGES)


def test_one_arm_is_cut_out_of_image_and_labels_together() -> None:
    whole, one = make_case(case()), make_case(case("one_arm"))
    gone = (whole.labels == District.ARMS) & (one.labels == 0)
    assert 0.3 < gone.sum() / (whole.labels == District.ARMS).sum() < 0.7
    assert (one.hu[gone] == AIR_HU).all()
    assert np.array_equal(one.labels[~gone], whole.labels[~gone])


@pytest.mark.parametrize("change", ["table_in_front", "table_at_side", "headrest"])
def test_furniture_is_added_outside_the_body_only(change: str) -> None:
    bare = replace(SPEC, table=False)
    before, after = make_case(case(spec=bare)), make_case(case(change, spec=bare))
    changed = before.hu != after.hu
    assert (after.hu[changed] > -950).sum() > 100
    assert not (changed & (before.labels > 0)).any()


def test_a_wrong_header_changes_the_spacing_and_no_voxel() -> None:
    right, wrong = make_case(case()), make_case(case("half_spacing"))
    assert wrong.grid.spacing_mm == (6.0, 4.0, 4.0)
    assert np.array_equal(right.hu, wrong.hu)


def test_metal_and_noise_stay_within_what_a_scanner_stores_and_leave_the_labels() -> None:
    before, after = make_case(case()), make_case(case("metal", "noise"))
    assert after.hu.max() > 2500
    assert np.array_equal(before.labels, after.labels)


def test_the_report_has_every_case_its_groups_and_pictures(tmp_path: Path) -> None:
    trials = [case(), replace(case("one_arm"), name="another", group="one arm")]
    results = [measure_case(trial, DistrictOptions()) for trial in trials]
    assert all(r.score is not None and r.score.dice[District.TRUNK] > 0.5 for r in results)
    write_report(results, [], tmp_path, DistrictOptions(), command="the command")
    text = (tmp_path / "report.md").read_text()
    assert all(part in text for part in ("| a group | 1 |", "| one arm | 1 |", "`the command`"))
    assert len(list(tmp_path.glob("phantom-worst-*.png"))) == 2
    rows = list(csv.DictReader((tmp_path / "rows.csv").read_text().splitlines()))
    assert [row["case"] for row in rows] == ["a case", "another"]
    assert float(rows[0]["dice_trunk"]) == pytest.approx(results[0].score.dice[District.TRUNK], abs=1e-4)  # type: ignore[union-attr]


def test_a_refused_phantom_counts_as_zero_and_is_named(tmp_path: Path) -> None:
    shares = {District.HEAD: 0.0, District.TRUNK: 0.7, District.ARMS: 0.3, District.LEGS: 0.0}
    refused = CaseResult(case=case(), score=None, shares=shares, seconds=1.0, refused="no_body: nothing there")
    assert scores_of([refused], District.TRUNK) == [0.0]
    assert scores_of([refused], District.HEAD) == []
    assert refused.worst == 0.0
