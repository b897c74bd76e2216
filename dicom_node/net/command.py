"""Command sets and the PDUs that carry them, packed and read by hand: pydicom's objects cost more than the message.

PDU      type, reserved, length, PDV...              PS3.8 section 9.3.5, table 9-22
PDV      length, context ID, control header, fragment   PS3.8 section 9.3.5.1 and annex E.2
command  Implicit VR Little Endian                    PS3.7 section 6.3.1
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping

P_DATA, RELEASE, ABORT = 0x04, 0x05, 0x07
PDU_HEADER = struct.Struct(">BxL")
PDV_HEADER = struct.Struct(">LBB")
COMMAND, LAST = 0x01, 0x02  # bits of the message control header (PS3.8 annex E.2)
PDV_OVERHEAD = PDV_HEADER.size  # what a PDV takes of the peer's maximum beside its fragment

C_STORE_RQ, C_STORE_RSP = 0x0001, 0x8001
NO_DATA_SET, HAS_DATA_SET = 0x0101, 0x0001
LOW = 2  # priority (PS3.7 table 9.3-1)

# elements of group 0000 (PS3.7 annex E.1)
AFFECTED_CLASS, AFFECTED_INSTANCE = 0x0002, 0x1000
COMMAND_FIELD, DATA_SET_TYPE, STATUS, ERROR_COMMENT = 0x0100, 0x0800, 0x0900, 0x0902
MESSAGE_ID, RESPONDED_TO, PRIORITY = 0x0110, 0x0120, 0x0700


class Malformed(Exception):
    """What was read is no PDU, or no message that may come here."""


def store_request(*, message_id: int, sop_class_uid: str, sop_instance_uid: str) -> bytes:
    """The command set of a C-STORE request (PS3.7 table 9.3-1), byte for byte as pynetdicom encodes it."""
    return command_set(
        [
            element(AFFECTED_CLASS, padded(sop_class_uid, b"\0")),
            element(COMMAND_FIELD, struct.pack("<H", C_STORE_RQ)),
            element(MESSAGE_ID, struct.pack("<H", message_id)),
            element(PRIORITY, struct.pack("<H", LOW)),
            element(DATA_SET_TYPE, struct.pack("<H", HAS_DATA_SET)),
            element(AFFECTED_INSTANCE, padded(sop_instance_uid, b"\0")),
        ]
    )


def command_set(packed: list[bytes]) -> bytes:
    """Elements of `element`, in ascending order, with the group length before them."""
    body = b"".join(packed)
    return element(0x0000, struct.pack("<L", len(body))) + body


def element(number: int, value: bytes) -> bytes:
    """An element of group 0000."""
    return struct.pack("<HHL", 0x0000, number, len(value)) + value


def padded(text: str, padding: bytes) -> bytes:
    """Its bytes, of an even length."""
    raw = text.encode("ascii")
    return raw + padding * (len(raw) % 2)


def elements(command: bytes) -> dict[int, bytes]:
    """The elements of group 0000 by number; empty where this is no command set."""
    found, at = {}, 0
    while at + 8 <= len(command):
        group, number, length = struct.unpack_from("<HHL", command, at)
        at += 8 + length
        if group != 0x0000 or at > len(command):
            return {}
        found[number] = command[at - length : at]
    return found if at == len(command) else {}


def number_of(found: Mapping[int, bytes], number: int) -> int | None:
    """The value of an element of two bytes."""
    value = found.get(number, b"")
    return int.from_bytes(value, "little") if len(value) == 2 else None


def pdu_of(context_id: int, control: int, fragment: bytes) -> bytes:
    """A P-DATA-TF PDU of one fragment."""
    return pdu_header(context_id, control, len(fragment)) + fragment


def pdu_header(context_id: int, control: int, length: int) -> bytes:
    """What stands before a fragment of `length` bytes in a P-DATA-TF PDU of its own."""
    return PDU_HEADER.pack(P_DATA, length + PDV_OVERHEAD) + PDV_HEADER.pack(length + 2, context_id, control)


def fragments_of(pdu: bytes) -> Iterator[tuple[int, int, bytes]]:
    """(context ID, message control header, fragment) of each PDV in a P-DATA-TF PDU. Raises `Malformed`."""
    at = PDU_HEADER.size
    while at < len(pdu):
        if at + PDV_HEADER.size > len(pdu):
            raise Malformed("a PDV without its header")
        length, context_id, control = PDV_HEADER.unpack_from(pdu, at)
        end = at + 4 + length
        if length < 2 or end > len(pdu):
            raise Malformed(f"a PDV of {length} bytes in a PDU of {len(pdu)}")
        yield context_id, control, pdu[at + PDV_HEADER.size : end]
        at = end
