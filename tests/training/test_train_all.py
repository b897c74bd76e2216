from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tiny_prepared import TINY, tiny_recipe, write_tiny_prepared
from typer.testing import CliRunner

from dicom_node.cli import app
from training.errors import DataError, RunError
from training.loop.pace import TrainProgress
from training.loop.train_all import AllProgress, RunPlan, _Board, _Job, plan_runs, train_all
from training.prepared import PreparedSet
from training.recipe import load_recipe
from training.runs import CHECKPOINT, RECORD, find_runs, read_record

RECIPE = tiny_recipe()
DEADLINE_S = 240


@pytest.fixture(scope="module")
def headless(tmp_path_factory: pytest.TempPathFactory) -> PreparedSet:
    """Three scans from the feet to the hips: no head in any of them."""
    folder = tmp_path_factory.mktemp("prepared")
    return write_tiny_prepared(folder, studies=3, recipe=RECIPE, coverage=(0.0, 0.45))


def toml(values: dict[str, Any], prefix: str = "") -> str:
    """TOML of a nested dictionary of plain values."""
    plain = "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items() if not isinstance(value, dict))
    tables = [(key, value) for key, value in values.items() if isinstance(value, dict)]
    return plain + "".join(f"[{prefix}{key}]\n{toml(value, f'{prefix}{key}.')}" for key, value in tables)


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(toml(TINY))
    assert load_recipe(str(path)) == RECIPE
    return path


def test_the_longest_runs_come_first() -> None:
    recipe = tiny_recipe(
        train={"steps": {"pix2pix": {"trunk": 900, "head": 30}, "cyclegan": {"trunk": 100, "head": 9}}}
    )
    plans = plan_runs(recipe, 4, models=("pix2pix", "cyclegan"), networks=("head", "trunk"), seeds=(0, 1))
    assert [(p.model, p.network, p.seed) for p in plans] == [
        ("pix2pix", "trunk", 0),
        ("pix2pix", "trunk", 1),
        ("cyclegan", "trunk", 0),
        ("cyclegan", "trunk", 1),
        ("cyclegan", "head", 0),
        ("cyclegan", "head", 1),
        ("pix2pix", "head", 0),
        ("pix2pix", "head", 1),
    ]


def test_a_run_that_fails_does_not_stop_the_others_and_is_told_with_its_reason(
    headless: PreparedSet, tmp_path: Path
) -> None:
    told: list[AllProgress] = []
    with pytest.raises(RunError, match=r"1 of 2 runs failed: pix2pix head seed 3: .* shows head") as failed:
        train_all(
            RECIPE,
            headless.folder,
            tmp_path,
            seeds=[3],
            models=["pix2pix"],
            networks=["head", "legs"],
            workers=2,
            device="cpu",
            on_progress=told.append,
        )
    assert failed.value.code == "runs_failed"
    assert [(r.network, r.seed, r.state) for r in find_runs(tmp_path)] == [("legs", 3, "done")]
    last = told[-1]
    assert (last.finished, last.failed, last.runs) == (1, 1, 2)


def test_finished_runs_are_left_alone_and_nothing_is_started(headless: PreparedSet, tmp_path: Path) -> None:
    options = {"seeds": [0], "models": ["pix2pix"], "networks": ["legs"], "workers": 1, "device": "cpu"}
    (first,) = train_all(RECIPE, headless.folder, tmp_path, **options)
    weights = tmp_path / first.folder_name / "weights.safetensors"
    before = weights.stat().st_mtime_ns
    told: list[AllProgress] = []
    assert train_all(RECIPE, headless.folder, tmp_path, **options, on_progress=told.append) == [first]
    assert weights.stat().st_mtime_ns == before
    assert [now.text for now in told] == ["1 runs, 1 of them finished before; 1 side by side"]
    with pytest.raises(RunError, match=r"recipe train\.lambda_l1"):  # before any process is started
        train_all(tiny_recipe(train={"lambda_l1": 1.0}), headless.folder, tmp_path, **options)


def test_data_that_changed_since_they_were_prepared_are_refused(tmp_path: Path) -> None:
    data = write_tiny_prepared(tmp_path / "data", studies=3, recipe=RECIPE, coverage=(0.0, 0.3))
    path = data.folder / "studies" / "phantom-001" / "ct.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"phantom-001: ct\.npy is not the file that was prepared"):
        train_all(RECIPE, data.folder, tmp_path / "runs", seeds=[0], device="cpu")


def test_the_time_left_weighs_each_models_steps_by_their_measured_seconds() -> None:
    plans = [
        RunPlan(model="pix2pix", network="trunk", seed=0, steps=1000),
        RunPlan(model="cyclegan", network="trunk", seed=0, steps=100),
        RunPlan(model="cyclegan", network="head", seed=0, steps=100),
    ]
    jobs = [_Job(plan) for plan in plans]
    told: list[AllProgress] = []
    board = _Board(jobs, 2, told.append)
    assert board.seconds_left() is None

    def report(job: _Job, step: int, rate: float) -> None:
        plan = job.plan
        told_by_run = TrainProgress(
            model=plan.model, network=plan.network, seed=0, step=step, steps=plan.steps, steps_per_s=rate
        )
        board.heard(job, told_by_run)

    report(jobs[0], 500, 5.0)
    report(jobs[1], 50, 0.5)
    # 500 / 5 s + 50 / 0.5 s + 100 / 0.5 s, shared by two, but the last run alone takes 200 s
    assert told[-1].seconds_left == pytest.approx(200.0)
    report(jobs[2], 50, 0.5)
    assert told[-1].seconds_left == pytest.approx((100 + 100 + 100) / 2)
    jobs[2].error = "no such district"
    assert board.seconds_left() == pytest.approx(100.0)
    assert (told[-1].done, told[-1].total) == (600, 1200)


def test_ctrl_c_ends_every_run_with_a_checkpoint_and_the_same_command_goes_on(
    headless: PreparedSet, recipe_file: Path, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    options = ["--recipe", recipe_file, "--data", headless.folder, "--runs", runs, "--districts", "legs,whole_body"]
    command = [sys.executable, "-m", "dicom_node", "train", "all", *map(str, options), "--models", "pix2pix"]
    started = subprocess.Popen(
        [*command, "--workers", "2", "--steps", "100000", "--device", "cpu"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # a process group of its own, to be interrupted as a terminal does
        # tests that a shell put into the background ignore SIGINT, and so would what they start
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.default_int_handler),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        deadline = time.monotonic() + DEADLINE_S
        while len(list(runs.glob(f"pix2pix/*/seed-0/{RECORD}"))) < 2 and time.monotonic() < deadline:
            assert started.poll() is None, started.communicate()[0]
            time.sleep(0.2)
        time.sleep(1.0)
        os.killpg(started.pid, signal.SIGINT)
        said = started.communicate(timeout=DEADLINE_S)[0]
    finally:
        started.kill()
        started.wait()
    assert started.returncode == 130, said
    assert "the same command goes on" in said
    assert "Traceback" not in said
    for network in ("legs", "whole_body"):
        folder = runs / "pix2pix" / network / "seed-0"
        record = read_record(folder)
        assert record.state == "running"
        assert 0 < record.step < 100000
        assert (folder / CHECKPOINT).is_file()


def test_the_command_trains_one_network_and_prints_its_figures(
    headless: PreparedSet, recipe_file: Path, tmp_path: Path
) -> None:
    options = ["--recipe", str(recipe_file), "--data", str(headless.folder), "--runs", str(tmp_path / "runs")]
    ran = CliRunner().invoke(app, ["train", "run", *options, "--district", "legs", "--seed", "2", "--device", "cpu"])
    assert ran.exit_code == 0, ran.output
    (record,) = find_runs(tmp_path / "runs")
    assert (record.network, record.seed, record.step) == ("legs", 2, 6)
    assert f"{record.losses['l1']:.5f}" in ran.output


def test_the_command_says_in_one_line_what_is_wrong(headless: PreparedSet, recipe_file: Path, tmp_path: Path) -> None:
    options = ["--recipe", str(recipe_file), "--data", str(headless.folder), "--runs", str(tmp_path / "runs")]
    runner = CliRunner()
    ran = runner.invoke(app, ["train", "run", *options, "--district", "head", "--device", "cpu"])
    assert (ran.exit_code, len(ran.stderr.strip().splitlines())) == (1, 1)
    assert "none of 1 training studies shows head" in ran.stderr
    ran = runner.invoke(app, ["train", "all", *options, "--districts", "trunk,neck"])
    assert ran.exit_code == 2
    assert "'neck' is not one of" in ran.output
    ran = runner.invoke(app, ["train", "run", "--recipe", "no-such-recipe", "--district", "head"])
    assert ran.exit_code == 1
    assert "no-such-recipe" in ran.stderr
    in_the_way = tmp_path / "a-file"
    in_the_way.write_text("")
    options = [*options[:-1], str(in_the_way)]
    ran = runner.invoke(app, ["train", "run", *options, "--district", "legs", "--device", "cpu"])
    assert (ran.exit_code, len(ran.stderr.strip().splitlines())) == (1, 1)
    assert "Not a directory" in ran.stderr
