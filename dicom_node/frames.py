"""What a multi-frame CT's header says of its frames, for the assembler and the choice of a series.

Frames count as slices. Values are read as the bytes that they are: pydicom would warn with what it finds invalid.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from pydicom import Dataset
from pydicom.dataelem import RawDataElement
from pydicom.tag import BaseTag, Tag

from pipeline.ct_groups import PROJECTIONS, values_of

Vector = tuple[float, float, float]

_SHARED, _PER_FRAME = "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"
FRAME_TAGS = (Tag(_SHARED), Tag(_PER_FRAME))


@dataclass(frozen=True, kw_only=True, slots=True)
class Frames:
    """The frames that are no localizers. `positions` are LPS mm, one for each, or none where one cannot be told.

    `techniques` are the kinds of projection among them (`pipeline.ct_groups.PROJECTIONS`); `kernel` is raw bytes in
    the data set's character set.
    """

    orientation: tuple[float, ...] = ()
    positions: tuple[Vector, ...] = ()
    techniques: tuple[str, ...] = ()
    kernel: bytes = b""
    thickness: str = ""


def read_frames(ds: Dataset) -> Frames:
    """The functional groups of `ds` (PS3.3 C.7.6.16.2); nothing raises, what cannot be read is absent."""
    shared = values_of(ds, _SHARED)[:1]
    frames = [(frame, *shared) for frame in values_of(ds, _PER_FRAME)]
    wanted = [groups for groups in frames if "LOCALIZER" not in _kind(groups)]
    if not wanted:
        return Frames()
    places = [numbers(_text(groups, "PlanePositionSequence", "ImagePositionPatient"), 3) for groups in wanted]
    first = wanted[0]
    return Frames(
        orientation=numbers(_text(first, "PlaneOrientationSequence", "ImageOrientationPatient"), 6),
        positions=tuple((p[0], p[1], p[2]) for p in places) if all(places) else (),
        techniques=tuple(sorted(set(_techniques(wanted)))),
        kernel=_value(first, "CTReconstructionSequence", "ConvolutionKernel"),
        thickness=_text(first, "PixelMeasuresSequence", "SliceThickness"),
    )


def _kind(groups: Iterable[Dataset]) -> str:
    return _text(groups, "CTImageFrameTypeSequence", "FrameType").upper()


def _techniques(frames: Iterable[tuple[Dataset, ...]]) -> Iterator[str]:
    for groups in frames:
        technique = _text(groups, "CTImageFrameTypeSequence", "VolumeBasedCalculationTechnique").upper()
        if technique in PROJECTIONS:
            yield technique


def _value(groups: Iterable[Dataset], sequence: str, keyword: str) -> bytes:
    """An element of a functional group: the frame's own, else the shared one's."""
    for group in groups:
        for item in values_of(group, sequence)[:1]:
            return raw(item, Tag(keyword))
    return b""


def _text(groups: Iterable[Dataset], sequence: str, keyword: str) -> str:
    return _value(groups, sequence, keyword).decode("latin-1").strip("\0 ")


def raw(ds: Dataset, tag: BaseTag) -> bytes:
    """The element's bytes as they are in the file."""
    if tag not in ds:
        return b""
    elem = ds.get_item(tag)
    if isinstance(elem, RawDataElement):
        return elem.value or b""
    value = elem.value if elem is not None else None  # pydicom has decoded SpecificCharacterSet already
    parts = [value] if isinstance(value, str) or not isinstance(value, Iterable) else list(value)
    return "\\".join(str(part) for part in parts if part is not None).encode("ascii", "replace")


def numbers(text: str, count: int) -> tuple[float, ...]:
    """`count` finite numbers of a DS value, or nothing."""
    parts = text.split("\\")
    try:
        values = tuple(float(part) for part in parts)
    except ValueError:
        return ()
    return values if len(values) == count and all(map(math.isfinite, values)) else ()
