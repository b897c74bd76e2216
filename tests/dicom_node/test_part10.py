"""The file meta information that a sender reads by hand, beside what pydicom reads."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.errors import InvalidDicomError
from pydicom.filereader import read_file_meta_info
from pydicom.uid import ExplicitVRLittleEndian
from pynetdicom.dsutils import split_dataset
from result_factory import write_instances

from dicom_node.net.part10 import read_part10

PREAMBLE = b"\0" * 128 + b"DICM"
DATA_SET = b"\x08\x00\x16\x00UI\x04\x001.2\x00"


def element(number: int, vr: bytes, value: bytes, *, group: int = 2) -> bytes:
    if vr in (b"OB", b"UN"):
        return struct.pack("<HH2sHI", group, number, vr, 0, len(value)) + value
    return struct.pack("<HH2sH", group, number, vr, len(value)) + value


UIDS = [
    element(0x0002, b"UI", b"1.2.840.10008.5.1.4.1.1.2\0"),
    element(0x0003, b"UI", b"1.2.3\0"),
    element(0x0010, b"UI", b"1.2.840.10008.1.2.1\0"),
]


def write(folder: Path, *elements: bytes, preamble: bytes = PREAMBLE, data_set: bytes = DATA_SET) -> Path:
    path = folder / "1.dcm"
    path.write_bytes(preamble + b"".join(elements) + data_set)
    return path


def test_a_file_of_pydicom_is_read_as_pydicom_reads_it(tmp_path: Path) -> None:
    (path,) = write_instances(tmp_path, 1)
    part, (_, data_set_at) = read_part10(path), split_dataset(path)
    meta = read_file_meta_info(path)
    assert (part.sop_class_uid, part.sop_instance_uid) == (
        meta.MediaStorageSOPClassUID,
        meta.MediaStorageSOPInstanceUID,
    )
    assert (part.transfer_syntax_uid, part.data_set_at) == (ExplicitVRLittleEndian, data_set_at)


def test_a_wrong_group_length_and_long_private_information_do_not_matter(tmp_path: Path) -> None:
    length = element(0x0000, b"UL", struct.pack("<I", 7))
    private = [element(0x0100, b"UI", b"1.2.3.4\0"), element(0x0102, b"OB", bytes(70_000))]
    path = write(tmp_path, length, *UIDS, *private)
    part = read_part10(path)
    assert (part.sop_instance_uid, part.transfer_syntax_uid) == ("1.2.3", "1.2.840.10008.1.2.1")
    assert path.read_bytes()[part.data_set_at :] == DATA_SET


def test_a_file_without_a_data_set_has_its_end_as_the_beginning(tmp_path: Path) -> None:
    path = write(tmp_path, *UIDS, data_set=b"")
    assert read_part10(path).data_set_at == path.stat().st_size


@pytest.mark.parametrize("left_out", range(3))
def test_a_file_that_lacks_a_uid_is_refused(tmp_path: Path, left_out: int) -> None:
    with pytest.raises(InvalidDicomError, match="no \\(0002,00"):
        read_part10(write(tmp_path, *(uid for number, uid in enumerate(UIDS) if number != left_out)))


@pytest.mark.parametrize(
    "content", [b"", b"no DICOM", PREAMBLE, PREAMBLE[:-1] + b"X" + UIDS[0], PREAMBLE + UIDS[0][:-3]]
)
def test_what_is_no_part_10_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "1.dcm"
    path.write_bytes(content)
    with pytest.raises(InvalidDicomError):
        read_part10(path)


@settings(max_examples=100, deadline=None)
@given(junk=st.binary(max_size=300), cut=st.integers(min_value=0, max_value=120))
def test_any_bytes_are_read_or_refused(tmp_path_factory: Any, junk: bytes, cut: int) -> None:
    path = tmp_path_factory.mktemp("junk") / "1.dcm"
    path.write_bytes(PREAMBLE + b"".join(UIDS)[: 120 - cut] + junk)
    try:
        part = read_part10(path)
    except InvalidDicomError:
        return
    assert 132 < part.data_set_at <= path.stat().st_size
