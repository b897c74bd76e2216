"""Small valid-enough result objects for tests of sending: secondary captures of 8x8 pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"


def write_instances(folder: Path, count: int, *, sop_class_uid: str = SECONDARY_CAPTURE) -> list[Path]:
    """`count` Part 10 files 0001.dcm ... of one series, in sending order."""
    folder.mkdir(parents=True, exist_ok=True)
    series_uid, study_uid = generate_uid(), generate_uid()
    return [_write(folder / f"{i:04d}.dcm", sop_class_uid, study_uid, series_uid, i) for i in range(1, count + 1)]


def sop_uids(files: list[Path]) -> list[str]:
    """The SOP Instance UIDs of files, in their order."""
    from pydicom import dcmread

    return [str(dcmread(path, specific_tags=["SOPInstanceUID"]).SOPInstanceUID) for path in files]


def _write(path: Path, sop_class_uid: str, study_uid: str, series_uid: str, number: int) -> Path:
    ds = Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID = sop_class_uid, generate_uid()
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.InstanceNumber = study_uid, series_uid, number
    ds.Modality, ds.PatientName, ds.PatientID = "PT", "PHANTOM^TEST", "PH-1"
    ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PhotometricInterpretation = 8, 8, 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 0
    ds.PixelData = np.full((8, 8), number, dtype="<u2").tobytes()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.MediaStorageSOPClassUID, ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPClassUID, ds.SOPInstanceUID
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.save_as(path, enforce_file_format=True)
    return path
