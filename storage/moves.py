"""The two tables of allowed moves; everything that changes a state asks here."""

from __future__ import annotations

from collections.abc import Mapping

from storage.errors import IllegalMove
from storage.records import DeliveryState, JobState

MOVES: Mapping[JobState, frozenset[JobState]] = {
    JobState.RECEIVING: frozenset({JobState.QUEUED, JobState.REJECTED, JobState.HELD, JobState.CANCELLED}),
    # DELIVERING: the result was found complete in the outbox, so nothing is computed twice
    JobState.QUEUED: frozenset({JobState.RUNNING, JobState.HELD, JobState.CANCELLED, JobState.DELIVERING}),
    JobState.RUNNING: frozenset(
        {
            JobState.DELIVERING,
            JobState.DONE,
            JobState.QUEUED,
            JobState.HELD,
            JobState.REJECTED,
            JobState.FAILED,
            JobState.CANCELLED,
        }
    ),
    JobState.DELIVERING: frozenset({JobState.DONE, JobState.FAILED, JobState.CANCELLED}),
    JobState.HELD: frozenset({JobState.DELIVERING, JobState.QUEUED, JobState.CANCELLED}),
    JobState.FAILED: frozenset({JobState.QUEUED, JobState.DELIVERING, JobState.CANCELLED}),
    JobState.REJECTED: frozenset({JobState.QUEUED}),
    # a cancelled job that has its result is delivered, not computed again
    JobState.CANCELLED: frozenset({JobState.QUEUED, JobState.DELIVERING}),
    JobState.DONE: frozenset({JobState.DELIVERING}),
}

DELIVERY_MOVES: Mapping[DeliveryState, frozenset[DeliveryState]] = {
    DeliveryState.PENDING: frozenset({DeliveryState.SENDING, DeliveryState.CANCELLED}),
    DeliveryState.SENDING: frozenset(
        {DeliveryState.SENT, DeliveryState.PENDING, DeliveryState.FAILED, DeliveryState.CANCELLED}
    ),
    # PENDING: what the archive did not commit is sent again. FAILED: it did not prove what its destination asks for
    DeliveryState.SENT: frozenset(
        {DeliveryState.COMMITTED, DeliveryState.VISIBLE, DeliveryState.PENDING, DeliveryState.FAILED}
    ),
    DeliveryState.COMMITTED: frozenset({DeliveryState.VISIBLE, DeliveryState.PENDING, DeliveryState.FAILED}),
    DeliveryState.VISIBLE: frozenset({DeliveryState.PENDING}),
    DeliveryState.FAILED: frozenset({DeliveryState.PENDING}),
    DeliveryState.CANCELLED: frozenset({DeliveryState.PENDING}),
}

WAITING_DELIVERIES = frozenset({DeliveryState.PENDING, DeliveryState.SENDING})


def check_move(job_id: str, now: JobState, to: JobState) -> None:
    """Raise `IllegalMove` unless the table allows `now` -> `to`."""
    if to not in MOVES[now]:
        allowed = ", ".join(sorted(MOVES[now]))
        raise IllegalMove(f"job {job_id}: is {now}, cannot become {to}; possible: {allowed}")


def check_delivery_move(delivery_id: int, now: DeliveryState, to: DeliveryState) -> None:
    """Raise `IllegalMove` unless the table allows `now` -> `to`."""
    if to not in DELIVERY_MOVES[now]:
        allowed = ", ".join(sorted(DELIVERY_MOVES[now]))
        raise IllegalMove(f"delivery {delivery_id}: is {now}, cannot become {to}; possible: {allowed}")
