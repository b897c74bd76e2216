"""What the spool knows and the ledger does not: jobs of a ledger that was restored from a backup, or begun anew.

The worker keeps beside each job what it is (`Spool.keep_job`), so that it comes back under its own id, with the time
that the instances of its result carry: what was sent before is sent again as the same bytes under the same UIDs.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import structlog

from dicom_node.headers import BadInstance, read_header
from dicom_node.incoming import series_info
from storage.errors import LedgerDamaged, NoSpace, StorageError
from storage.ledger import Ledger
from storage.records import FINAL_JOB_STATES, REJECTION, Job, JobState, SeriesInfo
from storage.spool import Spool

log = structlog.get_logger()

ADOPTED = "adopted"  # event and reason code of a job that was found in the spool
_UNKNOWN_JOB = "the ledger did not know this job: it was restored from a backup, or begun anew"
_WAS_CANCELLED = "an operator cancelled it"
_NOT_KEPT = frozenset({"progress", "stage_seconds", "stats", "provenance", "notes", "result_series", "shadow"})


def facts_of(job: Job, **details: Any) -> Mapping[str, Any]:
    """What is kept of a job beside its files; `details` are those that the run adds."""
    kept = {key: value for key, value in job.details.items() if key not in _NOT_KEPT}
    return {
        "info": asdict(job.info),
        "created": job.created.isoformat(),
        "supersedes": job.supersedes,
        "source_digest": job.source_digest,
        "instances": job.instances,
        "details": {**kept, **details},
    }


def cancel(ledger: Ledger, spool: Spool, job_id: str) -> Job:
    """Cancel a job for a person, and say so beside its files: a ledger that is restored shall not deliver it.

    Raises as `Ledger.cancel`. Without room for the file the job is cancelled all the same.
    """
    with suppress(NoSpace, OSError):
        spool.keep_cancelled(job_id, facts_of(ledger.get(job_id)))
    try:
        return ledger.cancel(job_id)
    except StorageError:
        if ledger.get(job_id).state is not JobState.CANCELLED:
            spool.forget_cancelled(job_id)
        raise


def retry(ledger: Ledger, spool: Spool, job_id: str, *, rerun: bool = False) -> Job:
    """`Ledger.retry` of a job that may have been cancelled: from here on it is not. Raises as that."""
    was = spool.kept_cancelled(job_id)
    spool.forget_cancelled(job_id)
    try:
        return ledger.retry(job_id, rerun=rerun)
    except StorageError:
        if was:
            spool.keep_cancelled(job_id, was)
        raise


def cancel_again(ledger: Ledger, spool: Spool) -> list[str]:
    """Cancel what a person had cancelled and the ledger, of an earlier day, would go on with. Returns the ids.

    Call it at start, after `adopt_unknown` and before anything runs or is sent.
    """
    kept = spool.cancelled_ids()
    open_ = [
        job_id
        for job_id in sorted(set(kept) - ledger.unknown(kept))
        if ledger.get(job_id).state not in FINAL_JOB_STATES
    ]
    for job_id in open_:
        ledger.move(job_id, JobState.CANCELLED, code="cancelled", text=f"{_WAS_CANCELLED} before the ledger's restore")
        log.warning("job.cancelled_again", job_id=job_id)
    return open_


def adopt_unknown(ledger: Ledger, spool: Spool) -> list[str]:
    """Open the jobs whose input or result lies in the spool, and which the ledger does not know. Returns their ids.

    Call it at start, before the assembler and the worker look. One that cannot be read is left for retention.
    """
    adopted = []
    job_ids = spool.job_ids()
    unknown = ledger.unknown(job_ids)
    for job_id in (one for one in job_ids if one in unknown):
        try:
            state = _adopt(ledger, spool, job_id)
        except LedgerDamaged:
            raise
        except (StorageError, BadInstance, OSError, ValueError, TypeError, KeyError) as error:
            log.error("job.not_adopted", job_id=job_id, reason=type(error).__name__)
            continue
        if state is not None:
            adopted.append(job_id)
            log.warning("job.adopted", job_id=job_id, state=state.value)
    return adopted


def _adopt(ledger: Ledger, spool: Spool, job_id: str) -> JobState | None:
    """The state of the job as it is opened now; None where there is nothing to go on with."""
    files, has_result = spool.ct_files(job_id), spool.has_result(job_id)
    cancelled = spool.kept_cancelled(job_id)
    facts = cancelled or spool.kept_job(job_id)
    if facts and (files or has_result):
        to, text = JobState.QUEUED, f"{_UNKNOWN_JOB}; it goes on where its files are"
        if cancelled:
            to, text = JobState.CANCELLED, f"{_UNKNOWN_JOB}; {_WAS_CANCELLED}"
        elif any(spool.result_folder(job_id).glob(f"{REJECTION}-*")):
            to, text = JobState.HELD, f"{_UNKNOWN_JOB}; its result was taken back: look before you release it"
        ledger.adopt_job(
            job_id,
            SeriesInfo(**facts["info"]),
            to,
            code=ADOPTED,
            text=text,
            created=datetime.fromisoformat(facts["created"]),
            supersedes=facts["supersedes"],
            source_digest=facts["source_digest"],
            instances=facts["instances"],
            details=facts["details"],
        )
        return to
    if not files:
        return None
    header = read_header(files[0])
    if _is_of_another(ledger, spool, header.series_uid, files):
        return None  # the half of a job that was to be computed again: its first attempt is known
    calling_ae, address = spool.sender_of_job(job_id)
    ledger.adopt_job(
        job_id,
        series_info(header, calling_ae=calling_ae, address=address),
        JobState.RECEIVING,
        code=ADOPTED,
        text=f"{_UNKNOWN_JOB}; it is decided upon anew",
    )
    return JobState.RECEIVING


def _is_of_another(ledger: Ledger, spool: Spool, series_uid: str, files: list[Path]) -> bool:
    names = {path.name for path in files}
    return any(names <= {path.name for path in spool.ct_files(job.id)} for job in ledger.jobs_of_series(series_uid))
