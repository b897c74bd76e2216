"""The output gate: what is held before anything is sent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from gate_samples import SHAPE, a_body, a_grid, ellipse
from numpy.typing import NDArray

from pipeline.gate.output import check_output
from pipeline.gate.seams import worst_seam
from pipeline.types import District, DistrictMap, GateFinding, GateOptions, GeometryError, SuvVolume

Volume = NDArray[np.float32]
Change = Callable[[Volume], Volume]
HU = a_body()
LABELS = np.where(ellipse(100, 160), District.TRUNK, 0).astype(np.uint8)
LABELS[30:] = np.where(LABELS[30:] > 0, District.HEAD, 0)
TRUNK, HEAD = LABELS == District.TRUNK, LABELS == District.HEAD
STATISTICS = {
    key: {"suv_mean_range": [0.7, 1.1], "suv_p99_9": 4.0, "suv_max": 9.0} for key in ("head", "trunk", "arms", "legs")
}


def districts() -> DistrictMap:
    present = (District.HEAD, District.TRUNK)
    return DistrictMap(labels=LABELS, grid=a_grid(), segmenter="t", version="1", confidence=dict.fromkeys(present, 1.0))


def uptake() -> Volume:
    """SUV about 1 in the body, less in the lungs, with a smooth slope from head to foot and a little texture."""
    slope = np.linspace(1.1, 0.9, SHAPE[0])[:, None, None] + 0.05 * np.sin(np.arange(SHAPE[2]))
    suv = np.where(LABELS > 0, slope, 0.0)
    return np.where((LABELS > 0) & (HU < -500), 0.5, suv).astype(np.float32)


def findings(
    change: Change = lambda suv: suv, not_evaluated: tuple[District, ...] = (), told: Any = STATISTICS, **options: Any
) -> tuple[GateFinding, ...]:
    suv = SuvVolume(suv=np.asarray(change(uptake()), np.float32), grid=a_grid(), not_evaluated=not_evaluated)
    return check_output(suv, districts(), HU, told, GateOptions(**options))


def put(index: Any, value: float) -> Change:
    def change(suv: Volume) -> Volume:
        suv[index] = value
        return suv

    return change


def test_uptake_in_the_body_and_none_outside_passes() -> None:
    assert findings() == ()
    assert findings(put((20, 60, 60), 20.0)) == ()


def test_uptake_within_the_feathered_edge_passes() -> None:
    assert findings(put((20, 60, 60 + 41), 0.5)) == ()  # the body ends 160 mm (40 voxels) from the middle


def test_a_district_that_was_not_evaluated_may_hold_zero() -> None:
    assert findings(put(HEAD, 0.0), (District.HEAD,)) == ()


def a_hot_corner(suv: Volume) -> Volume:
    suv[5:10, 45:75, 30:60] = 12.0
    return suv


CASES: dict[str, tuple[Change, str]] = {
    "one NaN": (put((0, 0, 0), np.nan), "non_finite"),
    "one infinite": (put((5, 60, 60), np.inf), "non_finite"),
    "below zero": (put((5, 60, 60), -0.01), "negative"),
    "above the networks' range": (put((5, 60, 60), 20.5), "out_of_range"),
    "all zero": (lambda suv: suv * 0, "nothing_synthesized"),
    "hardly anything": (lambda suv: suv * 0.01, "nothing_synthesized"),
    "a hot spot in the air": (put((20, 5, 5), 2.0), "uptake_outside_body"),
    "lungs that glow": (put(TRUNK & (HU < -500), 1.6), "lung_uptake"),
    "a spine that glows": (put(TRUNK & (HU > 700), 3.5), "bone_uptake"),
    "a cold body": (lambda suv: suv * 0.3, "district_uptake"),
    "a hot district": (put(TRUNK & (HU > -500) & (HU < 500), 3.9), "district_uptake"),
    "more hot voxels than any patient had": (a_hot_corner, "district_uptake"),
    "a step at the neck": (lambda suv: suv + 0.6 * HEAD.astype(np.float32), "seam"),
    "a right half twice the left": (
        lambda suv: suv * np.where(np.arange(SHAPE[2]) < 60, 1.4, 0.7).astype(np.float32),
        "asymmetry",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_an_implausible_result_is_found_by_name(case: str) -> None:
    change, code = CASES[case]
    found = findings(change)
    assert code in [one.code for one in found]
    assert all(one.text for one in found)


def test_a_result_of_which_nothing_was_evaluated_is_found_alone() -> None:
    found = findings(lambda suv: suv * 0, (District.HEAD, District.TRUNK))
    assert [one.code for one in found] == ["nothing_evaluated"]


@pytest.mark.parametrize(("share", "expected"), [(0.8, []), (0.7, ["not_evaluated"])])
def test_a_body_of_which_too_much_was_not_evaluated_is_found(share: float, expected: list[str]) -> None:
    found = findings(put(TRUNK, 0.0), (District.TRUNK,), max_not_evaluated=share)  # three slices of four
    assert [one.code for one in found] == expected


def test_a_tissue_is_bound_by_what_the_training_studies_held() -> None:
    told = STATISTICS | {"tissues": {"fat": {"suv_mean_range": [0.3, 0.4]}, "lung": {"suv_mean_range": [0.4, 0.6]}}}
    (found,) = findings(told=told)  # fat like everything else about 1
    assert found.code == "tissue_uptake"
    assert found.text.startswith("the mean SUV of fat (from -140 and below -40 HU) is 1.0")
    assert "0.15 to 0.80 is expected" in found.text
    cool = put((LABELS > 0) & (HU < -20), 0.35)
    assert findings(cool, told=told) == ()
    assert [one.code for one in findings(lambda suv: cool(suv) * np.where(HU < -500, 0.1, 1), told=told)] == [
        "tissue_uptake"
    ]  # lungs without any uptake are as wrong as glowing ones
    assert findings(told=told, suv_factor=4.0) == ()


def test_a_tissue_that_was_not_evaluated_is_not_judged() -> None:
    told = {"tissues": {"soft_tissue": {"suv_mean_range": [0.9, 1.1]}}}
    assert findings(put(TRUNK, 0.0), (District.TRUNK,), told=told, max_not_evaluated=0.9) == ()


def test_a_bundle_without_statistics_has_no_bounds_for_its_districts() -> None:
    assert findings(lambda suv: suv * 0.3, told={}) == ()
    assert findings(lambda suv: suv * 0.3, told={"trunk": {"studies": 3}}) == ()


def test_the_bounds_of_the_training_data_can_be_widened() -> None:
    assert findings(lambda suv: suv * 0.3, suv_factor=4.0) == ()


def test_bounds_bind_each_district_by_its_own_training_data() -> None:
    found = findings(told=STATISTICS | {"head": {"suv_mean_range": [2.5, 3.0]}})
    assert [(one.code, "head" in one.text) for one in found] == [("district_uptake", True)]


def test_the_skull_may_glow_with_the_brain() -> None:
    assert "bone_uptake" not in [one.code for one in findings(put(HEAD & (HU > 700), 6.0), told={})]


def test_one_arm_alone_has_no_sides_to_compare() -> None:
    labels = LABELS.copy()
    labels[:, 40:80, 90:100] = np.where(labels[:, 40:80, 90:100] > 0, District.ARMS, 0)
    suv = uptake()
    one_arm = DistrictMap(labels=labels, grid=a_grid(), segmenter="t", version="1", confidence={District.ARMS: 1.0})
    found = check_output(SuvVolume(suv=suv, grid=a_grid()), one_arm, HU, {}, GateOptions())
    assert found == ()


def test_a_volume_on_another_grid_is_an_error() -> None:
    suv = SuvVolume(suv=np.zeros(SHAPE, np.float32), grid=a_grid((4.0, 4.0, 4.0)))
    with pytest.raises(GeometryError):
        check_output(suv, districts(), HU, {}, GateOptions())
    with pytest.raises(GeometryError):
        check_output(SuvVolume(suv=uptake(), grid=a_grid()), districts(), HU[1:], {}, GateOptions())


# --- seams -----------------------------------------------------------------------------------------------------------


def two_blocks(step: float, texture: float, axis: int = 0) -> tuple[Volume, NDArray[np.uint8]]:
    """A cube of 20 with a border in its middle across `axis`, a step there, and a wave of `texture` everywhere."""
    along = np.moveaxis(np.broadcast_to(np.arange(20), (20, 20, 20)), -1, axis)
    suv = 2.0 + texture * (along % 2) + step * (along >= 10)
    return suv.astype(np.float32), np.where(along < 10, District.LEGS, District.TRUNK).astype(np.uint8)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_seam_is_the_step_across_a_border_over_the_steps_beside_it(axis: int) -> None:
    suv, labels = two_blocks(1.0, 0.25, axis)
    seam = worst_seam(suv, labels, (District.TRUNK, District.LEGS))
    assert seam is not None
    assert (seam.first, seam.second) == (District.TRUNK, District.LEGS)
    assert (seam.across, seam.beside) == pytest.approx((0.75, 0.25))
    assert seam.index == pytest.approx(3.0)


def test_texture_without_a_step_is_no_seam() -> None:
    suv, labels = two_blocks(0.0, 1.0)
    assert worst_seam(suv, labels, (District.TRUNK, District.LEGS)) is None


def test_a_step_that_nobody_would_see_is_no_seam() -> None:
    suv, labels = two_blocks(0.2, 0.0)
    assert worst_seam(suv, labels, (District.TRUNK, District.LEGS)) is None


def test_a_border_with_a_district_that_was_not_evaluated_is_no_seam() -> None:
    suv, labels = two_blocks(1.0, 0.0)
    assert worst_seam(suv, labels, (District.TRUNK,)) is None


@pytest.mark.parametrize("shape", [(1, 5, 5), (3, 3, 3), (20, 20, 20)])
def test_one_district_alone_has_no_seam(shape: tuple[int, int, int]) -> None:
    labels = np.full(shape, District.TRUNK, np.uint8)
    assert worst_seam(np.ones(shape, np.float32), labels, tuple(District)) is None
