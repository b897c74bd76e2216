"""Prepared studies on disk: what `train prepare` writes and everything after it reads.

PREPARED/manifest.json              every study with its digests, the split, what was refused; written last
PREPARED/studies/<id>/study.json    one study's record; written last in its folder
PREPARED/studies/<id>/<array>.npy   ct, pet, districts, lesions and, where the data have them, organs
PREPARED/review.html                pictures of every study for a person to look through
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.errors import listed
from pipeline.types import Grid, LabelVolume
from training.errors import DataError
from training.files import sha256_of

MANIFEST = "manifest.json"
STUDY = "study.json"
DTYPES: Mapping[str, str] = {
    "ct": "float16",
    "pet": "float16",
    "districts": "uint8",
    "lesions": "uint8",
    "organs": "uint8",
}
Split = Literal["train", "validation", "test"]
Diagnosis = Literal["negative", "lymphoma", "lung_cancer", "melanoma", "other", "unknown"]
HalfVolume = NDArray[np.float16]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class StudyRecord(_Frozen):
    """What is known of one prepared study. `patient` is a hash of the patient's ID, never the ID.

    `shape`, `spacing_mm` and `origin_mm` (x, y, z) describe the arrays: the box around the body, axis-aligned LPS.
    """

    id: str
    patient: str
    diagnosis: Diagnosis = "unknown"
    age: float | None = None
    sex: str = ""
    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    origin_mm: tuple[float, float, float]
    files: dict[str, str]  # array name to SHA-256 of its file
    segmenter: str
    registration: dict[str, Any] = {}  # accepted, shift_mm, rotation_deg, metric before and after, the transform
    suv: dict[str, Any] = {}  # how the SUV was computed: rule, factor, units
    notes: tuple[str, ...] = ()
    split: Split = "train"

    @property
    def grid(self) -> Grid:
        """The arrays' grid."""
        return Grid(
            shape=self.shape, spacing_mm=self.spacing_mm, origin_mm=self.origin_mm, frame_of_reference_uid="1.2.3"
        )


class RefusedStudy(_Frozen):
    """A study that could not be prepared, and why."""

    study: str
    code: str
    text: str


class PreparedManifest(_Frozen):
    """The whole set. `organ_names` index the organs arrays, 0 is none."""

    format: Literal[1] = 1
    recipe: str
    prepare_digest: str  # of the recipe's normalization, prepare and split
    layout: str
    phantom: bool = False  # the cohort says of itself that it was computed
    spacing_mm: tuple[float, float, float]
    organ_names: tuple[str, ...] = ()
    studies: tuple[StudyRecord, ...]
    refused: tuple[RefusedStudy, ...] = ()
    statistics: dict[str, Any] = {}  # of the training studies, per district; goes into the bundle's manifest

    @property
    def digest(self) -> str:
        """SHA-256 of everything: the same data prepared in the same way."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    @property
    def split_digest(self) -> str:
        """SHA-256 of which study is on which side."""
        sides = sorted((study.id, study.split) for study in self.studies)
        return hashlib.sha256(json.dumps(sides).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedStudy:
    """One study's volumes, mapped and not read, [z, y, x].

    `ct` and `pet` are scaled to [0, 1] in half precision (1/2048 of the range is 1 HU) and not masked: what lies
    outside the body (`districts` 0) is the reader's to set to air. `lesions` is 0 or 1.
    """

    record: StudyRecord
    ct: HalfVolume
    pet: HalfVolume
    districts: LabelVolume
    lesions: LabelVolume
    organs: LabelVolume | None = None

    @property
    def id(self) -> str:
        return self.record.id


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedSet:
    """An opened folder."""

    folder: Path
    manifest: PreparedManifest

    def studies(self, split: Split) -> list[StudyRecord]:
        """The records of one side of the split, by id."""
        return sorted((s for s in self.manifest.studies if s.split == split), key=lambda s: s.id)

    def load(self, record: StudyRecord) -> PreparedStudy:
        """Map one study's arrays."""
        folder = self.folder / "studies" / record.id
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in record.files}
        return PreparedStudy(record=record, **arrays)

    def load_split(self, split: Split) -> list[PreparedStudy]:
        """Map all studies of one side."""
        return [self.load(record) for record in self.studies(split)]


def open_prepared(folder: Path, *, verify: bool = True) -> PreparedSet:
    """Read the manifest and check that every array file is the one that it names.

    Args:
        folder: what `train prepare` wrote.
        verify: also read every file and compare its SHA-256; without it only shapes and types are compared.

    Raises:
        DataError: prepared_missing (not finished or not there), prepared_invalid, prepared_altered.
    """
    path = folder / MANIFEST
    try:
        manifest = PreparedManifest.model_validate_json(path.read_bytes())
    except OSError as error:
        text = f"{folder}: {MANIFEST} cannot be read ({error.strerror}); run `dicom-node train prepare` to its end"
        raise DataError("prepared_missing", text) from error
    except ValidationError as error:
        raise DataError("prepared_invalid", f"{path}: {listed(error, 3)}") from error
    for record in manifest.studies:
        _check_study(folder / "studies" / record.id, record, verify=verify)
    return PreparedSet(folder=folder, manifest=manifest)


def _check_study(folder: Path, record: StudyRecord, *, verify: bool) -> None:
    if missing := {"ct", "pet", "districts", "lesions"} - set(record.files):
        raise DataError("prepared_invalid", f"study {record.id}: no {sorted(missing)} among its files")
    if unknown := sorted(set(record.files) - set(DTYPES)):
        raise DataError("prepared_invalid", f"study {record.id}: {unknown} among its files, {sorted(DTYPES)} are known")
    for name, digest in record.files.items():
        path = folder / f"{name}.npy"
        try:
            array = np.load(path, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise DataError("prepared_altered", f"study {record.id}: {path.name} cannot be read: {error}") from error
        if array.shape != record.shape or array.dtype != DTYPES[name]:
            text = f"study {record.id}: {path.name} is {array.dtype} {array.shape}"
            raise DataError("prepared_altered", f"{text}, the manifest says {DTYPES[name]} {record.shape}")
        if verify and sha256_of(path) != digest:
            text = f"study {record.id}: {path.name} is not the file that was prepared (SHA-256 differs)"
            raise DataError("prepared_altered", f"{text}; prepare this study again")


def patients(records: Iterable[StudyRecord]) -> int:
    """How many different patients."""
    return len({record.patient for record in records})
