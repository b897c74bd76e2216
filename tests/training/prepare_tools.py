"""Small studies as NumPy files, and a reader for them that worker processes can import."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pipeline.types import Grid
from training.cases.types import Cohort, Labels, Study, StudyVolumes
from training.errors import StudyError
from training.phantom import Phantom, PhantomSpec, make_phantom
from training.prepared import Diagnosis

DIAGNOSES: tuple[Diagnosis, ...] = ("negative", "lymphoma", "lung_cancer", "melanoma")
SPACING_MM = (10.0, 10.0, 10.0)


def small_phantom(seed: int) -> Phantom:
    return make_phantom(PhantomSpec(seed=seed, coverage=(0.45, 0.98), spacing_mm=SPACING_MM, lesions=2))


def write_study(folder: Path, number: int, phantom: Phantom, **changes: Any) -> Study:
    """One .npz with the phantom's volumes; `changes` replace arrays of it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"study-{number}.npz"
    grid = phantom.grid
    arrays = {"hu": phantom.hu, "suv": phantom.suv, "districts": phantom.districts, "lesions": phantom.lesions}
    np.savez(path, **(arrays | {"spacing": grid.spacing_mm, "origin": grid.origin_mm} | changes))
    return study_at(path)


def study_at(path: Path) -> Study:
    """The study in a file that `write_study` wrote."""
    number = int(path.stem.removeprefix("study-"))
    return Study(
        id=path.stem,
        patient=f"patient-{number}",
        layout="nifti",
        parts={"ct": (path,), "pet": (path,)},
        diagnosis=DIAGNOSES[number % len(DIAGNOSES)],
    )


def studies_of(folder: Path) -> tuple[Study, ...]:
    """All studies in a folder, as they lie there."""
    return tuple(study_at(path) for path in sorted(folder.glob("study-*.npz")))


def small_cohort(folder: Path, studies: int = 5) -> Cohort:
    """One phantom under several names: what `prepare` does does not depend on who is in it."""
    phantom = small_phantom(1)
    return Cohort(layout="nifti", studies=tuple(write_study(folder, n, phantom) for n in range(studies)), phantom=True)


def read_small(study: Study) -> StudyVolumes:
    """Read what `write_study` wrote; it says which studies were read in a file beside them."""
    path = study.parts["ct"][0]
    with (path.parent / "read.log").open("a") as log:
        log.write(f"{study.id}\n")
    with np.load(path) as stored:
        if "refuse" in stored:
            raise StudyError("suv_weight", "the patient's weight is 0")
        if "fault" in stored:
            raise ZeroDivisionError("a name that must not be stored")
        spacing, origin = (tuple(float(v) for v in stored[name]) for name in ("spacing", "origin"))
        grid = Grid(
            shape=stored["hu"].shape,
            spacing_mm=(spacing[0], spacing[1], spacing[2]),
            origin_mm=(origin[0], origin[1], origin[2]),
            frame_of_reference_uid="1.2.3",
        )
        labels = {name: Labels(labels=stored[name], grid=grid) for name in ("districts", "lesions")}
        return StudyVolumes(
            hu=stored["hu"],
            ct_grid=grid,
            suv=stored["suv"],
            pet_grid=grid,
            labels=labels,
            suv_details={"rule": "phantom"},
        )


def studies_read(folder: Path) -> list[str]:
    """The ids that were read since the last call, in order."""
    log = folder / "read.log"
    lines = log.read_text().split() if log.is_file() else []
    log.unlink(missing_ok=True)
    return lines
