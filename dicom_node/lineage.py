"""How the jobs of one series hang together: what a result was asked to be, and which series are out already."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import datetime
from typing import Any

from pipeline.types import PipelineOptions
from storage.errors import NotFound
from storage.ledger import Ledger
from storage.records import Job

RECALLED = "recalled"  # in a job's details: its result was taken back, and it stands in nobody's way
RECALLED_AT = "recalled_at"  # in a job's details: the destinations where it was taken back, not everywhere
RERUN = "rerun"  # in a job's details: why the result of the job that it supersedes was computed again
WRITTEN = "written"  # in a job's details: the time that the instances of its result carry

OTHER_SERIES = "other_series"  # the reason of a job whose result, computed in place, was not the series that it sent
SAME_AS = "same_as"  # in a job's details: the job whose series its result turned out to be, so that it was not sent


def asked_for(options: PipelineOptions) -> dict[str, Any]:
    """The options that decide what is in a result, as the ledger keeps them with it."""
    kept = {
        "precision": options.precision,
        "blending": options.blending,
        "stitching": options.stitching,
        "districts": options.districts.chain,
        "nnunet_folder": options.districts.nnunet_folder,
        "min_confidence": options.min_confidence,
        "low_confidence": options.low_confidence,
        **asdict(options.output),
    }
    del kept["test"]  # the study's, and nobody asks for it
    plain: dict[str, Any] = json.loads(json.dumps(kept, default=str))
    return plain


def result_uids(job: Job) -> set[str]:
    """The series UIDs of a job's result; none before it has one."""
    return {str(series["series_uid"]) for series in job.details.get("result_series") or ()}


def written_at(job: Job) -> datetime | None:
    """The time that the instances of its result carry; None before a run of it began, or of an older version."""
    told = job.details.get(WRITTEN)
    return datetime.fromisoformat(told) if told else None


def superseded_by(ledger: Ledger, job: Job) -> list[Job]:
    """The jobs that `job` supersedes, directly or not, the latest first."""
    found: list[Job] = []
    seen, earlier = {job.id}, job.supersedes
    while earlier and earlier not in seen:
        seen.add(earlier)
        try:
            found.append(ledger.get(earlier))
        except NotFound:
            break
        earlier = found[-1].supersedes
    return found


def series_out(ledger: Ledger, job: Job) -> dict[str, str]:
    """Series UID -> the job whose series it is, of the results that `job` supersedes or that were recalled.

    A result that turns out to be one of these is the same series: its bytes are in the archive, or were taken back,
    and must not be sent from here.
    """
    recalled = [one for one in ledger.jobs_of_series(job.info.series_uid) if RECALLED in one.details]
    others = [one for one in (*recalled, *superseded_by(ledger, job)) if one.id != job.id]
    return {uid: one.id for one in others for uid in result_uids(one)}
