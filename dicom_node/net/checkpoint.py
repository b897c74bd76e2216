"""Where pynetdicom's association thread stands still while a request of ours waits for its answer.

pynetdicom's own event lets that thread run on for a moment after `clear`: on a busy machine it then takes the answer
away, and whoever asked waits for it until the time-out (pynetdicom 3.0.4, `Association.run_reactor`: `_is_paused` is
true before the thread waits; and false when a thread that served an N-EVENT-REPORT has ended, whatever this one does,
so that a release waits for ever). After this one's `clear` it stands still.
"""

from __future__ import annotations

import threading
from typing import Any

from pynetdicom.association import Association

_LOOK_S = 0.05  # how often it is seen whether the thread has ended instead of standing still


class Checkpoint:
    """Stands in for the `threading.Event` that the thread of `assoc` passes in each of its rounds."""

    def __init__(self, assoc: Association) -> None:
        self._assoc = assoc
        self._changed = threading.Condition()
        self._open, self._stands = True, False

    def set(self) -> None:
        """Let the thread go on."""
        with self._changed:
            self._open = True
            self._changed.notify_all()

    def clear(self) -> None:
        """Stop the thread; it stands still, or has ended, when this returns."""
        with self._changed:
            self._open = False
            while not self._stands and self._assoc.is_alive() and threading.current_thread() is not self._assoc:
                self._changed.wait(_LOOK_S)

    def is_set(self) -> bool:
        return self._open

    def wait(self, timeout: float | None = None) -> bool:
        """What the thread calls; others that wait for it to go on do not count as it."""
        with self._changed:
            if threading.current_thread() is self._assoc and not self._open:
                self._stands = True
                self._changed.notify_all()
            passed = self._changed.wait_for(lambda: self._open, timeout)
            if threading.current_thread() is self._assoc:
                self._stands = False
            return passed


class _Steady(Association):
    """Whoever asks whether the thread stands still has called `clear` before."""

    _is_paused = property(lambda _: True, lambda *_: None)


def install(assoc: Any) -> Association:
    """Give this association a `Checkpoint`, before it is asked for anything; the association."""
    assoc._reactor_checkpoint = Checkpoint(assoc)
    assoc.__class__ = _Steady
    made: Association = assoc
    return made
