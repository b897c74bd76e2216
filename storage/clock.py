"""What the ledger does when the machine's clock was wrong: no wait is longer than meant, and no outage older."""

from __future__ import annotations

from datetime import timedelta

from sqlalchemy import select

from storage.base import LedgerBase
from storage.records import WAITING_STATES, DeliveryState, JobState
from storage.schema import DeliveryRow, JobRow


class ClockLedger(LedgerBase):
    """Finds times that no correct clock has written."""

    def shift_outages(self, seconds: float, *, recent_s: float = 0.0) -> int:
        """Move the beginning of each outage as the clock was moved, so that it is as old as before. Returns how many.

        `seconds` is negative for a clock that was set back. It was moved in the last `recent_s` seconds: an outage that
        began in them may be of the new clock already, and is rather too young than too old.
        """
        now = self._clock()
        states = [state.value for state in (*WAITING_STATES, DeliveryState.SENDING)]
        failing = DeliveryRow.state.in_(states) & DeliveryRow.failing_since.is_not(None)
        with self._write() as session:
            holding = select(DeliveryRow.job_id).where(failing)
            jobs = select(JobRow.id).where(JobRow.id.in_(holding)).order_by(JobRow.seq)
            session.scalars(jobs.with_for_update()).all()
            rows = session.scalars(select(DeliveryRow).where(failing).with_for_update()).all()
            recent = now - timedelta(seconds=recent_s)
            for row in rows:
                assert row.failing_since is not None
                if seconds > 0 or not recent <= row.failing_since <= now:
                    row.failing_since = min(row.failing_since + timedelta(seconds=seconds), now)
            return len(rows)

    def shift_waits(self, seconds: float) -> int:
        """Move what jobs and deliveries wait for as the clock was set back (`seconds` < 0). Returns how many.

        `mend_times` cannot tell a wait of a minute that became one of an hour from an hour that was meant. What the new
        clock has put off already becomes due early: nothing is lost by one attempt more.
        """
        shift = timedelta(seconds=seconds)
        with self._write() as session:
            now = self._clock()
            jobs = session.scalars(
                select(JobRow)
                .where(JobRow.state == JobState.QUEUED.value, JobRow.not_before > now)
                .with_for_update(skip_locked=True)
            ).all()
            for job in jobs:
                assert job.not_before is not None
                job.not_before += shift
            deliveries = session.scalars(
                select(DeliveryRow)
                .join(JobRow, JobRow.id == DeliveryRow.job_id)
                .where(
                    JobRow.state == JobState.DELIVERING.value,
                    DeliveryRow.state.in_([state.value for state in WAITING_STATES]),
                    DeliveryRow.next_attempt > now,
                )
                .with_for_update(of=[JobRow, DeliveryRow], skip_locked=True)
            ).all()
            for row in deliveries:
                assert row.next_attempt is not None
                row.next_attempt += shift
            return len(jobs) + len(deliveries)

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
