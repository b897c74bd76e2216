"""A cohort as it is written in each layout is the cohort that is read: SUV, lesions, districts, who and what."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest

from pipeline.geometry import resample
from training.cases import Cohort, Layout, find_studies, read_study
from training.cases.ids import patient_hash
from training.phantom.cohort import write_cohort
from training.phantom.layouts import Scanned, paint_study
from training.phantom.plan import PlannedStudy, plan_cohort

CASES, SPACING, CT_PIXEL_MM = 2, (8.0, 8.0, 8.0), 4.0
LAYOUTS: tuple[Layout, ...] = get_args(Layout)


@pytest.fixture(scope="module")
def plans() -> list[PlannedStudy]:
    return plan_cohort(CASES, 1000, SPACING)


@pytest.fixture(scope="module")
def painted(plans: list[PlannedStudy]) -> Scanned:
    """The first study with lesions."""
    return paint_study(next(plan for plan in plans if plan.lesions), CT_PIXEL_MM)


@pytest.fixture(scope="module", params=LAYOUTS)
def cohort(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    out = tmp_path_factory.mktemp(request.param)
    write_cohort(out, cases=CASES, layout=request.param, spacing_mm=SPACING, ct_pixel_mm=CT_PIXEL_MM, workers=1)
    found = find_studies(out)
    assert found.layout == request.param
    return found


def test_every_study_is_found_with_its_diagnosis(cohort: Cohort, plans: list[PlannedStudy]) -> None:
    assert cohort.phantom
    assert cohort.refused == ()
    found = sorted((s.diagnosis, s.age, s.sex) for s in cohort.studies)
    assert found == sorted((p.diagnosis, float(p.age_years), p.sex) for p in plans)
    assert len({s.patient for s in cohort.studies}) == len({p.subject for p in plans})


def test_suv_lesions_and_districts_are_those_of_the_phantom(cohort: Cohort, painted: Scanned) -> None:
    prefix = {"tcia": "PETCT_", "nifti": "PETCT_", "nnunet": "fdg_"}[cohort.layout]
    patient = patient_hash(f"{prefix}{painted.plan.subject}")
    candidates = [read_study(s) for s in cohort.studies if s.patient == patient]
    truth = painted.phantom
    (read,) = (c for c in candidates if c.suv.shape == truth.suv.shape)
    np.testing.assert_allclose(read.pet_grid.origin_mm, truth.grid.origin_mm, atol=2e-3)
    bright = truth.suv > 1
    np.testing.assert_allclose(read.suv[bright], truth.suv[bright], rtol=1e-3)
    np.testing.assert_allclose(read.suv, truth.suv, atol=1e-3)
    for name, expected in (("lesions", truth.lesions > 0), ("districts", truth.districts)):
        labels = read.labels[name]
        on_pet = resample(labels.labels, labels.grid, read.pet_grid, fill=0, nearest=True)
        np.testing.assert_array_equal(on_pet, expected, err_msg=name)
    if cohort.layout != "nnunet":  # there the CT is on the PET's grid, by a spline
        np.testing.assert_allclose(read.ct_grid.origin_mm, painted.ct_grid.origin_mm, atol=2e-3)
        np.testing.assert_array_equal(read.hu, np.clip(painted.hu, -1024, 3071))
    if cohort.layout == "nifti":
        np.testing.assert_array_equal(read.labels["organs"].labels, truth.organs)
        names = cohort.organ_names
        assert names[1:] == truth.organ_names[1 : len(names)]
