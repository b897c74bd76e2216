"""`[[pulls]]`: every day, the CTs of the days before that an archive has and nobody sent us.

A run that was missed, because the node was down, is made up for at the next start; one that failed is tried again
every hour until the next day's. Which runs there were is in the ledger (`pull_run`, `pull_run_failed`), so that a
restart repeats none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, datetime, timedelta

import structlog

from dicom_node.config import Config, ScheduledPull
from dicom_node.net.query import SeriesFound, StudyFound
from dicom_node.pull import ARCHIVE_TROUBLE, Puller, PullOptions, PullOutcome, Wanted
from dicom_node.selection import like
from storage.ledger import Ledger
from storage.spool import Spool

log = structlog.get_logger(__name__)

RUN, RUN_FAILED = "pull_run", "pull_run_failed"
AGAIN_AFTER = timedelta(hours=1)
_HARMLESS = frozenset({"fetched", "present", "no_ct"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Past:
    """What is known of a pull's runs: when one last succeeded, and when one was last tried."""

    succeeded: datetime | None = None
    tried: datetime | None = None


def slot_before(at: str, now: datetime) -> datetime:
    """The latest moment at or before `now` (aware, local) when it was `at` o'clock."""
    hour, minute = at.split(":")
    slot = now.replace(hour=int(hour), minute=int(minute), second=0, microsecond=0)
    return slot if slot <= now else slot - timedelta(days=1)


def is_due(at: str, now: datetime, past: Past, started: datetime) -> bool:
    """Whether a run is owed now: since the last slot none succeeded, and none was tried within the hour.

    A pull that never ran begins with the first slot after the node has started with it: configuring it at noon does
    not load the archive at noon.
    """
    slot = slot_before(at, now)
    if past.tried is None:
        return started < slot
    if past.succeeded is not None and past.succeeded >= slot:
        return False
    return past.tried < slot or now - past.tried >= AGAIN_AFTER


def days_of(pull: ScheduledPull, slot: datetime) -> tuple[date, date]:
    """First and last study date of a run."""
    return (slot - timedelta(days=pull.days_back)).date(), (slot - timedelta(days=1)).date()


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
        self._started = clock()
        self._past = {pull.name: self._remembered(pull.name) for pull in config.pulls}

    def tick(self) -> None:
        """Never raises for an archive's trouble: that is told in the ledger."""
        for pull in self._config.pulls:
            now = self._clock()
            if not self._should_stop() and is_due(pull.at, now, self._past[pull.name], self._started):
                done = self._run(pull, slot_before(pull.at, now))
                known = self._past[pull.name].succeeded
                self._past[pull.name] = Past(tried=now, succeeded=now if done else known)

    def _remembered(self, name: str) -> Past:
        def last(code: str) -> datetime | None:
            events = self._ledger.search_events(code=code)  # newest first
            return next((event.time for event in events if event.details.get("pull") == name), None)

        succeeded, failed = last(RUN), last(RUN_FAILED)
        return Past(succeeded=succeeded, tried=max(filter(None, (succeeded, failed)), default=None))

    def _run(self, pull: ScheduledPull, slot: datetime) -> bool:
        """One run and its event; whether nothing is left to be tried again."""
        first, last = days_of(pull, slot)

        def wants(series: SeriesFound) -> bool:
            return _fits(series.description, pull.series_description) and _fits(series.station_name, pull.station_name)

        options = PullOptions(method=pull.method, wants_series=wants, should_stop=self._should_stop)
        puller = Puller(self._config, self._config.peer(pull.peer), self._ledger, self._spool, options)
        found = puller.finder.ct_studies(first, last)
        if not found.ok:
            self._tell(pull, RUN_FAILED, found.text, {"reason": found.code})
            return False
        studies = [study for study in found.studies if _fits(study.description, pull.study_description)]
        missing = [study for study in studies if not puller.is_here(study.study_uid)]
        outcomes = self._pull(puller, missing[: pull.max_studies])
        codes = Counter(outcome.code for outcome in outcomes)
        left = len(missing) - len(outcomes)
        counts: dict[str, object] = {
            "first_day": f"{first:%Y-%m-%d}",
            "last_day": f"{last:%Y-%m-%d}",
            "found": len(studies),
            "missing": len(missing),
            "fetched": codes["fetched"],
            "instances": sum(outcome.instances for outcome in outcomes),
            "left": left,
            "outcomes": dict(sorted(codes.items())),
        }
        failed = [outcome for outcome in outcomes if outcome.code not in _HARMLESS]
        text = f"{len(studies)} CT studies of {first:%Y-%m-%d} to {last:%Y-%m-%d} at {pull.peer}: "
        here = len(studies) - len(missing)
        text += f"{here} were here, {codes['fetched']} fetched, {len(failed)} failed, {left} left"
        if failed:
            text += f"; the first failure: {failed[0].text}"
        done = not failed and not left
        self._tell(pull, RUN if done else RUN_FAILED, text, counts)
        return done

    def _pull(self, puller: Puller, studies: list[StudyFound]) -> list[PullOutcome]:
        outcomes: list[PullOutcome] = []
        for study in studies:
            if self._should_stop():
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
