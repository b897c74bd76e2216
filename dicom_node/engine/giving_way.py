"""While images come in, a running job leaves one processor to them, for a while.

A sender waits for each answer, so every wait of a receiver for a processor is lost to it; a job can wait. The engine's
low priority alone does not give a receiver a processor at once (docs/performance.md). Which processors a thread may use
is the one thing that can be changed there and back without privileges: an idle class or a higher nice value could not
be left again (sched(7), RLIMIT_NICE).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import Self


class GivingWay:
    """Of one job; a context manager, at whose end all processors are the engine's again.

    `look` is called several times a second; `most_s` bounds what a stream of images without end costs the job.
    """

    def __init__(
        self, pid: int, images_come: Callable[[], bool], *, most_s: float, clock: Callable[[], float] = monotonic
    ) -> None:
        """`pid` is the engine's process; its children are followed, too."""
        self._pid = pid
        self._images_come = images_come
        self._left_s = most_s
        self._clock = clock
        self._since: float | None = None  # when it gave way
        self._usual: set[int] = set()  # the processors of before

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._end()

    def look(self) -> None:
        """Give way, or stop giving way, as the receivers' need is now."""
        wanted = self._left_s - self._given_s() > 0 and self._images_come()
        if wanted and self._since is None:
            self._begin()
        elif not wanted:
            self._end()

    def _begin(self) -> None:
        with suppress(OSError, AttributeError):  # it has just died, or this system knows no such thing
            self._usual = os.sched_getaffinity(self._pid)
            if len(self._usual) > 1:
                self._since = self._clock()
                self._allow(self._usual - {min(self._usual)})

    def _end(self) -> None:
        if self._since is not None:
            self._left_s -= self._given_s()
            self._since = None
            self._allow(self._usual)

    def _given_s(self) -> float:
        return 0.0 if self._since is None else self._clock() - self._since

    def _allow(self, processors: set[int]) -> None:
        for thread in threads_of(self._pid):
            with suppress(OSError):  # it has ended
                os.sched_setaffinity(thread, processors)


def threads_of(pid: int) -> Iterator[int]:
    """The threads of a process and of its descendants, as far as they live and may be seen (proc(5))."""
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            yield int(task.name)
            with suppress(OSError):  # the thread has ended, or this kernel does not list children
                for child in (task / "children").read_text().split():
                    yield from threads_of(int(child))
