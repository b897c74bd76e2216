"""What a segment of a DICOM SEG shows: a district, a lesion, or something that is not asked for."""

from __future__ import annotations

import re
from typing import Literal

from pydicom import Dataset
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code

from pipeline.districts.names import WHOLE_REGIONS, district_coded, district_named
from pipeline.types import District

Kind = Literal["lesions", "districts", "other"]

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
    # by code only as a whole: a part of one may be where a lesion lies
    coded = district_coded(kind, WHOLE_REGIONS)
    district = coded if coded is not None else district_named(label)
    if district is not None:
        return "districts", district
    if category is not None and category in HEALTHY:
        return "other", None
    return "lesions", None


def _code(segment: Dataset, keyword: str) -> Code | None:
    for item in segment.get(keyword) or ():
        value, scheme = item.get("CodeValue"), item.get("CodingSchemeDesignator")
        if value and scheme:
            return Code(str(value), str(scheme), str(item.get("CodeMeaning") or ""))
    return None
