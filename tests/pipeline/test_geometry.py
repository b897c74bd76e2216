"""Grids and resampling."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.geometry import from_sitk, grid_at_spacing, resample, resample_on, result_grid, to_sitk
from pipeline.types import GeometryError, Grid

FOR = "1.2.3"


def a_grid(shape=(10, 12, 14), spacing=(3.0, 2.0, 1.5), origin=(-10.0, -20.0, -30.0), frame=FOR):
    return Grid(shape=shape, spacing_mm=spacing, origin_mm=origin, frame_of_reference_uid=frame)


def edges(grid):
    """Lower and upper edge of the field, (x, y, z)."""
    low = np.array(grid.origin_mm) - np.array(grid.spacing_mm[::-1]) / 2
    return low, low + np.array(grid.extent_mm[::-1])


@settings(max_examples=200, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 700)] * 3),
    spacing=st.tuples(*[st.floats(0.3, 10)] * 3),
    target=st.tuples(*[st.floats(0.3, 12)] * 3),
)
def test_a_new_grid_covers_the_old_field_and_shares_its_middle(shape, spacing, target):
    old = a_grid(shape, spacing)
    new = grid_at_spacing(old, target)
    (low, high), (new_low, new_high) = edges(old), edges(new)
    slack = 1e-3 * np.array(target[::-1])
    assert np.all(new_low <= low + slack)
    assert np.all(new_high >= high - slack)
    assert np.allclose(low + high, new_low + new_high)
    assert np.all(new_high - new_low < high - low + np.array(target[::-1]) + 1e-6)
    assert new.spacing_mm == target
    assert new.frame_of_reference_uid == FOR


def test_the_same_spacing_gives_the_same_grid():
    grid = a_grid()
    assert grid_at_spacing(grid, grid.spacing_mm) == grid


@settings(max_examples=200, deadline=None)
@given(shape=st.tuples(*[st.integers(1, 700)] * 3), spacing=st.tuples(*[st.floats(0.3, 10)] * 3))
def test_each_plane_of_a_result_is_whole_bytes_of_bits_and_covers_the_ct(shape, spacing):
    old = a_grid(shape, spacing)
    new = result_grid(old, (4.0, 4.0, 4.0))
    assert new.shape[1] % 4 == new.shape[2] % 4 == 0
    (low, high), (new_low, new_high) = edges(old), edges(new)
    assert np.all(new_low <= low + 0.016)
    assert np.all(new_high >= high - 0.016)
    assert np.all(new_high - new_low < high - low + np.array([16.0, 16.0, 4.0]) + 1e-6)


def test_a_spacing_of_zero_is_refused():
    with pytest.raises(GeometryError, match="three positive numbers"):
        grid_at_spacing(a_grid(), (0.0, 1.0, 1.0))


def test_a_linear_ramp_in_lps_stays_that_ramp_on_a_finer_grid():
    grid = a_grid()
    target = grid_at_spacing(grid, (2.0, 1.0, 1.0))
    fine = resample(ramp(grid), grid, target, fill=-1024.0)
    inside = (slice(2, -2),) * 3
    assert np.allclose(fine[inside], ramp(target)[inside], atol=1e-3)
    assert fine.dtype == np.float32


def ramp(grid):
    z, y, x = np.meshgrid(*[np.arange(n) for n in grid.shape], indexing="ij")
    points = np.stack([z, y, x, np.ones_like(z)], axis=-1) @ grid.affine.T
    return (points[..., 0] + 10 * points[..., 1] - 4 * points[..., 2]).astype(np.float32)


def test_what_lies_outside_the_field_is_filled_and_the_border_voxel_is_kept_to_its_edge():
    grid = a_grid((4, 4, 4), (2.0, 2.0, 2.0), (0.0, 0.0, 0.0))
    target = a_grid((8, 4, 4), (1.9, 2.0, 2.0), (0.0, 0.0, -2.0))
    got = resample(np.full(grid.shape, 7, np.float32), grid, target, fill=-1024.0)
    assert got[:, 0, 0].tolist() == [-1024.0, 7.0, 7.0, 7.0, 7.0, -1024.0, -1024.0, -1024.0]


@pytest.mark.parametrize("dtype", [np.uint8, np.bool_, np.int16])
def test_labels_keep_their_dtype_and_never_mix(dtype):
    grid = a_grid()
    labels = (np.indices(grid.shape).sum(axis=0) % 2 * (1 if dtype == np.bool_ else 4)).astype(dtype)
    got = resample(labels, grid, grid_at_spacing(grid, (1.0, 1.0, 1.0)), fill=0, nearest=True)
    assert got.dtype == dtype
    assert set(np.unique(got)) == set(np.unique(labels))


def test_resampling_to_the_same_grid_gives_the_values_back_in_an_array_of_their_own():
    grid = a_grid()
    volume = ramp(grid)
    got = resample(volume, grid, grid, fill=0)
    assert np.array_equal(got, volume)
    assert not np.shares_memory(got, volume)


def test_an_image_and_back_is_the_same_volume_and_grid():
    grid = a_grid()
    array, back = from_sitk(to_sitk(ramp(grid), grid), FOR)
    assert np.array_equal(array, ramp(grid))
    assert back == grid


def test_an_index_has_the_same_position_in_simpleitk_and_in_the_affine():
    grid = a_grid()
    image = to_sitk(ramp(grid), grid)
    assert np.allclose(image.TransformIndexToPhysicalPoint((3, 5, 7)), (grid.affine @ [7, 5, 3, 1])[:3])


def test_an_oblique_image_is_refused():
    image = sitk.Image(3, 3, 3, sitk.sitkFloat32)
    image.SetDirection((0.8, 0.6, 0, -0.6, 0.8, 0, 0, 0, 1))
    with pytest.raises(GeometryError, match="axes along"):
        from_sitk(image)


def test_a_volume_that_does_not_fit_its_grid_is_refused():
    with pytest.raises(GeometryError, match="does not fit"):
        resample(np.zeros((2, 2, 2), np.float32), a_grid(), a_grid(), fill=0)


def test_another_frame_of_reference_is_refused():
    grid = a_grid()
    with pytest.raises(GeometryError, match="Frame of Reference"):
        resample(ramp(grid), grid, a_grid(frame="1.2.4"), fill=0)


DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")],
    ),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("spacing", [(4.0, 4.0, 4.0), (1.5, 0.7, 2.2), (3.0, 0.9, 0.9)])
def test_torch_samples_the_same_values_as_simpleitk(device: str, spacing: tuple[float, float, float]) -> None:
    grid = Grid(
        shape=(17, 40, 33), spacing_mm=(3.0, 0.9, 0.9), origin_mm=(-11.0, 7.5, -300.0), frame_of_reference_uid="1.2.3"
    )
    volume = np.random.default_rng(3).normal(0, 300, grid.shape).astype(np.float32)
    inner = grid_at_spacing(grid, spacing)
    wider = replace(
        inner, shape=tuple(n + 6 for n in inner.shape), origin_mm=tuple(o - 5.3 for o in inner.origin_mm)
    )  # reaches beyond the field on every side
    for target in (inner, wider):
        expected = resample(volume, grid, target, fill=-1024.0)
        got = resample_on(torch.device(device), volume, grid, target, fill=-1024.0)
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, expected, atol=2e-3)


def test_torch_refuses_what_simpleitk_refuses() -> None:
    grid = a_grid()
    with pytest.raises(GeometryError):
        resample_on(torch.device("cpu"), ramp(grid), grid, a_grid(frame="1.2.4"), fill=0)
