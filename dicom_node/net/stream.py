"""The streaming reader of an association: PDUs with limits, and each C-STORE straight from the socket into its file.

pynetdicom negotiates and serves everything. This module replaces one function of it, the one that reads the next PDU
from the socket (in the association's reactor thread). It hands every PDU on as pynetdicom itself would have read
it, but for the P-DATA-TF PDUs of a plain C-STORE request: those never become objects. Their fragments go through
one reused buffer into the instance's file, and the response is packed by hand.

    PDU      type, reserved, length, PDV...              PS3.8 section 9.3.5, table 9-22
    PDV      length, context ID, control header, fragment   PS3.8 section 9.3.5.1 and annex E.2
    command  Implicit VR Little Endian                    PS3.7 section 6.3.1

Measured against pynetdicom's own reading in benchmarks/intake.py; `[intake].reader = "plain"` leaves it to that.
"""

from __future__ import annotations

import select
import socket
import ssl
import struct
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import structlog
from pynetdicom.association import Association

from dicom_node.config import Config
from dicom_node.net.peers import shown
from dicom_node.net.store import Announced, Answer, Arrival, Store, fault_of

log = structlog.get_logger(__name__)

_P_DATA, _RELEASE = 0x04, 0x05
_PDU_HEADER = struct.Struct(">BxL")
_PDV_HEADER = struct.Struct(">LBB")
_COMMAND, _LAST = 0x01, 0x02  # bits of the message control header (PS3.8 annex E.2)
_ESTABLISHED = "Sta6"  # PS3.8 table 9-6: data transfer
_CLOSED, _INVALID = "Evt17", "Evt19"  # PS3.8 table 9-10: connection closed; unrecognized or invalid PDU
_ABORT = b"\x07\x00\x00\x00\x00\x04\x00\x00\x02\x00"  # A-ABORT, source: service provider, reason not specified

_C_STORE_RQ, _C_STORE_RSP = 0x0001, 0x8001
_NO_DATA_SET = 0x0101
_MAX_COMMAND = 64 * 1024  # bytes; a C-STORE request has some 200
_MAX_NEGOTIATION = 1024 * 1024  # bytes of an A-ASSOCIATE-RQ: 128 contexts with every transfer syntax have 50 kB
_PDU_SLACK = 1024 * 1024  # a peer that exceeds our maximum a little is served: others serve it, too
_BUFFER = 256 * 1024
_TICK_S = 0.5  # how soon a blocked read sees that the association was ended from our side
_LINGER_S = 0.02  # how long we wait here for the next request before pynetdicom's loop polls again


class _Ended(Exception):
    """The connection is closed, by the peer or by us."""


class _Malformed(Exception):
    """What was read is no PDU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Request:
    """A C-STORE request (PS3.7 table 9.3-1) in the presentation context that it came in."""

    context_id: int
    message_id: int
    sop_class_uid: str
    sop_instance_uid: str
    context_class: str
    transfer_syntax: str


class PduReader:
    """Reads one association's PDUs; lives in its reactor thread. `token_of` is the association's name in the spool."""

    def __init__(self, assoc: Any, store: Store, token_of: Callable[[Association], str], config: Config) -> None:
        self._assoc = assoc
        self._dul = assoc.dul
        self._store = store
        self._token_of = token_of
        self._streams = config.intake.reader == "stream"
        self._max_pdu = (config.node.max_pdu or config.intake.max_instance_bytes) + _PDU_SLACK
        self._silence_s = config.node.network_timeout_s
        self._min_bytes_per_s = config.intake.min_bytes_per_s
        self._socket: socket.socket
        self._buffer = memoryview(bytearray(0))
        self._left = 0  # bytes of the PDU that are not read yet
        self.released = False  # the peer asked for release between two messages: it sent all that it wanted to send
        self._passing = False  # pynetdicom has the beginning of a message: it gets the rest
        self._started = self._heard = 0.0
        self._read = 0

    def take_over(self) -> None:
        """Replace pynetdicom's reader for this connection. Called before the association's threads start."""
        self._socket = self._dul.socket.socket
        if not isinstance(self._socket, ssl.SSLSocket):
            # a read wakes up for a look around; settimeout() would do it with one more system call for each read
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(_TICK_S))
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(self._silence_s))
        self._dul._read_pdu_data = self.read

    def read(self) -> None:
        """Read what is there: C-STORE requests to their end, anything else as one PDU for pynetdicom."""
        try:
            while self._read_one() and self._more_comes():
                pass
        except _Ended:
            if self._dul.socket.socket is not None:  # closing it tells the state machine
                self._dul.event_queue.put(_CLOSED)
        except _Malformed as error:
            log.warning("association.malformed_pdu", reason=str(error))
            self._dul.event_queue.put(_INVALID)
        except OSError as error:
            log.info("association.connection_lost", reason=error.strerror or type(error).__name__)
            self._dul.event_queue.put(_CLOSED)

    # ---- PDUs

    def _read_one(self) -> bool:
        """One message or one PDU; True when it is dealt with, False when pynetdicom has to act on it."""
        self._started = self._heard = time.monotonic()
        self._read = 0
        if self._left:  # the PDU that ended the last message has another one
            return self._message(bytearray(_PDU_HEADER.pack(_P_DATA, self._left)))
        header = self._exactly(_PDU_HEADER.size)
        kind, length = _PDU_HEADER.unpack(header)
        may_stream = self._streams and not self._passing and self._dul.state_machine.current_state == _ESTABLISHED
        if kind == _P_DATA and may_stream:
            self._left = length
            return self._message(bytearray(header))
        raw = self._rest_of_pdu(header, kind, length)
        self.released = kind == _RELEASE and not self._passing
        self._passing = self._passing and not _ends_data_set(raw)
        self._pass_on(raw)
        return False

    def _rest_of_pdu(self, header: bytes, kind: int, length: int) -> bytearray:
        if not 1 <= kind <= 7:
            raise _Malformed(f"PDU type 0x{kind:02X}")
        limit = self._max_pdu if kind == _P_DATA else _MAX_NEGOTIATION
        if length > limit:
            raise _Malformed(f"a PDU of type 0x{kind:02X} claims {length} bytes: at most {limit} are read")
        return bytearray(header) + self._exactly(length)

    def _pass_on(self, raw: bytearray) -> None:
        """Give pynetdicom a PDU, as its own reader would."""
        try:
            pdu, event = self._dul._decode_pdu(raw)
        except Exception as error:
            raise _Malformed(f"a PDU of type 0x{raw[0]:02X} that cannot be decoded") from error
        self._dul.event_queue.put(event)
        self._dul._recv_pdu.put(pdu)

    # ---- messages

    def _message(self, raw: bytearray) -> bool:
        """A message begins in the PDU whose header is read. `raw` collects what pynetdicom gets if it is not ours."""
        done: list[bytearray] = []  # whole PDUs before the one in `raw`
        command = bytearray()
        while True:
            if not self._left:
                done.append(raw)
                raw = bytearray(self._exactly(_PDU_HEADER.size))
                kind, self._left = _PDU_HEADER.unpack(raw)
                if kind != _P_DATA:
                    return self._not_ours([*done, self._rest_of_pdu(bytes(raw), kind, self._left)], data_set=False)
            header = self._exactly(_PDV_HEADER.size)
            context_id, control, length = self._pdv(header)
            raw += header
            if not control & _COMMAND:
                return self._not_ours([*done, self._rest_of(raw)], data_set=True)
            if len(command) + length > _MAX_COMMAND:
                raise _Malformed(f"a command set of more than {_MAX_COMMAND} bytes")
            fragment = self._exactly(length)
            self._left -= length
            raw += fragment
            command += fragment
            if control & _LAST:
                break
        elements = _elements(bytes(command))
        request = self._store_request(context_id, elements)
        if request is None:
            has_data_set = _number(elements, 0x0800) not in (None, _NO_DATA_SET)
            return self._not_ours([*done, self._rest_of(raw)], data_set=has_data_set)
        return self._receive(request)

    def _not_ours(self, pdus: list[bytearray], *, data_set: bool) -> bool:
        """Give pynetdicom the beginning of a message; with a `data_set` it gets that, too, to its end."""
        self._passing = data_set and not _ends_data_set(pdus[-1])
        for raw in pdus:
            self._pass_on(raw)
        return False

    def _rest_of(self, raw: bytearray) -> bytearray:
        """The PDU in `raw` with what is left of it."""
        if self._left > self._max_pdu:
            raise _Malformed(f"a P-DATA-TF PDU claims {self._left} bytes more: at most {self._max_pdu} are read")
        raw += self._exactly(self._left)
        self._left = 0
        return raw

    def _store_request(self, context_id: int, elements: Mapping[int, bytes]) -> _Request | None:
        """The request, if it is a C-STORE that we can read to its end; None leaves it to pynetdicom."""
        context = next((c for c in self._assoc.accepted_contexts if c.context_id == context_id), None)
        if context is None or _number(elements, 0x0100) != _C_STORE_RQ:
            return None
        message_id, data_set = _number(elements, 0x0110), _number(elements, 0x0800)
        if message_id is None or data_set is None or data_set == _NO_DATA_SET:
            return None
        request = _Request(
            context_id=context_id,
            message_id=message_id,
            sop_class_uid=_text(elements, 0x0002),
            sop_instance_uid=_text(elements, 0x1000),
            context_class=str(context.abstract_syntax),
            transfer_syntax=str(context.transfer_syntax[0]),
        )
        fault = fault_of(
            sop_class_uid=request.sop_class_uid,
            sop_instance_uid=request.sop_instance_uid,
            context_class=request.context_class,
        )
        return None if fault else request

    def _receive(self, request: _Request) -> bool:
        """The data set of a request into its file, and the response."""
        announced = Announced(
            sop_class_uid=request.context_class,
            sop_instance_uid=request.sop_instance_uid,
            transfer_syntax=request.transfer_syntax,
        )
        if not len(self._buffer):
            self._buffer = memoryview(bytearray(_BUFFER))
        assoc = self._assoc
        arrival = self._store.arrival(self._token_of(assoc), str(assoc.requestor.ae_title), announced)
        try:
            interrupted = self._data_set(request.context_id, arrival)
            if interrupted is not None:
                self._pass_on(interrupted)
                return False
            answer = arrival.end()
        finally:
            arrival.abandon()
        self._socket.sendall(store_response(request, answer))
        return True

    def _data_set(self, context_id: int, arrival: Arrival) -> bytearray | None:
        """The fragments of a data set, to the last; or the PDU of another kind that came in between."""
        control = 0
        while not control & _LAST:
            if not self._left:
                header = self._exactly(_PDU_HEADER.size)
                kind, self._left = _PDU_HEADER.unpack(header)
                if kind != _P_DATA:
                    return self._rest_of_pdu(header, kind, self._left)
                continue
            found, control, length = self._pdv(self._exactly(_PDV_HEADER.size))
            if control & _COMMAND or found != context_id:
                raise _Malformed("a fragment of another message inside a data set")
            self._left -= length
            while length:
                count = self._into(self._buffer[: min(length, len(self._buffer))])
                arrival.write(self._buffer[:count])
                length -= count
        return None

    def _pdv(self, header: bytes) -> tuple[int, int, int]:
        """(context ID, message control header, length of the fragment); the PDV's header is off the PDU."""
        length, context_id, control = _PDV_HEADER.unpack(header)
        if length < 2 or length + 4 > self._left:
            raise _Malformed(f"a PDV of {length} bytes in a PDU with {self._left} left")
        self._left -= _PDV_HEADER.size
        return context_id, control, length - 2

    # ---- bytes

    def _more_comes(self) -> bool:
        """Whether the next request begins at once; after a pause pynetdicom's own loop looks for it."""
        if self._left:
            return True
        self._dul._idle_timer.restart()
        if self._ended_here() or self._dul.to_provider_queue.qsize():
            return False
        pending = isinstance(self._socket, ssl.SSLSocket) and self._socket.pending()
        return bool(pending or select.select([self._socket], [], [], _LINGER_S)[0])

    def _exactly(self, length: int) -> bytes:
        """The next bytes, all of them."""
        if length <= len(self._buffer):
            view = self._buffer[:length]
        else:
            view = memoryview(bytearray(min(length, _MAX_COMMAND)))
        pieces = bytearray()
        while len(pieces) < length:
            count = self._into(view[: min(len(view), length - len(pieces))])
            pieces += view[:count]
        return bytes(pieces)

    def _into(self, view: memoryview) -> int:
        """Read into `view`, as much as comes without a pause; how many bytes. Raises `_Ended`."""
        while True:
            try:
                count = self._some(view)
            except (BlockingIOError, InterruptedError):
                count = -1
            now = time.monotonic()
            if count > 0:
                self._heard = now
                self._read += count
            elif count == 0:
                raise _Ended
            self._check_pace(now)
            if count > 0:
                return count

    def _some(self, view: memoryview) -> int:
        sock = self._socket
        if isinstance(sock, ssl.SSLSocket):
            if not sock.pending() and not select.select([sock], [], [], _TICK_S)[0]:
                raise BlockingIOError
            return sock.recv_into(view)
        return sock.recv_into(view, len(view), socket.MSG_WAITALL)

    def _check_pace(self, now: float) -> None:
        if self._ended_here():
            raise _Ended
        spent = now - self._started
        too_slow = spent > self._silence_s and self._read < self._min_bytes_per_s * spent
        if now - self._heard > self._silence_s or too_slow:
            self._hang_up("a sender that is too slow" if too_slow else "a sender that fell silent in a message")
            raise _Ended

    def _ended_here(self) -> bool:
        """Whether our side ended the association while this thread was reading."""
        return bool(self._dul._kill_thread or self._assoc._kill)

    def _hang_up(self, reason: str) -> None:
        caller = shown(str(self._assoc.requestor.ae_title))
        log.warning("association.hung_up", calling_ae=caller, reason=reason, bytes=self._read)
        if (repeated := self._store.repeats("slow_sender", caller)) is not None:
            self._store.note("slow_sender", f"{caller}: {reason}: aborted", {"repeated": repeated})
        try:
            self._socket.sendall(_ABORT)
        except OSError as error:
            log.info("association.abort_not_sent", reason=error.strerror or type(error).__name__)
        self._dul.socket.close()


def store_response(request: _Request, answer: Answer) -> bytes:
    """The P-DATA-TF PDU of a C-STORE response (PS3.7 section 9.3.1.2), byte for byte as pynetdicom encodes it."""
    elements = [
        _element(0x0002, _padded(request.sop_class_uid, b"\0")),
        _element(0x0100, struct.pack("<H", _C_STORE_RSP)),
        _element(0x0120, struct.pack("<H", request.message_id)),
        _element(0x0800, struct.pack("<H", _NO_DATA_SET)),
        _element(0x0900, struct.pack("<H", answer.status)),
    ]
    if answer.comment:
        elements.append(_element(0x0902, _padded(answer.comment, b" ")))
    elements.append(_element(0x1000, _padded(request.sop_instance_uid, b"\0")))
    body = b"".join(elements)
    command = _element(0x0000, struct.pack("<L", len(body))) + body
    pdv = _PDV_HEADER.pack(len(command) + 2, request.context_id, _COMMAND | _LAST) + command
    return _PDU_HEADER.pack(_P_DATA, len(pdv)) + pdv


def _element(number: int, value: bytes) -> bytes:
    """An element of group 0000, Implicit VR Little Endian."""
    return struct.pack("<HHL", 0x0000, number, len(value)) + value


def _padded(text: str, padding: bytes) -> bytes:
    raw = text.encode("ascii")
    return raw + padding * (len(raw) % 2)


def _elements(command: bytes) -> dict[int, bytes]:
    """The elements of group 0000 by number; empty where this is no command set."""
    elements, at = {}, 0
    while at + 8 <= len(command):
        group, number, length = struct.unpack_from("<HHL", command, at)
        at += 8 + length
        if group != 0x0000 or at > len(command):
            return {}
        elements[number] = command[at - length : at]
    return elements if at == len(command) else {}


def _number(elements: Mapping[int, bytes], number: int) -> int | None:
    value = elements.get(number, b"")
    return int.from_bytes(value, "little") if len(value) == 2 else None


def _text(elements: Mapping[int, bytes], number: int) -> str:
    return elements.get(number, b"").decode("latin-1").rstrip("\0 ")


def _ends_data_set(raw: bytearray) -> bool:
    """Whether this P-DATA-TF PDU has the last fragment of a data set."""
    at = _PDU_HEADER.size
    while raw[0] == _P_DATA and at + _PDV_HEADER.size <= len(raw):
        length, _, control = _PDV_HEADER.unpack_from(raw, at)
        if control & _LAST and not control & _COMMAND:
            return True
        at += 4 + max(length, 2)
    return False


def _timeval(seconds: float) -> bytes:
    """A `struct timeval` of this machine."""
    return struct.pack("ll", int(seconds), int(seconds % 1 * 1_000_000))
