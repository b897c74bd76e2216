"""A second bundle on a finished job's volumes: compared where both were evaluated, stored beside the result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydicom import Dataset
from tiny_bundle import write_tiny_bundle

from pipeline import shadow as shadow_module
from pipeline.bundle import ModelBundle, load_bundle
from pipeline.device import Compute
from pipeline.errors import OutputError
from pipeline.result import ShadowSummary, add_shadow, read_summary
from pipeline.run import choose_networks, synthesize_volume
from pipeline.shadow import compare_shadow
from pipeline.types import (
    CtVolume,
    District,
    DistrictMap,
    Grid,
    JobVolumes,
    PipelineOptions,
    SourceSeries,
    SuvVolume,
)

ON_CPU = Compute(device=torch.device("cpu"), precision="fp32", batch=8)
SHAPE = (30, 20, 24)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> ModelBundle:
    return load_bundle(write_tiny_bundle(tmp_path_factory.mktemp("a") / "tiny"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> ModelBundle:
    return load_bundle(write_tiny_bundle(tmp_path_factory.mktemp("b") / "tiny", seed=40))


def job_of(bundle: ModelBundle, *, not_evaluated: tuple[District, ...] = ()) -> JobVolumes:
    """Trunk over legs in air at 8 mm, and the result of `bundle` on it."""
    grid = Grid(shape=SHAPE, spacing_mm=(8, 8, 8), origin_mm=(0, 0, 0), frame_of_reference_uid="1.2")
    labels = np.zeros(SHAPE, dtype=np.uint8)
    labels[2:14, 4:16, 4:18] = District.LEGS
    labels[14:28, 4:16, 4:18] = District.TRUNK
    hu = np.where(labels > 0, np.random.default_rng(1).normal(40, 60, SHAPE), -1000).astype(np.float32)
    sure = {District.TRUNK: 1.0, District.LEGS: 1.0}
    districts = DistrictMap(labels=labels, grid=grid, segmenter="t", version="1", confidence=sure)
    networks, _ = choose_networks(districts, bundle.keys, PipelineOptions(bundle=bundle.folder))
    networks = {d: key for d, key in networks.items() if d not in not_evaluated}
    unit = synthesize_volume(bundle.manifest.normalization.ct_to_unit(hu), districts, networks, bundle, compute=ON_CPU)
    suv = SuvVolume(suv=bundle.manifest.normalization.unit_to_suv(unit), grid=grid, not_evaluated=not_evaluated)
    source = SourceSeries(
        study_uid="1.2", series_uid="1.2.3", header=Dataset(), instances=(), earliest_acquisition=("", "")
    )
    ct = CtVolume(hu=hu, grid=grid, source=source)
    return JobVolumes(ct=ct, hu=hu, districts=districts, suv=suv)


def compared(volumes: JobVolumes, bundle: ModelBundle, **changes: Any) -> ShadowSummary:
    return compare_shadow(volumes, bundle, PipelineOptions(bundle=Path("x"), **changes), compute=ON_CPU)


def test_a_bundle_agrees_with_itself(bundle: ModelBundle) -> None:
    summary = compared(job_of(bundle), bundle)
    assert [one.region for one in summary.regions] == ["body", "trunk", "legs"]
    for one in summary.regions:
        assert (one.mae_suv, one.bias_suv) == (0, 0)
        assert one.suv_mean == one.shadow_suv_mean > 0
    assert summary.bundle_sha256 == bundle.manifest_sha256
    assert summary.seconds > 0


def test_the_figures_of_another_bundle_are_shadow_minus_result(bundle: ModelBundle, other: ModelBundle) -> None:
    volumes = job_of(bundle)
    theirs = job_of(other).suv.suv
    for one in compared(volumes, other).regions:
        mask = volumes.districts.labels > 0
        if one.region != "body":
            mask = volumes.districts.mask(District[one.region.upper()])
        difference = theirs[mask].astype(np.float64) - volumes.suv.suv[mask]
        assert one.mae_suv == pytest.approx(np.abs(difference).mean(), abs=1e-5)
        assert one.bias_suv == pytest.approx(difference.mean(), abs=1e-5)
        assert one.bias_suv == pytest.approx(one.shadow_suv_mean - one.suv_mean, abs=1e-5)
        assert one.volume_ml == pytest.approx(mask.sum() * 0.512)


def test_a_district_that_was_not_evaluated_is_not_compared(bundle: ModelBundle, other: ModelBundle) -> None:
    volumes = job_of(bundle, not_evaluated=(District.LEGS,))
    assert [one.region for one in compared(volumes, other).regions] == ["body", "trunk"]
    body = compared(volumes, other).regions[0]
    assert body.volume_ml == pytest.approx(volumes.districts.mask(District.TRUNK).sum() * 0.512)


def test_the_resampled_ct_is_used_again_where_the_spacing_is_the_same(
    bundle: ModelBundle, other: ModelBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    volumes = job_of(bundle)

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("resampled")

    monkeypatch.setattr(shadow_module, "resample", never)
    assert compared(volumes, other).regions


def test_a_shadow_on_another_grid_is_brought_back_to_the_result_s(bundle: ModelBundle, tmp_path: Path) -> None:
    coarse = load_bundle(write_tiny_bundle(tmp_path / "coarse", spacing_mm=10.0))
    summary = compared(job_of(bundle), coarse)
    assert [one.region for one in summary.regions] == ["body", "trunk", "legs"]
    assert all(one.shadow_suv_mean > 0 and np.isfinite(one.mae_suv) for one in summary.regions)


def test_a_shadow_s_own_doubts_are_notes(bundle: ModelBundle, other: ModelBundle) -> None:
    summary = compared(job_of(bundle), other, min_confidence=1.5)
    assert any("whole-body network" in note for note in summary.notes)


def test_figures_without_a_result_have_no_place(bundle: ModelBundle, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no_result"):
        add_shadow(tmp_path, compared(job_of(bundle), bundle))
    assert not list(tmp_path.iterdir())
    with pytest.raises(OutputError):
        read_summary(tmp_path)
