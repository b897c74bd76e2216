"""MAE, PSNR and SSIM inside a region, in units of [0, 1] (SUV / suv_max), so that the data range is 1."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import correlate1d

SIGMA, WINDOW, K1, K2 = 1.5, 11, 0.01, 0.03  # Wang 2004, and the usual implementation in 3D

Volume = NDArray[np.floating]
Region = NDArray[np.bool_]


def mae(fake: Volume, real: Volume, region: Region) -> float:
    """Mean absolute error inside the region; NaN for an empty one."""
    if not region.any():
        return math.nan
    return float(np.abs(fake[region].astype(np.float64) - real[region]).mean())


def psnr(fake: Volume, real: Volume, region: Region) -> float:
    """10 log10(1 / mean squared error) inside the region, in dB; NaN for an empty one, inf for equal volumes."""
    if not region.any():
        return math.nan
    mse = float(np.square(fake[region].astype(np.float64) - real[region]).mean())
    return math.inf if mse == 0 else -10.0 * math.log10(mse)


def ssim_map(fake: Volume, real: Volume) -> NDArray[np.float64]:
    """The SSIM of every voxel (data range 1), [z, y, x]; separable Gaussian, edges mirrored as in scikit-image."""
    x, y = fake.astype(np.float64), real.astype(np.float64)
    ux, uy = _smooth(x), _smooth(y)
    vx, vy, vxy = _smooth(x * x) - ux * ux, _smooth(y * y) - uy * uy, _smooth(x * y) - ux * uy
    c1, c2 = K1**2, K2**2
    similarity: NDArray[np.float64] = ((2 * ux * uy + c1) * (2 * vxy + c2)) / ((ux**2 + uy**2 + c1) * (vx + vy + c2))
    return similarity


def mean_in(values: NDArray[np.float64], region: Region) -> float:
    """Mean of a map inside the region; NaN for an empty one."""
    return float(values[region].mean()) if region.any() else math.nan


def _smooth(volume: NDArray[np.float64]) -> NDArray[np.float64]:
    offset = np.arange(WINDOW) - WINDOW // 2
    kernel = np.exp(-0.5 * (offset / SIGMA) ** 2)
    kernel /= kernel.sum()
    for axis in range(volume.ndim):
        volume = correlate1d(volume, kernel, axis=axis, mode="reflect")
    return volume
