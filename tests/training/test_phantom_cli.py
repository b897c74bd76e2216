"""`dicom-node train phantom` as a person runs it."""

from __future__ import annotations

from pathlib import Path

from pydicom import dcmread
from typer.testing import CliRunner

from dicom_node.cli.train import app


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["phantom", *map(str, arguments)])
    return result.exit_code, result.output


def test_a_cohort_is_written_counted_and_not_written_twice(tmp_path: Path) -> None:
    out = tmp_path / "data"
    wanted = ("--cases", 2, "--layout", "nnunet", "--out", out, "--spacing-mm", 12, "--ct-pixel-mm", 8, "--workers", 1)
    code, output = run(*wanted, "--seed", 2)
    assert code == 0, output
    assert "2 studies of 2 patients (1 lymphoma, 1 negative)" in output
    written = {p: p.stat().st_mtime_ns for p in (out / "imagesTr").iterdir()}
    assert len(written) == 4
    assert run(*wanted, "--seed", 2)[0] == 0
    assert {p: p.stat().st_mtime_ns for p in (out / "imagesTr").iterdir()} == written
    code, output = run(*wanted, "--seed", 3)
    assert code == 2
    assert "other arguments" in output


def test_one_patient_is_written_with_its_districts(tmp_path: Path) -> None:
    out = tmp_path / "patient"
    code, output = run(out, "--matrix", 64, "--slice-mm", 10, "--low", 0.6, "--high", 0.7)
    assert code == 0, output
    assert {folder.name: dcmread(next(folder.iterdir())).Modality for folder in out.iterdir()} == {
        "CT": "CT",
        "PET": "PT",
        "SEG": "SEG",
    }
    assert run(out)[0] == 2


def test_options_of_the_other_form_are_refused(tmp_path: Path) -> None:
    for arguments, text in (
        (("--out", tmp_path / "a", "--cases", 2, "--pose", "raised"), "--pose: only without --cases"),
        (("--out", tmp_path / "a", "--layout", "tcia"), "--layout: only for a cohort"),
        (("--cases", 2), "name the new folder once"),
        ((tmp_path / "a", "--out", tmp_path / "b"), "name the new folder once"),
    ):
        code, output = run(*arguments)
        assert code == 2
        assert text in " ".join(output.split())
    assert not (tmp_path / "a").exists()
