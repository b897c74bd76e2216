"""Turning volumes into axis-aligned LPS [z, y, x] without resampling."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.types import Grid
from training.errors import StudyError

SNAP_VOXELS = 0.5  # an axis that ends less than half a voxel beside an LPS axis is taken as parallel to it
DECIMALS = 4  # of positions and spacings in mm: NIfTI keeps them in single precision


def lps_axes(steps: NDArray[np.float64], shape: tuple[int, ...], what: str) -> tuple[int, int, int]:
    """Which array axis runs along x, y and z.

    Args:
        steps: 3x3, column a is the LPS step (mm) from one voxel to the next along array axis a.
        shape: the array's.
        what: the thing in messages.

    Raises:
        StudyError: geometry_invalid for steps that span no volume, geometry_oblique for those beside the axes.
    """
    lengths = np.linalg.norm(steps, axis=0)
    if not np.isfinite(steps).all() or lengths.min() <= 1e-3 or abs(np.linalg.det(steps / lengths)) < 1e-3:
        raise StudyError("geometry_invalid", f"{what}: its axes span no volume (voxels of {lengths.round(4)} mm)")
    along = np.argmax(np.abs(steps), axis=0)
    beside = np.abs(steps).copy()
    beside[along, range(3)] = 0
    drift = beside.max(axis=0) * (np.array(shape) - 1)
    if len(set(along.tolist())) < 3 or drift.max() > SNAP_VOXELS * lengths.min():
        worst = float(np.degrees(np.arccos(np.clip((np.abs(steps).max(axis=0) / lengths).min(), 0, 1))))
        text = f"{what}: its axes lie {worst:.2f} degrees beside the patient's, an axis-aligned volume is expected"
        raise StudyError("geometry_oblique", text)
    order = along.tolist()
    return order.index(0), order.index(1), order.index(2)


def to_lps(
    volume: NDArray[Any], steps: NDArray[np.float64], origin: NDArray[np.float64], frame_uid: str, what: str
) -> tuple[NDArray[Any], Grid]:
    """`volume` with its axes turned to [z, y, x] and flipped to grow along LPS, and the grid that it lies on.

    `steps` is as for `lps_axes`, `origin` the LPS position (mm) of voxel [0, 0, 0]. Raises StudyError as it does.
    """
    x, y, z = lps_axes(steps, volume.shape, what)
    order = (z, y, x)
    turned = volume.transpose(order)
    step = [float(steps[2 - place, axis]) for place, axis in enumerate(order)]  # along z, y, x
    first = [float(origin[2 - place]) for place in range(3)]
    for place in range(3):
        if step[place] < 0:
            turned = np.flip(turned, place)
            first[place] += step[place] * (turned.shape[place] - 1)
    spacing = [round(float(np.linalg.norm(steps[:, axis])), DECIMALS) for axis in order]
    grid = Grid(
        shape=(turned.shape[0], turned.shape[1], turned.shape[2]),
        spacing_mm=(spacing[0], spacing[1], spacing[2]),
        origin_mm=(round(first[2], DECIMALS), round(first[1], DECIMALS), round(first[0], DECIMALS)),
        frame_of_reference_uid=frame_uid,
    )
    return np.ascontiguousarray(turned), grid
