"""Writing a model bundle: safetensors files and the manifest, each whole or absent, the manifest last."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import nn

from pipeline.bundle import MANIFEST, Manifest, NetworkEntry
from training.recipe import Recipe


def write_whole(path: Path, data: bytes) -> None:
    """Temp file beside the target, fsync, rename, fsync of the folder."""
    temp = path.with_name(path.name + ".tmp")
    with temp.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temp.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json`, indented, one line per value."""
    write_whole(folder / MANIFEST, (manifest.model_dump_json(indent=2) + "\n").encode())


def export_bundle(
    folder: Path,
    networks: Mapping[str, nn.Module],
    recipe: Recipe,
    *,
    created: datetime,
    training: Mapping[str, Any],
    metrics: Mapping[str, Any],
    statistics: Mapping[str, Any],
) -> Manifest:
    """Write one safetensors file per network and the manifest that names their hashes; returns the manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    entries: dict[str, NetworkEntry] = {}
    for key, network in networks.items():
        data = save({name: tensor.contiguous().cpu() for name, tensor in network.state_dict().items()})
        file = f"{key}.safetensors"
        write_whole(folder / file, data)
        digest = hashlib.sha256(data).hexdigest()
        entries[key] = NetworkEntry(file=file, sha256=digest, spec=recipe.model.generator)
    inference = recipe.inference
    manifest = Manifest(
        name=recipe.name,
        version=recipe.version,
        created=created,
        profile=recipe.profile,
        licence=recipe.licence,
        statement=recipe.statement,
        spacing_mm=recipe.data.spacing_mm,
        window=recipe.model.generator.window,
        overlap=inference.overlap,
        blending=inference.blending,
        stitching=inference.stitching,
        feather_mm=inference.feather_mm,
        input_mask=inference.input_mask,
        normalization=recipe.normalization,
        networks=entries,
        training=dict(training),
        metrics=dict(metrics),
        statistics=dict(statistics),
    )
    write_manifest(folder, manifest)
    return manifest
