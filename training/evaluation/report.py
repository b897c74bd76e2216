"""What an evaluation leaves: report.md for people, report.json for programs, tables and rows, figures.

REPORT/report.md, report.json, tables.csv, tables.tex, tests.csv, rows.csv, organs.csv, lesions.csv and *.png. It
prints what was found, also where the district networks lose.
"""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.types import WHOLE_BODY
from training.evaluation import figures
from training.evaluation.aggregate import by_method, of_region, per_patient
from training.evaluation.agreement import organ_agreement, organs_of, region_agreement, shown_organs
from training.evaluation.detection import FALSE_POSITIVES_PER_STUDY, FrocPoint, froc, sensitivity_at
from training.evaluation.evaluate import Evaluation
from training.evaluation.measure import REGIONS, Measure
from training.evaluation.metrics import Summary, describe
from training.evaluation.report_format import REPORT, EvaluationReport
from training.evaluation.report_text import report_markdown
from training.evaluation.tables import Table, comparisons_csv, latex, make_tables, tables_csv
from training.files import write_whole
from training.prepared import patients

SUMMARY_METRICS = ("mae", "psnr", "ssim", "bias_suv_mean", "bias_suv_max")


def write_report(folder: Path, evaluation: Evaluation, *, created: datetime | None = None) -> list[Table]:
    """Write everything into `folder`, report.json last; returns the tables.

    Args:
        folder: is made; files of the same names are replaced.
        evaluation: what was measured.
        created: aware UTC time; None: now.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tables = make_tables(evaluation.measures)
    suv_max = evaluation.recipe.normalization.suv_max
    names = _write_figures(folder, evaluation, tables[0])
    write_whole(folder / "tables.csv", tables_csv(tables).encode())
    write_whole(folder / "tests.csv", comparisons_csv(tables).encode())
    write_whole(folder / "tables.tex", latex(tables, suv_max, data_note(evaluation)).encode())
    write_whole(folder / "rows.csv", rows_csv(evaluation.measures).encode())
    write_whole(folder / "organs.csv", organs_csv(evaluation.measures).encode())
    write_whole(folder / "lesions.csv", lesions_csv(evaluation.measures).encode())
    text = report_markdown(evaluation, tables, froc_by_method(evaluation.measures), names, data_note(evaluation))
    write_whole(folder / "report.md", text.encode())
    report = as_report(evaluation, tables, created or datetime.now(UTC))
    write_whole(folder / REPORT, (report.model_dump_json(indent=1) + "\n").encode())
    return tables


def data_note(evaluation: Evaluation) -> str:
    """One sentence that stands beside every figure and table."""
    if evaluation.prepared.phantom:
        return "Computer phantoms, not patients; not for clinical use."
    return "Research only; not for clinical use."


def froc_by_method(measures: Sequence[Measure]) -> dict[str, list[FrocPoint]]:
    """The FROC curve of each method over its studies and seeds."""
    curves = {}
    for method, rows in by_method(measures).items():
        whole = [row for row in rows if not row.not_evaluated]
        curves[method] = froc(([lesion["suv_max"] or 0.0 for lesion in r.lesions], r.false_positives) for r in whole)
    return curves


def as_report(evaluation: Evaluation, tables: Sequence[Table], created: datetime) -> EvaluationReport:
    """The figures for programs; what is not finite or was not measured is null."""
    measures = evaluation.measures
    summary: dict[str, dict[str, dict[str, Summary]]] = {}
    for method, rows in by_method(measures).items():
        summary[method] = {
            region: {metric: _described(rows, region, metric) for metric in SUMMARY_METRICS} for region in REGIONS
        }
    curves = froc_by_method(measures)
    details: dict[str, Any] = {
        "device": evaluation.device,
        "missing": list(evaluation.missing),
        "studies_by_diagnosis": dict(Counter(study.diagnosis for study in evaluation.studies)),
        "tables": {
            t.name: [{"group": g, "method": m, "metric": k, **cell} for (g, m, k), cell in t.cells.items()]
            for t in tables
        },
        "tests": {
            t.name: [
                {name: getattr(test, name) for name in test.__slots__} | {"verdict": test.verdict} for test in t.tests
            ]
            for t in tables
        },
        "froc": {
            method: [[p.threshold_suv, p.sensitivity, p.false_positives] for p in points]
            for method, points in curves.items()
        },
        "sensitivity_at": {
            method: {str(fp): sensitivity_at(points, fp) for fp in FALSE_POSITIVES_PER_STUDY}
            for method, points in curves.items()
        },
        "seam_index": _by_patient(measures, lambda row: row.seam_index),
        "false_positive_ml": _by_patient(
            [row for row in measures if row.diagnosis == "negative"], lambda row: row.false_positive_ml
        ),
        "rows": [row.model_dump(mode="json") for row in measures],
    }
    return EvaluationReport(
        created=created,
        recipe=evaluation.recipe.name,
        split="test" if evaluation.split == "test" else "validation",
        studies=len(evaluation.studies),
        patients=patients(evaluation.studies),
        phantom=evaluation.prepared.phantom,
        prepared_digest=evaluation.prepared.digest,
        split_digest=evaluation.prepared.split_digest,
        weights={record.folder_name.as_posix(): record.weights_sha256 for record in evaluation.records},
        summary=summary,
        details=_finite(details),
    )


def _described(rows: Sequence[Measure], region: str, metric: str) -> Summary:
    return describe(per_patient(rows, of_region(region, metric)).values())


def _by_patient(measures: Sequence[Measure], value: Any) -> dict[str, Summary]:
    return {method: describe(per_patient(rows, value).values()) for method, rows in by_method(measures).items()}


def rows_csv(measures: Sequence[Measure]) -> str:
    """One line per study, method, seed and region."""
    figures_of = ("voxels", "mae", "psnr", "ssim", "suv_mean", "true_suv_mean", "suv_max", "true_suv_max")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["study", "patient", "diagnosis", "method", "seed", "region", *figures_of, "seam_index"])
    for row in measures:
        for region, found in row.regions.items():
            who = [row.study, row.patient, row.diagnosis, row.method, row.seed, region]
            writer.writerow([*who, *(found.get(name) for name in figures_of), row.seam_index])
    return text.getvalue()


def organs_csv(measures: Sequence[Measure]) -> str:
    """Bland-Altman of SUVmean in g/ml of every organ and method."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["organ", "method", "patients", "bias", "sd", "low", "high"])
    for method, rows in by_method(measures).items():
        for organ in organs_of(rows):
            found = organ_agreement(rows, organ)
            if found is not None:
                writer.writerow([organ, method, found.n, found.bias, found.sd, *(found.limits or (None, None))])
    return text.getvalue()


def lesions_csv(measures: Sequence[Measure]) -> str:
    """One line per lesion, method and seed."""
    names = ("volume_ml", "true_suv_max", "suv_max", "true_contrast", "contrast")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["study", "method", "seed", "lesion", *names])
    for row in measures:
        for number, lesion in enumerate(row.lesions, start=1):
            writer.writerow([row.study, row.method, row.seed, number, *(lesion.get(name) for name in names)])
    return text.getvalue()


def _write_figures(folder: Path, evaluation: Evaluation, table: Table) -> dict[str, str]:
    """Draws the figures; file names by what they show."""
    note, normalization = data_note(evaluation), evaluation.recipe.normalization
    drawn: dict[str, Any] = {}
    for picture in evaluation.pictures:
        drawn[f"panels-{picture.model}"] = figures.panels(picture, normalization, note)
        drawn[f"mip-{picture.model}"] = figures.projections(picture, note)
    drawn["mae"] = figures.mae_by_district(table, normalization.suv_max, note)
    methods = by_method(evaluation.measures)
    for model in evaluation.models:
        own = {m: rows for m, rows in methods.items() if m in (f"{model}/districts", f"{model}/{WHOLE_BODY}")}
        by_region = {m: [a for r in REGIONS if (a := region_agreement(rows, r))] for m, rows in own.items()}
        drawn[f"bland-altman-{model}"] = figures.bland_altman(by_region, note)
        by_organ = {m: [a for o in shown_organs(rows) if (a := organ_agreement(rows, o))] for m, rows in own.items()}
        if any(by_organ.values()):
            drawn[f"bland-altman-organs-{model}"] = figures.bland_altman(by_organ, note)
    drawn["froc"] = figures.froc_curves(froc_by_method(evaluation.measures), note)
    for name, figure in drawn.items():
        figures.save(figure, folder / f"{name}.png")
    return {name: f"{name}.png" for name in drawn}


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, float):
        return round(value, 7) if math.isfinite(value) else None
    return value
