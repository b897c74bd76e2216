"""Events that repeat become one a minute, with a count: a stranger must not fill the ledger, the log or the memory."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from dataclasses import dataclass

PERIOD_S = 60.0
BUDGET = 60  # events of one code in a period, whoever causes them
MOST_NAMES = 8  # of one address in a period, told apart: a gateway calls by the titles of all its modalities
_REMEMBERED = 1000

_NUMBER = re.compile(r"0x[0-9A-Fa-f]+|\d+")


def without_numbers(text: str) -> str:
    """A reason of ours without what a peer put into it: as part of a key it has few values."""
    return _NUMBER.sub("#", text)


class Names:
    """Which of the names that an address gives itself are told apart: the first `MOST_NAMES` of each period.

    So that a name can be part of a key though a peer chose it. Safe for several threads; `clock` as of `Thinning`.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._since: float | None = None
        self._known: dict[str, set[str]] = {}

    def known(self, address: str, name: str) -> bool:
        """Whether `name` is one of those of its address; all that are not share the key without a name."""
        now = self._clock()
        with self._lock:
            if self._since is None or now - self._since >= PERIOD_S:
                self._since, self._known = now, {}
            if address not in self._known and len(self._known) >= _REMEMBERED:
                return False
            names = self._known.setdefault(address, set())
            if len(names) < MOST_NAMES:
                names.add(name)
            return name in names


@dataclass(slots=True)
class _Seen:
    told: float  # when its last event was told
    left_out: int = 0


@dataclass(slots=True)
class _Period:
    began: float
    told: int = 0
    left_out: int = 0  # above the budget, since the last event


class Thinning:
    """Which events are told. Safe for several threads; `clock` is monotonic seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._seen: dict[tuple[str, str], _Seen] = {}
        self._periods: dict[str, _Period] = {}

    def told(self, code: str, key: str, count: int = 1) -> dict[str, int] | None:
        """The details of an event that is to be told, None for one that is only counted.

        `key` is what makes events of one `code` the same; it should not be of a peer's choosing. `count` is for how
        many the event stands. Details: `repeated`, how many of this key were left out since its last event, and
        `others_left_out`, how many of any key were above the budget since the last event of the code.
        """
        now = self._clock()
        with self._lock:
            seen = self._seen.get((code, key))
            if seen is not None and now - seen.told < PERIOD_S:
                seen.left_out += count
                return None
            period = self._periods.setdefault(code, _Period(now))
            if now - period.began >= PERIOD_S:
                period.began, period.told = now, 0
            if period.told >= BUDGET:
                period.left_out += count
                return None
            period.told += 1
            details = {"repeated": seen.left_out if seen is not None else 0}
            if period.left_out:
                details["others_left_out"], period.left_out = period.left_out, 0
            if len(self._seen) >= _REMEMBERED:
                self._forget(now)
            self._seen[code, key] = _Seen(now)
            return details

    def _forget(self, now: float) -> None:
        """Those of the last period stay: the budget bounds them."""
        for name in [name for name, seen in self._seen.items() if now - seen.told >= PERIOD_S]:
            del self._seen[name]
