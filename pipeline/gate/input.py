"""The input gate: is this CT one that a network may see? (Codes: `pipeline.gate.CHECKS`, docs/gates.md.)

What makes a series no volume at all is refused earlier, by the CT reader. The checks here ask for gross failures:
a wrong rescale, a phantom, an empty scanner, a child, an animal, a scan without a trunk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from pipeline.gate import sifted
from pipeline.gate.age import age_years
from pipeline.gate.view import TISSUE_HU, BlockView, in_patches, interior, smoothed
from pipeline.types import CtVolume, District, DistrictMap, FloatVolume, GateFinding, GateOptions

AIR_HU = -900.0  # air is -1000, its noisy block means stay below this; lung parenchyma does not
MIN_AIR_SHARE = 0.001  # a field of view without any air around or within the body is no torso or whole-body CT
MIN_BODY_SHARE = 0.01  # of the field of view: two thin calves in a field of 50 cm are 2 %, a bed is 0 %
DENSE_HU = 700.0  # above: cortical bone, metal
MAX_DENSE_SHARE = 0.05  # of the field of view: bones are 1 %; without the intercept all tissue is dense
MAX_HU = 70_000.0  # beyond what 16 bits at slope 1 hold, extended metal scales included
SOFT_TISSUE_HU = (-200.0, 200.0)  # fat to contrast-filled organs
FAT_PEAK_HU, SOFT_PEAK_HU = (-140.0, -40.0), (-30.0, 160.0)  # where the peaks of fat and of muscle or organs lie
MIN_PEAKS_SHARE = 0.65  # of the tissue that is not dense, at the HU of one of the two; real bodies have .9
MODE_BIN_HU = 20.0
UNIFORM_HU = 30.0  # so far from its median a water phantom does not reach
UNIFORM_SHARE = 0.85  # of the inner tissue; inserts are the rest. A body's muscle, fat and bone lie wider apart
METAL_HU = 2500.0  # denser than enamel and than any contrast agent in the body
LEVELS = 256
MIN_LEVELS = 16  # fewer say nothing about the number of bits
COARSE_STEP_HU = 3.5  # 8 bits over the 1,000 HU from air to tissue step by 4 and more; CT steps by 1, rarely by 2
SAMPLE_SLICES, SAMPLE_STEP = 24, 3
PROJECTIONS = frozenset({"MIP", "MINIP", "MAX_IP", "MIN_IP", "PROJECTION IMAGE", "VOLUME RENDERING", "3D"})
PERCENTS = ("5", "25", "50", "75", "95")  # of those in the bundle's statistics: the tails are noise
MIN_VOXELS = 200  # of a district, to compare its HU


def check_input(ct: CtVolume, options: GateOptions) -> tuple[GateFinding, ...]:
    """What a look at the volume alone finds. Raises GateRefusal at a finding whose severity is "reject".

    The HU checks are free of scale: they ask for shares of the field of view, not for volumes.
    """
    return sifted(_volume_findings(ct, options), options)


def check_scan(
    hu: FloatVolume, districts: DistrictMap, statistics: Mapping[str, Any], options: GateOptions
) -> tuple[GateFinding, ...]:
    """What the districts and the bundle's training statistics tell, before a network runs.

    Args:
        hu: [z, y, x] on the districts' grid.
        statistics: the manifest's; may be empty.

    Raises GateRefusal at a finding whose severity is "reject".
    """
    return sifted(_scan_findings(hu, districts, statistics, options), options)


def _volume_findings(ct: CtVolume, options: GateOptions) -> Iterator[GateFinding]:
    name = f"series {ct.source.series_uid}"
    yield from _header_findings(ct, name, options)
    view = BlockView.of(ct)
    yield from _value_findings(ct, view, name)
    yield from _body_findings(ct, view, name, options)


def _header_findings(ct: CtVolume, name: str, options: GateOptions) -> Iterator[GateFinding]:
    coverage, spacing = ct.grid.extent_mm[0], ct.grid.spacing_mm[0]
    if coverage < options.min_coverage_mm - 1e-6:
        text = f"{name} covers {coverage:.0f} mm, at least {options.min_coverage_mm:.0f} mm are needed"
        yield GateFinding(code="low_coverage", text=text)
    if spacing > options.max_slice_spacing_mm + 1e-3:
        text = f"{name} has a slice every {spacing:.1f} mm, at most {options.max_slice_spacing_mm:g} mm are accepted"
        yield GateFinding(code="coarse_slices", text=text)
    image_type = ct.source.header.get("ImageType") or ()
    kinds = [image_type] if isinstance(image_type, str) else list(image_type)
    if PROJECTIONS & {str(kind).strip().upper() for kind in kinds}:
        yield GateFinding(code="projection_image", text=f"{name} holds projections, slices are expected")
    if options.min_age_years:
        age = age_years(ct.source.header)
        if age is None:
            text = f"{name}: the age of the patient is not told, it cannot be checked"
            yield GateFinding(code="age_unknown", text=text)
        elif age < options.min_age_years:
            text = f"{name}: the patient is younger than {options.min_age_years} years"
            yield GateFinding(code="child", text=text)


def _value_findings(ct: CtVolume, view: BlockView, name: str) -> Iterator[GateFinding]:
    """Are these Hounsfield units?"""
    low, high = float(ct.hu.min()), float(ct.hu.max())  # NaN wins both
    if not (math.isfinite(low) and high <= MAX_HU):
        yield GateFinding(code="implausible_hu", text=f"{name}: Hounsfield units from {low:.4g} to {high:.4g}")
    if view.tissue.mean() >= MIN_BODY_SHARE and (text := _eight_bit(ct.hu)):  # air alone has few values, too
        yield GateFinding(code="eight_bit", text=f"{name}: {text}")
    if text := _wrong_rescale(view, low):
        yield GateFinding(code="wrong_rescale", text=f"{name}: {text}")


def _eight_bit(hu: FloatVolume) -> str:
    """Why the values look as if they had gone through 8 bits; "" when they do not."""
    sample = hu[:: max(1, len(hu) // SAMPLE_SLICES), ::SAMPLE_STEP, ::SAMPLE_STEP]
    levels = np.unique(sample)
    if not MIN_LEVELS <= len(levels) <= LEVELS:
        return ""
    span, step = float(levels[-1] - levels[0]), float(np.diff(levels).min())
    if span < LEVELS:
        return f"all values lie within {span:.0f} HU: are they gray values of 8 bits?"
    if step >= COARSE_STEP_HU:
        return f"{len(levels)} different values, at least {step:.1f} HU apart: were they stored in 8 bits?"
    return ""


def _wrong_rescale(view: BlockView, lowest: float) -> str:
    """Why air and tissue are not where they belong; "" when they are, or when there is no tissue at all."""
    air = float((view.blocks < AIR_HU).mean())
    if air < MIN_AIR_SHARE:
        return (
            f"{air:.2%} of the field of view is air (below {AIR_HU:.0f} HU), the lowest value is {lowest:.0f} HU: "
            "is the rescale intercept missing?"
        )
    dense = float((view.blocks > DENSE_HU).mean())
    if dense > MAX_DENSE_SHARE:
        expected = f"at most {MAX_DENSE_SHARE:.0%} is expected"
        return f"{dense:.1%} of the field of view is denser than {DENSE_HU:.0f} HU, {expected}: is the rescale wrong?"
    inner = view.blocks[interior(view.tissue)]
    if view.tissue.mean() < MIN_BODY_SHARE or not inner.size:
        return ""
    mode = _mode(inner)
    peaks = [inner[(inner >= a) & (inner <= b)].size for a, b in (FAT_PEAK_HU, SOFT_PEAK_HU)]
    at_peaks = sum(peaks) / max(1, int(np.count_nonzero(inner <= DENSE_HU)))
    if any(a <= mode <= b for a, b in (FAT_PEAK_HU, SOFT_PEAK_HU)) and at_peaks >= MIN_PEAKS_SHARE:
        return ""
    return (
        f"most tissue is at {mode:.0f} HU, and {at_peaks:.0%} of it is like fat or like muscle and organs, "
        f"{MIN_PEAKS_SHARE:.0%} is expected: is the rescale wrong?"
    )


def _mode(hu: FloatVolume) -> float:
    """The most frequent HU."""
    bins = np.arange(TISSUE_HU, 3000.0, MODE_BIN_HU)
    counts, edges = np.histogram(np.clip(hu, bins[0], bins[-1] - 1), bins)
    near = hu[np.abs(hu - (edges[np.argmax(counts)] + MODE_BIN_HU / 2)) <= MODE_BIN_HU]
    return float(np.median(near)) if near.size else float(np.median(hu))


def _body_findings(ct: CtVolume, view: BlockView, name: str, options: GateOptions) -> Iterator[GateFinding]:
    """Is it a person, and is enough of it in the field?"""
    low, high = SOFT_TISSUE_HU
    soft = float(in_patches((view.blocks >= low) & (view.blocks <= high)).mean())
    if soft < MIN_BODY_SHARE:
        text = f"{name}: {soft:.2%} of the field of view is soft tissue, {MIN_BODY_SHARE:.0%} is expected"
        yield GateFinding(code="no_body", text=text)
    if view.body_extent_mm < options.min_coverage_mm - 1e-6 <= ct.grid.extent_mm[0]:
        text = f"{name}: the body reaches over {view.body_extent_mm:.0f} mm, at least {options.min_coverage_mm:.0f} mm"
        yield GateFinding(code="low_coverage", text=f"{text} are needed")
    diameter, (least, most) = view.body_diameter_mm, options.body_mm
    if not least <= diameter <= most:
        text = f"{name}: the body is {diameter:.0f} mm thick (as a circle), {least:.0f} to {most:.0f} mm are expected"
        yield GateFinding(code="body_size", text=f"{text}: an animal, one limb, or a wrong pixel spacing?")
    inner = smoothed(view.blocks)[interior(interior(view.tissue))]
    if inner.size and (uniform := float((np.abs(inner - np.median(inner)) <= UNIFORM_HU).mean())) > UNIFORM_SHARE:
        text = f"{name}: {uniform:.0%} of what was scanned is of one density ({np.median(inner):.0f} HU)"
        yield GateFinding(code="water_phantom", text=f"{text}: a water phantom?")
    if (cut := view.cut_share) > options.max_cut_share:
        text = f"{name}: {cut:.1%} of the border of the field of view is body, at most {options.max_cut_share:.1%}"
        yield GateFinding(code="field_of_view_cut", text=f"{text} is expected: the scan cuts the body's sides off")
    metal = float((ct.hu[:: view.step, ::2, ::2] > METAL_HU).mean()) / max(float(view.tissue.mean()), 1e-6)
    if metal > options.max_metal_share:
        text = f"{name}: {metal:.2%} of the body is metal (above {METAL_HU:.0f} HU), at most"
        yield GateFinding(code="metal", text=f"{text} {options.max_metal_share:.2%} is expected")


def _scan_findings(
    hu: FloatVolume, districts: DistrictMap, statistics: Mapping[str, Any], options: GateOptions
) -> Iterator[GateFinding]:
    present = districts.present
    missing = [key for key in options.required_districts if key not in [d.key for d in present]]
    if missing:
        found = ", ".join(d.key for d in present) or "none"
        text = f"the scan does not show {' and '.join(missing)}: the districts found are {found}"
        yield GateFinding(code="missing_district", text=text)
    if not statistics:
        text = "the bundle says nothing about its training data: neither the CT nor the uptake is compared with it"
        yield GateFinding(code="no_statistics", text=text)
    far = [
        f"{d.key} by {distance:.0%}"
        for d in present
        if (distance := _hu_distance(hu, districts, d, statistics)) > options.max_hu_distance
    ]
    if far:
        text = f"the HU of {', '.join(far)} are distributed unlike in the bundle's training data, at most"
        yield GateFinding(code="unlike_training", text=f"{text} {options.max_hu_distance:.0%} is expected")


def _hu_distance(hu: FloatVolume, districts: DistrictMap, district: District, statistics: Mapping[str, Any]) -> float:
    """How far a district's HU are from the training studies', 0 to 1; 0 where it cannot be told.

    The largest difference between the share of the district below one of their percentiles and that percentile
    (Kolmogorov and Smirnov's distance, at `PERCENTS`). The bundle's percentiles are those of all its training studies
    together, without their spread between studies: so it is no number of standard deviations.
    """
    told = statistics.get(district.key, {}).get("hu_percentiles", {})
    some = (slice(None, None, 2),) * 3 if hu.size > 1_000_000 else (slice(None),) * 3
    inside = hu[some][districts.labels[some] == district]
    if inside.size < MIN_VOXELS or not all(p in told for p in PERCENTS):
        return 0.0
    return max(abs(float((inside <= told[p]).mean()) - float(p) / 100) for p in PERCENTS)
