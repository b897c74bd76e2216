"""The model card of a bundle: Markdown made from its manifest and from the report on its networks.

Nothing in it is typed by hand, so that a card cannot praise what was not measured. Sections after Mitchell et al.,
"Model cards for model reporting" (2019): details, intended use, data, training, figures, limits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipeline.bundle import Manifest
from pipeline.types import WHOLE_BODY, District
from training.evaluation.report_format import EvaluationReport

Summary = Mapping[str, Mapping[str, Mapping[str, Mapping[str, Any]]]]  # method, region, metric, statistic

NAMES = {
    "districts": "district networks, stitched",
    "whole_body": "whole-body network alone",
    "hu_lookup": "HU-to-SUV look-up (baseline)",
    "district_mean": "district mean (baseline)",
}
# metric: heading, decimals
METRICS: Mapping[str, tuple[str, int]] = {
    "mae": ("MAE (1.0 = suv_max)", 4),
    "psnr": ("PSNR in dB (data range 1.0)", 2),
    "ssim": ("SSIM (data range 1.0)", 3),
    "bias_suv_mean": ("Bias of SUVmean (g/ml)", 3),
}


def model_card(manifest: Manifest, report: EvaluationReport) -> str:
    """The card's text. `manifest` holds every network; `report` may hold other models too, which are left out."""
    parts = [
        _what(manifest),
        _use(report),
        _data(manifest, report),
        _training(manifest),
        _figures(manifest, report),
        _limits(manifest, report),
        _running(manifest),
        _digests(manifest),
    ]
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


def _what(manifest: Manifest) -> list[str]:
    recipe = manifest.training.get("recipe", {})
    made_of = ", ".join(manifest.networks)
    spacing = " x ".join(f"{value:g}" for value in manifest.spacing_mm)
    return [
        f"# {manifest.name} {manifest.version}",
        "",
        f"**{manifest.statement}**",
        "",
        "Networks that predict the *expected* FDG-PET (SUV, body weight) of a CT: CT carries no metabolic information",
        "of its own. The method is that of Guarrasi et al., arXiv 2503.15555: a generator for each body district,",
        "stitched.",
        "",
        f"- Made {manifest.created:%Y-%m-%d} with recipe {recipe.get('name', 'unknown')}, profile {manifest.profile}; "
        f"networks: {made_of}",
        f"- Input: CT on a grid of {spacing} mm (z, y, x), {_scaling(manifest)}; what a network sees: "
        f'"{manifest.input_mask}"',
        f"- Output: SUV 0 to {manifest.normalization.suv_max:g} g/ml; windows of {manifest.window} voxels, overlap "
        f"{manifest.overlap}, blending {manifest.blending}, stitching {manifest.stitching}",
        f"- Licence: {manifest.licence}",
    ]


def _scaling(manifest: Manifest) -> str:
    normalization = manifest.normalization
    if normalization.ct_range == "volume":
        return "scaled by each volume's own minimum and maximum"
    return f"clipped to {normalization.ct_low_hu:g} to {normalization.ct_high_hu:g} HU"


def _use(report: EvaluationReport) -> list[str]:
    lines = [
        "## Intended use",
        "Research on CT-to-PET synthesis, and tests of a DICOM node around it. **Not for clinical use**: not for",
        "diagnosis, staging, therapy planning or dose, and no substitute for a PET scan. What the node makes with",
        "it is marked synthetic in every object.",
    ]
    if report.phantom:
        lines.append("These networks have only ever seen computer phantoms: their output on a patient means nothing.")
    return lines


def _data(manifest: Manifest, report: EvaluationReport) -> list[str]:
    training = manifest.training
    source = "computer phantoms, no patient data" if report.phantom else "FDG-PET/CT studies of patients"
    unit = training.get("split_unit", "patient")
    lines = [
        "## Data",
        f"{source[0].upper()}{source[1:]} (layout {training.get('layout', 'unknown')}), split by {unit}.",
        "",
        "| side | studies | patients |",
        "| --- | --- | --- |",
        *(f"| {side} | {n['studies']} | {n['patients']} |" for side, n in training.get("splits", {}).items()),
        "",
        f"Refused in preparation: {training.get('refused', 0)}. SHA-256 of the prepared data "
        f"`{training.get('data_sha256', '')}`, of the split `{training.get('split_sha256', '')}`.",
    ]
    if unit == "study":
        lines.append("Split by study: scans of one patient may be on both sides, so the figures flatter.")
    return lines


def _training(manifest: Manifest) -> list[str]:
    training = manifest.training
    runs: Mapping[str, Mapping[str, Any]] = training.get("networks", {})
    lines = [
        "## Training",
        "| network | model | generator | seed | steps | minutes | device | torch |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for key, entry in manifest.networks.items():
        run = runs.get(key, {})
        spec = f"{entry.spec.architecture}, width {entry.spec.width}, depth {entry.spec.depth}"
        minutes = f"{run.get('seconds', 0) / 60:.1f}"
        cells = (
            run.get("model"),
            spec,
            run.get("seed"),
            run.get("steps"),
            minutes,
            run.get("device"),
            run.get("torch"),
        )
        lines.append(f"| {key} | {' | '.join(map(str, cells))} |")
    return [
        *lines,
        "",
        f"Recipe SHA-256 `{training.get('recipe_sha256', '')}`, made by {training.get('software', 'unknown')}.",
        "The whole recipe is in `manifest.json` under `training`.",
    ]


def _figures(manifest: Manifest, report: EvaluationReport) -> list[str]:
    summary: Summary = manifest.metrics.get("summary", {})
    kind = "phantoms" if report.phantom else "patients"
    lines = [
        "## Figures",
        f"{report.studies} {report.split} studies of {report.patients} {kind}, through the node's own inference. Mean",
        "± SD over patients [95 % interval of the mean], n patients; inside district and body. The districts are the",
        "prepared data's: what a segmenter adds to the error on a new CT is not in these figures.",
    ]
    if len(seeds := manifest.metrics.get("seeds", ())) > 1:
        said = (
            f"Averaged over the runs of seeds {', '.join(map(str, seeds))} within each patient; the bundle holds one:"
        )
        lines += [said, "the seed in the table above."]
    for metric, (heading, decimals) in METRICS.items():
        lines += ["", f"### {heading}", *_table(summary, metric, decimals)]
    if more := _beyond(report, summary):
        lines += ["", *more]
    return lines


def _table(summary: Summary, metric: str, decimals: int) -> list[str]:
    regions = _in_order({region for rows in summary.values() for region, row in rows.items() if metric in row})
    if not regions:
        return ["Not measured."]
    lines = [f"|  | {' | '.join(regions)} |", f"| --- |{' --- |' * len(regions)}"]
    for method, rows in summary.items():
        cells = (_cell(rows.get(region, {}).get(metric, {}), decimals) for region in regions)
        lines.append(f"| {_name(method)} | {' | '.join(cells)} |")
    return lines


def _in_order(regions: Iterable[str]) -> list[str]:
    first = ("body", *(district.key for district in District))
    known = [region for region in first if region in regions]
    return [*known, *sorted(set(regions) - set(first))]


def _name(method: str) -> str:
    model, _, variant = method.rpartition("/")
    return f"{model} {NAMES.get(variant, variant)}".strip()


def _cell(row: Mapping[str, Any], decimals: int) -> str:
    mean = row.get("mean")
    if mean is None:
        return "not measured"
    text = f"{mean:.{decimals}f}"
    if row.get("sd") is not None:
        text += f" ± {row['sd']:.{decimals}f}"
    if row.get("low") is not None and row.get("high") is not None:
        text += f" [{row['low']:.{decimals}f}, {row['high']:.{decimals}f}]"
    return f"{text}, n {row.get('n', 0)}"


def _beyond(report: EvaluationReport, summary: Summary) -> list[str]:
    """Lesions, invented uptake and seams, where the report measured them; the rest is in report.md."""
    details = report.details
    lesion_mae = {
        row["method"]: row
        for row in details.get("tables", {}).get("II", ())
        if row.get("metric") == "mae" and row.get("mean") is not None
    }
    found: Mapping[str, Mapping[str, Any]] = details.get("sensitivity_at", {})
    invented: Mapping[str, Mapping[str, Any]] = details.get("false_positive_ml", {})
    seams: Mapping[str, Mapping[str, Any]] = details.get("seam_index", {})
    methods = [m for m in summary if any(m in part for part in (lesion_mae, found, invented, seams))]
    if not methods:
        return []
    lines = [
        "### Lesions, invented uptake, seams",
        "|  | MAE in lesion voxels | lesions found at false positives per study | hot by mistake (ml) | seam index |",
        "| --- | --- | --- | --- | --- |",
    ]
    for method in methods:
        shares = [f"{share:.0%} at {n}" for n, share in found.get(method, {}).items() if share is not None]
        cells = (
            _cell(lesion_mae.get(method, {}), 4),
            ", ".join(shares) or "not measured",
            _cell(invented.get(method, {}), 2),
            _cell(seams.get(method, {}), 3),
        )
        lines.append(f"| {_name(method)} | {' | '.join(cells)} |")
    return lines


def _limits(manifest: Manifest, report: EvaluationReport) -> list[str]:
    lines = [
        "## Limits",
        "- Lesions: a CT does not show how active a lesion is, and some lesions it does not show at all. Expect uptake",
        "  in a lesion to be missed or wrong; a synthetic PET without a lesion says nothing about the patient.",
        "- Uptake that varies from day to day (heart, bowel, bladder, brown fat) cannot be known from a CT: at best",
        "  its usual value is predicted.",
        "- Districts that the segmenter does not find with confidence are left to the whole-body network, or empty and",
        "  reported as not evaluated.",
    ]
    absent = [d.key for d in District if d.key not in manifest.networks]
    if absent and manifest.input_mask != "districts":
        stands_in = "the whole-body network serves them" if WHOLE_BODY in manifest.networks else "they stay empty"
        lines.append(f"- No network for: {', '.join(absent)}; {stands_in}.")
    unseen = _unmeasured(manifest)
    if unseen:
        lines.append(f"- Not measured on the {report.split} studies: {', '.join(unseen)}.")
    if report.phantom:
        lines += [
            "- Computer phantoms have stylised anatomy and textbook uptake: the figures say nothing about patients.",
        ]
    if report.split != "test":
        lines.append(f"- Measured on the {report.split} studies, which may have served to choose settings.")
    return lines


def _unmeasured(manifest: Manifest) -> list[str]:
    summary: Summary = manifest.metrics.get("summary", {})
    own = next(iter(summary.values()), {})
    return [d.key for d in District if own.get(d.key, {}).get("mae", {}).get("mean") is None]


def _running(manifest: Manifest) -> list[str]:
    return [
        "## Run and verify",
        "```",
        "dicom-node models install FOLDER            # checks every digest, then copies",
        f"dicom-node models verify {manifest.name}",
        f"dicom-node run CT_FOLDER OUT_FOLDER --bundle {manifest.name}",
        "```",
        "",
        f"## Licence\n{manifest.licence}",
    ]


def _digests(manifest: Manifest) -> list[str]:
    rows: Sequence[tuple[str, str]] = [(entry.file, entry.sha256) for entry in manifest.networks.values()]
    return [
        "## SHA-256",
        "`manifest.json` holds these too, and the SHA-256 of this card.",
        "",
        "| file | SHA-256 |",
        "| --- | --- |",
        *(f"| {file} | `{digest}` |" for file, digest in rows),
    ]
