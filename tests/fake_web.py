"""A scripted DICOMweb service on loopback: a real HTTP server that does what a test needs an archive to do wrong.

with FakeWeb(lambda posted: stored(posted.uids)) as web:
    send_series_web(files, web.service())
assert web.stored == {...}
"""

from __future__ import annotations

import json
import socket
import ssl
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from typing import Any, Literal
from urllib.parse import parse_qs, urlsplit

from pydicom import dcmread

from dicom_node.config import WebConfig


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the service answers. `cut`: it closes the connection instead; `silent`: it says nothing until it stops.

    `drip`: a byte every 20 ms of a header or of a body without length, 500 times.
    """

    status: int = 200
    body: bytes = b""
    media_type: str = "application/dicom+json"
    headers: Mapping[str, str] = field(default_factory=dict)
    cut: bool = False
    silent: bool = False
    drip: Literal["", "head", "body"] = ""


@dataclass(frozen=True, kw_only=True)
class Posted:
    """One STOW-RS request; `instances`: SOP Instance UID to the bytes of the part, in their order."""

    number: int  # 1, 2, ... of this service
    path: str
    headers: Mapping[str, str]
    length: int
    instances: Mapping[str, bytes]

    @property
    def uids(self) -> list[str]:
        return list(self.instances)


def stored(
    uids: Sequence[str],
    *,
    status: int = 200,
    failed: Mapping[str, int] | None = None,
    warned: Mapping[str, int] | None = None,
) -> Answer:
    """A Store Instances Response (PS3.18 annex I.2): `failed` and `warned` are UID to reason; the rest is stored."""
    failed, warned = failed or {}, warned or {}
    answer = {
        "00081198": _sequence([{**_uid(uid), "00081197": {"vr": "US", "Value": [why]}} for uid, why in failed.items()]),
        "00081199": _sequence(
            [
                {**_uid(uid), **({"00081196": {"vr": "US", "Value": [warned[uid]]}} if uid in warned else {})}
                for uid in uids
                if uid not in failed
            ]
        ),
    }
    return Answer(status=status, body=json.dumps(answer).encode())


def _sequence(items: list[dict[str, Any]]) -> dict[str, Any]:
    return {"vr": "SQ", "Value": items} if items else {"vr": "SQ"}


def _uid(uid: str) -> dict[str, Any]:
    return {"00081155": {"vr": "UI", "Value": [uid]}}


def store_everything(posted: Posted) -> Answer:
    return stored(posted.uids)


class FakeWeb:
    """The service. `answer` is asked for every POST, `found` for every GET: (path, query) to a list of data sets.

    Who posts more than `most_bytes` is answered 413 while still sending, as a proxy does. With `tls` it speaks https.
    The first `slow` requests are read at 0.3 MB/s.
    """

    def __init__(
        self,
        answer: Callable[[Posted], Answer] = store_everything,
        *,
        found: Callable[[str, Mapping[str, list[str]]], Any] = lambda _path, _query: [],
        most_bytes: int = 1 << 40,
        slow: int = 0,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.posts: list[Posted] = []
        self.gets: list[str] = []
        self.stored: set[str] = set()  # SOP Instance UIDs that an answer of status 200 followed on
        self._answer, self._found = answer, found
        self.lock = threading.Lock()
        self.stopped = threading.Event()
        self.most_bytes = most_bytes
        self._tls = tls
        self.slow = slow
        self._server = _Server(("127.0.0.1", 0), _handler(self))
        if slow:  # else the kernel would take megabytes at once
            self._server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)
        if tls is not None:  # the handshake is the handler's, in its own thread
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True, do_handshake_on_connect=False)
        self.port: int = self._server.server_address[1]

    def __enter__(self) -> FakeWeb:
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), name="fake-web")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def service(self, **changes: Any) -> WebConfig:
        """The keys of a destination that is this service."""
        url = f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}/dicom-web"
        return WebConfig(**{"url": url, "answer_timeout_s": 20.0, **changes})

    def answer_to(self, posted: Posted) -> Answer:
        answer = self._answer(posted)
        with self.lock:
            self.posts.append(posted)
            if answer.status == 200 and not answer.cut and not answer.silent:
                self.stored |= set(posted.uids)
        return answer

    def find(self, target: str) -> Answer:
        with self.lock:
            self.gets.append(target)
        parts = urlsplit(target)
        found = self._found(parts.path, parse_qs(parts.query))
        if isinstance(found, Answer):
            return found
        return Answer(body=json.dumps(found).encode()) if found else Answer(status=204)


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up, as one that does not trust our certificate, is not the server's trouble."""


def _handler(web: FakeWeb) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            if "Content-Length" not in self.headers:
                self._give(Answer(status=411))
                return
            length = int(self.headers["Content-Length"])
            if length > web.most_bytes:
                self._give(Answer(status=413))
                self.rfile.read(length)
                return
            raw = self._slowly(length) if web.slow else self.rfile.read(length)
            if len(raw) < length:  # who posted has given up
                self.close_connection = True
                return
            posted = Posted(
                number=len(web.posts) + 1,
                path=self.path,
                headers=dict(self.headers),
                length=len(raw),
                instances=_parts(raw, self.headers["Content-Type"]),
            )
            self._give(web.answer_to(posted))

        def _slowly(self, length: int) -> bytes:
            web.slow -= 1
            raw = b""
            while len(raw) < length and not web.stopped.wait(0.05):
                block = self.rfile.read(min(length - len(raw), 1 << 14))
                if not block:
                    break
                raw += block
            return raw

        def do_GET(self) -> None:
            self._give(web.find(self.path))

        def _give(self, answer: Answer) -> None:
            if answer.silent:
                web.stopped.wait(60)
            if answer.cut or answer.silent:
                self.close_connection = True
                return
            if answer.drip:
                self._drip(b"HTTP/1.1 200 OK\r\nX: " if answer.drip == "head" else b"HTTP/1.1 200 OK\r\n\r\n")
                return
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            if answer.status != 204:
                self.send_header("Content-Type", answer.media_type)
                self.send_header("Content-Length", str(len(answer.body)))
            self.end_headers()
            self.wfile.write(answer.body)

        def _drip(self, head: bytes) -> None:
            self.close_connection = True
            self.wfile.write(head)
            for _ in range(500):
                if web.stopped.wait(0.02):
                    return
                self.wfile.write(b" ")

        def log_message(self, format: str, *args: Any) -> None:
            """Silent."""

    return Handler


def _parts(raw: bytes, content_type: str) -> dict[str, bytes]:
    """The parts of multipart/related, split by hand: SOP Instance UID to bytes."""
    boundary = b"--" + content_type.partition("boundary=")[2].strip('"').encode()
    first, *parts, last = raw.split(boundary)
    assert (first, last) == (b"", b"--\r\n")
    found = {}
    for part in parts:
        head, _, body = part.partition(b"\r\n\r\n")
        assert head.strip() == b"Content-Type: application/dicom"
        assert body.endswith(b"\r\n")
        data = body[:-2]
        found[str(dcmread(BytesIO(data), specific_tags=["SOPInstanceUID"]).SOPInstanceUID)] = data
    return found
