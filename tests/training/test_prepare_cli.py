"""`dicom-node train prepare` on files of a cohort: the table, where to look, one line for what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from dicom_node.cli.app import app
from training.phantom.cohort import write_cohort
from training.prepared import open_prepared


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = tmp_path_factory.mktemp("cohort") / "data"
    write_cohort(data, cases=2, layout="nifti", spacing_mm=(12.0, 12.0, 12.0), ct_pixel_mm=12.0, workers=1)
    return data


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["train", "prepare", *map(str, arguments), "--workers", "1"])


def test_a_cohort_is_prepared_and_the_table_tells_the_split(cohort: Path, tmp_path: Path) -> None:
    result = run(cohort, "--out", tmp_path / "out", "--recipe", "phantom")
    assert result.exit_code == 0, result.output
    words = result.output.replace("\n", "")
    assert "prepared studies" in words
    assert "synthetic phantom" in words
    assert "review.html" in words
    again = run(cohort, "--out", tmp_path / "out", "--recipe", "phantom", "--json")
    summary = json.loads(again.stdout)
    assert summary["digest"] == open_prepared(tmp_path / "out").manifest.digest
    assert sum(summary["studies"].values()) == 2


def test_a_cohort_without_one_usable_study_ends_with_1(cohort: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(cohort, data)
    for path in data.rglob("SUV.nii.gz"):
        path.write_bytes(path.read_bytes()[:400])
    result = run(data, "--out", tmp_path / "out", "--recipe", "phantom")
    assert result.exit_code == 1
    assert "can be used" in result.output


@pytest.mark.parametrize(
    ("arguments", "code"), [(["nowhere"], 1), (["--recipe", "none"], 1), (["--engine", "spark"], 2)]
)
def test_what_cannot_be_done_is_one_line(cohort: Path, tmp_path: Path, arguments: list[str], code: int) -> None:
    data = [] if arguments == ["nowhere"] else [str(cohort)]
    result = run(*data, *arguments, "--out", tmp_path / "out")
    assert result.exit_code == code
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()
