"""From finished runs to a model bundle: a folder that is whole or absent, checked by reading it back."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from pipeline.bundle import CARD, MANIFEST, Manifest, ModelBundle, NetworkEntry, load_bundle
from training.errors import RunError
from training.files import write_whole
from training.runs import WEIGHTS, RunRecord, check_runs_fit


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
    recipe = next(iter(records.values())).recipe
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
    write_whole(folder / MANIFEST, (manifest.model_dump_json(indent=2) + "\n").encode())
    return load_bundle(folder)


def _copy_weights(runs: Path, record: RunRecord, folder: Path, key: str) -> NetworkEntry:
    path = runs / record.folder_name / WEIGHTS
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != record.weights_sha256:
        raise RunError("weights_altered", f"{path}: not the weights that this run ended with")
    write_whole(folder / f"{key}.safetensors", data)
    spec = record.recipe.model.generator(record.model)
    return NetworkEntry(file=f"{key}.safetensors", sha256=record.weights_sha256, spec=spec)
