"""What the result takes over from the CT header: a white list, attribute by attribute.

The result belongs to the CT's patient, study and frame of reference, and to nothing else of it: no scanner, no
exposure, no protocol, no private group, no text of the CT series. An attribute that this module does not name is
not copied.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone

from pydicom import Dataset

from pipeline.errors import OutputError
from pipeline.outputs.codes import PATIENT_POSITIONS, RECUMBENT, code_item
from pipeline.outputs.header import (
    HEADER_FAULTS,
    character_set,
    clean,
    clean_value,
    fits,
    items_of,
    text_of,
)
from pipeline.types import OutputOptions, SourceSeries

# Of every object of a test study, the generated CT too: tools find a study whose objects disagree on its patient
TEST_PATIENT_COMMENTS = "TEST: a generated phantom of dicom-node doctor, not a patient"

UTF_8, DEFAULT_REPERTOIRE = "ISO_IR 192", "ISO_IR 6"
TAKEN_SERIES_NUMBER_STEP = 100

# An identifier that does not fit is left out: one that was cut would name somebody or something else.
IDENTIFIERS = frozenset({"PatientID", "IssuerOfPatientID", "AccessionNumber", "StudyID"})


@dataclass(frozen=True)
class Copied:
    """One attribute of the white list; Type 2 is written empty where the CT has no usable value, Type 3 not at all."""

    keyword: str
    type_2: bool = False


PATIENT = (
    Copied("PatientName", type_2=True),
    Copied("PatientID", type_2=True),
    Copied("IssuerOfPatientID"),
    Copied("TypeOfPatientID"),
    Copied("PatientBirthDate", type_2=True),
    Copied("PatientSex", type_2=True),
    Copied("EthnicGroup"),  # of the patient, not of a series: dcentvfy finds a study whose series disagree on it
)
STUDY = (
    Copied("StudyDate", type_2=True),
    Copied("StudyTime", type_2=True),
    Copied("AccessionNumber", type_2=True),
    Copied("ReferringPhysicianName", type_2=True),
    Copied("StudyID", type_2=True),
    Copied("StudyDescription"),
    Copied("PatientAge"),
)
# Allowed values and plausible ranges, beyond what the VR asks. A weight of 0 would be divided by.
ENUMERATED = {"PatientSex": {"M", "F", "O"}, "TypeOfPatientID": {"TEXT", "RFID", "BARCODE"}}
RANGES = {"PatientWeight": (0.1, 1000.0), "PatientSize": (0.1, 3.0)}  # kg, m

# The terms of PS3.16 annex L for unpaired regions that a CT series may name
UNPAIRED_BODY_PARTS = frozenset(
    {"ABDOMEN", "ABDOMENPELVIS", "AORTA", "BLADDER", "BRAIN", "CHEST", "CHESTABDOMEN", "CHESTABDPELVIS", "COLON"}
    | {"CSPINE", "HEAD", "HEADNECK", "HEART", "LIVER", "LSPINE", "MEDIASTINUM", "NECK", "NECKCHEST"}
    | {"NECKCHESTABDOMEN", "NECKCHESTABDPELV", "PANCREAS", "PELVIS", "SKULL", "SPINE", "SPLEEN", "SSPINE"}
    | {"STOMACH", "TSPINE", "WHOLEBODY"}
)
BODY_PART_SYNONYMS = {"THORAX": "CHEST", "BODY": "WHOLEBODY", "LUNG": "CHEST", "LUNGS": "CHEST"}

# Lossy transfer syntax -> LossyImageCompressionMethod (PS3.3 C.7.6.1.1.5.1)
LOSSY_METHODS = {
    "1.2.840.10008.1.2.4.50": "ISO_10918_1",
    "1.2.840.10008.1.2.4.51": "ISO_10918_1",
    "1.2.840.10008.1.2.4.81": "ISO_14495_1",
    "1.2.840.10008.1.2.4.91": "ISO_15444_1",
    "1.2.840.10008.1.2.4.203": "ISO_15444_15",
}


@dataclass(frozen=True)
class Moment:
    """A DICOM date (DA) and time (TM) of the same clock."""

    date: str
    time: str

    @property
    def date_time(self) -> str:
        return self.date + self.time


def copy_patient_and_study(ds: Dataset, source: SourceSeries, options: OutputOptions) -> None:
    """Write the Patient, General Study and Patient Study modules (PS3.3 C.7.1.1, C.7.2.1, C.7.2.2) into `ds`.

    Weight and size are copied, never invented; comments are written for a test study alone. Raises OutputError where
    the study has no usable UID.
    """
    header = source.header
    study_uid = clean("UI", source.study_uid)
    if not study_uid:
        raise OutputError("bad_study_uid", "writing the result series: the CT's StudyInstanceUID is not a UID")
    ds.StudyInstanceUID = study_uid
    for copied in (*PATIENT, *STUDY):
        _copy(ds, header, copied)
    for keyword, (low, high) in RANGES.items():
        number = clean_value(header, keyword)
        if number and low <= float(number) <= high and not (keyword == "PatientSize" and options.omit_patient_size):
            setattr(ds, keyword, number)
    if options.test:  # the one text that also reports, presentation states and notes have a place for
        ds.PatientComments = TEST_PATIENT_COMMENTS
    _copy_deidentification(ds, header)
    offset = clean_value(header, "TimezoneOffsetFromUTC")
    if _utc_offset(offset) is not None:
        ds.TimezoneOffsetFromUTC = offset  # without it the copied times would mean something else


def copy_position_reference(ds: Dataset, source: SourceSeries) -> None:
    """PositionReferenceIndicator (Type 2) of the Frame of Reference module (PS3.3 C.7.4.1)."""
    ds.PositionReferenceIndicator = clean_value(source.header, "PositionReferenceIndicator")


def copy_lossy_history(ds: Dataset, source: SourceSeries) -> None:
    """LossyImageCompression and, if 01, ratio and method: a lossy source makes a lossy result (PS3.3 C.7.6.1.1.5)."""
    header = source.header
    if not (source.lossy or clean_value(header, "LossyImageCompression") == "01"):
        ds.LossyImageCompression = "00"
        return
    ds.LossyImageCompression = "01"
    ratios = [clean("DS", part) for part in text_of(header, "LossyImageCompressionRatio").split("\\")]
    methods = [clean("CS", part) for part in text_of(header, "LossyImageCompressionMethod").split("\\")]
    if not all(methods):
        method = LOSSY_METHODS.get(_transfer_syntax(header), "")
        methods = [method] if method else []
    if ratios and all(ratios):
        ds.LossyImageCompressionRatio = ratios
    if methods:
        ds.LossyImageCompressionMethod = methods


def copy_patient_orientation(ds: Dataset, source: SourceSeries, options: OutputOptions) -> None:
    """The NM/PET Patient Orientation module (PS3.3 C.8.4.6) from the CT's PatientPosition; unknown: empty.

    PatientPosition itself is only written where a site asks for it: the standard forbids it beside the codes.
    """
    position = clean_value(source.header, "PatientPosition")
    known = PATIENT_POSITIONS.get(position)
    ds.PatientOrientationCodeSequence = []
    ds.PatientGantryRelationshipCodeSequence = []
    if known is not None:
        posture, gantry = known
        orientation = code_item(RECUMBENT)
        orientation.PatientOrientationModifierCodeSequence = [code_item(posture)]
        ds.PatientOrientationCodeSequence = [orientation]
        ds.PatientGantryRelationshipCodeSequence = [code_item(gantry)]
    if options.emit_patient_position and position:
        ds.PatientPosition = position


def body_part_examined(source: SourceSeries) -> str:
    """The CT's BodyPartExamined where it is a standard term for an unpaired region, else WHOLEBODY.

    Every other term, and none, would make Laterality (0020,0060) a required attribute (PS3.3 C.7.3.1).
    """
    term = clean_value(source.header, "BodyPartExamined").replace(" ", "")
    term = BODY_PART_SYNONYMS.get(term, term)
    return term if term in UNPAIRED_BODY_PARTS else "WHOLEBODY"


def institution_name(source: SourceSeries, options: OutputOptions) -> str:
    """The configured name, else the CT's, else ""."""
    return clean("LO", options.institution_name) or clean_value(source.header, "InstitutionName")


def free_series_number(wanted: int, source: SourceSeries) -> int:
    """`wanted`, or 100 more where the CT series has that number."""
    taken = clean_value(source.header, "SeriesNumber")
    return wanted + TAKEN_SERIES_NUMBER_STEP if taken and int(taken) == wanted else wanted


def series_moment(source: SourceSeries, created: datetime) -> Moment:
    """When the represented "scan" began: the CT's earliest acquisition.

    Else the CT's SeriesDate and time, else its StudyDate and time, else the day of `created`; a date without a usable
    time gets 000000. Never the job's clock while the CT has a date: SUV code compares this with the injection.
    """
    header = source.header
    candidates = [source.earliest_acquisition]
    candidates += [(text_of(header, f"{level}Date"), text_of(header, f"{level}Time")) for level in ("Series", "Study")]
    for date_text, time_text in candidates:
        if date := clean("DA", date_text):
            return Moment(date, _whole_time(clean("TM", time_text)))
    return Moment(local_moment(source, created).date, "000000")


def local_moment(source: SourceSeries, created: datetime) -> Moment:
    """`created` as DA and TM, in the CT's TimezoneOffsetFromUTC if it has one, else in its own time zone.

    Raises OutputError for a naive time.
    """
    if created.tzinfo is None:
        raise OutputError("naive_time", "writing the result series: the creation time has no time zone")
    offset = _utc_offset(clean_value(source.header, "TimezoneOffsetFromUTC"))
    local = created if offset is None else created.astimezone(timezone(offset))
    return Moment(local.strftime("%Y%m%d"), local.strftime("%H%M%S.%f"))


def set_character_set(ds: Dataset, source: SourceSeries) -> None:
    """SpecificCharacterSet: UTF-8 if any text of `ds` is not ASCII, else as the CT has it (PS3.3 C.12.1.1.2).

    "ISO_IR 6" is what its absence means, and no term of its own: it is not written.
    """
    if any(not _is_ascii(elem.value) for elem in ds.iterall() if elem.VR in ("LO", "LT", "PN", "SH", "ST", "UC", "UT")):
        ds.SpecificCharacterSet = UTF_8
    elif (terms := character_set(source.header)) not in ([], [DEFAULT_REPERTOIRE]):
        ds.SpecificCharacterSet = terms if len(terms) > 1 else terms[0]


def _copy(ds: Dataset, header: Dataset, copied: Copied) -> None:
    keyword = copied.keyword
    value = clean_value(header, keyword)
    if keyword in IDENTIFIERS and not fits(_identifier_vr(keyword), text_of(header, keyword).split("\\", 1)[0]):
        value = ""
    if keyword in ENUMERATED and value not in ENUMERATED[keyword]:
        value = ""
    if value or copied.type_2:
        setattr(ds, keyword, value)


def _identifier_vr(keyword: str) -> str:
    return "LO" if keyword in ("PatientID", "IssuerOfPatientID") else "SH"


def _copy_deidentification(ds: Dataset, header: Dataset) -> None:
    removed = clean_value(header, "PatientIdentityRemoved")
    if removed not in ("YES", "NO"):
        return
    ds.PatientIdentityRemoved = removed
    methods = [m for part in text_of(header, "DeidentificationMethod").split("\\") if (m := clean("LO", part))]
    coded = [item for raw in items_of(header, "DeidentificationMethodCodeSequence") if (item := _copied_code(raw))]
    if coded:
        ds.DeidentificationMethodCodeSequence = coded
    if not methods and not coded and removed == "YES":
        methods = ["As in the source CT series"]  # Type 1C: one of the two must be there
    if methods:
        ds.DeidentificationMethod = methods


def _copied_code(raw: Dataset) -> Dataset | None:
    item = Dataset()
    for keyword in ("CodeValue", "CodingSchemeDesignator", "CodeMeaning"):
        try:
            value = clean_value(raw, keyword)
        except HEADER_FAULTS:
            return None
        if not value:
            return None
        setattr(item, keyword, value)
    return item


def _transfer_syntax(header: Dataset) -> str:
    meta = getattr(header, "file_meta", None)
    return text_of(meta, "TransferSyntaxUID") if isinstance(meta, Dataset) else ""


def _whole_time(time: str) -> str:
    """HH or HHMM filled up to HHMMSS: SUV code reads fixed places."""
    return time if len(time) >= 6 else time.ljust(6, "0")


def _utc_offset(text: str) -> timedelta | None:
    parts = re.fullmatch(r"([+-])(\d\d)([0-5]\d)", text, re.ASCII)
    if not parts:
        return None
    minutes = int(parts[2]) * 60 + int(parts[3])
    if minutes > 14 * 60:
        return None
    return timedelta(minutes=-minutes if parts[1] == "-" else minutes)


def _is_ascii(value: object) -> bool:
    if value is None:
        return True
    if isinstance(value, (list, tuple)) or (hasattr(value, "__iter__") and not hasattr(value, "encode")):
        return all(_is_ascii(part) for part in value)
    return str(value).isascii()
