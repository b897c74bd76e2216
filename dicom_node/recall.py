"""Recalling the results of a model: which there are and where, and the notes that ask archives to hide them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from dicom_node.lineage import RECALLED, RECALLED_AT
from storage.errors import IllegalMove
from storage.ledger import Ledger, utc_now
from storage.records import REJECTION, Delivery, Job, JobFilter, JobState
from storage.spool import Spool

if TYPE_CHECKING:
    from pipeline.outputs.rejection_note import RejectionReason

MANY = 1_000_000  # all of them
CODE = "recalled"


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """The result of one job, where its series went, and the notes about them."""

    job: Job
    deliveries: tuple[Delivery, ...]

    @property
    def series(self) -> tuple[Delivery, ...]:
        return tuple(delivery for delivery in self.deliveries if delivery.kind != REJECTION)

    @property
    def notes(self) -> tuple[Delivery, ...]:
        return tuple(delivery for delivery in self.deliveries if delivery.kind == REJECTION)

    @property
    def bundle(self) -> str:
        made_by = self.job.details["provenance"]
        return f"{made_by['bundle_name']} {made_by['bundle_version']}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Recalled:
    """What became of one result: `notes` opened now, or why it could not be rejected, or not wholly."""

    result: Result
    notes: int = 0
    fault: str = ""


def results_of(
    ledger: Ledger, name: str, version: str = "", *, since: datetime | None = None, until: datetime | None = None
) -> list[Result]:
    """Every result that a bundle made, in one version or all, newest first; `since` and `until` of the job's opening.

    Also results that were held, failed to be sent or were cancelled: their deliveries say where they are.
    """
    wanted = JobFilter(bundle=name, bundle_version=version, since=since, until=until, limit=MANY)
    return [Result(job=job, deliveries=tuple(ledger.deliveries(job.id))) for job in ledger.find(wanted)]


def recall(
    ledger: Ledger,
    spool: Spool,
    result: Result,
    reason: RejectionReason,
    *,
    destinations: Collection[str] | None = None,
    clock: Callable[[], datetime] = utc_now,
) -> Recalled:
    """Reject one result wherever it may have arrived; what is not sent yet is not sent any more.

    `destinations` None: at all of them, and the job counts as recalled: its CT series, routed again, is computed
    again. Otherwise it is taken back there, and a HELD job stays HELD. Doing it twice opens nothing twice.

    Raises:
        OSError, StorageError: not now, for a full disk say; doing it again does it.
    """
    from dicom_node.rejections import reject  # with it come the libraries of images: a list needs none of them

    job, title = result.job, reason.document_title
    text = f"bundle {result.bundle} is recalled: {title.meaning} ({title.value})"
    told = {"code": title.value, "meaning": title.meaning, "time": clock().isoformat()}
    if destinations is None:
        details: dict[str, Any] = {} if RECALLED in job.details else {RECALLED: told}
    else:
        there: dict[str, Any] = dict.fromkeys(destinations, told)
        details = {RECALLED_AT: {**there, **(job.details.get(RECALLED_AT) or {})}}
    try:
        if job.state is JobState.HELD and destinations is None:
            held = {JobState.HELD}
            job = ledger.move(job.id, JobState.CANCELLED, code=CODE, text=text, expected=held, details=details)
        done = reject(
            ledger,
            spool,
            job,
            reason=reason,
            description=f"Synthetic PET of model {result.bundle}, which is recalled",
            code=CODE,
            text=text,
            destinations=destinations,
            details=details,
            clock=clock,
        )
    except IllegalMove as error:
        return Recalled(result=result, fault=str(error))
    return Recalled(result=result, notes=done.opened, fault="; ".join(done.unnamed))


def places(results: Sequence[Result]) -> tuple[str, ...]:
    """The destinations of all results, by name."""
    return tuple(sorted({delivery.destination for result in results for delivery in result.series}))
