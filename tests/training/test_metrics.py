from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
import torch
from monai.metrics.regression import compute_ssim_and_cs
from skimage.metrics import structural_similarity

from pipeline.geometry import bounding_box
from training.evaluation.baselines import fit_baselines
from training.evaluation.metrics import REACH, describe, mae, mean_in, psnr, ssim, ssim_map
from training.prepared import PreparedStudy, StudyRecord

Pair = tuple[np.ndarray, np.ndarray]


@pytest.fixture
def pair() -> Pair:
    rng = np.random.default_rng(0)
    real = rng.random((18, 20, 22)).astype(np.float32)
    return np.clip(real + rng.normal(0, 0.1, real.shape), 0, 1).astype(np.float32), real


@pytest.mark.parametrize(("level", "spread"), [(0.0, 1.0), (0.0, 0.02), (0.5, 0.02), (0.98, 0.02)])
def test_ssim_agrees_with_scikit_image_in_double_precision_everywhere(pair: Pair, level: float, spread: float) -> None:
    """Nearly flat, bright volumes are where single precision would lose the variances."""
    fake, real = (level + spread * v for v in pair)
    _, expected = structural_similarity(
        fake.astype(np.float64),
        real.astype(np.float64),
        data_range=1.0,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        full=True,
    )
    assert np.abs(ssim_map(fake, real) - expected).max() < 1e-4


def test_ssim_agrees_with_monai_where_the_window_fits(pair: Pair) -> None:
    """MONAI pads nothing, so its map ends where the window does: the interior is compared."""
    fake, real = pair
    tensors = [torch.from_numpy(v)[None, None] for v in pair]
    expected, _ = compute_ssim_and_cs(
        *tensors, spatial_dims=3, kernel_size=(11,) * 3, kernel_sigma=(1.5,) * 3, data_range=1.0
    )
    inner = ssim_map(fake, real)[REACH:-REACH, REACH:-REACH, REACH:-REACH]
    assert np.abs(inner - expected[0, 0].numpy()).max() < 1e-4


def test_the_ssim_of_a_region_needs_only_its_box_and_the_window_s_reach(pair: Pair) -> None:
    fake, real = (np.pad(v, 12) for v in pair)
    region = np.zeros(real.shape, bool)
    region[15:20, 18:22, 20:26] = True
    assert bounding_box(region, REACH) == (slice(10, 25), slice(13, 27), slice(15, 31))
    assert ssim(fake, real, region) == pytest.approx(mean_in(ssim_map(fake, real), region), abs=1e-6)
    assert math.isnan(ssim(fake, real, np.zeros_like(region)))


def test_equal_volumes_are_perfect(pair: Pair) -> None:
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


def test_a_summary_counts_what_was_measured_and_names_sd_and_se() -> None:
    found = describe([math.nan, 1.0, 2.0, 3.0, 4.0])
    assert (found["n"], found["mean"]) == (4, 2.5)
    assert found["sd"] == pytest.approx(1.29099, abs=1e-5)
    assert found["se"] == pytest.approx(1.29099 / 2, abs=1e-5)
    assert 1.0 <= found["low"] < 2.0 < 3.0 < found["high"] <= 4.0
    assert describe([1.0, 2.0, 3.0]) == describe([1.0, 2.0, 3.0])


def test_one_patient_has_no_spread_and_none_has_no_mean() -> None:
    assert describe([2.0]) == {"n": 1, "mean": 2.0, "sd": None, "se": None, "low": None, "high": None}
    assert describe([math.nan])["mean"] is None


def test_the_bootstrap_interval_covers_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(3)
    covered = 0
    for _ in range(200):
        found = describe(rng.normal(0, 1, 40), resamples=400)
        covered += bool(found["low"] <= 0 <= found["high"])
    assert 0.88 <= covered / 200 <= 0.99


def study_of(ct: list[float], pet: list[float]) -> PreparedStudy:
    shape = (1, 1, len(ct))
    record = StudyRecord(
        id="a",
        patient=hashlib.sha256(b"a").hexdigest(),
        shape=shape,
        spacing_mm=(4, 4, 4),
        origin_mm=(0, 0, 0),
        files={},
        segmenter="given",
    )
    return PreparedStudy(
        record=record,
        ct=np.array(ct, np.float16).reshape(shape),
        pet=np.array(pet, np.float16).reshape(shape),
        districts=np.ones(shape, np.uint8),
        lesions=np.zeros(shape, np.uint8),
    )


def test_the_baselines_are_the_means_of_what_they_were_fitted_on() -> None:
    study = study_of([0.1, 0.1, 0.9], [0.2, 0.4, 0.6])
    baselines = fit_baselines([study])
    ct = study.ct.astype(np.float32)
    assert baselines.predict_mean(study.districts) == pytest.approx(0.4, abs=1e-3)
    assert baselines.predict("hu_lookup", ct, study.districts)[0, 0] == pytest.approx([0.3, 0.3, 0.6], abs=1e-3)
    assert baselines.predict("hu_lookup", ct, np.zeros_like(study.districts)).max() == 0


def test_an_unseen_hu_takes_its_nearest_neighbor_s_value() -> None:
    baselines = fit_baselines([study_of([0.1, 0.1, 0.9], [0.2, 0.4, 0.6])])
    gap = baselines.predict_lookup(np.full((1, 1, 1), 0.45, np.float32), np.ones((1, 1, 1), np.uint8))
    assert gap[0, 0, 0] == pytest.approx(0.3, abs=1e-3)
