"""Explicit VR Little Endian by hand, for the few elements that differ between the instances of one series.

Building and encoding a data set per slice costs more than everything else in writing a series. Here the data set
that all instances share is encoded once, cut at the places of the varying elements, and each instance is those
pieces joined with its own elements in between. Explicit VR elements are self-contained (PS3.5 section 7.1.2), so
nothing else has to be adjusted.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from io import BytesIO
from itertools import pairwise

from pydicom import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset

EXPLICIT_VR_LITTLE_ENDIAN = "1.2.840.10008.1.2.1"
IMPLEMENTATION_CLASS_UID = "2.25.274753246146677305633021870355105253398"  # made once, for this writer
IMPLEMENTATION_VERSION_NAME = "DICOM_NODE"
PREAMBLE = b"\0" * 128 + b"DICM"
PIXEL_DATA = 0x7FE00010

_LONG_VRS = frozenset({"OB", "OD", "OF", "OL", "OV", "OW", "SQ", "SV", "UC", "UN", "UR", "UT", "UV"})
_NUL_PADDED = frozenset({"UI", "OB", "UN"})
_ITEM = struct.pack("<HH", 0xFFFE, 0xE000)


def element_header(tag: int, vr: str, length: int) -> bytes:
    """Tag, VR and length (PS3.5 tables 7.1-1 and 7.1-2); `length` is even."""
    if vr in _LONG_VRS:
        return struct.pack("<HH2sHI", tag >> 16, tag & 0xFFFF, vr.encode("ascii"), 0, length)
    return struct.pack("<HH2sH", tag >> 16, tag & 0xFFFF, vr.encode("ascii"), length)


def element(tag: int, vr: str, value: bytes) -> bytes:
    """One element; an odd value is padded as its VR asks."""
    if len(value) % 2:
        value += b"\0" if vr in _NUL_PADDED else b" "
    return element_header(tag, vr, len(value)) + value


def text_element(tag: int, vr: str, value: str) -> bytes:
    """One element of ASCII text; several values are joined with a backslash."""
    return element(tag, vr, value.encode("ascii"))


def sequence(tag: int, items: Sequence[bytes]) -> bytes:
    """A sequence with defined lengths; each item is its encoded elements in tag order."""
    return element(tag, "SQ", b"".join(_ITEM + struct.pack("<I", len(item)) + item for item in items))


def encode_dataset(ds: Dataset, character_set: list[str] | str = "ISO_IR 6") -> bytes:
    """The elements of `ds` without preamble or file meta; `character_set` applies where `ds` names none."""
    buffer = DicomBytesIO()
    buffer.is_little_endian = True
    buffer.is_implicit_VR = False
    write_dataset(buffer, ds, parent_encoding=character_set)
    return bytes(buffer.getvalue())


def file_meta(sop_class_uid: str, sop_instance_uid: str) -> bytes:
    """Preamble and file meta information (PS3.10 section 7.1)."""
    body = b"".join(
        (
            element(0x00020001, "OB", b"\0\1"),
            text_element(0x00020002, "UI", sop_class_uid),
            text_element(0x00020003, "UI", sop_instance_uid),
            text_element(0x00020010, "UI", EXPLICIT_VR_LITTLE_ENDIAN),
            text_element(0x00020012, "UI", IMPLEMENTATION_CLASS_UID),
            text_element(0x00020013, "SH", IMPLEMENTATION_VERSION_NAME),
        )
    )
    return PREAMBLE + element(0x00020000, "UL", struct.pack("<I", len(body))) + body


def part10(ds: Dataset) -> bytes:
    """A whole Part 10 file of one data set that carries its SOP class, instance UID and pixel data."""
    buffer = BytesIO()
    buffer.write(file_meta(ds.SOPClassUID, ds.SOPInstanceUID))
    buffer.write(encode_dataset(ds))
    return buffer.getvalue()


class SeriesTemplate:
    """What all instances of one series share, encoded once.

    `shared` holds every constant element and none of `varying`; `varying` are the tags, of group 0008 or above,
    that `instance` is given for each instance.
    """

    def __init__(self, shared: Dataset, varying: Sequence[int]) -> None:
        self.varying = tuple(sorted(varying))
        self.sop_class_uid = str(shared.SOPClassUID)
        present = [tag for tag in self.varying if tag in shared]
        if present:
            raise ValueError(f"tag {present[0]:08X} is both shared and varying")
        character_set = shared.get("SpecificCharacterSet", "ISO_IR 6")
        edges = (0, *self.varying, 0x1_0000_0000)
        self._pieces = tuple(
            encode_dataset(_between(shared, low, high), character_set) for low, high in pairwise(edges)
        )

    def instance(self, sop_instance_uid: str, elements: Mapping[int, Sequence[bytes | memoryview]]) -> bytes:
        """One Part 10 file; `elements` gives each varying tag's encoded element, in parts to be joined."""
        parts: list[bytes | memoryview] = [file_meta(self.sop_class_uid, sop_instance_uid), self._pieces[0]]
        for tag, piece in zip(self.varying, self._pieces[1:], strict=True):
            parts.extend(elements[tag])
            parts.append(piece)
        return b"".join(parts)


def _between(ds: Dataset, low: int, high: int) -> Dataset:
    part = Dataset()
    for elem in ds:
        if low <= int(elem.tag) < high:
            part.add(elem)
    return part
