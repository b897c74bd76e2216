"""Rigid registration of a CT to its PET, accepted only where it is small and clearly better than none.

CT and PET of one examination come from one table: a large motion found between them is an error of the method, not
of the patient. So the rule of the paper's setting (shift under 15 mm, rotation under 5 degrees) is kept, and the
scanner's own alignment stands wherever the metric does not clearly improve.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import SimpleITK as sitk  # noqa: N813 - the name its own manual uses

from pipeline.geometry import grid_at_spacing, resample_image, to_sitk
from pipeline.types import FloatVolume, Grid

LEVELS_MM = (16.0, 8.0, 5.0)  # coarse to fine: voxel sizes at which CT and PET are compared
BINS = 40
SAMPLES = 60_000  # voxels of the fixed image that the metric looks at, at most
SEED = 20_250
SUV_SHOWN = 8.0  # the brain and the bladder would take all bins of the histogram
HU_SHOWN = (-1000.0, 600.0)
# Accepted from this relative gain of the mutual information. Seen on phantoms at 4 mm: at most 1 % where CT and PET
# are aligned, 4 % for 1.4 mm and half a degree, 5 % for 2.8 mm, over 20 % from 6 mm on; no patient data were seen.
MIN_GAIN = 0.02


@dataclass(frozen=True, slots=True)
class Registration:
    """`transform` maps PET points to CT points (LPS, mm): the identity unless `accepted`. `details` is for the log."""

    accepted: bool
    transform: sitk.Transform
    details: dict[str, Any] = field(default_factory=dict)


def identity() -> sitk.Transform:
    """The transform that moves nothing."""
    return sitk.Transform(3, sitk.sitkIdentity)


def register(
    hu: FloatVolume,
    ct_grid: Grid,
    suv: FloatVolume,
    pet_grid: Grid,
    *,
    max_shift_mm: float,
    max_rotation_deg: float,
) -> Registration:
    """The rigid motion that lays the CT (moving) on the PET (fixed): Mattes mutual information, Euler angles.

    Args:
        hu: CT [z, y, x] in HU on `ct_grid`.
        suv: PET [z, y, x] in SUV on `pet_grid`.
        max_shift_mm: refused from this shift of the middle of the PET's field on.
        max_rotation_deg: refused from this angle about any axis through it on.

    The same input gives the same result: samples are drawn with a fixed seed, on one thread.
    """
    ct, pet = _shown(hu, *HU_SHOWN), np.sqrt(_shown(suv, 0.0, SUV_SHOWN))
    center = _middle(pet_grid)
    transform = _euler(center)
    try:
        for size_mm in LEVELS_MM:
            fixed, moving = _coarse(pet, pet_grid, size_mm), _coarse(ct, ct_grid, size_mm)
            _method(fixed, transform, size_mm).Execute(fixed, moving)
        before = _similarity(fixed, moving, _euler(center))
        after = _similarity(fixed, moving, transform)
    except RuntimeError:  # ITK's way to say that too few samples fall on both images
        why = "CT and PET share too little, or the search left the CT"
        return Registration(accepted=False, transform=identity(), details={"accepted": False, "reason": why})
    shift = math.dist(transform.GetTranslation(), (0, 0, 0))
    angles = [math.degrees(a) for a in (transform.GetAngleX(), transform.GetAngleY(), transform.GetAngleZ())]
    why = _refusal(shift, max(map(abs, angles)), before, after, max_shift_mm, max_rotation_deg)
    details = {
        "accepted": not why,
        "reason": why,
        "shift_mm": round(shift, 3),
        "rotation_deg": [round(a, 3) for a in angles],  # about x, y, z
        "metric_before": round(before, 5),
        "metric_after": round(after, 5),
        "parameters": [round(p, 6) for p in transform.GetParameters()],  # angles (rad), then translation (mm)
        "center_mm": [round(c, 3) for c in transform.GetCenter()],
    }
    return Registration(accepted=not why, transform=identity() if why else transform, details=details)


def _refusal(shift: float, angle: float, before: float, after: float, max_shift: float, max_angle: float) -> str:
    """Why a motion is not accepted; "" if it is."""
    if shift >= max_shift:
        return f"shift of {shift:.1f} mm, under {max_shift:g} mm is expected"
    if angle >= max_angle:
        return f"rotation of {angle:.1f} degrees, under {max_angle:g} is expected"
    if after < before * (1 + MIN_GAIN):
        return f"mutual information {before:.4f} to {after:.4f}, a gain of {MIN_GAIN:.0%} is expected"
    return ""


def _euler(center: list[float]) -> sitk.Euler3DTransform:
    transform = sitk.Euler3DTransform()
    transform.SetCenter(center)
    return transform


def _method(fixed: sitk.Image, transform: sitk.Transform, size_mm: float) -> sitk.ImageRegistrationMethod:
    """Mattes mutual information and gradient descent, which changes `transform` in place."""
    method = sitk.ImageRegistrationMethod()
    method.SetNumberOfThreads(1)  # sums in another order would be another result
    method.SetMetricAsMattesMutualInformation(BINS)
    method.SetMetricSamplingStrategy(method.RANDOM)
    method.SetMetricSamplingPercentage(min(1.0, SAMPLES / math.prod(fixed.GetSize())), SEED)
    method.SetInterpolator(sitk.sitkLinear)
    method.SetOptimizerAsRegularStepGradientDescent(
        learningRate=size_mm / 2, minStep=size_mm / 100, numberOfIterations=60, relaxationFactor=0.5
    )
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetInitialTransform(transform, inPlace=True)
    return method


def _similarity(fixed: sitk.Image, moving: sitk.Image, transform: sitk.Transform) -> float:
    """Mutual information (SimpleITK gives its negative) over the samples of the finest level."""
    return -float(_method(fixed, transform, LEVELS_MM[-1]).MetricEvaluate(fixed, moving))


def _coarse(volume: FloatVolume, grid: Grid, size_mm: float) -> sitk.Image:
    """Smoothed and sampled at `size_mm`, or the grid's own spacing along an axis where that is larger."""
    image = to_sitk(volume, grid)
    sigma = [max(0.5 * (size_mm - step), 0.0) for step in reversed(grid.spacing_mm)]
    for axis in (i for i in range(3) if sigma[i] > 0):
        image = sitk.RecursiveGaussian(image, sigma=sigma[axis], direction=axis)
    z, y, x = (max(size_mm, step) for step in grid.spacing_mm)
    target = grid_at_spacing(grid, (z, y, x))
    return to_sitk(resample_image(image, target, identity(), fill=0.0), target)


def _shown(values: FloatVolume, low: float, high: float) -> FloatVolume:
    result: FloatVolume = np.clip(values, low, high).astype(np.float32) - np.float32(low)
    return result


def _middle(grid: Grid) -> list[float]:
    """LPS position (x, y, z) of the field's middle."""
    edge = zip(grid.origin_mm, reversed(grid.shape), reversed(grid.spacing_mm), strict=True)
    return [origin + (n - 1) / 2 * step for origin, n, step in edge]
