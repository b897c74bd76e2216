"""Districts over the CT in three planes, as a radiologist would check them."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from pipeline.outputs.picture import DISTRICT_COLORS
from pipeline.types import OUTSIDE, District, FloatVolume, Grid, LabelVolume

WINDOW_HU = (-160.0, 240.0)
LEVELS = (0.85, 0.5, 0.2)  # of the body's height: where the three axial slices lie
OPACITY = 0.45


def district_figure(
    hu: FloatVolume, found: LabelVolume, grid: Grid, *, title: str, true: LabelVolume | None = None
) -> Figure:
    """Coronal, sagittal and three axial slices: found districts filled, true ones as a white contour.

    Args:
        hu: [z, y, x].
        found: labels of the same shape.
        grid: of both.
        title: above the figure.
        true: labels of the same shape, where they are known.
    """
    z, y, x = _middle(found if (found > OUTSIDE).any() else np.asarray(hu > -300, np.uint8))
    figure = Figure(figsize=(13, 5.2), layout="constrained")
    figure.suptitle(title, fontsize=10)
    axes = figure.subplots(1, 2 + len(LEVELS), width_ratios=[1.2, 1.0, 1.0, 1.0, 1.0])
    dz, dy, dx = grid.spacing_mm
    _show(axes[0], "coronal", hu[::-1, y], found[::-1, y], None if true is None else true[::-1, y], dz / dx)
    _show(axes[1], "sagittal", hu[::-1, :, x], found[::-1, :, x], None if true is None else true[::-1, :, x], dz / dy)
    for axis, level in zip(axes[2:], sorted(int(q) for q in z), strict=True):
        _show(axis, f"axial {level}", hu[level], found[level], None if true is None else true[level], dy / dx)
    handles = [Patch(color=color, label=district.key) for district, color in DISTRICT_COLORS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    return figure


def _middle(labels: LabelVolume) -> tuple[list[int], int, int]:
    """Axial levels, and the coronal and sagittal plane through the middle of the body."""
    where = np.nonzero(labels)
    levels = [int(np.quantile(where[0], share)) for share in LEVELS]
    return levels, int(np.median(where[1])), int(np.median(where[2]))


def _show(
    axis: Axes,
    name: str,
    hu: NDArray[np.float32],
    found: NDArray[np.uint8],
    true: NDArray[np.uint8] | None,
    aspect: float,
) -> None:
    axis.imshow(hu, cmap="gray", vmin=WINDOW_HU[0], vmax=WINDOW_HU[1], aspect=aspect, interpolation="nearest")
    colors = ListedColormap([DISTRICT_COLORS[d] for d in District])
    shown = np.ma.masked_equal(found, OUTSIDE)
    axis.imshow(shown, cmap=colors, vmin=1, vmax=len(District), alpha=OPACITY, aspect=aspect, interpolation="nearest")
    if true is not None:
        for district in District:
            if (true == district).any():
                axis.contour(true == district, levels=[0.5], colors="white", linewidths=0.7)
    axis.set_title(name, fontsize=8)
    axis.set_axis_off()
