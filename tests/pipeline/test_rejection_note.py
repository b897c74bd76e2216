"""The Key Object Selection that rejects a series: valid, complete, of the same study, and without pixels."""

from __future__ import annotations

import errno
import subprocess
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from outputs_samples import CREATED, STUDY_UID, Sample, read_back, sample_suv, source_of, write_sample_ct, write_series
from pydicom import Dataset
from pydicom.uid import KeyObjectSelectionDocumentStorage
from test_outputs_validators import complaints, tool

from pipeline.errors import OutputError
from pipeline.outputs import rejection_note
from pipeline.outputs.rejection_note import (
    KIND,
    RejectedSeries,
    RejectionReason,
    encode_rejection_note,
    read_rejected_series,
    series_from_json,
    series_to_json,
)
from pipeline.types import EncodedSeries

JAPANESE = "Yamada^Tarou=山田^太郎=やまだ^たろう"


@pytest.fixture(params=["sc", "pet"])
def pet(request: pytest.FixtureRequest, tmp_path: Path) -> EncodedSeries:
    def named(ds: Dataset, _: int) -> None:
        ds.SpecificCharacterSet = "ISO_IR 192"
        ds.PatientName = JAPANESE

    paths = write_sample_ct(tmp_path / "ct", modify=named)
    return Sample(source=source_of(paths), suv=sample_suv()).pet(request.param)


@pytest.fixture
def rejected(pet: EncodedSeries, tmp_path: Path) -> RejectedSeries:
    return read_rejected_series(write_series(pet, tmp_path / "pet"))


def note(rejected: RejectedSeries, **changes: object) -> Dataset:
    given = {"reason": RejectionReason.QUALITY, "description": "replaced by a later series", "created": CREATED}
    (ds,) = read_back(encode_rejection_note(rejected, **{**given, **changes}))
    return ds


def test_a_note_names_every_instance_of_the_series_and_no_other(pet: EncodedSeries, rejected: RejectedSeries) -> None:
    ds = note(rejected)
    (study,) = ds.CurrentRequestedProcedureEvidenceSequence
    (series,) = study.ReferencedSeriesSequence
    sent = [(i.sop_class_uid, i.sop_instance_uid) for i in pet.instances]
    assert (study.StudyInstanceUID, series.SeriesInstanceUID) == (STUDY_UID, pet.series_uid)
    assert [(r.ReferencedSOPClassUID, r.ReferencedSOPInstanceUID) for r in series.ReferencedSOPSequence] == sent
    named = [i.ReferencedSOPSequence[0].ReferencedSOPInstanceUID for i in ds.ContentSequence if i.ValueType == "IMAGE"]
    assert named == [uid for _, uid in sent]


def test_a_note_is_an_object_of_the_same_patient_and_study_in_a_series_of_its_own(
    pet: EncodedSeries, rejected: RejectedSeries
) -> None:
    ds, image = note(rejected), read_back(pet)[0]
    for keyword in ("PatientName", "PatientID", "PatientBirthDate", "StudyInstanceUID", "StudyDate", "AccessionNumber"):
        assert ds[keyword].value == image[keyword].value, keyword
    assert ds.SOPClassUID == KeyObjectSelectionDocumentStorage
    assert ds.SeriesInstanceUID != image.SeriesInstanceUID
    assert (ds.Modality, ds.SyntheticData) == ("KO", "YES")
    assert str(ds.PatientName) == JAPANESE


@pytest.mark.parametrize(("reason", "code"), [("quality", "113001"), ("safety", "113037")])
def test_the_reason_is_the_documents_title(rejected: RejectedSeries, reason: str, code: str) -> None:
    title = note(rejected, reason=RejectionReason(reason)).ConceptNameCodeSequence[0]
    assert (title.CodeValue, title.CodingSchemeDesignator) == (code, "DCM")


def test_a_validator_finds_no_fault(rejected: RejectedSeries, tmp_path: Path) -> None:
    for reason in RejectionReason:
        made = encode_rejection_note(rejected, reason=reason, description="recalled", created=CREATED)
        (path,) = write_series(made, tmp_path / reason)
        assert complaints(path) == []


def test_a_study_with_its_note_agrees_with_itself(pet: EncodedSeries, rejected: RejectedSeries, tmp_path: Path) -> None:
    made = encode_rejection_note(rejected, reason=RejectionReason.QUALITY, description="recalled", created=CREATED)
    note_files = write_series(made, tmp_path / "note")
    files = [*sorted((tmp_path / "ct").iterdir()), *sorted((tmp_path / "pet").iterdir()), *note_files]
    done = subprocess.run([tool("dcentvfy"), *map(str, files)], capture_output=True, text=True, timeout=60)
    # of a document dcentvfy takes the study's accession number for one of its series, whatever is written
    known = "attribute - Element=<AccessionNumber> IE <Series> versus <Study>"
    assert [line for line in (done.stdout + done.stderr).splitlines() if line and known not in line] == []


def test_the_same_rejection_is_the_same_bytes_and_another_one_has_other_uids(rejected: RejectedSeries) -> None:
    def encoded(**changes: object) -> EncodedSeries:
        given = {"reason": RejectionReason.QUALITY, "description": "recalled", "created": CREATED}
        return encode_rejection_note(rejected, **{**given, **changes})

    assert encoded() == encoded()
    others = [encoded(reason=RejectionReason.SAFETY), encoded(created=CREATED + timedelta(seconds=1))]
    assert len({one.instances[0].sop_instance_uid for one in [encoded(), *others]}) == 3


def test_what_is_kept_of_a_series_makes_the_same_note(rejected: RejectedSeries) -> None:
    kept = series_from_json(series_to_json(rejected))
    assert kept.sop_instance_uids == rejected.sop_instance_uids
    given = {"reason": RejectionReason.QUALITY, "description": "recalled", "created": CREATED}
    assert encode_rejection_note(kept, **given) == encode_rejection_note(rejected, **given)
    assert "PixelData" not in kept.header


def test_an_object_that_is_no_image_is_referenced_as_a_composite_object(rejected: RejectedSeries) -> None:
    header = Dataset(rejected.header)
    header.SOPClassUID = "1.2.840.10008.5.1.4.1.1.88.34"  # Comprehensive 3D SR
    del header.Rows, header.Columns
    ds = note(replace(rejected, header=header))
    kinds = [item.ValueType for item in ds.ContentSequence if "ReferencedSOPSequence" in item]
    assert set(kinds) == {"COMPOSITE"}


def test_files_that_are_no_series_are_refused_by_code(tmp_path: Path) -> None:
    broken = tmp_path / "0001.dcm"
    broken.write_bytes(b"x" * 200)
    for paths in ([], [broken]):
        with pytest.raises(OutputError) as refused:
            read_rejected_series(paths)
        assert refused.value.code == "result_unreadable"
    with pytest.raises(OutputError):
        series_from_json("{}")


def test_a_time_without_a_zone_is_refused(rejected: RejectedSeries) -> None:
    with pytest.raises(OutputError) as refused:
        note(rejected, created=datetime(2024, 5, 6))
    assert refused.value.code == "naive_time"


def test_the_kind_is_the_ledgers_word(rejected: RejectedSeries) -> None:
    made = encode_rejection_note(
        rejected, reason=RejectionReason.QUALITY, description="recalled", created=CREATED, encoding="kos-x"
    )
    assert (made.kind, made.encoding, len(made.instances)) == (KIND, "kos-x", 1)


def test_a_file_that_cannot_be_read_now_is_not_called_malformed(
    pet: EncodedSeries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = write_series(pet, tmp_path / "pet")
    opened = rejection_note.dcmread
    times: list[Path] = []

    def too_many_files(path: Path, **options: object) -> Dataset:
        times.append(path)
        if len(times) == 2:
            raise OSError(errno.EMFILE, "Too many open files")
        return opened(path, **options)

    monkeypatch.setattr(rejection_note, "dcmread", too_many_files)
    with pytest.raises(OSError, match="Too many open files"):
        read_rejected_series(paths)
    assert read_rejected_series(paths).series_uid == pet.series_uid
    paths[0].write_bytes(b"no DICOM")
    with pytest.raises(OutputError) as found:
        read_rejected_series(paths)
    assert found.value.code == "result_unreadable"
