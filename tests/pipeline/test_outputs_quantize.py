"""SUV to codes and back, and the slope that no viewer may stumble over."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import OutputError
from pipeline.outputs.quantize import (
    DEFAULT_SLOPE,
    FULL_SCALE_SUV,
    MAX_CODE,
    dequantize,
    maps_a_code_to_an_integer,
    quantize,
    slope_for,
)


def test_no_code_maps_to_an_integer_with_the_default_slope():
    assert not any(float(code * float(DEFAULT_SLOPE)).is_integer() for code in range(1, 65536))


def test_a_round_slope_is_recognized_as_a_trap():
    assert maps_a_code_to_an_integer("0.001")


@given(st.floats(min_value=0, max_value=1e5))
def test_every_slope_fits_a_decimal_string_reaches_the_maximum_and_keeps_the_rule(max_suv: float):
    slope = slope_for(max_suv)
    assert len(slope) <= 16
    assert not maps_a_code_to_an_integer(slope)
    assert slope == DEFAULT_SLOPE if max_suv <= FULL_SCALE_SUV else float(slope) * MAX_CODE >= max_suv * (1 - 1e-12)


def test_the_slope_above_full_scale_is_the_next_nine_decimals_that_end_in_1_3_7_or_9():
    assert slope_for(50.0) == "0.001525927"  # 50 / 32767 = 0.00152592547...; ...926 ends in 6
    assert slope_for(FULL_SCALE_SUV) == DEFAULT_SLOPE


def test_an_absurd_maximum_saturates_and_is_logged(caplog: pytest.LogCaptureFixture):
    codes, slope = quantize(np.array([1e30, 1.0], dtype=np.float32))
    assert slope == DEFAULT_SLOPE
    assert codes.tolist() == [MAX_CODE, 1000]
    assert "outputs.saturated" in caplog.text


@given(st.lists(st.floats(min_value=0, max_value=32.75, width=32), min_size=1, max_size=50))
def test_a_value_comes_back_within_half_a_step(values: list[float]):
    suv = np.array(values, dtype=np.float32)
    codes, slope = quantize(suv)
    assert np.abs(codes * float(slope) - suv.astype(np.float64)).max() <= 0.0005
    assert dequantize(codes, slope).dtype == np.float32


def test_a_value_between_two_codes_is_rounded_in_double():
    codes, slope = quantize(np.array([15.0], dtype=np.float32))  # 15001.50015 codes, in float32 15001.5
    assert abs(int(codes[0]) * float(slope) - 15.0) < 0.0005


def test_every_code_is_its_own_value_again():
    all_codes = np.arange(MAX_CODE + 1, dtype=np.uint16)
    codes, slope = quantize(dequantize(all_codes, DEFAULT_SLOPE))
    assert slope == DEFAULT_SLOPE
    assert np.array_equal(codes, all_codes)


def test_nothing_but_numbers_of_uptake_becomes_uptake():
    suv = np.array([np.nan, -1.0, -np.inf, 0.0, 2.0, np.inf], dtype=np.float32)
    codes, slope = quantize(suv)
    assert slope == DEFAULT_SLOPE
    assert codes.tolist() == [0, 0, 0, 0, 2000, MAX_CODE]


def test_the_shape_is_kept_and_a_strided_volume_is_read_right():
    suv = np.random.default_rng(1).uniform(0, 20, (4, 600, 600)).astype(np.float32)
    codes, _ = quantize(suv[:, ::2, ::-1])
    whole, _ = quantize(suv)
    assert np.array_equal(codes, whole[:, ::2, ::-1])
    assert codes.dtype == np.uint16
    assert quantize(np.zeros((0, 3), np.float32))[0].shape == (0, 3)


def test_integers_are_refused():
    with pytest.raises(OutputError, match="not_suv"):
        quantize(np.array([1, 2]))
