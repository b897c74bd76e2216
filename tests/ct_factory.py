"""Writes valid CT Image Storage files from an array: the input of nearly every test that starts with DICOM."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.uid import (
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
    generate_uid,
)

Modify = Callable[[Dataset, int], None]
ENCODERS = {RLELossless: "pylibjpeg", JPEGLSLossless: "pyjpegls", JPEG2000Lossless: "pylibjpeg"}
NATIVE = {
    ImplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    DeflatedExplicitVRLittleEndian,
}


def write_ct(
    folder: Path,
    hu: NDArray[Any],
    *,
    spacing_mm: tuple[float, float, float] = (3.0, 2.0, 2.0),
    origin_mm: tuple[float, float, float] | None = None,
    orientation: tuple[float, float, float, float, float, float] = (1, 0, 0, 0, 1, 0),
    transfer_syntax: str = ExplicitVRLittleEndian,
    slope: float = 1,
    intercept: float = -1024,
    study_uid: str | None = None,
    series_uid: str | None = None,
    frame_of_reference_uid: str | None = None,
    patient_name: str = "PHANTOM^TEST",
    patient_id: str = "PH-1",
    accession: str = "ACC1",
    series_number: int = 2,
    description: str = "BODY 3.0 B40f",
    kernel: str = "B40f",
    image_type: tuple[str, ...] = ("ORIGINAL", "PRIMARY", "AXIAL"),
    patient_position: str = "HFS",
    modify: Modify | None = None,
) -> list[Path]:
    """Write `hu` [slice, row, column] as one file per slice and return the paths in that order.

    `spacing_mm` is (between slices, between rows, between columns). `origin_mm` is the LPS position (x, y, z) of
    the first pixel of slice 0 (default: centered on x = y = 0, z = 0); slice k lies k spacings along the normal,
    which is row direction x column direction. Given UIDs make the SOP Instance UIDs a function of the series UID.
    `modify(ds, k)` changes slice k last, before it is compressed and written; the data set carries its file_meta.
    """
    folder.mkdir(parents=True, exist_ok=True)
    series_uid = series_uid or generate_uid()
    stored = np.rint((np.asarray(hu, dtype=np.float64) - intercept) / slope).astype(np.int32)
    dz, dy, dx = spacing_mm
    _, rows, columns = stored.shape
    along_row, along_column = np.array(orientation[:3], float), np.array(orientation[3:], float)
    normal = np.cross(along_row, along_column)
    if origin_mm is None:
        middle = along_row * (columns - 1) * dx / 2 + along_column * (rows - 1) * dy / 2
        origin_mm = (-middle[0], -middle[1], -middle[2])
    base: dict[str, Any] = {
        "SpecificCharacterSet": "ISO_IR 192",
        "ImageType": list(image_type),
        "SOPClassUID": CTImageStorage,
        "StudyDate": "20240102",
        "SeriesDate": "20240102",
        "AcquisitionDate": "20240102",
        "ContentDate": "20240102",
        "StudyTime": "101500",
        "SeriesTime": "102000",
        "ContentTime": "102500",
        "AccessionNumber": accession,
        "Modality": "CT",
        "Manufacturer": "PHANTOM",
        "ManufacturerModelName": "PHANTOM CT",
        "ReferringPhysicianName": "",
        "StudyDescription": "WHOLE BODY",
        "SeriesDescription": description,
        "PatientName": patient_name,
        "PatientID": patient_id,
        "PatientBirthDate": "19600101",
        "PatientSex": "O",
        "PatientWeight": "70",
        "PatientSize": "1.7",
        "SliceThickness": _ds(dz),
        "KVP": "120",
        "ConvolutionKernel": kernel,
        "BodyPartExamined": "WHOLEBODY",
        "PatientPosition": patient_position,
        "StudyInstanceUID": study_uid or generate_uid(),
        "SeriesInstanceUID": series_uid,
        "StudyID": "1",
        "SeriesNumber": series_number,
        "AcquisitionNumber": 1,
        "ImageOrientationPatient": [_ds(v) for v in orientation],
        "FrameOfReferenceUID": frame_of_reference_uid or generate_uid(),
        "PositionReferenceIndicator": "",
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "Rows": rows,
        "Columns": columns,
        "PixelSpacing": [_ds(dy), _ds(dx)],
        **_pixel_format(stored),
        "RescaleIntercept": _ds(intercept),
        "RescaleSlope": _ds(slope),
        "RescaleType": "HU",
        "WindowCenter": "40",
        "WindowWidth": "400",
    }
    paths = []
    for k, plane in enumerate(stored):
        ds = _instance(base, generate_uid(entropy_srcs=[series_uid, str(k)]))
        ds.InstanceNumber = k + 1
        ds.AcquisitionTime = f"{102100 + k % 60:06d}"
        position = np.asarray(origin_mm, float) + normal * (k * dz)
        ds.ImagePositionPatient = [_ds(v) for v in position]
        big = transfer_syntax == ExplicitVRBigEndian
        kind = "i2" if base["PixelRepresentation"] else "u2"
        pixels = plane.astype((">" if big else "<") + kind).tobytes()
        ds.add_new("PixelData", "OW", pixels)  # rows x columns x 2 bytes: always an even length
        path = folder / f"{k + 1:04d}.dcm"
        _write(ds, path, transfer_syntax, k, modify)
        paths.append(path)
    return paths


def _instance(elements: dict[str, Any], sop_instance_uid: str) -> Dataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = sop_instance_uid
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds = Dataset()
    ds.file_meta = meta
    for keyword, value in elements.items():
        setattr(ds, keyword, value)
    ds.SOPInstanceUID = sop_instance_uid
    return ds


def _write(ds: Dataset, path: Path, transfer_syntax: str, k: int, modify: Modify | None) -> None:
    if transfer_syntax in NATIVE:
        ds.file_meta.TransferSyntaxUID = transfer_syntax
        if modify:
            modify(ds, k)
    else:
        if modify:
            modify(ds, k)
        ds.compress(transfer_syntax, encoding_plugin=ENCODERS[transfer_syntax], generate_instance_uid=False)
    ds.save_as(path, enforce_file_format="MediaStorageSOPInstanceUID" in ds.file_meta and "SOPInstanceUID" in ds)


def _pixel_format(stored: NDArray[np.int32]) -> dict[str, int]:
    """Unsigned 12 bits where the values allow it, else unsigned or signed 16 bits."""
    low, high = int(stored.min()), int(stored.max())
    if low < -32768 or high > (65535 if low >= 0 else 32767):
        raise ValueError(f"stored values {low} to {high} do not fit 16 bits: choose another slope or intercept")
    bits = 12 if low >= 0 and high < 4096 else 16
    return {
        "BitsAllocated": 16,
        "BitsStored": bits,
        "HighBit": bits - 1,
        "PixelRepresentation": int(low < 0),
    }


def _ds(value: float) -> str:
    """A decimal string of at most 16 characters (PS3.5 table 6.2-1, VR DS)."""
    text = f"{float(value):.10g}"
    return text if len(text) <= 16 else f"{float(value):.8g}"
