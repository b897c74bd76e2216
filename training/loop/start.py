"""What is checked before a network is trained: the data, the recipe, and the run directory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from training.errors import DataError, RunError
from training.prepared import PreparedSet
from training.recipe import ModelName, Recipe
from training.runs import RECORD, RunRecord, read_record

# a recipe's parts that no weight depends on: they may change between the start of a run and its end
FREE = ("name", "version", "profile", "licence", "statement", "networks", "inference", "validation", "train.compile")
SHOWN = 4


def check_prepared(recipe: Recipe, prepared: PreparedSet) -> None:
    """Refuse data that were prepared otherwise than the recipe says, and an empty training split.

    Raises:
        DataError: prepared_foreign, no_training.
    """
    manifest = prepared.manifest
    if manifest.prepare_digest != recipe.prepare_digest:
        text = (
            f"{prepared.folder}: prepared with the recipe {manifest.recipe!r}; normalization, prepare or split differ"
        )
        raise DataError("prepared_foreign", f"{text} from {recipe.name!r}: prepare into another folder")
    if not prepared.studies("train"):
        raise DataError("no_training", f"{prepared.folder}: {len(manifest.studies)} studies, none of them for training")


def check_run(runs: Path, wanted: RunRecord, *, steps: int | None) -> RunRecord | None:
    """The record of the run that is already in the run directory; None when there is none.

    Args:
        steps: how many were asked for, None for the recipe's own number: a shorter trial is not taken for the run.

    Raises:
        RunError: run_foreign, naming what differs from `wanted`; run_invalid.
    """
    folder = runs / wanted.folder_name
    if not (folder / RECORD).is_file():
        return None
    found = read_record(folder)
    differences = list(_recipe_differences(found, wanted))
    if found.prepared_digest != wanted.prepared_digest:
        differences.append(f"data {found.prepared_digest[:12]}, now {wanted.prepared_digest[:12]}")
    if steps is not None and found.steps != steps:
        differences.append(f"{found.steps} steps, now {steps}")
    if steps is None and not has_own_length(found, wanted.recipe):
        differences.append(f"{found.steps} steps, now the recipe's own number")
    if differences:
        listed = "; ".join(differences[:SHOWN])
        text = f"{folder}: a run of something else lies there ({listed})"
        raise RunError("run_foreign", f"{text}; choose another --runs or remove that folder")
    return found


def has_own_length(record: RunRecord, recipe: Recipe) -> bool:
    """Whether a run's steps are those of the recipe, and not of `--steps`; with epochs, for any number of studies."""
    train = recipe.train
    if (own := train.steps.get(record.model, {}).get(record.network)) is not None:
        return record.steps == own
    patches = train.epochs * train.patches_per_volume
    studies = -(-record.steps * train.batch // patches) if patches else 0
    return not patches or record.steps == patches * studies // train.batch


def _recipe_differences(found: RunRecord, wanted: RunRecord) -> Iterator[str]:
    if found.recipe.seed != wanted.recipe.seed:
        yield f"recipe seed {found.recipe.seed}, now {wanted.recipe.seed}"
    if found.training_digest == wanted.training_digest:
        return
    before, now = (_weighty(record.recipe, record.model, record.network) for record in (found, wanted))
    changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    yield from (f"recipe {key} {before.get(key)}, now {now.get(key)}" for key in changed)
    if not changed:
        yield f"recipe {found.training_digest[:12]}, now {wanted.training_digest[:12]}"


def _weighty(recipe: Recipe, model: ModelName, key: str) -> dict[str, Any]:
    """The recipe's values by dotted name, without those that this network's weights do not depend on."""
    flat = dict(_flattened(recipe.model_dump(mode="json"), ""))
    flat["inference.input_mask"] = mask = recipe.inference.input_mask
    other = "cyclegan" if model == "pix2pix" else "pix2pix"
    steps = f"train.steps.{model}.{key}"
    kept = {
        name: value
        for name, value in flat.items()
        if not name.startswith((*FREE, f"model.{other}", "train.steps.")) and name != "seed"
    }
    return kept | {"inference.input_mask": mask, steps: flat.get(steps)}


def _flattened(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
