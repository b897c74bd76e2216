"""Prepared studies on disk while `prepare` works: what is done already, what is written, whether it will fit."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import nibabel
import numpy as np
import pydicom
from nibabel.filebasedimages import ImageFileError
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError
from pydicom.errors import InvalidDicomError

from training.cases.types import Cohort, Study
from training.errors import DataError
from training.files import sha256_of, write_whole
from training.prepared import DTYPES, MANIFEST, STUDY, PreparedManifest, StudyRecord
from training.recipe import Recipe

LOCK = ".prepare.lock"
BYTES_PER_VOXEL = 2 + 2 + 1 + 1  # CT, PET, districts, lesions
BODY_SHARE = 0.4  # of the PET's field that the body's box fills: 0.45 to 0.8 of a phantom's 500 mm, less of 700 mm
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class StudyFile(BaseModel):
    """study.json: the record, and what it was made from and how, to know whether it must be made again."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    prepare_digest: str
    input_digest: str
    record: StudyRecord
    statistics: dict[str, Any] = {}


class WriteFailed(Exception):
    """A file of OUT could not be written. `code` is no_space or cannot_write."""

    def __init__(self, error: OSError) -> None:
        super().__init__(error)
        self.code = "no_space" if error.errno in _FULL else "cannot_write"
        self.reason = error.strerror or type(error).__name__


def input_digest(study: Study) -> str:
    """SHA-256 over kind, name, size and time of change of a study's files. Raises OSError if one is gone."""
    digest = hashlib.sha256()
    for kind in sorted(study.parts):
        for path in sorted(study.parts[kind]):
            stat = path.stat()
            digest.update(f"{kind}|{path.name}|{stat.st_size}|{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def read_finished(folder: Path, *, prepare_digest: str, inputs: str) -> StudyFile | None:
    """The study in `folder` if it was made of the same files in the same way and every array is whole."""
    try:
        found = StudyFile.model_validate_json((folder / STUDY).read_bytes())
        same = (found.prepare_digest, found.input_digest) == (prepare_digest, inputs)
        whole = same and all(sha256_of(folder / f"{name}.npy") == sha for name, sha in found.record.files.items())
    except (OSError, ValidationError):
        return None
    return found if whole else None


def write_arrays(folder: Path, arrays: Mapping[str, NDArray[Any]]) -> dict[str, str]:
    """Write every array into a fresh `folder`; returns name to SHA-256. Raises WriteFailed."""
    shutil.rmtree(folder, ignore_errors=True)
    digests = {}
    for name, array in arrays.items():
        buffer = io.BytesIO()
        np.save(buffer, array.astype(DTYPES[name], copy=False), allow_pickle=False)
        write_bytes(folder / f"{name}.npy", buffer.getvalue())
        digests[name] = hashlib.sha256(buffer.getvalue()).hexdigest()
    return digests


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """One `prepare` at a time in a folder, which is made if need be. The lock ends with the process.

    Raises:
        DataError: cannot_write, prepared_busy.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / LOCK).open("wb")
    except OSError as error:
        raise DataError("cannot_write", f"{out}: cannot be written ({error.strerror}); name another folder") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DataError("prepared_busy", f"{out}: another `train prepare` is at work in this folder") from error
        yield


def read_manifest(out: Path) -> PreparedManifest | None:
    """The manifest of an earlier, finished `prepare` in this folder; None if there is none that can be read."""
    try:
        return PreparedManifest.model_validate_json((out / MANIFEST).read_bytes())
    except (OSError, ValidationError):
        return None


def check_not_foreign(out: Path, recipe: Recipe) -> None:
    """Refuse a folder that holds studies prepared in another way, or something else altogether.

    Raises:
        DataError: prepared_foreign.
    """
    text = f"choose another --out, or delete the folder: recipe {recipe.name!r} prepares differently"
    for path in [out / MANIFEST, *sorted(out.glob(f"studies/*/{STUDY}"))]:
        try:
            digest = json.loads(path.read_bytes())["prepare_digest"]
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError) as error:
            if path.name == STUDY:  # a broken study is prepared again
                continue
            raise DataError("prepared_foreign", f"{path}: not a manifest of prepared studies; {text}") from error
        if digest != recipe.prepare_digest:
            raise DataError("prepared_foreign", f"{path}: of another recipe ({str(digest)[:12]}); {text}")


def check_space(out: Path, cohort: Cohort, recipe: Recipe) -> None:
    """Refuse before the work what will not fit on the disk.

    Raises:
        DataError: no_space.
    """
    waiting = [s for s in cohort.studies if not (out / "studies" / s.id / STUDY).is_file()]
    needed = BODY_SHARE * sum(BYTES_PER_VOXEL * expected_voxels(s, recipe.prepare.spacing_mm) for s in waiting)
    free = shutil.disk_usage(out).free
    if needed > free:
        text = f"{out}: {len(waiting)} studies need about {needed / 1e6:,.0f} MB, {free / 1e6:,.0f} MB are free"
        raise DataError("no_space", f"{text}; free some, or name a folder on another disk")


def expected_voxels(study: Study, spacing_mm: Sequence[float] | None) -> int:
    """Voxels of a study's grid before the crop, from the PET's headers; 0 where they cannot be read."""
    paths = study.parts.get("pet", ())
    if not paths:
        return 0
    try:
        shape, steps = _nifti_size(paths[0]) if paths[0].name.endswith((".nii", ".nii.gz")) else _dicom_size(paths)
    except (OSError, ValueError, AttributeError, TypeError, ImageFileError, InvalidDicomError):
        return 0  # reading it will refuse this study by name
    if spacing_mm is None:
        return math.prod(shape)
    return int(math.prod(n * s for n, s in zip(shape, steps, strict=True)) / math.prod(spacing_mm))


def _nifti_size(path: Path) -> tuple[tuple[int, ...], tuple[float, ...]]:
    header: Any = nibabel.load(path).header
    return tuple(header.get_data_shape()[:3]), tuple(float(z) for z in header.get_zooms()[:3])


def _dicom_size(paths: Sequence[Path]) -> tuple[tuple[int, ...], tuple[float, ...]]:
    tags = ["Rows", "Columns", "PixelSpacing", "SliceThickness", "NumberOfFrames"]
    ds = pydicom.dcmread(paths[0], stop_before_pixels=True, specific_tags=tags)
    slices = int(ds.get("NumberOfFrames") or len(paths))
    rows, columns = (float(s) for s in ds.get("PixelSpacing") or (4.0, 4.0))
    return (slices, int(ds.Rows), int(ds.Columns)), (float(ds.get("SliceThickness") or 4.0), rows, columns)


def remove_study(out: Path, name: str) -> None:
    """Take away what is left of a study that is refused now."""
    shutil.rmtree(out / "studies" / name, ignore_errors=True)


def write_bytes(path: Path, data: bytes) -> None:
    """A whole file: study.json, the manifest, the page and its pictures. Raises WriteFailed."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, data)
    except OSError as error:
        path.with_name(path.name + ".tmp").unlink(missing_ok=True)
        raise WriteFailed(error) from error
