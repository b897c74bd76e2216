"""What is looked after every minute and every hour, whatever the machine's clock does: leases, waits, retention.

The wall clock may jump: set by hand, by NTP after a start without a battery, by a machine that slept. Waits and
leases that a wrong clock wrote are mended, no lease is ended by a jump, no outage is older for one, and nothing is
removed for being old, or given up for the age of an outage, before the clock has been steady for a day.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta

import structlog

from dicom_node.config import Config, StorageConfig
from dicom_node.rejections import keep_references
from dicom_node.worker import LONGEST_RETRY_S
from storage.errors import NotFound
from storage.ledger import Ledger, utc_now
from storage.records import FINAL_JOB_STATES
from storage.spool import Spool

log = structlog.get_logger()

JUMP_S = 60.0  # NTP steers by less; a leap second is nothing
STEADY_S = 86400.0  # so long a clock must have been steady before anything is removed for its age
LONG_SILENCE = timedelta(days=7)  # a node that was off for a week may have a wrong clock


class ClockWatch:
    """Compares the wall clock with the one that only ever goes forward. `look` is one thread's, `trusted` anybody's."""

    def __init__(self, wall: Callable[[], datetime] = utc_now, steady: Callable[[], float] = time.monotonic) -> None:
        self._wall, self._steady = wall, steady
        self._was = wall(), steady()
        self._doubted: float | None = None

    def look(self) -> float:
        """By how many seconds the wall clock jumped since the last look; 0 when it did not."""
        now, was = (self._wall(), self._steady()), self._was
        jump = _jump(was, now)
        if jump:
            self.doubt()  # before the jump is no longer to be seen
        self._was = now
        return jump

    def doubt(self) -> None:
        """The time may be wrong: wait until it has been steady for a while."""
        self._doubted = self._steady()

    @property
    def trusted(self) -> bool:
        """Whether ages may be believed; a jump that `look` has not seen yet counts."""
        steady, was = self._steady(), self._was
        if _jump(was, (self._wall(), steady)):
            return False
        return self._doubted is None or steady - self._doubted >= STEADY_S


def _jump(was: tuple[datetime, float], now: tuple[datetime, float]) -> float:
    """By how many seconds the wall clock went further than the steady one; 0 for less than `JUMP_S`."""
    jump = (now[0] - was[0]).total_seconds() - (now[1] - was[1])
    return jump if abs(jump) >= JUMP_S else 0.0


class Upkeep:
    """`compare_clocks` once, then `sweep` every minute and `retention` every hour, each by one thread at a time."""

    def __init__(
        self,
        config: Config,
        ledger: Ledger,
        spool: Spool,
        *,
        clock: Callable[[], datetime] = utc_now,
        steady: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config, self._ledger, self._spool, self._clock = config, ledger, spool, clock
        self._watch = ClockWatch(clock, steady)
        self._alive = config.storage.root / "node.alive"
        self._steady, self._looked = steady, steady()
        self._owed_s = 0.0  # by how much waits and the beginnings of outages are still to be shifted
        waits = [max(one.max_retry_s, one.first_retry_s, one.commitment_timeout_s) for one in config.destinations]
        self._longest_wait_s = max([LONGEST_RETRY_S, config.engine.retry_s, *waits])

    @property
    def clock_trusted(self) -> bool:
        """Whether ages may be believed: the clock has not jumped for a day. For any thread."""
        return self._watch.trusted

    def compare_clocks(self) -> None:
        """Before this life of the node does anything: is it later than in its last life, and not much later?

        How long an outage had lasted at the end of that life is right whichever clock was wrong, then or now; time
        without the node makes no outage older, because nobody tried.
        """
        last = self._last_alive()
        if last is not None:
            ahead = self._clock() - last
            self._owed_s += ahead.total_seconds()
            if not -timedelta(seconds=JUMP_S) < ahead < LONG_SILENCE:
                self._watch.doubt()
                reason = f"this node was last at work on {last.isoformat(timespec='seconds')}"
                log.warning("node.clock_doubtful", reason=f"{reason}; nothing is removed for its age for a day")

    def _last_alive(self) -> datetime | None:
        """When a node last swept; of a spool that was never swept, the ledger's latest event."""
        try:
            return datetime.fromtimestamp(self._alive.stat().st_mtime, UTC)
        except FileNotFoundError:
            latest = next(iter(self._ledger.search_events(limit=1)), None)
            return latest.time if latest is not None else None

    def _stay_alive(self) -> None:
        """Events do not tell when a node was at work: `pull` and `doctor` write some, too."""
        now_s = self._clock().timestamp()
        with suppress(OSError):  # the disk is full: it is tried again in a minute
            self._alive.touch(mode=0o600)
            os.utime(self._alive, (now_s, now_s))

    def sweep(self) -> None:
        """Take back what dead workers and senders held."""
        looked = self._steady()
        jumped = self._watch.look()
        if jumped:
            text = f"the machine's clock was set {'forward' if jumped > 0 else 'back'} by {abs(jumped):.0f} s"
            log.warning("node.clock_jumped", seconds=round(jumped))
            self._owed_s += jumped
        if self._owed_s < 0:  # first: it does no harm when the next call fails and both are repeated
            self._ledger.shift_waits(self._owed_s)
        if self._owed_s:
            self._ledger.shift_outages(self._owed_s, recent_s=looked - self._looked)
            self._owed_s = 0.0
        self._looked = looked
        self._stay_alive()
        if jumped:
            self._ledger.note("", "clock_jumped", text, details={"seconds": round(jumped)})
        engine = self._config.engine
        mended = self._ledger.mend_times(longest_wait_s=self._longest_wait_s, lease_s=engine.lease_s)
        if mended:
            log.warning("node.times_mended", rows=mended)
        if jumped > 0:
            return  # leases seem to be over that are renewed every few seconds; those of the dead are swept next time
        swept = self._ledger.sweep(max_attempts=engine.max_attempts, retry_s=engine.retry_s)
        if swept:
            log.warning("node.swept", jobs=swept, reason="whoever had them is gone: the lease ran out")

    def retention(self) -> None:
        """Remove what is older than the configuration keeps it."""
        if not self._watch.trusted:
            log.warning("node.retention_waits", reason="the clock jumped: ages are not believed for a day")
            return
        keep, now = self._config.storage, self._clock()
        gone: list[str] = []
        try:
            gone = self._remove_old(keep, now)
        finally:  # also when the disk fails: the ledger must not grow for that
            events = self._ledger.forget_before(now - timedelta(days=keep.keep_events_days))
            if gone or events:
                log.info("node.retention", removed=len(gone), events=events)

    def _remove_old(self, keep: StorageConfig, now: datetime) -> list[str]:
        return self._spool.apply_retention(
            timedelta(days=keep.keep_inputs_days),
            timedelta(days=keep.keep_results_days),
            now,
            is_final=self._is_final,
            is_over=lambda study_uid: all(
                job.state in FINAL_JOB_STATES for job in self._ledger.jobs_of_study(study_uid)
            ),
            before_result=lambda job_id: keep_references(self._spool, job_id),
            keep_references=timedelta(days=keep.keep_events_days),
        )

    def _is_final(self, job_id: str) -> bool:
        try:
            return self._ledger.get(job_id).state in FINAL_JOB_STATES
        except NotFound:
            return True  # of a ledger that was replaced: nobody will ask for it
