"""report.md of an evaluation: what was measured on what data, tables, tests, lesions, bias, budgets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from pipeline.types import WHOLE_BODY
from training.evaluation.aggregate import Value, by_method, of_region, per_patient
from training.evaluation.agreement import Agreement, organ_agreement, region_agreement, shown_organs
from training.evaluation.detection import COLD_SUV, FALSE_POSITIVES_PER_STUDY, HOT_SUV, FrocPoint, sensitivity_at
from training.evaluation.evaluate import Evaluation
from training.evaluation.measure import BODY, METRICS, REGIONS, Measure
from training.evaluation.metrics import describe
from training.evaluation.significance import ALPHA, Comparison
from training.evaluation.tables import (
    DIGITS,
    HEADS,
    Table,
    cell,
    group_title,
    markdown,
    markdown_rows,
    method_title,
)
from training.prepared import patients
from training.runs import RunRecord

VERDICTS = ("win", "loss", "undecided", "not tested")


def report_markdown(
    evaluation: Evaluation,
    tables: Sequence[Table],
    curves: Mapping[str, Sequence[FrocPoint]],
    figures: Mapping[str, str],
    note: str,
) -> str:
    """The whole text; `figures` are file names beside it, `note` stands on top."""
    suv_max = evaluation.recipe.normalization.suv_max
    sections = [
        _opening(evaluation, note),
        ["## Verdict", "", *verdict_lines(tables)],
        ["## Tables", "", *(line for table in tables for line in (*markdown(table, suv_max), ""))],
        ["## Pictures", "", *_pictures(figures, ("panels", "mip", "mae"))],
        ["## SUV bias", "", *_bias(evaluation.measures), "", *_pictures(figures, ("bland-altman",))],
        ["## Lesions", "", *_lesions(evaluation.measures, curves), "", *_pictures(figures, ("froc",))],
        ["## Negative controls and seams", "", *_controls(evaluation.measures)],
        ["## Training", "", *_training(evaluation)],
        ["## All tests", "", *_tests(tables)],
    ]
    return "\n".join(line for section in sections for line in (*section, ""))


def _opening(evaluation: Evaluation, note: str) -> list[str]:
    prepared, studies = evaluation.prepared, evaluation.studies
    diagnoses = Counter(study.diagnosis for study in studies)
    lines = [f"# Evaluation of recipe {evaluation.recipe.name}", "", f"**{note}**"]
    if prepared.phantom:
        lines += [
            "Results on phantoms say nothing about patients: anatomy and uptake are drawn from textbook ranges, and",
            "part of the error cannot be avoided by any network.",
        ]
    training = [study for study in prepared.studies if study.split == "train"]
    lines += [
        "",
        f"- {len(studies)} {evaluation.split} studies of {patients(studies)} patients"
        f" ({', '.join(f'{count} {name}' for name, count in sorted(diagnoses.items()))}); trained on {len(training)}"
        f" studies of {patients(training)} patients; split by {evaluation.recipe.split.unit}.",
        f"- Grid {' x '.join(f'{s:g}' for s in prepared.spacing_mm)} mm (z, y, x); data digest"
        f" `{prepared.digest[:16]}`, split digest `{prepared.split_digest[:16]}`.",
        "- Through the inference code that the node runs, in fp32; the districts are the prepared ones, so the"
        " segmenter is not measured. Primary region: district and body. Outside the body both volumes count as 0.",
        "- The field-of-view row is the same prediction averaged over the whole box around the body, air included:"
        " air flatters it.",
        f"- Measured on {evaluation.device}.",
    ]
    if evaluation.recipe.split.unit == "study":
        lines.append("- **Split by study: the same patient may be in training and test. Figures are too good.**")
    lines += [f"- Not there: {text}." for text in evaluation.missing]
    return lines


def verdict_lines(tables: Sequence[Table]) -> list[str]:
    """Wins, losses, undecided and not tested of every pair of methods, by table; nothing is left out."""
    lines = [
        f"A win or a loss is a paired two-tailed t-test under {ALPHA:g} after Holm's correction over all comparisons"
        " of its table; everything else is undecided.",
        "",
    ]
    for table in tables:
        pairs = dict.fromkeys((test.method, test.other) for test in table.tests)
        for method, other in pairs:
            found = [test for test in table.tests if (test.method, test.other) == (method, other)]
            lines.append(f"- Table {table.name}, {method_title(method)} against {method_title(other)}: {_told(found)}.")
    return lines if len(lines) > 2 else [*lines, "- Nothing to compare: one method only."]


def _told(tests: Sequence[Comparison]) -> str:
    parts = []
    for verdict in VERDICTS:
        named = [test for test in tests if test.verdict == verdict]
        word = {"win": "wins", "loss": "LOSES"}.get(verdict, verdict)
        if named and len(named) == len(tests):
            parts.append(f"{word} everywhere ({len(named)} comparisons)")
        elif named:
            parts.append(f"{word} {len(named)} of {len(tests)}: {_places(named)}")
    return ". ".join(parts)


def _places(tests: Sequence[Comparison]) -> str:
    """ "head; trunk (PSNR)": a group without metrics has all of them."""
    texts = []
    for group in dict.fromkeys(test.group for test in tests):
        metrics = [test.metric.upper() for test in tests if test.group == group]
        which = "" if len(metrics) == len(METRICS) else f" ({', '.join(metrics)})"
        texts.append(f"{group_title(group)}{which}")
    return "; ".join(texts)


def _pictures(figures: Mapping[str, str], kinds: Sequence[str]) -> list[str]:
    return [f"![{name}]({file})" for kind in kinds for name, file in figures.items() if name.startswith(kind)]


def _bias(measures: Sequence[Measure]) -> list[str]:
    lines = [
        "Synthetic minus true, g/ml. SUVmean: Bland-Altman bias and 95 % limits of agreement (bias ± 1.96 SD) over"
        " patients. SUVmax: mean ± SD (SE). Organs without their lesion voxels;"
        " all of them are in organs.csv.",
        "",
    ]
    rows = []
    for method, found in by_method(measures).items():
        for region in REGIONS:
            agreement = region_agreement(found, region)
            if agreement is not None:
                highest = describe(per_patient(found, of_region(region, "bias_suv_max")).values())
                who = [group_title(region), method_title(method)]
                rows.append([*who, *_agreement_cells(agreement), cell(highest, 2, interval=False)])
    lines += markdown_rows(["region", "method", "n", "SUVmean bias", "limits of agreement", "SUVmax bias"], rows)
    rows = []
    for method, found in by_method(measures).items():
        for organ in shown_organs(found):
            agreement = organ_agreement(found, organ)
            if agreement is not None:
                rows.append([organ.replace("_", " "), method_title(method), *_agreement_cells(agreement)])
    if rows:
        rows.sort(key=lambda row: row[0])
        lines += ["", *markdown_rows(["organ", "method", "n", "SUVmean bias", "limits of agreement"], rows)]
    return lines


def _agreement_cells(agreement: Agreement) -> list[str]:
    limits = "-" if agreement.limits is None else f"{agreement.limits[0]:+.2f} to {agreement.limits[1]:+.2f}"
    return [str(agreement.n), f"{agreement.bias:+.3f}", limits]


def _lesions(measures: Sequence[Measure], curves: Mapping[str, Sequence[FrocPoint]]) -> list[str]:
    rows = []
    for method, found in by_method(measures).items():
        lesions = [lesion for row in found for lesion in row.lesions]
        if not lesions:
            continue
        seeds = len({row.seed for row in found})
        means = []
        for name in ("true_suv_max", "suv_max", "true_contrast", "contrast"):
            values = [value for lesion in lesions if (value := lesion[name]) is not None]
            means.append(f"{sum(values) / len(values):.2f}" if values else "-")
        at = [sensitivity_at(curves[method], fp) for fp in FALSE_POSITIVES_PER_STUDY]
        told = ["-" if value is None else f"{value:.2f}" for value in at]
        rows.append([method_title(method), str(len(lesions) // seeds), *means, *told])
    if not rows:
        return ["No study has a lesion."]
    head = ["method", "lesions", "true SUVmax", "SUVmax", "true contrast", "contrast"]
    head += [f"sensitivity at {fp}" for fp in FALSE_POSITIVES_PER_STUDY]
    return [
        "Means over lesions (26-connected components of the lesion mask). Contrast: SUVmax over the mean of the shell"
        " 4 to 16 mm around. Sensitivity: share of lesions whose synthetic SUVmax reaches a threshold, at the best"
        " threshold with at most so many invented hot spots per study; - where no threshold has so few.",
        "A hot spot is invented when it touches neither true uptake of its threshold nor a lesion. Normal uptake"
        " around a lesion counts as showing it, so the baselines' sensitivity is the floor to compare with.",
        "",
        *markdown_rows(head, rows),
    ]


def _controls(measures: Sequence[Measure]) -> list[str]:
    rows = []
    for method, found in by_method(measures).items():
        negative = [row for row in found if row.diagnosis == "negative"]
        volume = _patients_mean(negative, lambda row: row.false_positive_ml)
        seam = _patients_mean(found, lambda row: row.seam_index)
        rows.append([method_title(method), str(volume["n"]), cell(volume, 1), cell(seam, 3)])
    return [
        f"False-positive volume in ml: synthetic PET at least SUV {HOT_SUV:g} where the true one is under"
        f" {COLD_SUV:g}, in studies without a lesion. Seam index: how much more the synthetic PET jumps at the borders"
        " of districts than the true one does, in units of the usual difference beside the border; 0 is no seam,"
        " below 0 the borders are smoother than in the true PET; - where a synthetic PET is flat inside districts.",
        "",
        *markdown_rows(["method", "negative controls", "false-positive ml", "seam index"], rows),
    ]


def _patients_mean(measures: Sequence[Measure], value: Value) -> dict[str, float | int | None]:
    return describe(per_patient(measures, value).values())


def _training(evaluation: Evaluation) -> list[str]:
    rows = []
    for record in evaluation.records:
        minutes = f"{record.seconds / 60:.1f}"
        rows.append([record.model, record.network, str(record.seed), str(record.steps), minutes, record.device])
    lines = markdown_rows(["model", "network", "seed", "steps", "minutes", "device"], rows)
    lines += ["", "Budgets, summed over the networks of one method (mean over seeds):", ""]
    for model in evaluation.models:
        for title, records in _budgets(evaluation, model):
            seeds, networks = len({r.seed for r in records}), len({r.network for r in records})
            steps, spent = sum(r.steps for r in records) / seeds, sum(r.seconds for r in records) / 60 / seeds
            lines.append(
                f"- {title}: {networks} network{'s' * (networks > 1)}, {steps:.0f} steps, {spent:.1f} minutes."
            )
    lines += [
        "",
        "Where these differ the comparison is of methods with unequal budgets: four district networks together may"
        " have seen more steps than the one whole-body network.",
        "",
        *_seeds(evaluation),
    ]
    return lines


def _budgets(evaluation: Evaluation, model: str) -> list[tuple[str, list[RunRecord]]]:
    """The runs of the district networks, and those of the whole-body network."""
    own = [r for r in evaluation.records if r.model == model]
    parts = {
        f"{model}/districts": [r for r in own if r.network != WHOLE_BODY],
        f"{model}/{WHOLE_BODY}": [r for r in own if r.network == WHOLE_BODY],
    }
    return [(method_title(method), records) for method, records in parts.items() if records]


def _seeds(evaluation: Evaluation) -> list[str]:
    rows = []
    for method, found in by_method(evaluation.measures).items():
        for seed in sorted({row.seed for row in found if row.seed is not None}):
            own = [row for row in found if row.seed == seed]
            means = [describe(per_patient(own, of_region(BODY, m)).values()) for m in METRICS]
            told = [cell(s, DIGITS[m], interval=False) for s, m in zip(means, METRICS, strict=True)]
            rows.append([method_title(method), str(seed), *told])
    if len({row[1] for row in rows}) < 2:
        return []
    head = ["method", "seed", *(HEADS[m] for m in METRICS)]
    return ["Each seed alone, whole body, mean ± SD (SE) over patients:", "", *markdown_rows(head, rows)]


def _tests(tables: Sequence[Table]) -> list[str]:
    rows = []
    for table in tables:
        for test in table.tests:
            figures = [test.difference, test.effect_dz, test.p_t, test.holm_t, test.p_wilcoxon, test.holm_wilcoxon]
            told = ["-" if value is None else f"{value:.3g}" for value in figures]
            pair = f"{method_title(test.method)} - {method_title(test.other)}"
            where = [table.name, group_title(test.group), test.metric.upper(), pair, str(test.n)]
            rows.append([*where, *told, test.not_tested or test.verdict])
    head = ["table", "where", "metric", "pair", "n", "mean difference", "d_z"]
    head += ["t-test p", "Holm", "Wilcoxon p", "Holm", "verdict"]
    return markdown_rows(head, rows)
