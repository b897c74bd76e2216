"""A watch over the messages that pynetdicom reads: it collects them in memory, without a limit and without a check.

An unknown command field or a command set that is none ends its thread with a traceback; here it is a reason.
"""

from __future__ import annotations

from collections.abc import Mapping

from dicom_node.net import command as cmd

MAX_COMMAND = 64 * 1024  # bytes; a C-STORE request has some 200
_CANCEL = 0x0FFF
_REQUESTS = frozenset({0x01, 0x10, 0x20, 0x21, 0x30, 0x100, 0x110, 0x120, 0x130, 0x140, 0x150})  # PS3.7 annex E.1
_FIELDS = _REQUESTS | {field | 0x8000 for field in _REQUESTS} | {_CANCEL}


def checked(command: bytes) -> dict[int, bytes]:
    """The elements of a whole command set, by number. Raises `Malformed` for what is none of PS3.7."""
    found = cmd.elements(command)
    if cmd.number_of(found, cmd.COMMAND_FIELD) not in _FIELDS:
        raise cmd.Malformed("a command set without a command")
    if cmd.number_of(found, cmd.DATA_SET_TYPE) is None:
        raise cmd.Malformed("a command set that does not say whether a data set follows")
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


class Passing:
    """Follows the messages in the PDUs of one association that are passed on whole, and bounds them."""

    def __init__(self, max_data_set: int) -> None:
        self._max_data_set = max_data_set
        self._command = bytearray()
        self._data_set = 0  # bytes of the data set that is on its way
        self.inside = False  # a message has begun and has not ended

    def look(self, pdu: bytes) -> None:
        """The next P-DATA-TF PDU. Raises `Malformed`."""
        for control, fragment in cmd.fragments_of(pdu):
            self.inside = True
            if control & cmd.COMMAND:
                self._take_command(control, fragment)
            else:
                self._take_data(control, len(fragment))

    def _take_command(self, control: int, fragment: bytes) -> None:
        grown(self._command, len(fragment))
        self._command += fragment
        if control & cmd.LAST:
            self.inside = has_data_set(checked(bytes(self._command)))
            self._command.clear()

    def _take_data(self, control: int, length: int) -> None:
        self._data_set += length
        if self._data_set > self._max_data_set:
            raise cmd.Malformed(f"a data set of more than {self._max_data_set} bytes")
        if control & cmd.LAST:
            self.inside, self._data_set = False, 0
