"""PREPARED/review.html: a picture of every prepared study, for a person to check registration and districts.

The pictures lie beside the page in review/, one per study; the page loads them as it is scrolled.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from numpy.typing import NDArray

from pipeline.outputs.drawing import Box, Page, frame, mark_sides, new_page, scale_bar, scale_for, show
from pipeline.outputs.drawing import box_of as box_around
from pipeline.outputs.picture import DISTRICT_COLORS, INK, INVERSE_GRAY, NIGHT
from pipeline.types import District, Grid
from training.preparation.outputs import write_bytes
from training.preparation.split import SIDES
from training.prepared import PreparedManifest, RefusedStudy, StudyRecord

PAGE = "review.html"
PICTURES = "review"
PANELS_PX = (1400.0, 600.0)  # at most, all panels together
MAX_PX_PER_MM = 1.2
GAP_PX, TITLE_PX = 12, 24
MARGIN_MM = 10.0
PET_SHOWN = 0.35  # of the scaled PET: SUV 7 where suv_max is 20
FUSED_FROM, FUSED_FULL, FUSED_OPACITY = 0.025, 0.2, 0.7  # scaled PET: below the first only CT is seen
LESION_COLOR = "#ff5a4d"


def write_picture(folder: Path, record: StudyRecord, path: Path) -> None:
    """Draw one study from its arrays in `folder` as a PNG at `path`.

    Raises:
        WriteFailed: it cannot be written.
    """
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in record.files}
    write_bytes(path, study_picture(arrays, record.grid))


def study_picture(arrays: Mapping[str, NDArray[Any]], grid: Grid) -> bytes:
    """PNG: CT with district borders, CT with PET over it (coronal, sagittal), PET as maximum intensity projection.

    All panels are at one scale; the planes go through the middle of the body.

    Args:
        arrays: "ct", "pet", "districts", "lesions" as in `training.prepared`, [z, y, x] on `grid`.
    """
    ct, pet = (np.asarray(arrays[name], np.float32) for name in ("ct", "pet"))
    districts, lesions = np.asarray(arrays["districts"]), np.asarray(arrays["lesions"])
    body = districts > 0
    low, high = (float(v) for v in np.percentile(ct[body], (10, 98.5)))
    limits = (low, max(high, low + 1e-3))
    y, x = (int(np.flatnonzero(body.any(axis=axes)).mean()) for axes in ((0, 2), (0, 1)))
    box = box_around(body, grid, margin_mm=MARGIN_MM)
    page, (first, fused, side, mip) = _panels(box)

    show(first, ct[:, y], grid, "coronal", box, colors="gray", limits=limits)
    _outline_districts(first, districts[:, y], grid)
    for axes, ct_plane, pet_plane, plane in (
        (fused, ct[:, y], pet[:, y], "coronal"),
        (side, ct[:, :, x], pet[:, :, x], "sagittal"),
    ):
        show(axes, ct_plane, grid, plane, box, colors="gray", limits=limits)
        show(axes, _glow(pet_plane), grid, plane, box)
    show(mip, pet.max(axis=1), grid, "coronal", box, colors=INVERSE_GRAY, limits=(0.0, PET_SHOWN))
    if lesions.any():
        _outline(mip, lesions.max(axis=1) > 0, grid, LESION_COLOR)
    return page.png()


def _panels(box: Box) -> tuple[Page, list[Axes]]:
    """A page with four frames beside each other, coronal, coronal, sagittal, coronal, with their titles."""
    tall, deep, wide = (high - low for low, high in box)
    mm = (wide, wide, deep, wide)
    scale = scale_for(sum(mm), tall, width_px=PANELS_PX[0], height_px=PANELS_PX[1], at_most=MAX_PX_PER_MM)
    widths, height = [max(1, round(w * scale)) for w in mm], max(1, round(tall * scale))
    page = new_page(sum(widths) + GAP_PX * (len(mm) + 1), height + TITLE_PX + 2 * GAP_PX, scale, background=NIGHT)
    titles = ("CT, districts", "CT and PET", "CT and PET", "PET, MIP (lesions red)")
    axes = []
    for i, (width, title) in enumerate(zip(widths, titles, strict=True)):
        left = GAP_PX + sum(widths[:i]) + i * GAP_PX
        axes.append(page.add(left, GAP_PX, width, height))
        axes[i].set_facecolor("white" if i == len(widths) - 1 else "black")
        frame(axes[i], INK)
        mark_sides(axes[i], "sagittal" if i == 2 else "coronal", color=NIGHT if i == 3 else INK)
        page.text(left, height + 2 * GAP_PX, title, color=INK, fontsize=9, va="bottom")
    scale_bar(axes[0], page, color=INK)
    return page, axes


def _glow(pet: NDArray[np.float32]) -> NDArray[np.float32]:
    """RGBA of a PET plane: the hotter, the brighter and the less transparent."""
    share = np.clip((pet - FUSED_FROM) / (FUSED_FULL - FUSED_FROM), 0.0, 1.0)
    rgba: NDArray[np.float32] = colormaps["hot"](np.clip(pet / FUSED_FULL, 0.0, 1.0)).astype(np.float32)
    rgba[..., 3] = FUSED_OPACITY * np.sqrt(share)
    return rgba


def _outline_districts(axes: Axes, labels: NDArray[np.uint8], grid: Grid) -> None:
    for district in District:
        _outline(axes, labels == district, grid, DISTRICT_COLORS[district])


def _outline(axes: Axes, mask: NDArray[np.bool_], grid: Grid, color: str) -> None:
    """The border of a coronal mask [z, x]."""
    if not mask.any() or min(mask.shape) < 2:
        return
    dz, _, dx = grid.spacing_mm
    ox, _, oz = grid.origin_mm
    x, z = ox + np.arange(mask.shape[1]) * dx, oz + np.arange(mask.shape[0]) * dz
    axes.contour(x, z, mask.astype(np.float32), levels=[0.5], colors=[color], linewidths=1.2)


STYLE = """
body{font:14px/1.5 system-ui,sans-serif;margin:2rem;background:#101216;color:#e8e8e8;max-width:96rem}
h1{font-size:1.4rem} h2{font-size:1rem;margin:0} a{color:#8ab8ff}
.banner{border:2px solid #e6b422;color:#e6b422;padding:.4rem .8rem;display:inline-block;font-weight:bold}
table{border-collapse:collapse;margin:1rem 0} td,th{padding:.2rem .9rem .2rem 0;text-align:left;vertical-align:top}
th{font-weight:600;border-bottom:1px solid #555}
section{border-top:1px solid #444;padding:1rem 0} img{max-width:100%;display:block;margin:.4rem 0}
.refused{color:#ff9d94} .meta{color:#b8bcc4} .key b{margin-right:1rem}
"""


def review_page(manifest: PreparedManifest) -> str:
    """The whole page as HTML: refused studies on top, then every study with its picture. Everything is escaped."""
    studies = sorted(manifest.studies, key=lambda study: study.id)
    phantom = '<p class="banner">synthetic phantom: computed, not a patient</p>' if manifest.phantom else ""
    key = "".join(f'<b style="color:{DISTRICT_COLORS[d]}">{d.key}</b>' for d in District)
    spacing = " x ".join(f"{s:.4g}" for s in manifest.spacing_mm)
    return "\n".join(
        [
            '<!doctype html><html lang="en"><meta charset="utf-8"><title>Prepared studies</title>',
            f"<style>{STYLE}</style>",
            f"<h1>{len(studies)} prepared studies, {len(manifest.refused)} refused</h1>",
            phantom,
            f'<p class="meta">recipe {escape(manifest.recipe)}, layout {escape(manifest.layout)}, '
            f"voxels {spacing} mm (z, y, x). Research only, not for clinical use.</p>",
            "<p>Look for: district borders at the neck, shoulders and groin; PET that lies on the CT (heart, liver, "
            "kidneys, bladder, skin line); arms that are neither cut off nor part of the trunk.</p>",
            f'<p class="key">Districts: {key}</p>',
            _refused_table(manifest.refused),
            _split_table(studies),
            *(_study(study) for study in studies),
            "</html>\n",
        ]
    )


def _refused_table(refused: Iterable[RefusedStudy]) -> str:
    rows = [f"<tr><td>{escape(r.study)}</td><td>{escape(r.code)}</td><td>{escape(r.text)}</td></tr>" for r in refused]
    if not rows:
        return "<p>No study was refused.</p>"
    head = "<tr><th>refused study</th><th>code</th><th>reason</th></tr>"
    return f'<table class="refused">{head}{"".join(rows)}</table>'


def _split_table(studies: Iterable[StudyRecord]) -> str:
    counts = Counter((study.diagnosis, study.split) for study in studies)
    rows = "".join(
        f"<tr><td>{escape(diagnosis)}</td>{''.join(f'<td>{counts[diagnosis, side]}</td>' for side in SIDES)}</tr>"
        for diagnosis in sorted({diagnosis for diagnosis, _ in counts})
    )
    return f"<table><tr><th>studies</th>{''.join(f'<th>{side}</th>' for side in SIDES)}</tr>{rows}</table>"


def _study(study: StudyRecord) -> str:
    lines = [f"{escape(study.diagnosis)}, {escape(study.split)}; districts: {escape(study.segmenter)}"]
    lines.append(f"registration: {escape(_registration(study.registration))}")
    lines += [f"note: {escape(note)}" for note in study.notes]
    source = f"{PICTURES}/{quote(study.id)}.png"
    return (
        f'<section id="{escape(study.id)}"><h2>{escape(study.id)}</h2><div class="meta">{"<br>".join(lines)}</div>'
        f'<img loading="lazy" src="{source}" alt="CT, districts and PET of study {escape(study.id)}"></section>'
    )


def _registration(log: Mapping[str, Any]) -> str:
    if not log:
        return "not asked for"
    if "shift_mm" not in log:
        return f"not accepted: {log.get('reason', '')}"
    angles = ", ".join(f"{a:.1f}" for a in log["rotation_deg"])
    found = f"shift {log['shift_mm']:.1f} mm, rotation {angles} degrees (x, y, z)"
    metric = f"mutual information {log['metric_before']:.4f} to {log['metric_after']:.4f}"
    return f"moved by {found}, {metric}" if log["accepted"] else f"left as scanned: {log['reason']} ({found})"
