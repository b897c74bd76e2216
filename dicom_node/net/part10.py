"""What a sender has to know of a Part 10 file before it sends it: its file meta information (PS3.10 section 7.1)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydicom.filereader import read_file_meta_info
from pydicom.uid import ExplicitVRLittleEndian

from dicom_node.net.compression import COMPRESSED_CLASSES, EXPLICIT


@dataclass(frozen=True, kw_only=True, slots=True)
class Part10:
    """One instance in its file."""

    path: Path
    sop_class_uid: str
    sop_instance_uid: str
    transfer_syntax_uid: str


def read_part10(path: Path) -> Part10:
    """Read only that. Raises `OSError`, `InvalidDicomError`, or `AttributeError` when something is missing."""
    meta = read_file_meta_info(path)
    return Part10(
        path=path,
        sop_class_uid=str(meta.MediaStorageSOPClassUID),
        sop_instance_uid=str(meta.MediaStorageSOPInstanceUID),
        transfer_syntax_uid=str(meta.TransferSyntaxUID),
    )


def to_compress(part: Part10, transfer_syntax: str) -> bool:
    """Whether this instance is to go out in another syntax than its file's (a destination's `transfer_syntax`)."""
    native = part.transfer_syntax_uid == ExplicitVRLittleEndian
    return transfer_syntax != EXPLICIT and native and part.sop_class_uid in COMPRESSED_CLASSES
