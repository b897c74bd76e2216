"""The evaluation report: report.md for people, report.json for programs, one picture."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from pipeline.bundle import Manifest
from pipeline.types import District
from training.evaluate import METHODS, METRICS, REGIONS, Evaluation, Picture, describe
from training.export import write_whole

TITLES = {
    "districts": "district networks, stitched",
    "whole_body": "whole-body network",
    "hu_lookup": "HU-to-SUV look-up",
    "district_mean": "district mean",
}
DIGITS = {"mae": 4, "psnr": 2, "ssim": 3, "bias_suv_mean": 3}
HEADS = {"mae": "MAE", "psnr": "PSNR (dB)", "ssim": "SSIM", "bias_suv_mean": "SUVmean bias"}
PICTURE_SUV = 8.0  # upper end of the picture's grey scale


def write_report(folder: Path, manifest: Manifest, evaluation: Evaluation) -> None:
    """Write report.md, report.json and phantom.png into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "bundle": {"name": manifest.name, "version": manifest.version, "created": manifest.created.isoformat()},
        "training": manifest.training,
        "statistics": manifest.statistics,
        "metrics": evaluation.summary,
        "rows": evaluation.rows,
        "organs": evaluation.organs,
        "lesions": evaluation.lesions,
    }
    write_whole(folder / "report.json", (json.dumps(_finite(content), indent=1) + "\n").encode())
    write_whole(folder / "report.md", markdown(manifest, evaluation).encode())
    if evaluation.picture is not None:
        draw(evaluation.picture, folder / "phantom.png")


def markdown(manifest: Manifest, evaluation: Evaluation) -> str:
    """The report as Markdown: every method beside every other, nothing left out."""
    summary = evaluation.summary
    networks = manifest.training["networks"]
    lines = [
        f"# Bundle {manifest.name} {manifest.version}: results on held-out phantoms",
        "",
        f"**{manifest.statement}**",
        "These are computer phantoms with stylised anatomy; nothing here says anything about patients. Uptake is drawn",
        "from textbook ranges for every phantom, so part of the error cannot be avoided by any network.",
        "",
        f"- {summary['cases']} held-out phantoms (other seeds, so other persons), mean ± SD over phantoms.",
        f"- {manifest.training['data']}.",
        "- Units: SUV / 20 for the MAE, data range 1.0 for PSNR and SSIM, g/ml for the bias; inside district and body.",
        "- Inference through the node's own window, blending and stitching code; the districts are the phantom's own,",
        "  so the segmenter is not measured here.",
        "- Training (wall time on shared cores, networks side by side):",
        *(f"  - {key}: {row['steps']} steps in {row['seconds'] / 60:.0f} min" for key, row in networks.items()),
        "",
        "![CT, true PET and synthetic PET of one held-out phantom](phantom.png)",
        "",
    ]
    for metric in METRICS:
        lines += [f"## {HEADS[metric]}", "", *_metric_table(summary["table"], metric), ""]
    lines += ["## Does it beat the trivial predictors?", "", *_verdict(summary["table"]), ""]
    lines += [
        "## Organs",
        "",
        *_organ_table(evaluation.organs),
        "",
        "## Lesions",
        "",
        *_lesion_table(evaluation.lesions),
    ]
    return "\n".join(lines) + "\n"


def _cell(value: dict[str, Any], digits: int) -> str:
    if value["mean"] is None:
        return "-"
    spread = "" if value["sd"] is None else f" ± {value['sd']:.{digits}f}"
    return f"{value['mean']:.{digits}f}{spread}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(r) + " |" for r in (head, ["---"] * len(head), *rows)]


def _metric_table(table: dict[str, Any], metric: str) -> list[str]:
    rows = [
        [TITLES[method], *(_cell(table[method][region][metric], DIGITS[metric]) for region in REGIONS)]
        for method in METHODS
    ]
    return _table(["", *(f"{r} (n={table['districts'][r][metric]['n']})" for r in REGIONS)], rows)


def _verdict(table: dict[str, Any]) -> list[str]:
    lines = []
    for method in ("districts", "whole_body"):
        lost = [
            f"{HEADS[metric]} on {region} against {TITLES[base]}"
            for metric in ("mae", "psnr", "ssim")
            for region in REGIONS
            for base in ("hu_lookup", "district_mean")
            if not _better(metric, table[method][region][metric]["mean"], table[base][region][metric]["mean"])
        ]
        told = "better in every metric and region" if not lost else "worse in: " + "; ".join(lost)
        lines.append(f"- {TITLES[method]}: {told}.")
    lost = [
        f"{HEADS[metric]} on {region}"
        for metric in ("mae", "psnr", "ssim")
        for region in REGIONS
        if not _better(metric, table["districts"][region][metric]["mean"], table["whole_body"][region][metric]["mean"])
    ]
    told = "better in every metric and region" if not lost else "worse in: " + "; ".join(lost)
    lines.append(f"- district networks against the whole-body network (the paper's question): {told}.")
    return lines


def _better(metric: str, value: float | None, other: float | None) -> bool:
    if value is None or other is None:
        return True
    return value < other if metric == "mae" else value > other


def _organ_table(organs: list[dict[str, Any]]) -> list[str]:
    rows = []
    for organ in dict.fromkeys(row["organ"] for row in organs):
        own = [r for r in organs if r["organ"] == organ and r["method"] == "districts"]
        whole = [r for r in organs if r["organ"] == organ and r["method"] == "whole_body"]
        true = describe(r["true_suv_mean"] for r in own)
        cells = [_cell(describe(r["suv_mean"] for r in found), 2) for found in (own, whole)]
        rows.append([organ.replace("_", " "), str(true["n"]), _cell(true, 2), *cells])
    return _table(["organ", "n", "true SUVmean", "district networks", "whole-body network"], rows)


def _lesion_table(lesions: list[dict[str, Any]]) -> list[str]:
    rows = []
    for visible in (True, False):
        for method in ("districts", "whole_body", "hu_lookup"):
            found = [r for r in lesions if r["visible_on_ct"] is visible and r["method"] == method]
            rows.append(
                [
                    "seen on CT" if visible else "not seen on CT",
                    TITLES[method],
                    str(len(found)),
                    _cell(describe(r["mae"] for r in found), 3),
                    _cell(describe(r["true_suv_max"] for r in found), 1),
                    _cell(describe(r["suv_max"] for r in found), 1),
                ]
            )
    return _table(["lesions", "method", "n", "MAE", "true SUVmax", "SUVmax"], rows)


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, float):
        return round(value, 6) if np.isfinite(value) else None
    return value


def draw(picture: Picture, path: Path) -> None:
    """CT, true PET and synthetic PET side by side: a coronal slice and the maximum intensity projection."""
    dz, _, dx = picture.spacing_mm
    body = picture.labels > 0
    rows = np.flatnonzero((picture.labels == District.TRUNK).any(axis=(0, 2)))
    if rows.size == 0:
        rows = np.flatnonzero(body.any(axis=(0, 2)))
    row = int(rows[len(rows) // 2])
    panels: list[tuple[str, NDArray[np.float32], str, float, float]] = [
        ("CT, coronal", picture.hu[:, row], "gray", -200, 300),
        ("true PET, coronal", picture.true_suv[:, row], "gray_r", 0, PICTURE_SUV),
        ("synthetic PET, coronal", picture.synthetic_suv[:, row], "gray_r", 0, PICTURE_SUV),
        ("true PET, MIP", picture.true_suv.max(axis=1), "gray_r", 0, PICTURE_SUV),
        ("synthetic PET, MIP", picture.synthetic_suv.max(axis=1), "gray_r", 0, PICTURE_SUV),
    ]
    height = picture.hu.shape[0] * dz / (picture.hu.shape[2] * dx) * 3.0
    figure = Figure(figsize=(3.0 * len(panels), height + 0.6), layout="constrained")
    for axes, (title, values, colors, low, high) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        axes.imshow(values[::-1], cmap=matplotlib.colormaps[colors], vmin=low, vmax=high, aspect=dz / dx)
        axes.set_title(title)
        axes.axis("off")
    figure.suptitle(
        f"{picture.name}, held out. SUV 0 to {PICTURE_SUV:g}. Phantom, not a patient; not for clinical use."
    )
    figure.savefig(path, dpi=70)
