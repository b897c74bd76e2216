"""A small SUV volume, the CT series it came from, and one call that encodes them: what the output tests start with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path

import numpy as np
from ct_factory import write_ct
from pydicom import Dataset, dcmread

from pipeline.outputs.pet_series import encode_pet_series
from pipeline.outputs.picture import encode_mip
from pipeline.provenance import ResultUids
from pipeline.types import (
    EncodedSeries,
    Grid,
    ModelRef,
    OutputOptions,
    Provenance,
    SourceInstance,
    SourceSeries,
    SuvVolume,
)

CREATED = datetime(2024, 5, 6, 7, 8, 9, 123456, tzinfo=UTC)
CT_SPACING_MM = (3.0, 2.0, 2.5)
STUDY_UID, CT_SERIES_UID, FRAME_UID = "2.25.901", "2.25.902", "2.25.903"

OPTIONS = OutputOptions()
PROVENANCE = Provenance(
    software_version="0.1.0",
    bundle_name="phantom",
    bundle_version="3",
    bundle_sha256="ab" * 32,
    models=(ModelRef(district="head", weights_sha256="c1" * 32), ModelRef(district="trunk", weights_sha256="d2" * 32)),
    segmenter="builtin",
    segmenter_version="2",
    device="cpu",
)


def write_sample_ct(
    folder: Path, modify: Callable[[Dataset, int], None] | None = None, **changes: object
) -> list[Path]:
    """Nine axial slices of 16x20, 3 mm apart, patient HFS, weight 70, study of 2024-01-02."""
    hu = np.random.default_rng(7).integers(-1000, 1000, (9, 16, 20)).astype(np.int16)
    given = {
        "spacing_mm": CT_SPACING_MM,
        "origin_mm": (-25.0, -16.0, -100.0),
        "study_uid": STUDY_UID,
        "series_uid": CT_SERIES_UID,
        "frame_of_reference_uid": FRAME_UID,
        **changes,
    }
    return write_ct(folder, hu, modify=modify, **given)


def source_of(paths: list[Path], *, lossy: bool = False) -> SourceSeries:
    """What the reader hands to the outputs for these files."""
    headers = [dcmread(path, stop_before_pixels=True) for path in paths]
    first = headers[0]
    return SourceSeries(
        study_uid=STUDY_UID,
        series_uid=CT_SERIES_UID,
        header=first,
        instances=tuple(
            SourceInstance(
                sop_class_uid=h.SOPClassUID,
                sop_instance_uid=h.SOPInstanceUID,
                position_mm=tuple(float(v) for v in h.ImagePositionPatient),
            )
            for h in headers
        ),
        earliest_acquisition=("20240102", "102100"),
        lossy=lossy,
    )


def header_only(**elements: object) -> SourceSeries:
    """A source whose header holds just these elements."""
    header = Dataset()
    for keyword, value in elements.items():
        setattr(header, keyword, value)
    return SourceSeries(
        study_uid=STUDY_UID,
        series_uid=CT_SERIES_UID,
        header=header,
        instances=(
            SourceInstance(
                sop_class_uid="1.2.840.10008.5.1.4.1.1.2", sop_instance_uid="2.25.7", position_mm=(0, 0, -100.0)
            ),
        ),
        earliest_acquisition=("20240102", "102100"),
    )


def sample_suv(shape: tuple[int, int, int] = (6, 9, 11)) -> SuvVolume:
    """SUV 0 to 20 on a 4.5 x 4 x 4 mm grid that starts at the CT's lowest slice, in its frame of reference."""
    rng = np.random.default_rng(11)
    suv = rng.uniform(0, 20, shape).astype(np.float32)
    suv[:, :2] = 0
    suv[2:3] = 0  # a slice without any uptake
    grid = Grid(
        shape=shape, spacing_mm=(4.5, 4.0, 4.07283), origin_mm=(-24.3, -15.1, -100.0), frame_of_reference_uid=FRAME_UID
    )
    return SuvVolume(suv=suv, grid=grid)


@dataclass(frozen=True)
class Sample:
    """One set of arguments for the encoders."""

    source: SourceSeries
    suv: SuvVolume
    options: OutputOptions = OPTIONS
    provenance: Provenance = PROVENANCE
    created: datetime = CREATED

    def with_options(self, **changes: object) -> Sample:
        return replace(self, options=replace(self.options, **changes))

    def pet(self, encoding: str) -> EncodedSeries:
        return encode_pet_series(self.suv, **self._common(encoding))

    def mip(self, encoding: str = "sc") -> EncodedSeries:
        return encode_mip(self.suv, **self._common(encoding))

    def _common(self, encoding: str) -> dict:
        return {
            "source": self.source,
            "provenance": self.provenance,
            "options": self.options,
            "encoding": encoding,
            "uids": ResultUids(source=self.source, provenance=self.provenance, options=self.options, encoding=encoding),
            "created": self.created,
        }


def read_back(series: EncodedSeries) -> list[Dataset]:
    """The data sets of a series as any reader gets them."""
    return [dcmread(BytesIO(instance.data)) for instance in series.instances]


def write_series(series: EncodedSeries, folder: Path) -> list[Path]:
    """The files of a series, written as they are."""
    folder.mkdir(parents=True)
    paths = []
    for instance in series.instances:
        path = folder / instance.file_name
        path.write_bytes(instance.data)
        paths.append(path)
    return paths
