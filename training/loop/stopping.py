"""Ending a training on request without losing a step, and keeping two trainings out of one run directory."""

from __future__ import annotations

import fcntl
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from training.errors import RunError

LOCK = "lock"


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM came; what was done is on disk and the same call goes on from there."""


@contextmanager
def stop_on_signals() -> Iterator[Callable[[], bool]]:
    """Within it SIGINT and SIGTERM only make the yielded function return True; a second SIGINT interrupts at once.

    A signal that is ignored stays so. Outside of the main thread, where Python takes no signals, nothing changes.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return

    def ask(number: int, _frame: FrameType | None) -> None:
        if asked.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.set()

    wanted = [s for s in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(s) is not signal.SIG_IGN]
    before = {s: signal.signal(s, ask) for s in wanted}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the run directory; the lock ends with the process, however it ends.

    Raises:
        RunError: run_busy, another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunError("run_busy", f"{folder}: another process is training here") from error
        yield
    finally:
        os.close(file)
