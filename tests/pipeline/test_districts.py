"""The built-in segmenter on phantoms whose districts are known."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest
from pydicom import Dataset

from pipeline.districts import SEGMENTERS, SegmenterUnavailable, find_districts
from pipeline.errors import DistrictError
from pipeline.geometry import grid_at_spacing
from pipeline.types import (
    CtVolume,
    District,
    DistrictMap,
    DistrictOptions,
    FloatVolume,
    Grid,
    Progress,
    SourceSeries,
    Stage,
)
from training.phantom import Phantom, PhantomSpec, make_phantom

HEAD_TO_THIGH, NECK_TO_PELVIS, CHEST, LEGS, HEAD = (0.3, 1.02), (0.45, 0.82), (0.62, 0.8), (0.0, 0.35), (0.88, 1.02)
SOURCE = SourceSeries(
    study_uid="1.2", series_uid="1.2.3", header=Dataset(), instances=(), earliest_acquisition=("", "")
)


@functools.cache
def phantom(pose: str, coverage: tuple[float, float], seed: int = 3) -> Phantom:
    spec = PhantomSpec(seed=seed, spacing_mm=(5.0, 5.0, 5.0), pose=pose, coverage=coverage)  # type: ignore[arg-type]
    return make_phantom(spec)


def volume(hu: FloatVolume, grid: Grid) -> CtVolume:
    return CtVolume(hu=hu, grid=grid, source=SOURCE)


@functools.cache
def found(pose: str, coverage: tuple[float, float], seed: int = 3) -> DistrictMap:
    body = phantom(pose, coverage, seed)
    return find_districts(volume(body.hu, body.grid), body.grid, options=DistrictOptions(chain=("builtin",)))


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return float(2 * (a & b).sum() / max(a.sum() + b.sum(), 1))


CASES = [
    ("raised", HEAD_TO_THIGH, {"head": 0.9, "trunk": 0.95, "arms": 0.8, "legs": 0.9}),
    ("sides", HEAD_TO_THIGH, {"head": 0.9, "trunk": 0.95, "arms": 0.8, "legs": 0.9}),
    ("touching", NECK_TO_PELVIS, {"trunk": 0.95, "arms": 0.8}),
    ("folded", HEAD_TO_THIGH, {"head": 0.9, "trunk": 0.9, "arms": 0.5, "legs": 0.9}),
    ("sides", LEGS, {"legs": 0.95}),
    ("sides", HEAD, {"head": 0.95}),
    ("raised", HEAD, {"head": 0.9, "arms": 0.8}),
]


@pytest.mark.parametrize(("pose", "coverage", "at_least"), CASES)
def test_districts_agree_with_the_phantom(pose: str, coverage: tuple[float, float], at_least: dict[str, float]) -> None:
    truth, result = phantom(pose, coverage), found(pose, coverage)
    scores = {d.key: dice(truth.districts == d, result.mask(d)) for d in District if d.key in at_least}
    assert all(scores[key] >= limit for key, limit in at_least.items()), scores


@pytest.mark.parametrize(("pose", "coverage", "at_least"), CASES)
def test_a_district_outside_the_field_is_absent(
    pose: str, coverage: tuple[float, float], at_least: dict[str, float]
) -> None:
    truth, result = phantom(pose, coverage), found(pose, coverage)
    share = {d: float((truth.districts == d).sum() / truth.body.sum()) for d in District}
    invented = [d for d in result.present if share[d] == 0.0]
    assert not invented


@pytest.mark.parametrize(("pose", "coverage", "at_least"), CASES[:4])
def test_the_body_is_the_patient_without_table_and_blanket(
    pose: str, coverage: tuple[float, float], at_least: dict[str, float]
) -> None:
    truth, result = phantom(pose, coverage), found(pose, coverage)
    assert dice(truth.body, result.labels > 0) >= 0.97


def test_every_present_district_has_a_confidence_and_no_other() -> None:
    result = found("touching", NECK_TO_PELVIS)
    assert set(result.confidence) == set(result.present)
    assert all(0.0 <= value <= 1.0 for value in result.confidence.values())


def test_arms_that_lie_loose_are_more_certain_than_folded_arms() -> None:
    loose, folded = found("raised", HEAD), found("folded", HEAD_TO_THIGH)
    assert loose.confidence[District.ARMS] > folded.confidence[District.ARMS] + 0.2


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_header_with_a_wrong_spacing_gives_the_same_districts(factor: float) -> None:
    body = phantom("touching", NECK_TO_PELVIS)
    z, y, x = (s * factor for s in body.grid.spacing_mm)
    grid = dataclasses.replace(body.grid, spacing_mm=(z, y, x))
    result = find_districts(volume(body.hu, grid), grid, options=DistrictOptions(chain=("builtin",)))
    assert np.mean(result.labels != found("touching", NECK_TO_PELVIS).labels) < 1e-3


def test_labels_lie_on_the_grid_that_was_asked_for() -> None:
    body = phantom("raised", HEAD)
    grid = grid_at_spacing(body.grid, (3.0, 4.0, 4.0))
    result = find_districts(volume(body.hu, body.grid), grid, options=DistrictOptions(chain=("builtin",)))
    assert result.labels.shape == grid.shape
    assert result.segmenter == "builtin"


def empty(hu: float, shape: tuple[int, int, int] = (40, 60, 60)) -> CtVolume:
    rng = np.random.default_rng(0)
    grid = Grid(shape=shape, spacing_mm=(5.0, 8.0, 8.0), origin_mm=(0.0, 0.0, 0.0), frame_of_reference_uid="1.2.3")
    return volume(rng.normal(hu, 10, shape).astype(np.float32), grid)


def test_a_volume_without_a_body_is_refused() -> None:
    ct = empty(-1000.0)
    with pytest.raises(DistrictError) as refused:
        find_districts(ct, ct.grid, options=DistrictOptions(chain=("builtin",)))
    assert refused.value.code == "no_body"


def test_an_empty_table_is_no_body() -> None:
    ct = empty(-1000.0)
    ct.hu[:, 40, 10:50] = 100.0  # a shell, one voxel thick
    with pytest.raises(DistrictError) as refused:
        find_districts(ct, ct.grid, options=DistrictOptions(chain=("builtin",)))
    assert refused.value.code == "no_body"


@pytest.mark.parametrize("shape", [(1, 40, 40), (3, 40, 40), (40, 12, 12), (2, 200, 30)])
def test_a_block_of_water_in_any_shape_never_crashes(shape: tuple[int, int, int]) -> None:
    ct = empty(0.0, shape)
    try:
        result = find_districts(ct, ct.grid, options=DistrictOptions(chain=("builtin",)))
    except DistrictError as refused:
        assert refused.code == "no_body"  # noqa: PT017
    else:
        assert result.labels.any()


def test_the_next_segmenter_runs_where_the_first_cannot_and_the_reason_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def unavailable(ct: CtVolume, grid: Grid, options: DistrictOptions) -> DistrictMap:
        raise SegmenterUnavailable("no_weights", "no weights in the folder")

    monkeypatch.setattr("pipeline.districts.SEGMENTERS", {"outside": unavailable, **SEGMENTERS})
    body = phantom("sides", HEAD)
    seen: list[Progress] = []
    result = find_districts(
        volume(body.hu, body.grid),
        body.grid,
        options=DistrictOptions(chain=("outside", "builtin")),
        on_progress=seen.append,
    )
    assert result.notes[0] == "outside: no weights in the folder"
    assert result.segmenter == "builtin"
    assert {p.stage for p in seen} == {Stage.DISTRICTS}
    assert seen[-1].done == seen[-1].total


def test_a_chain_that_names_an_unknown_segmenter_is_refused() -> None:
    ct = empty(0.0)
    with pytest.raises(DistrictError) as refused:
        find_districts(ct, ct.grid, options=DistrictOptions(chain=("magic",)))
    assert refused.value.code == "unknown_segmenter"


def test_an_empty_chain_finds_no_segmenter() -> None:
    ct = empty(0.0)
    with pytest.raises(DistrictError) as refused:
        find_districts(ct, ct.grid, options=DistrictOptions(chain=()))
    assert refused.value.code == "no_segmenter"
