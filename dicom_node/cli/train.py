"""`dicom-node train …`: what the node needs of training. The only place that imports the training package."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import TaskID

from dicom_node.cli.common import ArmPose, console, console_err, fail, progress_bar, safe

FIELD_OF_VIEW_MM = 500.0
PET_PIXEL_MM = 4.0

app = typer.Typer(help="Make phantoms and train the bundle that ships with the product.", no_args_is_help=True)


@app.command("phantom")
def phantom(
    out: Annotated[Path, typer.Argument(help="A new folder for CT/, PET/ and SEG/.")],
    seed: Annotated[int, typer.Option(help="The same seed gives the same patient.")] = 1,
    pose: Annotated[ArmPose, typer.Option(help="The phantom's arms.")] = ArmPose.SIDES,
    slice_mm: Annotated[float, typer.Option(min=1.0, max=10.0, help="Slice spacing of the CT in mm.")] = 4.0,
    matrix: Annotated[int, typer.Option(min=64, max=1024, help="Rows and columns of the CT.")] = 512,
    low: Annotated[float, typer.Option(min=0.0, max=0.9, help="Foot end of the scan, as part of the height.")] = 0.0,
    high: Annotated[float, typer.Option(min=0.1, max=1.0, help="Head end of the scan, as part of the height.")] = 1.0,
) -> None:
    """Write one phantom patient as DICOM: CT, its true PET (BQML), and the districts (SEG)."""
    if out.exists() and any(out.iterdir()):
        raise fail(f"{out}: is not empty", code=2)
    if high - low < 0.05:
        raise fail("--low must be at least 0.05 under --high", code=2)
    from training.phantom import PhantomSpec, make_phantom
    from training.phantom.dicom import write_ct_series, write_pet_series, write_seg

    pixel_mm = FIELD_OF_VIEW_MM / matrix
    spec = PhantomSpec(seed=seed, pose=pose.value, coverage=(low, high), spacing_mm=(slice_mm, pixel_mm, pixel_mm))
    with console_err.status("painting the CT"):
        ct = write_ct_series(make_phantom(spec), out / "CT", matrix=None)
    with console_err.status("painting the PET and the districts"):
        coarse = make_phantom(replace(spec, spacing_mm=(slice_mm, PET_PIXEL_MM, PET_PIXEL_MM)))
        pet = write_pet_series(coarse, out / "PET")
        write_seg(coarse, out / "SEG", ct)
    console.print(safe(f"{len(ct)} CT and {len(pet)} PET slices, and the districts as SEG, in {out}"))


@app.command("bundle")
def bundle(
    out: Annotated[Path, typer.Option(help="The bundle's folder; its manifest is written last.")],
    recipe: Annotated[str, typer.Option(help="A recipe's name (see `train recipes`) or a TOML file.")] = "phantom",
    runs: Annotated[Path, typer.Option(help="Checkpoints, so that an interrupted build goes on.")] = Path(
        "runs/bundle"
    ),
    report: Annotated[Path | None, typer.Option(help="Write report.md, report.json and a picture here.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Networks that are trained at the same time.")] = 2,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1")] = "cpu",
) -> None:
    """Train the four districts and the whole-body baseline on generated phantoms, and export a bundle.

    Interrupted, it goes on where it was. Prints how long it took and the metrics on held-out phantoms.
    """
    from training.build import BuildProgress, build_bundle

    with progress_bar() as bar:
        tasks: dict[str, TaskID] = {}

        def on_progress(now: BuildProgress) -> None:
            if now.stage not in tasks:
                tasks[now.stage] = bar.add_task(now.stage, total=now.total)
            bar.update(tasks[now.stage], completed=now.done, total=now.total)
            left = f" ({now.seconds_left / 60:.0f} min left)" if now.seconds_left is not None else ""
            bar.console.print(safe(f"{now.text}{left}"))

        built = build_bundle(
            recipe,
            out,
            workers=workers,
            run_dir=runs,
            report_dir=report,
            device=device,
            on_progress=on_progress,
        )
    for stage, seconds in built.seconds.items():
        console.print(safe(f"{stage}: {seconds / 60:.1f} min"))
    console.print(safe(f"{built.folder}: {built.manifest.name} {built.manifest.version}; {built.manifest.statement}"))


@app.command("recipes")
def recipes() -> None:
    """The recipes that ship with the product."""
    from training.recipe import RECIPES

    for path in sorted(RECIPES.glob("*.toml")):
        console.print(safe(path.stem))
