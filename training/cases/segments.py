"""What a segment of a DICOM SEG shows: a district, a lesion, or something that is not asked for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

from pydicom import Dataset
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code

from pipeline.outputs.codes import DISTRICT_CODES
from pipeline.types import District

Kind = Literal["lesions", "districts", "other"]

WHOLE_REGIONS: tuple[tuple[Code, District], ...] = (
    *((code, district) for district, code in DISTRICT_CODES.items()),
    (codes.SCT.HeadAndNeck, District.HEAD),
)
DISTRICT_WORDS: Mapping[str, District] = {
    **dict.fromkeys(("head", "headandneck"), District.HEAD),
    **dict.fromkeys(("trunk", "torso"), District.TRUNK),
    **dict.fromkeys(("arms", "arm", "upperlimb", "upperlimbs", "leftarm", "rightarm"), District.ARMS),
    **dict.fromkeys(("legs", "leg", "lowerlimb", "lowerlimbs", "leftleg", "rightleg"), District.LEGS),
}
# Categories (CID 7150) under which organs and tissues are segmented: no lesion, unless the words say so
HEALTHY = (codes.SCT.AnatomicalStructure, codes.SCT.BodyStructure, codes.SCT.Tissue)
BACKGROUND = Code("125040", "DCM", "Background")  # label maps describe it as their segment 0
_LESION = re.compile(r"lesion|tumou?r|neoplas|cancer|carcinoma|metasta|lympho?ma|melanoma|malignan|nodule", re.I)


def kind_of(segment: Dataset) -> tuple[Kind, District | None]:
    """Kind of a segment, and which district it is.

    A district by the code of its property type, then by its label; a healthy structure by its category; everything
    else (and whatever is called a lesion) is a lesion.
    """
    label = str(segment.get("SegmentLabel") or "")
    kind, category = (_code(segment, f"SegmentedProperty{part}CodeSequence") for part in ("Type", "Category"))
    if (kind is not None and kind == BACKGROUND) or label.strip().lower() == "background":
        return "other", None
    words = f"{label} {segment.get('SegmentDescription') or ''} {kind.meaning if kind else ''}"
    if _LESION.search(words):
        return "lesions", None
    for code, district in WHOLE_REGIONS:
        if kind is not None and kind == code:
            return "districts", district
    named = DISTRICT_WORDS.get(re.sub(r"[^a-z]", "", label.lower()))
    if named is not None:
        return "districts", named
    if category is not None and category in HEALTHY:
        return "other", None
    return "lesions", None


def _code(segment: Dataset, keyword: str) -> Code | None:
    for item in segment.get(keyword) or ():
        value, scheme = item.get("CodeValue"), item.get("CodingSchemeDesignator")
        if value and scheme:
            return Code(str(value), str(scheme), str(item.get("CodeMeaning") or ""))
    return None
