"""A phantom as DICOM files: the CT series that a PACS would route, and its PET. Its SEGs are in `segments`.

Every object is marked as a phantom. UIDs follow from the spec, so the same phantom gives the same series.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
from pydicom import Dataset
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import (
    UID,
    CTImageStorage,
    ExplicitVRLittleEndian,
    PositronEmissionTomographyImageStorage,
    generate_uid,
)

from pipeline.geometry import resample
from pipeline.types import FloatVolume, Grid
from training.phantom.spec import Phantom

SCANNED = datetime(2024, 1, 15, 10, 30, 0)  # a fixed time: the same phantom gives the same bytes
UPTAKE = timedelta(minutes=60)
F18_HALF_LIFE_S = 6586.2
INJECTED_BQ = 3.5e8
CT_INTERCEPT = -1024
PET_LEVELS = 32767
SERIES_NUMBERS = {"ct": 2, "pet": 3, "seg": 4, "lesions": 5}


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyHeader:
    """What a study's objects say of patient and examination; the defaults are those of a single phantom."""

    patient_id: str
    patient_name: str
    scanned: datetime = SCANNED
    sex: str = "O"
    age_years: int | None = None
    description: str = "PHANTOM PET/CT"


def header_of(phantom: Phantom) -> StudyHeader:
    """The header of a phantom that stands alone."""
    return StudyHeader(patient_id=f"PH-{phantom.spec.seed}", patient_name=f"PHANTOM^{phantom.spec.seed}")


def study_uid(phantom: Phantom) -> str:
    """The study that all objects of this phantom belong to."""
    return uid_of(phantom, "study")


def write_ct_series(
    phantom: Phantom, folder: Path, *, matrix: int | None = 512, header: StudyHeader | None = None
) -> list[Path]:
    """CT Image Storage, one file per slice, foot to head; in-plane resampled to `matrix` (None: as painted).

    The slice spacing stays. Returns the paths in slice order.
    """
    grid = phantom.grid if matrix is None else in_plane(phantom.grid, matrix)
    hu = phantom.hu if grid == phantom.grid else resample(phantom.hu, phantom.grid, grid, fill=-1024.0)
    return write_ct_volume(phantom, hu, grid, folder, header=header)


def write_ct_volume(
    phantom: Phantom,
    hu: FloatVolume,
    grid: Grid,
    folder: Path,
    *,
    header: StudyHeader | None = None,
    name: str = "ct{index:04d}.dcm",
) -> list[Path]:
    """A CT of the phantom's person on any grid, HU [z, y, x]. `name` is formatted with `index` and `number`."""
    folder.mkdir(parents=True, exist_ok=True)
    common = _common(phantom, header or header_of(phantom), grid, "ct", "CT")
    fill(
        common,
        {
            "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
            "SeriesDescription": "PHANTOM WB 4.0 B40f",
            "KVP": "120",
            "ConvolutionKernel": "B40f",
            "RescaleIntercept": str(CT_INTERCEPT),
            "RescaleSlope": "1",
            "RescaleType": "HU",
            "BitsStored": 12,
            "HighBit": 11,
            "PixelRepresentation": 0,
            "AcquisitionNumber": "1",
            "WindowCenter": "40",
            "WindowWidth": "400",
        },
    )
    stored = np.clip(np.rint(hu - CT_INTERCEPT), 0, 4095).astype("<u2")
    return [
        _write(
            folder / name.format(index=index, number=index + 1),
            _slice(common, phantom, grid, "ct", index),
            CTImageStorage,
            pixels,
        )
        for index, pixels in enumerate(stored)
    ]


def write_pet_series(
    phantom: Phantom, folder: Path, *, header: StudyHeader | None = None, name: str = "pet{index:04d}.dcm"
) -> list[Path]:
    """PET Image Storage on the phantom's own grid, BQML, decay-corrected to the series time (START).

    Every slice has its own rescale slope, as scanners write it: the true SUV must be computed, not read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    header = header or header_of(phantom)
    common = _common(phantom, header, phantom.grid, "pet", "PT")
    injected = header.scanned - UPTAKE
    medicine = Dataset()
    medicine.Radiopharmaceutical = "FDG -- fluorodeoxyglucose"
    medicine.RadiopharmaceuticalStartTime = f"{injected:%H%M%S}"
    medicine.RadiopharmaceuticalStartDateTime = f"{injected:%Y%m%d%H%M%S}"
    medicine.RadionuclideTotalDose = f"{INJECTED_BQ:.6g}"
    medicine.RadionuclideHalfLife = f"{F18_HALF_LIFE_S}"
    medicine.RadionuclidePositronFraction = "0.97"
    medicine.RadionuclideCodeSequence = [_code("77004003", "SCT", "^18^Fluorine")]
    medicine.RadiopharmaceuticalCodeSequence = [_code("35321007", "SCT", "Fluorodeoxyglucose F^18^")]
    fill(
        common,
        {
            "ImageType": ["ORIGINAL", "PRIMARY"],
            "SeriesDescription": "PHANTOM WB PET",
            "Units": "BQML",
            "CountsSource": "EMISSION",
            "SeriesType": ["WHOLE BODY", "IMAGE"],
            "CorrectedImage": ["ATTN", "SCAT", "DECY"],
            "DecayCorrection": "START",
            "DecayFactor": "1",
            "FrameReferenceTime": "0",
            "ActualFrameDuration": "120000",
            "NumberOfSlices": phantom.grid.shape[0],
            "RescaleIntercept": "0",
            "BitsStored": 16,
            "HighBit": 15,
            "PixelRepresentation": 1,
        },
    )
    common.RadiopharmaceuticalInformationSequence = [medicine]
    bqml_per_suv = activity_per_suv(phantom)
    paths = []
    for index, suv in enumerate(phantom.suv):
        ds = _slice(common, phantom, phantom.grid, "pet", index)
        slope = f"{max(float(suv.max()), 1e-3) * bqml_per_suv / PET_LEVELS:.8g}"
        ds.RescaleSlope = slope
        ds.ImageIndex = index + 1
        stored = np.rint(np.minimum(suv * (bqml_per_suv / float(slope)), PET_LEVELS)).astype("<i2")
        path = folder / name.format(index=index, number=index + 1)
        paths.append(_write(path, ds, PositronEmissionTomographyImageStorage, stored))
    return paths


def activity_per_suv(phantom: Phantom) -> float:
    """Bq/ml at the series time for SUV 1, from the weight as the header gives it."""
    return INJECTED_BQ * decay_factor(UPTAKE) / (round(phantom.weight_kg, 1) * 1000)


def decay_factor(elapsed: timedelta) -> float:
    """The share of F-18 that is left after `elapsed`."""
    return float(2.0 ** (-elapsed.total_seconds() / F18_HALF_LIFE_S))


def fill(ds: Dataset, values: Mapping[str, Any]) -> None:
    for keyword, value in values.items():
        setattr(ds, keyword, value)


def uid_of(phantom: Phantom, *parts: object) -> str:
    """A UID for a part of the phantom's study: the same part, the same UID."""
    person = replace(phantom.spec, spacing_mm=(1.0, 1.0, 1.0))  # CT and PET on other grids are one study of one person
    return str(generate_uid(entropy_srcs=["phantom", repr(person), *(str(p) for p in parts)]))


def _code(value: str, scheme: str, meaning: str) -> Dataset:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, meaning
    return item


def in_plane(grid: Grid, matrix: int) -> Grid:
    """The same field of view, edge to edge, with `matrix` columns and square pixels; slices stay."""
    spacing = grid.extent_mm[2] / matrix
    rows = max(round(grid.extent_mm[1] / spacing), 1)
    shift_x, shift_y = (spacing - grid.spacing_mm[2]) / 2, (spacing - grid.spacing_mm[1]) / 2
    return Grid(
        shape=(grid.shape[0], rows, matrix),
        spacing_mm=(grid.spacing_mm[0], spacing, spacing),
        origin_mm=(grid.origin_mm[0] + shift_x, grid.origin_mm[1] + shift_y, grid.origin_mm[2]),
        frame_of_reference_uid=grid.frame_of_reference_uid,
    )


def _common(phantom: Phantom, header: StudyHeader, grid: Grid, kind: str, modality: str) -> Dataset:
    """What all slices of a series share."""
    dz, dy, dx = grid.spacing_mm
    date, time = f"{header.scanned:%Y%m%d}", f"{header.scanned:%H%M%S}"
    ds = Dataset()
    fill(
        ds,
        {
            "SpecificCharacterSet": "ISO_IR 100",
            "PatientName": header.patient_name,
            "PatientID": header.patient_id,
            "PatientBirthDate": "",
            "PatientSex": header.sex,
            "PatientWeight": f"{phantom.weight_kg:.1f}",
            "StudyInstanceUID": study_uid(phantom),
            "StudyID": "1",
            "StudyDate": date,
            "StudyTime": time,
            "StudyDescription": header.description,
            "AccessionNumber": f"PH{phantom.spec.seed}",
            "ReferringPhysicianName": "",
            "Modality": modality,
            "SeriesInstanceUID": uid_of(phantom, kind, grid.shape),
            "SeriesNumber": str(SERIES_NUMBERS[kind]),
            "SeriesDate": date,
            "SeriesTime": time,
            "AcquisitionDate": date,
            "AcquisitionTime": time,
            "ContentDate": date,
            "ContentTime": time,
            "Manufacturer": "PHANTOM",
            "ManufacturerModelName": "MIRD-5",
            "PatientPosition": "HFS",
            "FrameOfReferenceUID": grid.frame_of_reference_uid,
            "PositionReferenceIndicator": "",
            "ImageOrientationPatient": ["1", "0", "0", "0", "1", "0"],
            "PixelSpacing": [_decimal(dy), _decimal(dx)],
            "SliceThickness": _decimal(dz),
            "Rows": grid.shape[1],
            "Columns": grid.shape[2],
            "SamplesPerPixel": 1,
            "PhotometricInterpretation": "MONOCHROME2",
            "BitsAllocated": 16,
        },
    )
    if header.age_years is not None:
        ds.PatientAge = f"{header.age_years:03d}Y"
    return ds


def _slice(common: Dataset, phantom: Phantom, grid: Grid, kind: str, index: int) -> Dataset:
    ds = Dataset()
    ds.update(common)
    x, y, z = grid.origin_mm
    z += index * grid.spacing_mm[0]
    ds.SOPInstanceUID = uid_of(phantom, kind, grid.shape, index)
    ds.InstanceNumber = str(index + 1)
    ds.ImagePositionPatient = [_decimal(x), _decimal(y), _decimal(z)]
    ds.SliceLocation = _decimal(z)
    return ds


def _decimal(value: float) -> str:
    """At most 16 characters, as DS demands."""
    return f"{value:.8g}"


def _write(path: Path, ds: Dataset, sop_class_uid: str, pixels: FloatVolume | np.ndarray) -> Path:
    ds.SOPClassUID = sop_class_uid
    ds.add_new("PixelData", "OW", pixels.tobytes())
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = UID(sop_class_uid), ds.SOPInstanceUID
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    file = FileDataset(str(path), ds, file_meta=meta, preamble=b"\0" * 128)
    file.save_as(path, enforce_file_format=True)
    return path
