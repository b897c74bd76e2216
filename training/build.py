"""From a recipe to a bundle: make the cases, train every network, export, evaluate. Resumable.

Networks are trained side by side in processes of their own with `threads` CPU threads each: on a shared machine two
processes of one thread are several times faster than one of two, whose threads wait for each other.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import UTC, datetime
from multiprocessing.queues import Queue
from pathlib import Path
from queue import Empty
from typing import Any

import torch

from pipeline.bundle import Manifest, load_bundle
from training.cases import case_of, load_cases, phantoms, save_case
from training.evaluate import evaluate_bundle
from training.export import export_bundle, write_manifest
from training.loop import TrainedNetwork, TrainProgress, train_network
from training.recipe import Recipe, RecipeError, load_recipe
from training.report import write_report
from training.statistics import CaseStatistics

CASES_READY = "cases.json"


@dataclass(frozen=True, slots=True)
class BuildProgress:
    """What a build is doing: `stage` is "cases", "train" or "evaluate"; `seconds_left` is an estimate or None."""

    stage: str
    done: int
    total: int
    text: str
    seconds_left: float | None = None


OnBuildProgress = Callable[[BuildProgress], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildReport:
    """What was built and how well it does on held-out cases."""

    folder: Path
    manifest: Manifest
    seconds: dict[str, float]
    metrics: dict[str, Any] = field(default_factory=dict)


def build_bundle(
    recipe_name: str,
    out: Path,
    *,
    workers: int = 2,
    threads: int = 1,
    seed: int | None = None,
    steps: int | None = None,
    run_dir: Path | None = None,
    report_dir: Path | None = None,
    device: str = "cpu",
    evaluate: bool = True,
    on_progress: OnBuildProgress = lambda _: None,
) -> BuildReport:
    """Train the recipe's networks and write the bundle to `out`.

    Args:
        recipe_name: a shipped recipe ("phantom") or a TOML file.
        out: the bundle's folder; its manifest is written last.
        workers: networks trained at the same time.
        threads: CPU threads of each.
        seed: replaces the recipe's.
        steps: replaces the recipe's steps for every network (a quick trial).
        run_dir: cases and checkpoints, to resume from; default `runs/<recipe>-<seed>`.
        report_dir: where report.md, report.json and the picture go; None: no report.
        device: "cpu", or "cuda" with one worker.
        evaluate: measure the bundle on the held-out cases through the node's own inference.
        on_progress: called from this process.

    Raises:
        RecipeError: no such recipe, or one that needs data that are not here.
    """
    recipe = load_recipe(recipe_name)
    recipe = recipe if seed is None else recipe.model_copy(update={"seed": seed})
    if recipe.data.source != "phantom":
        raise RecipeError(f"recipe {recipe.name}: source {recipe.data.source!r} needs patient data; only phantoms here")
    run_dir = run_dir or Path("runs") / f"{recipe.name}-{recipe.seed}"
    started = time.monotonic()
    statistics = prepare_cases(recipe, run_dir / "cases", on_progress)
    lengths = {key: steps or recipe.train.steps_for(key, recipe.data.train_cases) for key in recipe.networks}
    trained = _train_all(recipe, lengths, run_dir, workers, threads, device, on_progress)
    seconds = {"cases_and_training_wall": time.monotonic() - started}
    manifest = export_bundle(
        out,
        {key: result.network for key, result in trained.items()},
        recipe,
        created=datetime.now(UTC).replace(microsecond=0),
        training=_training_record(recipe, trained),
        metrics={},
        statistics=statistics,
    )
    if not evaluate:
        return BuildReport(folder=out, manifest=manifest, seconds=seconds)
    began = time.monotonic()
    torch.set_num_threads(workers * threads)

    def on_case(done: int, total: int) -> None:
        on_progress(BuildProgress("evaluate", done, total, f"held-out phantom {done} of {total}"))

    evaluation = evaluate_bundle(load_bundle(out), recipe, run_dir / "cases", device=device, on_case=on_case)
    manifest = manifest.model_copy(update={"metrics": evaluation.summary})
    write_manifest(out, manifest)
    if report_dir is not None:
        write_report(report_dir, manifest, evaluation)
    seconds["evaluation"] = time.monotonic() - began
    return BuildReport(folder=out, manifest=manifest, seconds=seconds, metrics=evaluation.summary)


def prepare_cases(recipe: Recipe, folder: Path, on_progress: OnBuildProgress = lambda _: None) -> dict[str, Any]:
    """Make the training cases in `folder` unless they are there already; returns their statistics."""
    ready = folder / CASES_READY
    wanted = recipe.model_dump(mode="json", include={"data", "normalization"})
    if ready.is_file():
        found = json.loads(ready.read_text())
        if found["recipe"] == wanted:
            statistics: dict[str, Any] = found["statistics"]
            return statistics
        ready.unlink()
    for stale in folder.glob("*.npy"):  # of another recipe, or of a run that was cut off: `load_cases` takes all
        stale.unlink()
    gathered = CaseStatistics(recipe.seed)
    total = recipe.data.train_cases
    began = time.monotonic()
    for number, phantom in enumerate(phantoms(recipe, test=False), start=1):
        gathered.add(phantom)
        save_case(case_of(phantom, recipe.normalization), folder)
        left = (time.monotonic() - began) / number * (total - number)
        on_progress(BuildProgress("cases", number, total, f"training phantom {number} of {total}", left))
    statistics = gathered.summary()
    ready.write_text(json.dumps({"recipe": wanted, "statistics": statistics}, indent=1))
    return statistics


def _training_record(recipe: Recipe, trained: dict[str, TrainedNetwork]) -> dict[str, Any]:
    data = recipe.data
    return {
        "recipe": recipe.model_dump(mode="json"),
        "recipe_sha256": recipe.training_digest,
        "data": f"{data.train_cases} phantoms, seeds from {data.first_seed}; no patient data",
        "torch": torch.__version__,
        "loss_region": "L1 inside the body: weight 1 in the district, neighbor_weight beside it, 0 in air",
        "input": "CT clipped and scaled to [0, 1], then 0 outside the body (table, blanket, air)",
        "networks": {
            key: {"steps": r.steps, "seconds": round(r.seconds), "final_l1": round(r.final_l1, 5)}
            for key, r in trained.items()
        },
    }


# --- training processes -------------------------------------------------------------------------------------------

_reports: Queue[TrainProgress] | None = None


def _start_worker(reports: Queue[TrainProgress], threads: int) -> None:
    global _reports
    _reports = reports
    torch.set_num_threads(threads)


def _train_in_worker(key: str, recipe: Recipe, steps: int, run_dir: Path, device: str) -> TrainedNetwork:
    assert _reports is not None
    cases = load_cases(run_dir / "cases")
    return train_network(
        key,
        cases,
        recipe,
        steps=steps,
        device=torch.device(device),
        seed=recipe.seed,
        run_dir=run_dir,
        on_progress=_reports.put,
    )


def _train_all(
    recipe: Recipe,
    lengths: dict[str, int],
    run_dir: Path,
    workers: int,
    threads: int,
    device: str,
    on_progress: OnBuildProgress,
) -> dict[str, TrainedNetwork]:
    context = multiprocessing.get_context("spawn")
    reports: Queue[TrainProgress] = context.Queue()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads sleep: they share the cores with a node
    with ProcessPoolExecutor(workers, context, _start_worker, (reports, threads)) as pool:
        jobs = {
            key: pool.submit(_train_in_worker, key, recipe, steps, run_dir, device) for key, steps in lengths.items()
        }
        _listen(jobs, reports, lengths, on_progress)
        return {key: job.result() for key, job in jobs.items()}


def _listen(
    jobs: dict[str, Future[TrainedNetwork]],
    reports: Queue[TrainProgress],
    lengths: dict[str, int],
    on_progress: OnBuildProgress,
) -> None:
    """Pass the workers' reports on until every job has ended; the estimate counts what this call has trained."""
    total, began = sum(lengths.values()), time.monotonic()
    at: dict[str, int] = {}
    first: dict[str, int] = {}
    while True:
        try:
            report = reports.get(timeout=1.0)
        except Empty:
            if not wait(jobs.values(), timeout=0).not_done:
                return
            continue
        first.setdefault(report.network, report.step)
        at[report.network] = report.step
        trained = sum(at.values()) - sum(first.values())
        done = sum(at.values()) + sum(lengths[k] for k, j in jobs.items() if j.done() and k not in at)
        left = (time.monotonic() - began) / trained * (total - done) if trained else None
        text = (
            f"{report.network} {report.step}/{report.steps}: L1 {report.l1:.5f}, "
            f"generator {report.loss_generator:.3f}, discriminator {report.loss_discriminator:.3f}, "
            f"{report.steps_per_s:.2f} steps/s"
        )
        on_progress(BuildProgress("train", done, total, text, left))
