"""What the ledger does when the machine's clock was wrong: no wait may last longer than it was meant to."""

from __future__ import annotations

from datetime import timedelta

from sqlalchemy import select

from storage.base import LedgerBase
from storage.records import WAITING_STATES, JobState
from storage.schema import DeliveryRow, JobRow


class ClockLedger(LedgerBase):
    """Finds times that no correct clock has written."""

    def mend_times(self, *, longest_wait_s: float, lease_s: float) -> int:
        """Make due what would wait longer than `longest_wait_s`, and end leases within `lease_s`. Returns how many.

        A clock that ran ahead while a retry or a lease was written, and was set back since, leaves times that lie
        hours or years ahead.
        """
        with self._write() as session:
            now = self._clock()
            too_late, too_long = now + timedelta(seconds=longest_wait_s), now + timedelta(seconds=lease_s)
            jobs = session.scalars(
                select(JobRow)
                .where(
                    (JobRow.state == JobState.QUEUED.value) & (JobRow.not_before > too_late)
                    | (JobRow.state == JobState.RUNNING.value) & (JobRow.lease_until > too_long)
                )
                .with_for_update(skip_locked=True)
            ).all()
            for job in jobs:
                job.not_before = now if job.state == JobState.QUEUED.value else None
                job.lease_until = too_long if job.lease_until is not None else None
            waits = DeliveryRow.state.in_([state.value for state in WAITING_STATES])
            deliveries = session.scalars(
                select(DeliveryRow)
                .join(JobRow, JobRow.id == DeliveryRow.job_id)
                .where(
                    JobRow.state == JobState.DELIVERING.value,
                    waits & (DeliveryRow.next_attempt > too_late) | (DeliveryRow.lease_until > too_long),
                )
                .with_for_update(of=[JobRow, DeliveryRow], skip_locked=True)
            ).all()
            for row in deliveries:
                if row.next_attempt is not None and row.next_attempt > too_late:
                    row.next_attempt = now
                if row.lease_until is not None and row.lease_until > too_long:
                    row.lease_until = too_long
            return len(jobs) + len(deliveries)
