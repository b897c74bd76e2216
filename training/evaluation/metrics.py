"""MAE, PSNR and SSIM inside a region, in units of [0, 1] (SUV / suv_max), so that the data range is 1."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import correlate1d

from pipeline.geometry import bounding_box
from pipeline.types import FloatVolume

# Wang et al., Image quality assessment (IEEE TIP 2004), and the usual implementation in 3D
SIGMA, WINDOW, K1, K2 = 1.5, 11, 0.01, 0.03
REACH = WINDOW // 2
RESAMPLES = 2000
BOOTSTRAP_SEED = 20250315

Volume = NDArray[np.floating]
Region = NDArray[np.bool_]
Summary = dict[str, float | int | None]


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


def ssim_map(fake: Volume, real: Volume) -> FloatVolume:
    """The SSIM of every voxel (data range 1), [z, y, x], float32; separable Gaussian, edges mirrored.

    The sum and the difference of the two volumes are smoothed and not the volumes: with s = x + y and d = x - y the
    means and variances of s and d give everything that the formula asks for, in four filters instead of five.
    The filters add up in double precision; the maps are float32, which costs less than 1e-5 of SSIM.
    """
    x, y = np.asarray(fake, dtype=np.float32), np.asarray(real, dtype=np.float32)
    total, difference = x + y, x - y
    mean_s, var_s = _moments(total)
    mean_d, var_d = _moments(difference)
    c1, c2 = np.float32(2 * K1**2), np.float32(2 * K2**2)
    # 4 ux uy = ms^2 - md^2, 2 (ux^2 + uy^2) = ms^2 + md^2, and the same for the variances
    np.square(mean_s, out=mean_s)
    np.square(mean_d, out=mean_d)
    above: FloatVolume = (mean_s - mean_d + c1) * (var_s - var_d + c2)
    mean_s += mean_d
    mean_s += c1
    var_s += var_d
    var_s += c2
    mean_s *= var_s
    above /= mean_s
    return above


def mean_in(values: Volume, region: Region) -> float:
    """Mean of a map inside the region; NaN for an empty one."""
    return float(values[region].mean(dtype=np.float64)) if region.any() else math.nan


def ssim(fake: Volume, real: Volume, region: Region) -> float:
    """Mean SSIM inside the region, computed over its bounding box and the window's reach only; NaN if empty."""
    box = bounding_box(region, REACH)
    return math.nan if box is None else mean_in(ssim_map(fake[box], real[box]), region[box])


def describe(values: Iterable[float], *, resamples: int = RESAMPLES, seed: int = BOOTSTRAP_SEED) -> Summary:
    """n, mean, sd (ddof 1), se of the mean, and low and high of the 95 % percentile bootstrap interval.

    One value per patient; values that are not finite are not counted. A mean of None was not measured; spread and
    interval need two patients.
    """
    kept = np.array([v for v in values if math.isfinite(v)], dtype=np.float64)
    summary: Summary = {"n": kept.size, "mean": None, "sd": None, "se": None, "low": None, "high": None}
    if kept.size:
        summary["mean"] = float(kept.mean())
    if kept.size > 1:
        sd = float(kept.std(ddof=1))
        drawn = np.random.default_rng(seed).integers(0, kept.size, (resamples, kept.size))
        low, high = np.percentile(kept[drawn].mean(axis=1), [2.5, 97.5])
        summary |= {"sd": sd, "se": sd / math.sqrt(kept.size), "low": float(low), "high": float(high)}
    return summary


def _moments(volume: FloatVolume) -> tuple[FloatVolume, FloatVolume]:
    """Gaussian-weighted mean and variance around every voxel."""
    mean, variance = _smooth(volume), _smooth(volume * volume)
    variance -= mean * mean
    return mean, variance


def _smooth(volume: FloatVolume) -> FloatVolume:
    offset = np.arange(WINDOW) - REACH
    kernel = np.exp(-0.5 * (offset / SIGMA) ** 2)
    kernel /= kernel.sum()
    for axis in range(volume.ndim):
        volume = correlate1d(volume, kernel, axis=axis, mode="reflect")
    return volume
