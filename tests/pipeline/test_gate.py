"""The gates before and after the networks."""

from __future__ import annotations

import numpy as np
import pytest
from pydicom import Dataset

from pipeline.errors import GateRefusal
from pipeline.gate import check_input, check_output
from pipeline.types import CtVolume, District, DistrictMap, GeometryError, Grid, SourceSeries, SuvVolume

SPACING = (5.0, 4.0, 4.0)
SHAPE = (40, 120, 120)


def a_grid(spacing=SPACING):
    return Grid(shape=SHAPE, spacing_mm=spacing, origin_mm=(0.0, 0.0, 0.0), frame_of_reference_uid="1.2.3")


def ellipse(half_y, half_x, center=(0, 0)):
    """Mask over the field of view, sizes in mm from its middle."""
    y, x = np.meshgrid((np.arange(120) - 59.5) * 4, (np.arange(120) - 59.5) * 4, indexing="ij")
    plane = ((y - center[0]) / half_y) ** 2 + ((x - center[1]) / half_x) ** 2 <= 1
    return np.broadcast_to(plane, SHAPE)


def a_body(body=None):
    """Noisy HU: air, a trunk with lungs and a spine, on a thin bed."""
    hu = np.full(SHAPE, -1000.0, np.float32)
    hu[:, 100:102, 20:100] = -100  # the bed's shell
    hu[ellipse(100, 160) if body is None else body] = 40
    if body is None:
        hu[ellipse(60, 50, (-10, -80)) | ellipse(60, 50, (-10, 80))] = -850
        hu[ellipse(15, 15, (70, 0))] = 800
    hu += np.random.default_rng(0).normal(0, 30, SHAPE).astype(np.float32)
    return np.maximum(hu, -1024)


def a_ct(hu, spacing=SPACING):
    source = SourceSeries(
        study_uid="1.2", series_uid="1.2.3.4", header=Dataset(), instances=(), earliest_acquisition=("", "")
    )
    return CtVolume(hu=hu.astype(np.float32), grid=a_grid(spacing), source=source)


def test_a_body_on_a_bed_passes():
    check_input(a_ct(a_body()), min_coverage_mm=200)


@pytest.mark.parametrize("radius_mm", [30, 100, 220], ids=["child's calves", "head", "obese"])
def test_bodies_of_every_size_pass(radius_mm):
    body = ellipse(radius_mm, radius_mm, (0, -60 if radius_mm < 50 else 0))
    if radius_mm < 50:
        body = body | ellipse(radius_mm, radius_mm, (0, 60))
    check_input(a_ct(a_body(body)), min_coverage_mm=0)


def test_a_field_of_view_that_is_nearly_all_body_passes():
    check_input(a_ct(a_body(ellipse(235, 300))), min_coverage_mm=0)


def test_a_body_with_metal_passes():
    hu = a_body()
    hu[10:20, 55:62, 55:62] = 30000
    check_input(a_ct(hu), min_coverage_mm=0)


def test_the_slice_spacing_counts_towards_coverage():
    check_input(a_ct(a_body()), min_coverage_mm=200)
    with pytest.raises(GateRefusal) as refused:
        check_input(a_ct(a_body()), min_coverage_mm=201)
    assert str(refused.value) == "low_coverage: series 1.2.3.4 covers 200 mm, at least 201 mm are needed"


INPUTS = {
    "intercept missing": (lambda hu: hu + 1024, "implausible_hu"),
    "intercept missing, padding as air": (lambda hu: np.where(hu < -1015, -1024, hu + 1024), "implausible_hu"),
    "intercept applied twice": (lambda hu: np.maximum(hu - 1024, -1024), "no_body"),
    "8 bits, no rescale": (lambda hu: np.clip((hu + 1024) / 8, 0, 255), "implausible_hu"),
    "8 bits with the usual intercept": (lambda hu: np.clip((hu + 1024) / 8, 0, 255) - 1024, "no_body"),
    "slope of ten": (lambda hu: np.maximum(hu * 10 + 1000, -1024), "implausible_hu"),
    "not finite": (lambda hu: np.where(hu > 100, np.nan, hu), "implausible_hu"),
    "beyond 16 bits": (lambda hu: np.where(hu > 100, 1e6, hu), "implausible_hu"),
    "constant": (lambda hu: np.zeros(SHAPE), "implausible_hu"),
    "all padding": (lambda hu: np.full(SHAPE, -1024), "no_body"),
    "all tissue moved to 500": (lambda hu: np.where(hu > -100, hu + 500, hu), "no_body"),
    "empty bed": (lambda hu: a_body(np.zeros(SHAPE, bool)), "no_body"),
}


@pytest.mark.parametrize("case", INPUTS)
def test_what_is_no_body_in_hounsfield_units_is_refused(case):
    change, code = INPUTS[case]
    with pytest.raises(GateRefusal) as refused:
        check_input(a_ct(change(a_body())), min_coverage_mm=0)
    assert refused.value.code == code
    assert "1.2.3.4" in refused.value.text


# --- output ----------------------------------------------------------------------------------------------------------


def districts():
    labels = np.where(ellipse(100, 160), District.TRUNK, 0).astype(np.uint8)
    labels[30:] = np.where(labels[30:] > 0, District.HEAD, 0)
    return DistrictMap(
        labels=labels,
        grid=a_grid(),
        segmenter="test",
        version="1",
        confidence={District.TRUNK: 1.0, District.HEAD: 1.0},
    )


def finding(change=lambda suv: suv, not_evaluated=()):
    suv = np.where(districts().labels > 0, 1.0, 0.0).astype(np.float32)
    suv = np.asarray(change(suv), np.float32)
    return check_output(SuvVolume(suv=suv, grid=a_grid(), not_evaluated=not_evaluated), districts())


def put(index, value):
    def change(suv):
        suv[index] = value
        return suv

    return change


def test_uptake_in_the_body_and_none_outside_passes():
    assert finding() is None
    assert finding(put((20, 60, 60), 20.0)) is None


def test_uptake_within_the_feathered_edge_passes():
    assert finding(put((20, 60, 60 + 41), 0.5)) is None  # the body ends 160 mm (40 voxels) from the middle


def test_a_district_that_was_not_evaluated_may_hold_zero():
    assert finding(put(slice(30, None), 0.0), (District.HEAD,)) is None


OUTPUTS = {
    "one NaN": (put((0, 0, 0), np.nan), "non_finite"),
    "one infinite": (put((5, 60, 60), np.inf), "non_finite"),
    "below zero": (put((5, 60, 60), -0.01), "negative"),
    "above the networks' range": (put((5, 60, 60), 20.5), "out_of_range"),
    "all zero": (lambda suv: suv * 0, "nothing_synthesized"),
    "hardly anything": (lambda suv: suv * 0.01, "nothing_synthesized"),
    "a hot spot in the air": (put((20, 5, 5), 2.0), "uptake_outside_body"),
    "constant everywhere": (lambda suv: suv * 0 + 1, "uptake_outside_body"),
}


@pytest.mark.parametrize("case", OUTPUTS)
def test_an_implausible_result_is_found_by_name(case):
    change, code = OUTPUTS[case]
    found = finding(change)
    assert found is not None
    assert found.code == code


def test_a_result_of_which_nothing_was_evaluated_is_found():
    found = finding(lambda suv: suv * 0, (District.HEAD, District.TRUNK))
    assert found is not None
    assert found.code == "nothing_evaluated"


def test_a_volume_on_another_grid_is_an_error():
    suv = SuvVolume(suv=np.zeros(SHAPE, np.float32), grid=a_grid((4.0, 4.0, 4.0)))
    with pytest.raises(GeometryError):
        check_output(suv, districts())
