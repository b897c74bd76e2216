"""A CT that was moved against its PET is brought back; large motions and small gains are refused."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import SimpleITK as sitk

from pipeline.geometry import resample_image, to_sitk
from pipeline.types import FloatVolume
from training.phantom import Phantom, PhantomSpec, make_phantom
from training.preparation.registration import Registration, register

SPACING_MM = (6.0, 6.0, 6.0)


@cache
def phantom() -> Phantom:
    return make_phantom(PhantomSpec(seed=2, coverage=(0.5, 0.95), spacing_mm=SPACING_MM))


def motion(shift_mm: tuple[float, float, float], degrees: float) -> sitk.Euler3DTransform:
    """Where a point of the PET is found in the moved CT: turned about z at the field's middle, then shifted."""
    grid = phantom().grid
    transform = sitk.Euler3DTransform()
    middle = zip(grid.origin_mm, reversed(grid.shape), reversed(grid.spacing_mm), strict=True)
    transform.SetCenter([o + (n - 1) / 2 * s for o, n, s in middle])
    transform.SetRotation(0.0, 0.0, math.radians(degrees))
    transform.SetTranslation(shift_mm)
    return transform


def moved_ct(transform: sitk.Euler3DTransform) -> FloatVolume:
    image = to_sitk(phantom().hu, phantom().grid)
    result: FloatVolume = resample_image(image, phantom().grid, transform.GetInverse(), fill=-1024.0)
    return result


def registered(hu: FloatVolume) -> Registration:
    p = phantom()
    return register(hu, p.grid, p.suv, p.grid, max_shift_mm=15.0, max_rotation_deg=5.0)


def largest_error_mm(found: sitk.Transform, true: sitk.Transform) -> float:
    """Over the body, the distance between where a PET point is looked for and where it is."""
    grid = phantom().grid
    ox, oy, oz = grid.origin_mm
    voxels = np.argwhere(phantom().body)[::301] * grid.spacing_mm
    points = [(ox + x, oy + y, oz + z) for z, y, x in voxels.tolist()]
    return max(math.dist(found.TransformPoint(p), true.TransformPoint(p)) for p in points)


def test_a_ct_moved_by_6_mm_and_3_degrees_is_brought_back() -> None:
    true = motion((6.0, 0.0, 0.0), 3.0)
    found = registered(moved_ct(true))
    assert found.accepted
    assert largest_error_mm(found.transform, true) < 2.0
    assert found.details["metric_after"] > 1.1 * found.details["metric_before"]
    assert abs(found.details["shift_mm"] - 6.0) < 1.5
    assert abs(abs(found.details["rotation_deg"][2]) - 3.0) < 0.5


@pytest.mark.parametrize(("shift", "degrees", "word"), [((0, 0, 40.0), 0.0, "shift"), ((0, 0, 0), 9.0, "rotation")])
def test_a_large_motion_is_refused_and_nothing_is_moved(
    shift: tuple[float, float, float], degrees: float, word: str
) -> None:
    found = registered(moved_ct(motion(shift, degrees)))
    assert not found.accepted
    assert word in found.details["reason"]
    assert found.transform.TransformPoint((10.0, 20.0, 30.0)) == (10.0, 20.0, 30.0)


def test_a_ct_that_is_aligned_stays_where_it_is() -> None:
    found = registered(phantom().hu)
    assert largest_error_mm(found.transform, motion((0, 0, 0), 0.0)) < 1.0
    assert not found.accepted, found.details
    assert "mutual information" in found.details["reason"]


def test_the_same_input_gives_the_same_transform() -> None:
    hu = moved_ct(motion((0.0, 5.0, 0.0), 0.0))
    assert registered(hu).details == registered(hu).details
