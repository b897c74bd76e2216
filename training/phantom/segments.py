"""A phantom's districts and lesions as DICOM SEG, on the grid of its CT or PET."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import highdicom as hd
import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset, dcmread
from pydicom.dataset import FileDataset
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code

from pipeline.geometry import resample
from pipeline.types import District
from training.phantom.dicom import SERIES_NUMBERS, StudyHeader, header_of, in_plane, uid_of
from training.phantom.spec import Phantom


def write_seg(
    phantom: Phantom, folder: Path, ct_paths: list[Path], *, header: StudyHeader | None = None, name: str = "seg.dcm"
) -> Path:
    """A DICOM SEG with one segment per district that is there, on the grid of the CT series `ct_paths`."""
    sources = [dcmread(path) for path in ct_paths]
    grid = in_plane(phantom.grid, int(sources[0].Columns))
    labels = resample(phantom.districts, phantom.grid, grid, fill=0, nearest=True)
    described = {
        District.HEAD: codes.SCT.HeadAndNeck,
        District.TRUNK: codes.SCT.Trunk,
        District.ARMS: codes.SCT.UpperLimb,
        District.LEGS: codes.SCT.LowerLimb,
    }
    present = [d for d in District if (labels == d).any()]
    segments = [
        _segment(number, d.key, codes.SCT.AnatomicalStructure, described[d])
        for number, d in enumerate(present, start=1)
    ]
    frames = np.stack([labels == district for district in present], axis=-1).astype(np.uint8)
    header = header or header_of(phantom)
    return _write_segments(phantom, header, "seg", "PHANTOM DISTRICTS", sources, frames, segments, folder / name)


def write_lesion_seg(
    phantom: Phantom, folder: Path, pet_paths: list[Path], *, header: StudyHeader | None = None, name: str = "seg.dcm"
) -> Path:
    """A DICOM SEG with one segment, the lesions, on the grid of the PET series `pet_paths`.

    Raises:
        ValueError: the phantom has no lesion voxel.
    """
    if not phantom.lesions.any():
        raise ValueError(f"phantom {phantom.spec.seed}: a SEG of lesions needs at least one lesion voxel")
    sources = [dcmread(path) for path in pet_paths]
    segment = _segment(1, "Lesion", codes.SCT.MorphologicallyAbnormalStructure, codes.SCT.Neoplasm)
    frames = (phantom.lesions > 0).astype(np.uint8)[..., None]
    header = header or header_of(phantom)
    return _write_segments(phantom, header, "lesions", "PHANTOM LESIONS", sources, frames, [segment], folder / name)


def _segment(number: int, label: str, category: Code, kind: Code) -> hd.seg.SegmentDescription:
    return hd.seg.SegmentDescription(
        segment_number=number,
        segment_label=label,
        segmented_property_category=category,
        segmented_property_type=kind,
        algorithm_type=hd.seg.SegmentAlgorithmTypeValues.MANUAL,
    )


def _write_segments(
    phantom: Phantom,
    header: StudyHeader,
    kind: str,
    description: str,
    sources: list[FileDataset],
    frames: NDArray[np.uint8],
    segments: list[hd.seg.SegmentDescription],
    path: Path,
) -> Path:
    seg = hd.seg.Segmentation(
        source_images=sources,
        pixel_array=frames,
        segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=segments,
        series_instance_uid=uid_of(phantom, kind),
        series_number=SERIES_NUMBERS[kind],
        sop_instance_uid=uid_of(phantom, kind, 0),
        instance_number=1,
        manufacturer="PHANTOM",
        manufacturer_model_name="MIRD-5",
        software_versions="1",
        device_serial_number="1",
        series_description=description,
    )
    _make_repeatable(seg, uid_of(phantom, kind, "dimensions"), header.scanned)
    path.parent.mkdir(parents=True, exist_ok=True)
    seg.save_as(path)
    return path


def _make_repeatable(seg: Dataset, dimension_uid: str, moment: datetime) -> None:
    """Put fixed values where highdicom takes the clock or a random UID: the same phantom gives the same bytes."""
    for elem in seg.iterall():
        if elem.keyword == "DimensionOrganizationUID":
            elem.value = dimension_uid
        elif elem.keyword in ("ContentDate", "SeriesDate", "InstanceCreationDate"):
            elem.value = f"{moment:%Y%m%d}"
        elif elem.keyword in ("ContentTime", "SeriesTime", "InstanceCreationTime"):
            elem.value = f"{moment:%H%M%S}"
        elif elem.keyword == "ContributionDateTime":
            elem.value = f"{moment:%Y%m%d%H%M%S}"
