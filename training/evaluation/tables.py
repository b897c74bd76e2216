"""Tables I to III of the paper with both trivial predictors in each, and the tests between methods of each table.

A cell is mean ± SD (SE) [95 % bootstrap interval] over patients; see `aggregate`. As Markdown, CSV and LaTeX
(booktabs). Nothing is ranked, rounded to a winner or left out.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields

from pipeline.types import WHOLE_BODY, District
from training.evaluation.aggregate import by_method, of_region, per_patient
from training.evaluation.baselines import BASELINES
from training.evaluation.measure import BODY, FIELD_OF_VIEW, LESIONS, METRICS, Measure
from training.evaluation.metrics import Summary, describe
from training.evaluation.significance import Comparison, compare, corrected

CONDITIONS = ("lymphoma", "lung_cancer", "melanoma", "negative")
DIGITS = {"mae": 4, "psnr": 2, "ssim": 3}
HEADS = {"mae": "MAE ↓", "psnr": "PSNR (dB) ↑", "ssim": "SSIM ↑"}
METHOD_TITLES = {
    "pix2pix/districts": "Pix2Pix, districts",
    "pix2pix/whole_body": "Pix2Pix, whole body",
    "cyclegan/districts": "CycleGAN, districts",
    "cyclegan/whole_body": "CycleGAN, whole body",
    "hu_lookup": "HU-to-SUV look-up",
    "district_mean": "district mean",
}
GROUP_TITLES = {
    BODY: "whole body",
    FIELD_OF_VIEW: "whole body, field of view",
    LESIONS: "lesion voxels",
    "lung_cancer": "lung cancer",
    "negative": "negative controls",
}
CAPTION = (
    "Mean ± SD (SE) [95 % bootstrap interval of the mean] over n patients; seeds are averaged within a study, "
    "studies within a patient. MAE in SUV / {suv_max:g}, data range 1.0 for PSNR and SSIM."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """`cells[group, method, metric]` over patients; `tests` is one family, corrected by Holm."""

    name: str
    title: str
    groups: tuple[str, ...]
    methods: tuple[str, ...]
    cells: Mapping[tuple[str, str, str], Summary]
    tests: tuple[Comparison, ...]


def make_tables(measures: Sequence[Measure]) -> list[Table]:
    """Table I (districts and whole body), II (lesion voxels), III (whole body by condition)."""
    regions = (*(d.key for d in District), BODY)
    return [
        _table("I", "Districts and whole body", measures, {r: (r, None) for r in (*regions, FIELD_OF_VIEW)}),
        _table("II", "Lesion voxels", measures, {LESIONS: (LESIONS, None)}),
        _table("III", "Whole body by condition", measures, {c: (BODY, c) for c in CONDITIONS}),
    ]


def _table(name: str, title: str, measures: Sequence[Measure], groups: Mapping[str, tuple[str, str | None]]) -> Table:
    methods = by_method(measures)
    values: dict[tuple[str, str, str], dict[str, float]] = {}
    for group, (region, condition) in groups.items():
        for method, rows in methods.items():
            kept = [row for row in rows if condition in (None, row.diagnosis)]
            for metric in METRICS:
                values[group, method, metric] = per_patient(kept, of_region(region, metric))
    return Table(
        name=name,
        title=title,
        groups=tuple(groups),
        methods=tuple(methods),
        cells={key: describe(found.values()) for key, found in values.items()},
        tests=tuple(corrected(list(_comparisons(list(groups), list(methods), values)))),
    )


def _comparisons(
    groups: Sequence[str], methods: Sequence[str], values: Mapping[tuple[str, str, str], Mapping[str, float]]
) -> Iterable[Comparison]:
    """District networks against the whole-body network of the same model, and every network against the baselines.

    The field of view is not tested: it is the whole body measured in another frame.
    """
    for method in methods:
        model, _, variant = method.partition("/")
        others = [f"{model}/{WHOLE_BODY}"] if variant == "districts" else []
        for other in (*others, *BASELINES) if variant else ():
            for group in groups:
                for metric in METRICS if other in methods and group != FIELD_OF_VIEW else ():
                    pair = values[group, method, metric], values[group, other, metric]
                    yield compare(group, metric, method, other, *pair)


def method_title(method: str) -> str:
    return METHOD_TITLES.get(method, method)


def group_title(group: str) -> str:
    return GROUP_TITLES.get(group, group)


def cell(summary: Summary, digits: int, *, interval: bool = True) -> str:
    """ "0.0103 ± 0.0021 (0.0005) [0.0094, 0.0112]"; "-" where nothing was measured."""
    if summary["mean"] is None:
        return "-"
    text = f"{summary['mean']:.{digits}f}"
    if summary["sd"] is not None:
        text += f" ± {summary['sd']:.{digits}f} ({summary['se']:.{digits}f})"
        if interval:
            text += f" [{summary['low']:.{digits}f}, {summary['high']:.{digits}f}]"
    return text


def cell_short(summary: Summary, digits: int) -> str:
    """Mean ± SD alone, for a terminal."""
    if summary["mean"] is None:
        return "-"
    spread = "" if summary["sd"] is None else f" ± {summary['sd']:.{digits}f}"
    return f"{summary['mean']:.{digits}f}{spread}"


def markdown_rows(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table; a pipe inside a cell is escaped."""
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(c.replace("|", "\\|") for c in line) + " |" for line in lines]


def markdown(table: Table, suv_max: float) -> list[str]:
    """Lines of a table: one row per group and method."""
    rows = []
    for group in table.groups:
        for place, method in enumerate(table.methods):
            found = {metric: table.cells[group, method, metric] for metric in METRICS}
            cells = [cell(found[metric], DIGITS[metric]) for metric in METRICS]
            rows.append(
                [group_title(group) if place == 0 else "", method_title(method), str(found["mae"]["n"]), *cells]
            )
    head = ["", "method", "n", *(HEADS[m] for m in METRICS)]
    return [
        f"### Table {table.name}. {table.title}",
        "",
        CAPTION.format(suv_max=suv_max),
        "",
        *markdown_rows(head, rows),
    ]


def tables_csv(tables: Sequence[Table]) -> str:
    """Every cell of every table as one line."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    figures = ("n", "mean", "sd", "se", "low", "high")
    writer.writerow(["table", "group", "method", "metric", *figures])
    for table in tables:
        for (group, method, metric), summary in table.cells.items():
            writer.writerow([table.name, group, method, metric, *(summary[name] for name in figures)])
    return text.getvalue()


def comparisons_csv(tables: Sequence[Table]) -> str:
    """Every comparison of every table as one line."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [f.name for f in fields(Comparison)]
    writer.writerow(["table", *names, "verdict"])
    for table in tables:
        for test in table.tests:
            writer.writerow([table.name, *(getattr(test, name) for name in names), test.verdict])
    return text.getvalue()


_TEX = {
    "\\": r"\textbackslash{}",
    **{c: f"\\{c}" for c in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "↓": r"$\downarrow$",
    "↑": r"$\uparrow$",
}


def tex(text: str) -> str:
    """Text with LaTeX's special characters escaped."""
    return "".join(_TEX.get(character, character) for character in text)


def latex(tables: Sequence[Table], suv_max: float, note: str) -> str:
    r"""All tables for `\usepackage{booktabs}`; `note` ends every caption (what data)."""
    return "% needs \\usepackage{booktabs}\n" + "\n".join(_latex(table, suv_max, note) for table in tables)


def _latex(table: Table, suv_max: float, note: str) -> str:
    caption = tex(f"{table.title}. {CAPTION.format(suv_max=suv_max)} {note}")
    head = " & ".join(["", "Method", "$n$", *(tex(HEADS[m]) for m in METRICS)])
    lines = [
        r"\begin{table*}",
        r"\centering",
        rf"\caption{{{caption}}}",
        rf"\label{{tab:{table.name.lower()}}}",
        r"\footnotesize",
        r"\begin{tabular}{llrlll}",
        r"\toprule",
        rf"{head} \\",
    ]
    for group in table.groups:
        lines.append(r"\midrule")
        for place, method in enumerate(table.methods):
            found = {metric: table.cells[group, method, metric] for metric in METRICS}
            cells = [tex(cell(found[metric], DIGITS[metric])) for metric in METRICS]
            first = tex(group_title(group)) if place == 0 else ""
            lines.append(" & ".join([first, tex(method_title(method)), str(found["mae"]["n"]), *cells]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table*}", ""])
