"""The choice of the study's CT, as tables."""

from __future__ import annotations

from typing import Any

import pytest
from pydicom.uid import CTImageStorage, EnhancedCTImageStorage, SecondaryCaptureImageStorage

from dicom_node.config import RuleConfig, SelectionConfig
from dicom_node.kernels import Kernel, classify_kernel
from dicom_node.selection import EarlierChoice, SeriesSummary, choose, like

BASE: dict[str, Any] = {
    "series_uid": "1.1",
    "modality": "CT",
    "sop_class_uid": CTImageStorage,
    "image_type": ("ORIGINAL", "PRIMARY", "AXIAL"),
    "description": "Body 3.0 B40f",
    "study_description": "Staging",
    "kernel": "B40f",
    "body_part": "CHEST",
    "manufacturer": "SIEMENS",
    "series_number": "2",
    "calling_ae": "PACS",
    "slices": 300,
    "coverage_mm": 900.0,
    "spacing_mm": 3.0,
    "axial": True,
    "has_geometry": True,
}
CONFIG = SelectionConfig()


def series(uid: str = "1.1", **changes: Any) -> SeriesSummary:
    return SeriesSummary(**{**BASE, "series_uid": uid, **changes})


def codes(*members: SeriesSummary, rules: tuple[RuleConfig, ...] = (), **kwargs: Any) -> dict[str, tuple[str, str]]:
    return {d.series_uid: (d.action, d.code) for d in choose(members, rules, CONFIG, **kwargs)}


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"modality": "MR"}, "not_ct"),
        ({"sop_class_uid": SecondaryCaptureImageStorage}, "not_ct"),
        ({"image_type": ("ORIGINAL", "PRIMARY", "LOCALIZER"), "slices": 2}, "localizer"),
        ({"image_type": (), "description": "Topogram 0.6 T20f", "slices": 1}, "localizer"),
        ({"image_type": ("ORIGINAL", "PRIMARY", "AXIAL"), "description": "SCOUT"}, "localizer"),
        ({"image_type": ("DERIVED", "SECONDARY", "MPR")}, "derived_image"),
        ({"image_type": ("DERIVED", "PRIMARY", "MIP")}, "derived_image"),
        ({"image_type": ("DERIVED", "SECONDARY")}, "derived_image"),
        ({"has_geometry": False, "axial": False}, "no_geometry"),
        ({"axial": False}, "not_axial"),
        ({"slices": 19}, "too_few_slices"),
        ({"slices": 1, "coverage_mm": 5.0}, "too_few_slices"),
        ({"spacing_mm": 10.5}, "thick_slices"),
        ({"coverage_mm": 119.0}, "low_coverage"),
    ],
)
def test_a_series_that_cannot_be_the_studys_ct_is_rejected_by_name(changes: dict[str, Any], code: str) -> None:
    assert codes(series(**changes)) == {"1.1": ("reject", code)}


@pytest.mark.parametrize(
    ("one", "other", "code"),
    [
        # what makes series 1.1 win, and what 1.2 is told
        ({}, {"coverage_mm": 400.0}, "not_best"),
        ({}, {"kernel": "B70f"}, "sharp_kernel"),
        ({"kernel": "STANDARD"}, {"kernel": "LUNG"}, "sharp_kernel"),
        ({"kernel": "FC13"}, {"kernel": "FC52"}, "sharp_kernel"),
        ({"kernel": "B"}, {"kernel": "YB"}, "sharp_kernel"),
        ({"kernel": "Br40d\\3"}, {"kernel": "Bl57d\\3"}, "sharp_kernel"),
        ({}, {"image_type": ("DERIVED", "PRIMARY")}, "derived_image"),
        ({"image_type": ("DERIVED", "PRIMARY", "AXIAL")}, {"image_type": ("DERIVED", "PRIMARY")}, "derived_image"),
        ({"spacing_mm": 1.0, "coverage_mm": 898.0}, {"spacing_mm": 5.0, "coverage_mm": 905.0}, "not_best"),
        ({}, {"sop_class_uid": EnhancedCTImageStorage}, "not_best"),
        # a soft kernel wins over a little more coverage, not over much more
        ({"coverage_mm": 800.0}, {"kernel": "B70f", "coverage_mm": 1000.0}, "sharp_kernel"),
        ({"kernel": "B70f", "coverage_mm": 1800.0}, {"coverage_mm": 400.0}, "not_best"),
        # contrast is no argument: the UID decides, so that the choice does not depend on the order
        ({"description": "native"}, {"description": "KM venoes"}, "not_best"),
    ],
)
def test_one_series_is_chosen_and_the_others_know_why(one: dict[str, Any], other: dict[str, Any], code: str) -> None:
    first, second = series("1.1", **one), series("1.2", **other)
    expected = {"1.1": ("synthesize", "chosen"), "1.2": ("reject", code)}
    assert codes(first, second) == expected
    assert codes(second, first) == expected


def test_the_reason_names_the_better_series_and_its_coverage() -> None:
    decisions = choose([series("1.1"), series("1.2", coverage_mm=300.0)], (), CONFIG)
    assert decisions[1].text == "series 1.1 has larger coverage (900 mm, this one 300 mm)"
    assert decisions[0].score == 900.0


def test_no_series_no_decision() -> None:
    assert choose([], (), CONFIG) == []


@pytest.mark.parametrize(
    ("coverage_mm", "outcome"),
    [(1000.0, ("reject", "study_has_result")), (1125.0, ("synthesize", "chosen_late"))],
)
def test_a_series_after_the_studys_choice_must_be_clearly_better(coverage_mm: float, outcome: tuple[str, str]) -> None:
    earlier = [EarlierChoice(series_uid="1.9", job_id="ab", coverage_mm=900.0)]
    assert codes(series(coverage_mm=coverage_mm), earlier=earlier) == {"1.1": outcome}


RULES = (
    RuleConfig(name="no-lung", action="ignore", convolution_kernel="b[78]*"),
    RuleConfig(name="research", action="hold", study_description="*trial*"),
    RuleConfig(name="petct", action="synthesize", series_description="*CTAC*", min_slices=50, max_slices=600),
)


@pytest.mark.parametrize(
    ("changes", "outcome"),
    [
        ({"kernel": "B70f"}, ("reject", "rule_ignore")),
        ({"kernel": "B70f", "study_description": "TRIAL 7"}, ("reject", "rule_ignore")),
        ({"study_description": "TRIAL 7"}, ("hold", "rule_hold")),
        ({"description": "ctac 5mm", "coverage_mm": 60.0}, ("synthesize", "rule_synthesize")),
        ({"description": "ctac 5mm", "slices": 49}, ("synthesize", "chosen")),
        ({"description": "ctac 5mm", "slices": 601}, ("synthesize", "chosen")),
    ],
)
def test_the_first_rule_that_matches_decides(changes: dict[str, Any], outcome: tuple[str, str]) -> None:
    assert codes(series(**changes), rules=RULES) == {"1.1": outcome}


@pytest.mark.parametrize(
    ("condition", "matches"),
    [
        ({"modality": "ct"}, True),
        ({"modality": "PT"}, False),
        ({"body_part": "ch?st"}, True),
        ({"image_type": "*PRIMARY*"}, True),
        ({"image_type": "original\\primary\\axial"}, True),
        ({"manufacturer": "GE*"}, False),
        ({"calling_ae": "PACS"}, True),
        ({"calling_ae": "OTHER"}, False),
        ({"min_coverage_mm": 901}, False),
        ({"max_slice_spacing_mm": 2.5}, False),
        ({"max_slice_spacing_mm": 3}, True),
        ({"modality": "CT", "series_description": "abdomen*"}, False),
    ],
)
def test_every_condition_of_a_rule_must_hold(condition: dict[str, Any], matches: bool) -> None:
    rule = RuleConfig(name="r", action="hold", **condition)
    assert codes(series(), rules=(rule,))["1.1"][0] == ("hold" if matches else "synthesize")


def test_what_a_rule_chose_is_the_studys_ct() -> None:
    ctac = series("1.2", description="CTAC", coverage_mm=500.0)
    assert codes(series(), ctac, rules=RULES) == {
        "1.1": ("reject", "not_best"),
        "1.2": ("synthesize", "rule_synthesize"),
    }


def test_patterns_are_never_evaluated() -> None:
    assert not like("anything", "__import__('os').system('true')")
    assert like("Straße", "STRASSE")


@pytest.mark.parametrize(
    ("kernel", "description", "kind"),
    [
        ("B31f", "", Kernel.SOFT),
        ("B50f", "", Kernel.SHARP),
        ("I30f\\2", "", Kernel.SOFT),
        ("I70f\\2", "", Kernel.SHARP),
        ("Br36d", "", Kernel.SOFT),
        ("Bl64d\\3", "", Kernel.SHARP),
        ("Qr40", "", Kernel.SOFT),
        ("STANDARD", "", Kernel.SOFT),
        ("SOFT", "", Kernel.SOFT),
        ("BONEPLUS", "", Kernel.SHARP),
        ("HD LUNG", "", Kernel.SHARP),
        ("FC08", "", Kernel.SOFT),
        ("FC13-H", "", Kernel.SOFT),
        ("FC30", "", Kernel.SHARP),
        ("FC81", "", Kernel.SHARP),
        ("L", "", Kernel.SHARP),
        ("C", "", Kernel.SOFT),
        ("XYZ", "", Kernel.UNKNOWN),
        ("", "Thorax Lung 1.0", Kernel.SHARP),
        ("", "Abdomen", Kernel.SOFT),
        ("", "", Kernel.UNKNOWN),
        ("XYZ", "Lunge HRCT", Kernel.SHARP),
    ],
)
def test_kernels_of_all_vendors_are_soft_or_sharp(kernel: str, description: str, kind: Kernel) -> None:
    assert classify_kernel(kernel, description) is kind
