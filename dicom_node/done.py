"""One line of the log for a job that came to its good end, wherever that was found out."""

from __future__ import annotations

import structlog

from storage.errors import StorageError
from storage.ledger import Ledger

log = structlog.get_logger(__name__)


def tell_done(ledger: Ledger, job_id: str) -> None:
    """How long the series was here, and where its results went. A ledger that is busy costs the line only."""
    try:
        job, deliveries = ledger.get(job_id), ledger.deliveries(job_id)
    except StorageError as error:
        log.warning("job.done", job_id=job_id, reason=f"the rest could not be read: {error}")
        return
    log.info(
        "job.done",
        job_id=job.id,
        seconds_since_received=round((job.updated - job.created).total_seconds(), 1),
        destinations=list(dict.fromkeys(one.destination for one in deliveries)),
    )
