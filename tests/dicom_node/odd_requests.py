"""A-ASSOCIATE-RQs that no library writes, and what an acceptor says to them, byte by byte (PS3.8 section 9.3)."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from pydicom.uid import CTImageStorage
from raw_sender import EXPLICIT, IMPLICIT, Message, echo_message, store_message

CT = str(CTImageStorage)
VERIFICATION = "1.2.840.10008.1.1"
ASSOCIATE_AC, P_DATA, RELEASE_RP, ABORT = 2, 4, 6, 7
_WAIT_S = 60.0
_APPLICATION_CONTEXT = b"1.2.840.10008.3.1.1.1"


def item(kind: int, value: bytes) -> bytes:
    return struct.pack(">BxH", kind, len(value)) + value


def text(value: bytes | str) -> bytes:
    """Two bytes of length and the value, as the user items have it."""
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack(">H", len(raw)) + raw


def context(number: int, abstract: str | None = CT, transfer: Sequence[str] = (EXPLICIT, IMPLICIT)) -> bytes:
    """A presentation context; `abstract` None leaves that sub-item out."""
    syntaxes = b"".join(item(0x40, uid.encode()) for uid in transfer)
    return item(0x20, bytes((number, 0, 0, 0)) + (item(0x30, abstract.encode()) if abstract else b"") + syntaxes)


def identity(kind: int, primary: bytes, secondary: bytes = b"", *, asks: bool) -> bytes:
    """A user identity (PS3.7 table D.3-14)."""
    return item(0x58, bytes((kind, asks)) + text(primary) + text(secondary))


def roles(sop_class: str, scu: int, scp: int) -> bytes:
    """An SCP/SCU role selection (PS3.7 table D.3-9)."""
    return item(0x54, text(sop_class) + bytes((scu, scp)))


def extended(sop_class: str, information: bytes) -> bytes:
    """A SOP class extended negotiation (PS3.7 table D.3-11)."""
    return item(0x56, text(sop_class) + information)


def common_extended(sop_class: str, service: str, related: Sequence[str] = ()) -> bytes:
    """A SOP class common extended negotiation (PS3.7 table D.3-12)."""
    return item(0x57, text(sop_class) + text(service) + text(b"".join(map(text, related))))


def window(invoked: int, performed: int) -> bytes:
    """An asynchronous operations window (PS3.7 table D.3-7)."""
    return item(0x53, struct.pack(">HH", invoked, performed))


def request(*items: bytes, user: bytes = b"", max_pdu: int | None = 16384) -> bytes:
    """An A-ASSOCIATE-RQ of PACS to SYNPET with these items and user items; `max_pdu` None leaves that one out."""
    size = b"" if max_pdu is None else item(0x51, struct.pack(">L", max_pdu))
    body = struct.pack(">H2x16s16s32x", 1, b"SYNPET".ljust(16), b"PACS".ljust(16))
    body += item(0x10, _APPLICATION_CONTEXT) + b"".join(items) + item(0x50, size + item(0x52, b"1.2.3.4") + user)
    return pdu_of(body)


def without_user_information(*items: bytes) -> bytes:
    """An A-ASSOCIATE-RQ that ends with its presentation contexts."""
    whole = request(*items)
    return pdu_of(whole[6 : whole.rindex(item(0x50, item(0x51, struct.pack(">L", 16384)) + item(0x52, b"1.2.3.4")))])


def pdu_of(body: bytes) -> bytes:
    """An A-ASSOCIATE-RQ with its header."""
    return struct.pack(">BxL", 0x01, len(body)) + body


@dataclass
class Answer:
    """The PDU that came back: of an A-ASSOCIATE-AC the contexts' results and the user items by type."""

    kind: int
    results: dict[int, int] = field(default_factory=dict)
    syntaxes: dict[int, str] = field(default_factory=dict)
    user: dict[int, bytes] = field(default_factory=dict)


@dataclass
class Talk:
    """An association over a raw socket."""

    socket: socket.socket
    answer: Answer

    def exchange(self, message: Message, *, pdu: int = 0) -> int:
        """Send a message in PDUs of at most `pdu` bytes; the status that is answered (PS3.7 annex C)."""
        self.socket.sendall(message.in_pdus(pdu))
        kind, body = read_pdu(self.socket)
        assert kind == P_DATA
        at = body.index(b"\x00\x00\x00\x09\x02\x00\x00\x00")
        return int(struct.unpack_from("<H", body, at + 8)[0])

    def store(self, number: int, instance: str, data: bytes, *, pdu: int = 0) -> int:
        return self.exchange(store_message(number, 1, CT, instance, data), pdu=pdu)

    def echo(self, number: int) -> int:
        return self.exchange(echo_message(number, 2))

    def release(self) -> None:
        self.socket.sendall(b"\x05\x00\x00\x00\x00\x04\x00\x00\x00\x00")
        assert read_pdu(self.socket)[0] == RELEASE_RP


@contextlib.contextmanager
def talking(port: int, pdu: bytes) -> Iterator[Talk]:
    """Send an A-ASSOCIATE-RQ; what was answered, and the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=_WAIT_S) as connection:
        connection.sendall(pdu)
        kind, body = read_pdu(connection)
        yield Talk(connection, _accepted(body) if kind == ASSOCIATE_AC else Answer(kind))


def read_pdu(connection: socket.socket) -> tuple[int, bytes]:
    """Type and body of the next PDU; type 0 when the connection is closed without one."""
    header = _exactly(connection, 6)
    if len(header) < 6:
        return 0, b""
    kind, length = struct.unpack(">BxL", header)
    return kind, _exactly(connection, length)


def _exactly(connection: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length and (piece := connection.recv(length - len(data))):
        data += piece
    return data


def _accepted(body: bytes) -> Answer:
    answer = Answer(ASSOCIATE_AC)
    for kind, value in _items(body[68:]):
        if kind == 0x21:
            answer.results[value[0]] = value[2]
            answer.syntaxes[value[0]] = next(_items(value[4:]))[1].decode()
        elif kind == 0x50:
            answer.user.update(_items(value))
    return answer


def _items(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at < len(data):
        kind, length = struct.unpack_from(">BxH", data, at)
        yield kind, data[at + 4 : at + 4 + length]
        at += 4 + length
