"""How fast one connection sends: too slow, silent, or faster than its share.

Only the time that we waited for the sender counts against it. What our own disk takes does not, nor a pause that we
make ourselves.
"""

from __future__ import annotations

from collections.abc import Callable

_BURST_S = 1.0  # a sender that paused may catch up for so long


class TooSlow(Exception):
    """The sender holds a thread and sends nothing, or next to nothing; the text says which."""


class Pace:
    """Watches one connection. `silence_s`: seconds without a byte, and the window in which the rate is judged.

    `min_bytes_per_s` 0: a sender may be as slow as it likes, as long as something comes.
    """

    def __init__(self, *, silence_s: float, min_bytes_per_s: int) -> None:
        self._silence_s = silence_s
        self._min_bytes_per_s = min_bytes_per_s
        self._silent = 0.0  # seconds since the last byte
        self._waited, self._came = 0.0, 0  # seconds and bytes of this window
        self._paid_until = 0.0  # when the bytes so far have had their time, at the rate that is allowed

    def begin(self) -> None:
        """A message begins: what was before it does not count."""
        self._silent, self._waited, self._came = 0.0, 0.0, 0

    def waited(self, seconds: float, n_bytes: int) -> None:
        """A read took so long and brought so much. Raises `TooSlow`."""
        self._silent = 0.0 if n_bytes else self._silent + seconds
        self._waited += seconds
        self._came += n_bytes
        over = self._waited > self._silence_s
        too_slow = over and self._came < self._min_bytes_per_s * self._waited
        if self._silent > self._silence_s or (too_slow and self._silent > self._silence_s / 2):
            raise TooSlow("a sender that fell silent in a message")
        if too_slow:
            raise TooSlow("a sender that is too slow")
        if over:
            self._waited, self._came = 0.0, 0

    def pause_s(self, n_bytes: int, bytes_per_s: float, now: float) -> float:
        """How many seconds to read nothing after `n_bytes`, so that no more than `bytes_per_s` come."""
        self._paid_until = max(self._paid_until, now - _BURST_S) + n_bytes / bytes_per_s
        return max(0.0, self._paid_until - now)


def sleep_unless(ended: Callable[[], bool], seconds: float, sleep: Callable[[float], object], tick_s: float) -> None:
    """Sleep in short pieces, no longer than until `ended`."""
    while seconds > 0 and not ended():
        sleep(min(seconds, tick_s))
        seconds -= tick_s
