"""A chain of segmenters within the engine's own process: which one ran is in the result, and why others did not."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from tiny_bundle import write_tiny_bundle
from tiny_nnunet import write_model
from tiny_study import write_tiny_study

from dicom_node.engine.local import LocalEngine
from pipeline.result import ResultSummary, read_summary
from pipeline.types import DistrictOptions, PipelineOptions

CREATED = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def result_of(tmp_path: Path, districts: DistrictOptions) -> ResultSummary:
    options = PipelineOptions(
        bundle=write_tiny_bundle(tmp_path / "bundle"), device="cpu", threads=1, districts=districts
    )
    engine = LocalEngine(job_timeout_s=300)
    try:
        engine.run(
            "abc",
            write_tiny_study(tmp_path / "ct"),
            options,
            tmp_path / "result",
            CREATED,
            on_progress=lambda _: None,
            should_stop=lambda: False,
        )
    finally:
        engine.close()
    return read_summary(tmp_path / "result")


def test_the_engine_s_process_may_start_a_segmenter_s_and_records_it(tmp_path: Path) -> None:
    write_model(tmp_path, spacing_mm=(8.0, 8.0, 8.0))
    chain = DistrictOptions(
        chain=("totalsegmentator", "nnunet_folder", "builtin"),
        totalsegmentator_weights=tmp_path / "none",
        nnunet_folder=tmp_path / "Dataset001_body",
        device="cpu",
        threads=1,
    )
    summary = result_of(tmp_path, chain)
    assert summary.provenance.segmenter == "nnunet_folder"
    assert summary.provenance.segmenter_version.startswith("Dataset001_body nnUNetPlans 3d_fullres ")
    assert any(note.startswith("totalsegmentator: the package totalsegmentator is not inst") for note in summary.notes)
    assert all(0.0 <= row.confidence <= 1.0 for row in summary.stats)


def test_a_segmenter_past_its_deadline_leaves_the_job_to_the_next(tmp_path: Path) -> None:
    write_model(tmp_path, spacing_mm=(8.0, 8.0, 8.0))
    folder = tmp_path / "Dataset001_body"
    chain = DistrictOptions(chain=("nnunet_folder", "builtin"), nnunet_folder=folder, timeout_s=0.05, threads=1)
    summary = result_of(tmp_path, chain)
    assert summary.provenance.segmenter == "builtin"
    assert any("nnunet_folder: it did not end within 0.05 s" in note for note in summary.notes)
