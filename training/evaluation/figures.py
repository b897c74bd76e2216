"""Figures of an evaluation as matplotlib Figure objects: pictures of one study, Bland-Altman, FROC, MAE by district.

PET is shown in inverted gray as in reading rooms, the SUV scale beside it; x grows to the patient's left, so the
patient's right is on the viewer's left. Every title says what the data are.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from scipy.ndimage import uniform_filter

from pipeline.bundle import Normalization
from pipeline.types import WHOLE_BODY
from training.evaluation.agreement import Agreement
from training.evaluation.detection import FrocPoint
from training.evaluation.evaluate import DISTRICTS, Picture
from training.evaluation.measure import REGIONS
from training.evaluation.tables import Table, group_title, method_title
from training.files import write_whole

SHOWN_SUV = 8.0  # upper end of the gray scale: gray matter's usual uptake is just black
CT_WINDOW_HU = (-160.0, 240.0)  # soft tissue
ZOOM_MM, ZOOMS, ZOOMED_LESIONS = 150.0, 3, 2
LARGEST_PNG = 300_000  # bytes
SHARPEST_DPI, COARSEST_DPI = 110, 30
COLUMN_TITLES = {
    "real": "true PET",
    DISTRICTS: "synthetic PET\ndistrict networks",
    WHOLE_BODY: "synthetic PET\nwhole-body network",
}
ZOOM_COLORS = ("tab:orange", "tab:blue", "tab:green")
METHOD_STYLES = {
    "pix2pix/districts": ("tab:blue", "o"),
    "pix2pix/whole_body": ("tab:cyan", "s"),
    "cyclegan/districts": ("tab:red", "o"),
    "cyclegan/whole_body": ("tab:orange", "s"),
    "hu_lookup": ("0.35", "^"),
    "district_mean": ("0.65", "v"),
}

Image = NDArray[np.float32]
_Column = tuple[str, Image, str, tuple[float, float]]  # title, slice [z, x], colors, limits


def save(figure: Figure, path: Path) -> None:
    """Write a PNG, whole or not at all, as sharp as LARGEST_PNG bytes allow."""
    dpi, buffer = SHARPEST_DPI, io.BytesIO()
    while True:
        figure.savefig(buffer, format="png", dpi=dpi)
        size = buffer.tell()
        if size <= LARGEST_PNG or dpi <= COARSEST_DPI:
            break
        dpi = max(COARSEST_DPI, int(0.95 * dpi * (LARGEST_PNG / size) ** 0.5))
        buffer = io.BytesIO()
    write_whole(path, buffer.getvalue())


def panels(picture: Picture, normalization: Normalization, note: str) -> Figure:
    """After the paper's Fig. 2: coronal CT, true PET and synthetic PETs, and zoomed regions framed in color."""
    dz, _, dx = picture.truth.study.record.spacing_mm
    row = _coronal_row(picture)
    columns = _columns(picture, normalization, row)
    boxes = _zooms(picture, row)
    height = 6.4
    width = 1.2 * height * columns[0][1].shape[1] * dx / (columns[0][1].shape[0] * dz)
    zoom = height / ZOOMS
    figure = Figure(figsize=(len(columns) * (width + zoom) + 1.4, height + 1.3), layout="constrained")
    halves = figure.subfigures(1, 2, width_ratios=[len(columns) * width, len(columns) * zoom + 0.9], squeeze=False)
    left, right = halves[0]
    for axes, (title, image, colors, limits) in zip(_axes_of(left, 1, len(columns))[0], columns, strict=True):
        _show(axes, image, colors, limits, dz / dx)
        axes.set_title(title, fontsize=9)
        for (z, x), color in zip(boxes, ZOOM_COLORS, strict=False):
            corner, size = (x.start - 0.5, z.start - 0.5), (x.stop - x.start, z.stop - z.start)
            axes.add_patch(Rectangle(corner, *size, fill=False, edgecolor=color, linewidth=1.2))
    _sides(left.axes[0])
    grid = _axes_of(right, len(boxes), len(columns))
    shown = None
    for line, (z, x), color in zip(grid, boxes, ZOOM_COLORS, strict=False):
        for axes, (_, image, colors, limits) in zip(line, columns, strict=True):
            drawn = _show(axes, image[z, x], colors, limits, dz / dx)
            shown = drawn if colors == "gray_r" else shown
            for spine in axes.spines.values():
                spine.set(visible=True, color=color, linewidth=2)
            axes.axis("on")
            axes.set(xticks=[], yticks=[])
    if shown is not None:
        bar = right.colorbar(shown, ax=[axes for line in grid for axes in line], fraction=0.03, extend="max")
        bar.set_label("SUV (g/ml)")
    who = f"{picture.model.replace('pix2pix', 'Pix2Pix').replace('cyclegan', 'CycleGAN')}, seed {picture.seed}"
    figure.suptitle(f"{who}: held-out study {picture.truth.study.id[:24]}. {note}", fontsize=10)
    return figure


def projections(picture: Picture, note: str) -> Figure:
    """Maximum intensity projections from the front and from the side, true beside synthetic."""
    dz, dy, dx = picture.truth.study.record.spacing_mm
    names = [name for name in ("real", DISTRICTS, WHOLE_BODY) if name in picture.suv]
    depth, height, width = (n * s for n, s in zip(picture.truth.body.shape, (dz, dy, dx), strict=True))
    scale = 6.4 / depth
    figure = Figure(figsize=(len(names) * (height + width) * scale + 1.6, 7.7), layout="constrained")
    ratios = [width, height] * len(names)
    grid = figure.subplots(1, 2 * len(names), width_ratios=ratios, squeeze=False)[0]
    for place, name in enumerate(names):
        front, side = grid[2 * place], grid[2 * place + 1]
        _show(front, picture.suv[name].max(axis=1), "gray_r", (0, SHOWN_SUV), dz / dx)
        drawn = _show(side, picture.suv[name].max(axis=2), "gray_r", (0, SHOWN_SUV), dz / dy)
        front.set_title(COLUMN_TITLES[name], fontsize=9)
        _sides(front)
    figure.colorbar(drawn, ax=list(grid), fraction=0.02, extend="max").set_label("SUV (g/ml)")
    figure.suptitle(f"Maximum intensity projections, {picture.model}, seed {picture.seed}. {note}", fontsize=10)
    return figure


def mae_by_district(table: Table, suv_max: float, note: str) -> Figure:
    """MAE of every method in every region of Table I, with the 95 % bootstrap interval."""
    figure = Figure(figsize=(9, 4.4), layout="constrained")
    axes = figure.subplots()
    step = 0.8 / len(table.methods)
    for place, method in enumerate(table.methods):
        color, marker = METHOD_STYLES.get(method, ("k", "."))
        xs, means, low, high = [], [], [], []
        for x, region in enumerate(REGIONS):
            summary = table.cells[region, method, "mae"]
            if summary["mean"] is not None:
                ends = (summary["low"], summary["high"]) if summary["low"] is not None else (summary["mean"],) * 2
                xs.append(x + (place - (len(table.methods) - 1) / 2) * step)
                means.append(summary["mean"])
                low.append(summary["mean"] - (ends[0] or 0.0))
                high.append((ends[1] or 0.0) - summary["mean"])
        bars = axes.errorbar(xs, means, yerr=[low, high], fmt=marker, color=color, capsize=3, markersize=5)
        bars.set_label(method_title(method))
    axes.set_xticks(range(len(REGIONS)), [group_title(r) for r in REGIONS])
    axes.set_ylim(bottom=0)
    axes.set_ylabel(f"MAE (SUV / {suv_max:g})")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=8, ncols=2)
    figure.suptitle(f"Mean absolute error, mean and 95 % interval over patients. {note}", fontsize=10)
    return figure


def bland_altman(agreements: Mapping[str, Sequence[Agreement]], note: str) -> Figure:
    """SUVmean by region: difference against mean, one dot per patient, by method; bias and limits of agreement."""
    places = list(dict.fromkeys(a.place for found in agreements.values() for a in found))
    columns = min(4 if len(places) > 6 else 3, max(1, len(places)))
    rows = -(-len(places) // columns) or 1
    figure = Figure(figsize=(4.2 * columns, 3.2 * rows + 1.0), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, place in zip(grid, places, strict=False):
        axes.axhline(0, color="0.6", linewidth=0.8)
        for method, found in agreements.items():
            color, marker = METHOD_STYLES.get(method, ("k", "."))
            for agreement in (a for a in found if a.place == place):
                dots = axes.plot(agreement.means, agreement.differences, marker, color=color, markersize=4)
                dots[0].set_label(method_title(method))
                axes.axhline(agreement.bias, color=color, linewidth=1.2)
                for limit in agreement.limits or ():
                    axes.axhline(limit, color=color, linewidth=1, linestyle="--")
        axes.set_title(group_title(place).replace("_", " "), fontsize=9)
        axes.set_xlabel("mean of both SUVmean (g/ml)", fontsize=8)
        axes.set_ylabel("synthetic - true (g/ml)", fontsize=8)
        axes.tick_params(labelsize=8)
    for axes in grid[len(places) :]:
        axes.set_visible(False)
    if places:
        figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    figure.suptitle(f"Bland-Altman: bias (line), limits of agreement (dashed).\n{note}", fontsize=10)
    return figure


def froc_curves(curves: Mapping[str, Sequence[FrocPoint]], note: str) -> Figure:
    """Lesion-wise sensitivity against invented hot spots per study, one point per threshold."""
    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axes = figure.subplots()
    for method, points in curves.items():
        if not points:
            continue
        color, marker = METHOD_STYLES.get(method, ("k", "."))
        xs, ys = [p.false_positives for p in points], [p.sensitivity for p in points]
        axes.plot(xs, ys, color=color, marker=marker, markersize=4, label=method_title(method))
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xlim(left=0)
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel("invented hot spots per study")
    axes.set_ylabel("share of lesions shown")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)
    figure.suptitle(f"Lesions, FROC over SUV thresholds. {note}", fontsize=10)
    return figure


def _columns(
    picture: Picture, normalization: Normalization, row: int
) -> list[tuple[str, Image, str, tuple[float, float]]]:
    ct, limits = picture.truth.ct, (0.0, 1.0)
    if normalization.ct_range == "fixed":
        span = normalization.ct_high_hu - normalization.ct_low_hu
        low, high = ((hu - normalization.ct_low_hu) / span for hu in CT_WINDOW_HU)
        limits = (low, high)
    columns = [("CT", ct[:, row], "gray", limits)]
    for name, title in COLUMN_TITLES.items():
        if name in picture.suv:
            columns.append((title, picture.suv[name][:, row], "gray_r", (0.0, SHOWN_SUV)))
    return columns


def _coronal_row(picture: Picture) -> int:
    """The coronal slice with most lesion voxels, else the body's middle one."""
    lesions = np.count_nonzero(picture.truth.lesions, axis=(0, 2))
    if lesions.any():
        return int(lesions.argmax())
    filled = np.flatnonzero(picture.truth.body.any(axis=(0, 2)))
    return int(filled[len(filled) // 2])


def _zooms(picture: Picture, row: int) -> list[tuple[slice, slice]]:
    """Boxes (z, x) in a coronal slice, head first: its two largest lesions, then the hottest normal uptake."""
    dz, _, dx = picture.truth.study.record.spacing_mm
    shape = picture.truth.body.shape[0], picture.truth.body.shape[2]
    size = [min(n, max(2, round(ZOOM_MM / s))) for n, s in zip(shape, (dz, dx), strict=True)]
    lesions = picture.truth.lesions[:, row]
    sizes = np.bincount(lesions.ravel())
    sizes[0] = 0
    ranked = [np.where(lesions == label, 1.0, 0.0) for label in np.argsort(-sizes)[:ZOOMED_LESIONS] if sizes[label]]
    heat = np.where(lesions == 0, picture.suv["real"][:, row], np.float32(0))
    free = np.ones(shape, dtype=bool)
    boxes: list[tuple[slice, slice]] = []
    for wanted in (*ranked, *[heat] * ZOOMS):
        left = uniform_filter(wanted, size=3) * free
        if len(boxes) == ZOOMS or left.max() <= 0:
            continue
        center = np.unravel_index(int(left.argmax()), shape)
        starts = [min(max(int(c) - n // 2, 0), limit - n) for c, n, limit in zip(center, size, shape, strict=True)]
        z, x = (slice(a, a + n) for a, n in zip(starts, size, strict=True))
        boxes.append((z, x))
        # a box beside this one must not overlap it
        free[tuple(slice(max(s.start - n // 2, 0), s.stop + n // 2) for s, n in zip((z, x), size, strict=True))] = False
    return sorted(boxes, key=lambda box: -box[0].start)


def _axes_of(figure: Figure | SubFigure, rows: int, columns: int) -> NDArray[np.object_]:
    grid: NDArray[np.object_] = figure.subplots(rows, columns, squeeze=False)
    return grid


def _show(
    axes: Axes, image: Image, colors: str, limits: tuple[float, float], aspect: float
) -> matplotlib.image.AxesImage:
    """One image with the head up."""
    axes.axis("off")
    return axes.imshow(
        image,
        cmap=matplotlib.colormaps[colors],
        vmin=limits[0],
        vmax=limits[1],
        aspect=aspect,
        origin="lower",
        interpolation="bilinear",
    )


def _sides(axes: Axes) -> None:
    for x, text, side in ((0.02, "R", "left"), (0.98, "L", "right")):
        axes.text(x, 0.985, text, transform=axes.transAxes, ha=side, va="top", fontsize=9, color="tab:gray")
