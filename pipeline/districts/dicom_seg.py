"""Districts from a DICOM Segmentation object of the CT's study: a person's, or another program's.

Of the SEG objects that refer to the CT, or to a PET series that was made of it, the newest is tried first. Its segments
are matched to districts by SNOMED code, then by label; left and right limbs, and parts of a region, join. It is
refused, with a code and a sentence, and the next segmenter of the chain is tried: no_seg, seg_own, seg_unreadable,
seg_frame_of_reference, seg_geometry, seg_too_large, seg_no_districts, seg_overlap, seg_coverage.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy import ndimage

from pipeline.ct_reader import quiet_pydicom
from pipeline.districts.builtin import without_slivers
from pipeline.districts.names import PARTS, WHOLE_REGIONS, district_coded, district_named
from pipeline.districts.outside import find_body, nearest_filled
from pipeline.districts.seg_object import (
    Planes,
    Segment,
    SegObject,
    file_digest,
    masks,
    planes_of,
    read_seg,
)
from pipeline.errors import DistrictError, SegmenterUnavailable
from pipeline.geometry import bounding_box, resample
from pipeline.types import CtVolume, District, DistrictMap, DistrictOptions, Grid, LabelVolume, SourceSeries

NAME = "dicom_seg"
MIN_COVERAGE = 0.9  # of the body's voxels, and of its extent along z: less is a SEG of something else
MAX_OVERLAP = 0.01  # of the body: more is no border's sliver, and which district is right cannot be known
FILL_TOLD = 0.01  # of the body
MAX_GAP = 0.005  # of the body, in one piece and away from skin and borders: a limb or an organ was left out
THIN_MM = 6.0  # half of what may be missing at skin and borders
MAX_SEGMENTS = 64  # of districts: organs of the same names would be a few
MAX_TRIED = 5  # SEG objects of a study: the newest; the job has a deadline
DIGEST_SHOWN = 12
ALGORITHM_SHOWN = 40  # characters of a text that is somebody else's


def segment(ct: CtVolume, grid: Grid, options: DistrictOptions) -> DistrictMap:
    """Districts of `ct` on `grid` from one of `options.segmentations`.

    A body voxel that the SEG leaves out gets the nearest district (eq. 2); a district's confidence is the share of it
    that the SEG itself labeled. Raises SegmenterUnavailable where no SEG serves; DistrictError (no_body).
    """
    with quiet_pydicom():
        found, refusals = _referring(options, ct.source)
        for seg in found[:MAX_TRIED]:
            try:
                return _districts_of(seg, ct, grid)
            except SegmenterUnavailable as reason:
                refusals.append(reason)
    if not found and not refusals:
        raise SegmenterUnavailable("no_seg", "there is no SEG in the study that refers to the CT series")
    raise SegmenterUnavailable(refusals[0].code, "; ".join(reason.text for reason in refusals))


def _referring(options: DistrictOptions, source: SourceSeries) -> tuple[list[SegObject], list[SegmenterUnavailable]]:
    """The SEG objects that refer to the CT or to a result of it, the newest first, and why others cannot be read."""
    ours = {source.series_uid, *(i.sop_instance_uid for i in source.instances), *options.result_series}
    found: list[SegObject] = []
    refusals: list[SegmenterUnavailable] = []
    for path in options.segmentations:
        try:
            seg = read_seg(path)
        except SegmenterUnavailable as reason:
            refusals.append(reason)
            continue
        if seg.references & ours:
            found.append(seg)
    return sorted(found, key=lambda seg: (seg.created, seg.sop_instance_uid), reverse=True), refusals


def _districts_of(seg: SegObject, ct: CtVolume, grid: Grid) -> DistrictMap:
    if seg.own:  # an archive may send back what it got: an unsure segmenter's guess must not come back as given
        raise SegmenterUnavailable("seg_own", f"SEG {seg.sop_instance_uid} is our own, and nobody has changed it")
    if seg.frame_of_reference_uid != ct.grid.frame_of_reference_uid:
        raise SegmenterUnavailable(
            "seg_frame_of_reference", f"SEG {seg.sop_instance_uid} has another Frame of Reference than the CT"
        )
    wanted = {s.number: district for s in seg.segments if (district := district_of(s)) is not None}
    if not wanted:
        text = f"SEG {seg.sop_instance_uid}: none of its {len(seg.segments)} segments is a district"
        raise SegmenterUnavailable("seg_no_districts", text)
    if len(wanted) > MAX_SEGMENTS:
        text = f"SEG {seg.sop_instance_uid} has {len(wanted)} segments for districts, at most {MAX_SEGMENTS} are read"
        raise SegmenterUnavailable("seg_too_large", text)
    planes = planes_of(seg)
    merged, overlap_ml = merge(seg, planes, wanted)
    body = find_body(ct, grid)
    box = bounding_box(body)
    if box is None:
        raise DistrictError("no_body", f"segmenting districts: no patient in a volume of {ct.hu.shape} voxels")
    overlap = overlap_ml / (float(body.sum()) * grid.voxel_ml)
    if overlap > MAX_OVERLAP:
        text = f"SEG {seg.sop_instance_uid}: districts overlap in {overlap:.1%} of the body"
        raise SegmenterUnavailable("seg_overlap", text)
    given = np.where(body, resample(merged, planes.grid, grid, fill=0, nearest=True), 0).astype(np.uint8)
    share = _check_coverage(seg, given, body)
    _check_gaps(seg, given, body, grid)
    labels = np.zeros(grid.shape, dtype=np.uint8)
    labels[box] = without_slivers(nearest_filled(given[box], body[box], grid.spacing_mm))
    notes = [f"{NAME}: SEG {seg.sop_instance_uid}"]
    if overlap > 0:
        notes.append(f"{NAME}: districts overlap in {overlap:.2%} of the body, the first segment counts")
    if 1 - share > FILL_TOLD:
        notes.append(f"{NAME}: {1 - share:.1%} of the body got the nearest district")
    return DistrictMap(
        labels=labels,
        grid=grid,
        segmenter=NAME,
        version=_version(seg, wanted),
        confidence=_given_shares(labels, given),
        notes=tuple(notes),
    )


def district_of(one: Segment) -> District | None:
    """By SNOMED code, else by the words of the label without side and plural; None: not a district."""
    coded = district_coded(one.kind, (*WHOLE_REGIONS, *PARTS))
    return coded if coded is not None else district_named(one.label)


def merge(seg: SegObject, planes: Planes, wanted: Mapping[int, District]) -> tuple[LabelVolume, float]:
    """Districts [z, y, x] on `planes.grid`, the first segment where several claim a voxel, and how many ml those are.

    Segments of one district may overlap: they are parts and wholes. Raises SegmenterUnavailable (seg_unreadable).
    """
    labels = np.zeros(planes.shape, dtype=np.uint8)
    overlapping = 0
    for number, plane, mask in masks(seg, planes, list(wanted)):
        there = labels[plane]
        overlapping += int(np.count_nonzero(mask & (there != 0) & (there != wanted[number])))
        there[mask & (there == 0)] = wanted[number]
    return planes.upright(labels), overlapping * planes.grid.voxel_ml


def _check_coverage(seg: SegObject, given: LabelVolume, body: np.ndarray) -> float:
    """The share of the body that the SEG labels. Raises SegmenterUnavailable (seg_coverage)."""
    share = float(np.count_nonzero(given) / np.count_nonzero(body))
    planes = float(np.count_nonzero(given.any(axis=(1, 2))) / np.count_nonzero(body.any(axis=(1, 2))))
    for what, found in (("the body's volume", share), ("the body's extent along z", planes)):
        if found < MIN_COVERAGE:
            text = f"SEG {seg.sop_instance_uid} covers {found:.0%} of {what}, at least {MIN_COVERAGE:.0%} are wanted"
            raise SegmenterUnavailable("seg_coverage", text)
    return share


def _check_gaps(seg: SegObject, given: LabelVolume, body: np.ndarray, grid: Grid) -> None:
    """Refuse a SEG that lacks a whole part: the nearest district would be a wrong one there, as the head for an arm.

    What is thin (skin, borders between segments) is filled. Raises SegmenterUnavailable (seg_coverage).
    """
    thin_mm = max(THIN_MM, 1.5 * max(grid.spacing_mm))  # a layer of one or two voxels is thin on any grid
    missing = ndimage.distance_transform_edt(body & (given == 0), sampling=grid.spacing_mm) > thin_mm
    parts, count = ndimage.label(missing)
    if not count:
        return
    largest = float(np.bincount(parts.ravel())[1:].max() / np.count_nonzero(body))
    if largest > MAX_GAP:
        text = f"SEG {seg.sop_instance_uid} leaves out a part of the body, {largest:.1%} of it or more"
        raise SegmenterUnavailable("seg_coverage", text)


def _given_shares(labels: LabelVolume, given: LabelVolume) -> dict[District, float]:
    """1.0 where the SEG labeled all of a district, less by what had to be filled."""
    size = len(District) + 1
    counts = np.bincount(labels.ravel(), minlength=size)
    own = np.bincount(labels[labels == given].ravel(), minlength=size)
    return {d: float(own[d] / counts[d]) for d in District if counts[d]}


def _version(seg: SegObject, wanted: Mapping[int, District]) -> str:
    """The file's hash and its algorithm's name: another SEG makes another result."""
    algorithm = next((s.algorithm for s in seg.segments if s.number in wanted and s.algorithm), "")
    return f"{file_digest(seg)[:DIGEST_SHOWN]} {algorithm[:ALGORITHM_SHOWN]}".strip()
