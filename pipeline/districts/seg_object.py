"""One DICOM Segmentation object, read and put upright: segments, planes, and masks (PS3.3 A.51, C.8.20).

The file is somebody else's input: whatever is wrong with it is a `SegmenterUnavailable`, with one of the codes
seg_unreadable, seg_geometry, seg_too_large. Sentences quote UIDs and numbers only, never text of the header.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset, dcmread
from pydicom.filereader import read_file_meta_info
from pydicom.pixels.utils import pixel_array
from pydicom.sr.coding import Code
from pydicom.uid import DeflatedExplicitVRLittleEndian, SegmentationStorage

from pipeline.errors import SegmenterUnavailable
from pipeline.outputs.header import clean, clean_value
from pipeline.outputs.modules import MANUFACTURER
from pipeline.types import Grid

OFF_AXIS = 2e-3  # of a direction cosine: 1 mm over a field of 500 mm
SAME_PLACE_MM = 0.1
IRREGULAR = 0.1  # of the plane spacing
MAX_FRAMES = 4  # of MAX_VOXELS: a frame of every district on every plane
MAX_VOXELS = 1 << 30  # 1 GiB of labels: a CT of 512 x 512 x 4096
_SRT_ALIASES = {"SNM3", "99SDM"}  # older designators of the same SNOMED codes (PS3.16 section 8.1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """One item of SegmentSequence. `kind` is its SegmentedPropertyType; None where it has no usable code."""

    number: int
    label: str
    kind: Code | None
    algorithm: str


@dataclass(frozen=True, kw_only=True, slots=True)
class SegObject:
    """The header of one SEG.

    `created` sorts by age; `references` are Series and SOP Instance UIDs it refers to; `own`: we wrote it ourselves,
    and nobody has changed it since (another program puts its own equipment in).
    """

    path: Path
    sop_instance_uid: str
    frame_of_reference_uid: str
    created: str
    references: frozenset[str]
    own: bool
    segments: tuple[Segment, ...]
    header: Dataset


@dataclass(frozen=True, kw_only=True, slots=True)
class Planes:
    """Where the frames lie. A volume [plane, row, column] becomes [z, y, x] on `grid` by `flips`, then `order`."""

    grid: Grid
    segment_of: tuple[int, ...]  # per frame
    plane_of: tuple[int, ...]  # per frame
    shape: tuple[int, int, int]  # planes, rows, columns
    flips: tuple[slice, slice, slice]
    order: tuple[int, int, int]

    def upright(self, volume: NDArray[Any]) -> NDArray[Any]:
        """[plane, row, column] as [z, y, x] on `grid`."""
        return np.ascontiguousarray(volume[self.flips].transpose(self.order))


def is_segmentation(path: Path) -> bool:
    """Whether a file says that it is a Segmentation object; False for everything that cannot be read."""
    try:
        return bool(read_file_meta_info(path).MediaStorageSOPClassUID == SegmentationStorage)
    except Exception:  # no DICOM file, or a hostile one
        return False


def find_segmentations(folder: Path) -> tuple[Path, ...]:
    """Every Segmentation object under a folder, by name; whatever else lies there is skipped."""
    return tuple(path for path in sorted(folder.rglob("*")) if path.is_file() and is_segmentation(path))


def read_seg(path: Path) -> SegObject:
    """The header of a SEG file. Raises SegmenterUnavailable (seg_unreadable)."""
    try:
        return _read(path)
    except SegmenterUnavailable:
        raise
    except Exception as error:  # a parser fed with hostile bytes raises whatever it likes; another SEG may be well
        raise SegmenterUnavailable("seg_unreadable", f"a SEG cannot be read ({type(error).__name__})") from error


def _read(path: Path) -> SegObject:
    if read_file_meta_info(path).TransferSyntaxUID == DeflatedExplicitVRLittleEndian:
        raise SegmenterUnavailable("seg_unreadable", "a SEG is deflated: its size in memory cannot be known before")
    ds = dcmread(path, stop_before_pixels=True)
    if ds.SOPClassUID != SegmentationStorage:
        raise SegmenterUnavailable("seg_unreadable", "a file is no Segmentation object")
    return SegObject(
        path=path,
        sop_instance_uid=clean_value(ds, "SOPInstanceUID"),
        frame_of_reference_uid=clean_value(ds, "FrameOfReferenceUID"),
        created="".join(clean_value(ds, keyword) for keyword in ("ContentDate", "ContentTime")),
        references=frozenset(_references(ds)),
        own=ds.get("Manufacturer") == MANUFACTURER and ds.get("SyntheticData") == "YES",
        segments=tuple(_segment(item) for item in ds.SegmentSequence),
        header=ds,
    )


def _references(ds: Dataset) -> Iterator[str]:
    """Common Instance Reference (PS3.3 C.12.2), related series (C.7.3.1), source images of object and frames."""
    for series in ds.get("ReferencedSeriesSequence") or ():
        yield str(series.get("SeriesInstanceUID", ""))
        yield from _instances(series.get("ReferencedInstanceSequence"))
    for series in ds.get("RelatedSeriesSequence") or ():
        yield str(series.get("SeriesInstanceUID", ""))
    yield from _instances(ds.get("SourceImageSequence"))
    groups = (*(ds.get("SharedFunctionalGroupsSequence") or ()), *(ds.get("PerFrameFunctionalGroupsSequence") or ()))
    for group in groups:
        for derivation in group.get("DerivationImageSequence") or ():
            yield from _instances(derivation.get("SourceImageSequence"))


def _instances(items: Sequence[Dataset] | None) -> Iterator[str]:
    for item in items or ():
        yield str(item.get("ReferencedSOPInstanceUID", ""))


def _segment(item: Dataset) -> Segment:
    kinds = item.get("SegmentedPropertyTypeCodeSequence") or ()
    return Segment(
        number=int(item.SegmentNumber),
        label=clean_value(item, "SegmentLabel"),
        kind=_code(kinds[0]) if kinds else None,
        algorithm=clean_value(item, "SegmentAlgorithmName"),
    )


def _code(item: Dataset) -> Code | None:
    value, scheme = clean("SH", str(item.get("CodeValue", ""))), clean_value(item, "CodingSchemeDesignator")
    if not value or not scheme:
        return None
    return Code(value, "SRT" if scheme in _SRT_ALIASES else scheme, "")


def planes_of(seg: SegObject) -> Planes:
    """Where the frames of a SEG lie. Raises SegmenterUnavailable (seg_geometry, seg_too_large, seg_unreadable)."""
    try:
        return _planes(seg)
    except SegmenterUnavailable:
        raise
    except Exception as error:
        text = f"SEG {seg.sop_instance_uid}: its frames cannot be understood ({type(error).__name__})"
        raise SegmenterUnavailable("seg_unreadable", text) from error


def _planes(seg: SegObject) -> Planes:
    ds, name = seg.header, f"SEG {seg.sop_instance_uid}"
    frames = ds.PerFrameFunctionalGroupsSequence
    if not frames or len(frames) != int(ds.NumberOfFrames):
        raise SegmenterUnavailable("seg_unreadable", f"{name} has {len(frames)} frame headers for its frames")
    numbers = tuple(int(_macro(ds, i, "SegmentIdentificationSequence").ReferencedSegmentNumber) for i in _all(frames))
    strange = set(numbers) - {segment.number for segment in seg.segments}
    if strange:
        raise SegmenterUnavailable("seg_unreadable", f"{name} has frames of segment {min(strange)}, not declared")
    cosines = _same(ds, frames, "PlaneOrientationSequence", "ImageOrientationPatient", 6, OFF_AXIS, name)
    row_mm, column_mm = _same(ds, frames, "PixelMeasuresSequence", "PixelSpacing", 2, 1e-4, name)
    positions = _finite(
        [_macro(ds, i, "PlanePositionSequence").ImagePositionPatient for i in _all(frames)], (len(frames), 3), name
    )
    along_row, along_column = cosines[:3], cosines[3:]
    axes, signs = _aligned((np.cross(along_row, along_column), along_column, along_row), name)
    offsets = positions[:, axes[0]]
    if np.ptp(positions[:, axes[1:]], axis=0).max() > SAME_PLACE_MM:
        raise SegmenterUnavailable("seg_geometry", f"{name}: its planes do not lie above each other")
    spacing_mm = _plane_spacing(ds, offsets, name)
    steps = (offsets - offsets.min()) / spacing_mm
    planes = np.rint(steps).astype(int)
    if np.abs(steps - planes).max() > IRREGULAR:
        raise SegmenterUnavailable("seg_geometry", f"{name}: its planes are not evenly spaced")
    shape = (int(planes.max()) + 1, int(ds.Rows), int(ds.Columns))
    if np.prod(shape, dtype=np.int64) > MAX_VOXELS:
        raise SegmenterUnavailable("seg_too_large", f"{name} has {shape} voxels, at most {MAX_VOXELS} are read")
    if len(planes) * shape[1] * shape[2] > MAX_FRAMES * MAX_VOXELS:
        raise SegmenterUnavailable("seg_too_large", f"{name} has {len(planes)} frames of {shape[1:]} voxels")
    order = (axes.index(2), axes.index(1), axes.index(0))
    sizes, spacings = shape, (spacing_mm, row_mm, column_mm)
    origin = [0.0, 0.0, 0.0]
    origin[axes[0]] = float(offsets.min())
    for array_axis in (1, 2):
        first = float(positions[0, axes[array_axis]])
        back = 0.0 if signs[array_axis] > 0 else (sizes[array_axis] - 1) * spacings[array_axis]
        origin[axes[array_axis]] = first - back
    return Planes(
        grid=Grid(
            shape=(sizes[order[0]], sizes[order[1]], sizes[order[2]]),
            spacing_mm=(spacings[order[0]], spacings[order[1]], spacings[order[2]]),
            origin_mm=(origin[0], origin[1], origin[2]),
            frame_of_reference_uid=seg.frame_of_reference_uid,
        ),
        segment_of=numbers,
        plane_of=tuple(planes.tolist()),
        shape=shape,
        flips=(slice(None), slice(None, None, signs[1]), slice(None, None, signs[2])),
        order=order,
    )


def _all(frames: Sequence[Dataset]) -> range:
    return range(len(frames))


def _macro(ds: Dataset, index: int, keyword: str) -> Dataset:
    """One functional group of a frame: its own, else the shared one (PS3.3 C.7.6.16)."""
    own = ds.PerFrameFunctionalGroupsSequence[index].get(keyword)
    found: Dataset = (own or ds.SharedFunctionalGroupsSequence[0][keyword].value)[0]
    return found


def _same(
    ds: Dataset, frames: Sequence[Dataset], macro: str, keyword: str, count: int, within: float, name: str
) -> NDArray[np.float64]:
    """A value that all frames must share. Raises SegmenterUnavailable (seg_geometry)."""
    shared = not any(macro in frame for frame in frames)
    indices = range(1) if shared else _all(frames)
    values = _finite([_macro(ds, i, macro)[keyword].value for i in indices], (len(indices), count), name)
    if np.ptp(values, axis=0).max() > within:
        raise SegmenterUnavailable("seg_geometry", f"{name}: its frames differ in {keyword}")
    return np.asarray(values[0])


def _finite(values: Sequence[Any], shape: tuple[int, int], name: str) -> NDArray[np.float64]:
    array = np.array([[float(v) for v in row] for row in values], dtype=np.float64)
    if array.shape != shape or not np.isfinite(array).all():
        raise SegmenterUnavailable("seg_geometry", f"{name}: a position, orientation or spacing is no number")
    return array


def _aligned(directions: Sequence[NDArray[np.float64]], name: str) -> tuple[list[int], list[int]]:
    """The LPS axis (0: x) and sign of each direction, which must be axes. Raises SegmenterUnavailable."""
    axes = [int(np.abs(d).argmax()) for d in directions]
    off = max(float(np.abs(np.delete(d, axis)).max()) for d, axis in zip(directions, axes, strict=True))
    if sorted(axes) != [0, 1, 2] or off > OFF_AXIS:
        raise SegmenterUnavailable("seg_geometry", f"{name}: its planes are oblique to the patient's axes")
    return axes, [1 if d[axis] > 0 else -1 for d, axis in zip(directions, axes, strict=True)]


def _plane_spacing(ds: Dataset, offsets: NDArray[np.float64], name: str) -> float:
    """mm between planes: what the object says where the planes agree, else their smallest distance."""
    steps = np.diff(np.unique(offsets.round(3)))
    steps = steps[steps > SAME_PLACE_MM]
    measures = _macro(ds, 0, "PixelMeasuresSequence")
    said = float(measures.get("SpacingBetweenSlices") or (0 if steps.size else measures.get("SliceThickness")) or 0)
    if np.isfinite(said) and said > SAME_PLACE_MM:
        counts = steps / said
        if np.all(np.abs(counts - np.rint(counts)) <= IRREGULAR * np.maximum(counts, 1)):
            return said
    if not steps.size:
        raise SegmenterUnavailable("seg_geometry", f"{name}: the thickness of its plane is not given")
    return float(steps.min())


def masks(seg: SegObject, planes: Planes, wanted: Sequence[int]) -> Iterator[tuple[int, int, NDArray[np.bool_]]]:
    """(segment number, plane, mask [row, column]) of the frames of the `wanted` segments, segment after segment.

    A FRACTIONAL segment counts from half its full value on. Raises SegmenterUnavailable (seg_unreadable).
    """
    try:
        ds = dcmread(seg.path)
        half = _half(ds)
        for number in wanted:
            for index, (segment, plane) in enumerate(zip(planes.segment_of, planes.plane_of, strict=True)):
                if segment == number:
                    yield number, plane, _frame(ds, index, planes.shape[1:]) >= half
    except Exception as error:
        text = f"SEG {seg.sop_instance_uid}: its pixels cannot be read ({type(error).__name__})"
        raise SegmenterUnavailable("seg_unreadable", text) from error


def _half(ds: Dataset) -> float:
    """The smallest stored value that is inside."""
    if ds.SegmentationType == "BINARY" and ds.BitsAllocated == 1:
        return 1.0
    if ds.SegmentationType == "FRACTIONAL" and ds.BitsAllocated == 8:
        return max(float(ds.MaximumFractionalValue) / 2, 1.0)
    raise ValueError("neither BINARY nor FRACTIONAL")


def _frame(ds: Dataset, index: int, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """One frame [row, column]. Bits of native frames follow each other without a gap (PS3.5 section 8.1.1)."""
    if ds.file_meta.TransferSyntaxUID.is_compressed:
        return np.asarray(pixel_array(ds, index=index), dtype=np.uint8).reshape(shape)
    size = shape[0] * shape[1]
    data = np.frombuffer(ds.PixelData, dtype=np.uint8)
    if ds.BitsAllocated == 8:
        return data[index * size : (index + 1) * size].reshape(shape)
    first, skipped = divmod(index * size, 8)
    bits = np.unpackbits(data[first : first + (skipped + size + 7) // 8], bitorder="little")
    return bits[skipped : skipped + size].reshape(shape)


def file_digest(seg: SegObject) -> str:
    """SHA-256 of the file, hexadecimal: the same SOP Instance UID may come with other content."""
    return sha256(seg.path.read_bytes()).hexdigest()
