"""Ports of loopback for what a test starts later, or never."""

from __future__ import annotations

import itertools
import os
import socket

# Below what the kernel gives to outgoing connections and to `bind(0)` (32768 and up): a port that nobody listens on yet
# is not taken by those. Each worker of xdist has ports of its own; the process ID keeps other runs of today apart.
_FIRST, _LAST = 12_000, 32_000
_WORKERS = 4
_SHARE = (_LAST - _FIRST) // _WORKERS


def _share() -> range:
    worker = os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")
    begin = _FIRST + int(worker) % _WORKERS * _SHARE
    return range(begin, begin + _SHARE)


_turns = itertools.count(os.getpid() * 61)


def free_port() -> int:
    """A port that is free now, and that this process was not given before."""
    mine = _share()
    for _ in mine:
        port = mine[next(_turns) % len(mine)]
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
    raise RuntimeError(f"no port of {mine} is free")
