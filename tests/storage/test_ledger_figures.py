"""What the ledger counts for the metrics."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from storage.figures import Figures
from storage.ledger import Ledger, open_ledger
from storage.records import DeliveryState, JobState, NewDelivery, SeriesInfo
from storage.usage import FOLDERS, bytes_by_folder

START = datetime(2026, 11, 22, 8, 0, tzinfo=UTC)
PET = NewDelivery(destination="pacs", kind="pet", encoding="sc", series_uid="1.9", instances=3)


class Clock:
    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> datetime:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ledger(tmp_path: Path, clock: Clock) -> Iterator[Ledger]:
    made = open_ledger(f"sqlite:///{tmp_path / 'ledger.sqlite'}", clock=clock)
    yield made
    made.close()


def queue(ledger: Ledger, series_uid: str) -> str:
    job = ledger.open_job(SeriesInfo(study_uid="1.2", series_uid=series_uid))
    ledger.move(job.id, JobState.QUEUED, code="chosen", text="")
    return job.id


def test_an_empty_ledger_has_nothing_that_waits(ledger: Ledger) -> None:
    assert ledger.figures() == Figures(jobs={}, deliveries={}, notes={}, queued_since=None, delivering_since=None)


def test_the_oldest_is_the_one_that_waits_longest_in_its_state(ledger: Ledger, clock: Clock) -> None:
    first = queue(ledger, "1.2.1")
    clock.now += timedelta(minutes=5)
    queue(ledger, "1.2.2")
    assert ledger.figures().queued_since == START
    ledger.claim("node", lease_s=60)
    assert ledger.figures().queued_since == START + timedelta(minutes=5)
    clock.now += timedelta(minutes=5)
    ledger.complete_run(first, "node", deliveries=[PET])
    found = ledger.figures()
    assert found.jobs == {JobState.DELIVERING: 1, JobState.QUEUED: 1}
    assert found.deliveries == {("pacs", DeliveryState.PENDING): 1}
    assert found.delivering_since == START + timedelta(minutes=10)


def test_a_job_that_is_tried_again_waits_since_then(ledger: Ledger, clock: Clock) -> None:
    job_id = queue(ledger, "1.2.1")
    ledger.cancel(job_id)
    clock.now += timedelta(days=9)
    ledger.retry(job_id)
    assert ledger.figures().queued_since == START + timedelta(days=9)


def test_rejection_notes_are_counted_apart(ledger: Ledger) -> None:
    job_id = queue(ledger, "1.2.1")
    ledger.claim("node", lease_s=60)
    note = NewDelivery(destination="pacs", kind="rejection", encoding="kos", series_uid="1.8", instances=1)
    ledger.complete_run(job_id, "node", deliveries=[PET, note])
    found = ledger.figures()
    assert found.deliveries == {("pacs", DeliveryState.PENDING): 1}
    assert found.notes == {("pacs", DeliveryState.PENDING): 1}


def test_a_file_with_two_names_counts_once(tmp_path: Path) -> None:
    ct = tmp_path / "work" / "a" / "ct"
    ct.mkdir(parents=True)
    (ct / "1.dcm").write_bytes(b"x" * 1000)
    (tmp_path / "work" / "b").mkdir()
    (tmp_path / "work" / "b" / "1.dcm").hardlink_to(ct / "1.dcm")
    (tmp_path / "outbox").mkdir()
    (tmp_path / "outbox" / "2.dcm").write_bytes(b"x" * 7)
    found = bytes_by_folder(tmp_path)
    assert found == {**dict.fromkeys(FOLDERS, 0), "work": 1000, "outbox": 7}


def test_pulls_and_commitments_are_counted_by_their_events_and_a_jobs_own_are_not(ledger: Ledger) -> None:
    for job_id, code in (("", "pull_ended"), ("", "pull_ended"), ("", "commitment_reported"), ("", "quarantined")):
        ledger.note(job_id, code, "")
    ledger.note(queue(ledger, "1.2.1"), "commitment_reported", "")
    found = ledger.figures(events=("pull_ended", "pull_failed", "commitment_reported", "commitment_report_failed"))
    assert found.events == {"pull_ended": 2, "commitment_reported": 1}
