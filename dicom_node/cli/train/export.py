"""`dicom-node train export RUNS --out BUNDLE`: finished and measured networks become a bundle that the node runs."""

from __future__ import annotations

from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from dicom_node.cli.common import console, safe, table
from dicom_node.cli.train import app
from dicom_node.cli.train.common import refused


class ModelChoice(StrEnum):
    """What `--model` takes."""

    PIX2PIX = "pix2pix"
    CYCLEGAN = "cyclegan"


@app.command("export")
def export(
    runs: Annotated[Path, typer.Argument(help="The folder with the finished runs (of `train run` or `train all`).")],
    out: Annotated[Path, typer.Option("--out", help="The bundle's folder; it is made whole, or not at all.")],
    report: Annotated[
        Path | None, typer.Option("--report", help="What `train evaluate` wrote; by default RUNS/report.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="The prepared data; by default where the runs say that they are.")
    ] = None,
    model: Annotated[ModelChoice, typer.Option(help="Which model's networks.")] = ModelChoice.PIX2PIX,
    seed: Annotated[int, typer.Option(min=0, help="Which of the runs.")] = 0,
    name: Annotated[str | None, typer.Option(help="The bundle's name; by default the recipe's.")] = None,
    version: Annotated[str | None, typer.Option(help="The bundle's version; by default the recipe's.")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="An earlier bundle in that folder may go.")] = False,
) -> None:
    """Make a model bundle: weights, manifest with lineage and figures, model card. Refuses without a report.

    `dicom-node models install BUNDLE` then puts it where `pipeline.bundle` finds it by name.
    """
    with refused():
        from training.export import export_bundle
        from training.prepared import open_prepared

        bundle = export_bundle(
            runs,
            None if data is None else open_prepared(data, verify=False),
            report or runs / "report",
            out,
            model=model.value,
            seed=seed,
            name=name,
            version=version,
            created=datetime.now(UTC),
            replace=replace,
        )
    shown = table(f"bundle {bundle.manifest.name} {bundle.manifest.version}", "network", "sha256")
    for key, entry in bundle.manifest.networks.items():
        shown.add_row(safe(key), entry.sha256)
    console.print(shown)
    console.print(safe(f"manifest sha256 {bundle.manifest_sha256}"))
    console.print(safe(f"written: {out} (read {out / 'MODEL_CARD.md'})"))
