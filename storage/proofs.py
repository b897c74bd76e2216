"""From SENT to COMMITTED and VISIBLE: who asks the destination for proof, and what it answered.

A delivery that waits for proof keeps its state; whoever asks holds its lease. A Storage Commitment transaction is
written before it goes out, so that its report finds it, however early, late or often it comes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import datetime, timedelta
from enum import StrEnum

from sqlalchemy import or_, select, update
from sqlalchemy.orm import Session

from storage.base import clean
from storage.deliveries import DeliveryLedger
from storage.errors import StaleState
from storage.records import Commitment, CommitmentState, Delivery, DeliveryState, JobState
from storage.schema import CommitmentRow, DeliveryRow, JobRow, commitment_of, compact, delivery_of

_PROVABLE = (DeliveryState.SENT.value, DeliveryState.COMMITTED.value)
_OPEN = (CommitmentState.ASKED.value, CommitmentState.LAPSED.value)  # a late report counts like one in time
_ENDED_CODES = {
    DeliveryState.COMMITTED: "delivery_committed",
    DeliveryState.VISIBLE: "delivery_visible",
    DeliveryState.PENDING: "delivery_retry",
    DeliveryState.FAILED: "delivery_failed",
}


class Report(StrEnum):
    """What became of a Storage Commitment report."""

    KEPT = "kept"
    AGAIN = "again"  # the transaction was reported before: the first report counts
    STALE = "stale"  # about what was sent again since, or what nobody waits for any more: only an event
    UNKNOWN = "unknown"  # nobody here asked under this Transaction UID


class ProofLedger(DeliveryLedger):
    """Claims of proof, commitment transactions and their reports."""

    def claim_proof(self, owner: str, *, lease_s: float) -> Delivery | None:
        """Take the delivery whose proof is due: short of its goal, its time has come, its job DELIVERING."""
        with self._write() as session:
            now = self._clock()
            row = session.scalar(
                select(DeliveryRow)
                .join(JobRow, JobRow.id == DeliveryRow.job_id)
                .where(
                    DeliveryRow.state.in_(_PROVABLE),
                    DeliveryRow.goal != DeliveryRow.state,
                    or_(DeliveryRow.next_attempt.is_(None), DeliveryRow.next_attempt <= now),
                    or_(DeliveryRow.lease_until.is_(None), DeliveryRow.lease_until < now),
                    JobRow.state == JobState.DELIVERING.value,
                )
                .order_by(DeliveryRow.next_attempt.is_not(None), DeliveryRow.next_attempt, DeliveryRow.id)
                .limit(1)
                .with_for_update(of=[JobRow, DeliveryRow], skip_locked=True)
            )
            if row is None:
                return None
            row.lease_owner, row.lease_until = owner, now + timedelta(seconds=lease_s)
            return delivery_of(row)

    def reclaim_proofs(self, owner: str) -> int:
        """At start: what an earlier life of `owner` was asking is due again. Returns how many."""
        mine = DeliveryRow.state.in_(_PROVABLE), DeliveryRow.lease_owner == owner
        with self._write() as session:
            holding = select(DeliveryRow.job_id).where(*mine)
            session.scalars(
                select(JobRow.id).where(JobRow.id.in_(holding)).order_by(JobRow.seq).with_for_update()
            ).all()
            found = session.execute(
                update(DeliveryRow)
                .where(*mine)
                .values(lease_owner="", lease_until=None, next_attempt=self._clock())
                .execution_options(synchronize_session=False)
            )
            return found.rowcount  # type: ignore[attr-defined]

    def finish_proof(
        self,
        delivery_id: int,
        owner: str,
        *,
        state: DeliveryState,
        goal: DeliveryState,
        due: datetime | None = None,
        counted: bool = False,
        failing: bool = False,
        code: str = "",
        text: str = "",
        sent: int | None = None,
        statuses: Mapping[str, str] | None = None,
        settled: Mapping[str, CommitmentState] | None = None,
    ) -> Delivery:
        """End one request for proof, with the job when this was its last delivery.

        The same `state` again waits until `due`, and is one check more when `counted`; `failing`: it could not be
        asked, and `failing_since` is the first of such requests in a row. With `goal` equal to it the
        delivery has ended there. PENDING sends again (`sent` and `statuses` as in `finish_delivery`). `settled`
        closes commitment transactions by their UIDs. A code or text is kept as the reason and becomes an event.

        Raises `StaleState` when the delivery is not leased to `owner` any more.
        """
        with self._write() as session:
            job, row = self._leased(session, delivery_id, owner)
            was, checks = DeliveryState(row.state), row.checks
            if state is was:
                row.lease_owner, row.lease_until = "", None
                row.checks = checks + counted
                row.failing_since = (row.failing_since or self._clock()) if failing else None
            else:
                self._move_delivery(row, state)
            row.goal, row.next_attempt = goal.value, due
            if sent is not None:
                row.sent = sent
            if statuses is not None:
                row.statuses = compact(statuses, row.instances)
            row.reason_code, row.reason = clean(code), clean(text)
            for transaction_uid, outcome in (settled or {}).items():
                self._close(session, transaction_uid, outcome)
            if state is was and self._report_waits(session, row):
                row.next_attempt = self._clock()  # it came while the question was still being asked
            if state is not was or text:
                told = code or _ENDED_CODES.get(state, "delivery_unproven")
                self._proof_event(session, row, told, text or f"{row.destination} has {row.instances} instances")
            self._settle(session, job)
            return delivery_of(row)

    # ---- commitment transactions

    def open_commitment(self, delivery_id: int, owner: str, transaction_uid: str) -> Commitment:
        """Write a transaction before it is asked; an earlier one without a report lapses. Raises `StaleState`."""
        with self._write() as session:
            _, row = self._leased(session, delivery_id, owner)
            session.execute(
                update(CommitmentRow)
                .where(CommitmentRow.delivery_id == delivery_id, CommitmentRow.state == CommitmentState.ASKED.value)
                .values(state=CommitmentState.LAPSED.value)
            )
            asked = CommitmentRow(
                transaction_uid=transaction_uid,
                delivery_id=delivery_id,
                attempt=row.attempts,
                state=CommitmentState.ASKED.value,
                asked=self._clock(),
                reported=None,
                report={},
            )
            session.add(asked)
            session.flush()
            text = f"asked {row.destination} to commit {row.instances} instances"
            self._proof_event(session, row, "commitment_asked", text, transaction_uid=transaction_uid)
            return commitment_of(asked)

    def commitments(self, delivery_id: int) -> list[Commitment]:
        """A delivery's transactions, oldest first."""
        with self._read() as session:
            query = select(CommitmentRow).where(CommitmentRow.delivery_id == delivery_id)
            rows = session.scalars(query.order_by(CommitmentRow.asked, CommitmentRow.transaction_uid))
            return [commitment_of(row) for row in rows]

    def take_report(self, transaction_uid: str, *, committed: Collection[str], failed: Mapping[str, str]) -> Report:
        """Keep an archive's report; when this returns it is durable. `failed`: SOP Instance UID to reason.

        The delivery is due at once: its owner compares the report with what was sent.
        """
        with self._write() as session:
            known = session.get(CommitmentRow, transaction_uid)
            if known is None:
                return Report.UNKNOWN
            _, row = self._delivery(session, known.delivery_id)  # locked before its transaction
            asked = session.get_one(CommitmentRow, transaction_uid, with_for_update=True, populate_existing=True)
            counts = f"{len(committed)} of {row.instances} instances committed, {len(failed)} refused"
            if asked.state not in _OPEN:
                self._proof_event(session, row, "commitment_repeated", counts, transaction_uid=transaction_uid)
                return Report.AGAIN
            asked.reported = self._clock()
            if row.state != DeliveryState.SENT.value or asked.attempt != row.attempts:
                self._close(session, transaction_uid, CommitmentState.FAILED if failed else CommitmentState.COMMITTED)
                self._proof_event(session, row, "commitment_late", counts, transaction_uid=transaction_uid)
                return Report.STALE
            asked.state = CommitmentState.REPORTED.value
            asked.report = {"committed": sorted(committed), "failed": dict(failed)}
            row.next_attempt = self._clock()
            self._proof_event(session, row, "commitment_reported", counts, transaction_uid=transaction_uid)
            return Report.KEPT

    # ---- inside

    def _leased(self, session: Session, delivery_id: int, owner: str) -> tuple[JobRow, DeliveryRow]:
        job, row = self._delivery(session, delivery_id)
        if row.state not in _PROVABLE or row.lease_owner != owner:
            raise StaleState(f"delivery {delivery_id}: is {row.state}, its proof is not asked by {clean(owner)!r}")
        return job, row

    def _close(self, session: Session, transaction_uid: str, outcome: CommitmentState) -> None:
        asked = session.get(CommitmentRow, transaction_uid, with_for_update=True)
        if asked is not None:
            asked.state, asked.report = outcome.value, {}

    def _report_waits(self, session: Session, row: DeliveryRow) -> bool:
        query = select(CommitmentRow.transaction_uid).where(
            CommitmentRow.delivery_id == row.id,
            CommitmentRow.state == CommitmentState.REPORTED.value,
            CommitmentRow.attempt == row.attempts,
        )
        return session.scalar(query.limit(1)) is not None

    def _proof_event(self, session: Session, row: DeliveryRow, code: str, text: str, **details: str) -> None:
        self._delivery_event(session, row, code, text, goal=row.goal, **details)
