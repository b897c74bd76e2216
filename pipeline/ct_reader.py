"""A CT series on disk to one volume in Hounsfield units on an axis-aligned LPS grid.

What is mended, each with a note for the ledger: identical duplicates and localizers are dropped, jitter of the
positions is evened out, flipped and permuted axes are turned (no resampling), oblique and tilted stacks are
resampled, UIDs that every file lacks (de-identified series) are derived from those that are there. Everything
else is refused by name (`pipeline.errors`): in particular two slice spacings in one series, since a volume has one.
"""

from __future__ import annotations

import math
import uuid
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
import SimpleITK as sitk  # noqa: N813 - the name its own manual uses
from pydicom import Dataset
from pydicom.tag import BaseTag

from pipeline.ct_groups import missing_parts
from pipeline.ct_headers import Frame, date_and_time, earliest, frames_of, is_localizer, parse, uid_of
from pipeline.ct_pixels import AIR_HU, hounsfield, planes_are_equal, stored_planes
from pipeline.ct_stack import (
    Stack,
    aligned_axes,
    aligned_grid,
    axes_of,
    check_same,
    check_size,
    enclosing_grid,
    sort_along_normal,
    stack_of,
)
from pipeline.errors import UnsupportedSeries
from pipeline.geometry import resample_image
from pipeline.types import (
    CtVolume,
    FloatVolume,
    Grid,
    OnProgress,
    Progress,
    SourceInstance,
    SourceSeries,
    Stage,
    ignore_progress,
)

# what frames of several stacks or phases look like when they are taken for one stack
_NOT_ONE_VOLUME = {
    *("duplicate_positions", "missing_slices", "mixed_spacing", "mixed_orientation", "unsupported_geometry"),
}
_OF_ALL_FRAMES = {
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "NumberOfFrames"),
    *("DimensionOrganizationSequence", "DimensionIndexSequence"),
    *("UnassignedSharedConvertedAttributesSequence", "UnassignedPerFrameConvertedAttributesSequence"),
}


def read_ct(paths: Sequence[Path], *, max_slices: int = 3000, on_progress: OnProgress = ignore_progress) -> CtVolume:
    """The volume of the one CT series in `paths` (any order).

    Progress counts every file twice, once for its header and once for its pixels. Raises UnsupportedSeries with
    a code of `pipeline.errors`; an exception of `on_progress` ends the reading and passes through.
    """
    with quiet_pydicom():
        frames, notes = _read_headers(paths, max_slices, on_progress)
        frames, minted = _with_uids(frames)
        _check_concatenations(frames)
        with _frames_of_one_volume(frames):
            check_same(frames)
            frames, dropped = _without_duplicates(sort_along_normal(frames))
            stack = stack_of(frames)
        check_size(math.prod(stack.sizes), stack.frames[0].series_uid)
        hu, grid, turned = _assemble(stack, on_progress)
        source = _source(stack, (*notes, *minted, *dropped, *stack.notes, *turned))
    return CtVolume(hu=hu, grid=grid, source=source)


def find_series(folder: Path) -> dict[str, list[Path]]:
    """SeriesInstanceUID -> files, for every DICOM file under `folder`; whatever else lies there is skipped.

    CT images without a series UID (de-identified) count as one series for each folder, under a derived UID.
    """
    series: dict[str, list[Path]] = {}
    with quiet_pydicom():
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            try:
                ds = _header(path)
                uid = uid_of(ds, "SeriesInstanceUID", "file", required=False)
            except UnsupportedSeries:
                continue
            if uid or "Modality" in ds:  # a DICOMDIR has neither
                series.setdefault(uid or derived_uid(str(path.parent.relative_to(folder))), []).append(path)
    return series


def choose_ct(folder: Path) -> list[Path]:
    """The files of the CT series under `folder` that covers most of the body (then: has most slices).

    Localizers do not count. A lone CT series that has faults is returned all the same: `read_ct` names them.
    Raises UnsupportedSeries: not_dicom (no DICOM file at all), localizer, not_ct.
    """
    series = find_series(folder)
    if not series:
        raise UnsupportedSeries("not_dicom", "there is no DICOM file in the folder")
    with quiet_pydicom():
        ranked = {uid: rank for uid, files in series.items() if (rank := _rank(files)) is not None}
        if ranked:
            return series[max(ranked, key=lambda uid: (*ranked[uid], uid))]
        localizers = any(is_localizer(_header(files[0])) for files in series.values())
    code, what = ("localizer", "only localizers") if localizers else ("not_ct", "no CT series")
    raise UnsupportedSeries(code, f"of the {len(series)} series in the folder there is {what}")


def _rank(files: Sequence[Path]) -> tuple[float, int] | None:
    """Coverage (mm, rounded to 5 so that reconstructions of one scan are equal) and slices; None if it is no CT."""
    frames: list[Frame] = []
    faulty = 0
    for number, path in enumerate(files, 1):
        try:
            frames += frames_of(path, f"file {number}", max_frames=10**6)
        except UnsupportedSeries as error:
            if error.code == "not_ct":
                return None
            faulty += 1
    if not frames:
        return (-1.0, faulty) if faulty else None
    try:
        _, _, normal = axes_of(frames[0])
    except UnsupportedSeries:
        return 0.0, len(frames)
    along = np.array([f.position for f in frames]) @ normal
    return 5.0 * round(float(np.ptp(along)) / 5.0), len(frames)


def _header(path: Path) -> Dataset:
    with path.open("rb") as file:
        return parse(file, "file")


@contextmanager
def quiet_pydicom() -> Iterator[None]:
    """The reader checks values itself; pydicom's remarks about them would only repeat hostile text in the log."""
    with warnings.catch_warnings(), pydicom.config.disable_value_validation():
        warnings.simplefilter("ignore")
        yield


def _read_headers(
    paths: Sequence[Path], max_slices: int, on_progress: OnProgress
) -> tuple[list[Frame], tuple[str, ...]]:
    """The frames of all files and a note when localizers were among them."""
    if not paths:
        raise UnsupportedSeries("too_few_slices", "there is no file to read")
    if len(paths) > max_slices:
        raise UnsupportedSeries("too_large", f"{len(paths)} files, at most {max_slices} slices are accepted")
    frames: list[Frame] = []
    localizers = 0
    for number, path in enumerate(sorted(paths), 1):
        found = frames_of(path, f"file {number} of {len(paths)}", max_frames=max_slices)
        frames += found
        localizers += found[0].of - len(found) if found else 1
        if len(frames) > max_slices:
            raise UnsupportedSeries("too_large", f"more than {max_slices} slices, at most that many are accepted")
        on_progress(Progress(stage=Stage.READ, done=number, total=2 * len(paths), text="headers"))
    if not frames:
        raise UnsupportedSeries("localizer", f"all {localizers} images are localizers")
    return frames, (f"{localizers} localizer images dropped",) if localizers else ()


def _check_concatenations(frames: Sequence[Frame]) -> None:
    """Raises missing_slices where parts of a multi-frame image that was split have not come."""
    parts = {f.concatenation for f in frames if f.concatenation is not None}
    missing, total = missing_parts(parts)
    if missing:
        text = f"series {frames[0].series_uid}: {missing} of {total} parts of a concatenation are missing"
        raise UnsupportedSeries("missing_slices", text)


@contextmanager
def _frames_of_one_volume(frames: Sequence[Frame]) -> Iterator[None]:
    """Say that a multi-frame series has several stacks or phases where that is why it is not one volume."""
    try:
        yield
    except UnsupportedSeries as error:
        phases, stacks = {f.temporal_position for f in frames}, {f.stack_id for f in frames}
        for code, what, found in (
            ("several_phases", "temporal positions", phases),
            ("several_stacks", "stacks", stacks),
        ):
            if error.code in _NOT_ONE_VOLUME and len(found) > 1:
                text = f"series {frames[0].series_uid} holds {len(found)} {what}, 1 is expected ({error.text})"
                raise UnsupportedSeries(code, text) from error
        raise


def _without_duplicates(groups: list[list[Frame]]) -> tuple[list[Frame], tuple[str, ...]]:
    """One frame for each position. Raises duplicate_positions where the pixels at one position differ."""
    for group in groups:
        if len(group) > 1 and not planes_are_equal(group):
            x, y, z = group[0].position
            text = f"series {group[0].series_uid}: {len(group)} different images lie at ({x:.1f}, {y:.1f}, {z:.1f}) mm"
            raise UnsupportedSeries("duplicate_positions", text)
    frames = [group[0] for group in groups]
    if len({(f.sop_instance_uid, f.index) for f in frames}) < len(frames):
        text = f"series {frames[0].series_uid}: images at different positions share one SOP Instance UID"
        raise UnsupportedSeries("mixed_series", text)
    dropped = sum(map(len, groups)) - len(frames)
    return frames, (f"{dropped} duplicate images with identical pixels dropped",) if dropped else ()


def _with_uids(frames: Sequence[Frame]) -> tuple[list[Frame], tuple[str, ...]]:
    """The frames, with UIDs that not one of them has derived from those that they have, and a note for each.

    The same files give the same UIDs, which makes the result's UIDs repeatable too (PS3.5 annex B.2).
    """
    known = frames[0].series_uid or "\n".join(sorted({f.sop_instance_uid for f in frames}))
    derived = {
        kind: derived_uid(f"{kind} {known}")
        for kind in ("series_uid", "study_uid", "frame_of_reference_uid")
        if not any(getattr(f, kind) for f in frames)  # only some have none: `check_same` refuses that
    }
    mended = [
        replace(
            f,
            series_uid=derived.get("series_uid", f.series_uid),
            study_uid=derived.get("study_uid", f.study_uid),
            frame_of_reference_uid=derived.get("frame_of_reference_uid", f.frame_of_reference_uid),
        )
        for f in frames
    ]
    notes = (f"no {kind.replace('_', ' ')}: {uid} is derived from the instances" for kind, uid in derived.items())
    return mended, tuple(notes)


def derived_uid(name: str) -> str:
    """A UID that is a function of `name` (PS3.5 annex B.2: a name-based UUID under 2.25)."""
    return f"2.25.{uuid.uuid5(uuid.NAMESPACE_OID, name).int}"


def _assemble(stack: Stack, on_progress: OnProgress) -> tuple[FloatVolume, Grid, tuple[str, ...]]:
    """Hounsfield units on an axis-aligned grid: turned where the axes allow it, else resampled with a note."""
    frame_uid = stack.frames[0].frame_of_reference_uid
    axes = aligned_axes(stack)
    if axes is not None:
        flips = [stack.steps[axis, k] < 0 for k, axis in enumerate(axes)]
        hu = _fill(stack, (flips[0], flips[1]), on_progress)
        grid = aligned_grid(stack, axes, frame_uid)
        # array axis 0 is the slice step, 1 the column step, 2 the row step; wanted are z, y, x
        order = [(2 - list(axes).index(lps)) for lps in (2, 1, 0)]
        return np.ascontiguousarray(hu.transpose(order)), grid, ()
    grid = enclosing_grid(stack, frame_uid)
    hu = resample_image(
        sitk.GetImageFromArray(_fill(stack, (False, False), on_progress)), grid, _lps_to_index(stack), fill=AIR_HU
    )
    if stack.tilt_deg > 0.05:
        return hu, grid, (f"gantry tilt of {stack.tilt_deg:.1f} degrees resampled",)
    return hu, grid, (f"oblique planes ({_obliquity_deg(stack):.1f} degrees) resampled",)


def _fill(stack: Stack, flips: tuple[bool, bool], on_progress: OnProgress) -> FloatVolume:
    """All planes [slice, row, column]; `flips` reverses columns (along a row), rows (along a column)."""
    columns, rows, slices = stack.sizes
    volume = np.empty((slices, rows, columns), np.float32)
    turn = (slice(None, None, -1 if flips[1] else 1), slice(None, None, -1 if flips[0] else 1))
    done = 0
    files: dict[Path, list[tuple[int, Frame]]] = {}
    for k, frame in enumerate(stack.frames):
        files.setdefault(frame.path, []).append((k, frame))
    for members in files.values():
        members.sort(key=lambda member: member[1].index)
        for (k, frame), raw in zip(members, stored_planes([frame for _, frame in members]), strict=True):
            hounsfield(raw[turn], frame, volume[k])
            done += 1
            on_progress(Progress(stage=Stage.READ, done=slices + done, total=2 * slices, text="pixels"))
    return volume


def _lps_to_index(stack: Stack) -> sitk.AffineTransform:
    """Maps an LPS point to (column, row, slice), the "physical" point of an image without spacing or direction."""
    inverse = np.linalg.inv(stack.steps)
    transform = sitk.AffineTransform(3)
    transform.SetMatrix(inverse.ravel().tolist())
    transform.SetTranslation((-inverse @ stack.origin_mm).tolist())
    return transform


def _obliquity_deg(stack: Stack) -> float:
    units = np.abs(stack.steps) / np.linalg.norm(stack.steps, axis=0)
    return math.degrees(math.acos(min(1.0, float(units.max(axis=0).min()))))


def _source(stack: Stack, notes: tuple[str, ...]) -> SourceSeries:
    first = stack.frames[0]
    header, left_out = _read_header(first)
    acquired = earliest(f.acquired for f in stack.frames)
    for kind in ("Series", "Study"):
        if acquired == ("", ""):
            acquired = date_and_time(str(header.get(f"{kind}Date") or ""), str(header.get(f"{kind}Time") or ""))
    return SourceSeries(
        study_uid=first.study_uid,
        series_uid=first.series_uid,
        header=header,
        instances=_instances(stack),
        earliest_acquisition=acquired,
        lossy=any(f.lossy for f in stack.frames),
        notes=(*notes, *left_out),
    )


def _instances(stack: Stack) -> tuple[SourceInstance, ...]:
    """One entry for each plane, foot to head: an instance, or one frame of a multi-frame instance."""
    columns, rows, _ = stack.sizes
    to_center = stack.steps[:, 0] * (columns - 1) / 2 + stack.steps[:, 1] * (rows - 1) / 2
    instances = []
    for frame in stack.frames:
        x, y, z = np.array(frame.position) + to_center
        instances.append(
            SourceInstance(
                sop_class_uid=frame.sop_class_uid,
                sop_instance_uid=frame.sop_instance_uid,
                position_mm=(float(x), float(y), float(z)),
                frame_number=frame.number,
            )
        )
    return tuple(instances)


def _read_header(frame: Frame) -> tuple[Dataset, tuple[str, ...]]:
    """The data set without pixel data, private elements, and elements that cannot be read (they get a note).

    Its UIDs are those of `frame`, also where the file had none. A multi-frame header describes that one frame, in the
    attributes of a classic CT.
    """
    ds = pydicom.dcmread(frame.path, stop_before_pixels=True)
    if frame.number:
        for keyword in _OF_ALL_FRAMES & set(ds.dir()):
            del ds[keyword]
        ds.ImagePositionPatient, ds.ImageOrientationPatient = list(frame.position), list(frame.orientation)
        ds.PixelSpacing = list(frame.pixel_spacing_mm)
        if frame.kind:
            ds.ImageType = list(frame.kind)
    broken = _prune(ds)
    ds.SOPClassUID, ds.SOPInstanceUID = frame.sop_class_uid, frame.sop_instance_uid
    ds.StudyInstanceUID, ds.SeriesInstanceUID = frame.study_uid, frame.series_uid
    ds.FrameOfReferenceUID = frame.frame_of_reference_uid
    return ds, (f"header elements that cannot be read left out: {', '.join(broken)}",) if broken else ()


def _prune(ds: Dataset) -> list[str]:
    """Remove private elements and unreadable ones, at every depth; returns the tags of the unreadable."""
    broken = []
    for tag in list(ds.keys()):
        if tag.is_private:
            del ds[tag]
        elif (items := _nested(ds, tag)) is None:
            del ds[tag]
            broken.append(str(tag))
        else:
            for item in items:
                broken += _prune(item)
    return broken


def _nested(ds: Dataset, tag: BaseTag) -> list[Dataset] | None:
    """The items of a sequence, nothing for another element, None for one without a readable value."""
    try:
        element = ds[tag]
        if element.VR == "SQ":
            return list(element.value)
        values = element.value if element.VM > 1 else [element.value]
    except Exception:  # whatever a malformed value raises: the outputs do without the element
        return None
    # without validation pydicom hands a number that is none over as text
    return None if element.VR in ("IS", "DS") and any(isinstance(v, str) and v for v in values) else []
