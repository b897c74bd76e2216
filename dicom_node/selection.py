"""Which series of a study is synthesized: `[[rules]]` first, then a built-in choice of one CT. Pure.

Every series that is not chosen gets a code and a sentence: `why` prints them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from pydicom.uid import CTImageStorage

from dicom_node.config import RuleConfig, SelectionConfig
from dicom_node.headers import InstanceHeader, SeriesGeometry, geometry_of
from dicom_node.kernels import Kernel, classify_kernel
from dicom_node.net.scp import CT_CLASSES
from pipeline.ct_groups import PROJECTIONS

Action = Literal["synthesize", "reject", "hold", "cancel"]

MIN_AXIAL_COSINE = 0.85  # the normal's z component: a gantry tilted by 30 degrees still counts as axial
CLEARLY_BETTER = 1.25  # coverage of a series that comes after the study's choice, to be chosen as well
NEARLY_AS_GOOD = 0.95  # reconstructions of one scan differ by a slice or two in coverage
_LOCALIZER_WORDS = ("*localizer*", "*scout*", "*topogram*", "*surview*", "*scanogram*", "*dose report*")
_MADE_UP = frozenset(
    {"SECONDARY", "MPR", "MIP", "MINIP", "VRT", "CPR", "REFORMATTED", "PROJECTION IMAGE", "SCREEN SAVE", *PROJECTIONS}
)
_KERNEL_WEIGHT = {Kernel.SOFT: 1.0, Kernel.UNKNOWN: 0.9, Kernel.SHARP: 0.6}
_DERIVED_WEIGHT = 0.9


@dataclass(frozen=True, kw_only=True, slots=True)
class SeriesSummary:
    """One series as selection sees it; from headers only, nothing that identifies a patient."""

    series_uid: str
    modality: str
    sop_class_uid: str
    image_type: tuple[str, ...]
    description: str
    study_description: str
    kernel: str
    body_part: str
    manufacturer: str
    series_number: str
    calling_ae: str
    slices: int
    coverage_mm: float
    spacing_mm: float
    axial: bool
    has_geometry: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """What becomes of a series, and why. `score` is coverage in mm weighted by kernel and kind; 0 where unranked."""

    series_uid: str
    action: Action
    code: str
    text: str
    score: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class EarlierChoice:
    """A series of the study that was chosen before and not given up since."""

    series_uid: str
    job_id: str
    coverage_mm: float


def summarize(
    headers: Sequence[InstanceHeader], *, calling_ae: str, geometry: SeriesGeometry | None = None
) -> SeriesSummary:
    """Sum up the instances of one series (at least one)."""
    first = headers[0]
    geometry = geometry or geometry_of(headers)
    return SeriesSummary(
        series_uid=first.series_uid,
        modality=first.modality,
        sop_class_uid=first.sop_class_uid,
        image_type=first.image_type,
        description=first.series_description,
        study_description=first.study_description,
        kernel=first.kernel,
        body_part=first.body_part,
        manufacturer=first.manufacturer,
        series_number=first.series_number,
        calling_ae=calling_ae,
        slices=len(geometry.z_mm) or len(headers),
        coverage_mm=round(geometry.coverage_mm, 2),
        spacing_mm=round(geometry.spacing_mm, 4),
        axial=geometry.normal is not None and abs(geometry.normal[2]) >= MIN_AXIAL_COSINE,
        has_geometry=geometry.normal is not None,
    )


def choose(
    series: Sequence[SeriesSummary],
    rules: Sequence[RuleConfig],
    config: SelectionConfig,
    *,
    earlier: Sequence[EarlierChoice] = (),
) -> list[Decision]:
    """Decide on all series of a study that are waiting; one decision each, in the order given.

    A rule's word counts for the series it matches. Of the series that no rule names at most one is chosen, and
    only if no rule chose one. `earlier` are the study's choices from before: then only a clearly better series
    (coverage at least `CLEARLY_BETTER` times theirs) is chosen as well.
    """
    decided: dict[str, Decision] = {}
    unnamed = []
    for one in series:
        rule = next((rule for rule in rules if matches(rule, one)), None)
        if rule is None:
            unnamed.append(one)
        else:
            decided[one.series_uid] = _by_rule(rule, one)
    eligible = []
    for one in unnamed:
        fault = unfit(one, config)
        if fault is None:
            eligible.append(one)
        else:
            decided[one.series_uid] = fault
    by_rule = next((d for d in decided.values() if d.action == "synthesize"), None)
    for decision in _choose_one(eligible, by_rule, earlier):
        decided[decision.series_uid] = decision
    return [decided[one.series_uid] for one in series]


# -- rules


def matches(rule: RuleConfig, one: SeriesSummary) -> bool:
    """True when every condition that is set holds. Patterns are compared without case; never evaluated."""
    texts = (
        (rule.modality, one.modality),
        (rule.series_description, one.description),
        (rule.study_description, one.study_description),
        (rule.body_part, one.body_part),
        (rule.convolution_kernel, one.kernel),
        (rule.image_type, "\\".join(one.image_type)),
        (rule.manufacturer, one.manufacturer),
        (rule.calling_ae, one.calling_ae),
    )
    return (
        all(like(value, pattern) for pattern, value in texts if pattern)
        and one.slices >= rule.min_slices
        and (not rule.max_slices or one.slices <= rule.max_slices)
        and one.coverage_mm >= rule.min_coverage_mm
        and (not rule.max_slice_spacing_mm or one.spacing_mm <= rule.max_slice_spacing_mm)
    )


def like(value: str, pattern: str) -> bool:
    """Shell-style `*` and `?`, without case."""
    return fnmatchcase(value.casefold(), pattern.casefold())


def _by_rule(rule: RuleConfig, one: SeriesSummary) -> Decision:
    action: Action = "reject" if rule.action == "ignore" else rule.action
    return Decision(
        series_uid=one.series_uid,
        action=action,
        code=f"rule_{rule.action}",
        text=f"rule {rule.name!r} says {rule.action}",
        score=score(one),
    )


# -- the built-in choice


def is_localizer(one: SeriesSummary) -> bool:
    """By ImageType value 3 (PS3.3 C.8.2.1.1.1), else by what vendors call it."""
    return "LOCALIZER" in one.image_type or any(like(one.description, word) for word in _LOCALIZER_WORDS)


_Check = tuple[str, Callable[[SeriesSummary, SelectionConfig], bool], Callable[[SeriesSummary, SelectionConfig], str]]

UNFIT: tuple[_Check, ...] = (
    (
        "not_ct",
        lambda s, _: s.modality != "CT" or s.sop_class_uid not in CT_CLASSES,
        lambda s, _: f"the modality is {s.modality[:16]!a} and not CT",
    ),
    ("localizer", lambda s, _: is_localizer(s), lambda _s, _c: "a localizer, not a volume"),
    (
        "derived_image",
        lambda s, _: bool(_MADE_UP & set(s.image_type)),
        lambda s, _: f"not a primary reconstruction: image type {chr(92).join(s.image_type)[:64]!a}",
    ),
    ("no_geometry", lambda s, _: not s.has_geometry, lambda _s, _c: "no position or orientation in the headers"),
    (
        "too_few_slices",
        lambda s, c: s.slices < c.min_slices,
        lambda s, c: f"{s.slices} slices, at least {c.min_slices} are wanted",
    ),
    ("not_axial", lambda s, _: not s.axial, lambda _s, _c: "the slices are not axial"),
    (
        "thick_slices",
        lambda s, c: s.spacing_mm > c.max_slice_spacing_mm,
        lambda s, c: f"{s.spacing_mm:.4g} mm between slices, at most {c.max_slice_spacing_mm:.4g} mm are wanted",
    ),
    (
        "low_coverage",
        lambda s, c: s.coverage_mm < c.min_coverage_mm,
        lambda s, c: f"covers {s.coverage_mm:.0f} mm of the body, at least {c.min_coverage_mm:.0f} mm are wanted",
    ),
)


def unfit(one: SeriesSummary, config: SelectionConfig) -> Decision | None:
    """The first reason why a series cannot be the study's CT, or None."""
    for code, holds, text in UNFIT:
        if holds(one, config):
            return Decision(series_uid=one.series_uid, action="reject", code=code, text=text(one, config))
    return None


def score(one: SeriesSummary) -> float:
    """Coverage in mm, weighted down for a sharp or unknown kernel and for a derived image."""
    weight = _KERNEL_WEIGHT[_kernel(one)] * (_DERIVED_WEIGHT if _is_derived(one) else 1.0)
    return round(one.coverage_mm * weight, 1)


def _kernel(one: SeriesSummary) -> Kernel:
    return classify_kernel(one.kernel, one.description)


def _is_derived(one: SeriesSummary) -> bool:
    """Neither ORIGINAL\\PRIMARY nor PRIMARY\\AXIAL."""
    kind = set(one.image_type)
    return not (kind >= {"ORIGINAL", "PRIMARY"} or kind >= {"PRIMARY", "AXIAL"})


def _rank(one: SeriesSummary) -> tuple[bool, Kernel, bool, float, float, str]:
    """Among series of nearly the same score; the smallest wins. The UID last, so that the choice is stable."""
    multi_frame = one.sop_class_uid != CTImageStorage
    return _is_derived(one), _kernel(one), multi_frame, one.spacing_mm, -one.coverage_mm, one.series_uid


def _best(eligible: Iterable[SeriesSummary]) -> SeriesSummary:
    eligible = list(eligible)
    top = max(score(one) for one in eligible)
    return min((one for one in eligible if score(one) >= NEARLY_AS_GOOD * top), key=_rank)


def _choose_one(
    eligible: Sequence[SeriesSummary], by_rule: Decision | None, earlier: Sequence[EarlierChoice]
) -> list[Decision]:
    if not eligible:
        return []
    if by_rule is not None:
        text = f"{by_rule.text} for series {by_rule.series_uid} of this study"
        return [_reject(one, "not_best", text) for one in eligible]
    if earlier:
        most = max(earlier, key=lambda choice: choice.coverage_mm)
        better = [one for one in eligible if one.coverage_mm >= CLEARLY_BETTER * most.coverage_mm]
        done = f"series {most.series_uid} of this study has job {most.job_id} with {most.coverage_mm:.0f} mm"
        rest = [
            _reject(one, "study_has_result", f"{done}; {one.coverage_mm:.0f} mm here is not clearly more")
            for one in eligible
            if one not in better
        ]
        if not better:
            return rest
        text = f"covers {{0:.0f}} mm, clearly more than series {most.series_uid} (job {most.job_id}) before"
        return [*rest, *_one_of(better, "chosen_late", text)]
    return _one_of(eligible, "chosen", "covers {0:.0f} mm: the most useful CT series of the study")


def _one_of(eligible: Sequence[SeriesSummary], code: str, text: str) -> list[Decision]:
    best = _best(eligible)
    chosen = Decision(
        series_uid=best.series_uid,
        action="synthesize",
        code=code,
        text=text.format(best.coverage_mm),
        score=score(best),
    )
    return [chosen, *(_beaten(one, best) for one in eligible if one is not best)]


def _beaten(one: SeriesSummary, best: SeriesSummary) -> Decision:
    """Say by what the best series is better; the first difference that decided it."""
    if best.coverage_mm * NEARLY_AS_GOOD > one.coverage_mm:
        text = f"has larger coverage ({best.coverage_mm:.0f} mm, this one {one.coverage_mm:.0f} mm)"
        return _reject(one, "not_best", f"series {best.series_uid} {text}")
    if _is_derived(one) and not _is_derived(best):
        return _reject(one, "derived_image", f"series {best.series_uid} is a primary reconstruction, this one derived")
    if _kernel(best) < _kernel(one):
        text = f"has a softer kernel ({best.kernel[:16]!a}, this one {one.kernel[:16]!a})"
        return _reject(one, "sharp_kernel", f"series {best.series_uid} {text}")
    if best.spacing_mm < one.spacing_mm:
        text = f"has thinner slices ({best.spacing_mm:.4g} mm, this one {one.spacing_mm:.4g} mm)"
        return _reject(one, "not_best", f"series {best.series_uid} {text}")
    return _reject(one, "not_best", f"series {best.series_uid} is as good and was chosen")


def _reject(one: SeriesSummary, code: str, text: str) -> Decision:
    return Decision(series_uid=one.series_uid, action="reject", code=code, text=text, score=score(one))
