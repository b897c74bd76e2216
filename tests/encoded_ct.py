"""CT files in every transfer syntax that a PACS may send, by encoders that are not our own.

Each function rewrites the pixel data of an Explicit VR Little Endian file; frames stay apart. `ENCODERS` is the table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

Plane = NDArray[Any]
Encode = Callable[[Dataset], None]
NEAR = 3  # of a stored value: what JPEG-LS may differ by


def encode_file(path: Path, syntax: str) -> None:
    """Rewrite the file at `path` in `syntax`."""
    ds = pydicom.dcmread(path)
    encode(ds, syntax)
    pydicom.dcmwrite(path, ds, enforce_file_format=True)


def encode(ds: Dataset, syntax: str) -> None:
    """Put the pixel data of `ds`, single-frame or multi-frame, into `syntax`, with what the header says of it."""
    encoder, lossy = ENCODERS[UID(syntax)]
    if ds.file_meta.TransferSyntaxUID.is_encapsulated:
        raise ValueError("the pixel data are compressed already")
    before = len(ds.PixelData)
    encoder(ds)
    ds.file_meta.TransferSyntaxUID = UID(syntax)
    if UID(syntax).is_encapsulated:
        ds["PixelData"].is_undefined_length = True
    if lossy:
        ds.LossyImageCompression, ds.LossyImageCompressionMethod = "01", lossy
        ds.LossyImageCompressionRatio = f"{before / len(ds.PixelData):.4g}"


def stored_planes(ds: Dataset) -> list[Plane]:
    """The stored values of each frame of an uncompressed data set, in the type that its header names."""
    kind = "<i2" if ds.PixelRepresentation else "<u2"
    return list(np.frombuffer(ds.PixelData, kind).reshape(-1, ds.Rows, ds.Columns))


def _native(_: Dataset) -> None:
    """Written by pydicom as its transfer syntax says."""


def _big_endian(ds: Dataset) -> None:
    ds.PixelData = np.frombuffer(ds.PixelData, "<u2").astype(">u2").tobytes()


def _by_pydicom(syntax: UID, **options: Any) -> Encode:
    return lambda ds: ds.compress(syntax, generate_instance_uid=False, **options)


def _lossy_jpeg2000(ds: Dataset) -> None:
    """A signal to noise ratio that grows with the range: about one stored value of 12 bits, at any depth."""
    ds.compress(JPEG2000, generate_instance_uid=False, j2k_psnr=[70.0 + 6.02 * (ds.BitsStored - 12)])


def _by_imagecodecs(function: Callable[..., Any], **options: Any) -> Encode:
    def encoder(ds: Dataset) -> None:
        planes = [np.ascontiguousarray(plane) for plane in stored_planes(ds)]
        ds.PixelData = encapsulate([bytes(function(plane, **options)) for plane in planes])

    return encoder


def _jpeg(bits: int = 0, **options: Any) -> Encode:
    """JPEG knows no sign: the bit pattern in BitsStored bits is what is coded (PS3.5 section 8.2.1)."""

    def encoder(ds: Dataset) -> None:
        depth = bits or int(ds.BitsStored)
        mask = np.uint16((1 << depth) - 1)
        planes = [np.ascontiguousarray(plane.view(np.uint16) & mask) for plane in stored_planes(ds)]
        coded = [bytes(imagecodecs.jpeg_encode(plane, bitspersample=depth, **options)) for plane in planes]
        ds.PixelData = encapsulate(coded)

    return encoder


# transfer syntax -> (encoder, Lossy Image Compression Method or "")
ENCODERS: dict[UID, tuple[Encode, str]] = {
    ImplicitVRLittleEndian: (_native, ""),
    ExplicitVRLittleEndian: (_native, ""),
    ExplicitVRBigEndian: (_big_endian, ""),
    DeflatedExplicitVRLittleEndian: (_native, ""),
    RLELossless: (_by_pydicom(RLELossless), ""),
    JPEGLossless: (_jpeg(lossless=True, predictor=4), ""),
    JPEGLosslessSV1: (_jpeg(lossless=True, predictor=1), ""),
    JPEGExtended12Bit: (_jpeg(12, level=98), "ISO_10918_1"),
    JPEGLSLossless: (_by_pydicom(JPEGLSLossless), ""),
    JPEGLSNearLossless: (_by_pydicom(JPEGLSNearLossless, jls_error=NEAR), "ISO_14495_1"),
    JPEG2000Lossless: (_by_pydicom(JPEG2000Lossless), ""),
    JPEG2000: (_lossy_jpeg2000, "ISO_15444_1"),
    HTJ2KLossless: (_by_imagecodecs(imagecodecs.htj2k_encode, reversible=True, resolutions=5), ""),
    HTJ2KLosslessRPCL: (_by_imagecodecs(imagecodecs.htj2k_encode, reversible=True, resolutions=5, tlm=True), ""),
    HTJ2K: (_by_imagecodecs(imagecodecs.htj2k_encode, reversible=False, level=1e-5, resolutions=5), "ISO_15444_15"),
}

# the formats of stored values: (signed, bits stored, intercept)
FORMATS: dict[str, tuple[bool, int, int]] = {
    "unsigned 12 bit": (False, 12, -1024),
    "unsigned 16 bit": (False, 16, -8192),
    "signed 12 bit": (True, 12, 0),
    "signed 16 bit": (True, 16, 0),
}


def set_format(ds: Dataset, hu: Plane, name: str) -> None:
    """Store `hu` of one plane under a format of FORMATS, uncompressed."""
    signed, bits, intercept = FORMATS[name]
    stored = hu.astype(np.int32) - intercept
    ds.PixelRepresentation, ds.BitsStored, ds.HighBit = int(signed), bits, bits - 1
    ds.RescaleIntercept = intercept
    ds.PixelData = stored.astype("<i2" if signed else "<u2").tobytes()


def fits(syntax: str, name: str) -> bool:
    """Whether the encoding can hold the format: JPEG Extended stops at 12 bits."""
    return UID(syntax) != JPEGExtended12Bit or FORMATS[name][1] == 12


def largest_difference(one: Plane, other: Plane) -> float:
    """In Hounsfield units, of two volumes of one shape."""
    return float(np.abs(one.astype(np.float64) - other.astype(np.float64)).max())


def smooth_hu(shape: Sequence[int], *, low: int = -1000, high: int = 1900) -> Plane:
    """A ramp with texture, int16: what lossy coders are made for, over the values of a CT."""
    grids = np.meshgrid(*[np.linspace(0, 1, n) for n in shape], indexing="ij")
    wave = 0.5 + 0.5 * np.sin(6 * grids[1] + 4 * grids[2] + grids[0])
    noise = np.random.default_rng(8).normal(0, 4, shape)
    return np.clip(np.rint(low + (high - low) * wave + noise), low, high).astype(np.int16)
