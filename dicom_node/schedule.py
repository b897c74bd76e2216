"""The node's clockwork: what runs every so often. APScheduler is a clock here and never a queue."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC

import structlog
from apscheduler.executors.pool import ThreadPoolExecutor
from apscheduler.schedulers.background import BackgroundScheduler

log = structlog.get_logger()


class Schedule:
    """Named functions, each called every so many seconds in a thread of the scheduler; never two of one name."""

    def __init__(self) -> None:
        self._scheduler = BackgroundScheduler(
            timezone=UTC,
            executors={"default": ThreadPoolExecutor(max_workers=4)},
            # a machine that slept runs a missed task once, however late
            job_defaults={"coalesce": True, "max_instances": 1, "misfire_grace_time": None},
        )

    def every(self, seconds: float, name: str, function: Callable[[], object]) -> None:
        """Call `function` every `seconds`, the first time after `seconds`. What it raises is logged, and it goes on."""

        def fenced() -> None:
            try:
                function()
            except Exception:
                log.exception("schedule.failed", task=name)

        self._scheduler.add_job(fenced, "interval", seconds=seconds, id=name, name=name)

    def start(self) -> None:
        self._scheduler.start()

    def stop(self) -> None:
        """End the clockwork and wait for a task that is running."""
        if self._scheduler.running:
            self._scheduler.shutdown(wait=True)
