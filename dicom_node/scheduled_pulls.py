"""`[[pulls]]`: every day, the CTs of the days before that an archive has and nobody sent us.

A run that was missed, because the node was down, is made up for at the next start; one that failed is tried again
every hour. Every run asks for all days since those of the last one that succeeded, up to CATCH_UP_DAYS back. Which runs
there were is in the ledger (`pull_run`, `pull_run_failed`), so that a restart repeats none. Those of the future are of
a clock that was wrong: they are no reason to leave a day's out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta

import structlog
from apscheduler.triggers.cron import CronTrigger

from dicom_node.config import Config, ScheduledPull
from dicom_node.net.query import SeriesFound, StudyFound
from dicom_node.pull import ARCHIVE_TROUBLE, Puller, PullOptions, PullOutcome, Wanted
from dicom_node.selection import like
from storage.ledger import Ledger
from storage.records import Event
from storage.spool import Spool

log = structlog.get_logger(__name__)

RUN, RUN_FAILED = "pull_run", "pull_run_failed"
AGAIN_AFTER = timedelta(hours=1)
CATCH_UP_DAYS = 30
_AHEAD = timedelta(hours=1)  # a run of later than this is of a clock that was wrong
_LONG_AGO = datetime.min.replace(tzinfo=UTC)  # of a pull that only ever ran in the future
_NOT_FETCHED = frozenset({"present", "no_ct"})  # nothing was asked for: does not count for max_studies
_HARMLESS = _NOT_FETCHED | {"fetched"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Past:
    """What is known of a pull's runs: when one last succeeded, and when one was last tried.

    `since` is the first study date that no successful run has asked for.
    """

    succeeded: datetime | None = None
    tried: datetime | None = None
    since: date | None = None


def slot_before(at: str, now: datetime) -> datetime:
    """The latest moment at or before `now` (aware, local) when it was `at` o'clock."""
    hour, minute = at.split(":")
    daily = CronTrigger(hour=hour, minute=minute, timezone=now.tzinfo)
    slot: datetime = daily.get_next_fire_time(None, now - timedelta(days=1) + datetime.resolution)
    return slot


def is_due(at: str, now: datetime, past: Past, started: datetime) -> bool:
    """Whether a run is owed now: since the last slot none succeeded, and none was tried within the hour.

    A pull that never ran begins with the first slot after the node has started with it: configuring it at noon does
    not load the archive at noon. A run of the future counts for nothing.
    """
    slot = slot_before(at, now)
    if past.tried is None:
        return started < slot
    if past.succeeded is not None and slot <= past.succeeded <= now + _AHEAD:
        return False
    return past.tried < slot or not timedelta() <= now - past.tried < AGAIN_AFTER


def days_of(pull: ScheduledPull, slot: datetime, since: date | None = None) -> tuple[date, date]:
    """First and last study date of a run: `days_back` days, and those that are owed `since` earlier."""
    first, last = slot.date() - timedelta(days=pull.days_back), slot.date() - timedelta(days=1)
    owed = max(since or first, slot.date() - timedelta(days=CATCH_UP_DAYS))
    return min(first, owed), last


def portions(first: date, last: date, days: int) -> Iterator[tuple[date, date]]:
    """Days to ask for at once, `days` at most: an archive answers only so much to one question."""
    while first <= last:
        end = min(first + timedelta(days=days - 1), last)
        yield first, end
        first = end + timedelta(days=1)


def local_now() -> datetime:
    """Aware, in this machine's time zone."""
    return datetime.now().astimezone()


class ScheduledPulls:
    """`tick` is called every minute by one thread; it runs what is due, one after the other."""

    def __init__(
        self,
        config: Config,
        ledger: Ledger,
        spool: Spool,
        *,
        clock: Callable[[], datetime] = local_now,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self._config, self._ledger, self._spool = config, ledger, spool
        self._clock, self._should_stop = clock, should_stop
        self._begun = self._started = now = clock()  # `_started`: by a clock that was set back meanwhile
        self._past = {pull.name: self._remembered(pull, now) for pull in config.pulls}
        self._failed: dict[str, set[str]] = {pull.name: set() for pull in config.pulls}  # studies, in the last run

    def tick(self) -> None:
        """Never raises for an archive's trouble: that is told in the ledger."""
        for pull in self._config.pulls:
            now = self._clock()
            self._started = self._begun if now >= self._begun else min(self._started, now)  # the clock was set back
            known = self._past[pull.name]
            if known.tried is not None and known.tried > now + _AHEAD:
                known = self._past[pull.name] = self._remembered(pull, now)
            if not self._should_stop() and is_due(pull.at, now, known, self._started):
                first, last = days_of(pull, slot_before(pull.at, now), known.since)
                done = self._run(pull, first, last)
                self._past[pull.name] = Past(
                    tried=now,
                    succeeded=now if done else known.succeeded,
                    since=last + timedelta(days=1) if done else known.since or first,
                )

    def _remembered(self, pull: ScheduledPull, now: datetime) -> Past:
        """What the ledger knows by now; a run of the future is told in the log, and is not believed."""

        def events(code: str) -> list[Event]:
            found = self._ledger.search_events(code=code)  # newest first
            return [event for event in found if event.details.get("pull") == pull.name]

        every = events(RUN), events(RUN_FAILED)
        succeeded, failed = ([event for event in found if event.time <= now + _AHEAD] for found in every)
        latest = max((event for found in every for event in found[:1]), key=lambda event: event.id, default=None)
        if latest is not None and latest.time > now + _AHEAD:
            reason = (
                f"its last run was on {latest.time.isoformat(timespec='seconds')}: the clock was wrong then or is now"
            )
            log.warning("pull.run_of_the_future", pull=pull.name, reason=reason)
        since = None
        if succeeded:
            since = self._days_of_event(pull, succeeded[0])[1] + timedelta(days=1)
        elif failed:  # none ever succeeded: what the first one asked for is owed
            since = self._days_of_event(pull, failed[-1])[0]
        tried = max((event.time for event in (*succeeded[:1], *failed[:1])), default=None)
        return Past(
            succeeded=succeeded[0].time if succeeded else None,
            tried=tried or (_LONG_AGO if latest is not None else None),
            since=since,
        )

    def _days_of_event(self, pull: ScheduledPull, event: Event) -> tuple[date, date]:
        """First and last study date of an earlier run, as it wrote them down."""
        try:
            first, last = (date.fromisoformat(event.details[key]) for key in ("first_day", "last_day"))
        except (KeyError, TypeError, ValueError):  # an earlier version wrote it
            return days_of(pull, slot_before(pull.at, event.time.astimezone(self._started.tzinfo)))
        return first, last

    def _run(self, pull: ScheduledPull, first: date, last: date) -> bool:
        """One run and its event; whether nothing is left to be tried again."""
        days: dict[str, object] = {"first_day": f"{first:%Y-%m-%d}", "last_day": f"{last:%Y-%m-%d}"}

        def wants(series: SeriesFound) -> bool:
            return _fits(series.description, pull.series_description) and _fits(series.station_name, pull.station_name)

        options = PullOptions(method=pull.method, wants_series=wants, should_stop=self._should_stop)
        puller = Puller(self._config, self._config.peer(pull.peer), self._ledger, self._spool, options)
        answered: dict[str, StudyFound] = {}
        for some in portions(first, last, pull.days_back):
            found = puller.finder.ct_studies(*some)
            if not found.ok:
                self._tell(pull, RUN_FAILED, found.text, {**days, "reason": found.code})
                return False
            answered |= {study.study_uid: study for study in found.studies}
        studies = [study for study in answered.values() if _fits(study.description, pull.study_description)]
        missing = [study for study in studies if not puller.is_here(study.study_uid)]
        missing.sort(key=lambda study: study.study_uid in self._failed[pull.name])  # these keep no other from its turn
        outcomes = self._pull(puller, missing, pull.max_studies)
        codes = Counter(outcome.code for outcome in outcomes)
        left = len(missing) - len(outcomes)
        counts: dict[str, object] = {
            **days,
            "found": len(studies),
            "missing": len(missing),
            "fetched": codes["fetched"],
            "instances": sum(outcome.instances for outcome in outcomes),
            "left": left,
            "outcomes": dict(sorted(codes.items())),
        }
        failed = [outcome for outcome in outcomes if outcome.code not in _HARMLESS]
        self._failed[pull.name] = {outcome.study_uid for outcome in failed}
        text = f"{len(studies)} CT studies of {first:%Y-%m-%d} to {last:%Y-%m-%d} at {pull.peer}: "
        here = len(studies) - len(missing)
        text += f"{here} were here, {codes['fetched']} fetched, {len(failed)} failed, {left} left"
        if failed:
            text += f"; the first failure: {failed[0].text}"
        done = not failed and not left
        self._tell(pull, RUN if done else RUN_FAILED, text, counts)
        return done

    def _pull(self, puller: Puller, studies: Iterable[StudyFound], most: int) -> list[PullOutcome]:
        outcomes: list[PullOutcome] = []
        for study in studies:
            if self._should_stop() or sum(outcome.code not in _NOT_FETCHED for outcome in outcomes) >= most:
                break
            outcomes.append(puller.pull_study(study, Wanted(study_uid=study.study_uid)))
            if outcomes[-1].code in ARCHIVE_TROUBLE:
                break
        return outcomes

    def _tell(self, pull: ScheduledPull, code: str, text: str, details: dict[str, object]) -> None:
        bound = log.bind(pull=pull.name, peer=pull.peer, **details)
        bound.info("pull.run") if code == RUN else bound.warning("pull.run_failed", text=text)
        told = f"pull {pull.name}: {text}"
        self._ledger.note("", code, told, details={**details, "pull": pull.name, "peer": pull.peer})


def _fits(value: str, pattern: str) -> bool:
    return not pattern or like(value, pattern)
