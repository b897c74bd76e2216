"""Figures at true scale: panels whose size in pixels is their size in millimeters times one factor.

matplotlib through its object interface and the Agg canvas only: no global state, no display, usable from any thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray

from pipeline.types import Grid

DPI = 100
Box = tuple[tuple[float, float], tuple[float, float], tuple[float, float]]  # z, y, x: (low, high) edges in mm, LPS


@dataclass(frozen=True)
class Page:
    """Where things go on a figure, in pixels from its lower left corner; `px_per_mm` holds in every panel."""

    figure: Figure
    width_px: int
    height_px: int
    px_per_mm: float

    def add(self, left: float, bottom: float, width: float, height: float) -> Axes:
        """An empty frame without ticks at a place in pixels."""
        axes = self.figure.add_axes(
            (left / self.width_px, bottom / self.height_px, width / self.width_px, height / self.height_px)
        )
        axes.set_xticks([])
        axes.set_yticks([])
        return axes

    def text(self, x: float, y: float, words: str, **style: Any) -> None:
        """Text at a place in pixels."""
        self.figure.text(x / self.width_px, y / self.height_px, words, parse_math=False, **style)

    def png(self) -> bytes:
        buffer = BytesIO()
        FigureCanvasAgg(self.figure).print_png(buffer)
        return buffer.getvalue()

    def gray(self) -> NDArray[np.uint8]:
        """The page as 8-bit gray values [row, column]."""
        canvas = FigureCanvasAgg(self.figure)
        canvas.draw()
        rgb = np.asarray(canvas.buffer_rgba())[..., :3]
        gray: NDArray[np.uint8] = rgb.mean(axis=2).round().astype(np.uint8)
        return gray


def new_page(width_px: int, height_px: int, px_per_mm: float, *, background: str) -> Page:
    figure = Figure(figsize=(width_px / DPI, height_px / DPI), dpi=DPI, facecolor=background)
    return Page(figure, width_px, height_px, px_per_mm)


def scale_for(width_mm: float, height_mm: float, *, width_px: float, height_px: float, at_most: float) -> float:
    """The pixels per mm with which panels of that total size fit."""
    return min(width_px / width_mm, height_px / height_mm, at_most)


def box_of(mask: NDArray[np.bool_], grid: Grid, *, margin_mm: float) -> Box:
    """Edges (mm, LPS) of what is true in `mask` [z, y, x], with a margin, inside the grid; the grid if nothing is."""
    edges = []
    for axis in range(3):
        others = tuple(a for a in range(3) if a != axis)
        found = np.flatnonzero(mask.any(axis=others))
        step, size, origin = grid.spacing_mm[axis], grid.shape[axis], grid.origin_mm[2 - axis]
        first, last = (found[0], found[-1]) if found.size else (0, size - 1)
        low = max(origin + (first - 0.5) * step - margin_mm, origin - 0.5 * step)
        high = min(origin + (last + 0.5) * step + margin_mm, origin + (size - 0.5) * step)
        edges.append((float(low), float(high)))
    z, y, x = edges
    return z, y, x


def show(
    axes: Axes,
    image: NDArray[np.generic],
    grid: Grid,
    plane: str,
    box: Box,
    *,
    colors: str | None = None,
    limits: tuple[float, float] | None = None,
    smooth: bool = True,
) -> None:
    """Draw a slice or projection ([z, x] coronal, [z, y] sagittal, [y, x] axial; optional last axis RGBA) in `axes`.

    Radiological: the patient's left at the right of the image, head up, front at the left of a sagittal and at the
    top of an axial image.
    """
    vertical, horizontal = {"coronal": (0, 2), "sagittal": (0, 1), "axial": (1, 2)}[plane]
    left, right = _edges(grid, horizontal)
    low, high = _edges(grid, vertical)
    axes.imshow(
        image,
        origin="lower",
        extent=(left, right, low, high),
        aspect="auto",  # the frame already has the right shape
        cmap=colors,
        vmin=limits[0] if limits else None,
        vmax=limits[1] if limits else None,
        interpolation="bilinear" if smooth else "nearest",
    )
    axes.set_xlim(*box[horizontal])
    axes.set_ylim(*(box[vertical][::-1] if plane == "axial" else box[vertical]))


def mark_sides(axes: Axes, plane: str, *, color: str, size: float = 9.0) -> None:
    """The letters of the patient's sides at the edges of the image."""
    left, right = {"coronal": ("R", "L"), "sagittal": ("A", "P"), "axial": ("R", "L")}[plane]
    for x, letter, align in ((0.015, left, "left"), (0.985, right, "right")):
        axes.text(
            x, 0.985, letter, transform=axes.transAxes, color=color, fontsize=size, ha=align, va="top", weight="bold"
        )


def scale_bar(axes: Axes, page: Page, *, color: str, length_mm: float = 100.0) -> None:
    """A bar of 10 cm at the lower left of a panel, if it fits."""
    box = axes.get_position()
    width_px, height_px = box.width * page.width_px, box.height * page.height_px
    bar = length_mm * page.px_per_mm / width_px
    if bar > 0.8:
        return
    left, bottom = 8 / width_px, 8 / height_px
    axes.plot([left, left + bar], [bottom, bottom], transform=axes.transAxes, color=color, lw=2, solid_capstyle="butt")
    axes.text(
        left + bar / 2,
        bottom + 4 / height_px,
        f"{length_mm / 10:g} cm",
        transform=axes.transAxes,
        color=color,
        fontsize=7,
        ha="center",
        va="bottom",
    )


def color_bar(axes: Axes, colors: str, limits: tuple[float, float], *, ink: str, label: str) -> None:
    """A vertical scale in `axes`."""
    bar = axes.figure.colorbar(ScalarMappable(Normalize(*limits), colors), cax=axes)
    bar.set_label(label, color=ink, fontsize=8)
    bar.outline.set_edgecolor(ink)
    axes.tick_params(colors=ink, labelsize=8)


def frame(axes: Axes, color: str, labels: Sequence[str] = ()) -> None:
    """A thin border; a title above it if given."""
    for spine in axes.spines.values():
        spine.set_color(color)
        spine.set_linewidth(0.6)
    if labels:
        axes.set_title("\n".join(labels), color=color, fontsize=9, pad=5, parse_math=False)


def _edges(grid: Grid, axis: int) -> tuple[float, float]:
    origin, step = grid.origin_mm[2 - axis], grid.spacing_mm[axis]
    return origin - 0.5 * step, origin + (grid.shape[axis] - 0.5) * step
