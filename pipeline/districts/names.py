"""Which district a segment of somebody's SEG is called: by SNOMED code, or by the words of its label."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code

from pipeline.outputs.codes import DISTRICT_CODES
from pipeline.types import District

# SRT spellings count as the same (PS3.16 annex L)
WHOLE_REGIONS: tuple[tuple[Code, District], ...] = (
    *((code, district) for district, code in DISTRICT_CODES.items()),
    (codes.SCT.HeadAndNeck, District.HEAD),
)
# that together make a district
PARTS: tuple[tuple[Code, District], ...] = (
    (codes.SCT.Thorax, District.TRUNK),
    (codes.SCT.Abdomen, District.TRUNK),
    (codes.SCT.Pelvis, District.TRUNK),
    (codes.SCT.AbdomenAndPelvis, District.TRUNK),
    (codes.SCT.ChestAndAbdomen, District.TRUNK),
    (codes.SCT.ChestAbdomenAndPelvis, District.TRUNK),
    (codes.SCT.UpperArm, District.ARMS),
    (codes.SCT.Forearm, District.ARMS),
    (codes.SCT.Hand, District.ARMS),
    (codes.SCT.Thigh, District.LEGS),
    (codes.SCT.LowerLeg, District.LEGS),
    (codes.SCT.Foot, District.LEGS),
)
_LABELED: Mapping[str, District] = {
    **dict.fromkeys(("head", "headandneck", "headneck"), District.HEAD),
    **dict.fromkeys(("trunk", "torso"), District.TRUNK),
    **dict.fromkeys(("arm", "upperlimb", "upperextremity"), District.ARMS),
    **dict.fromkeys(("leg", "lowerlimb", "lowerextremity"), District.LEGS),
}
_SIDE = {"left", "right", "l", "r", "both"}
_GLUED_SIDE = re.compile(r"^(left|right|both)|(left|right)$")  # as in "leftarm"
_PLURAL = re.compile(r"(?<=arm|leg)s$|(?<=limb)s$|(?<=extremit)ies$")


def district_coded(kind: Code | None, table: Sequence[tuple[Code, District]]) -> District | None:
    """The district of a code in one of the tables above; None without one."""
    return next((district for code, district in table if kind is not None and kind == code), None)


def district_named(label: str) -> District | None:
    """The district whose name a label is, whatever its side, plural, case and separators; None: it is no such name."""
    words = (word for word in re.split(r"[^a-z]+", label.lower()) if word not in _SIDE)
    name = _PLURAL.sub(lambda found: "y" if found.group() == "ies" else "", _GLUED_SIDE.sub("", "".join(words)))
    return _LABELED.get(name)
