"""The node's clockwork: what runs every so often, by a clock that nobody sets. It is a clock and never a queue.

Nothing here reads the time of day: the clockwork goes on while that is set back, and runs nothing more often when it is
set forward. Whether something is due at a time of day (a pull, a backup) its own task finds out, each time it runs.
Time in which the machine slept does not count: a task runs after the rest of its pause, once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import structlog

log = structlog.get_logger()


class Ticker:
    """A thread that calls a function again and again; what it raises is logged, and it goes on."""

    def __init__(self, name: str, function: Callable[[], object], interval_s: float) -> None:
        self._function, self._interval_s = function, interval_s
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._loop, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def let_end(self) -> None:
        """Call the function no more, without a wait for a call that runs."""
        self._stopping.set()

    def stop(self) -> None:
        self.let_end()
        if self._thread.ident is not None:  # it was started
            self._thread.join()

    def _loop(self) -> None:
        while not self._stopping.wait(self._interval_s):  # monotonic, where Python was built on glibc 2.30 or later
            try:
                self._function()
            except Exception:
                log.exception("schedule.failed", task=self._thread.name)


class Schedule:
    """Named functions, each called every so many seconds in a thread of its own; never two of one name."""

    def __init__(self) -> None:
        self._tickers: list[Ticker] = []

    def every(self, seconds: float, name: str, function: Callable[[], object]) -> None:
        """Call `function`, the first time after `seconds`, and again so long after each end, also after an error."""
        self._tickers.append(Ticker(name, function, seconds))

    def start(self) -> None:
        for ticker in self._tickers:
            ticker.start()

    def stop(self) -> None:
        """End the clockwork and wait for the tasks that are running."""
        for ticker in self._tickers:
            ticker.let_end()
        for ticker in self._tickers:
            ticker.stop()
