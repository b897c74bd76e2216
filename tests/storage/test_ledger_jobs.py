"""Jobs: states, claims, leases, runs, an operator's commands."""

from __future__ import annotations

import itertools
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import text as sql

from storage.errors import IllegalMove, NotFound, OtherSeries, StaleState
from storage.ledger import MOVES, Ledger, open_ledger
from storage.moves import check_move
from storage.records import FINAL_JOB_STATES, DeliveryState, Job, JobFilter, JobState, NewDelivery, SeriesInfo

Make = Callable[..., Job]
PET = NewDelivery(destination="pacs", kind="pet", encoding="sc", series_uid="1.9", instances=3)
INFO = SeriesInfo(study_uid="1.2", series_uid="1.2.3", accession="A1", patient_id="P1", calling_ae="PACS")


def codes(ledger: Ledger, job_id: str) -> list[str]:
    return [event.code for event in ledger.events(job_id)]


def force(ledger: Ledger, job_id: str, state: JobState) -> None:
    """Put a job into a state without a move, to try the moves from there."""
    with ledger._engine.begin() as connection:
        connection.execute(sql("UPDATE jobs SET state = :s WHERE id = :i"), {"s": state.value, "i": job_id})


def test_the_table_of_moves_names_every_state_and_no_final_state_leads_back_to_receiving() -> None:
    assert set(MOVES) == set(JobState)
    for state in JobState:
        assert JobState.RECEIVING not in MOVES[state]
        assert state not in MOVES[state]
    assert all(MOVES[state] for state in FINAL_JOB_STATES)  # an operator can always do something


def test_every_pair_of_states_moves_exactly_as_the_table_says(ledger: Ledger) -> None:
    job = ledger.open_job(INFO)
    for now, to in itertools.product(JobState, JobState):
        force(ledger, job.id, now)
        before = len(ledger.events(job.id))
        if to in MOVES[now]:
            assert ledger.move(job.id, to, code="tried", text="").state is to
            assert len(ledger.events(job.id)) == before + 1
        else:
            with pytest.raises(IllegalMove, match=f"is {now}, cannot become {to}"):
                ledger.move(job.id, to, code="tried", text="")
            assert len(ledger.events(job.id)) == before
            with pytest.raises(IllegalMove):
                check_move(job.id, now, to)


def test_a_new_job_is_read_back_as_it_was_opened(ledger: Ledger, clock: Callable[[], object]) -> None:
    job = ledger.open_job(INFO, supersedes="ab")
    assert ledger.get(job.id) == job
    assert (job.state, job.info, job.supersedes, job.created) == (JobState.RECEIVING, INFO, "ab", clock())
    assert job.created.utcoffset() == timedelta(0)
    assert ledger.receiving() == [job]


def test_an_unknown_job_is_not_found_by_any_command(ledger: Ledger) -> None:
    for command in (ledger.get, ledger.release, ledger.retry, ledger.cancel, ledger.redeliver):
        with pytest.raises(NotFound, match="no job 'nothing'"):
            command("nothing")


def test_a_move_and_its_event_are_one_transaction(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    job = ledger.open_job(INFO)
    before = ledger.events(job.id)

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("killed between the two")

    monkeypatch.setattr(ledger, "_event", fail)
    with pytest.raises(RuntimeError):
        ledger.move(job.id, JobState.QUEUED, code="selected", text="")
    monkeypatch.undo()
    assert ledger.get(job.id).state is JobState.RECEIVING
    assert ledger.events(job.id) == before


def test_a_move_keeps_its_reason_and_merges_its_details(ledger: Ledger) -> None:
    job = ledger.open_job(INFO)
    ledger.update(job.id, instances=7, stage="read", source_digest="ff", details={"a": 1, "b": 1})
    moved = ledger.move(job.id, JobState.REJECTED, code="not_chosen", text="a better one", details={"b": 2})
    assert (moved.reason_code, moved.reason) == ("not_chosen", "a better one")
    assert (moved.instances, moved.stage, moved.source_digest) == (7, "read", "ff")
    assert moved.details == {"a": 1, "b": 2}
    event = ledger.events(job.id)[-1]
    assert (event.code, event.stage) == ("not_chosen", "read")
    assert event.details == {"b": 2, "from": "RECEIVING", "to": "REJECTED"}


def test_a_move_from_another_state_than_expected_is_stale(ledger: Ledger, queue: Make) -> None:
    job = queue()
    with pytest.raises(StaleState, match="is QUEUED, expected RECEIVING"):
        ledger.move(job.id, JobState.CANCELLED, code="x", text="", expected={JobState.RECEIVING})
    assert ledger.get(job.id).state is JobState.QUEUED


def test_the_oldest_queued_job_whose_time_has_come_is_claimed_first(ledger: Ledger, clock, queue: Make) -> None:
    first, second, third = queue("1.1"), queue("1.2"), queue("1.3")
    assert ledger.claim("w", lease_s=60).id == first.id
    later = clock() + timedelta(seconds=30)
    ledger.fail_run(first.id, "w", code="oom", text="", permanent=False, retry_at=later, max_attempts=3)
    assert [ledger.claim("w", lease_s=60).id, ledger.claim("w", lease_s=60).id] == [second.id, third.id]
    assert ledger.claim("w", lease_s=60) is None
    clock.tick(31)
    again = ledger.claim("w", lease_s=60)
    assert (again.id, again.attempts, again.not_before) == (first.id, 2, None)


def test_each_job_is_claimed_by_one_of_many_threads(ledger: Ledger, queue: Make) -> None:
    jobs = {queue(f"1.{n}").id for n in range(12)}
    claimed: list[tuple[str, str]] = []
    start = threading.Barrier(4)

    def work(owner: str) -> None:
        start.wait()
        while job := ledger.claim(owner, lease_s=60):
            claimed.append((job.id, owner))

    threads = [threading.Thread(target=work, args=(f"w{n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(job_id for job_id, _ in claimed) == sorted(jobs)
    assert all(ledger.get(job_id).lease_owner == owner for job_id, owner in claimed)


CLAIMS = """
import sys
from storage.ledger import open_ledger
ledger = open_ledger(sys.argv[1])
while job := ledger.claim(sys.argv[2], lease_s=60):
    print(job.id, flush=True)
ledger.close()
"""


def test_two_processes_share_a_ledger_and_never_a_job(ledger: Ledger, url: str, queue: Make) -> None:
    jobs = [queue(f"1.{n}").id for n in range(10)]
    others = [
        subprocess.Popen([sys.executable, "-c", CLAIMS, url, f"p{n}"], stdout=subprocess.PIPE, text=True)
        for n in range(2)
    ]
    mine = []
    while job := ledger.claim("here", lease_s=60):  # this process writes while the others start and write
        mine.append(job.id)
        ledger.note(job.id, "working", "still")
    theirs = [line for other in others for line in other.communicate(timeout=60)[0].split()]
    assert [other.returncode for other in others] == [0, 0]
    assert sorted(mine + theirs) == sorted(jobs)


def test_a_reader_does_not_wait_for_a_writer(ledger: Ledger, url: str, queue: Make) -> None:
    job = queue()
    other = open_ledger(url)
    with ledger._write() as session:
        session.execute(sql("UPDATE jobs SET stage = 'held open'"))
        assert other.get(job.id).stage == ""
    assert other.get(job.id).stage == "held open"
    other.close()


def test_a_lease_is_renewed_by_its_owner_only(ledger: Ledger, clock, queue: Make) -> None:
    queue()
    job = ledger.claim("w", lease_s=60)
    clock.tick(50)
    assert ledger.renew(job.id, "w", lease_s=60)
    assert not ledger.renew(job.id, "someone else", lease_s=60)
    assert ledger.get(job.id).lease_until == clock() + timedelta(seconds=60)
    ledger.cancel(job.id)
    assert not ledger.renew(job.id, "w", lease_s=60)
    assert ledger.get(job.id).lease_owner == ""


def test_a_run_whose_lease_expired_is_queued_again_until_its_attempts_are_used(
    ledger: Ledger, clock, queue: Make
) -> None:
    job_id = queue().id
    for attempt in (1, 2, 3):
        assert ledger.claim("w", lease_s=60).attempts == attempt
        ledger.update(job_id, stage="synthesis")
        clock.tick(59)
        assert ledger.sweep(max_attempts=3, retry_s=30) == []
        clock.tick(2)
        assert ledger.sweep(max_attempts=3, retry_s=30) == [job_id]
        assert ledger.sweep(max_attempts=3, retry_s=30) == []
        assert ledger.claim("w", lease_s=60) is None
        clock.tick(30)
    job = ledger.get(job_id)
    assert (job.state, job.reason_code) == (JobState.FAILED, "lease_expired")
    assert job.reason == "w stopped in stage synthesis, attempt 3"
    assert codes(ledger, job_id).count("lease_expired") == 3
    with pytest.raises(StaleState):
        ledger.complete_run(job_id, "w", deliveries=[PET])


@pytest.mark.parametrize(
    ("permanent", "rejected", "attempts", "state"),
    [
        (False, False, 3, JobState.QUEUED),
        (False, False, 1, JobState.FAILED),
        (True, False, 3, JobState.FAILED),
        (True, True, 3, JobState.REJECTED),
    ],
)
def test_a_failed_run_goes_where_the_policy_says(
    ledger: Ledger, clock, queue: Make, permanent: bool, rejected: bool, attempts: int, state: JobState
) -> None:
    queue()
    job = ledger.claim("w", lease_s=60)
    when = clock() + timedelta(seconds=30)
    ended = ledger.fail_run(
        job.id, "w", code="c", text="t", permanent=permanent, rejected=rejected, retry_at=when, max_attempts=attempts
    )
    assert (ended.state, ended.reason_code, ended.reason, ended.lease_owner) == (state, "c", "t", "")
    assert ended.not_before == (when if state is JobState.QUEUED else None)
    with pytest.raises(StaleState, match="not run by 'w'"):
        ledger.fail_run(job.id, "w", code="c", text="t", permanent=True, max_attempts=1)


def test_a_completed_run_is_completed_once_whatever_is_started_again(ledger: Ledger, clock, queue: Make) -> None:
    queue()
    job = ledger.claim("w", lease_s=60)
    first = ledger.complete_run(job.id, "w", deliveries=[PET], details={"stage_seconds": {"read": 1.5}})
    assert first.details["stage_seconds"] == {"read": 1.5}
    assert ledger.complete_run(job.id, "another", deliveries=[PET]) == first
    assert len(ledger.deliveries(job.id)) == 1
    assert codes(ledger, job.id).count("completed") == 1


def test_a_result_found_after_a_restart_opens_no_second_delivery(ledger: Ledger, clock, delivering: Make) -> None:
    job = delivering()
    force(ledger, job.id, JobState.RUNNING)  # killed before the answer reached the worker
    ledger.sweep(max_attempts=3, retry_s=0)
    assert ledger.claim("w2", lease_s=60).id == job.id
    assert ledger.complete_run(job.id, "w2", deliveries=[PET]).state is JobState.DELIVERING
    assert len(ledger.deliveries(job.id)) == 1


def test_what_was_sent_is_not_sent_again_and_its_series_is_never_forgotten(ledger: Ledger, delivering: Make) -> None:
    job = delivering()
    sending = ledger.claim_delivery("s", lease_s=60)
    ledger.finish_delivery(sending.id, "s", state=DeliveryState.SENT, sent=3, statuses={})
    force(ledger, job.id, JobState.QUEUED)
    ledger.claim("w", lease_s=60)
    assert ledger.complete_run(job.id, "w", deliveries=[PET]).state is JobState.DONE
    ledger.redeliver(job.id)  # the row forgets how many were sent, the history does not
    force(ledger, job.id, JobState.QUEUED)
    ledger.claim("w", lease_s=60)
    other = NewDelivery(destination="pacs", kind="pet", encoding="sc", series_uid="1.10", instances=3)
    with pytest.raises(OtherSeries, match=f"pacs has pet series {PET.series_uid}"):
        ledger.complete_run(job.id, "w", deliveries=[other])
    [row] = ledger.deliveries(job.id)
    assert row.series_uid == PET.series_uid
    assert ledger.get(job.id).state is JobState.RUNNING


def test_a_series_that_never_arrived_may_become_another(ledger: Ledger, delivering: Make) -> None:
    job = delivering()
    sending = ledger.claim_delivery("s", lease_s=60)
    ledger.finish_delivery(sending.id, "s", state=DeliveryState.FAILED, sent=0, statuses={})
    force(ledger, job.id, JobState.QUEUED)
    ledger.claim("w", lease_s=60)
    other = NewDelivery(destination="pacs", kind="pet", encoding="sc", series_uid="1.10", instances=3)
    assert ledger.complete_run(job.id, "w", deliveries=[other]).state is JobState.DELIVERING
    [row] = ledger.deliveries(job.id)
    assert (row.state, row.series_uid, row.sent) == (DeliveryState.PENDING, "1.10", 0)


def test_a_run_without_destinations_is_done(ledger: Ledger, queue: Make) -> None:
    queue()
    job = ledger.claim("w", lease_s=60)
    assert ledger.complete_run(job.id, "w", deliveries=[]).state is JobState.DONE


def test_a_held_result_is_delivered_only_after_its_release(ledger: Ledger, queue: Make) -> None:
    queue()
    job = ledger.claim("w", lease_s=60)
    held = ledger.complete_run(job.id, "w", deliveries=[PET], held=("body_empty", "nothing in the body"))
    assert (held.state, held.reason_code) == (JobState.HELD, "body_empty")
    assert ledger.claim_delivery("s", lease_s=60) is None
    assert ledger.release(job.id).state is JobState.DELIVERING
    assert ledger.claim_delivery("s", lease_s=60) is not None


def test_a_job_held_before_its_run_is_released_to_the_queue(ledger: Ledger) -> None:
    job = ledger.open_job(INFO)
    ledger.move(job.id, JobState.HELD, code="rule", text="rule 'children'")
    assert ledger.release(job.id).state is JobState.QUEUED
    with pytest.raises(IllegalMove, match="only a HELD job"):
        ledger.release(job.id)


@pytest.mark.parametrize("state", [JobState.FAILED, JobState.REJECTED, JobState.CANCELLED])
def test_a_job_without_result_is_retried_with_all_its_attempts(ledger: Ledger, queue: Make, state: JobState) -> None:
    queue()
    job = ledger.claim("w", lease_s=60)
    ledger.move(job.id, state, code="x", text="y")
    retried = ledger.retry(job.id)
    assert (retried.state, retried.attempts) == (JobState.QUEUED, 0)
    with pytest.raises(IllegalMove, match="only a FAILED"):
        ledger.retry(job.id)


def test_a_cancelled_job_drops_what_waits_and_a_retry_brings_it_back(ledger: Ledger, delivering: Make) -> None:
    job = delivering("pacs", "archive")
    sending = ledger.claim_delivery("s", lease_s=60)
    assert ledger.cancel(job.id).state is JobState.CANCELLED
    assert {d.state for d in ledger.deliveries(job.id)} == {DeliveryState.CANCELLED}
    assert not ledger.renew_delivery(sending.id, "s", lease_s=60)
    with pytest.raises(StaleState, match="is CANCELLED"):
        ledger.finish_delivery(sending.id, "s", state=DeliveryState.SENT, sent=3, statuses={})
    assert ledger.retry(job.id).state is JobState.DELIVERING
    assert {d.state for d in ledger.deliveries(job.id)} == {DeliveryState.PENDING}


def test_a_job_whose_result_was_removed_can_be_run_again(ledger: Ledger, delivering: Make) -> None:
    job = delivering()
    ledger.cancel(job.id)
    assert ledger.retry(job.id, rerun=True).state is JobState.QUEUED


def test_a_done_job_is_not_cancelled(ledger: Ledger, queue: Make) -> None:
    queue()
    job = ledger.claim("w", lease_s=60)
    ledger.complete_run(job.id, "w", deliveries=[])
    with pytest.raises(IllegalMove, match="is DONE, cannot become CANCELLED; possible: DELIVERING"):
        ledger.cancel(job.id)


def test_jobs_are_found_by_every_field_of_the_filter(ledger: Ledger, clock) -> None:
    one = ledger.open_job(INFO)
    clock.tick(100)
    two = ledger.open_job(
        SeriesInfo(
            study_uid="5", series_uid="5.1", accession="A2", patient_id="P2", calling_ae="CT1", peer_address="::1"
        )
    )
    ledger.move(two.id, JobState.QUEUED, code="x", text="")

    def found(**wanted: object) -> list[str]:
        return [job.id for job in ledger.find(JobFilter(**wanted))]

    assert found() == [two.id, one.id]
    assert found(limit=1) == [two.id]
    assert found(states=(JobState.QUEUED, JobState.DONE)) == [two.id]
    for field, value in (
        ("accession", "A1"),
        ("patient_id", "P1"),
        ("study_uid", "1.2"),
        ("series_uid", "1.2.3"),
        ("peer", "PACS"),
    ):
        assert found(**{field: value}) == [one.id], field
    assert found(peer="::1") == [two.id]
    assert found(since=clock() - timedelta(seconds=50)) == [two.id]
    assert found(until=clock() - timedelta(seconds=50)) == [one.id]
    assert found(accession="A") == []
    assert [job.id for job in ledger.jobs_of_series("5.1")] == [two.id]
    assert [job.id for job in ledger.jobs_of_study("1.2")] == [one.id]


def test_a_job_is_found_by_the_start_of_its_id_and_nothing_else_is_a_pattern(ledger: Ledger) -> None:
    job, other = ledger.open_job(INFO), ledger.open_job(INFO)
    assert ledger.find_by_prefix(job.id) == [job]
    assert job in ledger.find_by_prefix(job.id[:4])
    assert {found.id for found in ledger.find_by_prefix("")} == {job.id, other.id}
    for wildcard in ("%", "_", "%' OR 1=1 --"):
        assert ledger.find_by_prefix(wildcard) == []


def test_a_naive_time_is_refused(ledger: Ledger, clock) -> None:
    with pytest.raises(Exception, match="aware times only"):
        ledger.find(JobFilter(since=clock().replace(tzinfo=None)))


def test_what_a_peer_wrote_becomes_one_printable_line(ledger: Ledger, tmp_path: Path) -> None:
    hostile = "A\r\n\x00'; DROP TABLE jobs; --\ud800\x1b[2J<script>"
    job = ledger.open_job(SeriesInfo(study_uid="1.2", series_uid="1.2.3", accession=hostile, series_description="山田"))
    ledger.note(job.id, "odd", hostile, details={"accession": hostile, "value": float("nan"), "path": tmp_path})
    shown = ledger.get(job.id).info.accession
    assert shown.isprintable()
    assert "DROP TABLE" in shown  # kept, as text
    assert ledger.get(job.id).info.series_description == "山田"
    assert [found.id for found in ledger.find(JobFilter(accession=hostile))] == [job.id]
    [event] = ledger.events_of_accession(hostile)
    assert event.text.isprintable()
    assert event.details["value"] is None
    assert event.details["path"] == str(tmp_path)


def test_events_of_no_job_are_found_by_study_accession_code_and_time(ledger: Ledger, clock) -> None:
    ledger.note("", "dropped", "an SR", stage="intake", seconds=0.5, details={"study_uid": "7", "accession": "A7"})
    clock.tick(10)
    ledger.note("", "refused", "unknown AE")
    [event] = ledger.events_of_study("7")
    assert (event.job_id, event.code, event.stage, event.seconds) == ("", "dropped", "intake", 0.5)
    assert ledger.events_of_accession("A7") == [event]
    assert [e.code for e in ledger.search_events()] == ["refused", "dropped"]
    assert ledger.search_events(code="dropped") == [event]
    assert [e.code for e in ledger.search_events(since=clock())] == ["refused"]
    assert [e.code for e in ledger.search_events(limit=1)] == ["refused"]


def test_old_events_are_forgotten_but_not_those_of_a_living_job(ledger: Ledger, clock, queue: Make) -> None:
    living, ended = queue("1.1"), queue("1.2")
    ledger.cancel(ended.id)
    ledger.note("", "dropped", "an SR")
    clock.tick(100)
    ledger.note("", "dropped", "another SR")
    assert ledger.forget_before(clock()) == 4
    assert codes(ledger, living.id) == ["opened", "selected"]
    assert codes(ledger, ended.id) == []
    assert len(ledger.search_events(code="dropped")) == 1


def test_the_file_is_in_wal_mode_and_commits_are_fully_synchronous(ledger: Ledger, tmp_path: Path) -> None:
    with ledger._engine.connect() as connection:
        pragmas = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        }
    assert pragmas == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 30000}
    assert sqlite3.connect(tmp_path / "ledger.sqlite").execute("PRAGMA integrity_check").fetchone() == ("ok",)
