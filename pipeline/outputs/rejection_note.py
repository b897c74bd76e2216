"""A rejection note: the Key Object Selection that tells an archive to hide a series of ours (IHE RAD TF-3, IOCM).

One note rejects one series, names every instance of it, and is an object of the same study in a series of its own
(PS3.3 A.35.4, TID 2010). The series itself is not touched: what its UIDs name stays what it was.
"""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from io import BytesIO
from pathlib import Path
from uuid import uuid5

import highdicom as hd
from pydicom import Dataset, dcmread
from pydicom.errors import InvalidDicomError
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code

from pipeline.ct_reader import quiet_pydicom
from pipeline.errors import OutputError
from pipeline.outputs.attributes import copy_patient_and_study, institution_name, local_moment
from pipeline.outputs.companions import one_instance, stand_in
from pipeline.outputs.explicit import part10
from pipeline.outputs.header import HEADER_FAULTS, clean
from pipeline.outputs.modules import MANUFACTURER, MODEL_NAME, described
from pipeline.provenance import UID_NAMESPACE, software_version
from pipeline.types import EncodedSeries, OutputOptions, SourceInstance, SourceSeries

KIND = "rejection"
SERIES_NUMBER = 9090  # behind all results of ours
SERIES_DESCRIPTION = "SYNTHETIC FDG PET - REJECTED, DO NOT USE"
_UNREADABLE = (EOFError, InvalidDicomError, *HEADER_FAULTS)  # not OSError: the file may be whole, and read later
_NO_POSITION = (0.0, 0.0, 0.0)
# What a note needs of the series that it rejects, and what the white list of all results can copy from it
_KEPT = (
    *("SpecificCharacterSet", "SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID"),
    *("Rows", "Columns", "PatientName", "PatientID", "IssuerOfPatientID", "TypeOfPatientID", "PatientBirthDate"),
    *("PatientSex", "EthnicGroup", "PatientAge", "PatientSize", "PatientWeight", "PatientIdentityRemoved"),
    *("DeidentificationMethod", "DeidentificationMethodCodeSequence", "StudyDate", "StudyTime", "StudyID"),
    *("AccessionNumber", "ReferringPhysicianName", "StudyDescription", "InstitutionName", "TimezoneOffsetFromUTC"),
)


class RejectionReason(StrEnum):
    """Why a series is rejected: the document titles of IOCM (PS3.16 CID 7010) that fit a result of ours."""

    QUALITY = "quality"
    SAFETY = "safety"

    @property
    def document_title(self) -> Code:
        """The coded document title."""
        titles: dict[RejectionReason, Code] = {
            RejectionReason.QUALITY: codes.DCM.RejectedForQualityReasons,
            RejectionReason.SAFETY: codes.DCM.RejectedForPatientSafetyReasons,
        }
        return titles[self]


@dataclass(frozen=True, kw_only=True, slots=True)
class RejectedSeries:
    """A series of ours as a note names it: patient and study of its first instance, and all its instances.

    `header` holds a few attributes of the first instance, no pixel data; it is never logged.
    """

    header: Dataset
    sop_instance_uids: tuple[str, ...]

    @property
    def series_uid(self) -> str:
        return str(self.header.SeriesInstanceUID)

    @property
    def source(self) -> SourceSeries:
        """As the white list of all results takes it."""
        return SourceSeries(
            study_uid=str(self.header.StudyInstanceUID),
            series_uid=self.series_uid,
            header=self.header,
            instances=tuple(
                SourceInstance(
                    sop_class_uid=str(self.header.SOPClassUID), sop_instance_uid=uid, position_mm=_NO_POSITION
                )
                for uid in self.sop_instance_uids
            ),
            earliest_acquisition=("", ""),
        )


def read_rejected_series(paths: Sequence[Path]) -> RejectedSeries:
    """What a note needs of the files of one result series, in sending order.

    Raises:
        OutputError: there is no file, or one that is no DICOM object of the series (code result_unreadable).
        OSError: a file cannot be read now.
    """
    try:
        uids = tuple(str(dcmread(path, specific_tags=["SOPInstanceUID"]).SOPInstanceUID) for path in paths)
        return RejectedSeries(header=_header(paths[0]), sop_instance_uids=uids)
    except _UNREADABLE as error:
        text = f"reading a result series that is rejected: {type(error).__name__} in {len(paths)} files"
        raise OutputError("result_unreadable", text) from error


def _header(file: Path | BytesIO) -> Dataset:
    with quiet_pydicom():
        ds = dcmread(file, stop_before_pixels=True, specific_tags=list(_KEPT))
        return Dataset({elem.tag: elem for elem in ds})


def series_to_json(series: RejectedSeries) -> str:
    """The text that `series_from_json` reads: kept when the files of the series are removed."""
    header = b64encode(part10(series.header)).decode("ascii")  # DICOM JSON would change how a number is written
    return json.dumps({"header": header, "instances": series.sop_instance_uids})


def series_from_json(text: str) -> RejectedSeries:
    """The inverse of `series_to_json`. Raises OutputError (code result_unreadable)."""
    try:
        read = json.loads(text)
        header = _header(BytesIO(b64decode(read["header"], validate=True)))
        return RejectedSeries(header=header, sop_instance_uids=tuple(str(uid) for uid in read["instances"]))
    except _UNREADABLE as error:
        raise OutputError("result_unreadable", "reading what was kept of a result series: it is malformed") from error


def encode_rejection_note(
    rejected: RejectedSeries,
    *,
    reason: RejectionReason,
    description: str,
    created: datetime,
    encoding: str = "kos",
    test: bool = False,
) -> EncodedSeries:
    """The note of one series: one Key Object Selection Document (PS3.3 A.35.4, C.17.6, TID 2010).

    Args:
        rejected: the series; all its instances are referenced.
        reason: the document's title.
        description: a sentence for a person, without patient data: Key Object Description.
        created: aware time of the rejection; part of the UIDs, so that a note written anew has new ones.
        encoding: what the ledger calls this note beside its kind.
        test: of a generated test study: the note says so, and that is part of its UIDs.

    Raises:
        OutputError: the series has no usable study UID (bad_study_uid), or `created` is naive (naive_time).
    """
    source, options = rejected.source, OutputOptions(test=test)
    key = f"{rejected.series_uid}|{reason}|{created.isoformat()}" + ("|test" if test else "")
    now = local_moment(source, created.astimezone() if created.tzinfo else created)
    references = [_reference(rejected, uid) for uid in rejected.sop_instance_uids]

    def uid(what: str) -> str:
        return f"2.25.{uuid5(UID_NAMESPACE, f'{key}|{what}').int}"

    content = hd.ko.KeyObjectSelection(
        document_title=reason.document_title,
        referenced_objects=references,
        observer_device_context=_observer(),
        description=description,
    )
    ds: Dataset = hd.ko.KeyObjectSelectionDocument(
        evidence=references,
        content=content,
        series_instance_uid=uid("rejection_series"),
        series_number=SERIES_NUMBER,
        sop_instance_uid=uid("rejection"),
        instance_number=1,
        manufacturer=MANUFACTURER,
        series_description=described(SERIES_DESCRIPTION, options),
    )
    copy_patient_and_study(ds, source, options)
    del ds.ContributingEquipmentSequence  # highdicom writes itself in, with a time of its own
    ds.SyntheticData = "YES"
    ds.ManufacturerModelName = MODEL_NAME
    ds.SoftwareVersions = clean("LO", software_version())
    if institution := institution_name(source, options):
        ds.InstitutionName = institution
    ds.InstanceCreationDate, ds.InstanceCreationTime = now.date, now.time
    ds.SeriesDate, ds.SeriesTime = now.date, now.time
    ds.ContentDate, ds.ContentTime = now.date, now.time
    return one_instance(ds, source, kind=KIND, encoding=encoding)


def _reference(rejected: RejectedSeries, sop_instance_uid: str) -> Dataset:
    header = rejected.header
    ds = stand_in(
        str(header.StudyInstanceUID),
        sop_class_uid=str(header.SOPClassUID),
        sop_instance_uid=sop_instance_uid,
        series_uid=rejected.series_uid,
    )
    if "Rows" in header and "Columns" in header:  # an image: referenced as IMAGE, else COMPOSITE
        ds.Rows, ds.Columns = header.Rows, header.Columns
    return ds


def _observer() -> hd.sr.ObserverContext:
    """This software rejects, whoever told it to: no person's name goes into the object."""
    return hd.sr.ObserverContext(
        observer_type=codes.DCM.Device,
        observer_identifying_attributes=hd.sr.DeviceObserverIdentifyingAttributes(
            uid=f"2.25.{uuid5(UID_NAMESPACE, 'observer').int}",
            manufacturer_name=MANUFACTURER,
            model_name=MODEL_NAME,
        ),
    )
