"""The clockwork goes by a clock that nobody sets: what runs every so often does so whatever the time of day becomes."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path
from typing import Any, ClassVar

import pytest

from dicom_node.backup import Backups
from dicom_node.config import Config
from dicom_node.schedule import Schedule
from dicom_node.upkeep import Upkeep
from storage.ledger import Ledger, open_ledger
from storage.spool import Spool

SOON_S, RARELY_S = 0.02, 3600.0
LONG_S = 30.0  # ends a broken test only
HOUR, DAY = timedelta(hours=1), timedelta(days=1)


class WallClock(datetime):
    """The time of day of this machine, as somebody has set it."""

    ahead: ClassVar[timedelta] = timedelta()

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
        return datetime.now(tz) + cls.ahead


@pytest.fixture
def wall(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[WallClock]]:
    """A clock that can be set, for all that reads the time of day here: the node, its storage, APScheduler."""
    for name, module in list(sys.modules.items()):
        known = getattr(module, "__dict__", {}).get("datetime")
        if name.split(".")[0] in ("dicom_node", "storage", "apscheduler") and known is datetime:
            monkeypatch.setattr(module, "datetime", WallClock)
    yield WallClock
    WallClock.ahead = timedelta()


@pytest.fixture
def schedule() -> Iterator[Schedule]:
    made = Schedule()
    yield made
    made.stop()


@pytest.fixture
def node(tmp_path: Path) -> Iterator[tuple[Config, Ledger, Spool]]:
    config = Config.model_validate({"storage": {"root": str(tmp_path), "backup_at": "00:00"}})
    ledger = open_ledger(config.ledger_url)
    yield config, ledger, Spool(tmp_path, min_free_bytes=0)
    ledger.close()


class Count:
    """How often it was called; `more` waits for so many further calls."""

    def __init__(self) -> None:
        self.calls = 0
        self._called = threading.Condition()

    def __call__(self) -> None:
        with self._called:
            self.calls += 1
            self._called.notify_all()

    def more(self, calls: int = 3) -> bool:
        with self._called:
            wanted = self.calls + calls
            return self._called.wait_for(lambda: self.calls >= wanted, LONG_S)


def comes(fact: Callable[[], object]) -> bool:
    """Whether it becomes true."""
    until = time.monotonic() + LONG_S
    while not fact():
        if time.monotonic() > until:
            return False
        time.sleep(0.01)
    return True


@pytest.mark.parametrize("change", [-HOUR, -3650 * DAY, HOUR, 3650 * DAY])
def test_a_clock_that_is_set_neither_stops_the_clockwork_nor_hastens_it(
    schedule: Schedule, wall: type[WallClock], change: timedelta
) -> None:
    often, rarely = Count(), Count()
    schedule.every(SOON_S, "often", often)
    schedule.every(RARELY_S, "rarely", rarely)
    schedule.start()
    assert often.more()
    wall.ahead += change
    assert often.more()
    assert rarely.calls == 0


@pytest.mark.parametrize("change", [-HOUR, HOUR])
def test_the_sweep_notices_within_a_minute_that_the_clock_was_set(
    schedule: Schedule, wall: type[WallClock], node: tuple[Config, Ledger, Spool], change: timedelta
) -> None:
    config, ledger, spool = node
    upkeep = Upkeep(config, ledger, spool, clock=lambda: wall.now(UTC))
    swept = Count()
    schedule.every(SOON_S, "sweep", lambda: (upkeep.sweep(), swept()))
    schedule.start()
    assert swept.more()
    wall.ahead += change
    assert swept.more()
    [jump] = ledger.search_events(code="clock_jumped")
    assert jump.details["seconds"] == pytest.approx(change.total_seconds(), abs=60)  # two clocks, read in turn
    assert not upkeep.clock_trusted


def test_a_backup_is_made_on_the_day_that_the_clock_was_set_back_to(
    schedule: Schedule, wall: type[WallClock], node: tuple[Config, Ledger, Spool]
) -> None:
    config, ledger, _ = node
    wall.ahead = 3 * DAY
    backups = Backups(config, ledger, clock=lambda: wall.now(UTC))
    schedule.every(SOON_S, "backup", backups.tick)
    schedule.start()
    folder = config.storage.root / "backups"
    assert comes(lambda: len(list(folder.glob("*.sqlite"))) == 1)
    wall.ahead = timedelta()
    assert comes(lambda: len(list(folder.glob("*.sqlite"))) == 2)


def test_a_task_that_takes_long_keeps_no_other_waiting(schedule: Schedule) -> None:
    let_go, sign_of_life = threading.Event(), Count()
    for number in range(8):
        schedule.every(SOON_S, f"archive-{number}", lambda: let_go.wait(LONG_S))
    schedule.every(SOON_S, "watchdog", sign_of_life)
    schedule.start()
    assert sign_of_life.more()
    let_go.set()


def test_no_two_of_one_task_run_at_once(schedule: Schedule) -> None:
    running: list[int] = []
    most: list[int] = []
    calls = Count()

    def task() -> Any:
        running.append(1)
        most.append(len(running))
        time.sleep(3 * SOON_S)
        running.pop()
        calls()

    schedule.every(SOON_S, "task", task)
    schedule.start()
    assert calls.more()
    assert max(most) == 1


def test_a_stop_waits_for_what_runs_and_lets_nothing_begin(schedule: Schedule) -> None:
    began, let_go, ended = threading.Event(), threading.Event(), threading.Event()

    def task() -> None:
        began.set()
        let_go.wait(LONG_S)
        ended.set()

    schedule.every(SOON_S, "task", task)
    schedule.every(RARELY_S, "rarely", task)
    schedule.start()
    assert began.wait(LONG_S)
    threading.Timer(SOON_S, let_go.set).start()
    schedule.stop()
    assert ended.is_set()
    assert not {"task", "rarely"} & {thread.name for thread in threading.enumerate()}


def test_a_clockwork_that_was_never_started_can_be_stopped(schedule: Schedule) -> None:
    schedule.every(RARELY_S, "rarely", Count())
    schedule.stop()
