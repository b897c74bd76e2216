"""Studies among DICOM files, wherever they lie: grouped by Study Instance UID, parts told apart by Modality."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import pydicom
from pydicom.uid import PositronEmissionTomographyImageStorage

from training.cases.dicom_headers import Header, coverage_mm, quiet_pydicom, scan, stack_planes
from training.cases.dicom_volume import check_pet_stack
from training.cases.ids import patient_hash, study_id
from training.cases.metadata import Metadata
from training.cases.segments import kind_of
from training.cases.suv import SuvScale, suv_scale
from training.cases.types import Study
from training.errors import StudyError
from training.prepared import RefusedStudy

WHOLE_BODY_SHARE = 1.5  # a PET that reaches this much further than every other is the whole-body one

Series = Sequence[Header]


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What a folder holds."""

    studies: tuple[Study, ...]
    refused: tuple[RefusedStudy, ...]
    phantom: bool = False


def find_dicom(files: Sequence[Path], metadata: Metadata, on_file: Callable[[], None]) -> Found:
    """The studies among `files`, from headers alone; each is checked as far as headers go."""
    headers, unreadable = scan(files, on_file)
    broken: dict[Path, int] = {}
    for path in unreadable:
        broken[path.parent] = broken.get(path.parent, 0) + 1
    studies: list[Study] = []
    refused: list[RefusedStudy] = []
    headers.sort(key=lambda h: (h.study_uid, h.series_uid))
    for uid, members in groupby(headers, key=lambda h: h.study_uid):
        group = list(members)
        name = study_id(group[0].subject, uid)
        try:
            with quiet_pydicom():
                studies.append(_study(name, group, broken, metadata))
        except StudyError as error:
            refused.append(RefusedStudy(study=name, code=error.code, text=error.text))
    homes = {header.path.parent for header in headers}
    if lost := sum(count for folder, count in broken.items() if folder not in homes):
        text = f"{lost} files cannot be read as DICOM and belong to no study that could be read"
        refused.append(RefusedStudy(study="unknown", code="unreadable", text=text))
    return Found(
        studies=tuple(studies), refused=tuple(refused), phantom=bool(headers) and all(h.phantom for h in headers)
    )


def _study(name: str, group: Series, broken: dict[Path, int], metadata: Metadata) -> Study:
    """Choose the parts of one study and check them. Raises StudyError."""
    if not group[0].study_uid:
        raise StudyError("unreadable", f"{len(group)} files have no StudyInstanceUID")
    if not any(header.modality == "PT" for header in group):
        raise StudyError("no_pet", "there is no PET (Modality PT) in the study")
    pet = _choose_pet(_series(group, "PT"))
    ct, notes = _choose_ct(_series(group, "CT"), pet)
    if lost := sum(broken.get(folder, 0) for folder in {h.path.parent for h in (*ct, *pet)}):
        raise StudyError("unreadable", f"{lost} files beside the CT's and the PET's cannot be read as DICOM")
    check_pet(pet)
    if all(header.plane is not None for header in ct):  # an enhanced CT is checked when it is read
        stack_planes(ct, "CT", drop_duplicates=True)
    masks, seg_notes = _segmentations([h for h in group if h.modality == "SEG"], pet[0])
    first = pet[0]
    known = metadata.of(first.subject, study_uid=first.study_uid, date=first.study_date)
    return Study(
        id=name,
        patient=patient_hash(first.subject or first.study_uid),
        layout="tcia",
        parts={"ct": _paths(ct), "pet": _paths(pet), **masks},
        diagnosis=known.diagnosis,
        age=known.age,
        sex=known.sex,
        notes=(*notes, *seg_notes, *known.notes, *(() if first.subject else ("no PatientID: a patient of its own",))),
    )


def _series(group: Series, modality: str) -> list[Series]:
    """The series of one modality, without localizers and without what is no image of that modality."""
    members = [h for h in group if h.modality == modality and not h.localizer]
    members.sort(key=lambda h: h.series_uid)
    return [list(series) for _, series in groupby(members, key=lambda h: h.series_uid)]


def _choose_pet(series: list[Series]) -> Series:
    """The one attenuation-corrected whole-body PET.

    Raises StudyError: no_pet (no PET images among the objects), suv_not_corrected (none is corrected), two_pets.
    """
    images = [s for s in series if s[0].sop_class_uid == PositronEmissionTomographyImageStorage]
    if not images:
        raise StudyError("no_pet", "no series of Modality PT holds PET images (PET Image Storage)")
    corrected = [s for s in images if "ATTN" in s[0].corrected]
    if not corrected:
        raise StudyError("suv_not_corrected", f"PET: none of {len(images)} series is attenuation-corrected (ATTN)")
    if len(corrected) == 1:
        return corrected[0]
    whole = [s for s in corrected if s[0].series_type == "WHOLE BODY"]
    if len(whole) == 1:
        return whole[0]
    ranked = sorted(corrected, key=coverage_mm, reverse=True)
    if coverage_mm(ranked[0]) > WHOLE_BODY_SHARE * coverage_mm(ranked[1]):
        return ranked[0]
    uids = ", ".join(s[0].series_uid for s in ranked)
    text = (
        f"{len(corrected)} attenuation-corrected PET series that could each be meant ({uids}): leave one in the study"
    )
    raise StudyError("two_pets", text)


def _choose_ct(series: list[Series], pet: Series) -> tuple[Series, tuple[str, ...]]:
    """The CT in the PET's Frame of Reference that covers most, then has most slices.

    Raises StudyError: no_ct, ct_elsewhere.
    """
    if not series:
        raise StudyError("no_ct", "there is no CT in the study (localizers do not count)")
    here = [s for s in series if s[0].frame_of_reference_uid == pet[0].frame_of_reference_uid]
    if not here:
        text = f"none of {len(series)} CT series shares the PET's Frame of Reference: their places cannot be compared"
        raise StudyError("ct_elsewhere", text)
    best = max(here, key=lambda s: (coverage_mm(s), len(s), s[0].series_uid))
    return best, (f"CT chosen among {len(series)} series",) if len(series) > 1 else ()


def check_pet(pet: Series) -> SuvScale:
    """Geometry and SUV factor of a PET series, from headers. Raises StudyError."""
    stack = stack_planes(pet, "PET", drop_duplicates=False)
    check_pet_stack(stack)
    for plane in stack.frames:
        if not np.isfinite([plane.slope, plane.intercept]).all() or plane.slope == 0:
            text = f"PET: instance {plane.sop_instance_uid} has no usable RescaleSlope"
            raise StudyError("suv_rescale", text)
    return scale_of(stack.frames[0].path, pet)


def scale_of(path: Path, pet: Series) -> SuvScale:
    """The SUV factor of a series, from the whole header at `path` and the acquisition times of all its files."""
    with quiet_pydicom():
        ds = pydicom.dcmread(path, stop_before_pixels=True)
        return suv_scale(ds, earliest_acquisition=min((h.acquired for h in pet if h.acquired), default=None))


def _segmentations(segs: Series, pet: Header) -> tuple[dict[str, tuple[Path, ...]], tuple[str, ...]]:
    """The files with lesions and those with districts. Raises StudyError seg_elsewhere."""
    parts: dict[str, list[Path]] = {}
    others = 0
    for seg in segs:
        kinds = [kind_of(segment)[0] for segment in seg.segments]
        wanted = sorted({kind for kind in kinds if kind != "other"})
        others += kinds.count("other")
        if wanted and seg.frame_of_reference_uid != pet.frame_of_reference_uid:
            text = f"SEG of series {seg.series_uid}: its Frame of Reference is not the PET's: its place cannot be known"
            raise StudyError("seg_elsewhere", text)
        for kind in wanted:
            parts.setdefault(kind, []).append(seg.path)
    notes: tuple[str, ...] = (f"{others} segments of organs or tissues are not used",) if others else ()
    if "lesions" not in parts:
        notes += ("no SEG of lesions",)
    return {kind: tuple(sorted(paths)) for kind, paths in parts.items()}, notes


def _paths(series: Iterable[Header]) -> tuple[Path, ...]:
    return tuple(sorted(header.path for header in series))
