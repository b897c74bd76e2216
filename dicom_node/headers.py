"""What the node needs to know of an instance, read without its pixels, and the geometry of a series of them.

Only the elements named here are looked at; the patient's name is not among them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

from pydicom import Dataset, dcmread
from pydicom.charset import decode_bytes, python_encoding
from pydicom.errors import InvalidDicomError
from pydicom.tag import Tag
from pydicom.uid import (
    EnhancedCTImageStorage,
    LegacyConvertedEnhancedCTImageStorage,
)

from dicom_node.frames import FRAME_TAGS, Frames, Vector, numbers, raw, read_frames
from dicom_node.trial import TEST_NAME
from pipeline.codestream import MAX_INFLATED_BYTES, inflates_to_more
from pipeline.ct_groups import Concatenation, values_of
from storage.errors import BadUid
from storage.spool import check_uid

_TAGS = {
    name: Tag(name)
    for name in (
        "SpecificCharacterSet",
        "ImageType",
        "SOPClassUID",
        "SOPInstanceUID",
        "StudyDate",
        "AccessionNumber",
        "Modality",
        "Manufacturer",
        "StudyDescription",
        "SeriesDescription",
        "PatientName",
        "PatientID",
        "QualityControlImage",
        "BodyPartExamined",
        "SliceThickness",
        "ConvolutionKernel",
        "StudyInstanceUID",
        "SeriesInstanceUID",
        "SeriesNumber",
        "ImagePositionPatient",
        "ImageOrientationPatient",
        "NumberOfFrames",
        "ConcatenationUID",
    )
}
_PART_TAGS = (Tag("InConcatenationNumber"), Tag("InConcatenationTotalNumber"))
_MULTI_FRAME = frozenset({EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage})

SAME_PLACE_MM = 0.01  # positions are written with 2 to 6 decimals
GAP_FACTOR = 1.5  # one missing slice doubles the distance; scanners' jitter stays well below this
_MAX_PLACE_MM = 1e5  # a position beyond it is no place in a scanner
_MAX_GAP_SHARE = 0.2  # more gaps than this among the steps: a series of mixed spacing, the reader's matter


class BadInstance(Exception):
    """A file that cannot be assigned to a series: `code` names the quarantine folder, the text has no PHI.

    `study_uid` and `accession` are what could be read all the same, so that `why` finds the file.
    """

    def __init__(self, code: str, text: str, *, study_uid: str = "", accession: str = "") -> None:
        super().__init__(text)
        self.code, self.study_uid, self.accession = code, study_uid, accession


@dataclass(frozen=True, kw_only=True, slots=True)
class InstanceHeader:
    """One instance. `positions` are LPS mm, one per frame; empty where the file does not say where it lies.

    A multi-frame instance has its kernel and thickness from its functional groups, and kinds of projection that they
    name stand after Image Type.
    """

    study_uid: str
    series_uid: str
    sop_instance_uid: str
    sop_class_uid: str
    modality: str = ""
    image_type: tuple[str, ...] = ()
    study_date: str = ""
    accession: str = ""
    patient_id: str = ""
    manufacturer: str = ""
    study_description: str = ""
    series_description: str = ""
    series_number: str = ""
    body_part: str = ""
    kernel: str = ""
    thickness_mm: float = 0.0
    positions: tuple[Vector, ...] = ()
    orientation: tuple[float, ...] = ()  # six direction cosines, or empty
    concatenation: Concatenation | None = None  # the whole that this multi-frame instance is a part of
    labeled_test: bool = False  # it says that it is of a test study of `dicom-node doctor`


def read_header(path: Path) -> InstanceHeader:
    """Read one file of the spool.

    Raises `BadInstance`: not_dicom, missing_uid, bad_uid, too_large. A missing position is no fault here: a localizer
    or a screen capture may lack it, and the series is then refused by name. `OSError`: the disk, not the file.
    """
    try:
        return _parse(path)
    except BadInstance:
        raise
    except InvalidDicomError as error:
        raise BadInstance("not_dicom", "no DICOM file: the prefix is missing") from error
    except Exception as error:  # a hostile file may break the parser anywhere; only the kind of error is told
        if isinstance(error, OSError) and error.errno is not None:  # pydicom's own, for a file cut short, has none
            raise
        raise BadInstance("not_dicom", f"the data set cannot be parsed ({type(error).__name__})") from error


def _parse(path: Path) -> InstanceHeader:
    if inflates_to_more(path):
        raise BadInstance("too_large", f"the deflated data set is larger than {MAX_INFLATED_BYTES >> 20} MiB")
    ds = dcmread(path, stop_before_pixels=True, specific_tags=[*_TAGS.values(), *_PART_TAGS, *FRAME_TAGS])
    charset = tuple(_ascii(ds, "SpecificCharacterSet").split("\\"))
    accession = _text(ds, "AccessionNumber", charset)
    uids: dict[str, str] = {}
    try:
        for name in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID"):
            uids[name] = _uid(ds, name)
    except BadInstance as fault:
        study_uid = uids.get("StudyInstanceUID", "")
        raise BadInstance(fault.code, str(fault), study_uid=study_uid, accession=accession) from fault
    frames = read_frames(ds) if uids["SOPClassUID"] in _MULTI_FRAME else None
    orientation, positions = _places(ds, frames)
    return InstanceHeader(
        study_uid=uids["StudyInstanceUID"],
        series_uid=uids["SeriesInstanceUID"],
        sop_instance_uid=uids["SOPInstanceUID"],
        sop_class_uid=uids["SOPClassUID"],
        modality=_ascii(ds, "Modality").upper(),
        image_type=_image_type(ds, frames),
        study_date=_ascii(ds, "StudyDate"),
        accession=accession,
        patient_id=_text(ds, "PatientID", charset),
        manufacturer=_text(ds, "Manufacturer", charset),
        study_description=_text(ds, "StudyDescription", charset),
        series_description=_text(ds, "SeriesDescription", charset),
        series_number=_ascii(ds, "SeriesNumber"),
        body_part=_ascii(ds, "BodyPartExamined"),
        kernel=_text(ds, "ConvolutionKernel", charset) or (_decoded(frames.kernel, charset) if frames else ""),
        thickness_mm=_number(_ascii(ds, "SliceThickness") or (frames.thickness if frames else "")),
        positions=positions,
        orientation=orientation,
        concatenation=_concatenation(ds) if frames else None,
        labeled_test=_ascii(ds, "QualityControlImage") == "YES" and _ascii(ds, "PatientName") == TEST_NAME,
    )


def _image_type(ds: Dataset, frames: Frames | None) -> tuple[str, ...]:
    parts = (part.strip().upper() for part in _ascii(ds, "ImageType").split("\\"))
    return (*(part for part in parts if part), *(frames.techniques if frames else ()))


def _concatenation(ds: Dataset) -> Concatenation | None:
    """The part that a multi-frame instance is of a whole (PS3.3 C.7.6.16.2.2.4); a number that is none is 0."""
    if not _ascii(ds, "ConcatenationUID"):
        return None
    number, total = (values_of(ds, tag) for tag in ("InConcatenationNumber", "InConcatenationTotalNumber"))
    return Concatenation(uid=_uid(ds, "ConcatenationUID"), number=_count(number), total=_count(total))


def _count(values: Sequence[object]) -> int:
    return value if len(values) == 1 and isinstance(value := values[0], int) else 0


def _ascii(ds: Dataset, name: str) -> str:
    return raw(ds, _TAGS[name]).decode("latin-1").strip("\0 ")


def _text(ds: Dataset, name: str, charset: tuple[str, ...]) -> str:
    """Text in the data set's character set (PS3.5 section 6.1.2); what it does not explain becomes U+FFFD."""
    return _decoded(raw(ds, _TAGS[name]), charset)


def _decoded(value: bytes, charset: tuple[str, ...]) -> str:
    if value.isascii() and b"\x1b" not in value:
        return value.decode("ascii").strip("\0 ")
    encodings = [python_encoding[term.strip()] for term in charset if term.strip() in python_encoding]
    if len(encodings) > 1:
        return decode_bytes(value, encodings, set()).strip("\0 ")
    return value.decode(encodings[0] if encodings else "latin-1", errors="replace").strip("\0 ")


def _uid(ds: Dataset, name: str) -> str:
    value = _ascii(ds, name)
    if not value:
        raise BadInstance("missing_uid", f"{name} is missing")
    try:
        return check_uid(value)
    except BadUid as error:
        raise BadInstance("bad_uid", f"{name}: {error}") from error


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        return 0.0
    return value if math.isfinite(value) else 0.0


def _places(ds: Dataset, frames: Frames | None) -> tuple[tuple[float, ...], tuple[Vector, ...]]:
    """Orientation and positions, or nothing where one of the numbers can be no place in a scanner."""
    if frames is not None:
        orientation, places = frames.orientation, frames.positions
    else:
        position = numbers(_ascii(ds, "ImagePositionPatient"), 3)
        orientation = numbers(_ascii(ds, "ImageOrientationPatient"), 6)
        places = ((position[0], position[1], position[2]),) if position else ()
    if not all(abs(value) <= _MAX_PLACE_MM for value in (*orientation, *(v for place in places for v in place))):
        return (), ()
    return orientation, places


@dataclass(frozen=True, kw_only=True, slots=True)
class SeriesGeometry:
    """Where the slices of a series lie along its normal.

    `z_mm` are distances along `normal`, sorted, without duplicates; `gaps_mm` the places where slices are missing,
    each (below, above). `uneven`: so many steps differ that the gaps cannot be told from mixed spacing.
    """

    normal: Vector | None
    z_mm: tuple[float, ...]
    spacing_mm: float
    coverage_mm: float
    gaps_mm: tuple[tuple[float, float], ...]
    uneven: bool
    instances_without_place: int


def geometry_of(headers: Iterable[InstanceHeader]) -> SeriesGeometry:
    """The geometry of one series' instances.

    The spacing is the median step. A step of more than `GAP_FACTOR` medians is a gap, unless so many are that the
    series is half there, or was acquired with mixed spacing. Coverage is edge to edge.
    """
    headers = list(headers)
    placed = [h for h in headers if h.positions and len(h.orientation) == 6]
    if not placed:
        return SeriesGeometry(
            normal=None,
            z_mm=(),
            spacing_mm=0.0,
            coverage_mm=0.0,
            gaps_mm=(),
            uneven=False,
            instances_without_place=len(headers),
        )
    normal = _normal(placed[0].orientation)
    along = sorted(sum(n * p for n, p in zip(normal, place, strict=True)) for h in placed for place in h.positions)
    z = [along[0]]
    z.extend(b for a, b in pairwise(along) if b - a > SAME_PLACE_MM)
    steps = [b - a for a, b in pairwise(z)]
    spacing = median(steps) if steps else placed[0].thickness_mm
    gaps = [(a, b) for a, b in pairwise(z) if b - a > GAP_FACTOR * spacing]
    short = sum(step * GAP_FACTOR < spacing for step in steps)  # with more than half missing the median is a gap itself
    uneven = len(gaps) + short > max(1.0, _MAX_GAP_SHARE * len(steps))
    return SeriesGeometry(
        normal=normal,
        z_mm=tuple(z),
        spacing_mm=spacing,
        coverage_mm=z[-1] - z[0] + spacing,
        gaps_mm=() if uneven else tuple(gaps),
        uneven=uneven,
        instances_without_place=len(headers) - len(placed),
    )


def _normal(orientation: Sequence[float]) -> Vector:
    """Row direction x column direction (PS3.3 C.7.6.2.1.1), of unit length where the header allows it."""
    rx, ry, rz, cx, cy, cz = orientation
    normal = (ry * cz - rz * cy, rz * cx - rx * cz, rx * cy - ry * cx)
    length = math.sqrt(sum(v * v for v in normal))
    return (normal[0] / length, normal[1] / length, normal[2] / length) if length > 0 else (0.0, 0.0, 1.0)
