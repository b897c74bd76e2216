"""The steps of the built-in segmenter on small arrays."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.districts.body import grown_within, without_thin_parts
from pipeline.districts.builtin import block_means, without_slivers, working_grid
from pipeline.districts.landmarks import SCORES, Level, best_path
from pipeline.districts.profile import central_parts, find_midline
from pipeline.types import District, Grid


def grid(shape: tuple[int, int, int], spacing_mm: tuple[float, float, float]) -> Grid:
    return Grid(shape=shape, spacing_mm=spacing_mm, origin_mm=(0.0, 0.0, 0.0), frame_of_reference_uid="1.2.3")


def scores_for(*levels: Level) -> NDArray[np.float64]:
    scores = np.zeros((len(Level), len(levels)))
    scores[[int(level) for level in levels], range(len(levels))] = 3.0
    return scores


@pytest.mark.parametrize(
    "levels",
    [
        [Level.LEGS] * 3 + [Level.PELVIS] * 3 + [Level.CHEST] * 3 + [Level.SKULL] * 3,
        [Level.BELLY] * 4,
        [Level.LEGS] * 4,
        [Level.NECK] * 3 + [Level.SKULL] * 3,
    ],
)
def test_the_path_follows_the_slices_where_levels_are_missing(levels: list[Level]) -> None:
    assert best_path(scores_for(*levels)).tolist() == levels


def test_the_path_never_goes_down() -> None:
    path = best_path(scores_for(Level.CHEST, Level.CHEST, Level.CHEST, Level.LEGS, Level.CHEST, Level.CHEST))
    assert (np.diff(path) >= 0).all()
    assert path[3] == Level.CHEST


def test_every_level_has_a_score() -> None:
    assert list(SCORES) == list(Level)


def test_a_thin_table_goes_and_a_thick_body_stays() -> None:
    mask = np.zeros((10, 40, 40), dtype=bool)
    mask[:, 5:25, 10:30] = True
    mask[:, 30:33, 2:38] = True
    left = without_thin_parts(mask, 2.0)
    assert left[:, 10:20, 15:25].all()
    assert not left[:, 29:].any()


def test_growing_stays_within_the_mask() -> None:
    mask = np.zeros((5, 9, 9), dtype=bool)
    mask[2, 4, :7] = True
    seed = np.zeros_like(mask)
    seed[2, 4, 0] = True
    assert np.flatnonzero(grown_within(seed, mask, 2.0)[2, 4]).tolist() == [0, 1, 2]


def test_the_midline_follows_a_patient_who_lies_askew() -> None:
    body = np.zeros((40, 20, 80), dtype=bool)
    for z in range(40):
        body[z, 5:15, 20 + z // 2 : 41 + z // 2] = True
    middle = find_midline(body)
    assert middle[0] == pytest.approx(30, abs=1)
    assert middle[-1] == pytest.approx(49.5, abs=1)


def test_parts_beside_the_trunk_are_loose_but_the_two_legs_are_not() -> None:
    body = np.zeros((2, 30, 100), dtype=bool)
    body[0, 5:25, 30:70] = body[0, 10:20, 5:15] = body[0, 10:20, 85:95] = True  # trunk between arms
    body[1, 5:25, 28:48] = body[1, 5:25, 52:72] = body[1, 10:20, 85:95] = True  # legs and a hand
    core = central_parts(body, np.array([50.0, 50.0]))
    assert core[0].sum() == 20 * 40
    assert core[1].sum() == 2 * 20 * 20


def test_arms_that_touch_the_trunk_by_a_little_are_told_apart() -> None:
    y, x = np.mgrid[:60, :120]
    trunk = ((x - 60) / 36) ** 2 + ((y - 30) / 22) ** 2 < 1
    arm = (x - 106) ** 2 + (y - 30) ** 2 < 100
    core = central_parts((trunk | arm)[None], np.array([60.0]))[0]
    assert (core & arm).sum() < 0.1 * arm.sum()


def test_a_sliver_goes_to_its_neighbor_and_every_voxel_keeps_a_district() -> None:
    labels = np.zeros((20, 20, 20), dtype=np.uint8)
    labels[2:18, 2:18, 2:18] = District.TRUNK
    labels[17, 2:5, 2:5] = District.HEAD
    assert (without_slivers(labels) == np.where(labels > 0, District.TRUNK, 0)).all()


def test_block_means_keep_the_place_of_the_field() -> None:
    ramp = np.broadcast_to(np.arange(8, dtype=np.float32), (4, 6, 8)).copy()
    means, coarse = block_means(ramp, grid((4, 6, 8), (3.0, 1.0, 1.0)), (1, 2, 4))
    assert means.shape == coarse.shape == (4, 3, 2)
    assert means[0, 0].tolist() == [1.5, 5.5]
    assert coarse.origin_mm == (1.5, 0.5, 0.0)


def test_block_means_lose_no_slice_at_the_end() -> None:
    volume = np.full((5, 4, 4), 7.0, dtype=np.float32)
    means, coarse = block_means(volume, grid((5, 4, 4), (1.0, 1.0, 1.0)), (4, 4, 4))
    assert coarse.shape == (2, 1, 1)
    assert (means == 7.0).all()


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
def test_the_working_grid_counts_voxels_not_millimeters(factor: float) -> None:
    assert working_grid(grid((100, 512, 512), (3.0 * factor, factor, factor))).shape == (75, 128, 128)
