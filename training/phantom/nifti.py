"""Volumes as NIfTI: the only place where LPS becomes RAS."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from pipeline.types import Grid

GZIP_LEVEL = 1  # noise does not compress; the level only costs time
MILLIMETERS = 2  # NIFTI_UNITS_MM


def ras_affine(grid: Grid) -> NDArray[np.float64]:
    """4x4, maps a NIfTI index (i, j, k) = (x, y, z) of our [z, y, x] volume to RAS mm: x and y change their sign."""
    dz, dy, dx = grid.spacing_mm
    x, y, z = grid.origin_mm
    return np.array([[-dx, 0, 0, -x], [0, -dy, 0, -y], [0, 0, dz, z], [0, 0, 0, 1]], dtype=np.float64)


def write_nifti(path: Path, volume: NDArray[Any], grid: Grid) -> None:
    """Write [z, y, x] on `grid` as `.nii.gz`, in the volume's own type; the same volume gives the same bytes.

    Raises:
        ValueError: the volume does not fit the grid.
    """
    if volume.shape != grid.shape:
        raise ValueError(f"{path.name}: volume {volume.shape} does not fit grid {grid.shape}")
    image = nib.Nifti1Image(np.asarray(volume.transpose(2, 1, 0)), ras_affine(grid))
    image.header["xyzt_units"] = MILLIMETERS
    for name in ("qform_code", "sform_code"):
        image.header[name] = 1  # scanner coordinates
    path.write_bytes(gzip.compress(image.to_bytes(), GZIP_LEVEL, mtime=0))
