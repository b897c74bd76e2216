"""One study onto one grid: resampling, scaling, districts in turn, what moves with the CT, refusals."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from tiny_prepared import tiny_recipe

from pipeline.geometry import grid_at_spacing, resample, resample_image, to_sitk
from pipeline.types import Grid
from training.cases.types import Labels, StudyVolumes
from training.errors import StudyError
from training.phantom import Phantom, PhantomSpec, make_phantom
from training.preparation.statistics import pooled_statistics, study_statistics
from training.preparation.study import body_box, prepare_volumes
from training.recipe import Recipe


@cache
def phantom() -> Phantom:
    return make_phantom(PhantomSpec(seed=5, coverage=(0.45, 0.98), spacing_mm=(8.0, 8.0, 8.0), lesions=3))


def volumes(**changes: Any) -> StudyVolumes:
    """The phantom's CT and PET on one grid, its districts and lesions as labels."""
    p = phantom()
    labels = {
        "districts": Labels(labels=p.districts, grid=p.grid),
        "lesions": Labels(labels=p.lesions, grid=p.grid),
        "organs": Labels(labels=p.organs, grid=p.grid),
    }
    whole = StudyVolumes(hu=p.hu, ct_grid=p.grid, suv=p.suv, pet_grid=p.grid, labels=labels)
    return replace(whole, **changes)


def recipe(**prepare: Any) -> Recipe:
    """The PET's own grid, no registration."""
    return tiny_recipe(prepare={"spacing_mm": None, **prepare})


def moved(grid: Grid, *, x: float = 0.0, z: float = 0.0) -> Grid:
    ox, oy, oz = grid.origin_mm
    return replace(grid, origin_mm=(ox + x, oy, oz + z))


def without(name: str) -> dict[str, Labels]:
    return {key: labels for key, labels in volumes().labels.items() if key != name}


def test_arrays_are_scaled_and_cropped_to_the_body_with_a_margin() -> None:
    p, made = phantom(), prepare_volumes(volumes(), recipe(), spacing_mm=None)
    box = body_box(p.districts, 4)
    assert {name: a.dtype.name for name, a in made.arrays.items()} == {
        "ct": "float16",
        "pet": "float16",
        "districts": "uint8",
        "lesions": "uint8",
        "organs": "uint8",
    }
    np.testing.assert_allclose(made.arrays["ct"], np.clip((p.hu[box] + 1000) / 2000, 0, 1), atol=5e-4)
    np.testing.assert_allclose(made.arrays["pet"], np.clip(p.suv[box] / 20, 0, 1), atol=5e-4)
    np.testing.assert_array_equal(made.arrays["districts"], p.districts[box])
    np.testing.assert_array_equal(made.arrays["lesions"], p.lesions[box] > 0)
    np.testing.assert_array_equal(made.arrays["organs"], p.organs[box])
    assert made.grid.shape == made.arrays["ct"].shape
    corner = p.grid.affine @ [box[0].start, box[1].start, box[2].start, 1]
    np.testing.assert_allclose(made.grid.origin_mm, corner[:3])


def test_the_ct_takes_the_pet_grid_by_trilinear_interpolation() -> None:
    p = phantom()
    fine = grid_at_spacing(p.grid, (5.0, 3.0, 3.0))
    hu = resample(p.hu, p.grid, fine, fill=-1024.0)
    made = prepare_volumes(volumes(hu=hu, ct_grid=fine), recipe(), spacing_mm=None)
    assert made.grid.spacing_mm == p.grid.spacing_mm
    expected = resample(hu, fine, p.grid, fill=-1024.0)[body_box(p.districts, 4)]
    np.testing.assert_allclose(made.arrays["ct"], np.clip((expected + 1000) / 2000, 0, 1), atol=5e-4)


def test_a_spacing_in_the_recipe_resamples_both() -> None:
    made = prepare_volumes(volumes(), recipe(spacing_mm=(10.0, 10.0, 10.0)), spacing_mm=(10.0, 10.0, 10.0))
    assert made.grid.spacing_mm == (10.0, 10.0, 10.0)
    inside = made.arrays["districts"] > 0
    assert made.arrays["pet"][inside].mean() == pytest.approx(phantom().suv[phantom().body].mean() / 20, rel=0.05)


def test_scaling_by_the_volume_takes_the_whole_field_and_not_the_crop() -> None:
    hu = phantom().hu.copy()
    hu[0, 0, 0] = 3071.0  # metal outside the body's box
    made = prepare_volumes(
        volumes(hu=hu), tiny_recipe(prepare={"spacing_mm": None}, normalization={"ct_range": "volume"}), spacing_mm=None
    )
    low = float(hu.min())
    expected = (hu[body_box(phantom().districts, 4)] - low) / (3071.0 - low)
    np.testing.assert_allclose(made.arrays["ct"], expected, atol=5e-4)


def test_segmenters_are_tried_in_turn() -> None:
    own = prepare_volumes(volumes(), recipe(districts=["given", "builtin"]), spacing_mm=None)
    assert own.segmenter == "given"
    found = prepare_volumes(
        volumes(labels=without("districts")), recipe(districts=["given", "builtin"]), spacing_mm=None
    )
    assert found.segmenter.startswith("builtin")
    assert "no district labels beside the study" in found.notes
    body = phantom().body[body_box(phantom().districts, 0)]
    assert (found.arrays["districts"] > 0).sum() == pytest.approx(body.sum(), rel=0.2)  # voxels of 8 mm


def test_what_was_drawn_on_the_ct_moves_with_it_and_lesions_stay_on_the_pet() -> None:
    p = phantom()
    shift = sitk.TranslationTransform(3, (6.0, 0.0, 0.0))
    hu = resample_image(to_sitk(p.hu, p.grid), p.grid, shift.GetInverse(), fill=-1024.0)
    on_ct = moved(p.grid, x=6.0)
    labels = volumes().labels | {"districts": Labels(labels=p.districts, grid=on_ct)}
    made = prepare_volumes(volumes(hu=hu, labels=labels), recipe(registration=True), spacing_mm=None)
    assert made.registration["accepted"], made.registration
    # back where the PET is, but for voxels at the border
    box = body_box(p.districts, 4)
    assert (made.arrays["districts"] != p.districts[box]).mean() < 0.02
    np.testing.assert_array_equal(made.arrays["lesions"], p.lesions[box] > 0)
    left = prepare_volumes(volumes(hu=hu, labels=labels), recipe(registration=False), spacing_mm=None)
    assert left.registration == {}


def test_a_study_without_lesion_labels_has_none() -> None:
    made = prepare_volumes(volumes(labels=without("lesions")), recipe(), spacing_mm=None)
    assert not made.arrays["lesions"].any()


def _with_nan(values: np.ndarray) -> np.ndarray:
    broken = values.copy()
    broken[3, 3, 3] = np.nan
    return broken


def refusals() -> dict[str, tuple[StudyVolumes, Recipe]]:
    """Code of the refusal (and a word after a dash), the study, the recipe."""
    p = phantom()
    far = moved(p.grid, z=5000.0)
    nothing = np.zeros_like(p.districts)
    air = np.full_like(p.hu, -1000.0)
    other_frame = replace(p.grid, frame_of_reference_uid="1.2.826")
    return {
        "nan_voxels-ct": (volumes(hu=_with_nan(p.hu)), recipe()),
        "nan_voxels-pet": (volumes(suv=_with_nan(p.suv)), recipe()),
        "no_overlap-far": (volumes(ct_grid=far), recipe()),
        "no_overlap-edge": (volumes(ct_grid=moved(p.grid, z=p.grid.extent_mm[0] - 30.0)), recipe()),
        "frames_differ": (volumes(ct_grid=other_frame), recipe()),
        "labels_elsewhere-lesions": (
            volumes(labels=volumes().labels | {"lesions": Labels(labels=p.lesions, grid=far)}),
            recipe(),
        ),
        "labels_elsewhere-frame": (
            volumes(labels=volumes().labels | {"districts": Labels(labels=p.districts, grid=other_frame)}),
            recipe(),
        ),
        "labels_unknown": (
            volumes(labels=volumes().labels | {"districts": Labels(labels=p.districts + np.uint8(3), grid=p.grid)}),
            recipe(),
        ),
        "districts_empty-none": (volumes(labels=without("districts")), recipe(districts=["given"])),
        "districts_empty-zero": (
            volumes(labels={"districts": Labels(labels=nothing, grid=p.grid)}),
            recipe(districts=["given"]),
        ),
        "districts_empty-air": (volumes(hu=air, labels={}), recipe(districts=["given", "builtin"])),
        "spacing_differs": (
            volumes(pet_grid=replace(p.grid, spacing_mm=(8.0, 8.0, 8.2))),
            recipe(),
        ),
    }


@pytest.mark.parametrize("name", list(refusals()))
def test_a_study_that_cannot_be_used_is_refused_with_its_code(name: str) -> None:
    study, how = refusals()[name]
    with pytest.raises(StudyError) as error:
        prepare_volumes(study, how, spacing_mm=(8.0, 8.0, 8.0))
    assert error.value.code == name.split("-")[0]


def test_a_spacing_within_one_percent_is_taken_as_the_same() -> None:
    close = volumes(pet_grid=replace(phantom().grid, spacing_mm=(8.0, 8.0, 8.05)))
    assert prepare_volumes(close, recipe(), spacing_mm=(8.0, 8.0, 8.0)).grid.spacing_mm == (8.0, 8.0, 8.05)


def test_pooled_percentiles_are_those_of_the_mixture_of_studies() -> None:
    rng = np.random.default_rng(1)
    districts = np.full((40, 40, 40), 2, np.uint8)
    studies = []
    everything = []
    for center in (-50.0, 30.0, 120.0):
        hu = rng.normal(center, 20.0, districts.shape).astype(np.float32)
        suv = rng.gamma(2.0, 0.5, districts.shape).astype(np.float32)
        everything.append((hu, suv))
        studies.append(study_statistics(hu, suv, districts))
    pooled = pooled_statistics(studies)
    assert set(pooled) == {"trunk"}
    for percent, value in pooled["trunk"]["hu_percentiles"].items():
        assert value == pytest.approx(np.percentile([hu for hu, _ in everything], float(percent)), abs=3.0)
    assert pooled["trunk"]["suv_max"] == pytest.approx(max(suv.max() for _, suv in everything), abs=1e-3)
    assert pooled["trunk"]["suv_mean"] == pytest.approx(np.mean([suv for _, suv in everything]), abs=1e-3)
