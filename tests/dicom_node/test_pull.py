"""Studies from an archive become jobs: asked for by number, every night, again after an interruption, never twice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ct_factory import write_ct
from fake_retrieve import FIND, FakeRetrieve, Script
from intake_tools import QUEUED, Intake, config, running_intake
from pydicom.uid import generate_uid
from structlog.testing import capture_logs

from dicom_node.config import Config, ScheduledPull
from dicom_node.pull import Puller, PullOptions, PullOutcome, Wanted
from dicom_node.scheduled_pulls import Past, ScheduledPulls, days_of, is_due, portions, slot_before
from storage.database import default_url
from storage.fetched import FetchedTokens
from storage.ledger import Ledger, open_ledger

ACCESSION = Wanted(accession="ACC1")
SLICES = 6


@dataclass
class Bench:
    """An archive with two CT studies (ACC1 with two series, ACC2 with one), and a node's intake."""

    archive: FakeRetrieve
    intake: Intake
    studies: list[str]
    series: list[str]

    def puller(self, **options: Any) -> Puller:
        intake = self.intake
        return Puller(intake.config, self.archive.peer(), intake.ledger, intake.spool, PullOptions(**options))

    def pull(self, *wanted: Wanted, **options: Any) -> list[PullOutcome]:
        return list(self.puller(**options).pull_all(wanted or [ACCESSION]))

    def codes(self, *wanted: Wanted, **options: Any) -> list[str]:
        return [outcome.code for outcome in self.pull(*wanted, **options)]

    def finish(self) -> None:
        """The assembler decides on everything that came."""
        self.pass_time(40)

    def pass_time(self, seconds: float) -> None:
        """When the node has seen the end of the association that the archive sent on, a moment after the archive."""
        self.intake.wait(lambda: not self.intake.registry.open_tokens())
        self.intake.pass_time(seconds)

    def pull_codes(self) -> list[str]:
        codes = reversed(self.intake.event_codes())
        return [code for code in codes if code.startswith("pull_")]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    studies, series = [generate_uid(), generate_uid()], [generate_uid() for _ in range(3)]
    paths: list[Path] = []
    for number, (study, one, accession) in enumerate(
        [(studies[0], series[0], "ACC1"), (studies[0], series[1], "ACC1"), (studies[1], series[2], "ACC2")]
    ):
        volume = np.zeros((SLICES, 8, 8))
        folder = tmp_path / f"ct{number}"
        paths += write_ct(
            folder, volume, spacing_mm=(5.0, 2.0, 2.0), study_uid=study, series_uid=one, accession=accession
        )
    with FakeRetrieve(paths) as archive:
        peer = archive.peer().model_dump()
        pulls = [{"name": "missed", "peer": "archive"}]
        with running_intake(tmp_path / "node", config(peers=[peer], pulls=pulls)) as intake:
            archive.node_port = intake.port
            yield Bench(archive, intake, studies, series)


@pytest.mark.parametrize("method", ["move", "get"])
def test_a_pulled_study_becomes_a_job_like_any_other(bench: Bench, method: str) -> None:
    [outcome] = bench.pull(method=method)
    assert (outcome.code, outcome.series, outcome.instances, outcome.study_uid) == (
        "fetched",
        2,
        2 * SLICES,
        bench.studies[0],
    )
    bench.finish()
    states = [job.state for job in bench.intake.jobs()]
    assert len(states) == 2
    assert states.count(QUEUED) == 1  # one CT per study, as always
    assert bench.pull_codes() == ["pull_started", "pull_ended"]
    assert {job.info.calling_ae for job in bench.intake.jobs()} == {"ARCHIVE"}


def test_an_accession_number_with_two_studies_brings_both(bench: Bench) -> None:
    for ds in bench.archive.instances:
        ds.AccessionNumber = "ACC1"
    assert bench.codes() == ["fetched", "fetched"]


def test_a_study_that_has_jobs_is_not_asked_for_again_unless_again(bench: Bench) -> None:
    bench.pull()
    bench.finish()
    bench.archive.asked.clear()
    assert bench.codes() == ["present"]
    assert bench.archive.moves == []
    assert bench.codes(again=True) == ["fetched"]
    assert sorted(bench.archive.moves) == sorted(bench.series[:2])


def test_an_interrupted_study_goes_on_with_the_series_that_is_missing(bench: Bench) -> None:
    [outcome] = bench.pull(should_stop=lambda: bool(bench.archive.moves))
    assert (outcome.code, len(bench.archive.moves)) == ("interrupted", 1)
    assert bench.pull_codes() == ["pull_started", "pull_failed"]
    assert bench.codes() == ["fetched"]
    bench.finish()
    assert [job.instances for job in bench.intake.jobs()] == [SLICES, SLICES]


def test_what_a_kill_left_behind_is_fetched_to_the_end(bench: Bench) -> None:
    [outcome] = bench.pull(wants_series=lambda series: series.series_uid == bench.series[0])
    assert outcome.series == 1
    whose = {"study_uid": bench.studies[0], "accession": "ACC1"}
    bench.intake.ledger.note("", "pull_started", "2 CT series are fetched", details=whose)  # and then it was killed
    bench.finish()
    bench.archive.asked.clear()
    [outcome] = bench.pull()
    assert (outcome.code, outcome.series, outcome.skipped) == ("fetched", 1, 1)
    assert bench.archive.moves == [bench.series[1]]
    assert bench.codes() == ["present"]


def test_a_failed_study_is_tried_again_and_the_ledger_says_why_it_failed(bench: Bench) -> None:
    bench.archive.script = Script.HALF
    [outcome] = bench.pull(Wanted(accession="ACC2"))
    assert (outcome.code, outcome.ok, outcome.failed) == ("incomplete", False, SLICES // 2)
    [event] = bench.intake.ledger.search_events(code="pull_failed")
    assert (event.details["reason"], event.details["study_uid"]) == ("incomplete", bench.studies[1])
    bench.pass_time(1)  # the half that came is a job that receives
    bench.archive.script = Script.SENDS
    [outcome] = bench.pull(Wanted(accession="ACC2"))
    assert outcome.code == "fetched"
    bench.finish()
    assert bench.intake.job().instances == SLICES


def test_a_series_that_was_rejected_for_missing_slices_is_fetched_again(bench: Bench) -> None:
    study = [ds for ds in bench.archive.instances if ds.StudyInstanceUID == bench.studies[1]]
    hidden = study[2]
    bench.archive.instances.remove(hidden)
    assert bench.codes(Wanted(accession="ACC2")) == ["fetched"]
    bench.pass_time(400)
    assert bench.intake.job().reason_code == "missing_slices"
    bench.archive.instances.append(hidden)
    assert bench.codes(Wanted(accession="ACC2")) == ["fetched"]


def test_a_dry_run_asks_and_fetches_nothing(bench: Bench) -> None:
    [outcome] = bench.pull(dry_run=True)
    assert (outcome.code, outcome.series, outcome.instances) == ("planned", 2, 2 * SLICES)
    assert (bench.archive.moves, bench.pull_codes()) == ([], [])


def test_each_study_says_what_became_of_it(bench: Bench) -> None:
    unknown = Wanted(study_uid=generate_uid())
    assert bench.codes(unknown, Wanted(accession="NONE"), Wanted(study_uid=bench.studies[1])) == [
        "not_found",
        "not_found",
        "fetched",
    ]
    bench.archive.modality = "MR"
    assert bench.codes() == ["no_ct"]


def test_after_a_trouble_of_the_archive_itself_the_rest_is_not_tried(bench: Bench) -> None:
    bench.archive.script = Script.UNKNOWN_DESTINATION
    assert bench.codes(ACCESSION, Wanted(accession="ACC2")) == ["destination_unknown", "not_tried"]
    assert len(bench.archive.moves) == 1  # its second series would meet the same


def test_a_fetch_beside_the_node_is_not_waited_for_as_one_that_was_cut_off(bench: Bench) -> None:
    bench.pull(Wanted(accession="ACC2"), method="get")
    bench.finish()
    assert bench.intake.job().state is QUEUED  # the registry of the node has never heard of the association


def test_a_folder_that_is_being_fetched_into_stays(tmp_path: Path) -> None:
    tokens = FetchedTokens(tmp_path)
    with tokens.open("ab12"):
        with pytest.raises(OSError, match="not empty"):
            (tmp_path / "inbox" / "incoming" / "ab12").rmdir()
        assert not tokens.is_whole("ab12")
        tokens.mark_whole("ab12")
    (tmp_path / "inbox" / "incoming" / "ab12").rmdir()
    assert tokens.is_whole("ab12")
    assert not tokens.is_whole("")
    assert not tokens.is_whole("../node.id")


# ---- every night

ZONE = timezone(timedelta(hours=1))
NIGHT = datetime(2024, 1, 3, 3, 0, 30, tzinfo=ZONE)  # the studies of the archive are of 2024-01-02
HOUR, DAY = timedelta(hours=1), timedelta(days=1)


@pytest.mark.parametrize(
    ("past", "started", "due"),
    [
        (Past(), NIGHT - HOUR, True),  # never ran, and the node was up before three
        (Past(), NIGHT, False),  # configured at three: begins tomorrow
        (Past(succeeded=NIGHT - DAY, tried=NIGHT - DAY), NIGHT - 2 * DAY, True),
        (Past(succeeded=NIGHT - DAY, tried=NIGHT - DAY), NIGHT, True),  # missed while the node was down
        (Past(succeeded=NIGHT, tried=NIGHT), NIGHT - DAY, False),  # done
        (Past(succeeded=NIGHT - DAY, tried=NIGHT - HOUR / 60), NIGHT - DAY, True),  # tried before the slot
        (Past(succeeded=NIGHT + HOUR / 2, tried=NIGHT + HOUR / 2), NIGHT, False),  # the clock was set back a little
        (Past(succeeded=NIGHT + DAY, tried=NIGHT + DAY), NIGHT, True),  # it was a day ahead: that was no run of today
        (Past(succeeded=NIGHT + 200 * DAY, tried=NIGHT + 200 * DAY), NIGHT, True),
        (Past(succeeded=NIGHT - DAY, tried=NIGHT + 200 * DAY), NIGHT, True),  # it failed by that clock
        (Past(succeeded=NIGHT - DAY, tried=NIGHT + HOUR / 2), NIGHT, True),
        (Past(succeeded=NIGHT, tried=NIGHT + 200 * DAY), NIGHT, False),  # done before that
    ],
)
def test_a_run_is_owed_once_a_day(past: Past, started: datetime, due: bool) -> None:
    assert is_due("03:00", NIGHT, past, started) is due


def test_a_failed_run_is_owed_again_after_an_hour() -> None:
    failed = Past(succeeded=NIGHT - DAY, tried=NIGHT)
    assert not is_due("03:00", NIGHT + HOUR / 2, failed, NIGHT - DAY)
    assert is_due("03:00", NIGHT + HOUR, failed, NIGHT - DAY)


def test_the_days_are_those_before_the_slot() -> None:
    pull = ScheduledPull(name="a", peer="p", at="23:30", days_back=3)
    slot = slot_before("23:30", NIGHT)
    assert slot == datetime(2024, 1, 2, 23, 30, tzinfo=ZONE)
    assert [f"{day}" for day in days_of(pull, slot)] == ["2023-12-30", "2024-01-01"]


@pytest.mark.parametrize(
    ("since", "first"),
    [
        (None, "2024-01-04"),  # never ran
        ("2024-01-05", "2024-01-04"),  # ran yesterday: `days_back` days, as ever
        ("2024-01-02", "2024-01-02"),  # off since
        ("2023-01-01", "2023-12-07"),  # off for a year
    ],
)
def test_the_days_since_the_last_success_are_made_up_for(since: str | None, first: str) -> None:
    pull = ScheduledPull(name="a", peer="p", days_back=2)
    monday = datetime(2024, 1, 6, 3, tzinfo=ZONE)
    owed = date.fromisoformat(since) if since else None
    assert [f"{day}" for day in days_of(pull, monday, owed)] == [first, "2024-01-05"]


def test_an_archive_is_asked_for_no_more_days_at_once_than_every_night() -> None:
    first, last = date(2024, 1, 1), date(2024, 1, 5)
    assert [(a.day, b.day) for a, b in portions(first, last, 2)] == [(1, 2), (3, 4), (5, 5)]
    assert [(a.day, b.day) for a, b in portions(first, last, 9)] == [(1, 5)]


class Clock:
    def __init__(self, now: datetime) -> None:
        self.now = now

    def __call__(self) -> datetime:
        return self.now


def scheduled(bench: Bench, clock: Clock, **pull: Any) -> ScheduledPulls:
    known: dict[str, Any] = {"name": "missed", "peer": "archive", **pull}
    tables = bench.intake.config.model_dump() | {"pulls": [known]}
    return ScheduledPulls(Config.model_validate(tables), bench.intake.ledger, bench.intake.spool, clock=clock)


def runs(bench: Bench) -> list[Any]:
    events = bench.intake.ledger.search_events()
    return [event for event in reversed(events) if event.code in ("pull_run", "pull_run_failed")]


def test_at_night_what_never_arrived_is_fetched_and_told_in_one_event(bench: Bench) -> None:
    bench.pull(Wanted(accession="ACC2"))
    bench.finish()
    clock = Clock(NIGHT - HOUR)
    pulls = scheduled(bench, clock)
    pulls.tick()
    assert runs(bench) == []
    clock.now = NIGHT
    pulls.tick()
    pulls.tick()
    [run] = runs(bench)
    told = {key: run.details[key] for key in ("found", "missing", "fetched", "instances", "left", "first_day")}
    assert told == {
        "found": 2,
        "missing": 1,
        "fetched": 1,
        "instances": 2 * SLICES,
        "left": 0,
        "first_day": "2024-01-02",
    }
    bench.finish()
    assert len(bench.intake.jobs()) == 3


def test_a_restart_repeats_no_run_and_makes_up_for_a_missed_one(bench: Bench) -> None:
    clock = Clock(datetime.now(UTC).astimezone())  # the ledger's events are of now
    bench.intake.ledger.note("", "pull_run", "done", details={"pull": "missed"})
    at = clock.now - timedelta(minutes=1)
    if at.date() == clock.now.date():
        scheduled(bench, clock, at=f"{at:%H:%M}").tick()
        assert len(runs(bench)) == 1
    clock.now += DAY
    scheduled(bench, clock, at=f"{at:%H:%M}").tick()
    assert len(runs(bench)) == 2


def test_days_without_a_run_are_made_up_for(bench: Bench) -> None:
    clock = Clock(NIGHT - 2 * DAY - HOUR)
    pulls = scheduled(bench, clock)
    clock.now += HOUR
    pulls.tick()  # nothing of this day
    clock.now = NIGHT + 2 * DAY + 6 * HOUR  # the archive's studies are of the day before NIGHT
    pulls.tick()
    run = runs(bench)[-1]
    assert (run.code, run.details["fetched"]) == ("pull_run", 2)
    assert (run.details["first_day"], run.details["last_day"]) == ("2024-01-01", "2024-01-04")
    assert len(runs(bench)) == 2


@pytest.mark.parametrize(
    ("code", "known", "first"),
    [
        ("pull_run", {"first_day": -9, "last_day": -5}, -4),
        ("pull_run", {}, 0),  # its days are not written down: it was of yesterday
        ("pull_run_failed", {"first_day": -9, "last_day": -5}, -9),  # none ever succeeded
    ],
)
def test_a_restart_does_not_forget_which_days_are_owed(
    bench: Bench, code: str, known: dict[str, int], first: int
) -> None:
    now = datetime.now(UTC).astimezone()  # the ledger's events are of now
    days = {key: f"{now.date() + number * DAY:%Y-%m-%d}" for key, number in known.items()}
    bench.intake.ledger.note("", code, "done", details={"pull": "missed", **days})
    scheduled(bench, Clock(now + 3 * DAY), at="00:00").tick()
    run = runs(bench)[-1]
    owed, last = (f"{now.date() + number * DAY:%Y-%m-%d}" for number in (first, 2))
    assert (run.details["first_day"], run.details["last_day"]) == (owed, last)


@contextmanager
def by_clock(bench: Bench, clock: Clock) -> Iterator[Ledger]:
    """The bench's ledger, which writes by this clock."""
    real = bench.intake.ledger
    bench.intake.ledger = open_ledger(default_url(bench.intake.spool.root), clock=clock)
    yield bench.intake.ledger
    bench.intake.ledger.close()
    bench.intake.ledger = real


def noted(ledger: Ledger, clock: Clock, code: str, time: datetime) -> None:
    """What an earlier life wrote down at that time, of the day before it."""
    clock.now = time
    day = f"{time - DAY:%Y-%m-%d}"
    ledger.note("", code, "told", details={"pull": "missed", "first_day": day, "last_day": day})


@pytest.mark.parametrize("code", ["pull_run", "pull_run_failed"])
def test_a_restart_believes_no_run_of_the_future_and_forgets_no_day_that_is_owed(bench: Bench, code: str) -> None:
    clock = Clock(NIGHT)
    with by_clock(bench, clock) as ledger, capture_logs() as logs:
        noted(ledger, clock, "pull_run", NIGHT - 5 * DAY)
        noted(ledger, clock, code, NIGHT + 200 * DAY)
        for clock.now in (NIGHT + HOUR, NIGHT + 2 * HOUR):
            scheduled(bench, clock).tick()
        run = runs(bench)[2:]
        assert [(one.code, one.details["first_day"], one.details["last_day"]) for one in run] == [
            ("pull_run", "2023-12-29", "2024-01-02")
        ]
        assert [log["event"] for log in logs].count("pull.run_of_the_future") == 1


def test_a_pull_whose_only_run_is_of_the_future_is_owed_at_once(bench: Bench) -> None:
    clock = Clock(NIGHT)
    with by_clock(bench, clock) as ledger, capture_logs() as logs:
        noted(ledger, clock, "pull_run", NIGHT + 200 * DAY)
        clock.now = NIGHT + HOUR
        pulls = scheduled(bench, clock)
        pulls.tick()
        pulls.tick()
        assert [(run.details["first_day"], run.details["last_day"]) for run in runs(bench)[1:]] == [
            ("2024-01-02", "2024-01-02")
        ]
        assert [log["event"] for log in logs].count("pull.run_of_the_future") == 1


def test_a_clock_that_was_ahead_and_is_set_right_under_a_running_node_stops_no_pull(bench: Bench) -> None:
    clock = Clock(NIGHT - DAY - HOUR)
    with by_clock(bench, clock), capture_logs() as logs:
        pulls = scheduled(bench, clock)
        for clock.now in (NIGHT - DAY, NIGHT + 200 * DAY, NIGHT, NIGHT + HOUR):
            pulls.tick()
        days = [run.details["last_day"] for run in runs(bench)]
        assert days == ["2024-01-01", "2024-07-20", "2024-01-02"]
        assert runs(bench)[-1].details["first_day"] == "2024-01-02"
        assert [log["event"] for log in logs].count("pull.run_of_the_future") == 1


def test_a_pull_that_has_never_run_begins_with_the_next_slot_of_the_clock_that_was_set_back(bench: Bench) -> None:
    clock = Clock(NIGHT + 200 * DAY)
    pulls = scheduled(bench, clock)
    for clock.now in (NIGHT - HOUR, NIGHT):
        pulls.tick()
    assert [run.details["last_day"] for run in runs(bench)] == ["2024-01-02"]


def test_a_clock_that_is_wrong_for_a_moment_makes_no_pull_of_the_night_run_by_day(bench: Bench) -> None:
    clock = Clock(NIGHT + 10 * HOUR)
    pulls = scheduled(bench, clock)
    for clock.now in (NIGHT - 14 * HOUR, NIGHT + 10 * HOUR, NIGHT + 11 * HOUR):
        pulls.tick()
    assert runs(bench) == []
    clock.now = NIGHT + DAY
    pulls.tick()
    assert len(runs(bench)) == 1


def test_what_the_limit_left_is_fetched_after_days_too(bench: Bench) -> None:
    clock = Clock(NIGHT - HOUR)
    pulls = scheduled(bench, clock, max_studies=1)
    clock.now = NIGHT
    pulls.tick()
    bench.finish()
    clock.now += 2 * DAY
    pulls.tick()
    assert [(run.code, run.details["left"]) for run in runs(bench)] == [("pull_run_failed", 1), ("pull_run", 0)]
    assert set(bench.archive.moves) == set(bench.series)


def test_a_study_that_fails_keeps_no_other_from_its_turn(bench: Bench) -> None:
    clock = Clock(NIGHT - HOUR)
    pulls = scheduled(bench, clock, max_studies=1)
    clock.now, bench.archive.script = NIGHT, Script.REFUSES
    pulls.tick()
    clock.now += HOUR
    pulls.tick()
    asked = {
        next(ds.StudyInstanceUID for ds in bench.archive.instances if ds.SeriesInstanceUID == uid)
        for uid in bench.archive.moves
    }
    assert asked == set(bench.studies)


def test_a_failed_run_is_told_and_never_fatal(bench: Bench) -> None:
    clock = Clock(NIGHT - HOUR)
    pulls = scheduled(bench, clock)
    clock.now, bench.archive.find_status = NIGHT, 0xA700
    pulls.tick()
    bench.archive.find_status, bench.archive.script = 0x0000, Script.REFUSES
    clock.now += HOUR
    pulls.tick()
    bench.archive.script = Script.SENDS
    clock.now += HOUR
    pulls.tick()
    clock.now += HOUR
    pulls.tick()
    assert [run.code for run in runs(bench)] == ["pull_run_failed", "pull_run_failed", "pull_run"]
    assert runs(bench)[0].details["reason"] == "find_refused"
    assert runs(bench)[1].details["outcomes"] == {"retrieve_refused": 2}


def test_patterns_and_the_limit_narrow_a_run(bench: Bench) -> None:
    for ds in bench.archive.instances:
        ds.StationName = "CT7" if ds.SeriesInstanceUID == bench.series[1] else "CT8"
    clock = Clock(NIGHT - HOUR)
    pulls = scheduled(bench, clock, station_name="ct7", series_description="BODY*", max_studies=1)
    clock.now = NIGHT
    pulls.tick()
    [run] = runs(bench)
    assert (bench.archive.moves, run.details["fetched"]) == ([bench.series[1]], 1)
    assert set(bench.archive.moves) == {bench.series[1]}


def test_a_stopping_node_ends_a_run_and_owes_it(bench: Bench) -> None:
    clock = Clock(NIGHT - HOUR)
    stopping = iter([False, True])
    config_ = bench.intake.config
    pulls = ScheduledPulls(
        config_, bench.intake.ledger, bench.intake.spool, clock=clock, should_stop=lambda: next(stopping, True)
    )
    clock.now = NIGHT
    pulls.tick()
    assert bench.archive.moves == []
    assert [run.code for run in runs(bench)] == ["pull_run_failed"]


def test_a_pull_of_a_peer_that_may_not_be_asked_is_no_configuration() -> None:
    with pytest.raises(ValueError, match="lacks find and move in its we_may"):
        config(peers=[{"name": "pacs", "ae_title": "PACS"}], pulls=[{"name": "a", "peer": "pacs"}])
    with pytest.raises(ValueError, match="no peer is named 'other'"):
        config(pulls=[{"name": "a", "peer": "other"}])
    assert FIND.endswith(".1")
