"""The two ways of a C-STORE request onto an association: our own stream, and pynetdicom's.

pynetdicom negotiates and releases. `StreamSender` holds its two threads in between and has the socket to itself:
the data set goes from its file through one reused buffer, whose PDU headers are laid out once, to the socket; the
response is read by hand. Whatever is no response (an abort, a request for release, the end of the connection) is
given to pynetdicom with the socket.

Measured against pynetdicom and DCMTK in benchmarks/intake.py; `[node].sender = "plain"` leaves it to pynetdicom.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, Protocol, Self

import structlog
from pydicom import dcmread
from pynetdicom.association import Association
from pynetdicom.dsutils import encode
from pynetdicom.presentation import PresentationContext

from dicom_node.net import command as cmd
from dicom_node.net.link import dimse_status
from dicom_node.net.part10 import Part10
from dicom_node.net.passing import MAX_COMMAND, hand_over

log = structlog.get_logger(__name__)

Way = Literal["stream", "plain"]

_BUFFER = 256 * 1024  # bytes that go to the socket at once
_MAX_VECTORS = 1024  # IOV_MAX of Linux
_MAX_FRAGMENT = _BUFFER - 64  # where the peer sets no limit, or a larger one
_COMMAND_ROOM = 1024  # before the first data PDU, so that both leave together; a command set has some 200 bytes
_MAX_ANSWER = 1024 * 1024  # bytes of a PDU that a sender is answered with: a response has some 200
_HELD_S = 0.05  # how often it is seen whether pynetdicom's socket thread has died instead of pausing
_SETTLE_S = 10.0  # for pynetdicom to act upon what ended the association
_CLOSED = "Evt17"  # PS3.8 table 9-10: transport connection closed


class _Silent(Exception):
    """No response in time."""


class Sender(Protocol):
    """Sends one instance after the other over one association."""

    @property
    def is_open(self) -> bool:
        """Whether another instance can be sent."""
        ...

    def store(self, part: Part10, message_id: int, *, convert: bool) -> int | None:
        """One C-STORE: its status, or None when none came and the association is over.

        `convert`: where its own transfer syntax was not accepted, its data set may go in another uncompressed one.
        Raises ValueError when there is no presentation context for it.
        """
        ...


@contextmanager
def opened(way: Way, assoc: Association, answer_s: float) -> Iterator[Sender]:
    """The sender for an established association; `answer_s` seconds are waited for a response, or a stalled socket."""
    sender: PlainSender | StreamSender
    if way == "plain":
        sender = PlainSender(assoc)
        yield sender
    else:
        with _reactor_held(assoc), StreamSender(assoc, answer_s) as sender:
            yield sender
    if sender.is_over:
        _settle(assoc)


@contextmanager
def _reactor_held(assoc: Any) -> Iterator[None]:
    """Keep pynetdicom's association thread at its checkpoint for as long as instances are sent."""
    assoc._reactor_checkpoint.clear()
    try:
        yield
    finally:
        assoc._reactor_checkpoint.set()


def _settle(assoc: Association) -> None:
    """Wait until pynetdicom knows that the association is over, so that nobody releases it any more."""
    until = time.monotonic() + _SETTLE_S
    while assoc.is_established and time.monotonic() < until:
        time.sleep(0.001)


class PlainSender:
    """Everything by pynetdicom."""

    def __init__(self, assoc: Association) -> None:
        self._assoc = assoc
        self.is_over = False

    @property
    def is_open(self) -> bool:
        return self._assoc.is_established and not self.is_over

    def store(self, part: Part10, message_id: int, *, convert: bool) -> int | None:
        data_set = dcmread(part.path) if convert else part.path
        try:
            status = dimse_status(self._assoc.send_c_store(data_set, msg_id=message_id))
        except (ValueError, RuntimeError):  # no convertible context; the association ended between check and send
            if self._assoc.is_established:
                raise
            status = None
        self.is_over = status is None
        return status


class StreamSender:
    """Holds the association's socket as a context manager; gives it back at the end, or when the association ends.

    The association's own thread is held already (`_reactor_held`).
    """

    def __init__(self, assoc: Association, answer_s: float) -> None:
        self._assoc: Any = assoc
        self._dul: Any = assoc.dul
        self._called = str(assoc.acceptor.ae_title)
        self._answer_s = answer_s
        self.is_over = False
        self._socket: socket.socket
        self._held = threading.Event()  # pynetdicom's socket thread waits
        self._go_on = threading.Event()
        self._received = bytearray()
        self._contexts: dict[tuple[str, str, bool], PresentationContext] = {}
        most = (assoc.acceptor.maximum_length or _BUFFER) - cmd.PDV_OVERHEAD
        # even, as PS3.5 has every value; a peer with a maximum that has room for no fragment gets the smallest
        self._fragment = max(2, min(most, _MAX_FRAGMENT) & ~1)
        self._slot = cmd.PDU_HEADER.size + cmd.PDV_OVERHEAD + self._fragment
        self._slots = min(_MAX_VECTORS, max(1, _BUFFER // self._slot))
        self._buffer = memoryview(bytearray(_COMMAND_ROOM + self._slots * self._slot))
        self._values = [self._buffer[end - self._fragment : end] for end in map(self._end_of, range(self._slots))]

    def __enter__(self) -> Self:
        """Take the socket: nothing of pynetdicom reads or writes from here on."""
        self._dul._is_transport_event = self._hold  # its thread calls this where it would look at the socket
        while not self._held.wait(_HELD_S) and self._dul.is_alive():
            pass
        connection = self._dul.socket
        if self._held.is_set() and connection is not None and connection.socket is not None:
            self._socket = connection.socket
            self._socket.settimeout(self._answer_s)
        else:
            self.is_over = True
            self._give_back()
        return self

    def __exit__(self, *_: object) -> None:
        self._give_back()

    @property
    def is_open(self) -> bool:
        return self._held.is_set() and not self.is_over and bool(self._assoc.is_established)

    def store(self, part: Part10, message_id: int, *, convert: bool) -> int | None:
        context = self._context(part, convert=convert)
        request = cmd.store_request(
            message_id=message_id, sop_class_uid=part.sop_class_uid, sop_instance_uid=part.sop_instance_uid
        )
        file, at = _data_set(part, str(context.transfer_syntax[0]))
        try:
            self._send(context.context_id or 0, request, file, at)
            if (status := self._status(message_id)) is not None:
                return status
        except cmd.Malformed as error:
            self._abort(str(error))
        except _Silent:
            self._abort("no response in time")
        except OSError as error:
            self._lost(error.strerror or type(error).__name__)
        finally:
            os.close(file)
        self.is_over = True
        return None

    # ---- pynetdicom's threads

    def _hold(self) -> bool:
        """What pynetdicom's socket thread does meanwhile; False: it found nothing."""
        self._held.set()
        self._go_on.wait()
        return False

    def _give_back(self) -> None:
        if not self._go_on.is_set():
            self._dul.__dict__.pop("_is_transport_event", None)
            self._dul._idle_timer.restart()  # we were not idle
            self._go_on.set()

    def _abort(self, reason: str) -> None:
        log.warning("association.aborted", called_ae=self._called, reason=reason)
        self._give_back()
        self._assoc.abort()

    def _lost(self, reason: str) -> None:
        log.info("association.connection_lost", called_ae=self._called, reason=reason)
        self._dul.socket.close()  # tells pynetdicom, too
        self._give_back()

    def _pass_on(self, pdu: bytes) -> None:
        """A PDU that is no part of a response: for pynetdicom, as if it had read it."""
        hand_over(self._dul, pdu)
        self._give_back()

    # ---- requests

    def _context(self, part: Part10, *, convert: bool) -> PresentationContext:
        """The context that pynetdicom would take. Raises ValueError."""
        key = part.sop_class_uid, part.transfer_syntax_uid, convert
        if key not in self._contexts:
            self._contexts[key] = self._assoc._get_valid_context(key[0], key[1], "scu", allow_conversion=convert)
        return self._contexts[key]

    def _end_of(self, slot: int) -> int:
        return _COMMAND_ROOM + (slot + 1) * self._slot

    def _send(self, context_id: int, request: bytes, file: int, at: int) -> None:
        """The request, then the file's bytes from `at` to its end. Raises OSError."""
        pieces = [request[i : i + self._fragment] for i in range(0, len(request), self._fragment)]
        controls = [cmd.COMMAND] * (len(pieces) - 1) + [cmd.COMMAND | cmd.LAST]
        pdus = b"".join(cmd.pdu_of(context_id, c, piece) for c, piece in zip(controls, pieces, strict=True))
        begin = _COMMAND_ROOM - len(pdus)
        if begin < 0:  # a peer that takes tiny PDUs
            self._socket.sendall(pdus)
            begin = _COMMAND_ROOM
        else:
            self._buffer[begin:_COMMAND_ROOM] = pdus
        self._lay_out(context_id)
        left = os.fstat(file).st_size - at
        if left < 0:
            raise OSError(0, "the file became shorter before it was sent")
        while True:
            wanted = min(left, self._slots * self._fragment)
            if _read_into(self._values, file, at, wanted) < wanted:
                raise OSError(0, "the file became shorter while it was sent")
            at, left = at + wanted, left - wanted
            end = self._close_last(context_id, wanted) if not left else self._end_of(self._slots - 1)
            self._socket.sendall(self._buffer[begin:end])
            if not left:
                return
            begin = _COMMAND_ROOM

    def _lay_out(self, context_id: int) -> None:
        """The headers of whole fragments that are not the last."""
        header = cmd.pdu_header(context_id, 0, self._fragment)
        for slot in range(self._slots):
            start = _COMMAND_ROOM + slot * self._slot
            self._buffer[start : start + len(header)] = header

    def _close_last(self, context_id: int, n_bytes: int) -> int:
        """The header of the last fragment, when `n_bytes` are in the buffer; where the PDU ends in it."""
        slot = max(0, n_bytes - 1) // self._fragment
        length = n_bytes - slot * self._fragment
        start = _COMMAND_ROOM + slot * self._slot
        header = cmd.pdu_header(context_id, cmd.LAST, length)
        self._buffer[start : start + len(header)] = header
        return start + len(header) + length

    # ---- responses

    def _status(self, message_id: int) -> int | None:
        """The status of the response to this request; None when another PDU came, which pynetdicom has.

        Raises `Malformed`, `_Silent`, OSError.
        """
        deadline = time.monotonic() + self._answer_s
        command, control = bytearray(), 0
        while not control & cmd.LAST:
            pdu = self._pdu(deadline)
            if pdu[0] != cmd.P_DATA:
                self._pass_on(pdu)
                return None
            for _, control, fragment in cmd.fragments_of(pdu):
                command += fragment
                if not control & cmd.COMMAND or len(command) > MAX_COMMAND:
                    raise cmd.Malformed("something else than the response to a C-STORE")
        found = cmd.elements(bytes(command))
        kind, answered = cmd.number_of(found, cmd.COMMAND_FIELD), cmd.number_of(found, cmd.RESPONDED_TO)
        status = cmd.number_of(found, cmd.STATUS)
        if kind != cmd.C_STORE_RSP or answered != message_id or status is None:
            raise cmd.Malformed(f"a message 0x{kind or 0:04X} to request {answered}, not the response to {message_id}")
        return status

    def _pdu(self, deadline: float) -> bytes:
        """The next PDU, whole."""
        received = self._received
        size = cmd.PDU_HEADER.size
        while len(received) < size:
            self._more(deadline)
        size += cmd.PDU_HEADER.unpack_from(received)[1]
        if size > _MAX_ANSWER:
            raise cmd.Malformed(f"a PDU of {size} bytes in answer to a C-STORE")
        while len(received) < size:
            self._more(deadline)
        pdu = bytes(received[:size])
        del received[:size]
        return pdu

    def _more(self, deadline: float) -> None:
        try:
            piece = self._socket.recv(65536)
        except TimeoutError:
            raise _Silent from None
        if not piece:
            raise ConnectionResetError(0, "the peer closed the connection")
        self._received += piece
        if time.monotonic() > deadline:
            raise _Silent


def _data_set(part: Part10, transfer_syntax: str) -> tuple[int, int]:
    """An open file and where the data set begins in it, in the syntax that was accepted; the caller closes it."""
    if transfer_syntax == part.transfer_syntax_uid:
        return os.open(part.path, os.O_RDONLY | os.O_CLOEXEC), part.data_set_at
    ds = dcmread(part.path)
    syntax = type(ds.file_meta.TransferSyntaxUID)(transfer_syntax)
    encoded = encode(ds, syntax.is_implicit_VR, syntax.is_little_endian, syntax.is_deflated)
    if encoded is None:
        raise ValueError(f"{part.path.name} cannot be encoded as {syntax.name}")
    file = os.memfd_create("data-set")
    with os.fdopen(os.dup(file), "wb") as memory:
        memory.write(encoded)
    return file, 0


def _read_into(values: list[memoryview], file: int, at: int, wanted: int) -> int:
    """Fill the slots of a buffer from a file, in order, with `wanted` bytes; how many there were."""
    got = 0
    while got < wanted:
        slot, offset = divmod(got, len(values[0]))
        count = os.preadv(file, [values[slot][offset:], *values[slot + 1 :]], at + got)
        if not count:
            break
        got += count
    return min(got, wanted)
