"""A sender that writes its own PDUs, byte by byte: every fragmentation, and whatever no library would send.

with RawSender(port, [CT]) as sender:
    sender.write(store_message(1, 7, CT, "1.2.3", data).in_pdus(10))
    sender.pdu()  # the response
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import TracebackType

EXPLICIT = "1.2.840.10008.1.2.1"
IMPLICIT = "1.2.840.10008.1.2"
_APPLICATION_CONTEXT = "1.2.840.10008.3.1.1.1"
_WAIT_S = 60.0

RELEASE_RQ = b"\x05\x00\x00\x00\x00\x04\x00\x00\x00\x00"
RELEASE_RP = b"\x06\x00\x00\x00\x00\x04\x00\x00\x00\x00"
ABORT = b"\x07\x00\x00\x00\x00\x04\x00\x00\x00\x00"


def _item(kind: int, body: bytes) -> bytes:
    return struct.pack(">BxH", kind, len(body)) + body


def associate_request(
    contexts: Sequence[str], *, calling_ae: str = "PACS", called_ae: str = "SYNPET", max_pdu: int = 16384
) -> bytes:
    """An A-ASSOCIATE-RQ (PS3.8 table 9-11) with contexts 1, 3, 5 ... in Explicit VR Little Endian."""
    items = _item(0x10, _APPLICATION_CONTEXT.encode())
    for index, abstract in enumerate(contexts):
        syntaxes = _item(0x30, abstract.encode()) + _item(0x40, EXPLICIT.encode())
        items += _item(0x20, bytes((2 * index + 1, 0, 0, 0)) + syntaxes)
    items += _item(0x50, _item(0x51, struct.pack(">L", max_pdu)) + _item(0x52, b"1.2.3.4"))
    body = struct.pack(">H2x", 1) + called_ae.ljust(16).encode() + calling_ae.ljust(16).encode() + bytes(32) + items
    return struct.pack(">BxL", 0x01, len(body)) + body


def command(**elements: tuple[int, bytes]) -> bytes:
    """A command set of (element number, value) in any order, with its group length."""
    body = b"".join(struct.pack("<HHL", 0, number, len(raw)) + raw for number, raw in sorted(elements.values()))
    return struct.pack("<HHLL", 0, 0, 4, len(body)) + body


def uid(text: str) -> bytes:
    raw = text.encode("latin-1")
    return raw + b"\0" * (len(raw) % 2)


def us(value: int) -> bytes:
    return struct.pack("<H", value)


@dataclass(frozen=True)
class Message:
    """A DIMSE message in a presentation context."""

    context_id: int
    command: bytes
    data: bytes | None = None

    def pdvs(self, cuts: Sequence[int] = (), data_cuts: Sequence[int] = ()) -> list[bytes]:
        """Its PDVs, command and data set cut at these places (twice the same: an empty fragment)."""
        pdvs = list(_cut(self.context_id, 1, self.command, cuts))
        return pdvs if self.data is None else [*pdvs, *_cut(self.context_id, 0, self.data, data_cuts)]

    def in_pdus(self, size: int = 0) -> bytes:
        """Its bytes on the wire, in PDUs of at most `size` bytes behind their header (0: command, data set)."""
        step = max(size - 6, 1)
        cuts, data = range(step, len(self.command), step), self.data or b""
        pdvs = self.pdvs(cuts, range(step, len(data), step)) if size else self.pdvs()
        return b"".join(p_data(pdv) for pdv in pdvs)


def _cut(context_id: int, kind: int, raw: bytes, cuts: Sequence[int]) -> Iterator[bytes]:
    places = [0, *sorted(cuts), len(raw)]
    for index, (begin, end) in enumerate(pairwise(places)):
        control = kind | (2 if index == len(places) - 2 else 0)
        yield struct.pack(">LBB", end - begin + 2, context_id, control) + raw[begin:end]


def p_data(*pdvs: bytes) -> bytes:
    """A P-DATA-TF PDU."""
    body = b"".join(pdvs)
    return struct.pack(">BxL", 0x04, len(body)) + body


def store_message(
    context_id: int, message_id: int, sop_class: str, instance: str, data: bytes | None, *, flag: int | None = None
) -> Message:
    """A C-STORE request (PS3.7 table 9.3-1)."""
    data_set_type = (0x0101 if data is None else 0x0001) if flag is None else flag
    packed = command(
        sop_class=(0x0002, uid(sop_class)),
        field=(0x0100, us(0x0001)),
        message=(0x0110, us(message_id)),
        priority=(0x0700, us(0)),
        data_set=(0x0800, us(data_set_type)),
        instance=(0x1000, uid(instance)),
    )
    return Message(context_id, packed, data)


def echo_message(context_id: int, message_id: int) -> Message:
    """A C-ECHO request (PS3.7 table 9.3-12)."""
    packed = command(
        sop_class=(0x0002, uid("1.2.840.10008.1.1")),
        field=(0x0100, us(0x0030)),
        message=(0x0110, us(message_id)),
        data_set=(0x0800, us(0x0101)),
    )
    return Message(context_id, packed)


class RawSender:
    """A socket that asked for an association; `answer` is the PDU that came back."""

    def __init__(
        self,
        port: int,
        contexts: Sequence[str],
        *,
        max_pdu: int = 16384,
        calling_ae: str = "PACS",
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=_WAIT_S)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if tls is not None:
            self.socket = tls.wrap_socket(self.socket, server_hostname="127.0.0.1")
        self.write(associate_request(contexts, max_pdu=max_pdu, calling_ae=calling_ae))
        self.answer = self.pdu()
        assert self.answer[:1] == b"\x02", self.answer

    def __enter__(self) -> RawSender:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self.socket.close()

    def write(self, raw: bytes) -> None:
        self.socket.sendall(raw)

    def write_in_pieces(self, raw: bytes, places: Sequence[int]) -> None:
        """Each piece in a segment of its own, as far as the network leaves it so."""
        bounds = [0, *sorted(min(place, len(raw)) for place in places), len(raw)]
        for begin, end in pairwise(bounds):
            if end > begin:
                self.socket.sendall(raw[begin:end])

    def pdu(self) -> bytes:
        """The next PDU; empty when the connection is closed."""
        header = self._read(6)
        return header + self._read(struct.unpack(">L", header[2:])[0]) if len(header) == 6 else b""

    def _read(self, length: int) -> bytes:
        raw = b""
        with contextlib.suppress(ConnectionError):
            while len(raw) < length and (piece := self.socket.recv(length - len(raw))):
                raw += piece
        return raw

    def release(self) -> None:
        """Release, and wait until the other side agrees."""
        self.write(RELEASE_RQ)
        answer = self.pdu()
        assert answer == RELEASE_RP, answer
        self.close()


def status_of(response: bytes) -> int:
    """The status of a response in one PDU."""
    at = 12
    while at < len(response):
        _, number, length = struct.unpack_from("<HHL", response, at)
        if number == 0x0900:
            return int(struct.unpack_from("<H", response, at + 8)[0])
        at += 8 + length
    raise AssertionError("no status")
