"""The answer of an HTTP service, read whole, within a time and a size.

`requests` limits neither: its timeout is for one read, so that a service which drips a byte a minute is never given
up, and a body of any size, or one that unpacks to any size, is put into memory.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from typing import Any

from requests.adapters import HTTPAdapter
from urllib3 import HTTPConnectionPool, HTTPResponse, HTTPSConnectionPool
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import DecodeError

MOST_BYTES = 16_000_000  # unpacked; 10 000 failed items of a Store Instances Response are 2 MB
_BLOCK = 1 << 16


class AnswerError(Exception):
    """An answer came and cannot be taken. No OSError, which urllib3 would take for trouble of the connection."""


class AnswerTooLarge(AnswerError):
    """The body has more than MOST_BYTES."""


class AnswerBroken(AnswerError):
    """The body is not packed as its header says."""


class BoundedAdapter(HTTPAdapter):
    """For `Session.mount`: an answer is whole within the request's read timeout and MOST_BYTES, or an error.

    Raises `requests.ReadTimeout`, `AnswerTooLarge` and `AnswerBroken`; the connection is closed then.
    """

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = {"http": _Pool, "https": _TlsPool}


class _Bounded(HTTPConnection):
    def getresponse(self) -> HTTPResponse:  # type: ignore[override]  # as urllib3 itself
        with _cut_after(self.sock, self.timeout):
            return _read_whole(super().getresponse())


class _TlsBounded(_Bounded, HTTPSConnection):
    pass


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Bounded


class _TlsPool(HTTPSConnectionPool):
    ConnectionCls = _TlsBounded


@contextmanager
def _cut_after(link: socket.socket, seconds: float | None) -> Iterator[None]:
    """Shut the socket down when the block takes longer, which ends whatever read waits on it; TimeoutError then."""
    if seconds is None:
        yield
        return
    late = threading.Event()

    def cut() -> None:
        late.set()
        with suppress(OSError):  # it was closed in between
            socket.socket.shutdown(link, socket.SHUT_RDWR)  # not SSLSocket's, which takes TLS away from the reader

    timer = threading.Timer(seconds, cut)
    timer.daemon = True
    timer.start()
    try:
        yield
    except Exception as error:
        if late.is_set():
            raise TimeoutError("the answer took too long") from error
        raise
    finally:
        timer.cancel()
    if late.is_set():  # a body without a length ends with its connection
        raise TimeoutError("the answer took too long")


def _read_whole(response: HTTPResponse) -> HTTPResponse:
    """The same answer with its body, unpacked, in memory."""
    body = bytearray()
    try:
        while block := response.read(_BLOCK, decode_content=True):
            body += block
            if len(body) > MOST_BYTES:
                raise AnswerTooLarge
    except DecodeError as error:
        raise AnswerBroken from error
    headers = response.headers.copy()
    for name in ("Content-Encoding", "Content-Length", "Transfer-Encoding"):  # they are about what was on the wire
        headers.discard(name)
    return HTTPResponse(
        body=BytesIO(bytes(body)),
        headers=headers,
        status=response.status,
        version=response.version,
        reason=response.reason,
        preload_content=False,
        original_response=response._original_response,
    )
