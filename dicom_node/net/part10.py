"""What a sender has to know of a Part 10 file before it sends it: its file meta information (PS3.10 section 7.1).

Read by hand: a series of 600 is looked through before its association is asked for, and pydicom takes 0.5 ms a file.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

from pydicom.errors import InvalidDicomError
from pydicom.uid import ExplicitVRLittleEndian

from dicom_node.net.compression import COMPRESSED_CLASSES, EXPLICIT

_PREFIX_AT, _META_AT = 128, 132
_ELEMENT = struct.Struct("<HH2sH")  # Explicit VR Little Endian (PS3.5 section 7.1.2)
_LONG_LENGTH = struct.Struct("<I")
_LONG = frozenset({b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"})
_FIRST_BYTES = 4096
_MAX_META = 1024 * 1024  # private information may be in it (0002,0102)
_CLASS, _INSTANCE, _SYNTAX = 0x0002, 0x0003, 0x0010


@dataclass(frozen=True, kw_only=True, slots=True)
class Part10:
    """One instance in its file; `data_set_at` is where its data set begins, after the file meta information."""

    path: Path
    sop_class_uid: str
    sop_instance_uid: str
    transfer_syntax_uid: str
    data_set_at: int = 0


def read_part10(path: Path) -> Part10:
    """Read only that. Raises `OSError`, or `InvalidDicomError` when it is no Part 10 file or lacks something."""
    with path.open("rb", buffering=0) as file:
        head = file.read(_FIRST_BYTES) or b""
        if head[_PREFIX_AT:_META_AT] != b"DICM":
            raise InvalidDicomError(f"{path.name}: no DICM prefix")
        found = _meta(head)
        if found is None:
            found = _meta(head + (file.read(_MAX_META) or b""))
    if found is None:
        raise InvalidDicomError(f"{path.name}: the file meta information does not end")
    values, data_set_at = found
    if missing := [f"(0002,{number:04X})" for number in (_CLASS, _INSTANCE, _SYNTAX) if not values.get(number)]:
        raise InvalidDicomError(f"{path.name}: no {', '.join(missing)} in the file meta information")
    return Part10(
        path=path,
        sop_class_uid=values[_CLASS],
        sop_instance_uid=values[_INSTANCE],
        transfer_syntax_uid=values[_SYNTAX],
        data_set_at=data_set_at,
    )


def _meta(head: bytes) -> tuple[dict[int, str], int] | None:
    """The UIDs of group 0002 by element number, and where the next group begins; None when `head` ends before that.

    The group is read to its end, not by its length element: that is wrong in some files.
    """
    values: dict[int, str] = {}
    at = _META_AT
    while at + _ELEMENT.size <= len(head):
        group, number, vr, length = _ELEMENT.unpack_from(head, at)
        if group != 0x0002:
            return values, at
        at += _ELEMENT.size
        if vr in _LONG:
            if at + _LONG_LENGTH.size > len(head):
                return None
            (length,) = _LONG_LENGTH.unpack_from(head, at)
            at += _LONG_LENGTH.size
        if vr == b"UI":
            values[number] = head[at : at + length].decode("latin-1").rstrip("\0 ")
        at += length
    return (values, at) if at == len(head) else None


def to_compress(part: Part10, transfer_syntax: str) -> bool:
    """Whether this instance is to go out in another syntax than its file's (a destination's `transfer_syntax`)."""
    native = part.transfer_syntax_uid == ExplicitVRLittleEndian
    return transfer_syntax != EXPLICIT and native and part.sop_class_uid in COMPRESSED_CLASSES
