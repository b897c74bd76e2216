from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_prepared import tiny_recipe, write_tiny_prepared
from tiny_runs import write_tiny_run

import training.loop.train_network
from pipeline.bundle import NETWORK_KEYS
from training.errors import DataError, RunError
from training.loop.checkpoint import PREVIOUS
from training.loop.pace import Means, Pace, TrainProgress
from training.loop.stopping import Interrupted, locked
from training.loop.tensorboard import RunLog
from training.loop.train_network import learning_rate_factor, train_network
from training.loop.validation import Validation, validate
from training.prepared import PreparedSet
from training.recipe import Recipe
from training.runs import CHECKPOINT, WEIGHTS, RunRecord, check_runs_fit, read_record

CPU = torch.device("cpu")
RECIPE = tiny_recipe()
STEPS = 6


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> PreparedSet:
    return write_tiny_prepared(tmp_path_factory.mktemp("prepared"), studies=3, recipe=RECIPE)


def train(prepared: PreparedSet, runs: Path, recipe: Recipe = RECIPE, **options: Any) -> RunRecord:
    chosen = {"model": "pix2pix", "network": "head", "seed": 0, "device": CPU} | options
    return train_network(recipe, prepared, runs=runs, **chosen)


def weights(runs: Path, record: RunRecord) -> dict[str, torch.Tensor]:
    return load_file(runs / record.folder_name / WEIGHTS)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def dying(model: str, at: int, how: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let `how` happen when a step is taken for the `at`-th time; the list grows with every step."""
    real, calls = training.loop.train_network.build_model, []

    def build(*args: Any) -> Any:
        made = real(*args)
        step = made.step

        def counted(*step_args: Any) -> Any:
            calls.append(1)
            if len(calls) == at:
                how()
            return step(*step_args)

        made.step = counted
        return made

    monkeypatch.setattr(training.loop.train_network, "build_model", build)
    return calls


def interrupt() -> None:
    raise KeyboardInterrupt


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(prepared: PreparedSet, tmp_path: Path) -> None:
    first, again, other = (
        weights(tmp_path / str(n), train(prepared, tmp_path / str(n), seed=seed)) for n, seed in enumerate((0, 0, 1))
    )
    assert same(first, again)
    assert not same(first, other)


@pytest.mark.parametrize("model", ["pix2pix", "cyclegan"])
def test_an_interrupted_training_ends_with_the_same_weights_bit_for_bit(
    model: str, prepared: PreparedSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(cycle={"pool": 3})  # the pools exchange images within these few steps
    whole = weights(tmp_path / "whole", train(prepared, tmp_path / "whole", recipe, model=model))
    calls = dying(model, 4, interrupt, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train(prepared, tmp_path / "cut", recipe, model=model, checkpoint_s=0.0)
    resumed = train(prepared, tmp_path / "cut", recipe, model=model)
    assert len(calls) == 4 + STEPS - 3  # three, the one that died, and the last three
    assert same(whole, weights(tmp_path / "cut", resumed))


KILLED = """
import sys, os, signal
from pathlib import Path
import torch
from training.loop import train_network as loop
from training.loop.pace import Pace
from training.prepared import open_prepared
from tiny_prepared import tiny_recipe
torch.set_num_threads(int(sys.argv[3]))  # sums over other threads round otherwise
asked = []
def due(self, name, every_s):
    asked.append(name)
    return name == "checkpoint" and asked.count(name) == 2  # one checkpoint, after step 2
Pace.due = due
real = loop.PatchSampler.draw
def draw(self, entropy):
    if entropy[0][4] == 4:  # the fifth step
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, entropy)
loop.PatchSampler.draw = draw
loop.train_network(tiny_recipe(), open_prepared(Path(sys.argv[1])), model="pix2pix", network="head", seed=0,
                   runs=Path(sys.argv[2]), device=torch.device("cpu"))
"""


def test_a_killed_training_ends_with_the_same_weights_bit_for_bit(prepared: PreparedSet, tmp_path: Path) -> None:
    tests = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}"}
    command = [sys.executable, "-c", KILLED, str(prepared.folder), str(tmp_path / "killed")]
    command.append(str(torch.get_num_threads()))
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    folder = tmp_path / "killed" / "pix2pix" / "head" / "seed-0"
    assert (read_record(folder).step, read_record(folder).state) == (2, "running")
    told: list[TrainProgress] = []
    resumed = train(prepared, tmp_path / "killed", on_progress=told.append)
    assert "going on from step 2" in told[0].notice
    whole = train(prepared, tmp_path / "whole")
    assert same(weights(tmp_path / "killed", resumed), weights(tmp_path / "whole", whole))


def test_sigterm_ends_after_the_step_with_a_checkpoint(
    prepared: PreparedSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    dying("pix2pix", 3, terminate, monkeypatch)
    with pytest.raises(Interrupted, match="at step 3 of 6"):
        train(prepared, tmp_path)
    folder = tmp_path / "pix2pix" / "head" / "seed-0"
    assert torch.load(folder / CHECKPOINT, weights_only=True)["step"] == read_record(folder).step == 3
    assert signal.getsignal(signal.SIGTERM) == before
    assert train(prepared, tmp_path).state == "done"


def test_a_torn_checkpoint_costs_one_checkpoint_and_not_the_run(
    prepared: PreparedSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(prepared, tmp_path / "whole")
    dying("pix2pix", 5, interrupt, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train(prepared, tmp_path, checkpoint_s=0.0)
    path = tmp_path / "pix2pix" / "head" / "seed-0" / CHECKPOINT
    path.write_bytes(path.read_bytes()[:-1000])
    told: list[TrainProgress] = []
    resumed = train(prepared, tmp_path, on_progress=told.append)
    assert "checkpoint.pt is torn" in told[0].notice
    assert "step 3" in told[0].notice
    assert same(weights(tmp_path, resumed), weights(tmp_path / "whole", whole))


def test_two_torn_checkpoints_are_refused_by_name(
    prepared: PreparedSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dying("pix2pix", 4, interrupt, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train(prepared, tmp_path, checkpoint_s=0.0)
    folder = tmp_path / "pix2pix" / "head" / "seed-0"
    (folder / CHECKPOINT).write_bytes(b"")
    (folder / PREVIOUS).write_bytes(b"PK\x03\x04 not a checkpoint")
    with pytest.raises(RunError, match=r"checkpoint\.pt and checkpoint\.previous\.pt cannot be read") as refused:
        train(prepared, tmp_path)
    assert refused.value.code == "checkpoint_torn"


def test_a_full_disk_is_told_in_one_line_and_costs_no_checkpoint(
    prepared: PreparedSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # its own thread would fail first, and be heard
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (8000, hard))  # bytes that a file may have from now on
    with monkeypatch.context() as patch:
        dying("pix2pix", 4, limit, patch)
        try:
            with pytest.raises(RunError, match=r"checkpoint\.pt: could not be written") as refused:
                train(prepared, tmp_path, checkpoint_s=0.0)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert refused.value.code == "checkpoint_unwritten"
    folder = tmp_path / "pix2pix" / "head" / "seed-0"
    assert torch.load(folder / CHECKPOINT, weights_only=True)["step"] == 3
    assert not list(folder.glob("*.tmp"))
    whole = train(prepared, tmp_path / "whole")
    assert same(weights(tmp_path, train(prepared, tmp_path)), weights(tmp_path / "whole", whole))


def test_a_finished_run_fits_and_is_returned_at_once(
    prepared: PreparedSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = train(prepared, tmp_path)
    assert (record.state, record.step, record.steps) == ("done", STEPS, STEPS)
    assert record.losses["l1"] > 0
    check_runs_fit(tmp_path, [record])
    monkeypatch.setattr(training.loop.train_network, "PatchSampler", None)
    assert train(prepared, tmp_path) == record


def test_a_run_directory_of_another_recipe_is_refused_with_what_differs(prepared: PreparedSet, tmp_path: Path) -> None:
    train(prepared, tmp_path)
    with pytest.raises(RunError, match=r"recipe train\.lambda_l1 100\.0, now 1\.0\); choose another --runs") as refused:
        train(prepared, tmp_path, tiny_recipe(train={"lambda_l1": 1.0}))
    assert refused.value.code == "run_foreign"
    with pytest.raises(RunError, match="recipe seed 0, now 1"):
        train(prepared, tmp_path, tiny_recipe(seed=1))
    with pytest.raises(RunError, match="6 steps, now 7"):
        train(prepared, tmp_path, steps=7)


@pytest.mark.parametrize("length", [{"steps": {}, "epochs": 2, "patches_per_volume": 4}, {}])
def test_a_shorter_trial_is_not_taken_for_the_run_of_the_recipe(
    prepared: PreparedSet, tmp_path: Path, length: dict[str, Any]
) -> None:
    recipe = RECIPE.model_copy(update={"train": RECIPE.train.model_copy(update=length)})
    assert train(prepared, tmp_path, recipe, steps=3).state == "done"
    assert train(prepared, tmp_path, recipe, steps=3).steps == 3
    with pytest.raises(RunError, match="3 steps, now the recipe's own number"):
        train(prepared, tmp_path, recipe)
    whole = train(prepared, tmp_path / "whole", recipe)
    assert train(prepared, tmp_path / "whole", recipe) == whole


def test_runs_of_one_model_by_other_settings_do_not_fit_though_the_recipes_have_one_name(
    prepared: PreparedSet, tmp_path: Path
) -> None:
    def record(network: str, **changes: Any) -> RunRecord:
        return write_tiny_run(tmp_path, prepared, tiny_recipe(**changes), network, **options)

    options: dict[str, Any] = {}
    longer = {"steps": {"pix2pix": dict.fromkeys(NETWORK_KEYS, 9)}, "compile": True}
    first, same = record("head"), record("legs", train=longer, inference={"overlap": 8})
    options["model"] = "cyclegan"
    check_runs_fit(tmp_path, [first, same, record("head", cycle={"lambda_cycle": 1.0})])
    options["model"] = "pix2pix"
    with pytest.raises(RunError, match=r"arms/seed-0: trained with other settings than .*head/seed-0") as refused:
        check_runs_fit(tmp_path, [first, record("arms", train={"lambda_l1": 1.0})])
    assert refused.value.code == "run_foreign"


def test_what_does_not_decide_the_weights_may_change(prepared: PreparedSet, tmp_path: Path) -> None:
    record = train(prepared, tmp_path)
    other = tiny_recipe(version="2", inference={"overlap": 8}, train={"steps": {"pix2pix": {"trunk": 99}}})
    assert train(prepared, tmp_path, other) == record


def test_a_run_directory_of_other_data_is_refused(prepared: PreparedSet, tmp_path: Path) -> None:
    train(prepared, tmp_path / "runs")
    other = write_tiny_prepared(tmp_path / "other", studies=3, recipe=RECIPE, coverage=(0.5, 1.02))
    with pytest.raises(RunError, match=f"data {prepared.manifest.digest[:12]}, now {other.manifest.digest[:12]}"):
        train(other, tmp_path / "runs")


def test_data_that_were_prepared_otherwise_are_refused(prepared: PreparedSet, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="prepared with the recipe 'tiny'") as refused:
        train(prepared, tmp_path, tiny_recipe(normalization={"suv_max": 10.0}))
    assert refused.value.code == "prepared_foreign"


def test_an_empty_training_split_is_refused(prepared: PreparedSet, tmp_path: Path) -> None:
    tested = tuple(study.model_copy(update={"split": "test"}) for study in prepared.manifest.studies)
    manifest = prepared.manifest.model_copy(update={"studies": tested})
    with pytest.raises(DataError, match="3 studies, none of them for training"):
        train(PreparedSet(folder=prepared.folder, manifest=manifest), tmp_path)


def test_a_district_that_no_study_shows_is_refused(tmp_path: Path) -> None:
    headless = write_tiny_prepared(tmp_path / "data", studies=3, recipe=RECIPE, coverage=(0.2, 0.6))
    with pytest.raises(DataError, match="none of 1 training studies shows head") as refused:
        train(headless, tmp_path / "runs")
    assert refused.value.code == "no_district"
    assert not (tmp_path / "runs").exists()


def test_a_second_training_in_the_same_run_directory_is_refused(prepared: PreparedSet, tmp_path: Path) -> None:
    folder = tmp_path / "pix2pix" / "head" / "seed-0"
    with locked(folder), pytest.raises(RunError, match="another process is training here"):
        train(prepared, tmp_path)
    assert train(prepared, tmp_path).state == "done"


def test_a_training_that_diverges_ends_and_leaves_no_weights(prepared: PreparedSet, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="it diverged") as refused:
        train(prepared, tmp_path, tiny_recipe(train={"learning_rate": 1e37, "clip_norm": 1e30}))
    assert refused.value.code == "diverged"
    assert not list(tmp_path.rglob(WEIGHTS))


def test_training_lowers_the_error_on_whole_validation_studies(prepared: PreparedSet, tmp_path: Path) -> None:
    recipe = tiny_recipe(train={"learning_rate": 5e-3}, validation={"every_steps": 20})
    record = train(prepared, tmp_path, recipe, network="whole_body", steps=80)
    errors = [row["mae"] for row in record.validation]
    assert errors[-1] < 0.97 * errors[0]


def test_the_learning_rate_falls_to_zero_over_the_last_part() -> None:
    factors = [learning_rate_factor(step, 150, 1 / 3) for step in (0, 99, 100, 125, 150)]
    assert factors == pytest.approx([1, 1, 1, 0.5, 0])
    assert learning_rate_factor(7, 10, 0.0) == 1


def test_curves_hold_every_step_once_also_after_a_resume(
    prepared: PreparedSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = tiny_recipe(validation={"every_steps": 3, "studies": 1})
    dying("pix2pix", 5, interrupt, monkeypatch)
    made = iter([True, False])  # a checkpoint after step 1 only: steps 2 to 4 are lost and taken again
    with monkeypatch.context() as patch:
        patch.setattr(Pace, "due", lambda self, name, every_s: name == "checkpoint" and next(made, False))
        with pytest.raises(KeyboardInterrupt):
            train(prepared, tmp_path, recipe)
    second = int(time.time())
    while int(time.time()) == second:  # tensorboard reads its files in the order of their names, which begin with that
        time.sleep(0.05)
    record = train(prepared, tmp_path, recipe)
    events = EventAccumulator(str(tmp_path / record.folder_name / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    scalars = {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert scalars["loss/l1"] == [1, 2, 3, 4, 5, 6]
    assert scalars["train/learning_rate"] == [1, 2, 3, 4, 5, 6]
    assert scalars["validation/mae"] == scalars["validation/psnr"] == [3, 6]
    assert {event.step for event in events.Images("patches: CT, PET, synthetic")} == {1, 2, 3, 4, 5, 6}
    assert [event.step for event in events.Images("validation: CT, PET, synthetic")] == [3, 6]


def test_without_tensorboard_training_says_so_once_and_goes_on(
    prepared: PreparedSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    told: list[TrainProgress] = []
    record = train(prepared, tmp_path, on_progress=told.append)
    assert record.state == "done"
    assert [now.notice for now in told if "tensorboard" in now.notice] == [
        "the package tensorboard is not installed: no curves and pictures"
    ]


def test_curves_that_cannot_be_written_do_not_end_a_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class FullDisk:
        calls = 0

        def add_scalar(self, *_: object) -> None:
            self.calls += 1
            raise OSError(28, "No space left on device")

    disk = FullDisk()
    monkeypatch.setattr("training.loop.tensorboard._writer", lambda *_: disk)
    with RunLog(tmp_path, 0) as log:
        log.scalars("loss", {"l1": 1.0, "generator": 2.0}, 1)
        log.picture("patches", np.zeros((1, 3, 4, 4), np.float32), 20.0, 1)
    assert disk.calls == 1


class CtAsPet(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :1]


@pytest.mark.parametrize(("key", "label"), [("trunk", 2), ("whole_body", None)])
def test_validation_measures_the_stitched_volume_inside_district_and_body(
    key: str, label: int | None, prepared: PreparedSet
) -> None:
    studies = prepared.load_split("validation")
    found = validate(CtAsPet(), RECIPE, key, studies, CPU)
    region = studies[0].districts > 0 if label is None else studies[0].districts == label
    error = studies[0].ct[region].astype(np.float64) - studies[0].pet[region].astype(np.float64)
    assert found.studies == 1
    assert found.mae == pytest.approx(np.abs(error).mean(), rel=1e-4)
    assert found.psnr == pytest.approx(-10 * np.log10(np.square(error).mean()), rel=1e-4)


def test_validation_of_a_district_that_no_study_shows_counts_no_study(tmp_path: Path) -> None:
    headless = write_tiny_prepared(tmp_path, studies=3, recipe=RECIPE, coverage=(0.2, 0.6))
    found = validate(CtAsPet(), RECIPE, "head", headless.load_split("validation"), CPU)
    assert found.studies == 0
    assert np.isnan(found.mae)


def test_validation_is_recorded_and_does_not_change_the_weights(prepared: PreparedSet, tmp_path: Path) -> None:
    plain = train(prepared, tmp_path / "plain")
    told: list[TrainProgress] = []
    recipe = tiny_recipe(validation={"every_steps": 2})
    watched = train(prepared, tmp_path / "watched", recipe, on_progress=told.append)
    assert [row["step"] for row in watched.validation] == [2, 4, 6]
    assert all(row["mae"] > 0 for row in watched.validation)
    assert sum(now.stage == "validate" for now in told) == 3
    assert same(weights(tmp_path / "plain", plain), weights(tmp_path / "watched", watched))


def test_patience_ends_the_training_with_the_best_weights(
    prepared: PreparedSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    maes, seen = iter([0.3, 0.1, 0.2, 0.25, 0.0]), []

    def scripted(network: torch.nn.Module, *_: object) -> Validation:
        seen.append({name: tensor.clone() for name, tensor in network.state_dict().items()})
        return Validation(mae=next(maes), psnr=20.0, studies=1, picture=None)

    monkeypatch.setattr(training.loop.train_network, "validate", scripted)
    recipe = tiny_recipe(validation={"every_steps": 2, "patience": 2})
    record = train(prepared, tmp_path, recipe, steps=20)
    assert (record.state, record.step) == ("done", 8)  # best at 4; 6 and 8 were no better
    assert same(weights(tmp_path, record), seen[1])
    assert not same(seen[1], seen[3])


def test_the_time_left_counts_the_validations_to_come(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("training.loop.pace.time.monotonic", lambda: now[0])
    pace = Pace(100, 20)
    pace.start(0)
    assert pace.left(0) is None
    now[0] = 40.0
    assert pace.rate(20) == pytest.approx(0.5)
    assert pace.left(20) == pytest.approx(160.0)
    with pace.validating():
        now[0] += 30.0
    assert pace.rate(20) == pytest.approx(0.5)
    assert pace.left(20) == pytest.approx(160.0 + 4 * 30.0)


def test_means_are_over_the_steps_since_they_were_taken() -> None:
    means = Means()
    for value in (1.0, 3.0):
        means.add({"l1": torch.tensor(value), "generator": torch.tensor(10 * value)})
    assert means.now() == means.take() == {"l1": 2.0, "generator": 20.0}
    assert means.now() == {}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("model", ["pix2pix", "cyclegan"])
def test_training_runs_and_resumes_on_a_gpu(
    model: str, prepared: PreparedSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(train={"precision": "auto", "compile": True}, validation={"every_steps": 3, "studies": 1})
    dying(model, 4, interrupt, monkeypatch)
    gpu = torch.device("cuda", 0)
    with pytest.raises(KeyboardInterrupt):
        train(prepared, tmp_path, recipe, model=model, device=gpu, checkpoint_s=0.0)
    record = train(prepared, tmp_path, recipe, model=model, device=gpu)
    assert record.state == "done"
    assert record.device.startswith("cuda:0 ")
    assert len(record.validation) == 2
