"""From finished runs to a model bundle: a folder that is whole or absent, checked by reading it back."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from datetime import datetime
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any, get_args

import numpy as np

from pipeline.bundle import CARD, MANIFEST, Manifest, ModelBundle, NetworkEntry, Normalization, load_bundle
from pipeline.gate.tissues import TISSUES, tissue_means
from pipeline.installing import checked_name, put_in_place
from training.card import model_card
from training.errors import RunError
from training.evaluation.report_format import EvaluationReport, read_report
from training.files import write_whole
from training.loop.start import has_own_length
from training.prepared import PreparedManifest, PreparedSet, Split, open_prepared, patients
from training.recipe import MODELS, ModelName, Recipe
from training.runs import WEIGHTS, RunRecord, check_runs_fit, find_runs

PRODUCT = "dicom-node"


def assemble_bundle(
    runs: Path,
    records: Mapping[str, RunRecord],
    folder: Path,
    *,
    spacing_mm: tuple[float, float, float],
    created: datetime,
    name: str | None = None,
    version: str | None = None,
    metrics: Mapping[str, Any] | None = None,
    statistics: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    card: Callable[[Manifest], str] | None = None,
) -> ModelBundle:
    """Write a bundle of finished runs into `folder` and load it back.

    Args:
        runs: where the run directories are.
        records: the run of each network, by the network's key; all of one recipe.
        folder: is made; what it holds under the same names is replaced. Not whole if this is interrupted.
        spacing_mm: (z, y, x) of the grid that the networks were trained on: the prepared manifest's.
        created: aware UTC time, for the manifest.
        name: of the bundle; None: the recipe's, and so with `version`.
        metrics: and `statistics`, `training`: go into the manifest as they are.
        card: makes the model card's text of the manifest; None: no card.

    Raises:
        RunError: run_missing, run_unfinished, run_foreign (recipes or data differ), weights_altered.
        BundleError: what was written cannot be read back.
        ValueError: the recipe's settings make no manifest (a pydantic ValidationError).
    """
    if not records:
        raise RunError("run_missing", f"{runs}: a bundle needs at least one finished run")
    check_runs_fit(runs, records.values())
    recipe = recipe_of(records)
    folder.mkdir(parents=True, exist_ok=True)
    entries = {key: _copy_weights(runs, record, folder, key) for key, record in records.items()}
    manifest = Manifest(
        name=name or recipe.name,
        version=version or recipe.version,
        created=created,
        profile=recipe.profile,
        licence=recipe.licence,
        statement=recipe.statement,
        spacing_mm=spacing_mm,
        window=recipe.window,
        normalization=recipe.normalization,
        networks=entries,
        metrics=dict(metrics or {}),
        statistics=dict(statistics or {}),
        training=dict(training or {}),
        **recipe.inference.model_dump(),
    )
    if card is not None:
        text = card(manifest).encode()
        write_whole(folder / CARD, text)
        manifest = manifest.model_copy(update={"files": {CARD: hashlib.sha256(text).hexdigest()}})
    write_whole(folder / MANIFEST, (manifest.sealed().model_dump_json(indent=2) + "\n").encode())
    return load_bundle(folder)


def _copy_weights(runs: Path, record: RunRecord, folder: Path, key: str) -> NetworkEntry:
    path = runs / record.folder_name / WEIGHTS
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != record.weights_sha256:
        raise RunError("weights_altered", f"{path}: not the weights that this run ended with")
    write_whole(folder / f"{key}.safetensors", data)
    spec = record.recipe.model.generator(record.model)
    return NetworkEntry(file=f"{key}.safetensors", sha256=record.weights_sha256, spec=spec)


def export_bundle(
    runs: Path,
    prepared: PreparedSet | None,
    report: Path,
    out: Path,
    *,
    model: ModelName = "pix2pix",
    seed: int = 0,
    name: str | None = None,
    version: str | None = None,
    created: datetime,
    replace: bool = False,
) -> ModelBundle:
    """Make a bundle of one model's finished runs and the report on them; `out` is whole or not there.

    Args:
        runs: where the run directories are; every network of their recipe is needed.
        prepared: the data that they were trained on; None: opened where the runs say.
        report: the folder that `train evaluate` wrote.
        out: the bundle's folder; must not be there, or empty.
        model: which of the models.
        seed: which of the runs.
        name: of the bundle; None: the recipe's, and so with `version`.
        created: aware UTC time, for the manifest and the card.
        replace: an earlier bundle at `out` may go.

    Raises:
        RunError: report_missing, report_invalid, report_foreign (the report is of other weights or data),
            run_missing, run_unfinished, run_foreign, weights_altered, out_exists; not_written (the disk).
        DataError: the prepared data are not there.
        BundleError: the name cannot be a folder's.
    """
    evaluation = read_report(report)
    records = runs_of(runs, model, seed)
    check_runs_fit(runs, records.values())
    recipe = recipe_of(records)
    prepared = prepared or open_prepared(Path(next(iter(records.values())).prepared_folder), verify=False)
    _check_report(evaluation, records, prepared.manifest)
    checked_name(name or recipe.name)
    occupied = out.exists() and (not out.is_dir() or any(out.iterdir()))
    if occupied and not (replace and (out / MANIFEST).is_file()):
        raise RunError("out_exists", f"{out}: is there already; name another folder, or replace an earlier bundle")
    out = out.resolve()  # "." has no name
    part = out.with_name(out.name + ".tmp")
    shutil.rmtree(part, ignore_errors=True)
    try:
        assemble_bundle(
            runs,
            records,
            part,
            spacing_mm=prepared.manifest.spacing_mm,
            created=created,
            name=name,
            version=version,
            metrics=metrics_of(evaluation, model),
            statistics={**prepared.manifest.statistics, **tissue_statistics(prepared, recipe.normalization)},
            training=lineage(records, prepared.manifest),
            card=lambda manifest: model_card(manifest, evaluation),
        )
        put_in_place(part, out)
    except OSError as error:
        raise RunError("not_written", f"bundle folder {out}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return load_bundle(out)


def runs_of(runs: Path, model: ModelName, seed: int) -> dict[str, RunRecord]:
    """The runs of one model and seed, by network, in the recipe's order.

    Raises:
        RunError: run_missing, with the networks that have no run, or run_invalid.
    """
    found = {r.network: r for r in find_runs(runs) if (r.model, r.seed) == (model, seed)}
    if not found:
        raise RunError("run_missing", f"{runs}: no run of {model} with seed {seed}")
    wanted = next(iter(found.values())).recipe.networks
    if missing := [key for key in wanted if key not in found]:
        text = f"{runs}: {model}, seed {seed}: no run of {', '.join(missing)}; `train run` makes them"
        raise RunError("run_missing", text)
    return {key: found[key] for key in wanted}


def tissue_statistics(prepared: PreparedSet, scaling: Normalization) -> dict[str, Any]:
    """For the output gate: the mean SUV of each tissue (`pipeline.gate.tissues`) in the training studies.

    From the clipped and scaled volumes that the networks saw; nothing for scaling by volume, which keeps no HU.
    """
    if scaling.ct_range != "fixed":
        return {}
    means: dict[str, list[float]] = {tissue.name: [] for tissue in TISSUES}
    for study in prepared.load_split("train"):
        hu = study.ct.astype(np.float32) * (scaling.ct_high_hu - scaling.ct_low_hu) + scaling.ct_low_hu
        suv = scaling.unit_to_suv(study.pet)
        for tissue, mean in tissue_means(hu, suv, study.districts, study.record.grid.voxel_ml).items():
            means[tissue.name].append(round(mean, 4))
    told = {
        name: {"studies": len(found), "suv_mean_range": [min(found), max(found)]}
        for name, found in means.items()
        if found
    }
    return {"tissues": told} if told else {}


def recipe_of(records: Mapping[str, RunRecord]) -> Recipe:
    """The recipe of the runs: of several versions the one whose steps all of them have, else the first run's.

    Networks may be trained longer one by one: a run keeps the recipe that it was begun with.
    """
    recipes = [record.recipe for record in records.values()]
    whole = (recipe for recipe in recipes if all(has_own_length(record, recipe) for record in records.values()))
    return next(whole, recipes[0])


def _check_report(report: EvaluationReport, records: Mapping[str, RunRecord], prepared: PreparedManifest) -> None:
    for record in records.values():
        where = record.folder_name.as_posix()
        if report.weights.get(where) != record.weights_sha256:
            said = "was not measured" if where not in report.weights else "has other weights than those measured"
            raise RunError("report_foreign", f"report of {report.created:%Y-%m-%d %H:%M}: {where} {said}")
        if record.prepared_digest != prepared.digest:
            text = f"{where}: trained on data {record.prepared_digest[:12]}, the prepared data are"
            raise RunError("run_foreign", f"{text} {prepared.digest[:12]}")
    if report.prepared_digest != prepared.digest:
        text = f"measured on data {report.prepared_digest[:12]}, the runs are of {prepared.digest[:12]}"
        raise RunError("report_foreign", f"report of {report.created:%Y-%m-%d %H:%M}: {text}")


def metrics_of(report: EvaluationReport, model: ModelName) -> dict[str, Any]:
    """What the manifest keeps of a report: this model's rows and the baselines'."""
    own = (f"{model}/districts", f"{model}/whole_body")
    others = {f"{other}/{kind}" for other in MODELS if other != model for kind in ("districts", "whole_body")}
    baselines = [method for method in report.summary if method not in own and method not in others]
    methods = [method for method in (*own, *baselines) if method in report.summary]
    return {
        "created": report.created.isoformat(),
        "split": report.split,
        "studies": report.studies,
        "patients": report.patients,
        "phantom": report.phantom,
        "seeds": sorted({int(run.rpartition("-")[2]) for run in report.weights if run.startswith(f"{model}/")}),
        "data_range": "1.0 = suv_max; inside district and body",
        "summary": {method: report.summary[method] for method in methods},
    }


def lineage(records: Mapping[str, RunRecord], prepared: PreparedManifest) -> dict[str, Any]:
    """Where the weights come from: recipe, data, split, runs, software; digests are SHA-256.

    `data_sha256` and `recipe_sha256` are what the node writes into its DICOM objects.
    """
    recipe = recipe_of(records)
    dump = recipe.model_dump(mode="json")
    sides: dict[str, dict[str, int]] = {}
    for split in get_args(Split):
        studies = [study for study in prepared.studies if study.split == split]
        sides[split] = {"studies": len(studies), "patients": patients(studies)}
    return {
        "recipe": dump,
        "recipe_sha256": hashlib.sha256(json.dumps(dump, sort_keys=True).encode()).hexdigest(),
        "data_sha256": prepared.digest,
        "split_sha256": prepared.split_digest,
        "prepare_digest": prepared.prepare_digest,
        "layout": prepared.layout,
        "phantom": prepared.phantom,
        "split_unit": recipe.split.unit,
        "splits": sides,
        "refused": len(prepared.refused),
        "software": f"{PRODUCT} {installed_version(PRODUCT)}",
        "networks": {
            key: {
                "model": record.model,
                "seed": record.seed,
                "steps": record.steps,
                "seconds": round(record.seconds),
                "device": record.device,
                "torch": record.torch,
                "training_digest": record.training_digest,
                "losses": record.losses,
            }
            for key, record in records.items()
        },
    }
