"""A companion that cannot be written never costs the PET series."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from outputs_samples import CREATED, Sample, header_only, sample_suv
from test_output_seg import district_map
from tiny_bundle import write_tiny_bundle
from tiny_study import write_tiny_study

from pipeline.bundle import load_bundle
from pipeline.errors import OutputError
from pipeline.outputs import encoding
from pipeline.outputs.statistics import district_stats
from pipeline.run import read_summary, synthesize_series, write_result
from pipeline.types import EncodedSeries, GateOptions, OutputOptions, PipelineOptions, SuvVolume

ALL = OutputOptions(encodings=("sc", "pet"), mip=True, seg=True, uncertainty=True, sr=True, presentation_states=True)
WRITERS = {
    "encode_mip": {"mip"},
    "encode_district_seg": {"seg"},
    "encode_uncertainty_series": {"uncertainty"},
    "encode_measurement_report": {"sr"},
    "encode_grayscale_state": {"gsps"},
    "encode_pseudo_color_state": {"pcps"},
}


@pytest.fixture(scope="module")
def sample() -> Sample:
    return Sample(source=header_only(PatientName="SECRET^NAME"), suv=sample_suv(), options=ALL)


def encode(sample: Sample, suv: SuvVolume | None = None) -> tuple[tuple[EncodedSeries, ...], tuple[str, ...]]:
    return encoding.encode_result(
        suv or sample.suv,
        district_map(),
        district_stats(sample.suv, district_map()),
        sample.suv,
        source=sample.source,
        provenance=sample.provenance,
        options=sample.options,
        created=sample.created,
    )


def test_everything_that_is_asked_for_is_written_the_pet_first(sample: Sample) -> None:
    series, notes = encode(sample)
    assert [(s.kind, s.encoding) for s in series] == [
        *(("pet", "sc"), ("pet", "pet"), ("mip", "sc"), ("seg", "sc"), ("seg", "pet"), ("uncertainty", "sc")),
        *((kind, one) for one in ("sc", "pet") for kind in ("sr", "gsps", "pcps")),
    ]
    assert notes == ()
    uids = [i.sop_instance_uid for s in series for i in s.instances] + [s.series_uid for s in series]
    assert len(uids) == len(set(uids))


@pytest.mark.parametrize(
    "error", [OutputError("no_districts", "nothing to write"), ValueError("SECRET^NAME"), MemoryError()]
)
@pytest.mark.parametrize("writer", list(WRITERS))
def test_it_is_left_out_with_a_note_that_quotes_no_header(
    sample: Sample, writer: str, error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> EncodedSeries:
        raise error

    monkeypatch.setattr(encoding, writer, fail)
    with caplog.at_level(logging.WARNING):
        series, notes = encode(sample)
    assert {s.kind for s in series} == {kind for kinds in WRITERS.values() for kind in kinds} - WRITERS[writer] | {
        "pet"
    }
    assert notes
    for note in notes:
        assert note.endswith("nothing to write" if isinstance(error, OutputError) else type(error).__name__)
    assert "outputs.companion_left_out" in caplog.text
    assert "SECRET" not in caplog.text + str(notes)


def test_a_report_beside_a_seg_that_could_not_be_written_refers_to_no_segment(
    sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = encode(sample)
    monkeypatch.setattr(encoding, "encode_district_seg", lambda *_, **__: 1 / 0)
    series, _ = encode(sample)
    segs = {s.encoding: s for s in whole if s.kind == "seg"}
    for with_seg, without in zip(whole[6:], series[4:], strict=True):
        if without.kind == "sr":
            seg = segs[without.encoding]
            assert seg.instances[0].sop_instance_uid.encode() in with_seg.instances[0].data
            assert seg.instances[0].sop_instance_uid.encode() not in without.instances[0].data
            assert without.series_uid != with_seg.series_uid


def test_a_pet_series_that_cannot_be_written_fails_the_job(sample: Sample) -> None:
    nowhere = replace(sample.suv, grid=replace(sample.suv.grid, frame_of_reference_uid=""))
    with pytest.raises(OutputError, match="no_frame_of_reference"):
        encode(sample, nowhere)


def test_the_job_goes_on_and_its_summary_holds_the_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "encode_mip", lambda *_, **__: 1 / 0)
    folder = write_tiny_bundle(tmp_path / "bundle")
    options = PipelineOptions(bundle=folder, device="cpu", threads=1, gate=GateOptions(min_coverage_mm=30))
    result = synthesize_series(write_tiny_study(tmp_path / "ct"), load_bundle(folder), options, created=CREATED)
    write_result(result, tmp_path / "result")
    summary = read_summary(tmp_path / "result")
    assert [s.folder for s in summary.series] == ["pet-sc"]
    assert "the MIP picture cannot be written and is left out: ZeroDivisionError" in summary.notes
