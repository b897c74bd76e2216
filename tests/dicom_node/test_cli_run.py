"""`dicom-node run`, `models` and `train phantom` as a person runs them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydicom import dcmread
from tiny_bundle import write_tiny_bundle
from tiny_study import write_tiny_study
from typer.testing import CliRunner

from dicom_node.cli import app
from pipeline.errors import BundleError, UnsupportedSeries

RUNNER = CliRunner()


def run(*words: str | Path) -> tuple[int, str]:
    result = RUNNER.invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def test_run_writes_both_encodings_the_picture_and_the_summary(tmp_path: Path) -> None:
    write_tiny_study(tmp_path / "ct")
    out = tmp_path / "out"
    bundle = write_tiny_bundle(tmp_path / "bundle")
    code, output = run("run", tmp_path / "ct", out, "--bundle", bundle, "--encoding", "both", "--device", "cpu")
    assert code == 0, output
    assert "trunk" in output
    assert {path.name for path in out.iterdir()} == {"pet-sc", "pet-pet", "mip-sc", "overview.png", "result.json"}
    summary = json.loads((out / "result.json").read_text())
    assert summary["stats"][0]["district"] in {"head", "trunk", "arms", "legs"}
    first = dcmread(next((out / "pet-pet").iterdir()))
    assert (first.Modality, first.SyntheticData) == ("PT", "YES")
    code, output = run("run", tmp_path / "ct", out, "--bundle", bundle)
    assert code == 2
    assert "--force" in output
    code, output = run("run", tmp_path / "ct", out, "--bundle", bundle, "--force", "--no-mip")
    assert code == 0, output
    assert not (out / "mip-sc").exists()


def test_run_never_replaces_a_folder_that_is_no_result(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("keep")
    (tmp_path / "ct").mkdir()
    code, _ = run("run", tmp_path / "ct", tmp_path, "--force")
    assert code == 2
    assert (tmp_path / "precious.txt").read_text() == "keep"


def test_run_names_what_is_wrong_with_the_folder(tmp_path: Path) -> None:
    (tmp_path / "ct").mkdir()
    (tmp_path / "ct" / "note.txt").write_text("not DICOM")
    assert run("run", tmp_path / "none", tmp_path / "out")[0] == 2
    with pytest.raises(UnsupportedSeries):
        run("run", tmp_path / "ct", tmp_path / "out")
    with pytest.raises(BundleError):
        run("run", tmp_path / "ct", tmp_path / "out", "--bundle", "nowhere")
    assert run("run", tmp_path / "ct", tmp_path / "out", "--blending", "foo")[0] == 2


def test_models_are_listed_and_verified_and_an_altered_one_is_refused(tmp_path: Path) -> None:
    code, output = run("models", "list", "--json")
    assert code == 0
    assert [row["name"] for row in json.loads(output)] == ["phantom"]
    bundle = write_tiny_bundle(tmp_path / "bundle")
    code, output = run("models", "verify", bundle)
    assert code == 0, output
    assert "whole" in output
    weights = bundle / "head.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    code, output = run("models", "verify", bundle)
    assert code == 1
    assert "head.safetensors" in output


def test_a_phantom_patient_is_written_as_ct_pet_and_seg(tmp_path: Path) -> None:
    out = tmp_path / "patient"
    code, output = run(
        "train",
        "phantom",
        out,
        "--matrix",
        "64",
        "--slice-mm",
        "8",
        "--low",
        "0.6",
        "--high",
        "0.75",
        "--pose",
        "raised",
    )
    assert code == 0, output
    first = {name: dcmread(next((out / name).iterdir())) for name in ("CT", "PET", "SEG")}
    assert [first[name].Modality for name in ("CT", "PET", "SEG")] == ["CT", "PT", "SEG"]
    assert len({ds.StudyInstanceUID for ds in first.values()}) == 1
    assert first["CT"].FrameOfReferenceUID == first["PET"].FrameOfReferenceUID
    assert run("train", "phantom", out)[0] == 2
