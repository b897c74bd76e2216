"""Stored values to Hounsfield units, one plane at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import ExplicitVRBigEndian

from pipeline.ct_headers import PIXEL_TAGS, Frame, PixelFormat
from pipeline.errors import UnsupportedSeries
from pipeline.types import FloatVolume

AIR_HU = -1024.0


def stored_planes(frames: Sequence[Frame]) -> Iterator[NDArray[np.uint16]]:
    """The raw 16-bit words [row, column] of `frames`, which all lie in one file, in the given order.

    Raises UnsupportedSeries: no_pixel_data, truncated_pixel_data, undecodable_pixel_data.
    """
    return _read_native(frames) if frames[0].pixels.offset >= 0 else _decode(frames)


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


def _decode(frames: Sequence[Frame]) -> Iterator[NDArray[np.uint16]]:
    """Compressed and deflated files, through pydicom's decoders and their plug-ins."""
    first = frames[0]
    pixels = first.pixels
    try:
        ds = pydicom.dcmread(first.path, specific_tags=[*PIXEL_TAGS, "PixelData"])
    except Exception as error:  # the header could be read before: the pixel data are cut off or broken
        raise _truncated(first) from error
    if "PixelData" not in ds:
        # pydicom drops an element that the end of the file cuts off
        raise _truncated(first) if pixels.transfer_syntax.is_encapsulated else _missing(first)
    if not pixels.transfer_syntax.is_encapsulated and len(ds.PixelData) < pixels.frame_bytes:
        raise _truncated(first)
    arrays = get_decoder(pixels.transfer_syntax).iter_array(ds, raw=True, indices=[f.index for f in frames])
    for frame in frames:
        array = _next_array(arrays, frame)
        if array.shape != (pixels.rows, pixels.columns) or array.dtype.itemsize != 2:
            raise _undecodable(frame, f"a decoded plane of {array.shape} {array.dtype}")
        yield np.ascontiguousarray(array).view(np.uint16)


def _next_array(arrays: Iterator[tuple[NDArray[Any], dict[str, Any]]], frame: Frame) -> NDArray[Any]:
    try:
        return next(arrays)[0]
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
