"""SUV to 15-bit codes with one decimal slope for the whole series.

A viewer that is in wide use puts a slice into 8 bits before scaling when slope * max of that slice is an exact
integer, and the slice then vanishes. So no code may map to an integer: the slope is a decimal whose reduced
denominator exceeds every code. 0.0009999 = 9999/10^7 is one; 0.001 is not (code 18000 is 18).
"""

from __future__ import annotations

import logging
import math
from decimal import ROUND_CEILING, Decimal

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import OutputError
from pipeline.types import FloatVolume

CodeVolume = NDArray[np.uint16]

DEFAULT_SLOPE = "0.0009999"
MAX_CODE = 32767  # 15 bits: the same number whether a reader takes the pixels as signed or unsigned
FULL_SCALE_SUV = float(MAX_CODE * Decimal(DEFAULT_SLOPE))  # 32.76
ALL_CODES = np.arange(1, 65536, dtype=np.float64)
DS_MAX_LENGTH = 16  # PS3.5 table 6.2-1, VR DS
BLOCK = 1 << 17  # voxels at a time: the scratch buffer stays in the processor's cache

log = logging.getLogger(__name__)


def maps_a_code_to_an_integer(slope: str) -> bool:
    """Whether slope * code is an exact integer, as a double, for any 16-bit code above 0."""
    scaled = ALL_CODES * float(slope)
    return bool(np.any(scaled == np.floor(scaled)))


def slope_for(max_suv: float) -> str:
    """The rescale slope, as DS text, for a series whose largest SUV (g/ml) is `max_suv`.

    0.0009999 up to full scale; above it the smallest 9-decimal number >= max/32767 that ends in 1, 3, 7 or 9 (prime
    to 10, so its denominator stays 10^9). Where no slope keeps the rule, 0.0009999 again: the values saturate.
    """
    if not max_suv > FULL_SCALE_SUV:
        return DEFAULT_SLOPE
    billionths = int((Decimal(max_suv) / MAX_CODE * 10**9).to_integral_value(rounding=ROUND_CEILING))
    while billionths % 10 not in (1, 3, 7, 9):
        billionths += 1
    slope = f"{Decimal(billionths).scaleb(-9):f}"
    if len(slope) > DS_MAX_LENGTH or maps_a_code_to_an_integer(slope):
        log.warning("outputs.saturated max_suv=%g full_scale=%g", max_suv, FULL_SCALE_SUV)
        return DEFAULT_SLOPE
    return slope


def slope_of(suv: FloatVolume) -> str:
    """The slope that `quantize` gives `suv`, without the codes."""
    return slope_for(_finite_max(np.ascontiguousarray(suv).reshape(-1)))


def quantize(suv: FloatVolume) -> tuple[CodeVolume, str]:
    """Codes 0..32767 in the shape of `suv` (g/ml), and the slope as DS text; the intercept is 0.

    NaN and negative values become 0. The error is at most half a slope: 0.0005 g/ml up to SUV 32.76.
    """
    flat = np.ascontiguousarray(suv).reshape(-1)
    if flat.dtype.kind != "f":
        raise OutputError("not_suv", f"quantizing SUV: array is {flat.dtype}, a floating point type is expected")
    slope = slope_for(_finite_max(flat))
    per_code = float(slope)
    codes = np.empty(flat.shape, dtype=np.uint16)
    scratch = np.empty(min(BLOCK, flat.size), dtype=np.float64)
    for start in range(0, flat.size, BLOCK):
        block = flat[start : start + BLOCK]
        work = scratch[: block.size]
        # in double, which `out` alone does not ask for: float32 would round some codes past half a step
        np.divide(block, per_code, out=work, dtype=np.float64)
        np.fmax(work, 0.0, out=work)  # fmax also turns NaN into 0
        np.fmin(work, MAX_CODE, out=work)
        np.rint(work, out=work)
        np.copyto(codes[start : start + BLOCK], work, casting="unsafe")
    return codes.reshape(suv.shape), slope


def dequantize(codes: CodeVolume, slope: str) -> FloatVolume:
    """The SUV (g/ml, float32) that a reader of the file gets, in the shape of `codes`."""
    values: FloatVolume = (codes * np.float64(slope)).astype(np.float32)
    return values


def _finite_max(flat: NDArray[np.floating]) -> float:
    if flat.size == 0:
        return 0.0
    top = float(flat.max())
    if math.isfinite(top):
        return top
    finite = flat[np.isfinite(flat)]
    return float(finite.max()) if finite.size else 0.0
