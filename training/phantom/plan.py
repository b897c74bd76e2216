"""Who is in a cohort: patients, their studies, diagnoses and lesions, before anything is painted.

Everything about patient number p follows from (seed, p): a longer cohort begins with the shorter one's patients.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

import numpy as np

from training.phantom.paint import draw_person
from training.phantom.spec import Disease, PhantomSpec

Diagnosis = Literal["negative", "lymphoma", "lung_cancer", "melanoma"]
REPEAT_EVERY = 8  # one patient in eight comes twice: 12 %, as 1,014 published studies are of 900 patients
BLOCK = 8  # patients whose diagnoses are balanced: small cohorts have all of them
SICK: tuple[Diagnosis, ...] = ("lymphoma", "lung_cancer", "melanoma")
SICK_SHARES = (0.29, 0.33, 0.38)  # of 501 published positive studies
MOST_LESIONS = 10
PATIENTS_PER_SEED = 10_000  # cohorts of different seeds share no person
DESCRIPTION = "PET-CT PHANTOM whole body"
FIRST_DAY = datetime(2004, 1, 1, 8, 0)  # published dates are shifted too


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedStudy:
    """One study to be painted. `index` counts from 0, `visit` is 0 or 1, `lesions` is 0 for negatives."""

    index: int
    patient: int
    visit: int
    diagnosis: Diagnosis
    lesions: int
    sex: Literal["F", "M"]
    age_years: int
    scanned: datetime
    spec: PhantomSpec  # spacing is the PET's

    @property
    def subject(self) -> str:
        """Ten hexadecimal digits, the patient's name in the published data."""
        return hashlib.sha256(f"phantom patient {self.spec.seed}".encode()).hexdigest()[:10]


def plan_cohort(cases: int, seed: int, spacing_mm: tuple[float, float, float]) -> list[PlannedStudy]:
    """The first `cases` studies of the cohort `seed`."""
    studies: list[PlannedStudy] = []
    for study in _studies(seed, spacing_mm):
        if len(studies) == cases:
            break
        studies.append(study)
    return studies


def _studies(seed: int, spacing_mm: tuple[float, float, float]) -> Iterator[PlannedStudy]:
    index = 0
    for patient in range(PATIENTS_PER_SEED):
        rng = np.random.default_rng([seed, 21, patient])
        person_seed = seed * PATIENTS_PER_SEED + patient
        diagnosis = _diagnosis(seed, patient)
        female = draw_person(PhantomSpec(seed=person_seed)).female
        age = int(np.clip(rng.normal(60, 15), 18, 92))
        fov_mm = float(rng.choice([500.0, 600.0]))
        scanned = FIRST_DAY + timedelta(days=int(rng.integers(0, 3000)), minutes=int(rng.integers(0, 540)))
        for visit in range(2 if patient % REPEAT_EVERY == 2 else 1):
            if visit:
                scanned += timedelta(days=int(rng.integers(60, 330)), minutes=int(rng.integers(-30, 30)))
            lesions = 0 if diagnosis == "negative" else int(rng.integers(1, MOST_LESIONS + 1))
            disease: Disease = "mixed" if diagnosis == "negative" else diagnosis
            yield PlannedStudy(
                index=index,
                patient=patient,
                visit=visit,
                diagnosis=diagnosis,
                lesions=lesions,
                sex="F" if female else "M",
                age_years=age,
                scanned=scanned,
                spec=PhantomSpec(
                    seed=person_seed,
                    visit=visit,
                    spacing_mm=spacing_mm,
                    fov_mm=fov_mm,
                    lesions=lesions,
                    disease=disease,
                ),
            )
            index += 1


def _diagnosis(seed: int, patient: int) -> Diagnosis:
    """Half negative; the rest as in the published data, in shuffled blocks."""
    rng = np.random.default_rng([seed, 22, patient // BLOCK])
    extra = SICK[int(rng.choice(len(SICK), p=SICK_SHARES))]
    well: list[Diagnosis] = ["negative"] * (BLOCK - len(SICK) - 1)
    block = [*well, *SICK, extra]
    return block[int(rng.permutation(BLOCK)[patient % BLOCK])]
