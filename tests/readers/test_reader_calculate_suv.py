"""`@cornerstonejs/calculate-suv`, which OHIF asks for the SUV, on the files of a result."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from reader_study import ENCODINGS, SPEC, Written, make_study, write_acquired_pet, write_files
from reader_tools import node_modules, run_node

THIN = replace(SPEC, coverage=(0.70, 0.75))  # three slices are asked for


def ask(paths: list[Path]) -> Any:
    some = [paths[0], paths[len(paths) // 2], paths[-1]]
    return run_node("calculate_suv.mjs", str(node_modules()), *map(str, some))


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_stored_value_is_the_suv(encoding: str, written: Written) -> None:
    answer = ask(written.files(encoding))
    assert [one["suvbw"] for one in answer["factors"]] == [1, 1, 1]
    assert answer["doses"] == [0, 0, 0]  # a true dose would scale the SUV a second time, an invented one is a lie


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_without_a_weight_it_refuses_and_names_the_weight(encoding: str, tmp_path: Path) -> None:
    study = make_study(tmp_path / "ct", spec=THIN, weight=False)
    answer = ask(write_files(study.pet(encoding), tmp_path / "pet"))
    assert "PatientWeight" in answer["error"]
    assert answer["doses"] == [0, 0, 0]


def test_an_acquired_pet_gets_its_own_factor(tmp_path: Path) -> None:
    answer = ask(write_acquired_pet(tmp_path / "pet", spec=THIN))
    assert all(0 < one["suvbw"] < 0.01 for one in answer["factors"])  # Bq/ml to SUV: the reader does compute here
