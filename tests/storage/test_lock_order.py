"""One order of row locks, as PostgreSQL would take them: no two transactions of the ledger wait for each other."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, event
from sqlalchemy.dialects import postgresql
from sqlalchemy.orm import ORMExecuteState, Session, SessionTransaction

from storage.ledger import Ledger
from storage.records import REJECTION, CommitmentState, DeliveryState, Job, NewDelivery
from tests.storage.conftest import Clock

ORDER = ("jobs", "deliveries", "commitments")
LEASE = {"lease_s": 60.0}
NOTE = NewDelivery(destination="pacs", kind=REJECTION, encoding="kos-quality-pet-sc", series_uid="2.9", instances=1)


def test_a_job_is_locked_before_its_deliveries_and_these_before_their_transactions(
    ledger: Ledger, clock: Clock, delivering: Callable[..., Job]
) -> None:
    with _recorded() as transactions:
        _live(ledger, clock, delivering)
    several = [tables for tables in transactions if len(set(tables)) > 1]
    assert {name for tables in several for name in tables} == set(ORDER)
    wrong = [tables for tables in several if not _in_order(tables)]
    assert not wrong


def test_only_the_renewal_of_a_lease_takes_a_delivery_without_its_job(
    ledger: Ledger, clock: Clock, delivering: Callable[..., Job]
) -> None:
    with _recorded() as transactions:
        _live(ledger, clock, delivering)
    assert [tables for tables in transactions if "deliveries" in tables and "jobs" not in tables] == [["deliveries"]]


@pytest.mark.parametrize("search", ["claim", "claim_delivery", "claim_proof", "sweep"])
def test_who_looks_for_work_skips_what_another_holds(ledger: Ledger, search: str) -> None:
    asked: dict[str, Any] = {
        "claim": lambda: ledger.claim("w", **LEASE),
        "claim_delivery": lambda: ledger.claim_delivery("s", **LEASE),
        "claim_proof": lambda: ledger.claim_proof("s", **LEASE),
        "sweep": lambda: ledger.sweep(max_attempts=3, retry_s=1),
    }
    with _locks() as locks:
        asked[search]()
    assert locks
    assert all(lock.endswith("SKIP LOCKED") for lock in locks)


def _live(ledger: Ledger, clock: Clock, delivering: Callable[..., Job]) -> None:
    """Everything that writes to deliveries, once."""
    job = delivering("pacs", "other")
    first = ledger.claim_delivery("s", **LEASE)
    assert first is not None
    assert ledger.renew_delivery(first.id, "s", **LEASE)
    ledger.shift_outages(60.0)
    ledger.shift_waits(-60.0)
    sent: dict[str, Any] = {"state": DeliveryState.SENT, "sent": 3, "statuses": {}, "goal": DeliveryState.COMMITTED}
    ledger.finish_delivery(first.id, "s", **sent)
    assert ledger.claim_proof("s", **LEASE)
    ledger.open_commitment(first.id, "s", "2.25.1")
    ledger.take_report("2.25.1", committed=["1"], failed={})
    settled = {"2.25.1": CommitmentState.COMMITTED}
    ledger.finish_proof(first.id, "s", state=DeliveryState.COMMITTED, goal=DeliveryState.COMMITTED, settled=settled)
    assert ledger.claim_delivery("s", **LEASE)
    clock.tick(100)
    assert ledger.sweep(max_attempts=3, retry_s=1) == [job.id]
    second = ledger.claim_delivery("s", **LEASE)
    assert second is not None
    ledger.finish_delivery(second.id, "s", **sent)
    assert ledger.claim_proof("s", **LEASE)
    assert ledger.reclaim_proofs("s") == 1
    ledger.cancel(job.id)
    ledger.retry(job.id)
    assert ledger.claim_proof("s", **LEASE)
    ledger.finish_proof(second.id, "s", state=DeliveryState.SENT, goal=DeliveryState.SENT)
    ledger.redeliver(job.id)
    assert ledger.reject_result(job.id, [NOTE], code="recalled", text="recalled") == 1
    ledger.cancel(job.id)
    ledger.forget_before(clock.now + timedelta(days=1))


def _in_order(tables: list[str]) -> bool:
    """By where each table is touched first; a delivery never without its job."""
    first = sorted(set(tables), key=tables.index)
    return first == sorted(first, key=ORDER.index) and first[0] == "jobs"


@contextmanager
def _recorded() -> Iterator[list[list[str]]]:
    """The tables whose rows each transaction locks or writes, in the order of its statements."""
    found: list[list[str]] = []

    def begun(_: Session, transaction: SessionTransaction) -> None:
        if transaction.parent is None:  # not the part of one that a flush is
            found.append([])

    def selected(state: ORMExecuteState) -> None:
        for lock in _lock_of(state):
            found[-1].extend(re.findall(r"jobs|deliveries|commitments", lock))

    def written(_: object, __: object, statement: str, *___: object) -> None:
        match = re.match(r"(?:UPDATE|DELETE FROM) (jobs|deliveries|commitments)", statement)
        if match:
            found[-1].append(match[1])

    with (
        _listening(Session, "after_transaction_create", begun),
        _listening(Session, "do_orm_execute", selected),
        _listening(Engine, "before_cursor_execute", written),
    ):
        yield found


@contextmanager
def _locks() -> Iterator[list[str]]:
    found: list[str] = []
    with _listening(Session, "do_orm_execute", lambda state: found.extend(_lock_of(state))):
        yield found


def _lock_of(state: ORMExecuteState) -> list[str]:
    """`FOR UPDATE OF jobs, deliveries SKIP LOCKED`, with the table where the statement leaves it out."""
    if not state.is_select:
        return []
    text = " ".join(str(state.statement.compile(dialect=postgresql.dialect())).split())  # type: ignore[no-untyped-call]
    lock = re.search(r"FOR UPDATE.*$", text)
    table = re.search(r"FROM (\w+)", text)
    if lock is None or table is None:
        return []
    return [lock[0] if " OF " in lock[0] else lock[0].replace("UPDATE", f"UPDATE OF {table[1]}", 1)]


@contextmanager
def _listening(target: Any, name: str, listener: Any) -> Iterator[None]:
    event.listen(target, name, listener)
    try:
        yield
    finally:
        event.remove(target, name, listener)
