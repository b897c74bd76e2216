"""From the header of a PET series to the factor that turns its rescaled values into body-weight SUV.

The rules are the vendor-neutral ones of the QIBA FDG-PET/CT profile (its pseudo code for SUVbw), the terms those of
PS3.3 C.8.9.1 and C.8.9.2. Nothing is assumed that the header does not say: what is missing is refused by name.

    Units   DecayCorrection   factor
    BQML    START             weight / (activity left at the scan's reference time)
    BQML    ADMIN             weight / injected activity
    CNTS    any but NONE      Philips (7053,1000); else (7053,1009) makes Bq/ml of it, and the rows above follow
    GML     any but NONE      1, if SUVType is BW or absent
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from pydicom import Dataset

from training.errors import StudyError

MAX_DELAY_S = 8 * 3600.0  # F-18 is down to 5 %: nobody images FDG so late; beyond it a date or time is wrong
MIN_INJECTED_BQ = 1e6  # a child gets 26 MBq at least (EANM): a smaller number was not written in Bq
MAX_INJECTED_BQ = 1e10
WEIGHT_KG = (0.5, 500.0)
F18_HALF_LIFE_S = 6586.2
F18_TOLERANCE = 0.02  # headers hold 6582 to 6588; 109.8 (minutes) or another nuclide's is far off
F18_CODES = {"77004003", "C-111A1"}  # SCT and SRT, CID 4020
GE_CREATOR, GE_SCAN_DATETIME = "GEMS_PETD_01", (0x0009, 0x0D)
PHILIPS_CREATOR, PHILIPS_SUV, PHILIPS_BQML = "Philips PET Private Group", (0x7053, 0x00), (0x7053, 0x09)

_DT = re.compile(r"(\d{8})(\d{2,6})(\.\d{1,6})?([+-]\d{4})?")
_TM = re.compile(r"(\d{2,6})(\.\d{1,6})?")
_ZONE = re.compile(r"[+-]\d{4}")


@dataclass(frozen=True, kw_only=True, slots=True)
class SuvScale:
    """`factor` times a rescaled value is g/ml; the rest says by which rule, for the record."""

    factor: float
    rule: str
    units: str
    decay_correction: str
    delay_s: float | None = None  # from injection to the time that the values are corrected to
    scan_time: str = ""  # where that time was found
    injection_time: str = ""
    injected_bq: float | None = None
    half_life_s: float | None = None
    weight_kg: float | None = None
    notes: tuple[str, ...] = ()

    def record(self) -> dict[str, Any]:
        """Everything that applies, as plain values for JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items() if v not in (None, "", ())}


def suv_scale(ds: Dataset, *, earliest_acquisition: datetime | None = None) -> SuvScale:
    """The factor of the series that `ds` is an instance of.

    Args:
        ds: the header of any instance, private elements included.
        earliest_acquisition: the first acquisition time of all instances; None takes that of `ds`.

    Raises:
        StudyError: suv_not_corrected, suv_units, suv_type, suv_decay, suv_time, suv_dose, suv_half_life, suv_weight,
            weight_missing.
    """
    _check_corrected(ds)
    units, decay = _text(ds, "Units"), _text(ds, "DecayCorrection")
    if decay == "NONE":
        raise StudyError("suv_decay", "PET: DecayCorrection is NONE, START or ADMIN is needed for an SUV")
    if units == "GML":
        return _from_gml(ds, decay)
    if units == "CNTS":
        return _from_counts(ds, decay, earliest_acquisition)
    if units == "BQML":
        return _from_activity(ds, "BQML", decay, earliest_acquisition)
    raise StudyError("suv_units", f"PET: Units are {units or 'not given'}, one of BQML, CNTS, GML is expected")


def _check_corrected(ds: Dataset) -> None:
    terms = [str(term).strip().upper() for term in _values(ds, "CorrectedImage")]
    missing = [term for term in ("ATTN", "DECY") if term not in terms]
    if missing:
        found = "\\".join(terms) or "nothing"
        text = f"PET: CorrectedImage names {found}; {' and '.join(missing)} must be among it for an SUV"
        raise StudyError("suv_not_corrected", text)


def _from_gml(ds: Dataset, decay: str) -> SuvScale:
    """g/ml already; lean-body-mass and surface SUV share the unit (PS3.3 C.8.9.1, SUV Type)."""
    kind = _text(ds, "SUVType")
    if kind not in ("", "BW"):
        raise StudyError("suv_type", f"PET: Units are GML with SUVType {kind}, BW is expected")
    return SuvScale(factor=1.0, rule="GML: values are SUV", units="GML", decay_correction=decay)


def _from_counts(ds: Dataset, decay: str, earliest: datetime | None) -> SuvScale:
    factor = _private_number(ds, PHILIPS_CREATOR, PHILIPS_SUV)
    if factor:
        rule = "CNTS: Philips (7053,1000) counts to SUV"
        return SuvScale(factor=factor, rule=rule, units="CNTS", decay_correction=decay)
    to_bqml = _private_number(ds, PHILIPS_CREATOR, PHILIPS_BQML)
    if not to_bqml:
        text = "PET: Units are CNTS and neither (7053,1000) nor (7053,1009) of Philips says what a count is"
        raise StudyError("suv_units", text)
    return _from_activity(ds, "CNTS", decay, earliest, to_bqml)


def _from_activity(ds: Dataset, units: str, decay: str, earliest: datetime | None, to_bqml: float = 1.0) -> SuvScale:
    """Bq/ml, `to_bqml` for one of what is stored: weight over the activity that the values refer to."""
    if decay not in ("START", "ADMIN"):
        raise StudyError("suv_decay", f"PET: DecayCorrection is {decay or 'not given'}, START or ADMIN is expected")
    weight_kg = _weight(ds)
    medicine = _medicine(ds)
    injected_bq = _injected(medicine)
    prefix = f"{units}: " + ("Philips (7053,1009) counts to Bq/ml, " if units == "CNTS" else "")
    scale = SuvScale(
        factor=to_bqml * weight_kg * 1000 / injected_bq,
        rule=f"{prefix}ADMIN, no decay to undo",
        units=units,
        decay_correction=decay,
        injected_bq=injected_bq,
        weight_kg=weight_kg,
    )
    if decay == "ADMIN":
        return scale
    half_life_s = _half_life(medicine)
    scan, scan_from = scan_moment(ds, earliest)
    delay_s, injection_from, notes = _delay(ds, medicine, scan)
    return replace(
        scale,
        factor=scale.factor * 2.0 ** (delay_s / half_life_s),  # less activity is left: the same uptake reads lower
        rule=f"{prefix}START, decay from injection to the scan",
        delay_s=delay_s,
        scan_time=scan_from,
        injection_time=injection_from,
        half_life_s=half_life_s,
        notes=notes,
    )


def scan_moment(ds: Dataset, earliest: datetime | None = None) -> tuple[datetime, str]:
    """The time that START refers to, and where it was found.

    The series time, unless it is later than the first acquisition: then the series was processed again, and GE's
    private scan time or else the first acquisition counts. Raises StudyError: suv_time.
    """
    acquired = earliest or moment(_text(ds, "AcquisitionDate"), _text(ds, "AcquisitionTime"))
    series = moment(_text(ds, "SeriesDate"), _text(ds, "SeriesTime"))
    if series is not None and (acquired is None or series <= acquired):
        return series, "SeriesTime"
    private = _date_time(_private_text(ds, GE_CREATOR, GE_SCAN_DATETIME), _text(ds, "TimezoneOffsetFromUTC"))
    if private is not None:
        return private, "GE (0009,100D)"
    if acquired is not None:
        return acquired, "AcquisitionTime of the first slice"
    raise StudyError("suv_time", "PET: neither series nor acquisition has a date and a time to count the decay to")


def _delay(ds: Dataset, medicine: Dataset, scan: datetime) -> tuple[float, str, tuple[str, ...]]:
    """Seconds from injection to `scan`, where the injection's time was found, and notes.

    A start time without a date is of the scan's day, or of the day before when it would be later (midnight). The
    same holds where the full date and time cannot be true, as when only one of two dates was shifted to de-identify.
    """
    full = _date_time(_text(medicine, "RadiopharmaceuticalStartDateTime"), _text(ds, "TimezoneOffsetFromUTC"))
    delay = None if full is None else (scan - full).total_seconds()
    if delay is not None and 0 <= delay <= MAX_DELAY_S:
        return delay, "RadiopharmaceuticalStartDateTime", ()
    time = moment(f"{scan:%Y%m%d}", _text(medicine, "RadiopharmaceuticalStartTime"))
    if time is None:
        if delay is None:
            raise StudyError("suv_time", "PET: the time of injection (RadiopharmaceuticalStart[Date]Time) is missing")
        raise _implausible(delay)
    crossed = time > scan
    by_time = (scan - time + timedelta(days=int(crossed))).total_seconds()
    if by_time > MAX_DELAY_S:
        raise _implausible(by_time if delay is None else delay)
    notes = ("injected before midnight of the scan's day",) if crossed and delay is None else ()
    if delay is not None:
        notes = (f"the dates put the injection {delay / 3600:.1f} h before the scan: only its time of day was used",)
    return by_time, "RadiopharmaceuticalStartTime", notes


def _implausible(delay_s: float) -> StudyError:
    text = f"PET: the scan is {delay_s / 3600:.1f} h after the injection, 0 to {MAX_DELAY_S / 3600:.0f} h are expected"
    return StudyError("suv_time", text)


def _weight(ds: Dataset) -> float:
    weight = _number(ds, "PatientWeight")
    if not weight:
        raise StudyError("weight_missing", f"PET: PatientWeight is {'missing' if weight is None else 0}, kg are needed")
    if not WEIGHT_KG[0] <= weight <= WEIGHT_KG[1]:
        raise StudyError(
            "suv_weight", f"PET: PatientWeight is {weight:g}, {WEIGHT_KG[0]} to {WEIGHT_KG[1]} kg expected"
        )
    return weight


def _medicine(ds: Dataset) -> Dataset:
    items = _values(ds, "RadiopharmaceuticalInformationSequence")
    if not items:
        raise StudyError("suv_dose", "PET: RadiopharmaceuticalInformationSequence is missing: no injected activity")
    if len(items) > 1:
        text = f"PET: {len(items)} radiopharmaceuticals are named, an SUV is defined for one"
        raise StudyError("suv_dose", text)
    item: Dataset = items[0]
    return item


def _injected(medicine: Dataset) -> float:
    injected = _number(medicine, "RadionuclideTotalDose")
    if not injected:
        text = f"PET: RadionuclideTotalDose is {'missing' if injected is None else 0}, Bq are needed"
        raise StudyError("suv_dose", text)
    if not MIN_INJECTED_BQ <= injected <= MAX_INJECTED_BQ:
        text = f"PET: RadionuclideTotalDose is {injected:g}, which is no injected activity in Bq (in MBq perhaps?)"
        raise StudyError("suv_dose", text)
    return injected


def _half_life(medicine: Dataset) -> float:
    half_life = _number(medicine, "RadionuclideHalfLife")
    if not half_life or half_life < 0:
        raise StudyError("suv_half_life", "PET: RadionuclideHalfLife is missing, seconds are needed")
    codes = {_text(item, "CodeValue") for item in _values(medicine, "RadionuclideCodeSequence")}
    if (codes & F18_CODES or not codes) and abs(half_life / F18_HALF_LIFE_S - 1) > F18_TOLERANCE:
        text = f"PET: RadionuclideHalfLife is {half_life:g} s for F-18, {F18_HALF_LIFE_S} s are expected"
        raise StudyError("suv_half_life", text)
    return half_life


def moment(date: str, time: str) -> datetime | None:
    """DA and TM (PS3.5 table 6.2-1; the old `1999.12.31` and `23:59` too) as a local time; None if there is none."""
    date, time = date.replace(".", "").replace("-", ""), time.replace(":", "")
    found = _TM.fullmatch(time)
    if not re.fullmatch(r"\d{8}", date) or found is None or len(found[1]) % 2:
        return None
    digits, fraction = found[1].ljust(6, "0"), (found[2] or ".0")[1:].ljust(6, "0")
    try:
        return datetime.strptime(date + digits + fraction, "%Y%m%d%H%M%S%f")
    except ValueError:
        return None


def _date_time(text: str, zone: str) -> datetime | None:
    """DT as a time of the data set's own zone; without one (0008,0201) the suffix is the zone of all its times."""
    found = _DT.fullmatch(text)
    local = None if found is None else moment(found[1], found[2] + (found[3] or ""))
    if found is None or local is None or not found[4] or not _ZONE.fullmatch(zone):
        return local
    return local - _offset(found[4]) + _offset(zone)


def _offset(zone: str) -> timedelta:
    size = timedelta(hours=int(zone[1:3]), minutes=int(zone[3:]))
    return -size if zone[0] == "-" else size


def _values(ds: Dataset, keyword: str) -> list[Any]:
    """All values as a list; a malformed value counts as absent and is reported where it is needed."""
    try:
        value = ds.get(keyword)
    except (ValueError, TypeError, NotImplementedError, OverflowError):
        return []
    if value is None or value == "":
        return []
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str | bytes) else [value]


def _text(ds: Dataset, keyword: str) -> str:
    values = _values(ds, keyword)
    return str(values[0]).strip().upper() if values else ""


def _number(ds: Dataset, keyword: str) -> float | None:
    """A finite number, or None. A negative weight or dose is none, too: it is refused as such by its range."""
    return _finite(_text(ds, keyword))


def _finite(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _private_text(ds: Dataset, creator: str, place: tuple[int, int]) -> str:
    """A private element by its creator (PS3.5 section 7.8), also where its VR was lost and it is bytes."""
    try:
        value = ds.private_block(place[0], creator)[place[1]].value
    except (KeyError, ValueError, TypeError):
        return ""
    if isinstance(value, bytes):
        value = value.decode("ascii", "replace")
    return str(value).strip(" \0")


def _private_number(ds: Dataset, creator: str, place: tuple[int, int]) -> float | None:
    number = _finite(_private_text(ds, creator, place))
    return number if number is not None and number > 0 else None
