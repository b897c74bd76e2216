"""The output gate: is this SUV volume one that a reader may see? (Codes: `pipeline.gate.CHECKS`, docs/gates.md.)

First what is wrong with any volume (not finite, out of range, empty); then whether it looks like an FDG-PET: lungs and
dense bone take up little, tissues and districts as much as in the training studies, borders between districts do not
show, left and right are alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from pipeline.gate import sifted
from pipeline.gate.seams import worst_seam
from pipeline.gate.tissues import tissue_means
from pipeline.types import (
    District,
    DistrictMap,
    FloatVolume,
    GateFinding,
    GateOptions,
    GeometryError,
    LabelVolume,
    SuvVolume,
)

Mask = NDArray[np.bool_]

SUV_LIMIT = 20.0  # the networks' range ends here (the paper clips its PET at SUV 20)
SUV_TOLERANCE = 0.01  # of rounding and interpolation
MIN_MEAN_SUV = 0.05  # over the evaluated body; by definition of SUV the mean over a body is about 1
OUTSIDE_SUV = 0.1  # air holds less than this in any PET that is worth its name
FEATHER_MM = 10.0  # uptake this near to the body is the stitching's soft edge
MIN_REGION_ML = 50.0  # of a district or one side of it: in less, a neighbor's blur decides the mean
PEAK_PERCENT = 99.9  # the bundle's statistics have it under `suv_p99_9`
MIN_BALANCE = 0.5  # the smaller side's volume over the larger's: below, one side is hardly in the field


def check_output(
    suv: SuvVolume, districts: DistrictMap, hu: FloatVolume, statistics: Mapping[str, Any], options: GateOptions
) -> tuple[GateFinding, ...]:
    """What is wrong with `suv`; where one of the gross checks finds something, that alone.

    Args:
        suv: what would be encoded.
        hu: the CT in HU [z, y, x] on the same grid.
        statistics: the manifest's, of the training studies; may be empty.

    Raises GeometryError if the volumes do not lie on one grid.
    """
    if suv.suv.shape != districts.labels.shape or suv.grid != districts.grid or hu.shape != suv.suv.shape:
        raise GeometryError("SUV, districts and CT lie on different grids")
    gross = _check_range(suv.suv) or _check_evaluated(suv, districts)
    if gross:
        return (gross,)
    return sifted(_plausibility_findings(suv, districts, hu, statistics, options), options)


def _plausibility_findings(
    suv: SuvVolume, districts: DistrictMap, hu: FloatVolume, statistics: Mapping[str, Any], options: GateOptions
) -> Iterator[GateFinding]:
    evaluated = tuple(d for d in districts.present if d not in suv.not_evaluated)
    if (outside := _check_outside(suv, districts)) is not None:
        yield outside
    yield from _tissue_findings(suv, districts, hu, statistics, options)
    for district in evaluated:
        yield from _district_findings(suv, districts, district, statistics.get(district.key, {}), options.suv_factor)
    yield from _seam_findings(suv, districts, evaluated, options.max_seam)
    yield from _asymmetry_findings(suv, districts, evaluated, options.max_asymmetry)
    left_out = float(np.isin(districts.labels, suv.not_evaluated).sum() / np.count_nonzero(districts.labels))
    if left_out > options.max_not_evaluated:
        names = ", ".join(d.key for d in suv.not_evaluated)
        text = f"{left_out:.0%} of the body was not evaluated ({names}), at most {options.max_not_evaluated:.0%}"
        yield GateFinding(code="not_evaluated", text=f"{text} is accepted")


def _check_range(suv: FloatVolume) -> GateFinding | None:
    low, high = float(suv.min()), float(suv.max())  # NaN wins both
    if not (math.isfinite(low) and math.isfinite(high)):
        count = int(suv.size - np.isfinite(suv).sum())
        return GateFinding(code="non_finite", text=f"{count} voxels of the SUV volume are not finite")
    if low < 0:
        return GateFinding(code="negative", text=f"the lowest SUV is {low:.4g}, none below 0 is expected")
    if high > SUV_LIMIT + SUV_TOLERANCE:
        text = f"the highest SUV is {high:.4g}, at most {SUV_LIMIT:g} is expected"
        return GateFinding(code="out_of_range", text=text)
    return None


def _check_evaluated(suv: SuvVolume, districts: DistrictMap) -> GateFinding | None:
    evaluated = _evaluated(suv, districts) > 0
    if not evaluated.any():
        return GateFinding(code="nothing_evaluated", text="no district was evaluated: the series would be empty")
    mean = float(suv.suv[evaluated].mean(dtype=np.float64))
    if mean < MIN_MEAN_SUV:
        text = f"the mean SUV of the evaluated body is {mean:.4f}, about 1 is expected"
        return GateFinding(code="nothing_synthesized", text=text)
    return None


def _evaluated(suv: SuvVolume, districts: DistrictMap) -> LabelVolume:
    """The labels [z, y, x] of the districts that were evaluated; the others count as outside of the body."""
    if not suv.not_evaluated:
        return districts.labels
    return np.where(np.isin(districts.labels, suv.not_evaluated), 0, districts.labels).astype(np.uint8)


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


def _grown(mask: Mask, spacing_mm: tuple[float, float, float], by_mm: float) -> Mask:
    """`mask` and the box of `by_mm` around each of its voxels."""
    grown = mask
    for axis, spacing in enumerate(spacing_mm):
        width = 2 * math.ceil(by_mm / spacing - 1e-6) + 1
        grown = ndimage.maximum_filter1d(grown.view(np.uint8), width, axis=axis, mode="constant").view(np.bool_)
    return grown


def _tissue_findings(
    suv: SuvVolume,
    districts: DistrictMap,
    hu: FloatVolume,
    statistics: Mapping[str, Any],
    options: GateOptions,
) -> Iterator[GateFinding]:
    """Lung and dense bone take up little in anybody; every tissue about what it did in the training studies."""
    labels = _evaluated(suv, districts)
    limits = {"lung": ("lung_uptake", options.max_lung_suv), "dense_bone": ("bone_uptake", options.max_bone_suv)}
    for tissue, mean in tissue_means(hu, suv.suv, labels, suv.grid.voxel_ml).items():
        code, limit = limits.get(tissue.name, ("", math.inf))
        told = statistics.get("tissues", {}).get(tissue.name, {})
        if mean > limit:
            text = f"the mean SUV of {tissue.text} is {mean:.2f}, at most {limit:g} is expected"
            yield GateFinding(code=code, text=text)
        elif (bounds := _widened(told, options.suv_factor)) and not bounds[0] <= mean <= bounds[1]:
            text = f"the mean SUV of {tissue.text} is {mean:.2f}, {bounds[0]:.2f} to {bounds[1]:.2f} is expected"
            yield GateFinding(code="tissue_uptake", text=f"{text} from the training studies")


def _widened(told: Mapping[str, Any], factor: float) -> tuple[float, float] | None:
    """The range of the training studies' mean SUV, widened by `factor`; None where the bundle does not tell."""
    if "suv_mean_range" not in told:
        return None
    lowest, highest = told["suv_mean_range"]
    return lowest / factor, highest * factor


def _district_findings(
    suv: SuvVolume, districts: DistrictMap, district: District, told: Mapping[str, Any], factor: float
) -> Iterator[GateFinding]:
    """A district's mean and 99.9 percentile against those of the training studies, widened by `factor`.

    The percentile may also reach the hottest voxel of the training studies: a lesion of one is a patient of another.
    """
    inside = suv.suv[districts.mask(district)]
    if inside.size * suv.grid.voxel_ml < MIN_REGION_ML:
        return
    code = "district_uptake"
    mean = float(inside.mean(dtype=np.float64))
    if (bounds := _widened(told, factor)) and not bounds[0] <= mean <= bounds[1]:
        text = f"the mean SUV of {district.key} is {mean:.2f}, {bounds[0]:.2f} to {bounds[1]:.2f} is expected"
        yield GateFinding(code=code, text=f"{text} from the training studies")
    if {"suv_p99_9", "suv_max"} <= told.keys():
        most, peak = max(told["suv_p99_9"] * factor, told["suv_max"]), float(np.percentile(inside, PEAK_PERCENT))
        if peak > most:
            text = f"the {PEAK_PERCENT:g} percentile of the SUV in {district.key} is {peak:.2f}, at most {most:.2f}"
            yield GateFinding(code=code, text=f"{text} is expected from the training studies")


def _seam_findings(
    suv: SuvVolume, districts: DistrictMap, evaluated: tuple[District, ...], limit: float
) -> Iterator[GateFinding]:
    seam = worst_seam(suv.suv, districts.labels, evaluated)
    if seam is not None and seam.index > limit:
        text = (
            f"where {seam.first.key} and {seam.second.key} meet, SUV jumps by {seam.across:.2f}, "
            f"{seam.index:.1f} times as much as beside it; at most {limit:g} times is expected"
        )
        yield GateFinding(code="seam", text=text)


def _asymmetry_findings(
    suv: SuvVolume, districts: DistrictMap, evaluated: tuple[District, ...], limit: float
) -> Iterator[GateFinding]:
    """The mean SUV left and right of the body's middle plane, for districts of which both sides are in the field."""
    columns = np.count_nonzero(districts.labels, axis=(0, 1))
    middle = round(float((columns * np.arange(len(columns))).sum() / columns.sum()))
    for district in evaluated:
        mask = districts.mask(district)
        halves = [(half, suv.suv[..., half][mask[..., half]]) for half in (slice(None, middle), slice(middle, None))]
        sizes = [values.size for _, values in halves]
        if min(sizes) * suv.grid.voxel_ml < MIN_REGION_ML or min(sizes) < MIN_BALANCE * max(sizes):
            continue
        right, left = (float(values.mean(dtype=np.float64)) for _, values in halves)
        difference = abs(right - left) / max((right + left) / 2, 1e-6)
        if difference > limit:
            text = f"the mean SUV of {district.key} is {right:.2f} on the right and {left:.2f} on the left"
            yield GateFinding(code="asymmetry", text=f"{text}: a difference of at most {limit:.0%} is expected")
