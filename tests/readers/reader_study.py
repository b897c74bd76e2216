"""One study for the readers: a phantom's CT, and its true SUV as our writers encode it, in both encodings.

The readers are asked what they make of known values, so the SUV is the phantom's own and no network runs. The grid
of the result is not that of the CT: nothing fits by accident.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from pydicom import dcmread
from pydicom.uid import generate_uid

from pipeline.ct_reader import read_ct
from pipeline.outputs.encoding import encode_result
from pipeline.outputs.statistics import district_stats
from pipeline.types import (
    District,
    DistrictMap,
    EncodedSeries,
    FloatVolume,
    ModelRef,
    OutputOptions,
    Provenance,
    SourceSeries,
    SuvVolume,
)
from training.phantom import Phantom, PhantomSpec, make_phantom
from training.phantom.dicom import StudyHeader, header_of, write_ct_series, write_pet_series

ENCODINGS = ("sc", "pet")
MATRIX = 128
DESCRIPTION = "PHANTOM WHOLE BODY"
SUV_TOLERANCE = 0.0005  # half a step of the stored values (docs: quantization)
OPTIONS = OutputOptions(mip=True, seg=True, sr=True, presentation_states=True)
CREATED = datetime(2024, 5, 6, 7, 8, 9, tzinfo=UTC)
PROVENANCE = Provenance(
    software_version="0",
    bundle_name="phantom-truth",
    bundle_version="1",
    bundle_sha256="ab" * 32,
    models=(ModelRef(district="trunk", weights_sha256="c1" * 32),),
    segmenter="truth",
    segmenter_version="1",
    device="cpu",
)


# Head to thigh, arms at the sides, three lesions: 128 slices of 125x125. Another visit is another study.
SPEC = PhantomSpec(
    seed=7, spacing_mm=(8.0, 4.0, 4.0), pose="sides", coverage=(0.43, 1.0), lesions=3, noise=False, contrast=False
)
ACQUIRED_SPACING_MM = (8.0, 5.0, 5.0)  # of a real PET beside ours: nobody takes one for the other
OWN_FRAME_SHIFT_MM = (
    30.0,
    -20.0,
    150.0,
)  # of a real PET that was not acquired with this CT: another table, another day


@dataclass(frozen=True, kw_only=True)
class ReaderStudy:
    """The files of the CT, its source as the outputs get it, and the SUV that every reader must show."""

    ct: tuple[Path, ...]
    source: SourceSeries
    suv: SuvVolume
    districts: DistrictMap
    options: OutputOptions = OPTIONS

    @property
    def shown(self) -> FloatVolume:
        """What a correct reader has: no negative and no NaN (dicom-output: 0), float32 [z, y, x]."""
        return np.maximum(self.suv.suv, 0)

    def pet(self, encoding: str) -> EncodedSeries:
        """The PET series alone."""
        alone = replace(self.options, mip=False, seg=False, sr=False, presentation_states=False)
        return replace(self, options=alone).result(encoding)["pet"]

    def result(self, encoding: str) -> dict[str, EncodedSeries]:
        """The PET series in this encoding and every companion, by kind: what the node would send."""
        options = replace(self.options, encodings=(encoding,))
        series, notes = encode_result(
            self.suv,
            self.districts,
            district_stats(self.suv, self.districts, None),
            None,
            source=self.source,
            provenance=PROVENANCE,
            options=options,
            created=CREATED,
        )
        assert not notes, notes
        return {one.kind: one for one in series}


@dataclass(frozen=True, kw_only=True)
class Written:
    """A study with its results written as files: for each encoding, a folder for each kind of series."""

    study: ReaderStudy
    results: dict[str, dict[str, Path]]

    def files(self, encoding: str, kind: str = "pet") -> list[Path]:
        """The files of one series in sending order."""
        return sorted(self.results[encoding][kind].iterdir())


def make_study(folder: Path, *, spec: PhantomSpec = SPEC, weight: bool = True) -> ReaderStudy:
    """Write the CT into `folder` and read it with the node's own reader."""
    phantom = make_phantom(spec)
    paths = write_ct_series(phantom, folder, matrix=MATRIX, header=_header(phantom))
    if not weight:
        _drop_weight(paths)
    present = [d for d in District if (phantom.districts == d).any()]
    return ReaderStudy(
        ct=tuple(paths),
        source=read_ct(paths).source,
        suv=SuvVolume(suv=phantom.suv, grid=phantom.grid),
        districts=DistrictMap(
            labels=phantom.districts,
            grid=phantom.grid,
            segmenter="truth",
            version="1",
            confidence=dict.fromkeys(present, 1.0),
        ),
    )


def _drop_weight(paths: list[Path]) -> None:
    for path in paths:
        ds = dcmread(path)
        del ds.PatientWeight
        ds.save_as(path)


def acquired_phantom(spec: PhantomSpec = SPEC, *, own_frame: bool = False) -> Phantom:
    """The phantom on the grid of a real PET; with `own_frame` in a Frame of Reference that no CT shares."""
    phantom = make_phantom(replace(spec, spacing_mm=ACQUIRED_SPACING_MM))
    if not own_frame:
        return phantom
    x, y, z = (start + shift for start, shift in zip(phantom.grid.origin_mm, OWN_FRAME_SHIFT_MM, strict=True))
    frame = generate_uid(entropy_srcs=["frame of reference of its own", phantom.grid.frame_of_reference_uid])
    return replace(phantom, grid=replace(phantom.grid, origin_mm=(x, y, z), frame_of_reference_uid=str(frame)))


def write_acquired_pet(folder: Path, *, spec: PhantomSpec = SPEC, own_frame: bool = False) -> list[Path]:
    """A PET of the same study as a scanner writes it: BQML with an injected dose, its own grid and series number."""
    phantom = acquired_phantom(spec, own_frame=own_frame)
    return write_pet_series(phantom, folder, header=_header(phantom))


def _header(phantom: Phantom) -> StudyHeader:
    """Each study is another patient's: a viewer lists all studies of one."""
    return replace(header_of(phantom), description=DESCRIPTION, patient_id=f"PH-READER-{phantom.spec.visit}")


def write_files(series: EncodedSeries, folder: Path) -> list[Path]:
    """The files of a series as the node would send them."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for instance in series.instances:
        path = folder / instance.file_name
        path.write_bytes(instance.data)
        paths.append(path)
    return paths
