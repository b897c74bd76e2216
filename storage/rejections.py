"""The part of the ledger that takes results back: rejection notes, and what must not be sent any more."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from storage.base import clean
from storage.database import plain
from storage.deliveries import DeliveryLedger
from storage.errors import IllegalMove
from storage.moves import WAITING_DELIVERIES
from storage.records import PROOF_STATES, REJECTION, DeliveryState, Job, JobState, NewDelivery
from storage.schema import DeliveryRow, JobRow, job_of

REJECTABLE = frozenset({JobState.DELIVERING, JobState.DONE, JobState.FAILED, JobState.CANCELLED})
STOPPABLE = REJECTABLE | {JobState.HELD}  # notes of a HELD job wait for its release, like the rest of it
OPEN_AGAIN = frozenset({DeliveryState.FAILED, DeliveryState.CANCELLED})  # a note in these states did not arrive


class RejectionLedger(DeliveryLedger):
    """Opens the deliveries of rejection notes."""

    def superseding(self, *, since: datetime) -> list[Job]:
        """Jobs with a result that supersede another, oldest first: being delivered, or made after `since`."""
        query = select(JobRow).where(
            JobRow.supersedes != "",
            JobRow.has_result,
            or_(JobRow.state == JobState.DELIVERING.value, JobRow.created >= since),
        )
        with self._read() as session:
            return [job_of(row) for row in session.scalars(query.order_by(JobRow.seq))]

    def reject_result(
        self,
        job_id: str,
        notes: Sequence[NewDelivery],
        *,
        destinations: Collection[str] | None = None,
        code: str,
        text: str,
        details: Mapping[str, Any] | None = None,
    ) -> int:
        """Open the deliveries of rejection notes, and end those of the result itself; returns how many were opened.

        `destinations` are those that are told (None: all): nothing of the result goes there any more, and no proof is
        asked for. A note that was opened before stays as it is, unless it failed. `code` and `text` become the event,
        `details` are merged into the job's. Calling it again changes nothing. Raises `IllegalMove` for a job that
        has no result that could have been sent.
        """
        with self._write() as session:
            job = self._job(session, job_id)
            if JobState(job.state) not in STOPPABLE:
                raise IllegalMove(f"job {job_id}: is {job.state}, nothing of it was sent that could be rejected")
            rows = session.scalars(select(DeliveryRow).where(DeliveryRow.job_id == job_id)).all()
            stopped = self._stop_sending(rows, destinations, code, text)
            known = {(r.destination, r.kind, r.encoding) for r in rows if DeliveryState(r.state) not in OPEN_AGAIN}
            new = [note for note in notes if (note.destination, note.kind, note.encoding) not in known]
            self._open_deliveries(session, job, new)
            told = plain(details or {})
            changed = bool(new) or stopped or any(job.details.get(key) != value for key, value in told.items())
            job.details = {**job.details, **told}
            self._go_on(session, job, code, text, opened=len(new), changed=changed)
            return len(new)

    def _stop_sending(
        self, rows: Sequence[DeliveryRow], destinations: Collection[str] | None, code: str, text: str
    ) -> bool:
        stopped = False
        for row in rows:
            if row.kind == REJECTION or (destinations is not None and row.destination not in destinations):
                continue
            if row.state in {state.value for state in WAITING_DELIVERIES}:
                self._move_delivery(row, DeliveryState.CANCELLED)
                row.reason_code, row.reason, row.next_attempt = clean(code), clean(text), None
                stopped = True
            elif row.state in {state.value for state in PROOF_STATES}:
                row.goal = row.state  # an archive that hides it would not prove it
                row.lease_owner, row.lease_until = "", None
        return stopped

    def _go_on(self, session: Session, job: JobRow, code: str, text: str, *, opened: int, changed: bool) -> None:
        details = {"notes": opened, "study_uid": job.study_uid, "accession": job.accession}
        if opened and JobState(job.state) not in (JobState.DELIVERING, JobState.HELD):
            self._move(session, job, JobState.DELIVERING, code=code, text=text, details=details)
        elif changed:
            self._event(session, job.id, code, text, details=details)
        self._settle(session, job)
