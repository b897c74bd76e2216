"""What a compressed frame claims of its size is read as the decoders would."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from ct_factory import write_ct
from pydicom import dcmread
from pydicom.encaps import generate_frames
from pydicom.uid import JPEG2000Lossless, JPEGLSLossless

from pipeline.codestream import claimed_sizes


@pytest.mark.parametrize("syntax", [JPEG2000Lossless, JPEGLSLossless])
def test_the_size_of_a_real_frame_is_its_images(tmp_path: Path, syntax: str) -> None:
    (path,) = write_ct(tmp_path, np.zeros((1, 64, 48), np.int16), transfer_syntax=syntax)
    (frame,) = generate_frames(dcmread(path).PixelData, number_of_frames=1)
    assert claimed_sizes(frame) == [(64, 48, 1)]


@pytest.mark.parametrize(
    ("frame", "sizes"),
    [
        (b"", []),
        (b"\xff\xd8", []),
        (b"\xff\xd8\xff\xe0\x00\x04ab\xff\xc3\x00\x0b\x10\x00\x18\x00\x28\x01\x01\x11\x00\xff\xda", [(24, 40, 1)]),
        (b"\xff\xd8\xff\xff\xff\xf7\x00\x0b\x10\xff\xff\xff\xff\x03\x01\x11\x00", [(65535, 65535, 3)]),
        (b"\xff\xd8" + 2 * b"\xff\xc0\x00\x0b\x08\x00\x08\x00\x08\x01\x01\x11\x00", [(8, 8, 1), (8, 8, 1)]),
        (b"\xff\xd8\xff\xf8\x00\x0a\x04\x04\xff\xff\xff\xff\xff\xff", [(0, 0, 0)]),
        (b"\xff\xd8\xff\xda\x00\x02\xff\xc3\x00\x0b\x10\xff\xff\xff\xff\x01", []),
        (b"\xff\x4f\xff\x51\x00\x29", [(0, 0, 0)]),
        (b"\x01\0\0\0" + bytes(60), []),
    ],
)
def test_headers_are_read_up_to_the_first_scan(frame: bytes, sizes: list[tuple[int, int, int]]) -> None:
    assert claimed_sizes(frame) == sizes
