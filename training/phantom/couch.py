"""What lies around the patient: the scanner's table and a blanket."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import minimum_filter, uniform_filter

from pipeline.types import Grid, LabelVolume
from training.phantom.tissues import LABEL

TABLE_HALF_WIDTH_MM = 215.0


def _y_mm(grid: Grid) -> np.ndarray:
    return (grid.origin_mm[1] + np.arange(grid.shape[1]) * grid.spacing_mm[1]).astype(np.float32)


def _x_mm(grid: Grid) -> np.ndarray:
    return (grid.origin_mm[0] + np.arange(grid.shape[2]) * grid.spacing_mm[2]).astype(np.float32)


def add_table(labels: LabelVolume, districts: LabelVolume, grid: Grid, rng: np.random.Generator) -> None:
    """Paint a curved carbon shell filled with foam under the patient, over air only."""
    thickness, curve = float(rng.uniform(18, 45)), float(rng.uniform(0, 22))
    rows = np.flatnonzero((districts > 0).any(axis=(0, 2)))
    if rows.size == 0:
        return
    y, x = _y_mm(grid), _x_mm(grid)
    top = y[rows[-1]] + grid.spacing_mm[1] - curve * (x / TABLE_HALF_WIDTH_MM) ** 2
    depth = y[:, None] - top[None, :]
    on_table = (np.abs(x) < TABLE_HALF_WIDTH_MM)[None, :]
    wall = max(3.0, 0.8 * grid.spacing_mm[1])
    solid = on_table & (depth >= 0) & (depth < thickness)
    shell = solid & ((depth < wall) | (depth > thickness - wall))
    for mask, structure in ((solid, "table_foam"), (shell, "table")):
        rows_in_use = np.flatnonzero(mask.any(axis=1))
        if rows_in_use.size == 0:
            continue
        cut = slice(rows_in_use[0], rows_in_use[-1] + 1)
        part = labels[:, cut]
        part[mask[None, cut] & (districts[:, cut] == 0)] = LABEL[structure]


def add_blanket(labels: LabelVolume, districts: LabelVolume, grid: Grid, rng: np.random.Generator) -> None:
    """Lay a thin, soft sheet over part of the patient, over air only."""
    dz, dy, dx = grid.spacing_mm
    body = districts > 0
    front = np.where(body.any(axis=1), body.argmax(axis=1), grid.shape[1]).astype(np.float32)
    covered = front < grid.shape[1]
    reach = (max(round(50 / dz), 1), max(round(50 / dx), 1))
    sheet = uniform_filter(minimum_filter(front, reach), reach)
    length = grid.shape[0]
    first = int(length * rng.uniform(0.0, 0.3))
    last = int(length * rng.uniform(0.5, 0.9))
    thick = max(float(rng.uniform(5, 12)) / dy, 1.0)
    gap = float(rng.uniform(0, 6)) / dy
    covered[:first] = covered[last:] = False
    zz, xx = np.nonzero(covered & (sheet < grid.shape[1]))
    for step in range(int(np.ceil(thick))):
        rows = np.rint(np.minimum(sheet[zz, xx], front[zz, xx]) - gap - 1 - step).astype(int)
        ok = rows >= 0
        free = labels[zz[ok], rows[ok], xx[ok]] == 0
        labels[zz[ok][free], rows[ok][free], xx[ok][free]] = LABEL["blanket"]
