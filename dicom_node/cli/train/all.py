"""`dicom-node train all`: train every network of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dicom_node.cli.train import app
from dicom_node.cli.train.common import refused
from dicom_node.cli.train.watch import Watch, print_records

if TYPE_CHECKING:
    from training.loop.train_all import AllProgress


@app.command("all")
def train_everything(
    recipe: Annotated[str, typer.Option(help="A recipe's name (`train recipes` lists them) or a TOML file.")],
    seeds: Annotated[int, typer.Option(min=1, help="How many times each network is trained: seeds 0, 1, …")] = 1,
    data: Annotated[Path, typer.Option(help="What `train prepare` wrote.")] = Path("prepared"),
    runs: Annotated[Path | None, typer.Option(help="Where run directories go.", show_default="runs/<recipe>")] = None,
    models: Annotated[str, typer.Option(help="Which methods, with commas.")] = "pix2pix,cyclegan",
    districts: Annotated[
        str, typer.Option(help="Which networks, with commas: trunk,whole_body.", show_default="the recipe's")
    ] = "",
    steps: Annotated[int, typer.Option(min=0, help="Instead of the recipe's length, for a trial; 0: as it says.")] = 0,
    workers: Annotated[
        int, typer.Option(min=0, help="Runs side by side; 0: one per GPU, or as many as the cores allow.")
    ] = 0,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of each run: several runs of one are faster.")] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda (all of them), cuda:1")] = "auto",
) -> None:
    """Train the four districts and the whole body, both methods, once per seed; the longest run first.

    What is finished is left alone, and an interrupted run goes on: repeat the command as often as needed. A run that
    fails does not stop the others; it is named with its reason at the end.
    """
    with refused():
        from training.loop.train_all import train_all
        from training.recipe import MODELS, load_recipe

        chosen = load_recipe(recipe)
        wanted_models = [name for name in MODELS if name in _chosen("--models", models, MODELS)]
        networks = _chosen("--districts", districts, chosen.networks) if districts else list(chosen.networks)
        with Watch("steps of all networks") as watch:

            def on_progress(now: AllProgress) -> None:
                counted = f"{now.finished} of {now.runs} finished" + (f", {now.failed} failed" if now.failed else "")
                watch.show(
                    done=now.done,
                    total=now.total,
                    seconds_left=now.seconds_left,
                    text=f"{now.text} ({counted})",
                    notable=now.report is None or bool(now.report.notice),
                )

            records = train_all(
                chosen,
                data,
                runs or Path("runs") / chosen.name,
                seeds=range(seeds),
                models=wanted_models,
                networks=networks,
                workers=workers or None,
                threads=threads,
                device=device,
                steps=steps or None,
                on_progress=on_progress,
            )
    print_records(records)


def _chosen(option: str, text: str, known: tuple[str, ...]) -> list[str]:
    """Names from a list with commas; a usage error (exit 2) for an unknown one."""
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    if unknown := [name for name in names if name not in known]:
        raise typer.BadParameter(f"{option}: {unknown[0]!r} is not one of {', '.join(known)}")
    return names
