"""The patient's age at the scan. Neither the age nor the dates ever leave this module."""

from __future__ import annotations

import re
from datetime import date, datetime

from pydicom import Dataset

_AGE = re.compile(r"(\d{3})([DWMY])")  # VR AS (PS3.5 table 6.2-1)
_YEARS = {"D": 1 / 365.25, "W": 7 / 365.25, "M": 1 / 12, "Y": 1.0}


def age_years(header: Dataset) -> float | None:
    """The age in years: Patient's Age, else the time from the birth date to the study; None where neither is told."""
    told = _AGE.fullmatch(_text(header, "PatientAge"))
    if told:
        return int(told[1]) * _YEARS[told[2]]
    born = _date(_text(header, "PatientBirthDate"))
    scanned = next(
        (d for key in ("StudyDate", "SeriesDate", "AcquisitionDate") if (d := _date(_text(header, key)))), None
    )
    if born is None or scanned is None or born > scanned:
        return None
    before_birthday = (scanned.month, scanned.day) < (born.month, born.day)
    return float(scanned.year - born.year - before_birthday)


def _text(header: Dataset, keyword: str) -> str:
    return str(header.get(keyword) or "").strip()


def _date(text: str) -> date | None:
    try:
        return datetime.strptime(text, "%Y%m%d").date()  # VR DA has no time zone
    except ValueError:
        return None
