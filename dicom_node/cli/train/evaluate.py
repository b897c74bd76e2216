"""`dicom-node train evaluate RUNS --out REPORT`: how well the trained networks do on held-out studies."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dicom_node.cli.common import console, progress_bar, safe, table
from dicom_node.cli.train import app
from dicom_node.cli.train.common import refused

if TYPE_CHECKING:
    from training.evaluation.tables import Table


class SplitChoice(StrEnum):
    """What `--split` takes; nothing is evaluated on what it was trained on."""

    TEST = "test"
    VALIDATION = "validation"


@app.command("evaluate")
def evaluate(
    runs: Annotated[Path, typer.Argument(help="The folder with the finished runs (of `train run` or `train all`).")],
    out: Annotated[
        Path | None, typer.Option("--out", help="Where the report goes.", show_default="RUNS/report")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="The prepared data; by default where the runs say that they are.")
    ] = None,
    split: Annotated[
        SplitChoice, typer.Option(help="validation: to choose between recipes. test: once, for what you publish.")
    ] = SplitChoice.TEST,
    limit: Annotated[int, typer.Option(min=0, help="Only so many studies, for a quick look; 0: all.")] = 0,
    seeds: Annotated[str, typer.Option(help="Only runs of these seeds, as in 0,1,2.", show_default="all")] = "",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1")] = "auto",
) -> None:
    """Measure every finished network on held-out studies, through the code that the node runs, and write the report.

    District networks and whole-body network, Pix2Pix and CycleGAN, and two trivial predictors that a network has to
    beat: MAE, PSNR and SSIM by district, in lesions and by diagnosis (Tables I to III), tests between methods, SUV
    bias, lesions found and invented, figures. REPORT/report.md says what came out, also where the district networks
    lose. Interrupted, the same command goes on: what was measured is kept in REPORT/.work.
    """
    chosen = _seeds(seeds)
    folder = out or runs / "report"
    with refused():
        from training.evaluation.evaluate import evaluate as measure_all
        from training.evaluation.report import write_report
        from training.evaluation.report_text import verdict_lines
        from training.prepared import open_prepared
        from training.runs import find_runs

        prepared = open_prepared(data or Path(find_runs(runs)[0].prepared_folder))
        with progress_bar() as bar:
            task = bar.add_task("evaluating", total=None)

            def on_progress(done: int, total: int, text: str) -> None:
                bar.update(task, completed=done, total=total, description=text[:28])

            evaluation = measure_all(
                runs,
                prepared,
                split=split.value,
                device=device,
                limit=limit or None,
                seeds=chosen,
                work=folder / ".work",
                on_progress=on_progress,
            )
            bar.update(task, description="writing the report")
            tables = write_report(folder, evaluation)
    _print_table(tables[0])
    for line in verdict_lines(tables):
        console.print(safe(line))
    for text in evaluation.missing:
        console.print(safe(f"not there: {text}"))
    console.print(safe(f"written: {folder} (read {folder / 'report.md'})"))


def _print_table(found: Table) -> None:
    """Table I as mean ± SD; intervals and SE are in the report."""
    from training.evaluation.measure import METRICS
    from training.evaluation.tables import DIGITS, cell_short, group_title, method_title

    shown = table(
        f"Table {found.name}. {found.title}: mean ± SD over patients", "", "method", "n", "MAE", "PSNR", "SSIM"
    )
    for group in found.groups:
        for place, method in enumerate(found.methods):
            cells = [found.cells[group, method, metric] for metric in METRICS]
            texts = [cell_short(c, DIGITS[m]) for c, m in zip(cells, METRICS, strict=True)]
            where = group_title(group) if place == 0 else ""
            shown.add_row(where, method_title(method), str(cells[0]["n"]), *texts)
    console.print(shown)


def _seeds(text: str) -> list[int] | None:
    """ "0,2" to [0, 2]; nothing is all of them."""
    try:
        return [int(part) for part in text.split(",")] if text else None
    except ValueError:
        raise typer.BadParameter(f"--seeds {text!r}: write 0 or 0,1,2") from None
