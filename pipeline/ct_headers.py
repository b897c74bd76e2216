"""One CT file's headers: everything the volume needs, checked once, as `Frame`s.

A classic CT Image is one frame; an Enhanced (or Legacy Converted Enhanced) CT Image is many, whose attributes sit
in shared and per-frame functional groups (PS3.3 A.38, C.7.6.16). Values are hostile input: every one is checked
for presence, count, finiteness and range, and only valid UIDs are ever quoted in an error.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import pydicom
from pydicom import Dataset
from pydicom.errors import InvalidDicomError
from pydicom.uid import (
    UID,
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    EnhancedCTImageStorage,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLSNearLossless,
    LegacyConvertedEnhancedCTImageStorage,
)

from pipeline.codestream import MAX_INFLATED_BYTES, inflates_to_more
from pipeline.ct_groups import Concatenation, FunctionalGroups, values_of
from pipeline.errors import UnsupportedSeries

CLASSIC = {CTImageStorage}
ENHANCED = {EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage}
LOSSY_SYNTAXES = {JPEGBaseline8Bit, JPEGExtended12Bit, JPEGLSNearLossless}  # the others can be lossless: the flag says
HU_TYPES = {"", "HU", "US", "HU_MOD"}  # RescaleType (PS3.3 C.11.1.1.2); US: unspecified, what older CT writes
MIN_BITS_STORED = 10  # 1,024 levels: fewer cannot hold air and soft tissue apart (the CT Image IOD asks for 12 to 16)
MAX_MATRIX = 4096  # rows or columns: no CT detector reconstructs more
MAX_COORDINATE_MM = 1e5
UNDEFINED_LENGTH = 0xFFFFFFFF

_PIXEL_DATA = b"\x7f\xe0\x00\x10"
_UID = re.compile(r"[0-9]+(\.[0-9]+)*")
_DATE = re.compile(r"\d{8}")
_TIME = re.compile(r"\d{2,6}(\.\d{1,6})?")

PIXEL_TAGS = [
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "NumberOfFrames",
    "Rows",
    "Columns",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
]
HEADER_TAGS = [
    *PIXEL_TAGS,
    *("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"),
    *("Modality", "ImageType", "LossyImageCompression", "SeriesNumber"),
    *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"),
    *("RescaleSlope", "RescaleIntercept", "RescaleType", "PixelPaddingValue", "PixelPaddingRangeLimit"),
    *("AcquisitionDate", "AcquisitionTime", "AcquisitionDateTime"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
    *("ConcatenationUID", "InConcatenationNumber", "InConcatenationTotalNumber"),
]


@dataclass(frozen=True, kw_only=True, slots=True)
class PixelFormat:
    """How the stored values of one file are to be read (PS3.5 section 8).

    `offset` is where the value of Pixel Data begins in the file, or -1 when the file must be inflated first.
    `padding` is the closed range of stored values that are no measurement (PS3.3 C.7.5.1.1.2), or None.
    """

    transfer_syntax: UID
    rows: int
    columns: int
    bits_stored: int
    high_bit: int
    signed: bool
    padding: tuple[int, int] | None
    offset: int

    @property
    def frame_bytes(self) -> int:
        return self.rows * self.columns * 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Frame:
    """One CT plane: where it lies (LPS, mm) and how its stored values become Hounsfield units.

    The UIDs of study, series and Frame of Reference are "" where the file has none.
    """

    path: Path
    index: int  # of the frame in its file
    sop_class_uid: str
    sop_instance_uid: str
    study_uid: str
    series_uid: str
    frame_of_reference_uid: str
    position: tuple[float, float, float]  # center of the first pixel
    orientation: tuple[float, ...]  # direction cosines along a row (3), then along a column (3)
    pixel_spacing_mm: tuple[float, float]  # between rows, between columns
    pixels: PixelFormat
    slope: float
    intercept: float
    acquired: tuple[str, str]  # DA, TM, or ("", "")
    lossy: bool
    of: int = 1  # frames in its file
    kind: tuple[str, ...] = ()  # Frame Type of a multi-frame image, upper case
    stack_id: str = ""
    temporal_position: str = ""
    concatenation: Concatenation | None = None

    @property
    def number(self) -> int:
        """Frame Number, from 1 (PS3.3 C.7.6.16.1.1); 0 for a single-frame image, which has none."""
        return self.index + 1 if self.sop_class_uid in ENHANCED else 0


def frames_of(path: Path, name: str, *, max_frames: int) -> tuple[Frame, ...]:
    """The frames of the file at `path` that are no localizers. `name` stands for the file in messages.

    Raises UnsupportedSeries: not_dicom, not_ct, missing_attribute, unsupported_pixel_format, no_pixel_data,
    truncated_pixel_data, unsupported_geometry, too_large.
    """
    with path.open("rb") as file:
        ds = parse(file, name)
        sop_class = _text(ds, "SOPClassUID") or _text(ds.file_meta, "MediaStorageSOPClassUID")
        if sop_class not in CLASSIC | ENHANCED or _text(ds, "Modality") not in ("CT", ""):
            known = UID(sop_class).name if _UID.fullmatch(sop_class) else "without a valid SOP Class UID"
            raise UnsupportedSeries("not_ct", f"{name} is no CT image but {known}")
        if is_localizer(ds):
            return ()
        sop_instance_uid = _sop_instance_uid(ds, name)
        name = f"instance {sop_instance_uid}"
        pixels = _pixel_format(ds, file, name)
    count = _frame_count(ds, sop_class, name, max_frames)
    _check_length(path, pixels, count, name)
    groups = FunctionalGroups(ds)
    part = _concatenation(ds, name) if sop_class in ENHANCED else None
    wanted = (k for k in range(count) if not is_localizer_type(groups.frame_type(k)))
    frames = (_frame(groups, path, k, (sop_class, sop_instance_uid), pixels) for k in wanted)
    return tuple(replace(frame, of=count, concatenation=part) for frame in frames)


def parse(file: IO[bytes], name: str) -> Dataset:
    """The header elements that the reader looks at; `file` is left at the pixel data. Raises not_dicom, too_large."""
    try:
        if inflates_to_more(Path(file.name)):
            text = f"{name}: the deflated data set is larger than {MAX_INFLATED_BYTES >> 20} MiB"
            raise UnsupportedSeries("too_large", text)
        return pydicom.dcmread(file, stop_before_pixels=True, specific_tags=list(HEADER_TAGS))
    except UnsupportedSeries:
        raise
    except InvalidDicomError as error:
        raise UnsupportedSeries("not_dicom", f"{name} is not a DICOM file (no DICM prefix)") from error
    except Exception as error:  # a parser fed with hostile bytes: whatever it raises, the file is unreadable
        text = f"{name} cannot be parsed as DICOM ({type(error).__name__})"
        raise UnsupportedSeries("not_dicom", text) from error


def is_localizer(ds: Dataset) -> bool:
    """Whether Image Type (or the shared Frame Type) says LOCALIZER (PS3.3 C.8.2.1.1.1, C.8.16.1.3)."""
    kinds = values_of(ds, "ImageType")
    for group in values_of(ds, "SharedFunctionalGroupsSequence"):
        for item in values_of(group, "CTImageFrameTypeSequence"):
            kinds += values_of(item, "FrameType")
    return is_localizer_type(kinds)


def is_localizer_type(kind: Iterable[object]) -> bool:
    """Whether one value of an Image Type or Frame Type says LOCALIZER."""
    return any("LOCALIZER" in str(value).upper() for value in kind)


def uid_of(ds: Dataset, keyword: str, name: str, *, required: bool = True) -> str:
    """A valid UID (PS3.5 section 9.1), or "" where it is absent and not `required`. Raises missing_attribute."""
    text = _text(ds, keyword)
    if not text and not required:
        return ""
    if not text:
        raise UnsupportedSeries("missing_attribute", f"{name} has no {keyword}")
    if len(text) > 64 or not _UID.fullmatch(text):
        raise UnsupportedSeries("missing_attribute", f"{name} has a {keyword} that is not a valid UID")
    return text


def _sop_instance_uid(ds: Dataset, name: str) -> str:
    """The data set's own, else the file meta information's, which is the same by PS3.10 section 7.1."""
    if not _text(ds, "SOPInstanceUID") and _text(ds.file_meta, "MediaStorageSOPInstanceUID"):
        return uid_of(ds.file_meta, "MediaStorageSOPInstanceUID", name)
    return uid_of(ds, "SOPInstanceUID", name)


def _frame(groups: FunctionalGroups, path: Path, index: int, sop: tuple[str, str], pixels: PixelFormat) -> Frame:
    name = f"instance {sop[1]}"
    ds = groups.ds
    content = groups.of(index, "FrameContentSequence")
    position, orientation, spacing = _plane(groups, index, name)
    slope, intercept = _rescale(groups.of(index, "PixelValueTransformationSequence"), name)
    return Frame(
        path=path,
        index=index,
        sop_class_uid=sop[0],
        sop_instance_uid=sop[1],
        study_uid=uid_of(ds, "StudyInstanceUID", name, required=False),
        series_uid=uid_of(ds, "SeriesInstanceUID", name, required=False),
        frame_of_reference_uid=uid_of(ds, "FrameOfReferenceUID", name, required=False),
        position=(position[0], position[1], position[2]),
        orientation=tuple(orientation),
        pixel_spacing_mm=(spacing[0], spacing[1]),
        pixels=pixels,
        slope=slope,
        intercept=intercept,
        acquired=_acquired(content, ds),
        lossy=_text(ds, "LossyImageCompression") == "01" or pixels.transfer_syntax in LOSSY_SYNTAXES,
        kind=groups.frame_type(index),
        stack_id=_text(content, "StackID"),
        temporal_position=_text(content, "TemporalPositionIndex"),
    )


def _rescale(rescale: Dataset, name: str) -> tuple[float, float]:
    """Slope and intercept of the Pixel Value Transformation (PS3.3 C.7.6.16.2.9) or of the Modality LUT module."""
    if _text(rescale, "RescaleType").upper() not in HU_TYPES:
        raise UnsupportedSeries("unsupported_pixel_format", f"{name} has a RescaleType other than HU")
    (slope,) = _numbers(rescale, "RescaleSlope", 1, name)
    (intercept,) = _numbers(rescale, "RescaleIntercept", 1, name)
    if slope == 0:
        raise UnsupportedSeries("unsupported_pixel_format", f"{name} has a RescaleSlope of 0")
    return slope, intercept


def _plane(groups: FunctionalGroups, index: int, name: str) -> tuple[list[float], list[float], list[float]]:
    """Position, orientation and pixel spacing of one frame. Raises projection_image for what is no slice."""
    if (technique := groups.projection(index)) is not None:
        text = f"{name} holds projections of a volume ({technique}), slices are expected"
        raise UnsupportedSeries("projection_image", text)
    position = _numbers(groups.of(index, "PlanePositionSequence"), "ImagePositionPatient", 3, name)
    orientation = _numbers(groups.of(index, "PlaneOrientationSequence"), "ImageOrientationPatient", 6, name)
    spacing = _numbers(groups.of(index, "PixelMeasuresSequence"), "PixelSpacing", 2, name)
    if max(map(abs, position)) > MAX_COORDINATE_MM or not 0.01 <= min(spacing) <= max(spacing) <= 100:
        text = f"{name} lies at {position} mm with a pixel spacing of {spacing} mm, which no scanner has"
        raise UnsupportedSeries("unsupported_geometry", text)
    return position, orientation, spacing


def _concatenation(ds: Dataset, name: str) -> Concatenation | None:
    """Of which whole this file is a part, or None (PS3.3 C.7.6.16.2.2.4)."""
    uid = uid_of(ds, "ConcatenationUID", name, required=False)
    if not uid:
        return None
    number = _integer(ds, "InConcatenationNumber", name, default=0)
    total = _integer(ds, "InConcatenationTotalNumber", name, default=0)
    return Concatenation(uid=uid, number=number, total=total)


def _frame_count(ds: Dataset, sop_class: str, name: str, max_frames: int) -> int:
    count = _integer(ds, "NumberOfFrames", name, default=1)
    if sop_class in CLASSIC and count != 1:
        raise UnsupportedSeries("unsupported_pixel_format", f"{name} is a CT Image of {count} frames, 1 is expected")
    if count < 1:
        raise UnsupportedSeries("missing_attribute", f"{name} has a NumberOfFrames of {count}, at least 1 is expected")
    if count > max_frames:
        raise UnsupportedSeries("too_large", f"{name} has {count} frames, at most {max_frames} are accepted")
    if sop_class in ENHANCED and len(values_of(ds, "PerFrameFunctionalGroupsSequence")) != count:
        raise UnsupportedSeries("missing_attribute", f"{name} has no functional groups for each of {count} frames")
    return count


def _pixel_format(ds: Dataset, file: IO[bytes], name: str) -> PixelFormat:
    """Checks the Image Pixel module (PS3.3 C.7.6.3); `file` stands at the pixel data."""

    def refuse(found: str, expected: str) -> UnsupportedSeries:
        return UnsupportedSeries("unsupported_pixel_format", f"{name} has {found}, {expected} is expected")

    samples = _integer(ds, "SamplesPerPixel", name, default=1)
    if samples != 1 or _text(ds, "PhotometricInterpretation") != "MONOCHROME2":
        raise refuse(f"{samples} samples per pixel or a photometric interpretation of its own", "MONOCHROME2")
    allocated = _integer(ds, "BitsAllocated", name)
    stored = _integer(ds, "BitsStored", name, default=allocated)
    high_bit = _integer(ds, "HighBit", name, default=stored - 1)
    if allocated != 16:
        raise refuse(f"{allocated} bits allocated", "16")
    if not MIN_BITS_STORED <= stored <= 16 or not stored - 1 <= high_bit <= 15:
        raise refuse(f"{stored} bits stored with high bit {high_bit}", f"{MIN_BITS_STORED} to 16 within 16")
    rows, columns = (_integer(ds, keyword, name) for keyword in ("Rows", "Columns"))
    if not (2 <= rows <= MAX_MATRIX and 2 <= columns <= MAX_MATRIX):
        raise refuse(f"{rows} rows and {columns} columns", f"2 to {MAX_MATRIX}")
    syntax = UID(str(ds.file_meta.get("TransferSyntaxUID", "")))
    if not syntax.is_transfer_syntax:
        raise refuse("no known transfer syntax", "one of the standard")
    return PixelFormat(
        transfer_syntax=syntax,
        rows=rows,
        columns=columns,
        bits_stored=stored,
        high_bit=high_bit,
        signed=_integer(ds, "PixelRepresentation", name) == 1,
        padding=_padding(ds, name),
        offset=_pixel_offset(file, syntax, rows * columns * 2, name),
    )


def _padding(ds: Dataset, name: str) -> tuple[int, int] | None:
    if not values_of(ds, "PixelPaddingValue"):
        return None
    value = _integer(ds, "PixelPaddingValue", name)
    limit = _integer(ds, "PixelPaddingRangeLimit", name, default=value)
    return value, limit


def _pixel_offset(file: IO[bytes], syntax: UID, frame_bytes: int, name: str) -> int:
    """Where the value of Pixel Data begins; -1 for a deflated file."""
    if syntax == DeflatedExplicitVRLittleEndian:
        return -1
    big = syntax == ExplicitVRBigEndian
    order = ">" if big else "<"
    head = file.read(8 if syntax == ImplicitVRLittleEndian else 12)
    if len(head) < 8:
        raise UnsupportedSeries("no_pixel_data", f"{name} has no pixel data")
    tag = struct.pack(">HH", *struct.unpack(order + "HH", head[:4]))
    if tag != _PIXEL_DATA:
        text = f"{name} has float pixel data, 16-bit integers are expected"
        raise UnsupportedSeries("unsupported_pixel_format", text)
    if len(head) < 12 and syntax != ImplicitVRLittleEndian:
        raise UnsupportedSeries("truncated_pixel_data", f"{name} ends before its pixel data")
    if syntax.is_encapsulated:
        return file.tell()
    (length,) = struct.unpack(order + "I", head[-4:])
    if length == 0:
        raise UnsupportedSeries("no_pixel_data", f"{name} has no pixel data")
    if length != UNDEFINED_LENGTH and length < frame_bytes:
        text = f"{name} has {length} bytes of pixel data, {frame_bytes} are expected"
        raise UnsupportedSeries("truncated_pixel_data", text)
    return file.tell()


def _check_length(path: Path, pixels: PixelFormat, frames: int, name: str) -> None:
    if pixels.offset < 0 or pixels.transfer_syntax.is_encapsulated:
        return
    there, expected = path.stat().st_size - pixels.offset, frames * pixels.frame_bytes
    if there < expected:
        text = f"{name} ends after {there} bytes of pixel data, {expected} are expected"
        raise UnsupportedSeries("truncated_pixel_data", text)


def _acquired(*data_sets: Dataset) -> tuple[str, str]:
    """DA and TM of the first of `data_sets` that has both, also as the date-time of an enhanced frame."""
    for ds in data_sets:
        for keyword in ("FrameAcquisitionDateTime", "AcquisitionDateTime"):
            moment = re.split(r"[+&-]", _text(ds, keyword))[0]
            if len(moment) >= 10 and (found := date_and_time(moment[:8], moment[8:])) != ("", ""):
                return found
        found = date_and_time(_text(ds, "AcquisitionDate"), _text(ds, "AcquisitionTime"))
        if found != ("", ""):
            return found
    return "", ""


def date_and_time(date: str, time: str) -> tuple[str, str]:
    """DA and TM (PS3.5 table 6.2-1; the old `1999.12.31` and `23:59` too), or two empty strings."""
    date, time = date.replace(".", ""), time.replace(":", "")
    if _DATE.fullmatch(date) and _TIME.fullmatch(time):
        return date, time
    return "", ""


def earliest(moments: Iterable[tuple[str, str]]) -> tuple[str, str]:
    """The first of the moments that are known, else two empty strings."""
    return min((m for m in moments if m[0]), default=("", ""))


def _text(ds: Dataset, keyword: str) -> str:
    values = values_of(ds, keyword)
    return str(values[0]).strip() if values else ""


def _numbers(ds: Dataset, keyword: str, count: int, name: str) -> list[float]:
    try:
        numbers = [float(v) for v in values_of(ds, keyword)]
    except (TypeError, ValueError, OverflowError):
        numbers = []
    if len(numbers) != count or not all(map(math.isfinite, numbers)):
        text = f"{name} has no {keyword} of {count} finite number{'s' if count > 1 else ''}"
        raise UnsupportedSeries("missing_attribute", text)
    return numbers


def _integer(ds: Dataset, keyword: str, name: str, *, default: int | None = None) -> int:
    if default is not None and not values_of(ds, keyword):
        return default
    (number,) = _numbers(ds, keyword, 1, name)
    return int(number)
