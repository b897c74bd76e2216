"""What the objects that highdicom makes have in common: segmentation, measurement report, presentation states.

highdicom takes patient and study over from the objects that it is given. Ours come from somebody else's CT header, so
it gets stand-ins that hold UIDs and sizes only, and the white list of every other result is written afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from pydicom import Dataset

from pipeline.outputs.attributes import (
    copy_patient_and_study,
    institution_name,
    local_moment,
    series_moment,
    set_character_set,
)
from pipeline.outputs.explicit import EXPLICIT_VR_LITTLE_ENDIAN, part10
from pipeline.outputs.header import clean
from pipeline.outputs.modules import HASH_SHOWN, MANUFACTURER, MODEL_NAME
from pipeline.types import EncodedInstance, EncodedSeries, OutputOptions, Provenance, SourceSeries

CONTENT_CREATOR = "SYNPET^AI"
_UNTOLD = ("PatientID", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate", "StudyTime")


def stand_in(study_uid: str, *, sop_class_uid: str, sop_instance_uid: str, series_uid: str) -> Dataset:
    """A data set for highdicom to refer to, without the patient, whose name it would quote in a warning."""
    ds = Dataset()
    ds.PatientName = None
    for keyword in _UNTOLD:
        setattr(ds, keyword, "")
    ds.StudyInstanceUID = clean("UI", study_uid) or "0.0"
    ds.SOPClassUID = sop_class_uid
    ds.SOPInstanceUID = sop_instance_uid
    ds.SeriesInstanceUID = series_uid
    return ds


def stand_ins(source: SourceSeries, series: EncodedSeries, rows: int, columns: int) -> list[Dataset]:
    """A stand-in for every instance of an encoded series of planes."""
    made = []
    for instance in series.instances:
        ds = stand_in(
            source.study_uid,
            sop_class_uid=instance.sop_class_uid,
            sop_instance_uid=instance.sop_instance_uid,
            series_uid=series.series_uid,
        )
        ds.Rows, ds.Columns, ds.SamplesPerPixel = rows, columns, 1
        made.append(ds)
    return made


def equipment(provenance: Provenance) -> dict[str, Any]:
    """The General Equipment module (PS3.3 C.7.5.1) as highdicom's constructors take it."""
    return {
        "manufacturer": MANUFACTURER,
        "manufacturer_model_name": MODEL_NAME,
        "software_versions": clean("LO", provenance.software_version),
        "device_serial_number": provenance.bundle_sha256[:HASH_SHOWN],
    }


def write_common_modules(
    ds: Dataset,
    source: SourceSeries,
    options: OutputOptions,
    created: datetime,
    *,
    contributors: Sequence[Dataset],
) -> None:
    """Patient, study, series and equipment as in every other result, in place of what highdicom wrote.

    Raises OutputError like the PET series (bad_study_uid, naive_time).
    """
    copy_patient_and_study(ds, source, options)
    now, begun = local_moment(source, created), series_moment(source, created)
    ds.SyntheticData = "YES"
    ds.InstanceCreationDate, ds.InstanceCreationTime = now.date, now.time
    ds.SeriesDate, ds.SeriesTime = begun.date, begun.time
    if institution := institution_name(source, options):
        ds.InstitutionName = institution
    ds.ContributingEquipmentSequence = list(contributors)


def one_instance(ds: Dataset, source: SourceSeries, *, kind: str, encoding: str) -> EncodedSeries:
    """The series that holds `ds` alone, encoded."""
    set_character_set(ds, source)
    instance = EncodedInstance(
        sop_class_uid=str(ds.SOPClassUID),
        sop_instance_uid=str(ds.SOPInstanceUID),
        transfer_syntax_uid=EXPLICIT_VR_LITTLE_ENDIAN,
        file_name="0001.dcm",
        data=part10(ds),
    )
    return EncodedSeries(kind=kind, encoding=encoding, series_uid=str(ds.SeriesInstanceUID), instances=(instance,))
