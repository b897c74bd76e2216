"""`dicom-node train ablation`: change one thing of a recipe at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dicom_node.cli.common import console, console_err, safe
from dicom_node.cli.train import app
from dicom_node.cli.train.common import refused


@app.command("ablation")
def ablation(
    name: Annotated[str, typer.Argument(help="overlap, blending, stitching, input, window, conditioning, or a file.")],
    data: Annotated[Path, typer.Option(help="What `train prepare` wrote.")] = Path("prepared"),
    runs: Annotated[Path, typer.Option(help="Finished runs of the base recipe.")] = Path("runs/phantom"),
    out: Annotated[Path, typer.Option(help="The table, and what had to be trained for it.")] = Path("ablations"),
    model: Annotated[str, typer.Option(help="pix2pix or cyclegan")] = "pix2pix",
    seed: Annotated[int, typer.Option(help="The seed of the runs.")] = 0,
    steps: Annotated[
        int, typer.Option(min=0, help="Train all networks of all variants so long; 0: as the recipe.")
    ] = 0,
    limit: Annotated[int, typer.Option(min=0, help="At most so many validation studies; 0: all.")] = 0,
    workers: Annotated[int, typer.Option(min=1, help="Networks trained side by side.")] = 2,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda")] = "auto",
) -> None:
    """Measure the variants of one choice on the validation studies, and write one table.

    Overlap, blending and stitching only change inference: they use the weights that are there. Input, window and
    conditioning train the networks that are missing. Interrupted, the same command goes on.
    """
    with refused():
        from training.ablation import run_ablation
        from training.prepared import open_prepared
        from training.recipe import MODELS

        if model not in MODELS:
            raise typer.BadParameter(f"{model!r} is not one of {', '.join(MODELS)}")
        run_ablation(
            name,
            open_prepared(data),
            runs,
            out,
            model=model,
            seed=seed,
            steps=steps or None,
            limit=limit or None,
            workers=workers,
            device=device,
            on_progress=lambda text: console_err.print(safe(text)),
        )
    console.print((out / f"{Path(name).stem}.md").read_text(encoding="utf-8"), markup=False)
