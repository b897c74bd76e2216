"""Ablations: what is trained, what is taken from the runs that are there, and what the table says."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_prepared import TINY, tiny_recipe, write_tiny_prepared
from tiny_runs import write_tiny_runs
from typer.testing import CliRunner

import training.ablation
from dicom_node.cli import app
from pipeline.bundle import NETWORK_KEYS, Manifest
from training.ablation import (
    COLUMNS,
    AblationRow,
    load_ablation,
    merged,
    run_ablation,
    shipped_ablations,
    variant_recipes,
)
from training.errors import DataError
from training.loop.train_network import train_network
from training.prepared import PreparedSet
from training.recipe import MODELS, Recipe, RecipeError, shipped_recipes
from training.runs import find_runs, write_record

STEPS = {key: 10 + place for place, key in enumerate(NETWORK_KEYS)}  # as tiny_runs records them
OVERLAP = """
title = "Overlap"
base = "tiny"
[[variant]]
name = "none"
changes = { inference = { overlap = 0 } }
[[variant]]
name = "half"
changes = { inference = { overlap = 8 } }
"""
SEEN = """
title = "Input"
base = "tiny"
[[variant]]
name = "body"
changes = {}
[[variant]]
name = "channel"
[variant.changes]
networks = ["head"]
inference = { input_mask = "channel" }
model = { pix2pix = { in_channels = 2 }, cyclegan = { in_channels = 2 } }
"""


def toml(values: dict[str, Any], prefix: str = "") -> str:
    """TOML of a nested dictionary of plain values."""
    plain = "".join(f"{key} = {value!r}\n" for key, value in values.items() if isinstance(value, str | int | float))
    plain = plain.replace("True", "true").replace("False", "false")
    lists = "".join(f"{key} = {value!r}\n" for key, value in values.items() if isinstance(value, list))
    tables = [(key, value) for key, value in values.items() if isinstance(value, dict)]
    return plain + lists + "".join(f"[{prefix}{k}]\n{toml(v, f'{prefix}{k}.')}" for k, v in tables)


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return tiny_recipe(train={"steps": dict.fromkeys(MODELS, STEPS)})


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, recipe: Recipe) -> PreparedSet:
    folder = tmp_path_factory.mktemp("data") / "prepared"
    return write_tiny_prepared(folder, recipe=recipe, studies=4, spacing_mm=16.0)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, prepared: PreparedSet, recipe: Recipe) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_tiny_runs(folder, prepared, recipe)
    return folder


@pytest.fixture(autouse=True)
def _base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny recipe as the base "tiny"."""
    content = merged(TINY, {"train": {"steps": dict.fromkeys(MODELS, STEPS)}})
    (tmp_path / "tiny.toml").write_text(toml(content))
    monkeypatch.setattr(training.ablation, "RECIPES", tmp_path)


def written(tmp_path: Path, text: str, name: str = "mine") -> str:
    path = tmp_path / f"{name}.toml"
    path.write_text(text)
    return str(path)


def forbid_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("trained")

    monkeypatch.setattr(training.ablation, "train_all", refuse)


def means(rows: list[AblationRow]) -> dict[str, float | None]:
    return {row.name: row.figures["MAE body"]["mean"] for row in rows}  # type: ignore[misc]


@pytest.mark.parametrize("name", sorted(shipped_ablations()))
def test_every_shipped_ablation_has_recipes_that_train_and_bundle(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training.ablation, "RECIPES", shipped_recipes()["phantom"].parent)
    ablation = load_ablation(name)
    for model in MODELS:
        recipes = variant_recipes(ablation, model=model, steps=None)
        assert list(recipes) == [variant.name for variant in ablation.variant]
        assert len({recipe.model_dump_json() for recipe in recipes.values()}) == len(recipes)  # each changes something
        for recipe in recipes.values():
            assert all(recipe.train.steps_for(model, key, 0) > 0 for key in recipe.networks)
            manifest = {"created": "2026-01-01T00:00:00Z", "spacing_mm": (4, 4, 4), "window": recipe.window}
            same = recipe.model_dump(include={"name", "version", "profile", "licence", "statement", "normalization"})
            entry = {"file": "a.safetensors", "sha256": "0" * 64, "spec": recipe.model.generator(model)}
            networks = dict.fromkeys(recipe.networks, entry)
            Manifest.model_validate(manifest | same | recipe.inference.model_dump() | {"networks": networks})


@pytest.mark.parametrize("name", ["overlap", "blending", "stitching"])
def test_ablations_of_inference_leave_every_weight_as_it_is(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training.ablation, "RECIPES", shipped_recipes()["phantom"].parent)
    recipes = variant_recipes(load_ablation(name), model="pix2pix", steps=None).values()
    for key in NETWORK_KEYS:
        assert len({recipe.training_digest("pix2pix", key) for recipe in recipes}) == 1


def test_changes_are_merged_table_by_table_and_the_base_stays() -> None:
    base = {"a": {"b": 1, "c": {"d": 2}}, "e": [1, 2]}
    assert merged(base, {"a": {"c": {"d": 3}}, "e": [4]}) == {"a": {"b": 1, "c": {"d": 3}}, "e": [4]}
    assert base == {"a": {"b": 1, "c": {"d": 2}}, "e": [1, 2]}


def test_steps_given_hold_for_every_network_of_the_variant(tmp_path: Path) -> None:
    recipes = variant_recipes(load_ablation(written(tmp_path, SEEN)), model="cyclegan", steps=7)
    assert recipes["body"].train.steps["cyclegan"] == dict.fromkeys(NETWORK_KEYS, 7)
    assert recipes["body"].train.steps["pix2pix"] == STEPS
    assert recipes["channel"].train.steps_for("cyclegan", "head", 1) == 7


def test_an_unknown_ablation_is_refused_with_the_names_that_there_are() -> None:
    with pytest.raises(RecipeError, match=r"'colour': neither one of \['blending', .*'window'\]"):
        load_ablation("colour")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("title = ", "mine"),
        ('title = "x"\nbase = "tiny"\n[[variant]]\nname = "one"\nchanges = {}\n', "variant"),
        (OVERLAP.replace("overlap = 8", "overlap = 16"), r"tiny \(half\): .*overlap 16 must be below the window 16"),
        (OVERLAP.replace("overlap = 8", "overlapp = 8"), r"tiny \(half\): inference\.overlapp"),
        (OVERLAP.replace('"tiny"', '"gone"'), "gone"),
        (OVERLAP.replace('"half"', '"none"'), "none"),
    ],
)
def test_an_ablation_that_cannot_be_is_refused_by_name(
    tmp_path: Path, prepared: PreparedSet, runs: Path, text: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_training(monkeypatch)
    with pytest.raises(RecipeError, match=said):
        run_ablation(written(tmp_path, text), prepared, runs, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_variant_of_inference_alone_uses_the_weights_that_are_there(
    tmp_path: Path, prepared: PreparedSet, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_training(monkeypatch)
    rows = run_ablation(written(tmp_path, OVERLAP), prepared, runs, tmp_path / "out")
    assert [(row.name, row.steps, row.trained) for row in rows] == [("none", 60, False), ("half", 60, False)]
    none, half = means(rows).values()
    assert none != half  # it was applied
    assert not (tmp_path / "out" / "runs").exists()

    text = (tmp_path / "out" / "mine.md").read_text()
    table = [line for line in text.splitlines() if line.startswith("| ")]
    assert [line.split("|")[1].strip() for line in table[2:]] == ["none", "half"]
    assert {line.count("|") for line in table} == {len(COLUMNS) + 3}
    assert f"{none:.4f}" in table[2]
    assert "mean ± SD over 1 validation studies" in text
    assert "says nothing about patients" in text
    assert "no network was trained for this table" in text
    with (tmp_path / "out" / "mine.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [(line["variant"], line["figure"]) for line in lines] == [(n, c) for n in ("none", "half") for c in COLUMNS]
    assert float(lines[0]["mean"]) == none
    assert all(line["n"] == "1" and math.isfinite(float(line["mean"])) for line in lines)
    assert all(0 < float(line["mean"]) < 1 for line in lines if line["figure"].startswith("MAE"))


def test_what_no_study_shows_is_absent_and_not_zero(
    tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_training(monkeypatch)
    partial = write_tiny_prepared(tmp_path / "p", recipe=recipe, studies=3, spacing_mm=16.0, coverage=(0.55, 0.8))
    write_tiny_runs(tmp_path / "runs", partial, recipe)
    rows = run_ablation(written(tmp_path, OVERLAP), partial, tmp_path / "runs", tmp_path / "out")
    assert all(row.figures["MAE legs"] == row.figures["MAE head"] for row in rows)
    assert rows[0].figures["MAE legs"]["mean"] is None
    assert "| - |" in (tmp_path / "out" / "mine.md").read_text()


def test_a_district_without_any_network_has_no_figure_and_nor_has_the_whole(
    tmp_path: Path, prepared: PreparedSet, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_training(monkeypatch)
    text = OVERLAP.replace("changes = {", 'changes = { networks = ["head"],')
    rows = run_ablation(written(tmp_path, text), prepared, runs, tmp_path / "out")
    for row in rows:
        found = {column for column in COLUMNS if row.figures[column]["mean"] is not None}
        assert found == {"MAE head", "s per study"}


def test_a_changed_input_is_trained_and_what_the_base_has_is_not(
    tmp_path: Path, prepared: PreparedSet, runs: Path
) -> None:
    text = SEEN.replace("changes = {}", 'changes = { networks = ["head", "whole_body"] }')
    text = text.replace('networks = ["head"]', 'networks = ["whole_body"]')
    said: list[str] = []  # trunk, arms and legs are the whole-body network's in both
    rows = run_ablation(written(tmp_path, text), prepared, runs, tmp_path / "out", on_progress=said.append)
    assert [(row.name, row.trained) for row in rows] == [("body", False), ("channel", True)]
    assert "channel: training whole_body" in said
    (record,) = find_runs(tmp_path / "out" / "runs" / "mine-1")
    assert (record.network, record.recipe.inference.input_mask, record.state) == ("whole_body", "channel", "done")
    assert record.steps == rows[1].steps == STEPS["whole_body"]
    assert "trained for this table: channel." in (tmp_path / "out" / "mine.md").read_text()
    assert all(v is not None and math.isfinite(v) for v in means(rows).values())


def test_weights_that_the_base_lacks_are_trained_once_for_all_variants(
    tmp_path: Path, prepared: PreparedSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = OVERLAP.replace("changes = {", 'changes = { networks = ["whole_body"],')
    trained = []

    def in_this_process(recipe: Recipe, _data: Path, folder: Path, **options: Any) -> None:
        trained.append(folder)
        (network,), device = options["networks"], torch.device("cpu")
        train_network(recipe, prepared, model="pix2pix", network=network, seed=0, runs=folder, device=device)

    monkeypatch.setattr(training.ablation, "train_all", in_this_process)
    rows = run_ablation(written(tmp_path, text), prepared, tmp_path / "empty", tmp_path / "out", steps=2)
    assert trained == [tmp_path / "out" / "runs" / "mine-0"]
    assert [(row.steps, row.trained) for row in rows] == [(2, True), (2, True)]


@pytest.mark.parametrize("change", [{"state": "running"}, {"steps": 3}, {"prepared_digest": "0" * 64}])
def test_runs_that_are_not_the_base_s_are_not_used(
    tmp_path: Path, prepared: PreparedSet, recipe: Recipe, change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_training(monkeypatch)
    records = write_tiny_runs(tmp_path / "runs", prepared, recipe)
    write_record(tmp_path / "runs", records[1].model_copy(update=change))
    with pytest.raises(AssertionError, match="trained"):
        run_ablation(written(tmp_path, OVERLAP), prepared, tmp_path / "runs", tmp_path / "out")


def test_data_of_another_recipe_are_refused_before_anything_is_trained(tmp_path: Path, recipe: Recipe) -> None:
    other = recipe.model_copy(update={"split": recipe.split.model_copy(update={"seed": 9})})
    foreign = write_tiny_prepared(tmp_path / "p", recipe=other, studies=3, spacing_mm=16.0)
    with pytest.raises(DataError, match="prepare into another folder"):
        run_ablation(written(tmp_path, OVERLAP), foreign, tmp_path / "empty", tmp_path / "out")


def test_the_command_prints_the_table(tmp_path: Path, prepared: PreparedSet, runs: Path) -> None:
    words = ["train", "ablation", written(tmp_path, OVERLAP), "--data", str(prepared.folder), "--runs", str(runs)]
    ran = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "out"), "--device", "cpu", "--limit", "1"])
    assert ran.exit_code == 0, ran.output
    assert "# Overlap" in ran.output
    assert CliRunner().invoke(app, ["train", "ablation", "overlap", "--model", "vae"]).exit_code == 2
    ran = CliRunner().invoke(app, ["train", "ablation", "colour", "--data", str(prepared.folder)])
    assert (ran.exit_code, len(ran.stderr.strip().splitlines())) == (1, 1)
