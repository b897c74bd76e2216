"""Whether a connection has something to read, whatever the number of its descriptor.

`select` knows the first 1,024 descriptors of a process and no other; pynetdicom asks it, and an association beyond
them got no answer.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import ssl
from typing import Any

from pynetdicom.transport import AssociationSocket

_CLOSED = "Evt17"  # PS3.8 table 9-10: connection closed


def within(sock: socket.socket, seconds: float) -> bool:
    """Whether bytes, or the end, come within so many seconds. Raises OSError or ValueError when `sock` is closed."""
    waiting = select.poll()
    waiting.register(sock, select.POLLIN)
    found = waiting.poll(seconds * 1000)
    if found and found[0][1] & select.POLLNVAL:  # closed by another thread in between
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    return bool(found)


class _Polled(AssociationSocket):
    """pynetdicom's socket, which asks `poll`."""

    @property
    def ready(self) -> bool:
        """Whether there is something to read; a connection that another thread closed is told to the state machine."""
        sock = self.socket
        if sock is None or not self._is_connected:
            return False
        try:
            return within(sock, 0) or (isinstance(sock, ssl.SSLSocket) and bool(sock.pending()))
        except (OSError, ValueError):
            self.event_queue.put(_CLOSED)
            return False


def install(link: Any) -> None:
    """Have pynetdicom's `link` ask `poll`; before its association's threads start."""
    link.__class__ = _Polled
