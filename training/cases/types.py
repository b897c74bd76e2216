"""A study of a cohort before preparation: where its parts lie, and what reading them gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.types import FloatVolume, Grid
from training.prepared import Diagnosis, RefusedStudy

Layout = Literal["tcia", "nifti", "nnunet"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """One FDG-PET/CT study on disk. `id` is a safe file name, the same for the same data on every machine.

    `parts` names the files of "ct" and "pet", and where there are any of "lesions", "districts", "organs".
    `patient` is a hash of the patient's ID. What "pet" holds follows from `layout`: SUV
    in the NIfTI layouts, activity with its header in DICOM.
    """

    id: str
    patient: str
    layout: Layout
    parts: Mapping[str, tuple[Path, ...]]
    diagnosis: Diagnosis = "unknown"
    age: float | None = None
    sex: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Cohort:
    """All studies of a folder, the unusable ones with the reason. `organ_names` index organ labels, 0 is none."""

    layout: Layout
    studies: tuple[Study, ...]
    refused: tuple[RefusedStudy, ...] = ()
    organ_names: tuple[str, ...] = ()
    phantom: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Labels:
    """A label map [z, y, x] on its own grid: districts 1-4, organs by the cohort's names, or lesions 0/1."""

    labels: NDArray[np.uint8]
    grid: Grid


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyVolumes:
    """A study read into memory: HU and SUV (g/ml), each on its own grid, axis-aligned LPS.

    `suv_details` tells how the SUV was computed (rule, units, factor, delay), for the record.
    """

    hu: FloatVolume
    ct_grid: Grid
    suv: FloatVolume
    pet_grid: Grid
    labels: Mapping[str, Labels] = field(default_factory=dict)  # "lesions", "districts", "organs"
    suv_details: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
