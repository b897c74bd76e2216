"""Lossless compression of result images on their way to one destination.

An instance keeps its SOP Instance UID: only how its pixels are encoded changes, not one of their values (PS3.5
section 8.2). It is compressed once, when it is first sent, and kept beside the original, so that every later
sending to a destination with the same setting has the same bytes, whatever release of an encoder is installed then.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from io import BytesIO
from pathlib import Path
from types import MappingProxyType

import imagecodecs
from pydicom import Dataset, dcmread
from pydicom.dataelem import RawDataElement
from pydicom.encaps import encapsulate
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_file_meta_info
from pydicom.pixels.encoders.base import get_encoder
from pydicom.uid import (
    UID,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    JPEG2000Lossless,
    JPEGLSLossless,
    PositronEmissionTomographyImageStorage,
    RLELossless,
    SecondaryCaptureImageStorage,
)

from storage.durable import make_folder, write_file

EXPLICIT = "explicit"  # `transfer_syntax` of a destination that gets the files as they are
TRANSFER_SYNTAXES: Mapping[str, UID] = MappingProxyType(
    {"rle": RLELossless, "jpeg-ls": JPEGLSLossless, "htj2k": HTJ2KLossless, "j2k": JPEG2000Lossless}
)
# The classes of ours with 8 or 16 bits a pixel. A SEG has one, for which only some of these are defined.
COMPRESSED_CLASSES = frozenset({str(SecondaryCaptureImageStorage), str(PositronEmissionTomographyImageStorage)})

_PLUGINS = {RLELossless: "pylibjpeg", JPEGLSLossless: "pyjpegls", JPEG2000Lossless: "pylibjpeg"}
_PREFIX_END = 132  # preamble and "DICM" (PS3.10 section 7.1)
_META_START = _PREFIX_END + 12  # after the group length element, whose value counts from here
_ENCAPSULATED = struct.pack("<HH2sHI", 0x7FE0, 0x0010, b"OB", 0, 0xFFFFFFFF)  # Pixel Data of undefined length
_SEQUENCE_END = struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
_HTJ2K_LEVELS = 5  # wavelet decompositions, as JPEG 2000 encoders do by default; imagecodecs' own default is none


def compressed_file(path: Path, transfer_syntax: str) -> Path:
    """The Part 10 file `path` in another transfer syntax (a key of TRANSFER_SYNTAXES), made when it is not there yet.

    It lies in a folder of that name beside the original, written durably and whole, and goes with its result.
    Raises `storage.errors.NoSpace` when the disk is full.
    """
    target = path.parent / transfer_syntax / path.name
    if not target.is_file():
        make_folder(target.parent)
        write_file(target, [compress(path.read_bytes(), transfer_syntax)])
    return target


def compress(data: bytes, transfer_syntax: str) -> bytes:
    """A Part 10 file in Explicit VR Little Endian with its pixels encapsulated losslessly (PS3.5 annex A.4).

    Around the pixels and the file meta's transfer syntax every byte stays: nothing is parsed and written again.
    Raises ValueError for a file in any other transfer syntax.
    """
    syntax = TRANSFER_SYNTAXES[transfer_syntax]
    ds = dcmread(BytesIO(data))
    if ds.file_meta.TransferSyntaxUID != ExplicitVRLittleEndian:
        raise ValueError(f"compressing an instance: it is in {ds.file_meta.TransferSyntaxUID.name}")
    pixels = ds.get_item("PixelData")
    assert isinstance(pixels, RawDataElement)  # nobody has asked for its value yet
    first = _META_START + ds.file_meta.FileMetaInformationGroupLength
    frames = encapsulate(list(_frames(ds, syntax)))
    ds.file_meta.TransferSyntaxUID = syntax
    meta = DicomBytesIO()
    write_file_meta_info(meta, ds.file_meta)
    return b"".join(
        (
            data[:_PREFIX_END],
            meta.getvalue(),
            data[first : pixels.value_tell - len(_ENCAPSULATED)],
            _ENCAPSULATED,
            frames,
            _SEQUENCE_END,
            data[pixels.value_tell + pixels.length :],
        )
    )


def _frames(ds: Dataset, syntax: UID) -> Iterator[bytes]:
    """The encoded frames. One encoder is named for each syntax: which one is installed must not decide the bytes."""
    if syntax == HTJ2KLossless:  # pydicom has no encoder for it
        for frame in ds.pixel_array.reshape(-1, ds.Rows, ds.Columns):
            yield bytes(imagecodecs.htj2k_encode(frame, reversible=True, resolutions=_HTJ2K_LEVELS))
    else:
        for encoded in get_encoder(syntax).iter_encode(ds, encoding_plugin=_PLUGINS[syntax]):
            yield bytes(encoded)
