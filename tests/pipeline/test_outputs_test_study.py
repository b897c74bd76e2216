"""What is made of a generated test study says TEST wherever a viewer shows text; nothing else does."""

from __future__ import annotations

from dataclasses import replace
from io import BytesIO
from pathlib import Path
from uuid import uuid5

from outputs_samples import CREATED, PROVENANCE, source_of, write_sample_ct, write_series
from pydicom import Dataset, dcmread
from test_bad_ct_every_object import OPTIONS, check_with_the_validator, encode_all
from test_outputs_validators import complaints

from pipeline.outputs.attributes import TEST_PATIENT_COMMENTS
from pipeline.outputs.modules import TEST_COMMENTS, described
from pipeline.outputs.rejection_note import RejectionReason, encode_rejection_note, read_rejected_series
from pipeline.provenance import UID_NAMESPACE, ResultUids
from pipeline.types import EncodedSeries, OutputOptions

IMAGES = {"PT", "OT", "SEG"}  # the others have no General Image module (PS3.3 C.7.6.1) and so no ImageComments


def objects(folder: Path, *, test: bool) -> list[Dataset]:
    """Every object of a result, in both encodings, and the rejection note of each series."""
    series = encode_all(write_sample_ct(folder / "ct"), replace(OPTIONS, test=test))
    made = [note_of(one, folder / f"{one.kind}-{one.encoding}", test=test) for one in series]
    return [
        dcmread(BytesIO(instance.data), stop_before_pixels=True)
        for one in (*series, *made)
        for instance in one.instances
    ]


def note_of(one: EncodedSeries, folder: Path, *, test: bool) -> EncodedSeries:
    rejected = read_rejected_series(write_series(one, folder))
    return encode_rejection_note(
        rejected, reason=RejectionReason.QUALITY, description="a sentence", created=CREATED, test=test
    )


def test_every_object_of_a_test_study_says_so_in_its_series_and_its_comments(tmp_path: Path) -> None:
    found = objects(tmp_path, test=True)
    assert {str(ds.Modality) for ds in found} == {*IMAGES, "SR", "PR", "KO"}
    for ds in found:
        assert ds.SeriesDescription.startswith("SYNTHETIC TEST "), ds.Modality
        assert len(ds.SeriesDescription) <= 64, ds.Modality
        assert ds.PatientComments == TEST_PATIENT_COMMENTS, ds.Modality
        assert ("ImageComments" in ds) == (ds.Modality in IMAGES)
        assert "TEST OF THE NODE" in ds.get("ImageComments", TEST_COMMENTS), ds.Modality


def test_no_other_result_says_test(tmp_path: Path) -> None:
    for ds in objects(tmp_path, test=False):
        assert "TEST" not in ds.SeriesDescription + ds.get("ImageComments", "")
        assert "PatientComments" not in ds


def test_the_label_is_in_the_uids_of_a_note_and_leaves_those_of_other_notes_as_they_were(tmp_path: Path) -> None:
    (one, *_) = encode_all(write_sample_ct(tmp_path / "ct"))
    label, none = (note_of(one, tmp_path / str(test), test=test) for test in (True, False))
    assert label.series_uid != none.series_uid
    assert label.instances[0].sop_instance_uid != none.instances[0].sop_instance_uid
    key = f"{one.series_uid}|quality|{CREATED.isoformat()}|rejection_series"
    assert none.series_uid == f"2.25.{uuid5(UID_NAMESPACE, key).int}"


def test_the_labels_are_valid_in_every_object(tmp_path: Path) -> None:
    series = encode_all(write_sample_ct(tmp_path / "ct"), replace(OPTIONS, test=True))
    check_with_the_validator(series, tmp_path / "results")
    note = note_of(series[0], tmp_path / "pet", test=True)
    assert [line for path in write_series(note, tmp_path / "note") for line in complaints(path)] == []


def test_a_long_description_is_cut_and_keeps_both_words() -> None:
    long = "SYNTHETIC " + "X" * 54
    assert described(long, OutputOptions(test=True)) == "SYNTHETIC TEST " + "X" * 49
    assert described(long, OutputOptions()) == long


def test_a_result_that_is_no_test_has_the_uids_of_before_there_were_tests(tmp_path: Path) -> None:
    source = source_of(write_sample_ct(tmp_path))
    uids = ResultUids(source=source, provenance=PROVENANCE, options=OutputOptions(), encoding="sc")
    assert uids.uid("series") == "2.25.126786027256556628007553450255775214663"
