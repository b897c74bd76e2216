"""A storage SCP of bare sockets that a test scripts message by message: it answers well, badly, or not at all.

    def refuse(peer: RawPeer) -> None:
        peer.answer(peer.message(), status=0xC000)

    with RawScp(refuse, max_pdu=4096) as scp:
        send_series(files, scp.peer(), calling_ae="SYNPET")
    assert scp.messages[0].data_set == ...

The script runs once, on the first association; then every further message is answered with Success until the end.
"""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom.pdu import A_ASSOCIATE_RQ

from dicom_node.config import PeerConfig

ABORT = b"\x07\x00\x00\x00\x00\x04\x00\x00\x00\x00"
RELEASE_RQ = b"\x05\x00\x00\x00\x00\x04\x00\x00\x00\x00"
_RELEASE_RP = b"\x06\x00\x00\x00\x00\x04\x00\x00\x00\x00"
_P_DATA, _RELEASE, _ABORT = 0x04, 0x05, 0x07
_JOIN_S = 60.0  # only a test that fails waits so long


class Ended(Exception):
    """The sender ended the association or the connection."""


@dataclass
class Message:
    """One C-STORE request as it came."""

    context_id: int
    command: bytes = b""
    data_set: bytes = b""
    pdu_lengths: list[int] = field(default_factory=list)

    def element(self, number: int) -> bytes:
        at = 0
        while at < len(self.command):
            _, found, length = struct.unpack_from("<HHL", self.command, at)
            if found == number:
                return self.command[at + 8 : at + 8 + length]
            at += 8 + length
        raise KeyError(number)

    @property
    def message_id(self) -> int:
        return int.from_bytes(self.element(0x0110), "little")

    @property
    def sop_instance_uid(self) -> str:
        return self.element(0x1000).decode().rstrip("\0")


class RawPeer:
    """The accepted connection, after negotiation."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.messages: list[Message] = []
        self.saw_abort = self.saw_release = False

    def exactly(self, count: int) -> bytes:
        got = b""
        while len(got) < count:
            piece = self.socket.recv(count - len(got))
            if not piece:
                raise Ended
            got += piece
        return got

    def pdu(self) -> tuple[int, bytes]:
        kind, length = struct.unpack(">BxL", self.exactly(6))
        return kind, self.exactly(length)

    def message(self) -> Message:
        """The next request with its data set. Raises `Ended`."""
        message, done = Message(0), False
        while not done:
            kind, body = self.pdu()
            self.saw_abort, self.saw_release = self.saw_abort or kind == _ABORT, self.saw_release or kind == _RELEASE
            if kind == _RELEASE:
                self.socket.sendall(_RELEASE_RP)
            if kind != _P_DATA:
                raise Ended
            message.pdu_lengths.append(len(body))
            at = 0
            while at < len(body):
                length, message.context_id, control = struct.unpack_from(">LBB", body, at)
                fragment = body[at + 6 : at + 4 + length]
                if control & 1:
                    message.command += fragment
                else:
                    message.data_set += fragment
                    done = bool(control & 2)
                at += 4 + length
        self.messages.append(message)
        return message

    def answer(self, message: Message, *, status: int = 0x0000, message_id: int | None = None) -> None:
        self.socket.sendall(pdu([(message.context_id, 3, response(message, status, message_id))]))

    def serve(self) -> None:
        """Success to everything, to the end."""
        while True:
            self.answer(self.message())


def response(message: Message, status: int = 0x0000, message_id: int | None = None) -> bytes:
    """The command set of a C-STORE response."""
    answered = message.message_id if message_id is None else message_id
    body = b"".join(
        struct.pack("<HHL", 0, number, len(value)) + value
        for number, value in (
            (0x0002, message.element(0x0002)),
            (0x0100, struct.pack("<H", 0x8001)),
            (0x0120, struct.pack("<H", answered)),
            (0x0800, struct.pack("<H", 0x0101)),
            (0x0900, struct.pack("<H", status)),
            (0x1000, message.element(0x1000)),
        )
    )
    return struct.pack("<HHLL", 0, 0, 4, len(body)) + body


def pdu(pdvs: Sequence[tuple[int, int, bytes]]) -> bytes:
    """A P-DATA-TF PDU of these (context ID, control header, fragment)."""
    body = b"".join(struct.pack(">LBB", len(part) + 2, context, control) + part for context, control, part in pdvs)
    return struct.pack(">BxL", _P_DATA, len(body)) + body


class RawScp:
    """The server. `syntaxes`: what it accepts; `max_pdu`: what it says that it takes, 0 for anything."""

    def __init__(
        self,
        script: Callable[[RawPeer], None] = RawPeer.serve,
        *,
        max_pdu: int = 131072,
        syntaxes: Sequence[str] = (ExplicitVRLittleEndian, ImplicitVRLittleEndian),
    ) -> None:
        self._script, self._max_pdu, self._syntaxes = script, max_pdu, set(syntaxes)
        self._peer: RawPeer | None = None

    def __enter__(self) -> RawScp:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._listening.settimeout(_JOIN_S)
        self._thread = threading.Thread(target=self._run, name="raw-scp")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join(_JOIN_S)
        self._listening.close()
        assert not self._thread.is_alive()

    def peer(self) -> PeerConfig:
        return PeerConfig(name="pacs", ae_title="PACS", port=self._listening.getsockname()[1])

    @property
    def messages(self) -> list[Message]:
        return self.seen.messages

    @property
    def seen(self) -> RawPeer:
        assert self._peer is not None
        return self._peer

    def _run(self) -> None:
        connection, _ = self._listening.accept()
        with connection:
            connection.settimeout(_JOIN_S)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._peer = peer = RawPeer(connection)
            try:
                self._negotiate(peer)
                self._script(peer)
                peer.serve()
            except (Ended, OSError):
                pass

    def _negotiate(self, peer: RawPeer) -> None:
        """Answer the A-ASSOCIATE-RQ (PS3.8 section 9.3.3): contexts that have a syntax of ours."""
        head = peer.exactly(6)
        body = peer.exactly(struct.unpack(">BxL", head)[1])
        request = A_ASSOCIATE_RQ()
        request.decode(head + body)
        items = _item(0x10, b"1.2.840.10008.3.1.1.1")
        for context in request.presentation_context:
            syntax = next((s for s in context.transfer_syntax if s in self._syntaxes), None)
            result = 0 if syntax else 4
            named = _item(0x40, str(syntax or ImplicitVRLittleEndian).encode())
            items += _item(0x21, bytes([context.presentation_context_id, 0, result, 0]) + named)
        items += _item(0x50, _item(0x51, struct.pack(">L", self._max_pdu)) + _item(0x52, b"1.2.3.4"))
        answer = b"\x00\x01\x00\x00" + body[4:68] + items
        peer.socket.sendall(b"\x02\x00" + struct.pack(">L", len(answer)) + answer)


def _item(kind: int, value: bytes) -> bytes:
    return struct.pack(">BxH", kind, len(value)) + value
