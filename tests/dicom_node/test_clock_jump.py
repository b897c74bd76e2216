"""The machine's clock jumps, forward and back: nothing waits for hours, is run twice, removed early or told twice."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from ct_factory import write_ct
from pydicom import dcmread
from small_node import FolderPacs, SmallNode

from dicom_node.upkeep import STEADY_S, ClockWatch, Upkeep
from storage.errors import NoSpace
from storage.ledger import open_ledger
from storage.records import JobState

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
DAY, HOUR = timedelta(days=1), timedelta(hours=1)
SLOW = {"destinations": [{"name": "pacs", "peer": "pacs", "verify": False}]}


@dataclass
class Machine:
    """A wall clock that can be set, and a steady one that cannot."""

    wall: datetime = NOON
    steady: float = 0.0

    def __call__(self) -> datetime:
        return self.wall

    def pass_time(self, seconds: float) -> None:
        self.wall += timedelta(seconds=seconds)
        self.steady += seconds


class Lab:
    """A small node on such a machine, with its upkeep."""

    def __init__(self, folder: Path) -> None:
        self.machine = Machine()
        self.pacs = FolderPacs(folder / "pacs")
        self.pacs.folder.mkdir()
        self.root = folder / "spool"
        files = write_ct(folder / "ct", np.zeros((4, 8, 8), dtype=np.int16), spacing_mm=(2.0, 2.0, 2.0))
        self.files = [path.rename(path.with_name(f"{dcmread(path).SOPInstanceUID}.dcm")) for path in files]
        self.start()

    def start(self) -> None:
        self.node = SmallNode(
            self.root, self.pacs, clock=self.machine, trusted=lambda: self.upkeep.clock_trusted, **SLOW
        )
        self.upkeep = Upkeep(
            self.node.config, self.node.ledger, self.node.spool, clock=self.machine, steady=lambda: self.machine.steady
        )
        self.upkeep.compare_clocks()
        self.upkeep.sweep()

    def codes(self) -> list[str]:
        return [event.code for event in self.node.ledger.search_events()]

    def close(self) -> None:
        self.node.close()


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    made = Lab(tmp_path)
    yield made
    made.close()


def test_a_jump_is_told_apart_from_time_that_passes() -> None:
    machine = Machine()
    watch = ClockWatch(machine, lambda: machine.steady)
    machine.pass_time(7200)
    assert watch.look() == 0
    machine.wall += DAY
    machine.pass_time(60)
    assert watch.look() == pytest.approx(86400)
    assert watch.look() == 0
    machine.wall -= HOUR
    assert watch.look() == pytest.approx(-3600)


@pytest.mark.parametrize("jump", [DAY, -HOUR])
def test_a_job_that_runs_goes_on_and_is_not_run_by_a_second_one(lab: Lab, jump: timedelta) -> None:
    lab.node.receive(lab.files)
    lab.node.step_to_queued()
    job = lab.node.ledger.claim("somebody", lease_s=120)
    assert job is not None
    lab.machine.pass_time(60)
    lab.machine.wall += jump
    lab.upkeep.sweep()
    assert lab.node.ledger.get(job.id).state is JobState.RUNNING
    assert lab.node.ledger.renew(job.id, "somebody", lease_s=120)
    lab.machine.pass_time(60)
    lab.upkeep.sweep()
    assert lab.node.ledger.get(job.id).state is JobState.RUNNING
    assert lab.codes().count("clock_jumped") == 1


def test_a_worker_that_died_before_the_clock_was_set_back_is_found_after_its_lease(lab: Lab) -> None:
    lab.node.receive(lab.files)
    lab.node.step_to_queued()
    job = lab.node.ledger.claim("somebody", lease_s=120)
    assert job is not None
    lab.machine.wall -= DAY
    lab.upkeep.sweep()
    lab.machine.pass_time(121)
    lab.upkeep.sweep()
    assert lab.node.ledger.get(job.id).state is JobState.QUEUED


def test_what_a_clock_that_ran_ahead_put_off_is_tried_when_it_is_right_again(lab: Lab) -> None:
    lab.pacs.up = False
    lab.machine.wall += 300 * DAY
    lab.node.receive(lab.files)
    lab.node.step()
    [job] = lab.node.jobs()
    lab.pacs.up = True
    lab.machine.wall -= 300 * DAY
    lab.node.step()
    assert not lab.pacs.contents()
    lab.upkeep.sweep()
    lab.node.step()
    assert lab.node.ledger.get(job.id).state is JobState.DONE


def test_a_job_whose_retry_lies_years_ahead_is_tried(lab: Lab) -> None:
    lab.node.receive(lab.files)
    lab.node.step_to_queued()
    job = lab.node.ledger.claim("somebody", lease_s=120)
    assert job is not None
    lab.machine.wall += 300 * DAY
    again = lab.machine.wall + timedelta(seconds=30)
    lab.node.ledger.fail_run(
        job.id, "somebody", code="engine_crashed", text="", permanent=False, retry_at=again, max_attempts=3
    )
    lab.machine.wall -= 300 * DAY
    lab.upkeep.sweep()
    lab.node.step()
    assert lab.node.ledger.get(job.id).state is JobState.DONE


@pytest.mark.parametrize("restart", [False, True])
def test_a_clock_that_was_ahead_for_less_than_the_longest_pause_holds_up_no_retry_either(
    lab: Lab, restart: bool
) -> None:
    ahead = timedelta(minutes=50)  # max_retry_s is an hour
    lab.pacs.up = False
    lab.machine.wall += ahead
    lab.upkeep.sweep()
    lab.node.receive(lab.files)
    lab.node.step()
    [job] = lab.node.jobs()
    [first] = [one for one in lab.node.ledger.deliveries(job.id) if one.kind == "pet"]
    lab.machine.wall -= ahead
    if restart:
        lab.close()
        lab.start()
    else:
        lab.upkeep.sweep()
    [after] = [one for one in lab.node.ledger.deliveries(job.id) if one.kind == "pet"]
    assert first.next_attempt is not None
    assert after.next_attempt == first.next_attempt - ahead
    lab.pacs.up = True
    lab.machine.pass_time(31)
    lab.node.deliver()
    assert lab.node.ledger.get(job.id).state is JobState.DONE


def test_a_job_is_tried_again_as_soon_as_before_when_the_clock_was_set_back_a_little(lab: Lab) -> None:
    lab.node.receive(lab.files)
    lab.node.step_to_queued()
    job = lab.node.ledger.claim("somebody", lease_s=120)
    assert job is not None
    again = lab.machine.wall + timedelta(seconds=30)
    lab.node.ledger.fail_run(
        job.id, "somebody", code="engine_crashed", text="", permanent=False, retry_at=again, max_attempts=3
    )
    lab.machine.wall -= timedelta(minutes=4)  # the longest pause is five
    lab.upkeep.sweep()
    assert lab.node.ledger.claim("worker", lease_s=120) is None
    lab.machine.pass_time(30)
    assert lab.node.ledger.claim("worker", lease_s=120) is not None


def test_a_clock_that_is_set_forward_and_days_without_the_node_put_nothing_off(lab: Lab) -> None:
    lab.pacs.up = False
    lab.node.receive(lab.files)
    lab.node.step()
    [job] = lab.node.jobs()
    due = [one.next_attempt for one in lab.node.ledger.deliveries(job.id)]
    lab.machine.wall += timedelta(seconds=70)
    lab.upkeep.sweep()
    lab.close()
    lab.machine.pass_time(86400)
    lab.start()
    assert [one.next_attempt for one in lab.node.ledger.deliveries(job.id)] == due


def test_a_wait_that_is_meant_is_left_as_it_is(lab: Lab) -> None:
    lab.pacs.up = False
    lab.node.receive(lab.files)
    lab.node.step()
    [job] = lab.node.jobs()
    due = lab.node.ledger.deliveries(job.id)[0].next_attempt
    assert due is not None
    lab.upkeep.sweep()
    assert lab.node.ledger.deliveries(job.id)[0].next_attempt == due


def test_nothing_is_removed_for_its_age_until_a_clock_that_jumped_has_been_steady_for_a_day(lab: Lab) -> None:
    lab.node.receive(lab.files)
    lab.node.run_to_end()
    [job] = lab.node.jobs()
    for path in (*lab.root.rglob("*"),):
        os.utime(path, (lab.machine.wall.timestamp(),) * 2)
    lab.machine.wall += 3650 * DAY
    lab.upkeep.sweep()
    lab.upkeep.retention()
    assert lab.node.spool.ct_files(job.id)
    assert lab.node.spool.has_result(job.id)
    assert lab.node.ledger.events(job.id)
    lab.machine.wall -= 3650 * DAY  # NTP has come
    lab.upkeep.sweep()
    lab.machine.pass_time(STEADY_S + 1)
    lab.upkeep.retention()
    assert lab.node.spool.ct_files(job.id)
    lab.machine.pass_time(8 * 86400)
    lab.upkeep.retention()
    assert not lab.node.spool.ct_files(job.id)
    assert lab.node.spool.has_result(job.id)


def test_a_node_that_starts_with_a_wrong_clock_removes_nothing_on_its_first_day(lab: Lab) -> None:
    lab.node.receive(lab.files)
    lab.node.run_to_end()
    [job] = lab.node.jobs()
    lab.close()
    lab.machine.wall += 3650 * DAY
    lab.start()
    lab.upkeep.retention()
    assert lab.node.spool.has_result(job.id)


def test_a_result_is_sent_again_as_the_same_bytes_after_the_clock_was_set_back(lab: Lab) -> None:
    lab.node.receive(lab.files)
    lab.node.step_to_queued()
    lab.node.worker.work_one()
    [job] = lab.node.jobs()
    lab.node.deliver()
    lab.node.ledger.redeliver(job.id)
    lab.node.spool.discard_result(job.id)  # as a disk would: it is computed again
    lab.node.ledger.cancel(job.id)
    lab.node.ledger.retry(job.id, rerun=True)
    lab.close()
    lab.machine.wall -= HOUR
    lab.start()
    lab.node.run_to_end()
    assert set(lab.pacs.contents().values()) == {1}
    assert len(lab.pacs.contents()) == 3


class Outage:
    """A PACS that is down, and a result that waits for it."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        lab.pacs.up = False
        lab.node.receive(lab.files)
        lab.node.step()
        [self.job] = lab.node.jobs()

    def last(self, time: timedelta) -> None:
        """Goes on for so long, with the sweeps and attempts of these days."""
        for _ in range(time // (6 * HOUR)):
            for _ in range(2):
                self.lab.machine.pass_time(3 * 3600)
                self.lab.upkeep.sweep()
            self.lab.node.deliver()

    @property
    def state(self) -> JobState:
        return self.lab.node.ledger.get(self.job.id).state


def test_a_clock_that_jumps_a_month_ahead_gives_nothing_up(lab: Lab) -> None:
    outage = Outage(lab)
    outage.last(DAY)
    lab.machine.wall += 30 * DAY
    lab.node.deliver()  # before anybody has looked at the clock
    lab.upkeep.sweep()
    lab.node.deliver()
    outage.last(5 * DAY)
    assert outage.state is JobState.DELIVERING
    outage.last(2 * DAY)
    assert outage.state is JobState.FAILED
    assert "given up after 7" in lab.node.ledger.get(outage.job.id).reason


def test_an_outage_that_began_by_a_clock_without_a_battery_is_as_old_as_it_is(lab: Lab) -> None:
    lab.machine.wall -= 20 * 365 * DAY
    lab.upkeep.sweep()
    outage = Outage(lab)
    lab.machine.wall += 20 * 365 * DAY  # NTP has come
    outage.last(6 * DAY)
    assert outage.state is JobState.DELIVERING
    outage.last(2 * DAY)
    assert outage.state is JobState.FAILED


@pytest.mark.parametrize("wrong", [30 * DAY, 6 * DAY, -3650 * DAY])
def test_a_node_that_starts_with_a_wrong_clock_in_an_outage_gives_nothing_up(lab: Lab, wrong: timedelta) -> None:
    outage = Outage(lab)
    outage.last(2 * DAY)
    lab.close()
    lab.machine.wall += wrong
    lab.start()
    lab.node.deliver()
    outage.last(2 * DAY)
    lab.machine.wall -= wrong  # NTP has come
    outage.last(2 * DAY)
    assert outage.state is JobState.DELIVERING
    outage.last(2 * DAY)
    assert outage.state is JobState.FAILED


def test_days_without_the_node_make_no_outage_older(lab: Lab) -> None:
    outage = Outage(lab)
    outage.last(2 * DAY)
    lab.close()
    lab.machine.pass_time(20 * 86400)
    lab.start()
    lab.node.deliver()
    outage.last(4 * DAY)
    assert outage.state is JobState.DELIVERING


def test_a_jump_that_nobody_has_seen_yet_makes_ages_doubtful_at_once() -> None:
    machine = Machine()
    watch = ClockWatch(machine, lambda: machine.steady)
    assert watch.trusted
    machine.wall += DAY
    assert not watch.trusted


def test_a_shift_that_the_ledger_did_not_take_is_made_up_for(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    outage = Outage(lab)
    began = lab.node.ledger.deliveries(outage.job.id)[0].failing_since
    assert began is not None

    def full(_seconds: float, *, recent_s: float) -> int:
        raise NoSpace("the disk is full")

    lab.machine.wall += DAY
    with monkeypatch.context() as patch:
        patch.setattr(lab.node.ledger, "shift_outages", full)
        with pytest.raises(NoSpace):
            lab.upkeep.sweep()
    lab.upkeep.sweep()
    assert lab.node.ledger.deliveries(outage.job.id)[0].failing_since == began + DAY


def test_a_series_is_quiet_by_the_steady_clock(lab: Lab) -> None:
    lab.node.receive(lab.files)
    lab.node.assembler.tick()
    lab.machine.wall += DAY
    lab.node.assembler.tick()
    assert [job.state for job in lab.node.jobs()] == [JobState.RECEIVING]
    lab.machine.wall -= 2 * DAY
    lab.node.step_to_queued()
    assert [job.state for job in lab.node.jobs()] == [JobState.QUEUED]


@pytest.mark.parametrize("jump", [-10 * DAY, 10 * DAY])
def test_an_outage_that_begins_between_a_jump_and_the_next_look_is_young(lab: Lab, jump: timedelta) -> None:
    lab.machine.pass_time(20)
    lab.machine.wall += jump
    lab.machine.pass_time(10)
    outage = Outage(lab)
    lab.machine.pass_time(10)
    lab.upkeep.sweep()
    began = lab.node.ledger.deliveries(outage.job.id)[0].failing_since
    assert began is not None
    assert timedelta() <= lab.machine.wall - began <= timedelta(seconds=10)


def test_what_another_command_writes_while_the_node_is_off_makes_no_outage_older(lab: Lab) -> None:
    outage = Outage(lab)
    outage.last(2 * DAY)
    lab.close()
    lab.machine.pass_time(20 * 86400)
    ledger = open_ledger(lab.node.config.ledger_url, clock=lab.machine)
    ledger.note("", "pull_started", "by hand", details={})
    ledger.close()
    lab.start()
    lab.node.deliver()
    assert outage.state is JobState.DELIVERING
    assert not lab.upkeep.clock_trusted
