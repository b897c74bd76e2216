"""A result on disk: a folder that is complete or absent, and the summary that describes it.

    <folder>/pet-sc/0001.dcm ...   one folder per series, <kind>-<encoding>
    <folder>/mip-sc/0001.dcm
    <folder>/overview.png
    <folder>/result.json           ResultSummary

Everything is written and synced beside the target and appears there with one rename, so that a process killed at
any instant leaves either nothing or all of it, and the work can simply be done again.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, field_serializer, field_validator

from pipeline.durable import sync_folder
from pipeline.errors import OutputError
from pipeline.types import District, DistrictStats, EncodedSeries, GateFinding, Provenance, ResultSet

SUMMARY = "result.json"
OVERVIEW = "overview.png"
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*(\.[A-Za-z0-9]+)?")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


class SeriesSummary(_Frozen):
    """One result series; `folder` is relative to the result's folder."""

    kind: str
    encoding: str
    series_uid: str
    sop_class_uid: str
    instances: int
    folder: str


class ShadowRegion(_Frozen):
    """The shadow against the result in one region (the body, or a district), where both were evaluated; SUV in g/ml.

    `bias_suv` is shadow minus result, the mean over voxels; `mae_suv` the mean of its absolute value.
    """

    region: str
    volume_ml: float
    mae_suv: float
    bias_suv: float
    suv_mean: float
    shadow_suv_mean: float


class ShadowSummary(_Frozen):
    """How another bundle did on the same CT and districts. `seconds` is its wall time without the reading."""

    bundle_name: str
    bundle_version: str
    bundle_sha256: str
    seconds: float
    device: str
    regions: tuple[ShadowRegion, ...]
    notes: tuple[str, ...] = ()


class ResultSummary(_Frozen):
    """What a result is, without its pixels: for the ledger, the deliveries and the command line."""

    series: tuple[SeriesSummary, ...]
    stats: tuple[DistrictStats, ...]
    provenance: Provenance
    stage_seconds: Mapping[str, float]
    notes: tuple[str, ...] = ()
    held: GateFinding | None = None
    shadow: ShadowSummary | None = None  # added when another bundle was compared, after the result was complete

    @field_serializer("stats")
    def _districts_by_name(self, stats: tuple[DistrictStats, ...]) -> list[dict[str, Any]]:
        """A person reads the file: "head", not 1."""
        return [{**asdict(row), "district": row.district.key} for row in stats]

    @field_validator("stats", mode="before")
    @classmethod
    def _districts_from_name(cls, stats: Any) -> Any:
        rows = stats if isinstance(stats, list | tuple) else ()
        return [
            {**row, "district": _BY_KEY.get(str(row.get("district")))} if isinstance(row, dict) else row for row in rows
        ]


_BY_KEY = {district.key: district for district in District}


def summarize(result: ResultSet) -> ResultSummary:
    """The summary of a result, as `write_result` stores it."""
    return ResultSummary(
        series=tuple(_series_summary(series) for series in result.series),
        stats=result.stats,
        provenance=result.provenance,
        stage_seconds=dict(result.stage_seconds),
        notes=result.notes,
        held=result.held,
    )


def _series_summary(series: EncodedSeries) -> SeriesSummary:
    classes = {i.sop_class_uid for i in series.instances}
    if len(classes) != 1:
        raise OutputError("invalid_result", f"series {series.series_uid} has {len(classes)} SOP classes, not one")
    return SeriesSummary(
        kind=series.kind,
        encoding=series.encoding,
        series_uid=series.series_uid,
        sop_class_uid=classes.pop(),
        instances=len(series.instances),
        folder=_plain(f"{series.kind}-{series.encoding}"),
    )


def write_result(result: ResultSet, folder: Path) -> None:
    """Write a result so that `folder` is complete or absent, also after a power cut.

    A complete folder that already holds the same series stays as it is: the same UID must stay the same bytes,
    and its files may be on their way. One with other series is replaced.

    Raises:
        OutputError: the result is malformed (code invalid_result);
            or the folder cannot be written now, as on a full disk (code not_written): worth another attempt.
    """
    summary = summarize(result)
    part, old = folder.with_name(folder.name + ".tmp"), folder.with_name(folder.name + ".old")
    try:
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
        if _holds_same_series(folder, summary):
            return
        _write_folder(result, summary, part)
        if folder.exists():
            folder.rename(old)
        part.rename(folder)
        sync_folder(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)  # a full disk needs the room
        raise OutputError("not_written", f"result folder {folder.name}: {error.strerror or error}") from error


def _holds_same_series(folder: Path, summary: ResultSummary) -> bool:
    try:
        there = read_summary(folder)
    except OutputError:
        return False
    return there.series == summary.series


def _write_folder(result: ResultSet, summary: ResultSummary, folder: Path) -> None:
    folder.mkdir(parents=True)
    for entry, series in zip(summary.series, result.series, strict=True):
        (folder / entry.folder).mkdir()
        for instance in series.instances:
            _write_file(folder / entry.folder / _plain(instance.file_name), instance.data)
        sync_folder(folder / entry.folder)
    _write_file(folder / OVERVIEW, result.overview_png)
    _write_file(folder / SUMMARY, (summary.model_dump_json(indent=2) + "\n").encode())
    sync_folder(folder)


def _plain(name: str) -> str:
    """The name itself, if it can only name a file in the folder it is put in."""
    if not _PLAIN_NAME.fullmatch(name):
        raise OutputError("invalid_result", f"result file name {name!r} is not a plain name")
    return name


def _write_file(path: Path, data: bytes) -> None:
    with path.open("xb") as file:  # "x": two instances of one name are a fault, not a shorter series
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def read_summary(folder: Path) -> ResultSummary:
    """The summary of a result folder.

    Raises:
        OutputError: there is no result, or its summary cannot be read (code no_result).
    """
    try:
        return ResultSummary.model_validate_json((folder / SUMMARY).read_bytes())
    except OSError as error:
        raise OutputError("no_result", f"result folder {folder.name}: {SUMMARY}: {error.strerror}") from error
    except ValidationError as error:
        raise OutputError("no_result", f"result folder {folder.name}: {SUMMARY} is malformed") from error


def add_shadow(folder: Path, shadow: ShadowSummary) -> None:
    """Put a comparison into the summary of a complete result; nothing else in the folder changes.

    Raises:
        OutputError: there is no result (code no_result), or it cannot be written now (code not_written).
    """
    summary = read_summary(folder).model_copy(update={"shadow": shadow})
    part = folder / f"{SUMMARY}.tmp"
    try:
        part.unlink(missing_ok=True)
        _write_file(part, (summary.model_dump_json(indent=2) + "\n").encode())
        part.rename(folder / SUMMARY)
        sync_folder(folder)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OutputError("not_written", f"result folder {folder.name}: {error.strerror or error}") from error
