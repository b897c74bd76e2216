"""What the ledger tells a dashboard: how many jobs and deliveries are in which state, and how long the oldest wait."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import datetime

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from storage.base import LedgerBase
from storage.records import REJECTION, DeliveryState, JobState
from storage.schema import DeliveryRow, EventRow, JobRow


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """One look at the ledger. `deliveries` counts by destination and state, rejection notes aside in `notes`.

    `events` counts those of no job by the codes that were asked for, as long as events are kept.
    `queued_since` and `delivering_since`: when the job that has waited longest came into that state; None: no job is.
    """

    jobs: Mapping[JobState, int]
    deliveries: Mapping[tuple[str, DeliveryState], int]
    notes: Mapping[tuple[str, DeliveryState], int]
    queued_since: datetime | None
    delivering_since: datetime | None
    events: Mapping[str, int] = field(default_factory=dict)


class FigureLedger(LedgerBase):
    """Counts for the metrics."""

    def figures(self, *, events: Collection[str] = ()) -> Figures:
        """Count everything, and the events of these codes, in one short read."""
        with self._read() as session:
            jobs = session.execute(select(JobRow.state, func.count()).group_by(JobRow.state))
            return Figures(
                jobs={JobState(state): count for state, count in jobs},
                deliveries=_by_destination(session, notes=False),
                notes=_by_destination(session, notes=True),
                queued_since=_waiting_since(session, JobState.QUEUED),
                delivering_since=_waiting_since(session, JobState.DELIVERING),
                events=_events(session, events),
            )


def _by_destination(session: Session, *, notes: bool) -> dict[tuple[str, DeliveryState], int]:
    which = DeliveryRow.kind == REJECTION if notes else DeliveryRow.kind != REJECTION
    rows = session.execute(
        select(DeliveryRow.destination, DeliveryRow.state, func.count())
        .where(which)
        .group_by(DeliveryRow.destination, DeliveryRow.state)
    )
    return {(destination, DeliveryState(state)): count for destination, state, count in rows}


def _events(session: Session, codes: Collection[str]) -> dict[str, int]:
    """One index look-up for each code: a delivery's `commitment_reported` belongs to a job."""
    rows = session.execute(
        select(EventRow.code, func.count())
        .where(EventRow.code.in_(codes), EventRow.job_id == "")
        .group_by(EventRow.code)
    )
    return {str(code): count for code, count in rows}


def _waiting_since(session: Session, state: JobState) -> datetime | None:
    """A job that was tried or sent again waits since then: each move says in its event where it led."""
    since = (
        select(func.max(EventRow.time).label("since"))
        .join(JobRow, JobRow.id == EventRow.job_id)
        .where(JobRow.state == state.value, EventRow.details["to"].as_string() == state.value)
        .group_by(JobRow.id)
        .subquery()
    )
    return session.scalar(select(func.min(since.c.since)))
