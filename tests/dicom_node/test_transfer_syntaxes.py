"""Every transfer syntax that CT is accepted in: by C-STORE into the volume, with the values that were sent."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from ct_factory import write_ct
from encoded_ct import ENCODERS, FORMATS, NEAR, encode, encode_file, fits, largest_difference, set_format, smooth_hu
from enhanced_ct import write_enhanced
from intake_tools import Intake, config, running_intake
from pydicom import Dataset, dcmread
from pydicom.encaps import generate_frames
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    UID,
    CTImageStorage,
    EnhancedCTImageStorage,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from dicom_node.net import scp
from dicom_node.net.scp import ct_transfer_syntaxes
from pipeline.ct_reader import read_ct
from pipeline.errors import UnsupportedSeries

SHAPE = (3, 40, 36)
HU = smooth_hu(SHAPE)
# by how many Hounsfield units a lossy encoding of these tests may differ; every other one is exact
BOUNDS_HU = {JPEGLSNearLossless: NEAR, JPEGExtended12Bit: 8, JPEG2000: 8, HTJ2K: 4}


@pytest.fixture(scope="module")
def intake(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Intake]:
    with running_intake(tmp_path_factory.mktemp("node"), config(node={"max_associations": 4})) as running:
        yield running


def name_of(uid: UID) -> str:
    return uid.name


def formatted(folder: Path, name: str) -> list[Path]:
    return write_ct(folder, HU, modify=lambda ds, k: set_format(ds, HU[k], name))


def through_the_node(intake: Intake, paths: Sequence[Path]) -> list[Path]:
    """Send the files in the transfer syntax that they have; what the node keeps of them."""
    first = dcmread(paths[0], stop_before_pixels=True)
    before = set(intake.spool.incoming())
    with intake.association([(first.SOPClassUID, (first.file_meta.TransferSyntaxUID,))]) as assoc:
        assert [assoc.send_c_store(path).Status for path in paths] == [0x0000] * len(paths)
    kept = sorted(set(intake.spool.incoming()) - before)
    assert len(kept) == len(paths)
    assert {dcmread(path, stop_before_pixels=True).file_meta.TransferSyntaxUID for path in kept} == {
        first.file_meta.TransferSyntaxUID
    }
    return kept


def test_what_is_negotiated_is_what_these_tests_decode() -> None:
    """JPEG Baseline has 8 bits, which no CT has: it is taken so that routing does not stall, and refused by name."""
    assert set(ct_transfer_syntaxes()) == {*ENCODERS, JPEGBaseline8Bit}


def test_a_syntax_without_a_decoder_on_this_machine_is_not_negotiated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scp, "_can_decode", lambda uid: uid != JPEG2000Lossless)
    ct_transfer_syntaxes.cache_clear()
    try:
        assert set(ENCODERS) - set(ct_transfer_syntaxes()) == {JPEG2000Lossless}
    finally:
        ct_transfer_syntaxes.cache_clear()


@pytest.mark.parametrize("syntax", ENCODERS, ids=name_of)
def test_a_ct_in_this_syntax_has_the_values_that_were_sent(intake: Intake, tmp_path: Path, syntax: UID) -> None:
    bound = BOUNDS_HU.get(syntax, 0)
    for number, name in enumerate(name for name in FORMATS if fits(syntax, name)):
        paths = formatted(tmp_path / str(number), name)
        for path in paths:
            encode_file(path, syntax)
        ct = read_ct(through_the_node(intake, paths))
        assert largest_difference(ct.hu, HU) <= bound, name
        assert ct.source.lossy == (bound > 0), name


@pytest.mark.parametrize("syntax", ENCODERS, ids=name_of)
def test_an_enhanced_ct_in_this_syntax_has_the_values_that_were_sent(
    intake: Intake, tmp_path: Path, syntax: UID
) -> None:
    paths = write_enhanced(tmp_path, formatted(tmp_path / "classic", "signed 12 bit"), transfer_syntax=syntax)
    ct = read_ct(through_the_node(intake, paths))
    assert largest_difference(ct.hu, HU) <= BOUNDS_HU.get(syntax, 0)
    assert [one.frame_number for one in ct.source.instances] == [1, 2, 3]
    assert {one.sop_class_uid for one in ct.source.instances} == {EnhancedCTImageStorage}


def test_jpeg_baseline_is_taken_and_the_series_refused_by_name(intake: Intake, tmp_path: Path) -> None:
    def eight_bits(ds: Dataset, _: int) -> None:
        ds.BitsAllocated, ds.BitsStored, ds.HighBit = 8, 8, 7

    paths = write_ct(tmp_path, HU, modify=eight_bits)
    for path in paths:
        ds = dcmread(path)
        ds.PixelData = bytes(8)
        ds.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
        ds["PixelData"].is_undefined_length = True
        ds.PixelData = b"\xfe\xff\x00\xe0\0\0\0\0\xfe\xff\x00\xe0\x04\0\0\0\xff\xd8\xff\xd9"
        ds.save_as(path)
    kept = through_the_node(intake, paths)
    with pytest.raises(UnsupportedSeries, match="unsupported_pixel_format"):
        read_ct(kept)


# -- DCMTK's encoders, sent by DCMTK


DCMTK = {
    "lossless, selection value 1": (("dcmcjpeg", "+e1"), JPEGLosslessSV1, 0),
    "lossless, selection value 6": (("dcmcjpeg", "+el", "+sv", "6"), JPEGLossless, 0),
    "lossless, in fragments of 1 kB": (("dcmcjpeg", "+e1", "+fs", "1"), JPEGLosslessSV1, 0),
    "lossless, empty offset table": (("dcmcjpeg", "+e1", "-ot"), JPEGLosslessSV1, 0),
    "JPEG-LS lossless": (("dcmcjpls", "+el"), JPEGLSLossless, 0),
    "JPEG-LS near-lossless": (("dcmcjpls", "+en", "+md", "2"), JPEGLSNearLossless, 2),
    "RLE": (("dcmcrle",), RLELossless, 0),
}


@pytest.mark.parametrize("case", DCMTK)
def test_what_dcmtk_compresses_and_sends_has_its_values(intake: Intake, tmp_path: Path, case: str) -> None:
    command, syntax, bound = DCMTK[case]
    if not shutil.which(command[0]):
        pytest.skip("DCMTK is not installed")
    before = set(intake.spool.incoming())
    near = syntax == JPEGLSNearLossless  # DCMTK does it for unsigned values only
    for path in formatted(tmp_path, "unsigned 16 bit" if near else "signed 16 bit"):
        subprocess.run([*command, str(path), f"{path}.coded"], check=True, capture_output=True)
        path.unlink()
    sent = sorted(tmp_path.glob("*.coded"))
    here = ("-aet", "PACS", "-aec", "SYNPET", "127.0.0.1", str(intake.port))
    subprocess.run(["dcmsend", "--decompress-never", *here, *map(str, sent)], check=True, capture_output=True)
    kept = sorted(set(intake.spool.incoming()) - before)
    assert {dcmread(path, stop_before_pixels=True).file_meta.TransferSyntaxUID for path in kept} == {syntax}
    assert largest_difference(read_ct(kept).hu, HU) <= bound


# -- padding and odd fragments


@pytest.mark.parametrize("syntax", [JPEGLSLossless, JPEG2000Lossless, RLELossless, JPEGLossless], ids=name_of)
@pytest.mark.parametrize("name", ["signed 16 bit", "unsigned 16 bit"])
def test_padding_is_air_after_decoding(tmp_path: Path, syntax: UID, name: str) -> None:
    signed, _, intercept = FORMATS[name]
    padding = -3000 - intercept

    def padded(ds: Dataset, k: int) -> None:
        hu = HU[k].copy()
        hu[:4] = -3000
        hu[4] = -2500
        set_format(ds, hu, name)
        ds.add_new("PixelPaddingValue", "SS" if signed else "US", padding)
        ds.add_new("PixelPaddingRangeLimit", "SS" if signed else "US", padding + 500)
        encode(ds, syntax)

    paths = write_ct(tmp_path, HU)
    for k, path in enumerate(paths):
        ds = dcmread(path)
        padded(ds, k)
        ds.save_as(path)
    ct = read_ct(paths)
    assert np.all(ct.hu[:, :5] == -1024)
    assert np.array_equal(ct.hu[:, 5:], np.maximum(HU[:, 5:], -1024))


def item(data: bytes) -> bytes:
    return b"\xfe\xff\x00\xe0" + len(data).to_bytes(4, "little") + data


def refragmented(path: Path, *, table: bytes | None, pieces: int, odd: bool) -> None:
    """Write the one frame of `path` anew, as no careful writer would: `table` None leaves the offset table out."""
    ds = dcmread(path)
    encode(ds, JPEGLSLossless)
    (frame,) = generate_frames(ds.PixelData, number_of_frames=1)
    size = len(frame) // pieces // 2 * 2 + (1 if odd else 0)
    parts = [frame[k * size : (k + 1) * size] for k in range(pieces - 1)]
    parts.append(frame[(pieces - 1) * size :])
    parts[-1] += b"\0" * (sum(map(len, parts)) % 2)  # the whole is even: pydicom would pad it
    ds.PixelData = (b"" if table is None else item(table)) + b"".join(map(item, parts))
    ds["PixelData"].is_undefined_length = True
    ds.save_as(path)


@pytest.mark.parametrize(("pieces", "odd"), [(1, False), (3, False), (3, True)], ids=["whole", "even", "odd"])
@pytest.mark.parametrize("table", [b"", b"\0\0\0\0"], ids=["empty table", "offset table"])
def test_a_frame_is_read_however_it_is_cut(tmp_path: Path, table: bytes, pieces: int, odd: bool) -> None:
    paths = write_ct(tmp_path, HU)
    for path in paths:
        refragmented(path, table=table, pieces=pieces, odd=odd)
    assert np.array_equal(read_ct(paths).hu, HU)


def test_pixel_data_without_an_offset_table_item_are_refused_by_name(tmp_path: Path) -> None:
    """PS3.5 annex A.4 asks for the item, empty or not: without it the first fragment stands in its place."""
    paths = write_ct(tmp_path, HU)
    for path in paths:
        refragmented(path, table=None, pieces=1, odd=False)
    with pytest.raises(UnsupportedSeries, match="undecodable_pixel_data"):
        read_ct(paths)


def test_each_syntax_is_named_with_its_decoder_in_the_order_of_preference(intake: Intake) -> None:
    """Where a context offers several, native comes first, then lossless, then lossy."""
    order = ct_transfer_syntaxes()
    lossy = [order.index(uid) for uid in BOUNDS_HU]
    lossless = [order.index(uid) for uid in (JPEGLSLossless, JPEG2000Lossless, JPEGLosslessSV1, RLELossless)]
    assert max(lossless) < min(lossy)
    with intake.association([(CTImageStorage, (JPEG2000, JPEGLSLossless, JPEGLSNearLossless))]) as assoc:
        assert assoc.accepted_contexts[0].transfer_syntax == [JPEGLSLossless]
