"""What the search for studies keeps of one DICOM file: enough to group, choose and check, and no pixel."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pydicom
from pydicom import Dataset
from pydicom.errors import InvalidDicomError
from pydicom.uid import ImplicitVRLittleEndian, MediaStorageDirectoryStorage

from pipeline.ct_headers import Frame, PixelFormat, is_localizer
from pipeline.ct_stack import Stack, check_same, sort_along_normal, stack_of
from pipeline.errors import UnsupportedSeries
from training.cases.suv import moment
from training.errors import StudyError

TAGS = [
    *("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "Modality"),
    *("PatientID", "StudyDate", "Manufacturer", "ImageType", "SharedFunctionalGroupsSequence", "NumberOfFrames"),
    *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "Rows", "Columns"),
    *("RescaleSlope", "RescaleIntercept", "AcquisitionDate", "AcquisitionTime"),
    *("CorrectedImage", "SeriesType", "SegmentSequence"),
]
MODALITIES = ("CT", "PT", "SEG")


@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """One file of a CT, PT or SEG. `subject` is the patient's ID: it is hashed and never stored or shown.

    `plane` is None where the file is not one plane (enhanced objects, SEG) or does not say where it lies.
    """

    path: Path
    modality: str
    sop_class_uid: str
    study_uid: str
    series_uid: str
    frame_of_reference_uid: str
    subject: str
    study_date: str
    phantom: bool
    localizer: bool
    acquired: datetime | None
    corrected: tuple[str, ...]
    series_type: str
    segments: tuple[Dataset, ...]
    plane: Frame | None


@contextmanager
def quiet_pydicom() -> Iterator[None]:
    """Values are checked where they are used; pydicom's remarks would only repeat a header's text in the log."""
    with warnings.catch_warnings(), pydicom.config.disable_value_validation():
        warnings.simplefilter("ignore")
        yield


def scan(files: Sequence[Path], on_file: Callable[[], None]) -> tuple[list[Header], list[Path]]:
    """The headers of all CT, PT and SEG among `files`, and the files that look like DICOM and cannot be read.

    Other DICOM objects and other files are skipped. `on_file` is called after each file.
    """
    headers: list[Header] = []
    unreadable: list[Path] = []
    shared: dict[Any, Any] = {}  # a million slices repeat a few thousand UIDs and orientations
    with quiet_pydicom():
        for path in files:
            try:
                header = _read(path, shared)
            except InvalidDicomError:  # no DICM prefix: another kind of file, unless its name says DICOM
                if path.suffix.lower() == ".dcm":
                    unreadable.append(path)
            except Exception:  # a parser fed with hostile bytes raises anything: the file is unreadable
                unreadable.append(path)
            else:
                if header is not None:
                    headers.append(header)
            on_file()
    return headers, unreadable


def _read(path: Path, shared: dict[Any, Any]) -> Header | None:
    ds = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(TAGS))
    modality = _text(ds, "Modality")
    if not modality and ds.file_meta.get("MediaStorageSOPClassUID") != MediaStorageDirectoryStorage:
        raise ValueError("no Modality, which every object has but a DICOMDIR: the file is cut off")
    if modality not in MODALITIES:
        return None

    def once(value: Any) -> Any:
        return shared.setdefault(value, value)

    date = _text(ds, "StudyDate")
    return Header(
        path=path,
        modality=once(modality),
        sop_class_uid=once(_text(ds, "SOPClassUID")),
        study_uid=once(_text(ds, "StudyInstanceUID")),
        series_uid=once(_text(ds, "SeriesInstanceUID")),
        frame_of_reference_uid=once(_text(ds, "FrameOfReferenceUID")),
        subject=once(_text(ds, "PatientID")),
        study_date=once(date),
        phantom=_text(ds, "Manufacturer").upper() == "PHANTOM",
        localizer=modality == "CT" and is_localizer(ds),
        acquired=once(moment(_text(ds, "AcquisitionDate") or date, _text(ds, "AcquisitionTime"))),
        corrected=once(tuple(str(v).strip().upper() for v in _list(ds, "CorrectedImage"))),
        series_type=once(_text(ds, "SeriesType").upper()),
        segments=tuple(ds.get("SegmentSequence") or ()),
        plane=None if modality == "SEG" else _plane(ds, path, once),
    )


def _plane(ds: Dataset, path: Path, once: Callable[[Any], Any]) -> Frame | None:
    """The file's plane in the form that the pipeline's stack geometry takes; its pixel format is not looked at."""
    position, orientation = _floats(ds, "ImagePositionPatient", 3), _floats(ds, "ImageOrientationPatient", 6)
    spacing, slope = _floats(ds, "PixelSpacing", 2), _floats(ds, "RescaleSlope", 1)
    if not (position and orientation and spacing and ds.get("Rows") and ds.get("Columns")):
        return None
    pixels = PixelFormat(
        transfer_syntax=ImplicitVRLittleEndian,
        rows=int(ds.Rows),
        columns=int(ds.Columns),
        bits_stored=16,
        high_bit=15,
        signed=False,
        padding=None,
        offset=-1,
    )
    return Frame(
        path=path,
        index=0,
        sop_class_uid=once(_text(ds, "SOPClassUID")),
        sop_instance_uid=_text(ds, "SOPInstanceUID"),
        study_uid=once(_text(ds, "StudyInstanceUID")),
        series_uid=once(_text(ds, "SeriesInstanceUID")),
        frame_of_reference_uid=once(_text(ds, "FrameOfReferenceUID")),
        position=(position[0], position[1], position[2]),
        orientation=once(orientation),
        pixel_spacing_mm=once((spacing[0], spacing[1])),
        pixels=once(pixels),
        slope=slope[0] if slope else float("nan"),
        intercept=(_floats(ds, "RescaleIntercept", 1) or (0.0,))[0],
        acquired=("", ""),
        lossy=False,
    )


def stack_planes(headers: Sequence[Header], what: str, *, drop_duplicates: bool) -> Stack:
    """The regular stack of the planes of one series, foot to head.

    Args:
        headers: the files of one series.
        what: "CT" or "PET", for messages.
        drop_duplicates: whether two planes at one place are one (the reader of the pixels compares them) or a fault.

    Raises:
        StudyError: unreadable when a file has no plane; the codes of `pipeline.errors.UnsupportedSeries` for gaps,
            two spacings, mixed matrices and the like; duplicate_positions.
    """
    planes = [header.plane for header in headers if header.plane is not None]
    if len(planes) < len(headers):
        text = f"{what}: {len(headers) - len(planes)} of {len(headers)} files do not say where their plane lies"
        raise StudyError("unreadable", text)
    try:
        check_same(planes)
        groups = sort_along_normal(planes)
        if not drop_duplicates and len(groups) < len(planes):
            text = f"series {planes[0].series_uid} has {len(planes)} images at {len(groups)} places (gated or dynamic?)"
            raise UnsupportedSeries("duplicate_positions", text)
        return stack_of([group[0] for group in groups])
    except UnsupportedSeries as error:
        raise StudyError(error.code, f"{what}: {error.text}") from error


def coverage_mm(headers: Sequence[Header]) -> float:
    """How far the planes of a series reach along the largest of their steps, to 5 mm; 0 where that is not known."""
    planes = [header.plane.position for header in headers if header.plane is not None]
    if not planes:
        return 0.0
    reach = max(max(p[axis] for p in planes) - min(p[axis] for p in planes) for axis in range(3))
    return 5.0 * round(reach / 5.0)


def _list(ds: Dataset, keyword: str) -> list[Any]:
    value = ds.get(keyword)
    if value is None or value == "":
        return []
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str | bytes) else [value]


def _text(ds: Dataset, keyword: str) -> str:
    values = _list(ds, keyword)
    return str(values[0]).strip() if values else ""


def _floats(ds: Dataset, keyword: str, count: int) -> tuple[float, ...] | None:
    try:
        values = tuple(float(v) for v in _list(ds, keyword))
    except (TypeError, ValueError):
        return None
    return values if len(values) == count else None
