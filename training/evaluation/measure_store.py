"""Rows of an evaluation kept on disk, so that an interrupted one goes on: one JSON file per study, method and seed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from training.evaluation.measure import Measure
from training.files import write_whole
from training.prepared import PreparedManifest, StudyRecord

VERSION = 1  # raised when a figure is computed in another way: rows kept before are then not taken


class MeasureStore:
    """Files named by a hash of everything that decides a row: the study's arrays, the weights and the settings.

    Without a folder nothing is kept.
    """

    def __init__(self, folder: Path | None, manifest: PreparedManifest) -> None:
        self._folder, self._manifest = folder, manifest
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def take(self, study: StudyRecord, method: str, seed: int | None, made_by: Sequence[str]) -> Measure | None:
        """A kept row; None when there is none that can be read."""
        path = self._path(study, method, seed, made_by)
        if path is None or not path.is_file():
            return None
        try:
            return Measure.model_validate_json(path.read_bytes())
        except ValidationError:  # of another version, or altered: the study is measured again
            return None

    def keep(self, row: Measure, study: StudyRecord, made_by: Sequence[str]) -> None:
        """Write a row; `made_by` are the digests of the weights and the settings that they were applied with."""
        path = self._path(study, row.method, row.seed, made_by)
        if path is not None:
            write_whole(path, row.model_dump_json().encode())

    def _path(self, study: StudyRecord, method: str, seed: int | None, made_by: Sequence[str]) -> Path | None:
        if self._folder is None:
            return None
        parts = [VERSION, self._manifest.prepare_digest, self._manifest.organ_names, study.id, study.patient]
        parts += [study.diagnosis, sorted(study.files.items()), method, seed, list(made_by)]
        return self._folder / f"{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]}.json"
