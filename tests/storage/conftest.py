"""A ledger on a real SQLite file with a clock that tests move, and a spool."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from storage.database import default_url
from storage.ledger import Ledger, open_ledger
from storage.records import Job, JobState, NewDelivery, SeriesInfo
from storage.spool import Spool


class Clock:
    """Time stands still until `tick`."""

    def __init__(self) -> None:
        self.now = datetime(2026, 3, 1, 12, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now

    def tick(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def url(tmp_path: Path) -> str:
    return default_url(tmp_path)


@pytest.fixture
def ledger(url: str, clock: Clock) -> Iterator[Ledger]:
    ledger = open_ledger(url, clock=clock)
    yield ledger
    ledger.close()


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(tmp_path / "spool", min_free_bytes=0)


def info(series_uid: str = "1.2.3", **changes: str) -> SeriesInfo:
    return SeriesInfo(**{"study_uid": "1.2", "series_uid": series_uid, "calling_ae": "PACS", **changes})  # type: ignore[arg-type]


def pet(destination: str = "pacs", *, series_uid: str = "1.9", instances: int = 3) -> NewDelivery:
    return NewDelivery(destination=destination, kind="pet", encoding="sc", series_uid=series_uid, instances=instances)


def queued(ledger: Ledger, series_uid: str = "1.2.3") -> Job:
    job = ledger.open_job(info(series_uid))
    return ledger.move(job.id, JobState.QUEUED, code="selected", text="the only CT")


@pytest.fixture
def queue(ledger: Ledger) -> Callable[..., Job]:
    return lambda series_uid="1.2.3": queued(ledger, series_uid)


@pytest.fixture
def delivering(ledger: Ledger) -> Callable[..., Job]:
    """A job whose result waits for its destinations."""

    def make(*destinations: str, instances: int = 3) -> Job:
        queued(ledger)
        job = ledger.claim("worker", lease_s=60)
        assert job is not None
        wanted = [pet(name, instances=instances) for name in destinations or ("pacs",)]
        return ledger.complete_run(job.id, "worker", deliveries=wanted)

    return make
