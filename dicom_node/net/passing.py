"""A watch over the messages that pynetdicom reads: it collects them in memory, without a limit and without a check.

An unknown command field or a command set that is none ends its thread with a traceback; here it is a reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from dicom_node.net import command as cmd

MAX_COMMAND = 64 * 1024  # bytes; a C-STORE request has some 200
SMALL = 64  # bytes; a fragment below it costs more than it brings, and a sender needs one to end a set
MAX_SMALL = 1000  # such fragments in one message
_CANCEL = 0x0FFF
_REQUESTS = frozenset({0x01, 0x10, 0x20, 0x21, 0x30, 0x100, 0x110, 0x120, 0x130, 0x140, 0x150})  # PS3.7 annex E.1
_FIELDS = _REQUESTS | {field | 0x8000 for field in _REQUESTS} | {_CANCEL}
_WITHOUT_DATA = frozenset({0x30, 0x8030, 0x8001, 0x110, 0x150, 0x8150, _CANCEL})  # PS3.7 sections 9.3 and 10.3


def checked(command: bytes) -> dict[int, bytes]:
    """The elements of a whole command set, by number. Raises `Malformed` for what is none of PS3.7."""
    found = cmd.elements(command)
    field = cmd.number_of(found, cmd.COMMAND_FIELD)
    if field not in _FIELDS:
        raise cmd.Malformed("a command set without a command")
    if cmd.number_of(found, cmd.DATA_SET_TYPE) is None:
        raise cmd.Malformed("a command set that does not say whether a data set follows")
    if field in _WITHOUT_DATA and has_data_set(found):
        raise cmd.Malformed("a data set for a command that has none")
    return found


def has_data_set(elements: Mapping[int, bytes]) -> bool:
    """Whether a data set follows this command (PS3.7 section 6.3.1)."""
    return cmd.number_of(elements, cmd.DATA_SET_TYPE) != cmd.NO_DATA_SET


def text_of(elements: Mapping[int, bytes], number: int) -> str:
    """An element's text without its padding, whatever bytes it has; empty where it is missing."""
    return elements.get(number, b"").decode("latin-1").rstrip("\0 ")


def grown(command: bytearray, length: int) -> None:
    """Raises `Malformed` when `length` more bytes make a command set larger than any."""
    if len(command) + length > MAX_COMMAND:
        raise cmd.Malformed(f"a command set of more than {MAX_COMMAND} bytes")


def few(small: int) -> None:
    """Raises `Malformed` when a message has so many `small` fragments that it is there to keep us busy."""
    if small > MAX_SMALL:
        raise cmd.Malformed(f"a message of more than {MAX_SMALL} fragments below {SMALL} bytes")


class Passing:
    """Follows the messages in the PDUs of one association that are passed on whole, and bounds them."""

    def __init__(self, max_data_set: int, check_context: Callable[[int, Mapping[int, bytes]], object]) -> None:
        """`check_context` gets the context ID and the command of each message, and may raise `Malformed`."""
        self._max_data_set = max_data_set
        self._check_context = check_context
        self._context_id = 0  # the message's
        self._part = cmd.COMMAND  # what the next fragment belongs to: COMMAND, or 0 for the data set
        self._command = bytearray()
        self._data_set = 0  # bytes of the data set that is on its way
        self._small = 0
        self.inside = False  # a message has begun and has not ended

    def look(self, pdu: bytes) -> bytes:
        """The next P-DATA-TF PDU as pynetdicom is to get it: fragments that belong together are one.

        It makes several objects of each fragment: a PDU of empty ones would keep it busy for minutes.
        Raises `Malformed`.
        """
        whole: list[tuple[int, int, bytearray]] = []
        goes_on = False
        for context_id, control, fragment in cmd.fragments_of(pdu):
            self._take(context_id, control, fragment)
            piece = whole.pop()[2] if goes_on else bytearray()
            piece += fragment
            whole.append((context_id, control, piece))
            goes_on = not control & cmd.LAST
        return packed(whole)

    def _take(self, context_id: int, control: int, fragment: bytes) -> None:
        if not self.inside:
            self.inside, self._context_id, self._part, self._small = True, context_id, cmd.COMMAND, 0
        if context_id != self._context_id or control & cmd.COMMAND != self._part:
            raise cmd.Malformed("a fragment of another message, or of a data set without its command")
        self._small += len(fragment) < SMALL
        few(self._small)
        if self._part:
            self._take_command(control, fragment)
        else:
            self._take_data(control, len(fragment))

    def _take_command(self, control: int, fragment: bytes) -> None:
        grown(self._command, len(fragment))
        self._command += fragment
        if control & cmd.LAST:
            elements = checked(bytes(self._command))
            self._check_context(self._context_id, elements)
            self.inside = has_data_set(elements)
            self._part = 0
            self._command.clear()

    def _take_data(self, control: int, length: int) -> None:
        self._data_set += length
        if self._data_set > self._max_data_set:
            raise cmd.Malformed(f"a data set of more than {self._max_data_set} bytes")
        if control & cmd.LAST:
            self.inside, self._data_set = False, 0


def hand_over(dul: Any, pdu: bytes) -> None:
    """Give pynetdicom's upper layer a PDU as if it had read it. Raises `Malformed`."""
    try:
        decoded, event = dul._decode_pdu(bytearray(pdu))
    except Exception as error:  # whatever its decoders meet in a broken one
        raise cmd.Malformed(f"a PDU of type 0x{pdu[0]:02X} that cannot be decoded") from error
    dul.event_queue.put(event)
    dul._recv_pdu.put(decoded)


def packed(fragments: Iterable[tuple[int, int, bytes | bytearray]]) -> bytes:
    """A P-DATA-TF PDU of fragments, each with its context ID and message control header."""
    pdvs = b"".join(
        cmd.PDV_HEADER.pack(len(piece) + 2, number, control) + piece for number, control, piece in fragments
    )
    return cmd.PDU_HEADER.pack(cmd.P_DATA, len(pdvs)) + pdvs
