"""Which associations are open, whose they are, and what they carried.

An association's token names its folder in the spool and says in hex who sent: after a kill -9 the files in that
folder still know their sender, and no text of a peer is ever part of a path.
"""

from __future__ import annotations

import secrets
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from ipaddress import ip_address

from dicom_node.net.peers import plain_address

_RANDOM_HEX = 16
_REMEMBERED = 10_000  # associations that ended well; one that is forgotten only makes its series wait
_AE_BYTES = 16  # VR AE (PS3.5 table 6.2-1)


def make_token(calling_ae: str, address: str) -> str:
    """A fresh hex token: 8 random bytes, the AE title padded to 16 bytes, the packed IPv4 address.

    An IPv6 address does not fit the 64 digits of a token and is left out.
    """
    title = calling_ae.encode("ascii", "replace")[:_AE_BYTES].ljust(_AE_BYTES)
    try:
        parsed = ip_address(plain_address(address))
        packed = parsed.packed if parsed.version == 4 else b""
    except ValueError:
        packed = b""
    return secrets.token_hex(_RANDOM_HEX // 2) + title.hex() + packed.hex()


def sender_of(token: str) -> tuple[str, str]:
    """(calling AE title, address) of a token; empty texts for what is not one of ours."""
    try:
        raw = bytes.fromhex(token[_RANDOM_HEX:])
    except ValueError:
        return "", ""
    title, packed = raw[:_AE_BYTES], raw[_AE_BYTES:]
    calling_ae = "".join(c for c in title.decode("ascii", "replace") if c.isprintable()).strip()
    try:
        return calling_ae, str(ip_address(packed)) if packed else ""
    except ValueError:
        return calling_ae, ""


@dataclass(kw_only=True, slots=True)
class Association:
    """One accepted association. Times are of the registry's monotonic clock, in seconds."""

    token: str
    calling_ae: str
    address: str
    peer: str
    opened: float
    last_activity: float
    stored: int = 0
    stored_bytes: int = 0
    refused: Counter[int] = field(default_factory=Counter)  # status -> instances
    dropped: Counter[str] = field(default_factory=Counter)  # SOP Class UID -> instances
    aborted: bool = False


def sender(association: Association) -> tuple[str, str]:
    """Whose limits an association is under: a configured peer's, or a stranger's by its address."""
    return association.peer, "" if association.peer else association.address


@dataclass(kw_only=True, slots=True)
class Totals:
    """What the associations since the start were and carried, by the configured name of the peer ("": a stranger)."""

    opened: Counter[str] = field(default_factory=Counter)
    released: Counter[str] = field(default_factory=Counter)
    aborted: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)  # by our reason code
    hung_up: Counter[str] = field(default_factory=Counter)  # by the code of the event that says why
    stored: Counter[str] = field(default_factory=Counter)
    stored_bytes: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    refused: Counter[tuple[str, int]] = field(default_factory=Counter)  # by peer and status

    def copy(self) -> Totals:
        """Counters of their own."""
        return Totals(**{one.name: Counter(getattr(self, one.name)) for one in fields(self)})


class AssociationRegistry:
    """Thread-safe book of the open associations; enforces the limit.

    `clock` is monotonic seconds; it must be the assembler's clock. `for_peers` of the places are for configured peers
    alone, however many strangers are let in.
    """

    def __init__(self, *, limit: int, clock: Callable[[], float], for_peers: int = 0) -> None:
        self._limit, self._for_strangers = limit, limit - for_peers
        self._clock = clock
        self._lock = threading.Lock()
        self._open: dict[str, Association] = {}
        self._released: dict[str, None] = {}  # in the order of their ends
        self._totals = Totals()

    @property
    def limit(self) -> int:
        return self._limit

    def open(self, *, calling_ae: str, address: str, peer: str, peer_limit: int = 0) -> str | None:
        """Take a place; returns the token, or None when the limit, or that of this peer (0: none), is reached.

        Strangers (no `peer`) have the places together that are not for peers alone.
        """
        now = self._clock()
        token = make_token(calling_ae, address)
        with self._lock:
            of_peer = sum(one.peer == peer for one in self._open.values())
            own_limit = peer_limit if peer else self._for_strangers
            if len(self._open) >= self._limit or (own_limit and of_peer >= own_limit):
                return None
            self._totals.opened[peer] += 1
            self._open[token] = Association(
                token=token, calling_ae=calling_ae, address=address, peer=peer, opened=now, last_activity=now
            )
        return token

    def stored(self, token: str, n_bytes: int) -> None:
        """An instance was made durable."""
        self._touch(token, lambda a: self._count_stored(a, a.stored + 1, a.stored_bytes + n_bytes))

    def dropped(self, token: str, sop_class_uid: str) -> None:
        """An instance of a class that we do not use was answered with Success and forgotten."""
        self._touch(token, lambda a: self._count_dropped(a, a.dropped + Counter((sop_class_uid,))))

    def refused(self, token: str, status: int) -> None:
        """An instance was answered with a failure."""
        self._touch(token, lambda a: self._count_refused(a, a.refused + Counter((status,))))

    def carried(
        self,
        token: str,
        *,
        stored: int,
        stored_bytes: int,
        dropped: Mapping[str, int] | None = None,
        refused: Mapping[int, int] | None = None,
    ) -> None:
        """What an association that another process serves has stored, dropped and refused so far."""

        def change(association: Association) -> None:
            self._count_stored(association, stored, stored_bytes)
            if dropped is not None:
                self._count_dropped(association, Counter(dropped))
            if refused is not None:
                self._count_refused(association, Counter(refused))

        self._touch(token, change)

    def close(self, token: str, *, aborted: bool = False) -> Association | None:
        """Give the place back; returns what the association carried, or None when it was closed before."""
        with self._lock:
            association = self._open.pop(token, None)
            if association is not None:
                (self._totals.aborted if aborted else self._totals.released)[association.peer] += 1
            if association is not None and not aborted:
                self._released[token] = None
                if len(self._released) > _REMEMBERED:
                    del self._released[next(iter(self._released))]
        if association is not None:
            association.aborted = aborted
        return association

    def ended_well(self, token: str) -> bool:
        """Whether the sender released this association: it sent all that it wanted to send on it.

        False for one that is open, that was aborted, or that is of an earlier life of the node.
        """
        with self._lock:
            return token in self._released

    def is_open(self, token: str, *, idle_limit_s: float) -> bool:
        """True while the association is open and was not silent for longer than `idle_limit_s`."""
        now = self._clock()
        with self._lock:
            association = self._open.get(token)
            return association is not None and now - association.last_activity <= idle_limit_s

    def companions(self, token: str) -> int:
        """How many associations the sender of this one has open now, this one included; 0 when it is not open."""
        with self._lock:
            own = self._open.get(token)
            return sum(sender(one) == sender(own) for one in self._open.values()) if own else 0

    def open_tokens(self) -> tuple[str, ...]:
        with self._lock:
            return tuple(self._open)

    def count_rejection(self, code: str) -> int:
        """Count a refused association request; returns how often this code was used."""
        with self._lock:
            self._totals.rejected[code] += 1
            return self._totals.rejected[code]

    def count_hang_up(self, code: str) -> None:
        """Count a connection that we ended, for what came on it or did not come."""
        with self._lock:
            self._totals.hung_up[code] += 1

    def counts(self) -> dict[str, int]:
        """Totals since start: `open`, `accepted`, and `rejected_<code>`."""
        with self._lock:
            rejected = {f"rejected_{code}": n for code, n in self._totals.rejected.items()}
            return {"open": len(self._open), "accepted": self._totals.opened.total(), **rejected}

    def totals(self) -> Totals:
        """A copy of everything that is counted since the start."""
        with self._lock:
            return self._totals.copy()

    def _count_stored(self, association: Association, stored: int, stored_bytes: int) -> None:
        self._totals.stored[association.peer] += stored - association.stored
        self._totals.stored_bytes[association.peer] += stored_bytes - association.stored_bytes
        association.stored, association.stored_bytes = stored, stored_bytes

    def _count_dropped(self, association: Association, dropped: Counter[str]) -> None:
        self._totals.dropped[association.peer] += dropped.total() - association.dropped.total()
        association.dropped = dropped

    def _count_refused(self, association: Association, refused: Counter[int]) -> None:
        for status, count in refused.items():
            self._totals.refused[association.peer, status] += count - association.refused[status]
        association.refused = refused

    def _touch(self, token: str, change: Callable[[Association], None]) -> None:
        now = self._clock()
        with self._lock:
            association = self._open.get(token)
            if association is not None:
                association.last_activity = now
                change(association)
