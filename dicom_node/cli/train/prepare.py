"""`dicom-node train prepare`: a folder of FDG-PET/CT studies becomes volumes that training reads."""

from __future__ import annotations

from collections import Counter
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import TaskID

from dicom_node.cli.common import AsJson, console, print_json, progress_bar, safe, table
from dicom_node.cli.train import app
from dicom_node.cli.train.common import refused

if TYPE_CHECKING:
    from training.preparation.prepare import PrepareProgress
    from training.prepared import PreparedManifest

SIDES = ("train", "validation", "test")


class EngineName(StrEnum):
    """What `--engine` takes (training.preparation.engines)."""

    PROCESSES = "processes"
    RAY = "ray"


@app.command("prepare")
def prepare(
    data: Annotated[Path, typer.Argument(help="The studies: TCIA DICOM, NIfTI per study, or nnU-Net's imagesTr.")],
    out: Annotated[Path, typer.Option(help="A new folder, or the one of an earlier call, which then goes on.")],
    recipe: Annotated[str, typer.Option(help="paper, robust, phantom, or a TOML file.")] = "robust",
    workers: Annotated[int, typer.Option(min=1, help="Studies at a time, each with one CPU thread.")] = 2,
    engine: Annotated[
        EngineName, typer.Option(help="ray: on the cluster that RAY_ADDRESS names, else on this machine.")
    ] = EngineName.PROCESSES,
    as_json: AsJson = False,
) -> None:
    """Bring every study onto one grid: CT, PET in SUV, districts, lesions; split by patient; write pictures to check.

    The layout is told by content. A study that cannot be used is refused by name with its reason, and the others go
    on. Interrupted, the same command goes on; studies whose files did not change are not prepared again. Look
    through OUT/review.html before you train: it shows registration and districts of every study.
    """
    with refused(), progress_bar() as bar:
        from training.preparation.prepare import prepare as prepare_studies
        from training.recipe import load_recipe

        tasks: dict[str, TaskID] = {}

        def on_progress(now: PrepareProgress) -> None:
            if now.stage not in tasks:
                words = {"find": "looking at files", "prepare": "preparing studies"}
                tasks[now.stage] = bar.add_task(words[now.stage], total=now.total)
            bar.update(tasks[now.stage], completed=now.done, total=now.total)
            if now.refused:
                bar.console.print(safe(f"refused: {now.study}: {now.refused}"))

        manifest = prepare_studies(
            data, out, load_recipe(recipe), workers=workers, engine=engine.value, on_progress=on_progress
        )
    if as_json:
        print_json(_summary(manifest))
    else:
        _print(manifest, out)


def _summary(manifest: PreparedManifest) -> dict[str, object]:
    return {
        "recipe": manifest.recipe,
        "layout": manifest.layout,
        "phantom": manifest.phantom,
        "digest": manifest.digest,
        "studies": {side: sum(study.split == side for study in manifest.studies) for side in SIDES},
        "patients": len({study.patient for study in manifest.studies}),
        "refused": [entry.model_dump() for entry in manifest.refused],
    }


def _print(manifest: PreparedManifest, out: Path) -> None:
    """Studies per diagnosis and side, what was refused and why, and where to look next."""
    counts = Counter((study.diagnosis, study.split) for study in manifest.studies)
    patients = {side: len({s.patient for s in manifest.studies if s.split == side}) for side in SIDES}
    shown = table("prepared studies", "diagnosis", *SIDES, "all")
    for diagnosis in sorted({diagnosis for diagnosis, _ in counts}):
        row = [sum(n for (d, s), n in counts.items() if (d, s) == (diagnosis, side)) for side in SIDES]
        shown.add_row(diagnosis, *map(str, row), str(sum(row)))
    row = [sum(study.split == side for study in manifest.studies) for side in SIDES]
    shown.add_row("all", *map(str, row), str(sum(row)), style="bold")
    shown.add_row("patients", *(str(patients[side]) for side in SIDES), str(len({s.patient for s in manifest.studies})))
    console.print(shown)
    if manifest.refused:
        refusals = table(f"{len(manifest.refused)} refused", "study", "code", "reason")
        for entry in manifest.refused:
            refusals.add_row(safe(entry.study), entry.code, safe(entry.text))
        console.print(refusals)
    if manifest.phantom:
        console.print("synthetic phantom: computed, not patients")
    console.print(safe(f"now look through {out / 'review.html'}: registration and districts of every study"))
