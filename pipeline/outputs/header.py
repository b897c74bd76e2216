"""Reading one attribute of somebody else's header as clean text.

A CT header is an attacker's input: elements with the wrong VR, values that are too long, bytes that do not fit the
character set, control characters. Every function here gives text that the VR allows, or "" where there is none
to be had; none raises on any header.
"""

from __future__ import annotations

import math
import re
import struct
import unicodedata
import warnings
from collections.abc import Callable
from datetime import datetime

from pydicom import Dataset
from pydicom.charset import convert_encodings, decode_bytes, python_encoding
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.sequence import Sequence as DicomSequence
from pydicom.valuerep import TEXT_VR_DELIMS

# What pydicom raises for elements whose bytes are not what their VR says.
HEADER_FAULTS = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, NotImplementedError, struct.error)

DS_MAX_LENGTH = 16  # PS3.5 table 6.2-1, like the lengths below
_MAX_LENGTH = {"LO": 64, "SH": 16, "CS": 16, "ST": 1024}
_PN_GROUPS = 3
_PN_COMPONENTS = 5
_PN_GROUP_LENGTH = 64


def character_set(header: Dataset) -> list[str]:
    """The defined terms of SpecificCharacterSet (0008,0005), e.g. ["", "ISO 2022 IR 87"]; [] if absent or unknown."""
    raw = _value(header, "SpecificCharacterSet")
    text = raw.decode("ascii", "replace") if isinstance(raw, bytes) else _joined(raw)
    terms = [term.strip("\0 ") for term in text.split("\\")]
    if not any(terms) or any(term not in python_encoding for term in terms):
        return []
    return terms


def text_of(header: Dataset, keyword: str) -> str:
    """The decoded value of a text element, several values joined with a backslash; "" if absent or no text."""
    raw = _value(header, keyword)
    text = _decode(raw, character_set(header)) if isinstance(raw, bytes) else _joined(raw)
    return text.encode("utf-8", "replace").decode("utf-8")  # lone surrogates cannot be written again


def clean(vr: str, text: str) -> str:
    """The first value of `text` as `vr` allows it (PS3.5 table 6.2-1): cut, reformatted, or "" if beyond repair."""
    first = text.split("\\", 1)[0]
    printable = "".join(c for c in first if unicodedata.category(c) not in ("Cc", "Cs")).rstrip()
    return CLEANERS[vr](printable) if printable else ""


def clean_value(header: Dataset, keyword: str) -> str:
    """`text_of` and `clean` for the VR that the dictionary gives the keyword."""
    return clean(dictionary_VR(keyword), text_of(header, keyword))


def fits(vr: str, text: str) -> bool:
    """Whether `text` is short enough to be written under `vr` uncut."""
    return len(text.rstrip("\0 ")) <= _MAX_LENGTH[vr]


def unsigned_of(header: Dataset, keyword: str) -> int | None:
    """The value of a binary integer element such as Rows, if there is exactly one."""
    try:
        return int(header[keyword].value)
    except HEADER_FAULTS:
        return None


def numbers_of(header: Dataset, keyword: str) -> tuple[float, ...]:
    """The values of a DS element such as PixelSpacing; () if absent or not all numbers."""
    try:
        return tuple(float(part) for part in text_of(header, keyword).split("\\"))
    except ValueError:
        return ()


def items_of(header: Dataset, keyword: str) -> list[Dataset]:
    """The items of a sequence; [] if absent or not a sequence."""
    try:
        value = header[keyword].value
    except HEADER_FAULTS:
        return []
    return list(value) if isinstance(value, DicomSequence) else []


def ds_text(value: float) -> str:
    """A number as DS: up to nine decimals (a femtometer is enough), at most 16 characters, never "-0".

    Raises ValueError for a number that is not finite or too large.
    """
    if not math.isfinite(value):
        raise ValueError(f"{value} cannot be written as a decimal string")
    for decimals in range(9, -1, -1):
        text = f"{value:.{decimals}f}"
        if "." in text:
            text = text.rstrip("0").rstrip(".")
        if text == "-0":
            text = "0"
        if len(text) <= DS_MAX_LENGTH:
            return text
    raise ValueError(f"{value} needs more than {DS_MAX_LENGTH} characters")


def _value(header: Dataset, keyword: str) -> object:
    """The element's value, undecoded bytes where pydicom has not converted it yet; None if absent."""
    tag = tag_for_keyword(keyword)
    if tag is None or tag not in header:
        return None
    try:
        elem = header.get_item(tag)
    except HEADER_FAULTS:
        return None
    if isinstance(elem, RawDataElement):
        return elem.value if elem.VR != "SQ" else None
    if isinstance(elem, DataElement) and not isinstance(elem.value, DicomSequence):
        return elem.value
    return None


def _joined(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, (list, tuple)) or (hasattr(value, "__iter__") and not hasattr(value, "encode")):
        return "\\".join(str(part) for part in value)
    return str(value)


def _decode(raw: bytes, terms: list[str]) -> str:
    with warnings.catch_warnings():  # pydicom warns and replaces what does not decode, which is what is wanted
        warnings.simplefilter("ignore")
        return decode_bytes(raw.rstrip(b"\0 "), convert_encodings(terms or [""]), TEXT_VR_DELIMS)


def _person_name(text: str) -> str:
    groups = text.split("=")[:_PN_GROUPS]
    cut = ["^".join(group.split("^")[:_PN_COMPONENTS])[:_PN_GROUP_LENGTH] for group in groups]
    return "=".join(cut).rstrip("=^ ")


def _limited(vr: str) -> Callable[[str], str]:
    return lambda text: text[: _MAX_LENGTH[vr]].rstrip()


def _code_string(text: str) -> str:
    upper = text.strip().upper()
    return upper if re.fullmatch(r"[A-Z0-9 _]{1,16}", upper) else ""


def _uid(text: str) -> str:
    stripped = text.strip()
    return stripped if len(stripped) <= 64 and re.fullmatch(r"[0-9]+(\.[0-9]+)*", stripped, re.ASCII) else ""


def _date(text: str) -> str:
    digits = text.strip().replace(".", "")  # YYYY.MM.DD is ACR-NEMA's, still met
    if not re.fullmatch(r"\d{8}", digits, re.ASCII):
        return ""
    try:
        datetime.strptime(digits, "%Y%m%d")
    except ValueError:
        return ""
    return digits


def _time(text: str) -> str:
    plain = text.strip().replace(":", "")
    parts = re.fullmatch(r"(\d\d)(?:(\d\d)(?:(\d\d)(\.\d{1,6})?\d*)?)?", plain, re.ASCII)
    if not parts:
        return ""
    hour, minute, second = (int(part or 0) for part in parts.group(1, 2, 3))
    if hour > 23 or minute > 59 or second > 60:  # 60: a leap second
        return ""
    return "".join(part or "" for part in parts.groups())


def _decimal(text: str) -> str:
    try:
        return text.strip() if _is_decimal(text.strip()) else ds_text(float(text))
    except ValueError:
        return ""


def _is_decimal(text: str) -> bool:
    is_number = re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", text, re.ASCII) is not None
    return is_number and len(text) <= DS_MAX_LENGTH and math.isfinite(float(text))


def _integer(text: str) -> str:
    parts = re.fullmatch(r"[+-]?\d{1,11}", text.strip(), re.ASCII)
    return text.strip() if parts and -(2**31) <= int(text) < 2**31 else ""


def _age(text: str) -> str:
    parts = re.fullmatch(r"(\d{1,3})([DWMY])", text.strip().upper(), re.ASCII)
    return f"{int(parts[1]):03d}{parts[2]}" if parts else ""


CLEANERS: dict[str, Callable[[str], str]] = {
    "AS": _age,
    "CS": _code_string,
    "DA": _date,
    "DS": _decimal,
    "IS": _integer,
    "LO": _limited("LO"),
    "PN": _person_name,
    "SH": _limited("SH"),
    "ST": _limited("ST"),
    "TM": _time,
    "UI": _uid,
}
