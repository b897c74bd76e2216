"""Districts become one body: nothing is lost, nothing is invented, and borders have no step."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline import stitching
from pipeline.stitching import feather_weight, reach, stitch
from pipeline.types import District, DistrictMap, FloatVolume, GeometryError, Grid, LabelVolume

HEAD, TRUNK, ARMS, LEGS = District


def district_map(labels: LabelVolume, spacing_mm: tuple[float, float, float] = (4.0, 4.0, 4.0)) -> DistrictMap:
    grid = Grid(shape=labels.shape, spacing_mm=spacing_mm, origin_mm=(0.0, 0.0, 0.0), frame_of_reference_uid="1.2.3")
    present = [d for d in District if (labels == d).any()]
    return DistrictMap(labels=labels, grid=grid, segmenter="t", version="1", confidence=dict.fromkeys(present, 1.0))


def column(*labels: int) -> DistrictMap:
    """Districts along z; a 3 x 3 cross-section."""
    return district_map(np.repeat(np.array(labels, dtype=np.uint8), 9).reshape(-1, 3, 3))


def filled(districts: DistrictMap, values: dict[District, float]) -> dict[District, FloatVolume]:
    return {d: np.full(districts.grid.shape, value, dtype=np.float32) for d, value in values.items()}


def random_labels(shape: tuple[int, int, int], seed: int, highest: int = 4) -> LabelVolume:
    """Coarse blocks of random labels: every kind of neighbor, edges and corners."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, highest + 1, [-(-n // 3) for n in shape], dtype=np.uint8)
    blocks = np.kron(coarse, np.ones((3, 3, 3), dtype=np.uint8))
    return np.ascontiguousarray(blocks[tuple(slice(n) for n in shape)])


@settings(deadline=None, max_examples=50)
@given(
    shape=st.tuples(*[st.integers(1, 14)] * 3),
    seed=st.integers(0, 50),
    mode=st.sampled_from(["hard", "feathered"]),
    feather_mm=st.sampled_from([0.0, 1.0, 8.0, 30.0]),
    spacing_mm=st.sampled_from([(4.0, 4.0, 4.0), (5.0, 2.0, 1.0)]),
)
def test_one_volume_given_for_every_district_comes_back(
    shape: tuple[int, int, int], seed: int, mode: str, feather_mm: float, spacing_mm: tuple[float, float, float]
) -> None:
    districts = district_map(random_labels(shape, seed), spacing_mm)
    volume = np.random.default_rng(seed).random(shape, dtype=np.float32)
    out = stitch(dict.fromkeys(District, volume), districts, mode=mode, feather_mm=feather_mm)
    np.testing.assert_allclose(out, np.where(districts.labels > 0, volume, 0), atol=1e-6)
    assert out.dtype == np.float32


@settings(deadline=None, max_examples=50)
@given(
    shape=st.tuples(*[st.integers(1, 14)] * 3),
    seed=st.integers(0, 50),
    mode=st.sampled_from(["hard", "feathered"]),
    missing=st.sampled_from(District),
)
def test_a_district_without_a_volume_is_zero_and_changes_no_other(
    shape: tuple[int, int, int], seed: int, mode: str, missing: District
) -> None:
    districts = district_map(random_labels(shape, seed))
    volumes = filled(districts, {d: 0.5 for d in District if d != missing})
    out = stitch(volumes, districts, mode=mode, feather_mm=16.0)
    assert not out[districts.labels == missing].any()
    np.testing.assert_allclose(out[(districts.labels != 0) & (districts.labels != missing)], 0.5, atol=1e-6)


def test_hard_takes_each_voxel_from_its_own_district() -> None:
    districts = column(0, 4, 4, 2, 2, 1, 0)
    out = stitch(filled(districts, {HEAD: 0.1, TRUNK: 0.2, LEGS: 0.4}), districts, mode="hard", feather_mm=8.0)
    np.testing.assert_allclose(out[:, 1, 1], [0, 0.4, 0.4, 0.2, 0.2, 0.1, 0], atol=1e-7)


def test_feathered_is_a_ramp_over_the_feather_centered_on_the_border() -> None:
    districts = column(2, 2, 2, 2, 1, 1, 1, 1)
    out = stitch(filled(districts, {HEAD: 1.0, TRUNK: 0.0}), districts, mode="feathered", feather_mm=16.0)
    # 4 mm voxels: centers at 2 and 6 mm on either side of the border, 16 mm from 0 to 1
    np.testing.assert_allclose(out[:, 1, 1], [0, 0, 0.125, 0.375, 0.625, 0.875, 1, 1], atol=1e-6)


def test_the_weight_does_not_fall_toward_the_skin() -> None:
    districts = column(0, 0, 2, 2, 2, 0, 0)
    weight = feather_weight(districts.labels, TRUNK, districts.grid.spacing_mm, 16.0)
    np.testing.assert_array_equal(weight[:, 1, 1], [0, 0, 1, 1, 1, 0, 0])


def test_districts_that_air_parts_are_not_mixed() -> None:
    districts = column(3, 3, 0, 0, 2, 2)  # an arm beside the trunk, 12 mm from center to center
    out = stitch(filled(districts, {ARMS: 1.0, TRUNK: 0.0}), districts, mode="feathered", feather_mm=8.0)
    np.testing.assert_array_equal(out[:, 1, 1], [1, 1, 0, 0, 0, 0])


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 50),
    feather_mm=st.sampled_from([1.0, 4.0, 8.0, 20.0]),
    spacing_mm=st.sampled_from([(4.0, 4.0, 4.0), (5.0, 2.0, 1.0)]),
)
def test_stitching_looks_nowhere_beyond_the_reach(
    seed: int, feather_mm: float, spacing_mm: tuple[float, float, float]
) -> None:
    districts = district_map(random_labels((12, 11, 10), seed), spacing_mm)
    volumes = {}
    for district in District:
        volume = np.full(districts.grid.shape, np.nan, dtype=np.float32)
        volume[reach(districts, district, mode="feathered", feather_mm=feather_mm)] = 0.5
        volumes[district] = np.nan_to_num(volume, nan=1e6)
    out = stitch(volumes, districts, mode="feathered", feather_mm=feather_mm)
    np.testing.assert_allclose(out[districts.labels > 0], 0.5, atol=1e-5)


@settings(deadline=None, max_examples=20)
@given(
    seed=st.integers(0, 50),
    block=st.integers(1, 9),
    feather_mm=st.sampled_from([1.0, 8.0, 20.0]),
    spacing_mm=st.sampled_from([(4.0, 4.0, 4.0), (5.0, 2.0, 1.0)]),
)
def test_the_blocks_in_which_it_is_done_leave_no_trace(
    seed: int, block: int, feather_mm: float, spacing_mm: tuple[float, float, float]
) -> None:
    districts = district_map(random_labels((12, 11, 10), seed), spacing_mm)
    rng = np.random.default_rng(seed)
    volumes = {d: rng.random(districts.grid.shape, dtype=np.float32) for d in District}
    whole = stitch(volumes, districts, mode="feathered", feather_mm=feather_mm)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stitching, "BLOCK", block)
        np.testing.assert_allclose(
            stitch(volumes, districts, mode="feathered", feather_mm=feather_mm), whole, atol=1e-6
        )


def test_distances_are_only_measured_where_districts_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = np.full((512, 48, 48), TRUNK, dtype=np.uint8)
    labels[500:] = HEAD
    districts = district_map(labels)
    measured: list[int] = []
    real = stitching.ndimage.distance_transform_edt

    def counted(target: NDArray[np.bool_], **how: object) -> NDArray[np.float64]:
        measured.append(target.size)
        return real(target, **how)

    monkeypatch.setattr(stitching.ndimage, "distance_transform_edt", counted)
    out = stitch(filled(districts, {HEAD: 1.0, TRUNK: 0.0}), districts, mode="feathered", feather_mm=16.0)
    assert 0 < out[499, 0, 0] < 0.5 < out[500, 0, 0] < 1
    assert 0 < sum(measured) < labels.size


def test_the_reach_of_hard_stitching_is_the_district() -> None:
    districts = column(2, 2, 1, 1)
    np.testing.assert_array_equal(reach(districts, HEAD, mode="hard", feather_mm=8.0), districts.mask(HEAD))


def test_no_district_gives_an_empty_body() -> None:
    districts = column(2, 2, 1)
    for mode in ("hard", "feathered"):
        assert not stitch({}, districts, mode=mode, feather_mm=8.0).any()


def test_an_unknown_mode_and_a_wrong_shape_are_refused() -> None:
    districts = column(2, 1)
    with pytest.raises(GeometryError, match="soft"):
        stitch({}, districts, mode="soft", feather_mm=8.0)
    with pytest.raises(GeometryError, match="does not fit"):
        stitch({HEAD: np.zeros((1, 1, 1), dtype=np.float32)}, districts, mode="hard", feather_mm=8.0)
