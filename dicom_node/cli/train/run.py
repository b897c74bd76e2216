"""`dicom-node train run`: train one network."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dicom_node.cli.train import app
from dicom_node.cli.train.common import refused
from dicom_node.cli.train.watch import Watch, print_records

if TYPE_CHECKING:
    from training.loop.pace import TrainProgress


class ModelChoice(StrEnum):
    """What `--model` takes (training.recipe.MODELS)."""

    PIX2PIX = "pix2pix"
    CYCLEGAN = "cyclegan"


class NetworkChoice(StrEnum):
    """What `--district` takes (pipeline.bundle.NETWORK_KEYS)."""

    HEAD = "head"
    TRUNK = "trunk"
    ARMS = "arms"
    LEGS = "legs"
    WHOLE_BODY = "whole_body"


@app.command("run")
def run(
    recipe: Annotated[str, typer.Option(help="A recipe's name (`train recipes` lists them) or a TOML file.")],
    district: Annotated[NetworkChoice, typer.Option(help="Which network: a district's, or the whole-body one.")],
    model: Annotated[ModelChoice, typer.Option(help="Which method.")] = ModelChoice.PIX2PIX,
    seed: Annotated[int, typer.Option(min=0, help="Another seed: other first weights, other patches.")] = 0,
    data: Annotated[Path, typer.Option(help="What `train prepare` wrote.")] = Path("prepared"),
    runs: Annotated[Path | None, typer.Option(help="Where run directories go.", show_default="runs/<recipe>")] = None,
    steps: Annotated[int, typer.Option(min=0, help="Instead of the recipe's length, for a trial; 0: as it says.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1")] = "auto",
) -> None:
    """Train one network into RUNS/<model>/<district>/seed-<n>: weights, record, checkpoint, TensorBoard curves.

    Interrupted in any way, the same command goes on from the last checkpoint, to the same weights; once finished it
    does nothing. On several GPUs: `torchrun --nproc_per_node N -m dicom_node train run …`.
    """
    with refused():
        from pipeline.device import choose_compute
        from training.loop.distributed import ALONE, joined
        from training.loop.train_network import train_network
        from training.prepared import open_prepared
        from training.recipe import load_recipe

        chosen = load_recipe(recipe)
        place = choose_compute(device).device
        with joined(os.environ, str(place)) as group:
            ranks = group or ALONE
            prepared = open_prepared(data, verify=ranks.first)
            with Watch(f"{model.value} {district.value}") as watch:

                def on_progress(now: TrainProgress) -> None:
                    watch.show(
                        done=now.step,
                        total=now.steps,
                        seconds_left=now.seconds_left,
                        text=now.text,
                        notable=bool(now.notice),
                    )

                record = train_network(
                    chosen,
                    prepared,
                    model=model.value,
                    network=district.value,
                    seed=seed,
                    runs=runs or Path("runs") / chosen.name,
                    device=ranks.device if group else place,
                    steps=steps or None,
                    on_progress=on_progress,
                    ranks=ranks,
                )
    if ranks.first:
        print_records([record])
