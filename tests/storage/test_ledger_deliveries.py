"""Deliveries: claims, outcomes, what a job becomes of them, and how statuses are kept."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import text as sql

from storage.errors import IllegalMove, NotFound, StaleState
from storage.ledger import Ledger
from storage.moves import DELIVERY_MOVES, check_delivery_move
from storage.records import DeliveryState, Job, JobState
from storage.schema import compact, spread
from tests.storage.conftest import Clock

Make = Callable[..., Job]


def send(ledger: Ledger, state: DeliveryState, **given_: object) -> Job:
    """One attempt of whatever waits first."""
    row = ledger.claim_delivery("s", lease_s=60)
    outcome = {"sent": 3 if state is DeliveryState.SENT else 0, "statuses": {}, **given_}
    ledger.finish_delivery(row.id, "s", state=state, **outcome)
    return ledger.get(row.job_id)


def test_the_table_of_delivery_moves_names_every_state() -> None:
    assert set(DELIVERY_MOVES) == set(DeliveryState)
    with pytest.raises(IllegalMove, match="delivery 4: is SENT, cannot become SENDING"):
        check_delivery_move(4, DeliveryState.SENT, DeliveryState.SENDING)


def test_a_job_is_done_when_its_last_delivery_is_sent(ledger: Ledger, delivering: Make) -> None:
    delivering("pacs", "archive")
    assert send(ledger, DeliveryState.SENT).state is JobState.DELIVERING
    job = send(ledger, DeliveryState.SENT)
    assert (job.state, job.reason) == (JobState.DONE, "")
    assert ledger.claim_delivery("s", lease_s=60) is None
    assert [event.code for event in ledger.events(job.id)][-3:] == ["delivery_sent", "delivery_sent", "done"]


def test_who_wants_to_know_is_told_once_and_after_the_fact_that_a_job_is_done(ledger: Ledger, delivering: Make) -> None:
    told: list[tuple[str, JobState]] = []
    ledger.on_done = lambda job_id: told.append((job_id, ledger.get(job_id).state))
    delivering("pacs", "archive")
    send(ledger, DeliveryState.SENT)
    assert told == []
    job = send(ledger, DeliveryState.SENT)
    assert told == [(job.id, JobState.DONE)]


def test_a_job_with_one_failed_delivery_fails_after_the_others_were_tried(ledger: Ledger, delivering: Make) -> None:
    delivering("pacs", "archive")
    assert send(ledger, DeliveryState.FAILED, code="ae_refused", text="no such AE").state is JobState.DELIVERING
    job = send(ledger, DeliveryState.SENT)
    assert (job.state, job.reason_code) == (JobState.FAILED, "delivery_failed")
    assert "pacs: no such AE" in job.reason
    retried = ledger.retry(job.id)
    assert retried.state is JobState.DELIVERING
    assert [d.state for d in ledger.deliveries(job.id)] == [DeliveryState.PENDING, DeliveryState.SENT]


def test_a_transient_failure_waits_for_its_next_attempt(ledger: Ledger, clock, delivering: Make) -> None:
    delivering()
    when = clock() + timedelta(seconds=30)
    job = send(ledger, DeliveryState.PENDING, code="refused", text="connection refused", next_attempt=when)
    assert job.state is JobState.DELIVERING
    [row] = ledger.deliveries(job.id)
    assert (row.state, row.next_attempt, row.reason_code, row.attempts) == (DeliveryState.PENDING, when, "refused", 1)
    assert ledger.claim_delivery("s", lease_s=60) is None
    clock.tick(30)
    again = ledger.claim_delivery("s", lease_s=60)
    assert (again.id, again.attempts) == (row.id, 2)
    done = ledger.finish_delivery(row.id, "s", state=DeliveryState.SENT, sent=3, statuses={})
    assert (done.reason_code, done.reason, done.next_attempt) == ("", "", None)


def test_one_delivery_is_claimed_once_and_its_lease_belongs_to_its_sender(
    ledger: Ledger, clock, delivering: Make
) -> None:
    delivering()
    row = ledger.claim_delivery("one", lease_s=60)
    assert ledger.claim_delivery("two", lease_s=60) is None
    assert ledger.renew_delivery(row.id, "one", lease_s=60)
    assert not ledger.renew_delivery(row.id, "two", lease_s=60)
    with pytest.raises(StaleState, match="not being sent by 'two'"):
        ledger.finish_delivery(row.id, "two", state=DeliveryState.SENT, sent=3, statuses={})
    with pytest.raises(NotFound):
        ledger.finish_delivery(99, "one", state=DeliveryState.SENT, sent=3, statuses={})


def test_a_delivery_whose_sender_died_is_pending_again(ledger: Ledger, clock, delivering: Make) -> None:
    job = delivering()
    row = ledger.claim_delivery("s", lease_s=60)
    clock.tick(61)
    assert ledger.sweep(max_attempts=3, retry_s=30) == [job.id]
    assert ledger.sweep(max_attempts=3, retry_s=30) == []
    with pytest.raises(StaleState):
        ledger.finish_delivery(row.id, "s", state=DeliveryState.SENT, sent=3, statuses={})
    assert ledger.claim_delivery("s2", lease_s=60).id == row.id
    assert "delivery_lease_expired" in [event.code for event in ledger.events(job.id)]


def test_a_done_job_is_delivered_again_to_the_destination_asked_for(ledger: Ledger, delivering: Make) -> None:
    delivering("pacs", "archive")
    send(ledger, DeliveryState.SENT)
    job = send(ledger, DeliveryState.SENT)
    with pytest.raises(IllegalMove, match="no delivery to nowhere"):
        ledger.redeliver(job.id, destination="nowhere")
    assert ledger.redeliver(job.id, destination="archive").state is JobState.DELIVERING
    assert [d.state for d in ledger.deliveries(job.id)] == [DeliveryState.SENT, DeliveryState.PENDING]
    assert send(ledger, DeliveryState.SENT).state is JobState.DONE


def stored_size(ledger: Ledger) -> int:
    with ledger._engine.connect() as connection:
        return connection.execute(sql("SELECT max(length(statuses)) FROM deliveries")).scalar_one()


def test_three_thousand_slices_do_not_bloat_the_ledger(ledger: Ledger, delivering: Make) -> None:
    uids = [f"2.25.{10**38 + n}" for n in range(3000)]
    job = delivering(instances=3000)
    bad = uids[17]
    row = ledger.claim_delivery("s", lease_s=60)
    statuses = {uid: "0xa700" if uid == bad else "0x0000" for uid in uids}
    row = ledger.finish_delivery(row.id, "s", state=DeliveryState.PENDING, sent=2999, statuses=statuses)
    assert row.statuses == {bad: "0xa700"}  # which one failed
    assert stored_size(ledger) < 100
    assert ledger.events(job.id)[-1].details["statuses"] == {"0x0000": 2999, "0xa700": 1}
    row = ledger.claim_delivery("s", lease_s=60)
    ledger.finish_delivery(row.id, "s", state=DeliveryState.PENDING, sent=0, statuses=dict.fromkeys(uids, "0xa700"))
    assert ledger.deliveries(job.id)[0].statuses == {"*": "0xa700"}
    row = ledger.claim_delivery("s", lease_s=60)
    ledger.finish_delivery(row.id, "s", state=DeliveryState.SENT, sent=3000, statuses=dict.fromkeys(uids, "0x0000"))
    assert ledger.deliveries(job.id)[0].statuses == {}
    assert stored_size(ledger) == 2


@given(st.dictionaries(st.from_regex(r"[0-9]{1,9}", fullmatch=True), st.sampled_from(["0x0000", "0xa700", "not_sent"])))
def test_the_statuses_that_did_not_succeed_are_read_back(statuses: dict[str, str]) -> None:
    bad = {uid: status for uid, status in statuses.items() if status != "0x0000"}
    assert spread(compact(statuses, len(statuses) + 1)) == bad


def test_an_outage_is_as_old_as_before_when_its_beginning_is_shifted_with_the_clock(
    ledger: Ledger, clock: Clock, delivering: Make
) -> None:
    job = delivering("waits", "sends", "fine")
    began = clock.now
    for _ in range(2):
        send(ledger, DeliveryState.PENDING, outage=True, next_attempt=clock.now)
    ledger.claim_delivery("s", lease_s=60)  # "fine" comes first: it was never tried
    ledger.claim_delivery("s", lease_s=60)
    clock.now += timedelta(days=1)
    assert ledger.shift_outages(86400.0) == 2
    now = {one.state: one.failing_since for one in ledger.deliveries(job.id)[:2]}
    assert now == dict.fromkeys((DeliveryState.PENDING, DeliveryState.SENDING), began + timedelta(days=1))
    assert ledger.deliveries(job.id)[2].failing_since is None
    clock.now -= timedelta(days=1)
    assert ledger.shift_outages(-86400.0) == 2
    assert {one.failing_since for one in ledger.deliveries(job.id)[:2]} == {began}
