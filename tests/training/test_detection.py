from __future__ import annotations

import math

import numpy as np
import pytest

from pipeline.types import Grid
from training.evaluation.detection import (
    THRESHOLDS_SUV,
    false_positive_ml,
    false_positives,
    froc,
    label_lesions,
    measure_lesions,
    seam_index,
    sensitivity_at,
)

SHAPE = (20, 20, 20)


def spot(volume: np.ndarray, z: int, value: float, size: int = 2) -> np.ndarray:
    volume[z : z + size, 5 : 5 + size, 5 : 5 + size] = value
    return volume


@pytest.fixture
def background() -> np.ndarray:
    return np.full(SHAPE, 0.5, np.float32)


def test_diagonal_neighbors_are_one_lesion() -> None:
    lesions = np.zeros(SHAPE, bool)
    lesions[1, 1, 1] = lesions[2, 2, 2] = lesions[8, 8, 8] = True
    assert label_lesions(lesions)[1] == 2


def test_a_hot_spot_without_true_uptake_is_invented_at_every_threshold_it_reaches(background: np.ndarray) -> None:
    fake = spot(background.copy(), 3, 4.5)
    counts = dict(zip(THRESHOLDS_SUV, false_positives(fake, background, np.zeros(SHAPE, bool)), strict=True))
    assert [t for t in THRESHOLDS_SUV if counts[t]] == [1.5, 2.0, 2.5, 3.0, 3.5, 4.0]


def test_a_hot_spot_that_touches_true_uptake_is_not_invented(background: np.ndarray) -> None:
    fake, real = spot(background.copy(), 3, 4.0), background.copy()
    real[4, 6, 6] = 4.0
    assert sum(false_positives(fake, real, np.zeros(SHAPE, bool))) == 0
    real[4, 6, 6] = 3.0  # true uptake under the threshold excuses nothing at the threshold
    counts = dict(zip(THRESHOLDS_SUV, false_positives(fake, real, np.zeros(SHAPE, bool)), strict=True))
    assert (counts[3.0], counts[3.5], counts[4.0]) == (0, 1, 1)


@pytest.mark.parametrize(("distance", "invented"), [(1, 0), (2, 1)])
def test_a_lesion_excuses_what_lies_beside_it_by_one_voxel(
    background: np.ndarray, distance: int, invented: int
) -> None:
    lesions = np.zeros(SHAPE, bool)
    lesions[10, 5, 5] = True
    fake = background.copy()
    fake[10 + distance, 5, 5] = 2.0
    assert false_positives(fake, background, lesions, [2.0]) == [invented]


def test_only_clearly_cold_tissue_painted_hot_counts_as_false_positive_volume(background: np.ndarray) -> None:
    real, body = background.copy(), np.ones(SHAPE, bool)
    fake = np.full(SHAPE, 4.0, np.float32)
    real[:10] = 2.5  # warm: between the thresholds
    body[:, :10] = False
    assert false_positive_ml(fake, real, body, voxel_ml=0.064) == pytest.approx(10 * 10 * 20 * 0.064)
    assert false_positive_ml(fake - 0.1, real, body, voxel_ml=0.064) == 0


def test_a_lesion_s_contrast_is_its_highest_voxel_over_what_surrounds_it(background: np.ndarray) -> None:
    grid = Grid(shape=SHAPE, spacing_mm=(4, 4, 4), origin_mm=(0, 0, 0), frame_of_reference_uid="1.2.3")
    mask = spot(np.zeros(SHAPE, np.float32), 8, 1.0) > 0
    real, fake = spot(background.copy(), 8, 5.0), spot(background.copy(), 8, 1.0)
    (found,) = measure_lesions(label_lesions(mask)[0], fake, real, np.ones(SHAPE, bool), grid)
    assert found.volume_ml == pytest.approx(8 * 0.064)
    assert (found.true_suv_max, found.suv_max) == (5.0, 1.0)
    assert (found.true_contrast, found.contrast) == (pytest.approx(10), pytest.approx(2))


def test_the_froc_curve_pools_lesions_and_averages_false_positives() -> None:
    quiet, loud = dict.fromkeys(THRESHOLDS_SUV, 0), {t: 6 if t < 3 else 2 for t in THRESHOLDS_SUV}
    points = froc([([2.2, 5.0], quiet), ([2.7], loud)])
    by_threshold = {p.threshold_suv: p for p in points}
    assert by_threshold[2.5].sensitivity == pytest.approx(2 / 3)
    assert by_threshold[2.5].false_positives == 3
    assert by_threshold[4.0].sensitivity == pytest.approx(1 / 3)
    assert [sensitivity_at(points, fp) for fp in (0.5, 1, 4)] == [None, pytest.approx(1 / 3), 1.0]


def test_without_lesions_there_is_no_froc_curve() -> None:
    assert froc([([], dict.fromkeys(THRESHOLDS_SUV, 0))]) == []


@pytest.fixture
def halves() -> tuple[np.ndarray, np.ndarray]:
    labels = np.ones(SHAPE, np.uint8)
    labels[10:] = 2
    return labels, np.random.default_rng(0).random(SHAPE).astype(np.float32)


def test_a_volume_that_jumps_as_the_true_one_does_has_no_seam(halves: tuple[np.ndarray, np.ndarray]) -> None:
    labels, real = halves
    assert seam_index(real, real, labels) == 0
    assert seam_index(real * 0.1, real, labels) == pytest.approx(0, abs=1e-6)  # smooth is not a seam


def test_a_step_at_the_border_raises_the_seam_index_and_one_elsewhere_does_not(
    halves: tuple[np.ndarray, np.ndarray],
) -> None:
    labels, real = halves
    stepped = real + np.where(labels == 2, np.float32(1), np.float32(0))
    higher = real + np.where(labels == 2, np.float32(2), np.float32(0))
    assert 1 < seam_index(stepped, real, labels) < seam_index(higher, real, labels)
    aside = real.copy()
    aside[5:] += 1
    assert seam_index(aside, real, labels) == pytest.approx(0, abs=1e-6)


def test_districts_that_air_parts_have_no_seam(halves: tuple[np.ndarray, np.ndarray]) -> None:
    labels, real = halves
    labels[9:11] = 0
    assert math.isnan(seam_index(real, real, labels))
