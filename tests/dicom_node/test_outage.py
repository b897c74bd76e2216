"""A PACS that is down: for a night, for days, for ever. On a clock of the test's own, against the real ledger."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from delivery_desk import COUNT, Desk, config_for
from fake_pacs import FakePacs, free_port
from result_factory import sop_uids
from structlog.testing import capture_logs

from dicom_node.config import Config, DestinationConfig
from dicom_node.net.query import CountOutcome
from dicom_node.net.scu import SendOutcome
from storage.ledger import open_ledger
from storage.records import DeliveryState, JobState

NIGHT = datetime(2026, 1, 1, 22, 0, tzinfo=UTC)
DEFAULTS = DestinationConfig(name="pacs0", peer="pacs0")
DOWN = SendOutcome(code="connection_failed", text="PACS at 10.0.0.1:104 cannot be reached")


@dataclass
class Clock:
    now: datetime = NIGHT

    def __call__(self) -> datetime:
        return self.now


class Night(Desk):
    """A desk whose ledger and deliveries go by a clock that the test sets; the peer does what `answer` says."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.ledger.close()
        self.clock = Clock()
        self.ledger = open_ledger(f"sqlite:///{root / 'ledger.sqlite'}", clock=self.clock)
        self.config: Config = config_for(root, FakePacs(port=free_port())).model_copy(
            update={"destinations": (DEFAULTS,)}
        )
        self.sent: list[datetime] = []
        self.up = False
        self.trusted = True
        self.steady_s = 0.0
        self.outcome = DOWN
        self.shows = CountOutcome(count=COUNT)

    def send(self, files: list[Path], **_: object) -> SendOutcome:
        self.sent.append(self.clock.now)
        return SendOutcome(statuses=dict.fromkeys(sop_uids(files), "0x0000")) if self.up else self.outcome

    def begin(self, jobs: int = 1) -> list[str]:
        ids = []
        for _ in range(jobs):
            self.finish_job(self.config)
            ids.append(self.job_id)
        self.deliver(
            self.config,
            send=self.send,
            count=lambda *_: self.shows,
            clock=self.clock,
            trusted=lambda: self.trusted,
            steady=lambda: self.steady_s,
        )
        return ids

    def pass_time(self, seconds: float) -> None:
        self.clock.now += timedelta(seconds=seconds)
        self.steady_s += seconds

    def attempt(self) -> None:
        """Go to the time of the next attempt, and wait until it is over."""
        before = len(self.ledger.events(self.job_id))
        due = self.delivery().next_attempt
        if due is not None:
            self.pass_time(max(0.0, (due - self.clock.now).total_seconds()))
        assert self._running is not None
        self._running.wake()
        self.until(lambda: len(self.ledger.events(self.job_id)) > before)


@pytest.fixture
def night(tmp_path: Path) -> Iterator[Night]:
    made = Night(tmp_path)
    yield made
    made.close()


def test_a_pacs_that_is_down_for_a_day_gets_everything_when_it_is_back(night: Night) -> None:
    night.begin()
    while night.clock.now < NIGHT + timedelta(days=1):
        night.attempt()
    assert night.state is JobState.DELIVERING
    assert night.delivery().attempts > DEFAULTS.max_attempts
    assert "for 2" in night.delivery().reason
    assert "hours now, it is tried for 7 days" in night.delivery().reason
    pauses = [(b - a).total_seconds() for a, b in zip(night.sent, night.sent[1:], strict=False)]
    assert pauses[0] == DEFAULTS.first_retry_s
    assert pauses == sorted(pauses)
    assert pauses[-1] == DEFAULTS.max_retry_s
    night.up = True
    night.attempt()
    night.until(lambda: night.state is JobState.DONE)
    assert night.delivery().state is DeliveryState.VISIBLE
    assert night.delivery().failing_since is None


def test_an_outage_that_does_not_end_ends_with_a_person(night: Night) -> None:
    night.config = night.config.model_copy(
        update={"destinations": (DEFAULTS.model_copy(update={"give_up_after_days": 1.5}),)}
    )
    night.begin()
    while night.state is JobState.DELIVERING:
        night.attempt()
    assert timedelta(days=1.5) <= night.clock.now - NIGHT <= timedelta(days=1.5, hours=1)
    assert night.delivery().state is DeliveryState.FAILED
    assert "given up after 1.5 days (give_up_after_days)" in night.delivery().reason


def test_an_outage_of_hours_is_an_error_in_the_log(night: Night) -> None:
    with capture_logs() as logged:
        night.begin()
        while night.clock.now < NIGHT + timedelta(hours=3):
            night.attempt()
    down = [line for line in logged if line["event"] == "destination.down"]
    assert down
    assert {line["log_level"] for line in down} == {"error"}
    assert next(line["log_level"] for line in logged if line["event"] == "delivery.deferred") == "warning"


def test_when_the_pacs_is_back_what_waits_for_its_next_pause_is_sent_at_once(night: Night) -> None:
    ids = night.begin(jobs=3)
    while night.clock.now < NIGHT + timedelta(hours=5):
        night.attempt()
    night.until(lambda: all(night.ledger.deliveries(job)[0].next_attempt > night.clock.now for job in ids))
    night.up = True
    first = min(ids, key=lambda job: night.ledger.deliveries(job)[0].next_attempt)
    night.clock.now = night.ledger.deliveries(first)[0].next_attempt
    night.until(lambda: all(night.ledger.get(job).state is JobState.DONE for job in ids))


def test_attempts_in_an_outage_leave_the_others_their_number(night: Night) -> None:
    night.begin()
    while night.clock.now < NIGHT + timedelta(days=1):
        night.attempt()
    night.outcome = SendOutcome(code="internal_error", text="ValueError while sending: see the log")
    tries = 0
    while night.state is JobState.DELIVERING:
        night.attempt()
        tries += 1
    assert tries == DEFAULTS.max_attempts


def test_a_result_that_is_left_unanswered_while_others_arrive_uses_up_its_attempts(night: Night) -> None:
    night.outcome = SendOutcome(code="no_response", text="PACS gave no answer within 60 s")
    (bad,) = night.begin()
    night.until(lambda: night.delivery().next_attempt is not None)
    night.clock.now += timedelta(seconds=1)
    night.up = True
    night.finish_job(night.config)
    assert night._running is not None
    night._running.wake()
    night.until(lambda: night.state is JobState.DONE)
    night.up, night.job_id = False, bad
    assert night.delivery().next_attempt > night.clock.now  # what arrived does not make it due
    tries = 0
    while night.state is JobState.DELIVERING:
        night.attempt()
        tries += 1
    assert tries == DEFAULTS.max_attempts
    assert night.clock.now - NIGHT < timedelta(days=1)


def test_a_clock_that_was_set_back_makes_no_result_the_fault_of_an_outage_that_others_are_in(night: Night) -> None:
    night.up = True
    night.begin()
    night.until(lambda: night.state is JobState.DONE)
    night.up, night.outcome = False, SendOutcome(code="no_response", text="PACS gave no answer within 60 s")
    night.pass_time(60)
    night.finish_job(night.config)
    night.attempt()
    night.clock.now -= timedelta(days=3)
    night.ledger.shift_outages(-3 * 86400.0)
    night.ledger.mend_times(longest_wait_s=3600, lease_s=120)
    for _ in range(4):
        night.attempt()
    assert night.delivery().outages == night.delivery().attempts


def test_while_the_clock_is_doubtful_no_outage_ends(night: Night) -> None:
    night.trusted = False
    night.begin()
    assert_given_up_when_the_clock_is_trusted_again(night)


def assert_given_up_when_the_clock_is_trusted_again(night: Night) -> None:
    while night.clock.now < NIGHT + timedelta(days=9):
        night.attempt()
    assert night.state is JobState.DELIVERING
    night.trusted = True
    night.attempt()
    assert night.state is JobState.FAILED


def test_while_the_clock_is_doubtful_an_archive_that_is_down_is_asked_for_proof(night: Night) -> None:
    night.trusted, night.up = False, True
    night.shows = CountOutcome(code="connection_failed", text="PACS at 10.0.0.1:104 cannot be reached")
    night.begin()
    night.until(lambda: night.delivery().reason_code == "connection_failed")
    assert_given_up_when_the_clock_is_trusted_again(night)


def test_a_refusal_for_good_fails_at_once_also_in_an_outage(night: Night) -> None:
    night.begin()
    night.attempt()
    night.outcome = SendOutcome(code="association_rejected", text="our AE title is not recognized", permanent=True)
    night.attempt()
    assert night.state is JobState.FAILED


def test_an_archive_that_goes_down_before_it_is_asked_for_proof_is_asked_when_it_is_back(night: Night) -> None:
    night.up = True
    night.shows = CountOutcome(code="connection_failed", text="PACS at 10.0.0.1:104 cannot be reached")
    night.begin()
    night.until(lambda: night.delivery().reason_code == "connection_failed")
    while night.clock.now < NIGHT + timedelta(days=1):
        night.attempt()
    assert (night.delivery().state, night.delivery().checks) == (DeliveryState.SENT, 0)
    night.shows = CountOutcome(count=COUNT)
    night.clock.now = night.delivery().next_attempt or night.clock.now
    night.until(lambda: night.state is JobState.DONE)
    assert len(night.sent) == 1


def test_a_clock_that_was_set_back_does_not_end_an_outage_early_or_never(night: Night) -> None:
    night.begin()
    while night.clock.now < NIGHT + timedelta(hours=2):
        night.attempt()
    night.clock.now -= timedelta(days=3)
    before = len(night.sent)
    while len(night.sent) < before + 3:
        night.attempt()
    assert night.state is JobState.DELIVERING
