"""What compressed data say of their size, before a decoder believes them.

A JPEG frame of 20 bytes can claim 65535 x 65535 pixels, for which decoders take gigabytes before they look for the
first of them; 300 KB of a deflated data set can inflate to as much.
"""

from __future__ import annotations

import zlib
from pathlib import Path

from pydicom.filereader import read_file_meta_info
from pydicom.uid import DeflatedExplicitVRLittleEndian

MAX_INFLATED_BYTES = 256 << 20  # a deflated instance beyond it is not read; a CT slice has 0.5 MB
_INFLATE_STEP = 1 << 20
_META_START = 144  # preamble 128, prefix 4, the group length element 12 (PS3.10 section 7.1)

_SOI, _SOS, _EOI = 0xD8, 0xDA, 0xD9  # ITU-T T.81 table B.1
_ALONE = frozenset({0x01, *range(0xD0, 0xD9)})  # markers without a segment
_FRAMES = frozenset({*range(0xC0, 0xD0), 0xF7}) - {0xC4, 0xC8, 0xCC}  # SOF0 to SOF15, and SOF55 of JPEG-LS
_LSE = 0xF8  # JPEG-LS preset parameters (ITU-T T.87 C.2.4.1)
_OVERSIZE = 4  # the kind of them that replaces the size
_J2K_START = b"\xff\x4f\xff\x51"  # SOC, SIZ (ITU-T T.800 A.5.1)
_J2K_SEARCH = 1 << 16  # a file around the codestream (JP2) has it within its first boxes

Size = tuple[int, int, int]


def claimed_sizes(frame: bytes) -> list[Size]:
    """(rows, columns, components) of each header in a JPEG, JPEG-LS or JPEG 2000 frame; none in one of another kind.

    Headers end where the first scan begins. A JPEG-LS frame that gives its size elsewhere counts as of size 0.
    """
    if frame[:2] == b"\xff\xd8":
        return _jpeg(frame)
    at = frame.find(_J2K_START, 0, _J2K_SEARCH)
    return [_jpeg_2000(frame, at)] if at >= 0 else []


def _jpeg(frame: bytes) -> list[Size]:
    found = []
    at = 2
    while at + 4 <= len(frame):
        if frame[at] != 0xFF:
            at += 1
            continue
        marker = frame[at + 1]
        if marker in (_SOS, _EOI):
            break
        if marker == 0xFF:
            at += 1
        elif marker in _ALONE:
            at += 2
        else:
            body = frame[at + 4 : at + 10]
            if marker in _FRAMES and len(body) == 6:
                found.append((_number(body[1:3]), _number(body[3:5]), body[5]))
            elif marker == _LSE and body[:1] == bytes((_OVERSIZE,)):
                found.append((0, 0, 0))
            at += 2 + max(_number(frame[at + 2 : at + 4]), 2)
    return found


def _jpeg_2000(frame: bytes, at: int) -> Size:
    def field(number: int) -> int:
        begin = at + 8 + 4 * number  # behind SOC, SIZ, Lsiz and Rsiz
        return _number(frame[begin : begin + 4])

    components = _number(frame[at + 40 : at + 42])
    return field(1) - field(3), field(0) - field(2), components


def _number(raw: bytes) -> int:
    return int.from_bytes(raw, "big")


def inflates_to_more(path: Path, most: int = MAX_INFLATED_BYTES) -> bool:
    """Whether a DICOM file is deflated (PS3.5 annex A.5) and holds more than `most` bytes.

    Inflates piece by piece and keeps nothing. Raises what pydicom raises for a file that is none, and zlib.error.
    """
    meta = read_file_meta_info(path)
    if meta.get("TransferSyntaxUID") != DeflatedExplicitVRLittleEndian:
        return False
    inflater, total = zlib.decompressobj(-zlib.MAX_WBITS), 0
    with path.open("rb") as file:
        file.seek(_META_START + int(meta.FileMetaInformationGroupLength))
        while total <= most and not inflater.eof:
            data = inflater.unconsumed_tail or file.read(_INFLATE_STEP)
            if not data:
                break
            total += len(inflater.decompress(data, _INFLATE_STEP))
    return total > most
