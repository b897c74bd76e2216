"""Bad input through the whole pipeline: each series ends with its named reason, before any network runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from ct_factory import write_ct
from numpy.typing import NDArray
from pydicom import Dataset
from tiny_bundle import write_tiny_bundle
from tiny_study import SPACING_MM, tiny_phantom, write_tiny_study

from pipeline import run as run_module
from pipeline.bundle import ModelBundle, load_bundle
from pipeline.errors import GateRefusal, PipelineError, UnsupportedSeries
from pipeline.run import synthesize_series
from pipeline.types import GateOptions, PipelineOptions
from training.phantom import PhantomSpec, make_phantom

CREATED = datetime(2026, 1, 1, tzinfo=UTC)
FIELD = (30, 64, 64)  # of 8 mm voxels: 24 cm along the table


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> ModelBundle:
    return load_bundle(write_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny"))


@pytest.fixture
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> NoReturn:
        raise AssertionError("a network ran on input that must be refused")

    monkeypatch.setattr(run_module, "synthesize_volume", never)


def options(bundle: ModelBundle, **gate: Any) -> PipelineOptions:
    return PipelineOptions(bundle=bundle.folder, device="cpu", threads=1, gate=GateOptions(**gate))


def reason(paths: list[Path], bundle: ModelBundle, **gate: Any) -> PipelineError:
    with pytest.raises((GateRefusal, UnsupportedSeries)) as refused:
        synthesize_series(paths, bundle, options(bundle, **gate), created=CREATED)
    return refused.value


def noisy(hu: NDArray[Any]) -> NDArray[Any]:
    return np.maximum(hu + np.random.default_rng(1).normal(0, 10, hu.shape), -1024)


def cylinder(radius_mm: float, shell_mm: float = 0.0) -> NDArray[Any]:
    """Water, or muscle in a shell of fat, along the table."""
    y, x = np.meshgrid(*((np.arange(n) - (n - 1) / 2) * 8 for n in FIELD[1:]), indexing="ij")
    radius = np.broadcast_to(np.hypot(y, x), FIELD)
    hu = np.full(FIELD, -1000.0)
    hu[radius <= radius_mm] = -100 if shell_mm else 0
    if shell_mm:
        hu[radius <= radius_mm - shell_mm] = 50
        hu[radius <= 10] = 400
    return noisy(hu)


def phantom(coverage: tuple[float, float]) -> NDArray[Any]:
    return make_phantom(PhantomSpec(seed=3, spacing_mm=SPACING_MM, pose="sides", coverage=coverage)).hu


def in_eight_bits(low: float, high: float, slope: float) -> NDArray[Any]:
    """The tiny phantom stored as 0..255 between `low` and `high`, and rescaled by `slope` from `low`."""
    levels = np.rint(np.clip((tiny_phantom().hu - low) / (high - low), 0, 1) * 255)
    return levels * slope + low


Volume = Callable[[], NDArray[Any]]
BAD: dict[str, tuple[Volume, str]] = {
    "an all-air volume": (lambda: noisy(np.full(FIELD, -1000.0)), "no_body"),
    "an all-padding volume": (lambda: np.full(FIELD, -1024.0), "no_body"),
    "a water phantom": (lambda: cylinder(100), "water_phantom"),
    "an animal of 10 cm": (lambda: cylinder(50, shell_mm=16), "body_size"),
    "legs only": (lambda: phantom((0.0, 0.3)), "missing_district"),
    "a head only": (lambda: phantom((0.9, 1.02)), "missing_district"),
    "8 bits": (lambda: in_eight_bits(-1024, 1016, 8.0), "eight_bit"),
    "a window of 8 bits": (lambda: in_eight_bits(-160, 240, 1.0), "eight_bit"),
    "a rescale intercept of 0": (lambda: tiny_phantom().hu + 1024, "wrong_rescale"),
    "a rescale slope of a half": (lambda: (tiny_phantom().hu + 1024) / 2 - 1024, "wrong_rescale"),
}


@pytest.mark.usefixtures("_no_network")
@pytest.mark.parametrize("case", BAD)
def test_a_bad_volume_is_refused_by_name_before_a_network_runs(case: str, bundle: ModelBundle, tmp_path: Path) -> None:
    make, code = BAD[case]
    paths = write_ct(tmp_path, make(), spacing_mm=SPACING_MM)
    assert reason(paths, bundle).code == code


@pytest.mark.usefixtures("_no_network")
def test_one_slice_and_too_many_slices_are_refused_by_name(bundle: ModelBundle, tmp_path: Path) -> None:
    paths = write_ct(tmp_path, np.zeros((3, 8, 8)))
    assert reason(paths[:1], bundle).code == "single_slice"
    assert reason(paths * 667, bundle, max_slices=2000).text == "2001 files, at most 2000 slices are accepted"


@pytest.mark.usefixtures("_no_network")
def test_a_child_is_refused_and_its_birth_date_is_not_told(bundle: ModelBundle, tmp_path: Path) -> None:
    def born(ds: Dataset, _: int) -> None:
        ds.PatientBirthDate = "20140506"

    refused = reason(write_tiny_study(tmp_path, modify=born), bundle)
    assert refused.code == "child"
    assert "20140506" not in str(refused)  # the year alone may stand in the series UID, which is drawn at random


def test_a_check_that_holds_lets_the_result_be_made_and_held_with_its_picture(
    bundle: ModelBundle, tmp_path: Path
) -> None:
    def child(ds: Dataset, _: int) -> None:
        ds.PatientAge = "012Y"

    paths = write_tiny_study(tmp_path, modify=child)
    held = synthesize_series(paths, bundle, options(bundle, severity={"child": "hold"}), created=CREATED)
    assert held.held is not None
    assert held.held.code == "child"
    assert held.series
    assert held.overview_png.startswith(b"\x89PNG")


def test_what_is_only_noted_stands_in_the_results_notes(bundle: ModelBundle, tmp_path: Path) -> None:
    def ageless(ds: Dataset, _: int) -> None:
        del ds.PatientBirthDate

    result = synthesize_series(write_tiny_study(tmp_path, modify=ageless), bundle, options(bundle), created=CREATED)
    assert result.held is None
    assert [note.partition(":")[0] for note in result.notes[-2:]] == ["age_unknown", "no_statistics"]


def test_an_implausible_result_is_held_with_every_reason(bundle: ModelBundle, tmp_path: Path) -> None:
    told = {"trunk": {"suv_mean_range": [5.0, 6.0]}}
    strict = replace(bundle, manifest=bundle.manifest.model_copy(update={"statistics": told}))
    result = synthesize_series(write_tiny_study(tmp_path), strict, options(strict, max_lung_suv=0.01), created=CREATED)
    assert result.held is not None
    assert result.held.code == "lung_uptake"
    assert "district_uptake: the mean SUV of trunk" in result.held.text
