"""The input gate: what is refused before a network runs, and what is only noted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from gate_samples import SHAPE, a_body, a_ct, a_grid, a_header, an_empty_bed, as_stored, ellipse

from pipeline.errors import GateRefusal
from pipeline.gate.age import age_years
from pipeline.gate.input import check_input, check_scan
from pipeline.types import CtVolume, District, DistrictMap, GateOptions

ANY = GateOptions(min_coverage_mm=0)


def refusal(ct: CtVolume, options: GateOptions = ANY) -> GateRefusal:
    with pytest.raises(GateRefusal) as refused:
        check_input(ct, options)
    return refused.value


def codes(ct: CtVolume, options: GateOptions = ANY) -> list[str]:
    return [one.code for one in check_input(ct, options)]


# --- bodies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("half_y", "half_x", "lungs"),
    [(75, 100, True), (100, 160, True), (100, 160, False), (160, 220, True), (210, 220, False)],
    ids=["slim", "chest", "abdomen", "obese", "as wide as the field"],
)
def test_bodies_of_every_size_pass_without_a_word(half_y: float, half_x: float, lungs: bool) -> None:
    assert codes(a_ct(a_body(half_y, half_x, lungs=lungs)), GateOptions()) == []


def test_two_thousand_thin_slices_pass() -> None:
    few = a_body()[:4, ::2, ::2]
    assert codes(a_ct(np.tile(few, (500, 1, 1)), (1.0, 8.0, 8.0)), GateOptions()) == []


def test_the_slice_spacing_counts_towards_coverage() -> None:
    assert codes(a_ct(a_body()), GateOptions(min_coverage_mm=200)) == []
    refused = refusal(a_ct(a_body()), GateOptions(min_coverage_mm=201))
    assert str(refused) == "low_coverage: series 1.2.3.4 covers 200 mm, at least 201 mm are needed"


def test_air_above_the_head_does_not_count_towards_coverage() -> None:
    hu = a_body()
    hu[22:] = as_stored(an_empty_bed())[22:]
    assert codes(a_ct(hu), GateOptions(min_coverage_mm=110)) == []
    assert refusal(a_ct(hu), GateOptions(min_coverage_mm=120)).code == "low_coverage"


def test_slices_that_lie_far_apart_are_refused() -> None:
    assert codes(a_ct(a_body(), (10.0, 4.0, 4.0))) == []
    assert refusal(a_ct(a_body(), (12.5, 4.0, 4.0))).code == "coarse_slices"


# --- no bodies -------------------------------------------------------------------------------------------------------


def a_cylinder(inserts: bool) -> np.ndarray[Any, Any]:
    """Water, 20 cm wide; with `inserts` of bone, fat and air, each 2.5 cm, as a quality phantom has them."""
    hu = an_empty_bed()
    hu[ellipse(100, 100)] = 0
    if inserts:
        for value, center in ((900, (50, 50)), (-100, (-50, 50)), (-1000, (50, -50)), (120, (-50, -50))):
            hu[ellipse(12.5, 12.5, center)] = value
    return as_stored(hu)


def in_eight_bits(hu: np.ndarray[Any, Any], low: float, high: float) -> np.ndarray[Any, Any]:
    """Stored as 0..255 between `low` and `high`."""
    return np.rint(np.clip((hu - low) / (high - low), 0, 1) * 255)


Change = Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]
VALUES: dict[str, tuple[Change, str]] = {
    "not finite": (lambda hu: np.where(hu > 100, np.nan, hu), "implausible_hu"),
    "infinite": (lambda hu: np.where(hu < -900, -np.inf, hu), "implausible_hu"),
    "beyond 16 bits": (lambda hu: np.where(hu > 100, 1e6, hu), "implausible_hu"),
    "intercept missing": (lambda hu: hu + 1024, "wrong_rescale"),
    "intercept missing, padding as air": (lambda hu: np.where(hu < -1015, -1024, hu + 1024), "wrong_rescale"),
    "intercept applied twice": (lambda hu: np.maximum(hu - 1024, -1024), "no_body"),
    "slope of ten": (lambda hu: np.maximum(hu * 10 + 1000, -1024), "wrong_rescale"),
    "slope of a half": (lambda hu: (hu + 1024) / 2 - 1024, "wrong_rescale"),
    "slope of 0.9": (lambda hu: (hu + 1024) * 0.9 - 1024, "wrong_rescale"),
    "150 HU too much": (lambda hu: hu + 150, "wrong_rescale"),
    "slope of 1.2": (lambda hu: (hu + 1024) * 1.2 - 1024, "wrong_rescale"),
    "tissue moved to 500": (lambda hu: np.where(hu > -100, hu + 500, hu), "wrong_rescale"),
    "constant": (lambda hu: np.zeros(SHAPE), "wrong_rescale"),
    "8 bits, no rescale": (lambda hu: in_eight_bits(hu, -1024, 3071), "eight_bit"),
    "8 bits with the usual intercept": (lambda hu: in_eight_bits(hu, -1024, 1024) - 1024, "no_body"),
    "8 bits with a right rescale": (lambda hu: in_eight_bits(hu, -1024, 1016) * 8 - 1024, "eight_bit"),
    "a window of 8 bits": (lambda hu: in_eight_bits(hu, -160, 240), "eight_bit"),
    "all padding": (lambda hu: np.full(SHAPE, -1024), "no_body"),
    "all air": (lambda hu: as_stored(np.full(SHAPE, -1000.0)), "no_body"),
    "an empty bed": (lambda hu: as_stored(an_empty_bed()), "no_body"),
    "a water phantom": (lambda hu: a_cylinder(inserts=False), "water_phantom"),
    "a quality phantom": (lambda hu: a_cylinder(inserts=True), "water_phantom"),
    "a rabbit": (lambda hu: a_body(50, 50), "body_size"),
}


@pytest.mark.parametrize("case", VALUES)
def test_what_is_no_body_in_hounsfield_units_is_refused_by_name(case: str) -> None:
    change, code = VALUES[case]
    refused = refusal(a_ct(change(a_body())))
    assert refused.code == code
    assert "1.2.3.4" in refused.text


@pytest.mark.parametrize("factor", [0.4, 2.5])
def test_a_wrong_pixel_spacing_is_a_wrong_body_size(factor: float) -> None:
    assert refusal(a_ct(a_body(lungs=False), (5.0, 4.0 * factor, 4.0 * factor))).code == "body_size"


# --- notes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [-1000, -1024, -2048], ids=str)
def test_a_body_that_the_round_field_of_view_cuts_is_noted(padding: float) -> None:
    hu = a_body(150, 300)
    hu[~ellipse(238, 238)] = padding
    found = check_input(a_ct(hu), ANY)
    assert [one.code for one in found] == ["field_of_view_cut"]
    assert codes(a_ct(hu), GateOptions(min_coverage_mm=0, max_cut_share=0.6)) == []


def test_a_body_that_ends_at_the_edge_of_a_square_field_is_noted() -> None:
    assert codes(a_ct(a_body(150, 300))) == ["field_of_view_cut"]


def test_metal_is_noted_above_its_share() -> None:
    hu = a_body()
    hu[10:12, 55:58, 55:58] = 3071
    assert codes(a_ct(hu)) == []
    hu[10:30, 50:64, 50:64] = 3071
    assert codes(a_ct(hu)) == ["metal"]


# --- headers ---------------------------------------------------------------------------------------------------------


def test_a_series_of_projections_is_refused() -> None:
    ct = a_ct(a_body(), ImageType=["DERIVED", "SECONDARY", "MIP"])
    assert refusal(ct).code == "projection_image"
    assert codes(a_ct(a_body(), ImageType=["DERIVED", "SECONDARY", "AXIAL"])) == []


AGES: dict[str, tuple[dict[str, Any], float | None]] = {
    "years": ({"PatientAge": "045Y"}, 45),
    "months": ({"PatientAge": "018M"}, 1.5),
    "weeks": ({"PatientAge": "010W"}, 70 / 365.25),
    "days": ({"PatientAge": "002D"}, 2 / 365.25),
    "a birth date": ({"PatientAge": None, "PatientBirthDate": "20000601", "StudyDate": "20240601"}, 24),
    "the day before a birthday": ({"PatientAge": "", "PatientBirthDate": "20000601", "StudyDate": "20240531"}, 23),
    "a birth date and a series date": (
        {"PatientAge": None, "PatientBirthDate": "20000601", "StudyDate": "", "SeriesDate": "20240601"},
        24,
    ),
    "the age goes before a shifted birth date": ({"PatientBirthDate": "19000101", "StudyDate": "20240101"}, 60),
    "no age": ({"PatientAge": None}, None),
    "a birth date after the study": (
        {"PatientAge": None, "PatientBirthDate": "20250101", "StudyDate": "20240101"},
        None,
    ),
    "a date that is none": ({"PatientAge": None, "PatientBirthDate": "20240231", "StudyDate": "20240301"}, None),
    "no study date": ({"PatientAge": None, "PatientBirthDate": "20000101"}, None),
}


@pytest.mark.parametrize("case", AGES)
def test_the_age_is_read_from_the_age_or_the_dates(case: str) -> None:
    elements, expected = AGES[case]
    found = age_years(a_header(**elements))
    assert found == (None if expected is None else pytest.approx(expected))


def test_an_age_that_is_no_age_is_not_believed() -> None:
    header = a_header(PatientAge=None)
    header.add_new("PatientAge", "LO", "45 Y; drop")
    assert age_years(header) is None


@pytest.mark.parametrize(("age", "years", "found"), [("017Y", 18, True), ("018Y", 18, False), ("017Y", 16, False)])
def test_children_are_refused_below_the_configured_age(age: str, years: int, found: bool) -> None:
    ct, options = a_ct(a_body(), PatientAge=age), GateOptions(min_coverage_mm=0, min_age_years=years)
    if not found:
        assert codes(ct, options) == []
        return
    refused = refusal(ct, options)
    assert (refused.code, refused.text) == ("child", f"series 1.2.3.4: the patient is younger than {years} years")


def test_neither_age_nor_dates_are_told() -> None:
    ct = a_ct(a_body(), PatientAge=None, PatientBirthDate="20150307", StudyDate="20240604")
    assert not {"2015", "9 ", "009"} & set(refusal(ct).text.split())
    assert "2015" not in str(refusal(ct))


def test_a_missing_age_is_a_note_and_nothing_where_every_age_is_accepted() -> None:
    ct = a_ct(a_body(), PatientAge=None)
    assert codes(ct) == ["age_unknown"]
    assert codes(ct, GateOptions(min_coverage_mm=0, min_age_years=0)) == []


# --- districts and training statistics -------------------------------------------------------------------------------


def a_map(*present: District) -> DistrictMap:
    labels = np.zeros(SHAPE, np.uint8)
    for part, district in zip(np.array_split(np.arange(SHAPE[0]), max(1, len(present))), present, strict=False):
        labels[part] = np.where(ellipse(100, 160)[part], district, 0)
    return DistrictMap(labels=labels, grid=a_grid(), segmenter="t", version="1", confidence=dict.fromkeys(present, 1.0))


def statistics(shift: float = 0.0) -> dict[str, Any]:
    """As the training would store them of `a_body`, with every HU off by `shift`."""
    inside = a_body()[ellipse(100, 160)] + shift
    percents = (5, 25, 50, 75, 95)
    values = np.percentile(inside, percents)
    return {"trunk": {"hu_percentiles": {str(p): float(v) for p, v in zip(percents, values, strict=True)}}}


@pytest.mark.parametrize("present", [(District.HEAD,), (District.LEGS,), (District.ARMS, District.HEAD), ()])
def test_a_scan_without_a_trunk_is_refused(present: tuple[District, ...]) -> None:
    with pytest.raises(GateRefusal) as refused:
        check_scan(a_body(), a_map(*present), statistics(), GateOptions())
    assert refused.value.code == "missing_district"
    assert "trunk" in refused.value.text
    check_scan(a_body(), a_map(*present), statistics(), GateOptions(required_districts=()))


@pytest.mark.parametrize(
    ("shift", "expected"), [(0, []), (30, []), (-200, ["unlike_training"]), (200, ["unlike_training"])]
)
def test_a_district_unlike_the_training_data_is_noted(shift: float, expected: list[str]) -> None:
    found = check_scan(a_body(), a_map(District.TRUNK), statistics(shift), GateOptions())
    assert [one.code for one in found] == expected


def test_a_bundle_without_statistics_is_noted() -> None:
    assert [one.code for one in check_scan(a_body(), a_map(District.TRUNK), {}, GateOptions())] == ["no_statistics"]


def test_statistics_without_percentiles_or_of_other_districts_say_nothing() -> None:
    told: dict[str, Any] = {"trunk": {"suv_mean": 1.0}, "head": statistics()["trunk"]}
    assert check_scan(a_body(), a_map(District.TRUNK), told, GateOptions()) == ()
