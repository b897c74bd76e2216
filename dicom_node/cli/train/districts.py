"""`dicom-node train districts`: how well a segmenter finds head, trunk, arms and legs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from dicom_node.cli.common import console, console_err, progress_bar
from dicom_node.cli.train import app
from dicom_node.cli.train.common import refused
from dicom_node.config import Config, load_config


@app.command("districts")
def districts(
    out: Annotated[Path, typer.Option("--out", help="The report, the rows and the pictures.")],
    cases: Annotated[int, typer.Option(min=1, help="Computed phantoms, each another person.")] = 200,
    real: Annotated[
        list[Path] | None, typer.Option("--real", help="A folder with one CT series, for a picture; may be repeated.")
    ] = None,
    segmenter: Annotated[
        list[str] | None, typer.Option(help="Tried in order; may be repeated. By default the configuration's.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help=r"Its \[pipeline] says where models are; else its defaults.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the first phantom.")] = 5000,
    workers: Annotated[int, typer.Option(min=1, help="Phantoms side by side.")] = 2,
) -> None:
    """Try a segmenter on phantoms in many poses, fields and with scanner faults, and on real series.

    Writes OUT/report.md with Dice and border errors by what was varied, rows.csv, and pictures of the ten worst
    phantoms and of every real series.
    """
    with refused():
        from dicom_node.worker import pipeline_options
        from pipeline.districts import SEGMENTERS
        from training.evaluation.districts.cases import district_cases
        from training.evaluation.districts.report import measure_cases, write_report

        if unknown := [name for name in segmenter or () if name not in SEGMENTERS]:
            raise typer.BadParameter(f"no segmenter {unknown[0]!r}, there are {', '.join(sorted(SEGMENTERS))}")
        options = pipeline_options(load_config(config) if config else Config()).districts
        options = replace(options, chain=tuple(segmenter or options.chain))
        chosen = district_cases(cases, seed=seed)
        with progress_bar() as bar:
            task = bar.add_task("phantoms", total=len(chosen))
            results = measure_cases(chosen, options, workers=workers, on_done=lambda _: bar.advance(task))
        console_err.print("pictures")
        command = f"dicom-node train districts --cases {cases} --seed {seed}"
        write_report(results, real or [], out, options, command=command)
    console.print((out / "report.md").read_text(encoding="utf-8").split("## Real")[0], markup=False)
