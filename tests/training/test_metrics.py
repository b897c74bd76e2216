from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from monai.metrics.regression import compute_ssim_and_cs
from skimage.metrics import structural_similarity

from training.baselines import fit_baselines
from training.cases import Case
from training.evaluate import describe
from training.metrics import mae, mean_in, psnr, ssim_map


@pytest.fixture
def pair() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    real = rng.random((18, 20, 22)).astype(np.float32)
    return np.clip(real + rng.normal(0, 0.1, real.shape), 0, 1).astype(np.float32), real


def test_ssim_agrees_with_scikit_image_everywhere(pair: tuple[np.ndarray, np.ndarray]) -> None:
    fake, real = pair
    _, expected = structural_similarity(
        fake.astype(np.float64),
        real.astype(np.float64),
        data_range=1.0,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        full=True,
    )
    assert np.abs(ssim_map(fake, real) - expected).max() < 1e-6


def test_ssim_agrees_with_monai_away_from_the_border(pair: tuple[np.ndarray, np.ndarray]) -> None:
    fake, real = pair
    expected, _ = compute_ssim_and_cs(
        torch.from_numpy(fake)[None, None],
        torch.from_numpy(real)[None, None],
        spatial_dims=3,
        kernel_size=(11, 11, 11),
        kernel_sigma=(1.5, 1.5, 1.5),
        data_range=1.0,
    )
    inner = ssim_map(fake, real)[5:-5, 5:-5, 5:-5]
    assert np.abs(inner - expected[0, 0].numpy()).max() < 1e-4


def test_equal_volumes_are_perfect(pair: tuple[np.ndarray, np.ndarray]) -> None:
    _, real = pair
    region = np.ones(real.shape, bool)
    assert mae(real, real, region) == 0
    assert psnr(real, real, region) == math.inf
    assert mean_in(ssim_map(real, real), region) == pytest.approx(1)


def test_only_the_region_counts() -> None:
    fake, real = np.array([0.0, 0.3, 1.0]), np.array([0.0, 0.2, 0.0])
    region = np.array([True, True, False])
    assert mae(fake, real, region) == pytest.approx(0.05)
    assert psnr(fake, real, region) == pytest.approx(-10 * math.log10(0.01 / 2))


def test_an_absent_district_has_no_metric_instead_of_a_zero() -> None:
    empty = np.zeros((2, 2, 2), bool)
    assert math.isnan(mae(empty * 1.0, empty * 1.0, empty))
    assert math.isnan(psnr(empty * 1.0, empty * 1.0, empty))
    assert math.isnan(mean_in(empty * 1.0, empty))
    assert describe([math.nan, 1.0, 2.0]) == {"n": 2, "mean": 1.5, "sd": 0.707107, "se": 0.5}
    assert describe([math.nan])["mean"] is None


def test_the_baselines_are_the_means_of_what_they_were_fitted_on() -> None:
    ct = np.array([[[0.1, 0.1, 0.9]]], dtype=np.float16)
    pet = np.array([[[0.2, 0.4, 0.6]]], dtype=np.float16)
    districts = np.array([[[1, 1, 1]]], dtype=np.uint8)
    baselines = fit_baselines([Case(name="a", ct=ct, pet=pet, districts=districts, lesions=np.zeros(ct.shape, bool))])
    assert baselines.predict_mean(districts) == pytest.approx(0.4, abs=1e-3)
    assert baselines.predict_lookup(ct.astype(np.float32), districts)[0, 0] == pytest.approx([0.3, 0.3, 0.6], abs=1e-3)
    outside = np.zeros_like(districts)
    assert baselines.predict_lookup(ct.astype(np.float32), outside).max() == 0
    gap = baselines.predict_lookup(np.full((1, 1, 1), 0.45, np.float32), districts[..., :1])
    assert gap[0, 0, 0] == pytest.approx(0.3, abs=1e-3)  # an unseen HU takes its nearest neighbor's value
