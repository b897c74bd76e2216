"""Stored values to Hounsfield units, one plane at a time."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from typing import IO, Any, TypeVar

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.encaps import encapsulate, generate_frames
from pydicom.pixels.decoders.base import Decoder, get_decoder
from pydicom.pixels.utils import as_pixel_options
from pydicom.uid import ExplicitVRBigEndian

from pipeline.codestream import claimed_sizes
from pipeline.ct_headers import PIXEL_TAGS, Frame, PixelFormat
from pipeline.errors import UnsupportedSeries
from pipeline.types import FloatVolume

AIR_HU = -1024.0

_ITEM = struct.Struct("<HHL")  # the header of a fragment; encapsulated data are Little Endian
_OFFSET_TAGS = ("ExtendedOffsetTable", "ExtendedOffsetTableLengths")
_Decoded = TypeVar("_Decoded")


def stored_planes(frames: Sequence[Frame]) -> Iterator[NDArray[np.uint16]]:
    """The raw 16-bit words [row, column] of `frames`, which all lie in one file, by ascending index.

    One frame is in memory at a time (a deflated file is inflated whole).
    Raises UnsupportedSeries: no_pixel_data, truncated_pixel_data, undecodable_pixel_data.
    """
    pixels = frames[0].pixels
    if pixels.offset < 0:
        return _inflate(frames)
    return _decode(frames) if pixels.transfer_syntax.is_encapsulated else _read_native(frames)


def hounsfield(raw: NDArray[np.uint16], frame: Frame, out: NDArray[np.float32]) -> None:
    """Write the Hounsfield units of `raw` into `out`: rescaled, padding and values below air as -1024.

    PS3.3 C.11.1.1 (rescale), C.7.5.1.1.2 (padding), PS3.5 section 8.1.1 (unused bits are not part of a value).
    """
    pixels = frame.pixels
    stored = stored_values(raw, pixels)
    np.multiply(stored, np.float32(frame.slope), out=out)
    out += np.float32(frame.intercept)
    if pixels.padding is not None:
        out[_is_padding(raw, stored, pixels)] = AIR_HU
    np.maximum(out, np.float32(AIR_HU), out=out)


def stored_values(raw: NDArray[np.uint16], pixels: PixelFormat) -> NDArray[Any]:
    """The numbers in the stored bits of 16-bit words: unused bits (old overlays) cleared, the sign extended."""
    if pixels.bits_stored == 16:
        return raw.view(np.int16) if pixels.signed else raw
    left = np.uint16(15 - pixels.high_bit)
    right = np.uint16(16 - pixels.bits_stored)
    shifted = raw << left
    return shifted.view(np.int16) >> np.int16(right) if pixels.signed else shifted >> right


def _is_padding(raw: NDArray[np.uint16], stored: NDArray[Any], pixels: PixelFormat) -> NDArray[np.bool_]:
    """Where the value is padding. A single value is compared as a bit pattern: writers mix up its sign and VR."""
    assert pixels.padding is not None
    value, limit = (_as_stored(p, pixels) for p in pixels.padding)
    if pixels.padding[0] == pixels.padding[1]:
        return (raw == np.uint16(pixels.padding[0] & 0xFFFF)) | (stored == value)
    return (stored >= min(value, limit)) & (stored <= max(value, limit))


def _as_stored(value: int, pixels: PixelFormat) -> int:
    """A 16-bit pattern, signed or not, as the number that the stored values use."""
    word = value & 0xFFFF
    return word - 0x10000 if pixels.signed and word >= 0x8000 else word


def _read_native(frames: Sequence[Frame]) -> Iterator[NDArray[np.uint16]]:
    pixels = frames[0].pixels
    dtype = ">u2" if pixels.transfer_syntax == ExplicitVRBigEndian else "<u2"
    with frames[0].path.open("rb") as file:
        for frame in frames:
            file.seek(pixels.offset + frame.index * pixels.frame_bytes)
            data = file.read(pixels.frame_bytes)
            if len(data) < pixels.frame_bytes:
                raise _truncated(frame)
            yield np.frombuffer(data, dtype).reshape(pixels.rows, pixels.columns).astype(np.uint16, copy=False)


def _inflate(frames: Sequence[Frame]) -> Iterator[NDArray[np.uint16]]:
    """A deflated file, whole: a position in it has no place on the disk (PS3.5 annex A.5)."""
    first = frames[0]
    pixels = first.pixels
    try:
        ds = pydicom.dcmread(first.path, specific_tags=[*PIXEL_TAGS, "PixelData"])
    except Exception as error:  # the header could be read before: the pixel data are cut off or broken
        raise _truncated(first) from error
    if "PixelData" not in ds:
        raise _missing(first)
    if len(ds.PixelData) < pixels.frame_bytes:
        raise _truncated(first)
    arrays = get_decoder(pixels.transfer_syntax).iter_array(ds, raw=True, indices=[f.index for f in frames])
    for frame in frames:
        yield _words(_next(arrays, frame)[0], frame)


def _decode(frames: Sequence[Frame]) -> Iterator[NDArray[np.uint16]]:
    """A compressed file, frame after frame from the disk, through pydicom's decoders and their plug-ins."""
    first = frames[0]
    decoder = _decoder(first)
    header = pydicom.dcmread(first.path, stop_before_pixels=True, specific_tags=[*PIXEL_TAGS, *_OFFSET_TAGS])
    options = as_pixel_options(header, pixel_keyword="PixelData", pixel_vr="OB", number_of_frames=1)
    with first.path.open("rb") as file:
        _check_fragments(file, first)
        file.seek(first.pixels.offset)
        coded = generate_frames(file, number_of_frames=first.of, extended_offsets=options.pop("extended_offsets", None))
        number = -1
        for frame in frames:
            while number < frame.index:
                data, number = _next(coded, frame), number + 1
            _check_claims(data, frame)
            yield _words(_next(_decoded(decoder, data, options), frame), frame)


def _decoded(decoder: Decoder, data: bytes, options: dict[str, Any]) -> Iterator[NDArray[Any]]:
    """One frame, alone: pydicom cannot extend the sign of several JPEG-LS frames (its array is read-only)."""
    for array, _ in decoder.iter_array(encapsulate([data], has_bot=False), raw=True, indices=[0], **options):
        yield array


def _check_claims(data: bytes, frame: Frame) -> None:
    """Raises undecodable_pixel_data where the compressed frame claims another size than its header says."""
    for rows, columns, components in claimed_sizes(data):
        if (rows, columns, components) != (frame.pixels.rows, frame.pixels.columns, 1):
            found = f"they claim {rows} x {columns} pixels of {components} values"
            raise _undecodable(frame, found)


def _decoder(frame: Frame) -> Decoder:
    try:
        return get_decoder(frame.pixels.transfer_syntax)
    except NotImplementedError as error:  # a video, a syntax of the future
        raise _undecodable(frame, "no decoder") from error


def _check_fragments(file: IO[bytes], frame: Frame) -> None:
    """Raises truncated_pixel_data where the file ends inside a fragment (PS3.5 annex A.4)."""
    size, at = os.fstat(file.fileno()).st_size, frame.pixels.offset
    while at < size:
        file.seek(at)
        head = file.read(_ITEM.size)
        if len(head) < _ITEM.size:
            raise _truncated(frame)
        group, element, length = _ITEM.unpack(head)
        if (group, element) != (0xFFFE, 0xE000):  # the delimiter, or what the decoder shall name
            return
        at += _ITEM.size + length
    if at > size or size == frame.pixels.offset:
        raise _truncated(frame)


def _words(array: NDArray[Any], frame: Frame) -> NDArray[np.uint16]:
    """A decoded plane as 16-bit words."""
    if array.shape != (frame.pixels.rows, frame.pixels.columns) or array.dtype.itemsize != 2:
        raise _undecodable(frame, f"a decoded plane of {array.shape} {array.dtype}")
    return np.ascontiguousarray(array).view(np.uint16)


def _next(arrays: Iterator[_Decoded], frame: Frame) -> _Decoded:
    try:
        return next(arrays)
    except (KeyboardInterrupt, SystemExit, MemoryError):  # not the file's fault
        raise
    except BaseException as error:  # codecs raise anything on broken data; pylibjpeg-rle's panics are no Exception
        raise _undecodable(frame, type(error).__name__) from error


def _truncated(frame: Frame) -> UnsupportedSeries:
    return UnsupportedSeries("truncated_pixel_data", f"instance {frame.sop_instance_uid}: the pixel data are cut off")


def _missing(frame: Frame) -> UnsupportedSeries:
    return UnsupportedSeries("no_pixel_data", f"instance {frame.sop_instance_uid} has no pixel data")


def _undecodable(frame: Frame, found: str) -> UnsupportedSeries:
    syntax = frame.pixels.transfer_syntax.name
    text = f"instance {frame.sop_instance_uid}: {syntax} pixel data cannot be decoded ({found})"
    return UnsupportedSeries("undecodable_pixel_data", text)


def planes_are_equal(frames: Sequence[Frame]) -> bool:
    """Whether all `frames` hold the same Hounsfield units."""
    first: FloatVolume | None = None
    for frame in frames:
        plane = np.empty((frame.pixels.rows, frame.pixels.columns), np.float32)
        hounsfield(next(iter(stored_planes([frame]))), frame, plane)
        if first is not None and not np.array_equal(first, plane):
            return False
        first = plane
    return True
