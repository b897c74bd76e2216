"""Proof in the ledger: goals, claims, commitment transactions, and reports that come early, late, twice, or astray."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import create_engine

import storage.database as database
from storage.database import default_url
from storage.errors import StaleState
from storage.ledger import Ledger, open_ledger
from storage.proofs import Report
from storage.records import CommitmentState, Delivery, DeliveryState, Job, JobState

Make = Callable[..., Job]
SENT, COMMITTED, VISIBLE = DeliveryState.SENT, DeliveryState.COMMITTED, DeliveryState.VISIBLE
UIDS = ("1.1", "1.2", "1.3")


def sent(ledger: Ledger, goal: DeliveryState = VISIBLE, statuses: Mapping[str, str] | None = None) -> Delivery:
    """Whatever waits first, sent."""
    row = ledger.claim_delivery("s", lease_s=60)
    assert row is not None
    return ledger.finish_delivery(row.id, "s", state=SENT, sent=3, statuses=statuses or {}, goal=goal)


def asked(ledger: Ledger, uid: str = "2.25.1") -> Delivery:
    """Sent, claimed, and asked for its commitment."""
    sent(ledger)
    row = ledger.claim_proof("s", lease_s=60)
    assert row is not None
    ledger.open_commitment(row.id, "s", uid)
    return row


def wait(ledger: Ledger, row: Delivery, clock: Any, seconds: float = 3600) -> Delivery:
    due = clock() + timedelta(seconds=seconds)
    return ledger.finish_proof(row.id, "s", state=row.state, goal=VISIBLE, due=due, counted=True, code="awaited")


def test_a_job_is_done_when_its_delivery_reaches_its_goal_and_not_before(
    ledger: Ledger, clock: Any, delivering: Make
) -> None:
    job = delivering()
    row = sent(ledger)
    assert (row.goal, row.proven, row.sent_at) == (VISIBLE, False, clock())
    assert ledger.get(job.id).state is JobState.DELIVERING
    for state in (COMMITTED, VISIBLE):
        clock.tick(5)
        claimed = ledger.claim_proof("s", lease_s=60)
        assert claimed is not None
        row = ledger.finish_proof(row.id, "s", state=state, goal=VISIBLE)
    assert row.proven
    assert row.visible_at == clock()
    assert row.sent_at == clock() - timedelta(seconds=10)
    assert ledger.get(job.id).state is JobState.DONE
    assert ledger.claim_proof("s", lease_s=60) is None
    codes = [event.code for event in ledger.events(job.id)]
    assert codes[-4:] == ["delivery_sent", "delivery_committed", "delivery_visible", "done"]


def test_a_delivery_whose_goal_is_sent_is_never_claimed_for_proof(ledger: Ledger, delivering: Make) -> None:
    job = delivering()
    sent(ledger, goal=SENT)
    assert ledger.claim_proof("s", lease_s=60) is None
    assert ledger.get(job.id).state is JobState.DONE


def test_a_goal_that_is_lowered_to_what_was_reached_ends_the_delivery_with_its_reason(
    ledger: Ledger, delivering: Make
) -> None:
    job = delivering()
    row = sent(ledger)
    ledger.claim_proof("s", lease_s=60)
    row = ledger.finish_proof(row.id, "s", state=SENT, goal=SENT, code="not_offered", text="no C-FIND")
    assert (row.state, row.proven, row.reason_code, row.reason) == (SENT, True, "not_offered", "no C-FIND")
    assert ledger.get(job.id).state is JobState.DONE


def test_a_proof_that_never_came_fails_the_job_and_keeps_what_was_reached(
    ledger: Ledger, clock: Any, delivering: Make
) -> None:
    job = delivering()
    row = sent(ledger)
    ledger.claim_proof("s", lease_s=60)
    row = ledger.finish_proof(
        row.id, "s", state=DeliveryState.FAILED, goal=VISIBLE, code="not_visible", text="it shows 2 of 3"
    )
    assert (row.state, row.sent_at) == (DeliveryState.FAILED, clock())
    assert "it shows 2 of 3" in ledger.get(job.id).reason
    assert ledger.retry(job.id).state is JobState.DELIVERING
    [again] = ledger.deliveries(job.id)
    assert (again.state, again.sent_at, again.checks) == (DeliveryState.PENDING, None, 0)


def test_proof_is_claimed_once_and_only_by_its_lease_ended(ledger: Ledger, clock: Any, delivering: Make) -> None:
    delivering()
    row = sent(ledger)
    assert ledger.claim_proof("one", lease_s=60) is not None
    assert ledger.claim_proof("two", lease_s=60) is None
    assert ledger.renew_delivery(row.id, "one", lease_s=60)
    with pytest.raises(StaleState, match="not asked by 'two'"):
        ledger.finish_proof(row.id, "two", state=VISIBLE, goal=VISIBLE)
    with pytest.raises(StaleState):
        ledger.open_commitment(row.id, "two", "2.25.9")
    clock.tick(61)  # whoever asked has died
    assert ledger.claim_proof("two", lease_s=60) is not None


def test_what_waits_is_due_at_its_time_and_counted(ledger: Ledger, clock: Any, delivering: Make) -> None:
    delivering()
    row = asked(ledger)
    assert wait(ledger, row, clock, 30).checks == 1
    assert ledger.claim_proof("s", lease_s=60) is None
    clock.tick(30)
    again = ledger.claim_proof("s", lease_s=60)
    assert again is not None
    assert wait(ledger, again, clock).checks == 2


def test_a_report_is_kept_and_its_delivery_is_due_at_once(ledger: Ledger, clock: Any, delivering: Make) -> None:
    delivering()
    row = wait(ledger, asked(ledger), clock)
    assert ledger.take_report("2.25.1", committed=UIDS[:2], failed={"1.3": "0x0112"}) is Report.KEPT
    [commitment] = ledger.commitments(row.id)
    assert (commitment.state, commitment.committed, commitment.failed) == (
        CommitmentState.REPORTED,
        UIDS[:2],
        {"1.3": "0x0112"},
    )
    assert ledger.claim_proof("s", lease_s=60) is not None
    settled = {"2.25.1": CommitmentState.COMMITTED}
    ledger.finish_proof(row.id, "s", state=COMMITTED, goal=VISIBLE, settled=settled)
    [commitment] = ledger.commitments(row.id)
    assert (commitment.state, commitment.committed) == (CommitmentState.COMMITTED, ())  # the UIDs do not stay


def test_a_report_that_comes_while_the_question_is_asked_is_not_forgotten(
    ledger: Ledger, clock: Any, delivering: Make
) -> None:
    delivering()
    row = asked(ledger)
    assert ledger.take_report("2.25.1", committed=UIDS, failed={}) is Report.KEPT
    assert wait(ledger, row, clock).next_attempt == clock()


def test_a_late_report_of_a_transaction_that_lapsed_counts(ledger: Ledger, clock: Any, delivering: Make) -> None:
    delivering()
    row = asked(ledger)
    ledger.open_commitment(row.id, "s", "2.25.2")
    assert [one.state for one in ledger.commitments(row.id)] == [CommitmentState.LAPSED, CommitmentState.ASKED]
    assert ledger.take_report("2.25.1", committed=UIDS, failed={}) is Report.KEPT


def test_a_report_comes_twice_astray_or_after_the_instances_were_sent_again(
    ledger: Ledger, clock: Any, delivering: Make
) -> None:
    job = delivering()
    row = asked(ledger)
    assert ledger.take_report("2.25.404", committed=UIDS, failed={}) is Report.UNKNOWN
    ledger.open_commitment(row.id, "s", "2.25.2")
    assert ledger.take_report("2.25.1", committed=(), failed={"1.1": "0x0110"}) is Report.KEPT
    assert ledger.take_report("2.25.1", committed=UIDS, failed={}) is Report.AGAIN
    ledger.finish_proof(row.id, "s", state=DeliveryState.PENDING, goal=VISIBLE, sent=2, statuses={"1.1": "x"})
    assert ledger.take_report("2.25.2", committed=UIDS, failed={}) is Report.STALE
    again = sent(ledger)
    assert (again.attempts, again.statuses) == (2, {})
    assert [event.code for event in ledger.events(job.id)].count("commitment_late") == 1
    assert all(one.attempt == 1 for one in ledger.commitments(row.id))


def test_a_report_about_what_was_sent_before_a_retry_proves_nothing(
    ledger: Ledger, clock: Any, delivering: Make
) -> None:
    job = delivering()
    row = wait(ledger, asked(ledger), clock)
    ledger.cancel(job.id)
    ledger.retry(job.id)
    clock.tick(3600)
    row = ledger.claim_proof("s", lease_s=60) or row  # it was sent: only its proof goes on
    ledger.finish_proof(row.id, "s", state=VISIBLE, goal=VISIBLE)
    ledger.redeliver(job.id)
    assert sent(ledger).attempts == 1
    assert ledger.take_report("2.25.1", committed=UIDS, failed={}) is Report.STALE


def test_a_start_takes_back_the_questions_of_an_earlier_life_and_no_others(
    ledger: Ledger, clock: Any, delivering: Make
) -> None:
    delivering("one", "two")
    sent(ledger)
    sent(ledger)
    assert ledger.claim_proof("me", lease_s=3600) is not None
    assert ledger.claim_proof("other", lease_s=3600) is not None
    assert ledger.reclaim_proofs("me") == 1
    mine = ledger.claim_proof("me", lease_s=60)
    assert mine is not None
    assert mine.destination == "one"
    assert ledger.claim_proof("me", lease_s=60) is None


def test_old_transactions_are_forgotten_with_the_events(ledger: Ledger, clock: Any, delivering: Make) -> None:
    delivering()
    row = asked(ledger)
    ledger.finish_proof(row.id, "s", state=VISIBLE, goal=VISIBLE)
    clock.tick(10)
    ledger.forget_before(clock())
    assert ledger.commitments(row.id) == []
    assert ledger.take_report("2.25.1", committed=UIDS, failed={}) is Report.UNKNOWN


def test_an_old_transaction_of_a_job_that_is_not_at_its_end_still_takes_its_report(
    ledger: Ledger, clock: Any, delivering: Make
) -> None:
    delivering()
    row = wait(ledger, asked(ledger), clock)
    clock.tick(10)
    ledger.forget_before(clock())
    assert [one.transaction_uid for one in ledger.commitments(row.id)] == ["2.25.1"]
    assert ledger.take_report("2.25.1", committed=UIDS, failed={}) is Report.KEPT


def test_deliveries_of_the_first_release_end_at_sent(tmp_path) -> None:
    engine = create_engine(default_url(tmp_path))
    database._prepare_sqlite(engine)
    database.upgrade(engine, "0001")
    jobs = "id, state, study_uid, series_uid, accession, patient_id, modality, sop_class_uid, series_number"
    rest = "series_description, study_date, calling_ae, peer_address, reason_code, reason, stage, supersedes"
    with engine.begin() as connection:
        connection.exec_driver_sql(
            f"INSERT INTO jobs ({jobs}, {rest}, source_digest, lease_owner, created, updated, instances, attempts,"
            f" has_result, details) VALUES ('ab', 'DELIVERING'{', 0' * 17}, '2026-01-02 03:04:05.000000',"
            " '2026-01-02 03:04:05.000000', 3, 1, 1, '{}')"
        )
        connection.exec_driver_sql(
            "INSERT INTO deliveries (job_id, destination, kind, encoding, series_uid, instances, state, sent, attempts,"
            " reason_code, reason, updated, lease_owner, statuses) VALUES ('ab', 'pacs', 'pet', 'sc', '1.9', 3, 'SENT',"
            " 3, 1, '', '', '2026-01-02 03:04:05.000000', '', '{}')"
        )
    engine.dispose()
    ledger = open_ledger(default_url(tmp_path))
    [row] = ledger.deliveries("ab")
    assert (row.state, row.goal, row.proven, row.sent_at) == (SENT, SENT, True, None)
    assert ledger.claim_proof("s", lease_s=60) is None
    ledger.close()
