"""The gates: is this CT one that a network may see, and is this SUV volume one that a reader may see?

`check_input` raises (the job becomes REJECTED), `check_output` returns a finding (the job becomes HELD for a person).
Both look for gross failures only: a wrong rescale, an empty scanner, a network that gave nothing or left its range.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from pipeline.errors import GateRefusal
from pipeline.types import CtVolume, DistrictMap, FloatVolume, GateFinding, GeometryError, SuvVolume

# --- input -----------------------------------------------------------------------------------------------------------
BLOCK_MM = 5.0  # the HU checks look at means over blocks of this edge in the plane: free of noise, thin beds vanish
SLICE_STEP_MM = 5.0  # and at one slice in this many mm
AIR_HU = -900.0  # air is -1000, its noisy block means stay below this; lung parenchyma does not
SOFT_TISSUE_HU = (-200.0, 200.0)  # fat to contrast-filled organs
TISSUE_HU = -500.0  # above: not air, and hardly lung
DENSE_HU = 700.0  # above: cortical bone, metal
MIN_AIR_SHARE = 0.001  # a field of view without any air around or within the body is no torso or whole-body CT
MIN_BODY_SHARE = 0.01  # of the field of view: two child's calves of 6 cm in a field of 50 cm are 2 %, a bed is 0 %
MAX_DENSE_SHARE = 0.05  # of the field of view: bones are 1 %; without the intercept all tissue is dense
MODE_BIN_HU = 25.0
MAX_HU = 70_000.0  # beyond what 16 bits at slope 1 hold, extended metal scales included

# --- output ----------------------------------------------------------------------------------------------------------
SUV_LIMIT = 20.0  # the networks' range ends here (the paper clips its PET at SUV 20)
SUV_TOLERANCE = 0.01  # of rounding and interpolation
MIN_MEAN_SUV = 0.05  # over the evaluated body; by definition of SUV the mean over a body is about 1
OUTSIDE_SUV = 0.1  # air holds less than this in any PET that is worth its name
FEATHER_MM = 10.0  # uptake this near to the body is the stitching's soft edge


def check_input(ct: CtVolume, *, min_coverage_mm: float) -> None:
    """Raises GateRefusal with code low_coverage, implausible_hu or no_body unless `ct` looks like a body.

    The HU checks are free of scale: they ask for shares of the field of view, not for volumes.
    """
    _check_coverage(ct, min_coverage_mm)
    series = ct.source.series_uid
    low, high = float(ct.hu.min()), float(ct.hu.max())  # NaN wins both
    if not (math.isfinite(low) and high <= MAX_HU):
        raise GateRefusal("implausible_hu", f"series {series}: Hounsfield units from {low:.4g} to {high:.4g}")
    blocks = block_means(ct.hu, ct.grid.spacing_mm)
    air = float((blocks < AIR_HU).mean())
    if air < MIN_AIR_SHARE:
        text = (
            f"series {series}: {air:.2%} of the field of view is air (below {AIR_HU:.0f} HU), the lowest value is "
            f"{low:.0f} HU: is the rescale intercept missing?"
        )
        raise GateRefusal("implausible_hu", text)
    dense = float((blocks > DENSE_HU).mean())
    if dense > MAX_DENSE_SHARE:
        text = (
            f"series {series}: {dense:.1%} of the field of view is denser than {DENSE_HU:.0f} HU, at most "
            f"{MAX_DENSE_SHARE:.0%} is expected: is the rescale wrong?"
        )
        raise GateRefusal("implausible_hu", text)
    body = _soft_tissue_share(blocks)
    if body < MIN_BODY_SHARE:
        text = f"series {series}: {body:.2%} of the field of view is soft tissue, {MIN_BODY_SHARE:.0%} is expected"
        raise GateRefusal("no_body", text)
    mode = _tissue_mode(blocks)
    if not SOFT_TISSUE_HU[0] <= mode <= SOFT_TISSUE_HU[1]:
        low, high = SOFT_TISSUE_HU
        text = f"series {series}: most tissue is at {mode:.0f} HU, {low:.0f} to {high:.0f} HU is expected"
        raise GateRefusal("implausible_hu", text)


def check_output(suv: SuvVolume, districts: DistrictMap) -> GateFinding | None:
    """The first thing that is wrong with `suv`, or None.

    Codes: non_finite, negative, out_of_range, nothing_evaluated, nothing_synthesized, uptake_outside_body.
    Raises GeometryError if `suv` and `districts` do not lie on one grid.
    """
    if suv.suv.shape != districts.labels.shape or suv.grid != districts.grid:
        raise GeometryError("SUV and districts lie on different grids")
    return _check_range(suv.suv) or _check_evaluated(suv, districts) or _check_outside(suv, districts)


def _check_coverage(ct: CtVolume, min_coverage_mm: float) -> None:
    coverage = ct.grid.extent_mm[0]
    if coverage < min_coverage_mm - 1e-6:
        text = f"series {ct.source.series_uid} covers {coverage:.0f} mm, at least {min_coverage_mm:.0f} mm are needed"
        raise GateRefusal("low_coverage", text)


def block_means(hu: FloatVolume, spacing_mm: tuple[float, float, float]) -> FloatVolume:
    """Means of `hu` [z, y, x] over in-plane blocks of about 5 mm, in one slice of every 5 mm."""
    step = max(1, round(SLICE_STEP_MM / spacing_mm[0]))
    by, bx = (max(1, round(BLOCK_MM / s)) for s in spacing_mm[1:])
    _, rows, columns = hu.shape
    by, bx = min(by, rows), min(bx, columns)
    some = hu[::step, : rows // by * by, : columns // bx * bx]
    return some.reshape(len(some), rows // by, by, columns // bx, bx).mean(axis=(2, 4), dtype=np.float32)


def _soft_tissue_share(blocks: FloatVolume) -> float:
    """Share of the blocks that are soft tissue in patches of at least 3x3: the shell of an empty bed is thinner."""
    low, high = SOFT_TISSUE_HU
    soft = (blocks >= low) & (blocks <= high)
    return float(ndimage.binary_opening(soft, np.ones((1, 3, 3), bool)).mean())


def _tissue_mode(blocks: FloatVolume) -> float:
    """The most frequent HU among blocks that are not air."""
    tissue = blocks[blocks > TISSUE_HU]
    bins = np.arange(TISSUE_HU, 3000.0, MODE_BIN_HU)
    counts, edges = np.histogram(np.minimum(tissue, bins[-1] - 1), bins)
    return float(edges[np.argmax(counts)]) + MODE_BIN_HU / 2


def _check_range(suv: FloatVolume) -> GateFinding | None:
    low, high = float(suv.min()), float(suv.max())  # NaN wins both
    if not (math.isfinite(low) and math.isfinite(high)):
        count = int(suv.size - np.isfinite(suv).sum())
        return GateFinding(code="non_finite", text=f"{count} voxels of the SUV volume are not finite")
    if low < 0:
        return GateFinding(code="negative", text=f"the lowest SUV is {low:.4g}, none below 0 is expected")
    if high > SUV_LIMIT + SUV_TOLERANCE:
        return GateFinding(
            code="out_of_range", text=f"the highest SUV is {high:.4g}, at most {SUV_LIMIT:g} is expected"
        )
    return None


def _check_evaluated(suv: SuvVolume, districts: DistrictMap) -> GateFinding | None:
    evaluated = districts.labels > 0
    for district in suv.not_evaluated:
        evaluated &= districts.labels != district
    if not evaluated.any():
        return GateFinding(code="nothing_evaluated", text="no district was evaluated: the series would be empty")
    mean = float(suv.suv[evaluated].mean(dtype=np.float64))
    if mean < MIN_MEAN_SUV:
        text = f"the mean SUV of the evaluated body is {mean:.4f}, about 1 is expected"
        return GateFinding(code="nothing_synthesized", text=text)
    return None


def _check_outside(suv: SuvVolume, districts: DistrictMap) -> GateFinding | None:
    stray = (districts.labels == 0) & (suv.suv > OUTSIDE_SUV)
    if not stray.any():
        return None
    stray &= ~_grown(districts.labels > 0, suv.grid.spacing_mm, FEATHER_MM)
    count = int(stray.sum())
    if not count:
        return None
    highest = float(suv.suv[stray].max())
    text = f"{count} voxels more than {FEATHER_MM:.0f} mm outside the body hold SUV up to {highest:.2f}"
    return GateFinding(code="uptake_outside_body", text=text)


def _grown(mask: NDArray[np.bool_], spacing_mm: tuple[float, float, float], by_mm: float) -> NDArray[np.bool_]:
    """`mask` and the box of `by_mm` around each of its voxels."""
    grown = mask
    for axis, spacing in enumerate(spacing_mm):
        width = 2 * math.ceil(by_mm / spacing - 1e-6) + 1
        grown = ndimage.maximum_filter1d(grown.view(np.uint8), width, axis=axis, mode="constant").view(np.bool_)
    return grown
