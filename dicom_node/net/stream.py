"""The streaming reader of an association: PDUs with limits, and each C-STORE straight from the socket into its file.

pynetdicom negotiates and serves everything. This module replaces one function of it, the one that reads the next PDU
from the socket (in the association's reactor thread). It hands every PDU on as pynetdicom itself would have read
it, but for the P-DATA-TF PDUs of a C-STORE request: those never become objects. Their fragments go through one
reused buffer into the instance's file, and the response is packed by hand.

Measured against pynetdicom's own reading in benchmarks/intake.py; `[intake].reader = "plain"` leaves it to that, with
the same limits.
"""

from __future__ import annotations

import socket
import ssl
import struct
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import structlog
from pynetdicom.association import Association

from dicom_node.config import Config
from dicom_node.net import command as cmd
from dicom_node.net import readable
from dicom_node.net.command import Malformed
from dicom_node.net.negotiation import ASSOCIATE_RQ, readable_request
from dicom_node.net.pace import Pace, TooSlow, sleep_unless
from dicom_node.net.passing import SMALL, Passing, checked, few, grown, hand_over, has_data_set, packed, text_of
from dicom_node.net.peers import plain_address, shown
from dicom_node.net.scp import is_storage_class
from dicom_node.net.store import (
    PLACEHOLDER_UID,
    Announced,
    Answer,
    Arrival,
    Store,
    fault_of,
    names_instance,
)
from dicom_node.net.thinning import without_numbers
from dicom_node.net.wrong_port import began_tls, tls_on_plain_port

log = structlog.get_logger(__name__)

_ESTABLISHED, _CLOSING = "Sta6", "Sta13"  # PS3.8 table 9-6: data transfer; waiting for the peer to close
_AWAIT_REQUEST = ("Sta1", "Sta2")  # connected
_CLOSED, _INVALID = "Evt17", "Evt19"  # PS3.8 table 9-10: connection closed; unrecognized or invalid PDU
_ABORT = b"\x07\x00\x00\x00\x00\x04\x00\x00\x02\x00"  # A-ABORT, source: service provider, reason not specified

_MAX_NEGOTIATION = 1024 * 1024  # bytes of an A-ASSOCIATE-RQ: 128 contexts with every transfer syntax have 50 kB
_MAX_PASSED = 16 * 1024 * 1024  # bytes of a message that pynetdicom gets: a report on 5,000 instances has 1 MB
_MAX_DRAINED = 16 * 1024 * 1024  # bytes that a peer may still send after an A-ABORT before we close
_MAX_COLLECTED = 16 * 1024 * 1024  # bytes of a PDU that the plain reader collects: the largest that `max_pdu` may name
_SLACK = 1024 * 1024  # a peer that exceeds a maximum a little is served: others serve it, too
_BUFFER = 256 * 1024
_AHEAD = cmd.PDU_HEADER.size + cmd.PDV_HEADER.size  # what follows a fragment that ends its PDU and is not the last
_CHUNK = 64 * 1024  # what is read at once of anything else
_TICK_S = 0.5  # how soon a blocked read sees that the association was ended from our side
_LINGER_S = 0.02  # how long we wait here for the next request before pynetdicom's loop polls again


_FREE: deque[memoryview] = deque()  # buffers of instances that are done: pynetdicom's objects are long in going


class _Closed(Exception):
    """The peer closed the connection."""


class _EndedHere(Exception):
    """Our side ended the association while this thread was reading."""


class _Interrupted(Exception):
    """A PDU of another kind came in the middle of a message."""

    def __init__(self, pdu: bytes) -> None:
        super().__init__()
        self.pdu = pdu


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """A C-STORE request (PS3.7 table 9.3-1) in the presentation context that it came in.

    The UIDs are fit for a response: what was no UID is `PLACEHOLDER_UID`, and `fault` says so.
    """

    context_id: int
    message_id: int
    sop_class_uid: str  # the context's
    sop_instance_uid: str
    transfer_syntax: str
    fault: str = ""


class PduReader:
    """Reads one association's PDUs; lives in its reactor thread. `token_of` is the association's name in the spool."""

    def __init__(self, assoc: Any, store: Store, token_of: Callable[[Association], str], config: Config) -> None:
        node, intake = config.node, config.intake
        self._config = config
        self._assoc = assoc
        self._dul = assoc.dul
        self._store = store
        self._token_of = token_of
        self._streams = intake.reader == "stream"
        self._max_pdu = (announced_pdu(config) or intake.max_instance_bytes) + _SLACK
        self._passing = Passing(intake.max_instance_bytes + _SLACK, self._context_for)
        self._send_s = node.network_timeout_s
        self._pace = Pace(silence_s=node.network_timeout_s, min_bytes_per_s=intake.min_bytes_per_s)
        self._max_bytes_per_s = intake.max_bytes_per_s
        self._socket: socket.socket
        self._left = 0  # bytes of the PDU that are not read yet
        self._small = 0  # fragments of this message that had next to nothing
        self._ahead = b""  # inside a data set: the next headers, which came with the fragment before
        self._drained = 0
        self._stopped = False
        self._malformed = False  # what follows is no PDU, also before the state machine knows
        self._holds_reactor = False
        self.heard_at = 0.0  # when the last message began, in monotonic seconds
        self.released = False  # the peer asked for release between two messages: it sent all that it wanted to send

    def take_over(self) -> None:
        """Replace pynetdicom's reader for this connection. Called before the association's threads start."""
        self._socket = self._dul.socket.socket
        if isinstance(self._socket, ssl.SSLSocket):
            self._socket.settimeout(self._send_s)
        else:
            # a read wakes up for a look around; settimeout() would do it with one more system call for each read
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(_TICK_S))
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(self._send_s))
        readable.install(self._dul.socket)
        self._dul._read_pdu_data = self.read
        self._dul.socket._shutdown_socket = self._shut_down

    def stop(self) -> None:
        """End the association from our side; may be called from any thread.

        The reader wakes up and sends the A-ABORT itself: pynetdicom's abort closes the socket while it still reads.
        """
        self._stopped = True
        with suppress(OSError):
            socket.socket.shutdown(self._socket, socket.SHUT_RD)  # of SSLSocket it would end the writing, too

    def read(self) -> None:
        """Read what is there: C-STORE requests to their end, anything else as one PDU for pynetdicom."""
        awaits_request = self._dul.state_machine.current_state in _AWAIT_REQUEST
        try:
            if self._malformed or self._dul.state_machine.current_state == _CLOSING:
                self._drain()
                return
            while self._read_one() and self._more_comes():
                pass
            awaits_request = False
        except _Closed:
            self._dul.event_queue.put(_CLOSED)
        except _EndedHere:
            if self._stopped:
                self._abort()
            elif not self._dul.to_provider_queue.qsize():  # else: an A-ABORT of ours, which pynetdicom sends now
                self._dul.event_queue.put(_CLOSED)
        except TooSlow as error:
            self._tell("slow_sender", str(error))
            self._abort()
        except Malformed as error:
            self._tell("malformed_pdu", str(error))
            self._left, self._malformed = 0, True
            self._dul.event_queue.put(_INVALID)
        except (OSError, ValueError) as error:  # ValueError: another thread closed the socket
            log.info("association.connection_lost", reason=getattr(error, "strerror", "") or type(error).__name__)
            self._dul.event_queue.put(_CLOSED)
        finally:
            self._ahead = b""
            if self._holds_reactor:  # else another thread may: it waits for an answer to a report of ours
                self._holds_reactor = False
                self._assoc._reactor_checkpoint.set()
            if awaits_request:  # and none comes: pynetdicom's other thread would wait as long as the ACSE time-out
                self._dul.to_user_queue.put(None)

    # ---- PDUs

    def _read_one(self) -> bool:
        """One message or one PDU; True when it is dealt with, False when pynetdicom has to act on it."""
        self._pace.begin()
        self.heard_at = time.monotonic()
        if not self._left:  # else the PDU that ended the last message has another one
            header, kind, length = self._pdu_header()
            state = self._dul.state_machine.current_state
            if kind != cmd.P_DATA or not self._streams or state != _ESTABLISHED:
                pdu = header + self._exactly(length)
                self.released = kind == cmd.RELEASE and not self._passing.inside
                if kind == cmd.P_DATA:
                    pdu = self._passing.look(pdu)
                self._pass_on(pdu)
                return False
            self._left = length
            if not length:
                return True  # a PDU without a PDV says nothing
        try:
            return self._message()
        except _Interrupted as other:
            self._pass_on(other.pdu)
            return False

    def _pdu_header(self) -> tuple[bytes, int, int]:
        """(bytes, type, length) of the next PDU."""
        header = self._exactly(cmd.PDU_HEADER.size)
        kind, length = cmd.PDU_HEADER.unpack(header)
        if began_tls(header) and not isinstance(self._socket, ssl.SSLSocket):
            raise Malformed(tls_on_plain_port(self._config))
        if not 1 <= kind <= 7:
            raise Malformed(f"PDU type 0x{kind:02X}")
        if length > _MAX_NEGOTIATION and length > (limit := self._most(kind)):
            raise Malformed(f"a PDU of type 0x{kind:02X} claims {length} bytes: at most {limit} are read")
        return header, kind, length

    def _most(self, kind: int) -> int:
        """Bytes of a PDU of this type that are read: nobody sends much before we let it in."""
        let_in = self._dul.state_machine.current_state == _ESTABLISHED
        return self._max_pdu if kind == cmd.P_DATA and let_in else _MAX_NEGOTIATION

    def _pass_on(self, raw: bytes) -> None:
        """Give pynetdicom a PDU, as its own reader would, or an association request that it can read."""
        hand_over(self._dul, readable_request(raw) if raw[0] == ASSOCIATE_RQ else raw)

    # ---- messages

    def _message(self) -> bool:
        """A message begins in the PDU whose header is read."""
        command, control = bytearray(), 0
        first = self._small = 0
        while not control & cmd.LAST:
            context_id, control, length = self._next_pdv()
            first = first or context_id
            if not control & cmd.COMMAND or context_id != first:
                raise Malformed("a fragment of a data set, or of another context, inside a command set")
            grown(command, length)
            command += self._exactly(length)
            self._left -= length
        elements = checked(bytes(command))
        request = self._store_request(first, elements)
        if request is not None:
            self._receive(request)
            return True
        # one PDU, a fragment for each set, nothing of the next message: pynetdicom makes objects of each fragment
        parts = [(first, cmd.COMMAND | cmd.LAST, bytes(command))]
        if has_data_set(elements):
            parts.append((first, cmd.LAST, self._collected(first)))
        self._pass_on(packed(parts))
        return False

    def _collected(self, context_id: int) -> bytes:
        """The data set of a message that is not ours."""
        data, control = bytearray(), 0
        while not control & cmd.LAST:
            control, length = self._next_data(context_id)
            if len(data) + length > _MAX_PASSED:
                raise Malformed(f"a message of more than {_MAX_PASSED} bytes that is no C-STORE")
            data += self._exactly(length)
            self._left -= length
        return bytes(data)

    def _store_request(self, context_id: int, elements: Mapping[int, bytes]) -> Request | None:
        """The request, if it is a C-STORE that we can read to its end; None leaves it to pynetdicom."""
        context = self._context_for(context_id, elements)
        message_id = cmd.number_of(elements, cmd.MESSAGE_ID)
        is_store = cmd.number_of(elements, cmd.COMMAND_FIELD) == cmd.C_STORE_RQ
        if context is None or not is_store or message_id is None or not has_data_set(elements):
            return None
        instance, context_class = text_of(elements, cmd.AFFECTED_INSTANCE), str(context.abstract_syntax)
        fault = fault_of(
            sop_class_uid=text_of(elements, cmd.AFFECTED_CLASS), sop_instance_uid=instance, context_class=context_class
        )
        return Request(
            context_id=context_id,
            message_id=message_id,
            sop_class_uid=context_class,
            sop_instance_uid=PLACEHOLDER_UID if names_instance(fault) else instance,
            transfer_syntax=str(context.transfer_syntax[0]),
            fault=fault,
        )

    def _context_for(self, context_id: int, elements: Mapping[int, bytes]) -> Any:
        """The accepted context of a message; None where there is none. Leave to echo is no leave to store."""
        context = next((c for c in self._assoc.accepted_contexts if c.context_id == context_id), None)
        is_store = cmd.number_of(elements, cmd.COMMAND_FIELD) == cmd.C_STORE_RQ
        if context is not None and is_store and not is_storage_class(str(context.abstract_syntax)):
            raise Malformed("a C-STORE in a context that is not for storage")
        return context

    def _receive(self, request: Request) -> None:
        """The data set of a request into its file, and the response."""
        announced = Announced(
            sop_class_uid=request.sop_class_uid,
            sop_instance_uid=request.sop_instance_uid,
            transfer_syntax=request.transfer_syntax,
            fault=request.fault,
        )
        assoc = self._assoc
        self._holds_reactor = True
        assoc._reactor_checkpoint.clear()  # pynetdicom's other thread looks around every millisecond: not while we read
        arrival = self._store.arrival(self._token_of(assoc), str(assoc.requestor.ae_title), announced)
        buffer = _take_buffer()
        try:
            self._data_set(request.context_id, arrival, buffer)
            answer = arrival.end()
        finally:
            arrival.abandon()
            _FREE.append(buffer)
        self._socket.sendall(store_response(request, answer))

    def _data_set(self, context_id: int, arrival: Arrival, buffer: memoryview) -> None:
        """The fragments of a data set, to the last."""
        control = 0
        while not control & cmd.LAST:
            control, length = self._next_data(context_id)
            self._left -= length
            ahead = 0 if self._left or control & cmd.LAST else _AHEAD  # one read for the fragment and what follows it
            while length:
                count = self._into(buffer[: length + ahead])
                self._ahead = bytes(buffer[length:count])
                count = min(count, length)
                arrival.write(buffer[:count])
                length -= count

    def _next_data(self, context_id: int) -> tuple[int, int]:
        """(message control header, length of the fragment) of the next PDV of a data set."""
        found, control, length = self._next_pdv()
        if control & cmd.COMMAND or found != context_id:
            raise Malformed("a fragment of another message inside a data set")
        return control, length

    def _next_pdv(self) -> tuple[int, int, int]:
        """(context ID, message control header, length of the fragment); what is left of the PDU begins with that."""
        while not self._left:
            header, kind, length = self._pdu_header()
            if kind != cmd.P_DATA:
                raise _Interrupted(header + self._exactly(length))
            self._left = length
        if self._left < cmd.PDV_HEADER.size:
            raise Malformed(f"a PDU with {self._left} bytes left, too few for a PDV")
        length, context_id, control = cmd.PDV_HEADER.unpack(self._exactly(cmd.PDV_HEADER.size))
        if length < 2 or length + 4 > self._left:
            raise Malformed(f"a PDV of {length} bytes in a PDU with {self._left} left")
        self._left -= cmd.PDV_HEADER.size
        self._small += length - 2 < SMALL
        few(self._small)
        return context_id, control, length - 2

    # ---- bytes

    def _more_comes(self) -> bool:
        """Whether the next request begins at once; after a pause pynetdicom's own loop looks for it."""
        if self._ended_here() or self._dul.to_provider_queue.qsize():
            return False
        if self._left:
            return True
        pending = isinstance(self._socket, ssl.SSLSocket) and self._socket.pending()
        return bool(pending or readable.within(self._socket, _LINGER_S))

    def _exactly(self, length: int) -> bytes:
        """The next bytes, all of them."""
        ahead = self._ahead[:length]
        self._ahead = self._ahead[length:]
        if len(ahead) == length:
            return ahead
        pieces = bytearray(ahead)
        view = memoryview(bytearray(min(length - len(pieces), _CHUNK)))
        while len(pieces) < length:
            count = self._into(view[: min(len(view), length - len(pieces))])
            pieces += view[:count]
        return bytes(pieces)

    def _into(self, view: memoryview) -> int:
        """Read into `view`, as much as comes without a pause; how many bytes."""
        while True:
            if self._ended_here():
                raise _EndedHere
            began = time.monotonic()
            try:
                count = self._some(view)
            except (BlockingIOError, InterruptedError, TimeoutError):
                count = -1
            if count == 0:
                raise _EndedHere if self._stopped else _Closed
            now = time.monotonic()
            self._pace.waited(now - began, max(count, 0))
            if count > 0:
                self._dul._idle_timer.restart()  # a large instance may take longer than the time-out
                if self._max_bytes_per_s:
                    self._hold_back(count, now)
                return count

    def _some(self, view: memoryview) -> int:
        sock = self._socket
        if not isinstance(sock, ssl.SSLSocket):
            return sock.recv_into(view, len(view), socket.MSG_WAITALL)
        if not sock.pending() and not readable.within(sock, _TICK_S):
            raise BlockingIOError
        sock.settimeout(_TICK_S)  # the rest of a TLS record may be long in coming
        try:
            return sock.recv_into(view)
        finally:
            sock.settimeout(self._send_s)

    def _hold_back(self, count: int, now: float) -> None:
        """Read nothing for a while: a peer's associations share what it may send in a second."""
        share = self._max_bytes_per_s / max(1, self._store.book.companions(self._token_of(self._assoc)))
        sleep_unless(self._ended_here, self._pace.pause_s(count, share, now), time.sleep, _TICK_S)

    def _drain(self) -> None:
        """What comes after an A-ABORT or a release is not looked at; it must not reach a file."""
        read = len(self._socket.recv(_CHUNK))
        self._drained += read
        if not read or self._drained > _MAX_DRAINED:
            raise _Closed

    # ---- the end

    def _ended_here(self) -> bool:
        """Whether our side ended the association while this thread was reading."""
        return bool(self._stopped or self._dul._kill_thread or self._assoc._kill)

    def _shut_down(self) -> None:
        """Close the connection; pynetdicom's own leaves one open that the peer has reset, until it is collected."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _abort(self) -> None:
        try:
            self._socket.sendall(_ABORT)
        except OSError as error:
            log.info("association.abort_not_sent", reason=error.strerror or type(error).__name__)
        self._dul.socket.close()  # tells the state machine

    def _tell(self, code: str, reason: str) -> None:
        """Why we end this association: an event and a line in the log, thinned."""
        calling_ae = str(self._assoc.requestor.ae_title)  # empty as long as no association was asked for
        address = plain_address(self._assoc.requestor.address)
        self._store.book.count_hang_up(code)
        if (thinned := self._store.thinned(code, f"{address} {without_numbers(reason)}")) is not None:
            log.warning(f"association.{code}", calling_ae=calling_ae, address=address, reason=reason, **thinned)
            whom = f"{shown(calling_ae)} at {shown(address)}" if calling_ae else shown(address)
            self._store.note(code, f"{whom}: {reason}: aborted", thinned)


def announced_pdu(config: Config) -> int:
    """The longest P-DATA-TF PDU that peers are told to send (PS3.8 annex D.1.1); 0: of any length.

    The plain reader collects each in memory, and so has a limit where none is configured.
    """
    if config.intake.reader == "plain":
        return config.node.max_pdu or _MAX_COLLECTED
    return config.node.max_pdu


def store_response(request: Request, answer: Answer) -> bytes:
    """The P-DATA-TF PDU of a C-STORE response (PS3.7 section 9.3.1.2), byte for byte as pynetdicom encodes it."""
    elements = [
        cmd.element(cmd.AFFECTED_CLASS, cmd.padded(request.sop_class_uid, b"\0")),
        cmd.element(cmd.COMMAND_FIELD, struct.pack("<H", cmd.C_STORE_RSP)),
        cmd.element(cmd.RESPONDED_TO, struct.pack("<H", request.message_id)),
        cmd.element(cmd.DATA_SET_TYPE, struct.pack("<H", cmd.NO_DATA_SET)),
        cmd.element(cmd.STATUS, struct.pack("<H", answer.status)),
    ]
    if answer.comment:
        elements.append(cmd.element(cmd.ERROR_COMMENT, cmd.padded(answer.comment, b" ")))
    elements.append(cmd.element(cmd.AFFECTED_INSTANCE, cmd.padded(request.sop_instance_uid, b"\0")))
    return cmd.pdu_of(request.context_id, cmd.COMMAND | cmd.LAST, cmd.command_set(elements))


def _take_buffer() -> memoryview:
    """One that nobody uses; its user gives it back to `_FREE`."""
    try:
        return _FREE.pop()
    except IndexError:
        return memoryview(bytearray(_BUFFER + _AHEAD))


def _timeval(seconds: float) -> bytes:
    """A `struct timeval` of this machine."""
    return struct.pack("ll", int(seconds), int(seconds % 1 * 1_000_000))
