"""Finished runs become a bundle: whole or absent, only with a report on these very weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save
from typer.testing import CliRunner

from dicom_node.cli import app
from pipeline.bundle import CARD, MANIFEST, NETWORK_KEYS, load_bundle
from pipeline.errors import BundleError
from pipeline.networks import build_network
from pipeline.types import District
from training import export as export_module
from training.errors import DataError, RunError, TrainingError
from training.evaluation.report_format import EvaluationReport
from training.export import assemble_bundle, export_bundle, recipe_of, runs_of, tissue_statistics
from training.files import sha256_of
from training.prepared import DTYPES, PreparedManifest, PreparedSet, StudyRecord, open_prepared
from training.recipe import MODELS, Recipe, load_recipe
from training.runs import WEIGHTS, RunRecord, write_record

CREATED = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
SPACING = (8.0, 8.0, 8.0)
SIDES = ("train", "train", "validation", "test")


def small_recipe(**changes: Any) -> Recipe:
    recipe = load_recipe("phantom")
    small = {"width": 2, "depth": 2, "window": 16}
    specs: dict[str, Any] = {m: recipe.model.generator(m).model_copy(update=small) for m in MODELS}
    model = recipe.model.model_copy(update=specs)
    inference = recipe.inference.model_copy(update={"overlap": 8})
    return recipe.model_copy(update={"model": model, "inference": inference, **changes})


def write_prepared(folder: Path, recipe: Recipe) -> PreparedSet:
    """Four studies of three patients, 2 x 2 x 2 voxels each."""
    studies = []
    for index, side in enumerate(SIDES):
        place = folder / "studies" / f"study-{index}"
        place.mkdir(parents=True)
        files = {}
        for name in ("ct", "pet", "districts", "lesions"):
            np.save(place / f"{name}.npy", np.full((2, 2, 2), index, dtype=DTYPES[name]))
            files[name] = sha256_of(place / f"{name}.npy")
        record = StudyRecord(
            id=f"study-{index}",
            patient=f"p{max(index, 1)}",
            shape=(2, 2, 2),
            spacing_mm=SPACING,
            origin_mm=(0, 0, 0),
            files=files,
            segmenter="given",
            split=side,
        )
        studies.append(record)
    manifest = PreparedManifest(
        recipe=recipe.name,
        prepare_digest=recipe.prepare_digest,
        layout="nifti",
        phantom=True,
        spacing_mm=SPACING,
        studies=tuple(studies),
        statistics={"head": {"suv_mean": 3.0}},
    )
    (folder / "manifest.json").write_text(manifest.model_dump_json())
    return open_prepared(folder)


def write_run(
    runs: Path, prepared: PreparedSet, recipe: Recipe, key: str, *, seed: int = 0, **changes: Any
) -> RunRecord:
    record = RunRecord(
        recipe=recipe,
        training_digest=recipe.training_digest("pix2pix", key),
        prepared_folder=str(prepared.folder),
        prepared_digest=prepared.manifest.digest,
        split_digest=prepared.manifest.split_digest,
        model="pix2pix",
        network=key,
        seed=seed,
        steps=10,
        step=10,
        state="done",
        seconds=90.0,
        device="cpu",
        torch=torch.__version__,
    )
    torch.manual_seed(seed * 10 + NETWORK_KEYS.index(key))
    data = save(build_network(recipe.model.pix2pix).state_dict())
    record = record.model_copy(update={"weights_sha256": hashlib.sha256(data).hexdigest(), **changes})
    write_record(runs, record)
    (runs / record.folder_name / WEIGHTS).write_bytes(data)
    return record


def statistic(mean: float | None) -> dict[str, float | int | None]:
    return {"n": 1, "mean": mean, "sd": 0.1, "se": 0.1, "low": 0.0, "high": 1.0}


def write_report(folder: Path, prepared: PreparedSet, runs: list[RunRecord], **changes: Any) -> Path:
    means = {"body": 0.01, "head": 0.02, "trunk": 0.03, "arms": 0.04, "legs": None}
    methods = ("pix2pix/districts", "pix2pix/whole_body", "cyclegan/districts", "hu_lookup", "district_mean")
    content: dict[str, Any] = {
        "created": CREATED,
        "recipe": "phantom",
        "split": "test",
        "studies": 1,
        "patients": 1,
        "phantom": True,
        "prepared_digest": prepared.manifest.digest,
        "split_digest": prepared.manifest.split_digest,
        "weights": {record.folder_name.as_posix(): record.weights_sha256 for record in runs},
        "summary": {key: {region: {"mae": statistic(mean)} for region, mean in means.items()} for key in methods},
    }
    folder.mkdir(parents=True, exist_ok=True)
    report = EvaluationReport.model_validate(content | changes)
    (folder / "report.json").write_text(report.model_dump_json())
    return folder


class Workshop:
    """Prepared data, finished runs of all five networks, and a report on them."""

    def __init__(self, root: Path) -> None:
        self.recipe = small_recipe()
        self.root, self.runs = root, root / "runs"
        self.prepared = write_prepared(root / "prepared", self.recipe)
        self.records = [write_run(self.runs, self.prepared, self.recipe, key) for key in NETWORK_KEYS]
        self.report = write_report(self.runs / "report", self.prepared, self.records)

    def export(self, out: str = "bundle", **changes: Any) -> Any:
        arguments: dict[str, Any] = {"created": CREATED} | changes
        return export_bundle(self.runs, self.prepared, self.report, self.root / out, **arguments)


@pytest.fixture
def shop(tmp_path: Path) -> Workshop:
    return Workshop(tmp_path)


def refused(call: Callable[[], object]) -> tuple[str, str]:
    with pytest.raises(TrainingError) as caught:
        call()
    return caught.value.code, caught.value.text


def test_the_bundle_holds_every_network_byte_for_byte_and_the_recipe_s_settings(shop: Workshop) -> None:
    bundle = shop.export()
    manifest = bundle.manifest
    assert bundle.keys == NETWORK_KEYS
    version = load_recipe("phantom").version
    assert (manifest.name, manifest.version, manifest.spacing_mm, manifest.window) == ("phantom", version, SPACING, 16)
    assert (manifest.overlap, manifest.blending, manifest.stitching) == (8, "gaussian", "feathered")
    assert manifest.statistics == {"head": {"suv_mean": 3.0}}
    for record in shop.records:
        copied = (bundle.folder / f"{record.network}.safetensors").read_bytes()
        assert copied == (shop.runs / record.folder_name / WEIGHTS).read_bytes()
        assert bundle.network(record.network, torch.device("cpu")) is not None
    assert sorted(path.name for path in shop.root.iterdir()) == ["bundle", "prepared", "runs"]


def test_the_tissues_of_the_training_studies_are_measured_for_the_output_gate(tmp_path: Path) -> None:
    prepared = write_prepared(tmp_path, small_recipe())
    scaling = small_recipe().normalization  # HU -1000 to 1000, SUV up to 20
    for number, record in enumerate(prepared.studies("train")):
        lung, muscle, head = np.full((3, 200), District.TRUNK)
        head[:] = District.HEAD
        place = prepared.folder / "studies" / record.id
        for name, rows in {
            "districts": (lung, muscle, head),
            "ct": (np.full(200, 0.1), np.full(200, 0.525), np.full(200, 0.525)),  # -800, 50 and 50 HU
            "pet": (np.full(200, 0.025), np.full(200, 0.05 * (number + 1)), np.full(200, 0.5)),
        }.items():
            np.save(place / f"{name}.npy", np.stack(rows)[:, :, None].astype(DTYPES[name]))
    told = tissue_statistics(prepared, scaling)["tissues"]
    assert told.keys() == {"lung", "soft_tissue"}  # the head's soft tissue is the brain
    assert told["lung"] == {"studies": 2, "suv_mean_range": pytest.approx([0.5, 0.5], rel=1e-3)}
    assert told["soft_tissue"] == {"studies": 2, "suv_mean_range": pytest.approx([1.0, 2.0], rel=1e-3)}
    assert tissue_statistics(prepared, scaling.model_copy(update={"ct_range": "volume"})) == {}  # no HU to go by


def test_a_network_that_was_trained_longer_brings_its_recipe(tmp_path: Path) -> None:
    def of(arms: int, version: str) -> Recipe:
        recipe = load_recipe("phantom")
        steps = {"pix2pix": {"head": 10, "arms": arms}}
        return recipe.model_copy(
            update={"version": version, "train": recipe.train.model_copy(update={"steps": steps})},
        )

    before, after = of(10, "1"), of(20, "2")
    prepared = write_prepared(tmp_path / "data", before)
    head = write_run(tmp_path, prepared, before, "head")
    arms = write_run(tmp_path, prepared, after, "arms", steps=20, step=20)
    assert recipe_of({"head": head, "arms": arms}) is after
    shorter = arms.model_copy(update={"steps": 5})
    assert recipe_of({"head": head, "arms": shorter}) is before  # a trial: no recipe fits, the first is taken


def test_the_lineage_names_recipe_data_split_runs_and_software(shop: Workshop) -> None:
    training = shop.export().manifest.training
    assert training["recipe"] == shop.recipe.model_dump(mode="json")
    assert training["data_sha256"] == shop.prepared.manifest.digest
    assert training["split_sha256"] == shop.prepared.manifest.split_digest
    assert training["splits"]["train"] == {"studies": 2, "patients": 1}
    assert training["software"].startswith("dicom-node ")
    assert {key: run["seed"] for key, run in training["networks"].items()} == dict.fromkeys(NETWORK_KEYS, 0)
    assert training["networks"]["head"]["training_digest"] == shop.recipe.training_digest("pix2pix", "head")
    assert len(training["recipe_sha256"]) == 64


def test_the_metrics_are_this_model_s_and_the_baselines(shop: Workshop) -> None:
    metrics = shop.export().manifest.metrics
    summary = metrics["summary"]
    assert metrics["seeds"] == [0]
    assert list(summary) == ["pix2pix/districts", "pix2pix/whole_body", "hu_lookup", "district_mean"]
    assert summary["pix2pix/districts"]["head"]["mae"]["mean"] == 0.02


def test_a_name_and_a_version_can_be_given(shop: Workshop) -> None:
    manifest = shop.export(name="mine", version="7").manifest
    assert (manifest.name, manifest.version) == ("mine", "7")


def test_without_a_report_nothing_is_exported(shop: Workshop) -> None:
    (shop.report / "report.json").unlink()
    code, text = refused(shop.export)
    assert code == "report_missing"
    assert "train evaluate" in text
    assert not (shop.root / "bundle").exists()


def test_a_report_on_other_weights_is_refused_and_names_the_network(shop: Workshop) -> None:
    write_run(shop.runs, shop.prepared, shop.recipe, "trunk", seed=0)
    other = {r.folder_name.as_posix(): r.weights_sha256 for r in shop.records} | {"pix2pix/trunk/seed-0": "0" * 64}
    write_report(shop.report, shop.prepared, shop.records, weights=other)
    code, text = refused(shop.export)
    assert code == "report_foreign"
    assert "pix2pix/trunk/seed-0" in text


def test_a_report_that_did_not_measure_a_network_is_refused(shop: Workshop) -> None:
    write_report(shop.report, shop.prepared, shop.records[:-1])
    code, text = refused(shop.export)
    assert (code, "whole_body/seed-0 was not measured" in text) == ("report_foreign", True)


def test_a_report_on_other_data_is_refused(shop: Workshop) -> None:
    write_report(shop.report, shop.prepared, shop.records, prepared_digest="0" * 64)
    assert refused(shop.export)[0] == "report_foreign"


def test_prepared_data_that_the_runs_were_not_trained_on_are_refused(shop: Workshop) -> None:
    changed = shop.prepared.manifest.model_copy(update={"layout": "tcia"})
    shop.prepared = PreparedSet(folder=shop.prepared.folder, manifest=changed)
    assert refused(shop.export)[0] == "run_foreign"


def test_the_prepared_data_are_found_where_the_runs_say(shop: Workshop) -> None:
    folder = shop.prepared.folder
    shop.prepared = None  # type: ignore[assignment]
    assert shop.export().manifest.spacing_mm == SPACING
    folder.rename(folder.with_name("moved"))
    with pytest.raises(DataError, match="train prepare"):
        shop.export("second")


def test_an_unfinished_run_is_refused(shop: Workshop) -> None:
    write_run(shop.runs, shop.prepared, shop.recipe, "legs", state="running", step=3)
    assert refused(shop.export)[0] == "run_unfinished"


def test_a_network_of_the_recipe_without_a_run_is_refused_by_name(shop: Workshop) -> None:
    (shop.runs / "pix2pix" / "arms" / "seed-0" / "run.json").unlink()
    code, text = refused(shop.export)
    assert (code, "no run of arms" in text) == ("run_missing", True)
    assert refused(lambda: runs_of(shop.runs, "cyclegan", 0))[0] == "run_missing"
    assert refused(lambda: shop.export(seed=4))[0] == "run_missing"


def test_weights_that_changed_after_training_are_refused(shop: Workshop) -> None:
    path = shop.runs / "pix2pix" / "head" / "seed-0" / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    assert refused(shop.export)[0] == "weights_altered"


def test_a_failure_in_the_middle_leaves_nothing(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_module, "model_card", full)
    assert refused(shop.export) == ("not_written", f"bundle folder {shop.root / 'bundle'}: No space left on device")
    assert sorted(path.name for path in shop.root.iterdir()) == ["prepared", "runs"]


def test_an_occupied_folder_is_refused_and_an_earlier_bundle_goes_only_when_asked(shop: Workshop) -> None:
    first = shop.export()
    assert refused(shop.export)[0] == "out_exists"
    second = shop.export(version="9", replace=True)
    assert second.manifest_sha256 != first.manifest_sha256
    (shop.root / "mine").mkdir()
    (shop.root / "mine" / "thesis.txt").write_text("x")
    assert refused(lambda: shop.export("mine", replace=True))[0] == "out_exists"
    assert (shop.root / "mine" / "thesis.txt").exists()


def test_the_working_folder_can_be_the_bundle_s(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shop.root / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)
    export_bundle(shop.runs, shop.prepared, shop.report, Path(), created=CREATED)
    assert load_bundle(folder).keys


@pytest.mark.parametrize("name", ["../x", "a/b", ".hidden", "a b"])
def test_a_name_that_is_no_folder_s_is_refused(shop: Workshop, name: str) -> None:
    with pytest.raises(BundleError, match="bundle_name"):
        shop.export(name=name)


def test_a_changed_or_missing_card_is_refused_at_load_and_an_extra_file_is_not(shop: Workshop) -> None:
    folder = shop.export().folder
    (folder / "notes.txt").write_text("mine")
    assert load_bundle(folder).manifest.files == {CARD: sha256_of(folder / CARD)}
    card = folder / CARD
    text = card.read_text()
    card.write_text(text.replace("Not for clinical use", "For clinical use"))
    with pytest.raises(BundleError, match=r"file_altered: .*MODEL_CARD\.md"):
        load_bundle(folder)
    card.unlink()
    with pytest.raises(BundleError, match="file_missing"):
        load_bundle(folder)


def test_one_changed_byte_of_an_exported_manifest_is_refused(shop: Workshop) -> None:
    path = shop.export().folder / MANIFEST
    text = path.read_text()
    path.write_text(text.replace('"suv_max": 20.0', '"suv_max": 30.0', 1))
    assert path.read_text() != text
    with pytest.raises(BundleError, match="manifest_altered"):
        load_bundle(path.parent)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", ".."])
def test_a_manifest_cannot_name_a_file_outside_its_folder(shop: Workshop, name: str) -> None:
    folder = shop.export().folder
    content = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(content | {"files": {name: "0" * 64}}))
    with pytest.raises(BundleError, match="manifest_invalid"):
        load_bundle(folder)


def test_assembled_for_measuring_it_has_neither_card_nor_lineage(shop: Workshop) -> None:
    records = {"head": shop.records[0], "whole_body": shop.records[4]}
    bundle = assemble_bundle(shop.runs, records, shop.root / "temp", spacing_mm=SPACING, created=CREATED)
    assert bundle.keys == ("head", "whole_body")
    assert sorted(path.name for path in bundle.folder.iterdir()) == [
        "head.safetensors", "manifest.json", "whole_body.safetensors",
    ]  # fmt: skip


def test_no_run_at_all_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="at least one"):
        assemble_bundle(tmp_path, {}, tmp_path / "b", spacing_mm=SPACING, created=CREATED)


def test_the_command_writes_the_bundle_and_says_where_its_card_is(shop: Workshop) -> None:
    words = ["train", "export", str(shop.runs), "--out", str(shop.root / "out"), "--name", "x"]
    done = CliRunner().invoke(app, words, env={"COLUMNS": "250"})
    assert done.exit_code == 0, done.output
    assert load_bundle(shop.root / "out").manifest.name == "x"
    assert "MODEL_CARD.md" in done.output


def test_the_command_refuses_in_one_line_without_a_report(shop: Workshop) -> None:
    (shop.report / "report.json").unlink()
    done = CliRunner().invoke(app, ["train", "export", str(shop.runs), "--out", str(shop.root / "out")])
    assert done.exit_code == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert "train evaluate" in done.stderr
    assert not (shop.root / "out").exists()
