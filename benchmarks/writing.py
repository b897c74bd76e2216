"""How long a synthetic PET series takes to encode: our writer beside two plain ways, in the same run.

    python benchmarks/writing.py [--slices 400] [--size 400] [--rounds 3]

Rounds are interleaved, so that a busy machine disturbs all three alike; read the ratios, not the seconds. The plain
ways get the same quantized pixels: "pydicom" builds and encodes a fresh data set per slice, "highdicom" makes one
SCImage per slice, which has fewer attributes (no plane geometry, no SUV).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from copy import deepcopy
from datetime import UTC, datetime
from io import BytesIO
from statistics import median
from time import process_time

import numpy as np
from highdicom.sc import SCImage
from pydicom import Dataset, dcmread, dcmwrite

from pipeline.outputs.pet_series import encode_pet_series
from pipeline.outputs.quantize import quantize
from pipeline.provenance import ResultUids
from pipeline.types import Grid, ModelRef, OutputOptions, Provenance, SourceInstance, SourceSeries, SuvVolume

CREATED = datetime(2024, 5, 6, 7, 8, 9, tzinfo=UTC)
CT_CLASS = "1.2.840.10008.5.1.4.1.1.2"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", type=int, default=400)
    parser.add_argument("--size", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    suv, source = _volume(asked.slices, asked.size), _source(asked.slices)
    writers: dict[str, Callable[[], int]] = {
        "ours": lambda: _ours(suv, source),
        "pydicom": lambda: _pydicom(suv, source),
        "highdicom": lambda: _highdicom(suv, source),
    }
    seconds: dict[str, list[float]] = {name: [] for name in writers}
    for _ in range(asked.rounds):
        for name, write in writers.items():
            begun = process_time()
            n_bytes = write()
            seconds[name].append(process_time() - begun)
            if n_bytes < suv.suv.size * 2:
                raise SystemExit(f"{name} wrote {n_bytes} bytes, fewer than the pixels have")
    ours = median(seconds["ours"])
    print(f"{asked.slices} slices of {asked.size}x{asked.size}, median of {asked.rounds} rounds, CPU time")
    for name, times in seconds.items():
        each = median(times)
        print(f"{name:10} {each:8.3f} s {each / asked.slices * 1000:8.2f} ms per slice {each / ours:7.1f} x ours")


def _ours(suv: SuvVolume, source: SourceSeries) -> int:
    return sum(len(instance.data) for instance in _encode(suv, source))


def _encode(suv: SuvVolume, source: SourceSeries) -> tuple:
    provenance = Provenance(
        software_version="0",
        bundle_name="benchmark",
        bundle_version="0",
        bundle_sha256="0" * 64,
        models=(ModelRef(district="trunk", weights_sha256="0" * 64),),
        segmenter="none",
        segmenter_version="0",
        device="cpu",
    )
    options = OutputOptions()
    return encode_pet_series(
        suv,
        source=source,
        provenance=provenance,
        options=options,
        encoding="sc",
        uids=ResultUids(source=source, provenance=provenance, options=options, encoding="sc"),
        created=CREATED,
    ).instances


def _pydicom(suv: SuvVolume, source: SourceSeries) -> int:
    codes, _ = quantize(suv.suv)
    one = SuvVolume(suv=suv.suv[:1], grid=_grid(1, suv.grid.shape[1]))
    model = dcmread(BytesIO(_encode(one, source)[0].data))
    total = 0
    for index, plane in enumerate(codes):
        ds = deepcopy(model)
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = f"2.25.{index + 1}"
        ds.InstanceNumber = ds.ImageIndex = index + 1
        ds.ImagePositionPatient = [-200, -200, index * 3]
        ds.SliceLocation = index * 3
        ds.PixelData = plane.tobytes()
        buffer = BytesIO()
        dcmwrite(buffer, ds, enforce_file_format=True)
        total += buffer.tell()
    return total


def _highdicom(suv: SuvVolume, source: SourceSeries) -> int:
    codes, _ = quantize(suv.suv)
    total = 0
    for index, plane in enumerate(codes):
        image = SCImage.from_ref_dataset(
            ref_dataset=source.header,
            pixel_array=plane,
            photometric_interpretation="MONOCHROME2",
            bits_allocated=16,
            coordinate_system="PATIENT",
            patient_orientation=("L", "P"),
            series_instance_uid="2.25.1",
            sop_instance_uid=f"2.25.{index + 2}",
            series_number=1,
            instance_number=index + 1,
            manufacturer="benchmark",
        )
        buffer = BytesIO()
        image.save_as(buffer)
        total += buffer.tell()
    return total


def _grid(slices: int, size: int) -> Grid:
    return Grid(
        shape=(slices, size, size),
        spacing_mm=(3.0, 2.0, 2.0),
        origin_mm=(-200.0, -200.0, 0.0),
        frame_of_reference_uid="2.25.3",
    )


def _volume(slices: int, size: int) -> SuvVolume:
    rng = np.random.default_rng(0)
    suv = rng.gamma(1.0, 1.5, (slices, size, size)).astype(np.float32)
    return SuvVolume(suv=suv, grid=_grid(slices, size))


def _source(slices: int) -> SourceSeries:
    header = Dataset()
    header.SOPClassUID, header.SOPInstanceUID = CT_CLASS, "2.25.10"
    header.StudyInstanceUID, header.SeriesInstanceUID = "2.25.11", "2.25.12"
    header.FrameOfReferenceUID, header.Modality = "2.25.3", "CT"
    header.PatientName, header.PatientID, header.PatientBirthDate, header.PatientSex = "PHANTOM^ONE", "1", "", "O"
    header.StudyDate, header.StudyTime, header.StudyID = "20240102", "101500", "1"
    header.AccessionNumber, header.ReferringPhysicianName = "", ""
    header.SeriesNumber, header.InstanceNumber, header.PatientPosition = 2, 1, "HFS"
    return SourceSeries(
        study_uid="2.25.11",
        series_uid="2.25.12",
        header=header,
        instances=tuple(
            SourceInstance(
                sop_class_uid=CT_CLASS, sop_instance_uid=f"2.25.{100 + i}", position_mm=(0.0, 0.0, i * 3.0 + 1.0)
            )
            for i in range(slices)
        ),
        earliest_acquisition=("20240102", "101500"),
    )


if __name__ == "__main__":
    main()
