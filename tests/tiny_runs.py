"""Run directories as `train run` leaves them, of untrained networks: for tests of what comes after training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save

from pipeline.bundle import NETWORK_KEYS
from pipeline.networks import build_network
from training.files import sha256_of, write_whole
from training.prepared import PreparedSet
from training.recipe import ModelName, Recipe
from training.runs import WEIGHTS, RunRecord, write_record


def write_tiny_run(
    runs: Path, prepared: PreparedSet, recipe: Recipe, network: str, *, model: ModelName = "pix2pix", seed: int = 0
) -> RunRecord:
    """One finished run with first weights that depend on network and seed."""
    record = RunRecord(
        recipe=recipe,
        training_digest=recipe.training_digest(model, network),
        prepared_folder=str(prepared.folder),
        prepared_digest=prepared.manifest.digest,
        split_digest=prepared.manifest.split_digest,
        model=model,
        network=network,
        seed=seed,
        steps=10 + NETWORK_KEYS.index(network),
        step=10,
        state="done",
        seconds=90.0,
        device="cpu",
    )
    folder = runs / record.folder_name
    folder.mkdir(parents=True)
    torch.manual_seed(100 * seed + NETWORK_KEYS.index(network))
    write_whole(folder / WEIGHTS, save(build_network(recipe.model.generator(model)).state_dict()))
    record = record.model_copy(update={"weights_sha256": sha256_of(folder / WEIGHTS)})
    write_record(runs, record)
    return record


def write_tiny_runs(
    runs: Path,
    prepared: PreparedSet,
    recipe: Recipe,
    *,
    models: Sequence[ModelName] = ("pix2pix",),
    seeds: Sequence[int] = (0,),
    networks: Sequence[str] = NETWORK_KEYS,
) -> list[RunRecord]:
    """Finished runs of all of these."""
    return [
        write_tiny_run(runs, prepared, recipe, network, model=model, seed=seed)
        for model in models
        for seed in seeds
        for network in networks
    ]
