"""The deliveries of the ledger: one result series to one destination each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import or_, select, update
from sqlalchemy.orm import Session

from storage.base import LedgerBase, clean
from storage.errors import NotFound, OtherSeries, StaleState
from storage.moves import WAITING_DELIVERIES, check_delivery_move
from storage.records import PROOF_STATES, REJECTION, WAITING_STATES, Delivery, DeliveryState, JobState, NewDelivery
from storage.schema import CommitmentRow, DeliveryRow, EventRow, JobRow, compact, delivery_of

_ENDED_CODES = {
    DeliveryState.SENT: "delivery_sent",
    DeliveryState.PENDING: "delivery_retry",
    DeliveryState.FAILED: "delivery_failed",
}
_LEASED = (DeliveryState.SENDING, DeliveryState.SENT, DeliveryState.COMMITTED)


def seen_there(details: Iterable[Mapping[str, Any]]) -> set[tuple[str, str, str]]:
    """Destination, kind and encoding of which a delivery event (its `details`) says that something arrived."""
    return {
        (str(one.get("destination")), str(one.get("kind")), str(one.get("encoding")))
        for one in details
        if one.get("sent") or one.get("to") in PROOF_STATES
    }


def taken_back_at(details: Mapping[str, Any]) -> set[str]:
    """The destinations where a job's `details` say that its result is taken back, "" for every one.

    Also those that got no note: nothing had arrived there, or none could be written.
    """
    some = {name for key in ("superseded_at", "recalled_at") for name in details.get(key) or ()}
    return some | ({""} if "recalled" in details else set())


class DeliveryLedger(LedgerBase):
    """Claims, ends and lists deliveries."""

    def deliveries(self, job_id: str) -> list[Delivery]:
        """A job's deliveries in the order they were opened."""
        with self._read() as session:
            return [delivery_of(row) for row in _rows_of(session, job_id)]

    def claim_delivery(self, owner: str, *, lease_s: float) -> Delivery | None:
        """Take the delivery that has waited longest: PENDING, its time has come, its job DELIVERING.

        It becomes SENDING, leased to `owner` for `lease_s` seconds. None when there is nothing to send.
        """
        with self._write() as session:
            now = self._clock()
            row = session.scalar(
                select(DeliveryRow)
                .join(JobRow, JobRow.id == DeliveryRow.job_id)
                .where(
                    DeliveryRow.state == DeliveryState.PENDING.value,
                    or_(DeliveryRow.next_attempt.is_(None), DeliveryRow.next_attempt <= now),
                    JobRow.state == JobState.DELIVERING.value,
                )
                .order_by(DeliveryRow.next_attempt.is_not(None), DeliveryRow.next_attempt, DeliveryRow.id)
                .limit(1)
                .with_for_update(of=[JobRow, DeliveryRow], skip_locked=True)
            )
            if row is None:
                return None
            self._move_delivery(row, DeliveryState.SENDING)
            row.attempts += 1
            row.lease_owner, row.lease_until = owner, now + timedelta(seconds=lease_s)
            return delivery_of(row)

    def renew_delivery(self, delivery_id: int, owner: str, *, lease_s: float) -> bool:
        """Prolong the lease; False when it is lost or the job was cancelled: stop sending, or asking for proof."""
        with self._write() as session:
            found = session.execute(
                update(DeliveryRow)
                .where(
                    DeliveryRow.id == delivery_id,
                    DeliveryRow.state.in_([state.value for state in _LEASED]),
                    DeliveryRow.lease_owner == owner,
                )
                .values(lease_until=self._clock() + timedelta(seconds=lease_s))
                .execution_options(synchronize_session=False)
            )
            return found.rowcount == 1  # type: ignore[attr-defined]

    def finish_delivery(
        self,
        delivery_id: int,
        owner: str,
        *,
        state: DeliveryState,
        sent: int,
        statuses: Mapping[str, str],
        code: str = "",
        text: str = "",
        next_attempt: datetime | None = None,
        counted: bool = True,
        outage: bool = False,
        goal: DeliveryState = DeliveryState.SENT,
    ) -> Delivery:
        """End one attempt: SENT, FAILED (an operator's matter), or PENDING again until `next_attempt`.

        `goal` is the last state that the destination asks for: a delivery that is SENT waits for proof until then.
        An attempt that is not `counted` (the node was stopped) takes nothing from the destination's `max_attempts`;
        nor does an `outage`, which is counted beside. `failing_since` is the first of the attempts in a row at which
        nothing more arrived.

        `statuses` maps each SOP Instance UID to its DIMSE status as "0x0000", or to an error word; only those that
        did not succeed are kept. When no delivery of the job waits any more the job becomes DONE, or FAILED if one
        failed. Raises `StaleState` when the delivery is not leased to `owner` any more (cancelled, swept).
        """
        with self._write() as session:
            job, row = self._delivery(session, delivery_id)
            if row.state != DeliveryState.SENDING.value or row.lease_owner != owner:
                raise StaleState(f"delivery {delivery_id}: is {row.state}, not being sent by {clean(owner)!r}")
            self._move_delivery(row, state)
            row.attempts -= 0 if counted else 1
            row.outages += outage
            if state is DeliveryState.PENDING and counted:
                row.failing_since = self._clock() if sent > row.sent else row.failing_since or self._clock()
            row.sent = sent
            row.statuses = compact(statuses, row.instances)
            row.next_attempt = next_attempt if state is DeliveryState.PENDING else None
            row.goal = goal.value
            code = code or _ENDED_CODES.get(state, "delivery_ended")
            text = text or f"{sent} of {row.instances} instances accepted by {row.destination}"
            row.reason_code, row.reason = ("", "") if state is DeliveryState.SENT else (clean(code), clean(text))
            self._delivery_event(
                session,
                row,
                code,
                text,
                sent=sent,
                instances=row.instances,
                attempt=row.attempts,
                statuses=dict(Counter(statuses.values())),
                next_attempt=row.next_attempt,
            )
            self._settle(session, job)
            return delivery_of(row)

    def end_outage(self, destination: str, codes: Collection[str]) -> int:
        """Make due what waits for this destination with one of these reason codes. Returns how many."""
        with self._write() as session:
            now = self._clock()
            rows = session.scalars(
                select(DeliveryRow)
                .join(JobRow, JobRow.id == DeliveryRow.job_id)
                .where(
                    DeliveryRow.destination == destination,
                    DeliveryRow.state.in_([state.value for state in WAITING_STATES]),
                    DeliveryRow.reason_code.in_(sorted(codes)),
                    DeliveryRow.next_attempt > now,
                    JobRow.state == JobState.DELIVERING.value,
                )
                .with_for_update(of=[JobRow, DeliveryRow], skip_locked=True)
            ).all()
            for row in rows:
                row.next_attempt = now
            return len(rows)

    def _delivery_event(self, session: Session, row: DeliveryRow, code: str, text: str, **details: Any) -> None:
        """What happened to a delivery, with the state that it has now."""
        named = {
            "destination": row.destination,
            "kind": row.kind,
            "encoding": row.encoding,
            "series_uid": row.series_uid,
            "to": row.state,
        }
        self._event(session, row.job_id, code, text, stage="delivery", details={**named, **details})

    def _delivery(self, session: Session, delivery_id: int) -> tuple[JobRow, DeliveryRow]:
        """A delivery and its job, both locked, in the order of `storage.base`. Raises `NotFound`."""
        job_id = session.scalar(select(DeliveryRow.job_id).where(DeliveryRow.id == delivery_id))
        if job_id is None:
            raise NotFound(f"no delivery {delivery_id} in the ledger")
        job = self._job(session, job_id)
        return job, session.get_one(DeliveryRow, delivery_id, with_for_update=True)

    def _move_delivery(self, row: DeliveryRow, to: DeliveryState) -> None:
        """The only place where a delivery's state changes."""
        check_delivery_move(row.id, DeliveryState(row.state), to)
        now = self._clock()
        row.state = to.value
        row.updated = now
        row.lease_owner, row.lease_until = "", None
        row.checks = 0
        if to in PROOF_STATES:
            row.failing_since = None
            setattr(row, f"{to.value.lower()}_at", now)
        elif to is not DeliveryState.FAILED:  # what was reached before it failed stays to be read
            row.sent_at = row.committed_at = row.visible_at = None

    def _open_deliveries(self, session: Session, job: JobRow, wanted: Sequence[NewDelivery]) -> None:
        """Add the rows that are missing. A row that is there is begun anew only if it now means other bytes.

        Raises `OtherSeries` where the row's series was sent: nobody would know of it any more.
        """
        rows = {(row.destination, row.kind, row.encoding): row for row in _rows_of(session, job.id)}
        there = self._arrived(session, job.id)
        for new in wanted:
            row = rows.get((new.destination, new.kind, new.encoding))
            if row is None:
                session.add(_new_row(job.id, new, self._clock()))
                continue
            other = row.series_uid != new.series_uid or row.instances != new.instances
            if row.series_uid != new.series_uid and (new.destination, new.kind, new.encoding) in there:
                raise OtherSeries(
                    f"job {job.id}: {row.destination} has {row.kind} series {row.series_uid} of it, the result is now "
                    f"series {new.series_uid}: only a job of its own may send that"
                )
            row.series_uid, row.instances = new.series_uid, new.instances
            if other or row.state in (DeliveryState.FAILED.value, DeliveryState.CANCELLED.value):
                self._begin_anew(session, row)
        session.flush()

    def _arrived(self, session: Session, job_id: str) -> set[tuple[str, str, str]]:
        """Destination, kind and encoding of the deliveries that ever sent anything."""
        query = select(EventRow.details).where(EventRow.job_id == job_id, EventRow.stage == "delivery")
        rows = _rows_of(session, job_id)
        now = {(row.destination, row.kind, row.encoding) for row in rows if row.sent or row.state in PROOF_STATES}
        return now | seen_there(session.scalars(query))

    def _begin_anew(self, session: Session, row: DeliveryRow) -> None:
        """PENDING with a clean slate, from any state."""
        if row.state != DeliveryState.PENDING.value:
            self._move_delivery(row, DeliveryState.PENDING)
        row.sent, row.attempts, row.next_attempt, row.statuses = 0, 0, None, {}
        row.reason_code, row.reason, row.goal = "", "", DeliveryState.SENT.value
        row.failing_since, row.outages = None, 0
        # attempts count from 1 again: no answer about an earlier sending may prove a later one
        session.execute(update(CommitmentRow).where(CommitmentRow.delivery_id == row.id).values(attempt=0))

    def _restart_deliveries(
        self, session: Session, job_id: str, states: Collection[DeliveryState], *, destination: str = ""
    ) -> int:
        retired = self._retired(session, job_id)
        rows = [
            row
            for row in _rows_of(session, job_id)
            if row.state in {s.value for s in states}
            and destination in ("", row.destination)
            and (row.kind == REJECTION or not ({"", row.destination} & retired))
        ]
        for row in rows:
            self._begin_anew(session, row)
        session.flush()
        return len(rows)

    def _retired(self, session: Session, job_id: str) -> set[str]:
        """The destinations where the result is taken back, "" for every one: there only notes are sent again."""
        told = {row.destination for row in _rows_of(session, job_id) if row.kind == REJECTION}
        return told | taken_back_at(self._job(session, job_id, lock=False).details)

    def _cancel_deliveries(self, session: Session, job_id: str) -> None:
        """What was sent stays sent; nobody asks for its proof any more."""
        for row in _rows_of(session, job_id):
            row.lease_owner, row.lease_until = "", None
            if row.state in {s.value for s in WAITING_DELIVERIES}:
                self._move_delivery(row, DeliveryState.CANCELLED)

    def _settle(self, session: Session, job: JobRow) -> None:
        """End a DELIVERING job of which no delivery waits any more."""
        if job.state != JobState.DELIVERING.value:
            return
        rows = _rows_of(session, job.id)
        if any(_waits(row) for row in rows):
            return
        failed = [row for row in rows if row.state == DeliveryState.FAILED.value]
        if failed:
            where = ", ".join(sorted({row.destination for row in failed}))
            self._move(
                session,
                job,
                JobState.FAILED,
                code="delivery_failed",
                text=f"{len(failed)} of {len(rows)} deliveries failed, to {where}: {failed[0].reason}",
            )
        else:
            self._move(session, job, JobState.DONE, code="done", text=f"{len(rows)} deliveries ended")

    def _sweep_deliveries(self, session: Session) -> list[str]:
        """SENDING with an expired lease: the sender died. PENDING at once: a re-send sends the same bytes."""
        now = self._clock()
        rows = session.scalars(
            select(DeliveryRow)
            .join(JobRow, JobRow.id == DeliveryRow.job_id)
            .where(
                DeliveryRow.state == DeliveryState.SENDING.value,
                or_(DeliveryRow.lease_until.is_(None), DeliveryRow.lease_until < now),
            )
            .with_for_update(of=[JobRow, DeliveryRow], skip_locked=True)
        ).all()
        for row in rows:
            owner = row.lease_owner
            self._move_delivery(row, DeliveryState.PENDING)
            row.next_attempt = now
            self._event(
                session,
                row.job_id,
                "delivery_lease_expired",
                f"{clean(owner)} stopped while sending to {row.destination}; it will be sent again",
                stage="delivery",
                details={"destination": row.destination, "kind": row.kind, "encoding": row.encoding},
            )
        return [row.job_id for row in rows]


def _waits(row: DeliveryRow) -> bool:
    delivery = delivery_of(row)
    return delivery.state in WAITING_DELIVERIES or (delivery.state in PROOF_STATES and not delivery.proven)


def _rows_of(session: Session, job_id: str) -> Sequence[DeliveryRow]:
    return session.scalars(select(DeliveryRow).where(DeliveryRow.job_id == job_id).order_by(DeliveryRow.id)).all()


def _new_row(job_id: str, new: NewDelivery, now: datetime) -> DeliveryRow:
    return DeliveryRow(
        job_id=job_id,
        destination=new.destination,
        kind=new.kind,
        encoding=new.encoding,
        series_uid=new.series_uid,
        instances=new.instances,
        state=DeliveryState.PENDING.value,
        sent=0,
        attempts=0,
        next_attempt=None,
        reason_code="",
        reason="",
        updated=now,
        lease_owner="",
        lease_until=None,
        statuses={},
        goal=DeliveryState.SENT.value,
        checks=0,
        outages=0,
    )
