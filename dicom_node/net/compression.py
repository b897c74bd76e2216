"""Lossless compression of result images on their way to one destination.

An instance keeps its SOP Instance UID: only how its pixels are encoded changes, not one of their values (PS3.5
section 8.2). It is compressed once, when it is first sent, and kept beside the original, so that every later
sending to a destination with the same setting has the same bytes, whatever release of an encoder is installed then.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from io import BytesIO
from pathlib import Path
from types import MappingProxyType

import imagecodecs
from pydicom import Dataset, dcmread
from pydicom.encaps import encapsulate
from pydicom.pixels import get_encoder
from pydicom.uid import (
    UID,
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
    """An uncompressed Part 10 file with its pixels encapsulated losslessly (PS3.5 annex A.4); all else is unchanged."""
    syntax = TRANSFER_SYNTAXES[transfer_syntax]
    ds = dcmread(BytesIO(data))
    ds.PixelData = encapsulate(list(_frames(ds, syntax)))
    ds["PixelData"].VR = "OB"
    ds["PixelData"].is_undefined_length = True
    ds.file_meta.TransferSyntaxUID = syntax
    buffer = BytesIO()
    ds.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def _frames(ds: Dataset, syntax: UID) -> Iterator[bytes]:
    """The encoded frames. One encoder is named for each syntax: which one is installed must not decide the bytes."""
    if syntax == HTJ2KLossless:  # pydicom has no encoder for it
        for frame in ds.pixel_array.reshape(-1, ds.Rows, ds.Columns):
            yield imagecodecs.htj2k_encode(frame, reversible=True, resolutions=_HTJ2K_LEVELS)
    else:
        yield from get_encoder(syntax).iter_encode(ds, encoding_plugin=_PLUGINS[syntax])
