"""Data sets that no scanner makes, for the assembler and the pipeline: mutated, nested, without end, bombs."""

from __future__ import annotations

import contextlib
import re
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from pathlib import Path

import pytest
import structlog
from hostile_tools import CT, forget_peak, mutated, peak_bytes
from hypothesis import HealthCheck, given, settings
from intake_tools import Intake, config, running_intake, small_ct
from pydicom import Dataset, dcmread
from pydicom.dataelem import DataElement
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pydicom.sequence import Sequence as DicomSequence
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from dicom_node.net.store import file_header
from pipeline.ct_reader import read_ct
from pipeline.errors import PipelineError
from pipeline.types import CtVolume
from storage.incoming_file import PREAMBLE_BYTES

# pytest makes errors of warnings, and the node does not
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
bounded = settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])

PEAK_GROWTH = 700 << 20  # bytes: a deflated data set may have 256 MiB, and is copied once
PIXELS = b"\xe0\x7f\x10\x00"
COMPRESSED = (RLELossless, JPEG2000Lossless, JPEGLSLossless, JPEGLosslessSV1)
EXPLICIT = str(ExplicitVRLittleEndian)
NO_END = 0xFFFFFFFF
ITEM, ITEM_END, SEQUENCE_END = b"\xfe\xff\x00\xe0", b"\xfe\xff\x0d\xe0\0\0\0\0", b"\xfe\xff\xdd\xe0\0\0\0\0"


def encoded(ds: Dataset) -> bytes:
    """The data set alone, Explicit VR Little Endian."""
    out = DicomBytesIO()
    out.is_little_endian, out.is_implicit_VR = True, False
    write_dataset(out, ds)
    return out.getvalue()


def element(group: int, number: int, vr: bytes, value: bytes, *, length: int | None = None) -> bytes:
    """An element, Explicit VR; `length` is what it claims."""
    claimed = len(value) if length is None else length
    if vr in (b"OB", b"OW", b"SQ", b"UN", b"UT"):
        return struct.pack("<HH2sHL", group, number, vr, 0, claimed) + value
    return struct.pack("<HH2sH", group, number, vr, claimed & 0xFFFF) + value


def nested(depth: int, *, to_the_end: bool) -> bytes:
    """Sequences in sequences, of undefined length."""
    begin = struct.pack("<HH2sHL", 0x0008, 0x1140, b"SQ", 0, NO_END) + ITEM + struct.pack("<L", NO_END)
    return begin * depth + (ITEM_END + SEQUENCE_END) * (depth if to_the_end else 0)


@pytest.fixture(scope="module")
def slices(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return small_ct(tmp_path_factory.mktemp("ct"), 4)


@pytest.fixture(scope="module")
def good(slices: list[Path]) -> bytes:
    return encoded(dcmread(slices[2]))


@pytest.fixture(scope="module")
def intake(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Intake]:
    with running_intake(tmp_path_factory.mktemp("intake"), config(), listen=False) as made:
        yield made


@pytest.fixture
def series(tmp_path: Path, slices: list[Path]) -> Callable[[bytes, str], list[Path]]:
    """The good series with this data set as its third slice."""

    def write(data_set: bytes, transfer_syntax: str = EXPLICIT) -> list[Path]:
        uid = dcmread(slices[2]).SOPInstanceUID
        bad = tmp_path / "bad.dcm"
        bad.write_bytes(
            bytes(PREAMBLE_BYTES)
            + file_header(sop_class_uid=CT, sop_instance_uid=uid, transfer_syntax=transfer_syntax)
            + data_set
        )
        return [slices[0], slices[1], bad, slices[3]]

    return write


def look(intake: Intake, uid: str, paths: Sequence[Path]) -> None:
    """The assembler gets the third of `paths`, and leaves it in a series or in quarantine; no step of it fails."""
    token = intake.registry.open(calling_ae="PACS", address="127.0.0.1", peer="pacs")
    assert token is not None
    with structlog.testing.capture_logs() as logs:
        intake.spool.store_incoming(token, uid, (paths[2].read_bytes()[PREAMBLE_BYTES:],))
        intake.registry.close(token)
        intake.assembler.tick()
    assert [line for line in logs if line["event"] == "assembler.step_failed"] == []
    assert intake.spool.incoming() == []


def volume_or_reason(paths: Sequence[Path]) -> CtVolume | str:
    """What the pipeline makes of them: a volume, or a code."""
    try:
        return read_ct(paths)
    except PipelineError as error:
        return error.code


@settings(bounded, suppress_health_check=[*HealthCheck])
@given(data_set=mutated(b"\0").flatmap(lambda _: mutated(_GOOD[0])))
def test_a_mutated_data_set_ends_in_a_series_or_in_quarantine(
    intake: Intake, series: Callable[[bytes, str], list[Path]], data_set: bytes
) -> None:
    look(intake, "1.2.3.4", series(data_set, EXPLICIT))


@settings(bounded, suppress_health_check=[*HealthCheck])
@given(data_set=mutated(b"\0").flatmap(lambda _: mutated(_GOOD[0], most=3)))
def test_a_series_with_a_mutated_slice_is_a_volume_or_refused_by_name(
    series: Callable[[bytes, str], list[Path]], data_set: bytes
) -> None:
    volume_or_reason(series(data_set, EXPLICIT))


_GOOD: list[bytes] = []


@pytest.fixture(scope="module", autouse=True)
def _known_to_strategies(good: bytes) -> None:
    _GOOD[:] = [good]


def head(good: bytes) -> bytes:
    """What is before the pixels."""
    return good.rpartition(PIXELS)[0]


def before_pixels(good: bytes, extra: bytes) -> bytes:
    head, _, pixels = good.rpartition(PIXELS)
    return head + extra + PIXELS + pixels


def changed(good: bytes, **values: object) -> bytes:
    ds = dcmread(
        BytesIO(
            bytes(PREAMBLE_BYTES)
            + file_header(sop_class_uid=CT, sop_instance_uid="1.2", transfer_syntax=EXPLICIT)
            + good
        )
    )
    for keyword, value in values.items():
        setattr(ds, keyword, value)
    return encoded(ds)


def frames(count: int) -> DataElement:
    item = Dataset()
    item.add_new(0x00181310, "US", 1)
    return DataElement(0x52009230, "SQ", DicomSequence([item] * count))


BOMBS: dict[str, Callable[[bytes], bytes]] = {
    "sequences 1000 deep": lambda good: before_pixels(good, nested(1000, to_the_end=True)),
    "sequences 20000 deep without end": lambda good: good[:200] + nested(20_000, to_the_end=False),
    "a sequence without end": lambda good: good + element(0x7FE1, 0x10, b"SQ", ITEM, length=NO_END),
    "an item of 4 GB": lambda good: before_pixels(
        good, element(0x5200, 0x9230, b"SQ", ITEM + struct.pack("<L", 0xFFFFFFFE), length=NO_END)
    ),
    "an element of 4 GB": lambda good: good[:200] + element(0x0009, 0x1010, b"OB", b"x", length=0xFFFFFFFE),
    "unknown VR without end": lambda good: before_pixels(good, element(0x4001, 0x1010, b"UN", b"", length=NO_END)),
    "pixel data of 4 GB": lambda good: (
        good.rpartition(PIXELS)[0] + element(0x7FE0, 0x10, b"OW", b"", length=NO_END - 1)
    ),
    "pixel data without end": lambda good: (
        good.rpartition(PIXELS)[0] + element(0x7FE0, 0x10, b"OB", b"", length=NO_END)
    ),
    "100000 elements": lambda good: before_pixels(
        good, b"".join(element(0x4001 + 2 * (n >> 15), n & 0x7FFF, b"LO", b"ab") for n in range(100_000))
    ),
    "65535 x 65535 pixels": lambda good: changed(good, Rows=65535, Columns=65535),
    "no pixels at all": lambda good: changed(good, Rows=0, Columns=0),
    "2 billion frames": lambda good: changed(good, NumberOfFrames=2**31 - 1),
    "minus one frame": lambda good: changed(good, NumberOfFrames=-1),
    "32 bits in 8": lambda good: changed(good, BitsAllocated=8, BitsStored=32, HighBit=31),
    "no bits": lambda good: changed(good, BitsAllocated=0, BitsStored=0, HighBit=0),
    "255 samples": lambda good: changed(good, SamplesPerPixel=255),
    "a character set that is none": lambda good: changed(good, SpecificCharacterSet="\\".join(["NO SUCH SET"] * 50)),
    "private creators everywhere": lambda good: before_pixels(
        good, b"".join(element(0x4001, n, b"LO", b"CREATOR ") for n in range(0x10, 0x100))
    ),
    "10000 groups of frames": lambda good: changed(good, **{"PerFrameFunctionalGroupsSequence": frames(10_000).value}),
    "a rescale slope that is no number": lambda good: good.replace(b"RescaleSlope", b"").replace(
        struct.pack("<HH", 0x0028, 0x1053) + b"DS", struct.pack("<HH", 0x0028, 0x1053) + b"LO"
    ),
    "nothing": lambda _: b"",
    "zeros": lambda _: bytes(100_000),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_taken_or_refused_and_bounded(
    intake: Intake, series: Callable[[bytes, str], list[Path]], good: bytes, name: str
) -> None:
    before = forget_peak()
    paths = series(BOMBS[name](good), EXPLICIT)
    look(intake, "1.2.3.5", paths)
    volume_or_reason(paths)
    assert peak_bytes() - before < PEAK_GROWTH


def test_a_deflated_bomb_is_set_aside_before_it_fills_the_memory(
    intake: Intake, series: Callable[[bytes, str], list[Path]], good: bytes
) -> None:
    deflate = zlib.compressobj(1, wbits=-zlib.MAX_WBITS)
    size = 300 << 20
    begin = good.rpartition(PIXELS)[0] + element(0x7FE0, 0x10, b"OW", b"", length=size)
    chunks = [deflate.compress(begin), *(deflate.compress(bytes(1 << 24)) for _ in range(size >> 24)), deflate.flush()]
    before = forget_peak()
    paths = series(b"".join(chunks), str(DeflatedExplicitVRLittleEndian))
    look(intake, "1.2.3.6", paths)
    assert volume_or_reason(paths) in ("too_large", "not_dicom", "undecodable_pixel_data")
    assert peak_bytes() - before < PEAK_GROWTH


@pytest.mark.parametrize("syntax", COMPRESSED, ids=lambda uid: re.sub(r"\W+", "-", uid.name))
@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\xff" * 64,
        b"\x01\0\0\0\x40\0\0\0" + bytes(56) + b"\x81\x00" * 50_000,
        b"\x0f\0\0\0" + b"\xff\xff\xff\x7f" * 15 + b"x" * 100,
        b"\xff\xd8\xff\xf7\x00\x0b\x08\xff\xff\xff\xff\x01\x01\x11\x00" + b"\xff\xd9",
        b"\xff\xd8\xff\xc3\x00\x0b\x10\xff\xff\xff\xff\x01\x01\x11\x00\xff\xd9",
        b"\xff\x4f\xff\x51\x00\x29\x00\x00" + b"\x7f\xff\xff\xff" * 2 + bytes(8) + b"\x7f\xff\xff\xff" * 2 + bytes(12),
    ],
    ids=["empty", "ff", "rle-run", "rle-offsets", "jpeg-ls-65535", "jpeg-65535", "j2k-2-billion"],
)
def test_compressed_pixels_that_lie_are_refused_and_bounded(
    series: Callable[[bytes, str], list[Path]], good: bytes, syntax: str, frame: bytes
) -> None:
    even = frame + b"\0" * (len(frame) % 2)
    fragments = ITEM + struct.pack("<L", 0) + ITEM + struct.pack("<L", len(even)) + even + SEQUENCE_END
    data_set = good.rpartition(PIXELS)[0] + element(0x7FE0, 0x10, b"OB", fragments, length=NO_END)
    before = forget_peak()
    assert isinstance(volume_or_reason(series(data_set, str(syntax))), str)
    assert peak_bytes() - before < PEAK_GROWTH


def test_after_all_that_a_good_study_becomes_a_job(intake: Intake, tmp_path: Path) -> None:
    paths = small_ct(tmp_path / "good", 4)
    intake.put(paths)
    with contextlib.suppress(KeyError):
        intake.pass_time(400)
        intake.pass_time(400)
    job = intake.job(dcmread(paths[0]).SeriesInstanceUID)
    assert job.state == "QUEUED"
