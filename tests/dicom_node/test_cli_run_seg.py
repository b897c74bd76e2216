"""`dicom-node run` with a SEG beside the CT, and a SEG out of it."""

from __future__ import annotations

import json
from pathlib import Path

from pydicom import dcmread
from seg_factory import write_seg
from tiny_bundle import write_tiny_bundle
from tiny_study import tiny_phantom, write_tiny_study
from typer.testing import CliRunner

from dicom_node.cli import app
from pipeline.types import District

RUNNER = CliRunner()


def run(*words: str | Path) -> tuple[int, str]:
    result = RUNNER.invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def test_run_takes_the_districts_from_a_seg_in_the_folder_and_writes_its_own(tmp_path: Path) -> None:
    folder, out = tmp_path / "ct", tmp_path / "out"
    paths = write_tiny_study(folder)
    labels = tiny_phantom().districts
    masks = {d.key: labels == d for d in District if (labels == d).any()}
    write_seg(folder / "other.dcm", paths, masks)
    bundle = write_tiny_bundle(tmp_path / "bundle")
    chain = ("--districts", "dicom_seg", "--districts", "builtin")
    code, output = run("run", folder, out, "--bundle", bundle, "--device", "cpu", *chain, "--seg", "--no-mip")
    assert code == 0, output
    assert f"{len(paths)} CT slices" in output
    summary = json.loads((out / "result.json").read_text())
    assert summary["provenance"]["segmenter"] == "dicom_seg"
    assert [s["folder"] for s in summary["series"]] == ["pet-sc", "seg-sc"]
    written = dcmread(out / "seg-sc" / "0001.dcm")
    assert [item.SegmentLabel for item in written.SegmentSequence] == list(masks)
    assert written.SegmentSequence[0].SegmentAlgorithmName == "dicom_seg"


def test_run_without_a_seg_says_so_and_goes_on(tmp_path: Path) -> None:
    write_tiny_study(tmp_path / "ct")
    bundle = write_tiny_bundle(tmp_path / "bundle")
    chain = ("--districts", "dicom_seg", "--districts", "builtin")
    code, output = run("run", tmp_path / "ct", tmp_path / "out", "--bundle", bundle, "--device", "cpu", *chain)
    assert code == 0, output
    assert "dicom_seg: there is no SEG in the study" in output
    assert not (tmp_path / "out" / "seg-sc").exists()


def test_run_names_the_segmenters_that_there_are(tmp_path: Path) -> None:
    write_tiny_study(tmp_path / "ct")
    code, output = run("run", tmp_path / "ct", tmp_path / "out", "--districts", "oracle")
    assert code == 2
    assert "dicom_seg" in output
