"""Ablations: one thing of a recipe is changed at a time, and everything else stays.

An ablation is `training/ablations/<name>.toml`: a base recipe and its variants. Networks whose weights a variant
does not touch are taken from the runs that are there; the others are trained beside the table. Measured on the
validation studies, so that the test studies decide nothing.
"""

from __future__ import annotations

import csv
import io
import tempfile
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.bundle import ModelBundle
from pipeline.device import Compute, choose_compute
from pipeline.run import synthesize_volume
from pipeline.types import WHOLE_BODY, District
from training.evaluation.detection import seam_index
from training.evaluation.measure import read_truth
from training.evaluation.metrics import Summary, describe, mae, mean_in, psnr, ssim_map
from training.evaluation.tables import cell_short, markdown_rows
from training.export import assemble_bundle
from training.files import write_whole
from training.loop.start import has_own_length
from training.loop.train_all import AllProgress, train_all
from training.prepared import PreparedSet, PreparedStudy, Split
from training.recipe import RECIPES, ModelName, Recipe, RecipeError, parse_recipe
from training.runs import RunRecord, check_runs_fit, find_runs

ABLATIONS = Path(__file__).parent / "ablations"
COLUMNS = ("MAE body", *(f"MAE {d.key}" for d in District), "PSNR body", "SSIM body", "seam index", "s per study")
DIGITS = (4, 4, 4, 4, 4, 2, 3, 3, 1)


class Variant(BaseModel):
    """`changes` are merged into the base recipe's TOML."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    changes: dict[str, Any]


class Ablation(BaseModel):
    """One table: its title, the base recipe (a shipped one's name, or a file), and what is changed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str
    base: str
    variant: tuple[Variant, ...] = Field(min_length=2)


@dataclass(frozen=True, kw_only=True, slots=True)
class AblationRow:
    """One variant's figures: a {n, mean, sd, se} per column, and the steps of its networks."""

    name: str
    steps: int
    trained: bool  # for this table; else the weights of the runs that were there
    figures: Mapping[str, Summary]


def shipped_ablations() -> dict[str, Path]:
    """The ablations that come with the product, by name."""
    return {path.stem: path for path in sorted(ABLATIONS.glob("*.toml"))}


def load_ablation(name: str) -> Ablation:
    """Read one; raises RecipeError that names what is wrong."""
    path = shipped_ablations().get(name) or Path(name)
    try:
        return Ablation.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        text = f"ablation {name!r}: neither one of {sorted(shipped_ablations())} nor a readable file"
        raise RecipeError(text) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, ValidationError) as error:
        raise RecipeError(f"ablation {name!r}: {error}") from error


def variant_recipes(ablation: Ablation, *, model: ModelName, steps: int | None) -> dict[str, Recipe]:
    """The recipe of every variant. `steps` replaces the length of every network, so that all are trained alike.

    Raises:
        RecipeError: the base cannot be read, a variant's recipe cannot be, or two variants have one name.
    """
    base = _read_base(ablation.base)
    recipes: dict[str, Recipe] = {}
    for variant in ablation.variant:
        if variant.name in recipes:
            raise RecipeError(f"ablation {ablation.title!r}: two variants are called {variant.name!r}")
        content = merged(base, variant.changes)
        recipe = parse_recipe(content, f"{ablation.base} ({variant.name})")
        if steps is not None:
            content = merged(content, {"train": {"steps": {model: dict.fromkeys(recipe.networks, steps)}}})
            recipe = parse_recipe(content, f"{ablation.base} ({variant.name})")
        recipes[variant.name] = recipe
    return recipes


def _read_base(name: str) -> dict[str, Any]:
    shipped = RECIPES / f"{name}.toml"
    path = shipped if shipped.is_file() else Path(name)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"base recipe {name!r}: neither a shipped one nor a readable file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"base recipe {name!r}: not TOML: {error}") from error


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `changes` put over it, table by table."""
    result = dict(base)
    for key, value in changes.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def run_ablation(
    name: str,
    prepared: PreparedSet,
    runs: Path,
    out: Path,
    *,
    model: ModelName = "pix2pix",
    seed: int = 0,
    steps: int | None = None,
    split: Split = "validation",
    limit: int | None = None,
    workers: int = 1,
    device: str = "cpu",
    on_progress: Callable[[str], None] = lambda _: None,
) -> list[AblationRow]:
    """Train what is missing, measure every variant, write `out`/<name>.md and .csv.

    Args:
        name: a shipped ablation or a TOML file.
        prepared: the studies; the variants must agree with how they were prepared.
        runs: finished runs of the base recipe; networks that a variant does not change are taken from here.
        out: the tables, and in `out`/runs what had to be trained.
        model: whose generators.
        seed: of the runs.
        steps: for every network of every variant, instead of the recipe's; then all are trained anew.
        split: the studies measured on.
        limit: at most so many of them.
        workers: networks trained side by side.
        device: "cpu" or "cuda".
        on_progress: one line at a time.

    Raises:
        RecipeError: no such ablation, or a variant that cannot be.
        TrainingError: data or runs that do not fit.
    """
    ablation = load_ablation(name)
    rows = []
    places = [runs]  # what is trained for one variant serves the next ones that do not change it
    for number, (variant, recipe) in enumerate(variant_recipes(ablation, model=model, steps=steps).items()):
        found = ((place, _matching(place, recipe, model, seed, prepared)) for place in places)
        folder, there = next((one for one in found if one[1] is not None), (runs, None))
        if there is None:
            folder = out / "runs" / f"{Path(name).stem}-{number}"
            on_progress(f"{variant}: training {', '.join(recipe.networks)}")
            train_all(
                recipe,
                prepared.folder,
                folder,
                seeds=[seed],
                models=[model],
                networks=recipe.networks,
                workers=workers,
                threads=1,
                device=device,
                on_progress=partial(_tell, on_progress, variant),
            )
            there = _matching(folder, recipe, model, seed, prepared)
            places.append(folder)
        assert there is not None  # `train_all` raises otherwise
        check_runs_fit(folder, there)
        records = {r.network: r.model_copy(update={"recipe": recipe}) for r in there}
        on_progress(f"{variant}: measuring")
        with tempfile.TemporaryDirectory() as temp:
            bundle = assemble_bundle(
                folder,
                records,
                Path(temp) / "bundle",
                spacing_mm=prepared.manifest.spacing_mm,
                created=datetime.now(UTC),
            )
            figures = _measure(bundle, prepared, split, limit, device)
        rows.append(
            AblationRow(name=variant, steps=sum(r.steps for r in there), trained=folder != runs, figures=figures),
        )
    out.mkdir(parents=True, exist_ok=True)
    where = f"{len(prepared.studies(split)[:limit])} {split} studies"
    table = markdown(ablation, rows, model, where, phantom=prepared.manifest.phantom)
    write_whole(out / f"{Path(name).stem}.md", table.encode())
    write_whole(out / f"{Path(name).stem}.csv", as_csv(rows).encode())
    return rows


def _tell(on_progress: Callable[[str], None], variant: str, now: AllProgress) -> None:
    on_progress(f"{variant}: {now.text}")


def _matching(runs: Path, recipe: Recipe, model: ModelName, seed: int, prepared: PreparedSet) -> list[RunRecord] | None:
    """The finished runs whose weights are those of this recipe on these data; None unless all are there."""
    found = {
        r.network: r
        for r in (find_runs(runs) if any(runs.glob("*/*/seed-*/run.json")) else [])
        if (r.model, r.seed, r.state) == (model, seed, "done")
        and r.network in recipe.networks
        and r.training_digest == recipe.training_digest(model, r.network)
        and has_own_length(r, recipe)
        and r.recipe.seed == recipe.seed
        and r.prepared_digest == prepared.manifest.digest
    }
    return list(found.values()) if set(found) == set(recipe.networks) else None


def _measure(
    bundle: ModelBundle, prepared: PreparedSet, split: Split, limit: int | None, device: str
) -> dict[str, Summary]:
    compute = choose_compute(device)
    for key in bundle.keys:  # read now: the first study's seconds are not to count it
        bundle.network(key, compute.device)
    values: dict[str, list[float]] = {column: [] for column in COLUMNS}
    for record in prepared.studies(split)[:limit]:
        for column, value in _figures(bundle, prepared.load(record), compute).items():
            values[column].append(value)
    return {column: describe(found) for column, found in values.items()}


def _figures(bundle: ModelBundle, study: PreparedStudy, compute: Compute) -> dict[str, float]:
    truth = read_truth(study)
    districts, body, real = truth.districts, truth.body, truth.pet
    stand_in = {d: WHOLE_BODY for d in districts.present if WHOLE_BODY in bundle.keys}
    networks = stand_in | {d: d.key for d in districts.present if d.key in bundle.keys}
    began = time.perf_counter()
    fake = synthesize_volume(truth.ct, districts, networks, bundle, compute=compute)
    seconds = time.perf_counter() - began
    by_district = {f"MAE {d.key}": mae(fake, real, districts.labels == d) for d in networks}
    if len(networks) < len(districts.present):  # nothing was predicted there: no figure of the whole body
        return by_district | {"s per study": seconds}
    return {
        "MAE body": mae(fake, real, body),
        **by_district,
        "PSNR body": psnr(fake, real, body),
        "SSIM body": mean_in(ssim_map(fake, real), body),
        "seam index": seam_index(fake, real, districts.labels),
        "s per study": seconds,
    }


def markdown(ablation: Ablation, rows: Sequence[AblationRow], model: str, where: str, *, phantom: bool) -> str:
    """The table with mean ± SD over studies; nothing is ranked."""
    about = "Computed phantoms: this says nothing about patients." if phantom else "Research only."
    head = ["", *COLUMNS, "steps"]
    lines = [
        f"# {ablation.title}",
        "",
        f"Recipe `{ablation.base}`, {model}, mean ± SD over {where}; MAE in SUV / suv_max inside the region. {about}",
        "Seam index: 0 is no jump at the borders of districts beyond the true PET's own.",
        "Steps are of all networks together; " + _who_trained(rows) + f" torch {torch.__version__}.",
        "",
        *markdown_rows(head, (_cells(row) for row in rows)),
    ]
    return "\n".join(lines) + "\n"


def _cells(row: AblationRow) -> list[str]:
    figures = (cell_short(row.figures[c], d) for c, d in zip(COLUMNS, DIGITS, strict=True))
    return [row.name, *figures, str(row.steps)]


def _who_trained(rows: Sequence[AblationRow]) -> str:
    trained = [row.name for row in rows if row.trained]
    return f"trained for this table: {', '.join(trained)}." if trained else "no network was trained for this table."


def as_csv(rows: Sequence[AblationRow]) -> str:
    """One line per variant and column."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["variant", "steps", "figure", "n", "mean", "sd", "se"])
    for row in rows:
        for column in COLUMNS:
            f = row.figures[column]
            writer.writerow([row.name, row.steps, column, f["n"], f["mean"], f["sd"], f["se"]])
    return text.getvalue()
