"""What is made of a generated test study says TEST wherever a viewer shows text; nothing else does."""

from __future__ import annotations

from dataclasses import replace
from io import BytesIO
from pathlib import Path

from outputs_samples import PROVENANCE, source_of, write_sample_ct
from pydicom import dcmread
from test_bad_ct_every_object import OPTIONS, encode_all

from pipeline.outputs.modules import described
from pipeline.provenance import ResultUids
from pipeline.types import OutputOptions


def texts(folder: Path, *, test: bool) -> list[tuple[str, str, str]]:
    """Modality, series description and image comments of one instance of each series."""
    found = []
    for one in encode_all(write_sample_ct(folder), replace(OPTIONS, test=test)):
        ds = dcmread(BytesIO(one.instances[0].data), stop_before_pixels=True)
        found.append((str(ds.Modality), str(ds.SeriesDescription), str(ds.get("ImageComments", ""))))
    return found


def test_every_series_of_a_test_study_says_so(tmp_path: Path) -> None:
    found = texts(tmp_path, test=True)
    assert {modality for modality, _, _ in found} >= {"PT", "OT", "SEG", "SR", "PR"}
    assert all(description.startswith("SYNTHETIC TEST ") for _, description, _ in found)
    assert all(len(description) <= 64 for _, description, _ in found)
    assert all(comments.startswith("TEST ") for modality, _, comments in found if modality == "PT")


def test_no_other_result_says_test(tmp_path: Path) -> None:
    assert not any("TEST" in description + comments for _, description, comments in texts(tmp_path, test=False))


def test_a_long_description_is_cut_and_keeps_both_words() -> None:
    long = "SYNTHETIC " + "X" * 54
    assert described(long, OutputOptions(test=True)) == "SYNTHETIC TEST " + "X" * 49
    assert described(long, OutputOptions()) == long


def test_a_result_that_is_no_test_has_the_uids_of_before_there_were_tests(tmp_path: Path) -> None:
    source = source_of(write_sample_ct(tmp_path))
    uids = ResultUids(source=source, provenance=PROVENANCE, options=OutputOptions(), encoding="sc")
    assert uids.uid("series") == "2.25.126786027256556628007553450255775214663"
