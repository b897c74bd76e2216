from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import training.evaluation.evaluate as evaluation_module
from dicom_node.cli.app import app
from pipeline.bundle import NETWORK_KEYS
from pipeline.types import District
from tests.tiny_prepared import tiny_recipe, write_tiny_prepared
from tests.tiny_runs import write_tiny_run, write_tiny_runs
from training.errors import RunError
from training.evaluation.aggregate import of_region, per_patient
from training.evaluation.evaluate import Evaluation, evaluate
from training.evaluation.measure import measure, read_truth
from training.evaluation.report import as_report, write_report
from training.evaluation.report_format import read_report
from training.prepared import PreparedSet
from training.recipe import Recipe
from training.runs import write_record

METHODS = ["pix2pix/districts", "pix2pix/whole_body", "cyclegan/districts", "hu_lookup", "district_mean"]


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return tiny_recipe()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, recipe: Recipe) -> PreparedSet:
    return write_tiny_prepared(tmp_path_factory.mktemp("data") / "prepared", recipe=recipe, studies=9, spacing_mm=12.0)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, prepared: PreparedSet, recipe: Recipe) -> Path:
    """Pix2Pix of two seeds; CycleGAN of one without its whole-body network."""
    folder = tmp_path_factory.mktemp("runs")
    write_tiny_runs(folder, prepared, recipe, seeds=(0, 1))
    write_tiny_runs(folder, prepared, recipe, models=("cyclegan",), networks=NETWORK_KEYS[:-1])
    return folder


@pytest.fixture(scope="module")
def evaluation(runs: Path, prepared: PreparedSet) -> Evaluation:
    return evaluate(runs, prepared, device="cpu")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, evaluation: Evaluation) -> Path:
    folder = tmp_path_factory.mktemp("report")
    write_report(folder, evaluation)
    return folder


def test_every_model_seed_and_baseline_is_measured_on_every_test_study(evaluation: Evaluation) -> None:
    assert evaluation.methods == METHODS
    found = {(m.study, m.method, m.seed) for m in evaluation.measures}
    assert len(found) == len(evaluation.measures) == 2 * (2 * 2 + 1 + 2)
    assert {m.study for m in evaluation.measures} == {"phantom-007", "phantom-008"}


def test_what_is_not_there_is_said(evaluation: Evaluation) -> None:
    assert evaluation.missing == ("cyclegan seed 0: no finished network for whole_body",)


def test_a_prediction_that_is_the_truth_has_no_error(prepared: PreparedSet) -> None:
    truth = read_truth(prepared.load_split("test")[0])
    names = prepared.manifest.organ_names
    row = measure(truth, truth.pet, method="x", seed=0, suv_max=20.0, organ_names=names)
    for figures in row.regions.values():
        assert figures["mae"] == figures["bias_suv_mean"] == figures["bias_suv_max"] == 0
        assert figures["psnr"] == 100
        assert figures["ssim"] == pytest.approx(1)
    assert set(row.regions) == {"body", "head", "trunk", "arms", "legs", "lesions", "field_of_view"}
    assert row.seam_index == row.false_positive_ml == sum(row.false_positives.values()) == 0
    assert row.lesions
    assert all(lesion["suv_max"] == lesion["true_suv_max"] for lesion in row.lesions)
    assert row.organs["liver"]["suv_mean"] == row.organs["liver"]["true_suv_mean"]


def test_an_error_is_counted_in_its_district_only(prepared: PreparedSet) -> None:
    truth = read_truth(prepared.load_split("test")[0])
    fake = truth.pet + np.where(truth.districts.labels == District.HEAD, np.float32(0.1), np.float32(0))
    row = measure(truth, fake, method="x", seed=0, suv_max=20.0)
    assert row.regions["head"]["mae"] == pytest.approx(0.1, abs=1e-5)
    assert row.regions["head"]["bias_suv_mean"] == pytest.approx(2.0, abs=1e-4)
    assert row.regions["legs"]["mae"] == 0
    share = row.regions["head"]["voxels"] / row.regions["body"]["voxels"]
    assert row.regions["body"]["mae"] == pytest.approx(0.1 * share, abs=1e-5)
    assert 0 < row.regions["field_of_view"]["mae"] < row.regions["body"]["mae"]


def test_a_district_that_a_study_does_not_show_has_no_figures(tmp_path: Path, recipe: Recipe) -> None:
    partial = write_tiny_prepared(
        tmp_path / "prepared", recipe=recipe, studies=3, spacing_mm=12.0, coverage=(0.55, 0.8)
    )
    write_tiny_runs(tmp_path / "runs", partial, recipe)
    found = evaluate(tmp_path / "runs", partial, device="cpu")
    assert all("legs" not in m.regions and "head" not in m.regions for m in found.measures)
    assert all(m.regions["body"]["mae"] > 0 for m in found.measures)
    content = as_report(found, [], datetime.now(UTC))
    assert content.summary["pix2pix/districts"]["legs"]["mae"]["mean"] is None


def test_a_district_without_a_network_is_absent_and_so_is_the_whole_body(
    tmp_path: Path, prepared: PreparedSet, recipe: Recipe
) -> None:
    write_tiny_runs(tmp_path, prepared, recipe, networks=("head", "legs"))
    found = evaluate(tmp_path, prepared, device="cpu", limit=1)
    (row,) = [m for m in found.measures if m.method == "pix2pix/districts"]
    assert set(row.regions) == {"head", "legs"}
    assert row.not_evaluated == ("trunk", "arms")
    assert (row.lesions, row.false_positives, row.seam_index) == ((), {}, None)
    assert "pix2pix seed 0: no finished network for trunk, arms, whole_body" in found.missing
    assert "only the first 1 of 2 test studies" in found.missing


def test_an_unfinished_run_is_named_and_left_out(tmp_path: Path, prepared: PreparedSet, recipe: Recipe) -> None:
    record = write_tiny_run(tmp_path, prepared, recipe, "head")
    write_record(tmp_path, record.model_copy(update={"state": "running", "step": 4}))
    with pytest.raises(RunError, match="1 runs, none of them finished"):
        evaluate(tmp_path, prepared, device="cpu")
    write_tiny_run(tmp_path, prepared, recipe, "whole_body")
    found = evaluate(tmp_path, prepared, device="cpu", limit=1)
    assert "pix2pix/head/seed-0: at step 4 of 10, not measured" in found.missing
    assert found.methods == ["pix2pix/whole_body", "hu_lookup", "district_mean"]


def test_runs_of_other_data_are_refused(runs: Path, prepared: PreparedSet) -> None:
    other = replace(prepared, manifest=prepared.manifest.model_copy(update={"layout": "nifti"}))
    with pytest.raises(RunError, match="may have been trained on") as refusal:
        evaluate(runs, other, device="cpu")
    assert refusal.value.code == "run_foreign"


def test_an_interrupted_evaluation_goes_on_and_gives_the_same(
    tmp_path: Path, runs: Path, prepared: PreparedSet, evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(done: int, _total: int, _text: str) -> None:
        if done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(runs, prepared, device="cpu", work=tmp_path, on_progress=interrupt)
    assert len(list(tmp_path.glob("*.json"))) == 7
    predicted: list[int] = []
    real = evaluation_module.synthesize_volume
    monkeypatch.setattr(evaluation_module, "synthesize_volume", lambda *a, **k: (predicted.append(1), real(*a, **k))[1])
    again = evaluate(runs, prepared, device="cpu", work=tmp_path)
    assert again.measures == evaluation.measures
    assert len(predicted) == 10 - 3 + 3  # what was left, and three volumes for the pictures


def test_other_weights_are_measured_again(tmp_path: Path, prepared: PreparedSet, recipe: Recipe) -> None:
    for seed, folder in ((0, tmp_path / "a"), (5, tmp_path / "b")):
        record = write_tiny_run(folder, prepared, recipe, "whole_body", seed=seed)
        if seed:  # the same place under the same name, other weights
            (folder / record.folder_name).rename(folder / "pix2pix" / "whole_body" / "seed-0")
            write_record(folder, record.model_copy(update={"seed": 0}))
    first, second = (
        evaluate(tmp_path / name, prepared, device="cpu", limit=1, work=tmp_path / "work") for name in "ab"
    )
    by_method = [{m.method: m for m in found.measures} for found in (first, second)]
    assert by_method[0]["hu_lookup"] == by_method[1]["hu_lookup"]
    assert by_method[0]["pix2pix/whole_body"] != by_method[1]["pix2pix/whole_body"]


def test_a_spoiled_kept_row_is_measured_again(tmp_path: Path, prepared: PreparedSet, recipe: Recipe) -> None:
    write_tiny_run(tmp_path / "runs", prepared, recipe, "whole_body")
    first = evaluate(tmp_path / "runs", prepared, device="cpu", limit=1, work=tmp_path / "work")
    for path in (tmp_path / "work").glob("*.json"):
        path.write_text(path.read_text()[:100])
    again = evaluate(tmp_path / "runs", prepared, device="cpu", limit=1, work=tmp_path / "work")
    assert again.measures == first.measures


def test_only_the_seeds_asked_for_are_measured(runs: Path, prepared: PreparedSet) -> None:
    found = evaluate(runs, prepared, device="cpu", limit=1, seeds=[1])
    assert {m.seed for m in found.measures} == {None, 1}


def test_the_report_for_programs_holds_figures_and_digests(report: Path, evaluation: Evaluation) -> None:
    found = read_report(report)
    assert (found.studies, found.patients, found.phantom, found.split) == (2, 2, True, "test")
    assert found.weights == {r.folder_name.as_posix(): r.weights_sha256 for r in evaluation.records}
    assert len(found.weights) == 14
    assert list(found.summary) == METHODS
    own = [m for m in evaluation.measures if m.method == "pix2pix/districts"]
    expected = np.mean(list(per_patient(own, of_region("trunk", "mae")).values()))
    assert found.summary["pix2pix/districts"]["trunk"]["mae"]["mean"] == pytest.approx(expected)
    assert set(found.summary["hu_lookup"]) == {"body", "head", "trunk", "arms", "legs"}
    assert "NaN" not in (report / "report.json").read_text()


def test_the_report_for_people_says_what_the_data_are_and_what_came_out(report: Path) -> None:
    text = (report / "report.md").read_text()
    assert "Results on phantoms say nothing about patients" in text
    assert "Not there: cyclegan seed 0: no finished network for whole_body." in text
    for heading in ("Verdict", "Table I.", "Table II.", "Table III.", "SUV bias", "Lesions", "Training"):
        assert heading in text
    assert "HU-to-SUV look-up" in text
    assert "Pix2Pix, districts: 4 networks, 46 steps, 6.0 minutes." in text
    assert "Pix2Pix, whole body: 1 network, 14 steps, 1.5 minutes." in text
    assert "not tested everywhere" in text  # two patients


def test_every_file_of_the_report_is_there_and_figures_are_small(report: Path, prepared: PreparedSet) -> None:
    names = {p.name for p in report.iterdir()}
    tables = {
        "report.md",
        "report.json",
        "tables.csv",
        "tables.tex",
        "tests.csv",
        "rows.csv",
        "organs.csv",
        "lesions.csv",
    }
    assert tables <= names
    figures = {f"{kind}-{m}.png" for kind in ("panels", "mip", "bland-altman") for m in ("pix2pix", "cyclegan")}
    assert figures | {"mae.png", "froc.png"} <= names
    assert max(p.stat().st_size for p in report.glob("*.png")) < 300_000
    for path in (p for p in report.iterdir() if p.suffix != ".png"):
        assert str(prepared.folder) not in path.read_text()
    text = (report / "report.md").read_text()
    assert all(f"]({p.name})" in text for p in report.glob("*.png"))


def test_the_command_prints_table_one_and_the_verdict_and_writes_the_report(
    tmp_path: Path, prepared: PreparedSet, recipe: Recipe
) -> None:
    write_tiny_run(tmp_path, prepared, recipe, "whole_body")
    result = CliRunner().invoke(app, ["train", "evaluate", str(tmp_path), "--limit", "1", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert "Table I. Districts and whole body" in result.output
    assert "not there: cyclegan: no finished run" in " ".join(result.output.split())
    assert json.loads((tmp_path / "report" / "report.json").read_text())["studies"] == 1


@pytest.mark.parametrize(("options", "code"), [(["--seeds", "one"], 2), (["--split", "train"], 2), ([], 1)])
def test_a_wrong_argument_exits_with_2_and_missing_runs_with_1(tmp_path: Path, options: list[str], code: int) -> None:
    assert CliRunner().invoke(app, ["train", "evaluate", str(tmp_path), *options]).exit_code == code
