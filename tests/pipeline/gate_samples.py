"""A body in the scanner that the gates' tests change: fat around muscle, lungs, a spine, on a thin bed."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset

from pipeline.types import CtVolume, Grid, SourceSeries

SPACING = (5.0, 4.0, 4.0)
SHAPE = (40, 120, 120)
SERIES = "1.2.3.4"


def a_grid(spacing: tuple[float, float, float] = SPACING, shape: tuple[int, int, int] = SHAPE) -> Grid:
    return Grid(shape=shape, spacing_mm=spacing, origin_mm=(0.0, 0.0, 0.0), frame_of_reference_uid="1.2.3")


def ellipse(half_y: float, half_x: float, center: tuple[float, float] = (0.0, 0.0)) -> NDArray[np.bool_]:
    """Mask over the field of view, sizes in mm from its middle."""
    y, x = np.meshgrid((np.arange(120) - 59.5) * 4, (np.arange(120) - 59.5) * 4, indexing="ij")
    plane = ((y - center[0]) / half_y) ** 2 + ((x - center[1]) / half_x) ** 2 <= 1
    return np.broadcast_to(plane, SHAPE)


def an_empty_bed() -> NDArray[Any]:
    hu = np.full(SHAPE, -1000.0)
    hu[:, 100:102, 20:100] = -100  # the bed's shell
    return hu


def a_body(half_y: float = 100, half_x: float = 160, *, lungs: bool = True) -> NDArray[np.float32]:
    """HU [z, y, x] in whole numbers, with a scanner's noise: air, a body with a fat shell, lungs and a spine."""
    hu = an_empty_bed()
    hu[ellipse(half_y, half_x)] = -100
    hu[ellipse(0.8 * half_y, 0.8 * half_x)] = 50
    if lungs:
        for side in (-0.4, 0.4):
            hu[ellipse(0.6 * half_y, 0.3 * half_x, (-10, side * half_x))] = -850
    hu[ellipse(0.15 * half_y, 0.1 * half_x, (0.65 * half_y, 0))] = 800
    return as_stored(hu)


def as_stored(hu: NDArray[Any]) -> NDArray[np.float32]:
    """With noise, in whole numbers, as a scanner with 12 bits and an intercept of -1024 stores it."""
    noisy = hu + np.random.default_rng(0).normal(0, 25, hu.shape)
    return np.clip(np.rint(noisy), -1024, 3071).astype(np.float32)


def a_header(**elements: Any) -> Dataset:
    header = Dataset()
    for keyword, value in {"PatientAge": "060Y", "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"], **elements}.items():
        if value is not None:
            setattr(header, keyword, value)
    return header


def a_ct(hu: NDArray[Any], spacing: tuple[float, float, float] = SPACING, **elements: Any) -> CtVolume:
    source = SourceSeries(
        study_uid="1.2",
        series_uid=SERIES,
        header=a_header(**elements),
        instances=(),
        earliest_acquisition=("", ""),
    )
    return CtVolume(hu=hu.astype(np.float32), grid=a_grid(spacing, hu.shape), source=source)
