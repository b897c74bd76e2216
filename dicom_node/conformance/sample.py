"""Small results, really encoded, for the conformance statement to read its attribute tables from.

Three imagined CT series, one with every attribute that a result copies, one like it with other values, one with the
least that a CT may have, and the first once more under other options: what is the same in all of them is fixed, and
what follows the CT or the options gives itself away.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from io import BytesIO

import numpy as np
from pydicom import Dataset, dcmread
from pydicom.uid import CTImageStorage, LegacyConvertedEnhancedCTImageStorage

from pipeline.outputs.encoding import encode_result
from pipeline.outputs.rejection_note import RejectedSeries, RejectionReason, encode_rejection_note
from pipeline.outputs.statistics import district_stats
from pipeline.provenance import software_version
from pipeline.types import (
    District,
    DistrictMap,
    EncodedSeries,
    Grid,
    ModelRef,
    OutputOptions,
    Provenance,
    SourceInstance,
    SourceSeries,
    SuvVolume,
)

ENCODINGS = ("sc", "pet")
_CREATED = datetime(2024, 5, 6, 7, 8, 9, tzinfo=UTC)
_FULL = 0  # the number of the CT that has every attribute
_OTHER = 1
_BARE = 2

Written = Mapping[str, tuple[Dataset, ...]]  # "pet-sc" -> its instances


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One result: its source, and what was written as a reader gets it, by "<kind>-<encoding>"."""

    header: Dataset
    series: tuple[EncodedSeries, ...]
    written: Written


@dataclass(frozen=True, kw_only=True, slots=True)
class Samples:
    """`full` and `changed` are of the same CT, `changed` under other options; `other` and `bare` are of other CTs."""

    full: Sample
    changed: Sample
    other: Sample
    bare: Sample


def make_samples(options: OutputOptions) -> Samples:
    """Encode every object that the software can write, both encodings and all companions, under `options`."""
    everything = replace(
        options, encodings=ENCODINGS, mip=True, seg=True, uncertainty=True, sr=True, presentation_states=True
    )
    return Samples(
        full=_sample(_FULL, everything),
        changed=_sample(_FULL, _changed(everything)),
        other=_sample(_OTHER, everything),
        bare=_sample(_BARE, everything),
    )


def _changed(options: OutputOptions) -> OutputOptions:
    """Every key of `[output]` that shows in an object has another value."""
    numbers = {name: getattr(options, name) + 7 for name in OutputOptions.__slots__ if name.endswith("series_number")}
    return replace(
        options,
        **numbers,
        series_description="SYNTHETIC, otherwise described",
        institution_name="Another Institution",
        emit_patient_position=not options.emit_patient_position,
        emit_sc_markers=not options.emit_sc_markers,
        omit_patient_size=not options.omit_patient_size,
    )


def _sample(number: int, options: OutputOptions) -> Sample:
    source, grid = _source(number), _grid(number)
    districts = _districts(number, grid)
    suv = _suv(number, grid)
    deviation = SuvVolume(suv=suv.suv * np.float32(0.1), grid=grid)
    made, left_out = encode_result(
        suv,
        districts,
        district_stats(suv, districts, deviation),
        deviation,
        source=source,
        provenance=_provenance(number),
        options=options,
        created=_CREATED + number * timedelta(days=1, seconds=61),
    )
    if left_out:
        raise RuntimeError(f"the conformance statement's sample is not whole: {'; '.join(left_out)}")
    series = (*made, _rejection(made[number % 2], number))
    written = {
        f"{one.kind}-{one.encoding}": tuple(dcmread(BytesIO(instance.data)) for instance in one.instances)
        for one in series
    }
    return Sample(header=source.header, series=series, written=written)


def _rejection(pet: EncodedSeries, number: int) -> EncodedSeries:
    rejected = RejectedSeries(
        header=dcmread(BytesIO(pet.instances[0].data), stop_before_pixels=True),
        sop_instance_uids=tuple(instance.sop_instance_uid for instance in pet.instances),
    )
    return encode_rejection_note(
        rejected,
        reason=RejectionReason.SAFETY if number == _OTHER else RejectionReason.QUALITY,
        description=f"A sentence about bundle {number}",
        created=_CREATED + (number + 10) * timedelta(days=1, seconds=61),
    )


def _grid(number: int) -> Grid:
    spacing_mm = (3.0 + number, 2.0 + number, 2.5 + number)
    return Grid(
        shape=(4 + number, 12 + number, 14 + number),
        spacing_mm=spacing_mm,
        origin_mm=(-20.0 - number, -15.0 - number, -100.0 - number),
        frame_of_reference_uid=f"2.25.{700 + number}",
    )


def _suv(number: int, grid: Grid) -> SuvVolume:
    """Also more than the default slope reaches, and a district that was not evaluated."""
    ramp = np.linspace(0, 40.0 if number == _OTHER else 9.0, int(np.prod(grid.shape)), dtype=np.float32)
    not_evaluated = (District.TRUNK,) if number == _BARE else ()
    return SuvVolume(suv=ramp.reshape(grid.shape), grid=grid, not_evaluated=not_evaluated)


def _districts(number: int, grid: Grid) -> DistrictMap:
    labels = np.zeros(grid.shape, dtype=np.uint8)
    present = tuple(District)[: 4 - number]
    for row, district in enumerate(present):
        labels[:, 2 + 2 * row : 4 + 2 * row, 2:-2] = district
    confidence = dict.fromkeys(present, 1.0 - 0.1 * number)
    return DistrictMap(labels=labels, grid=grid, segmenter="example", version="1", confidence=confidence)


def _provenance(number: int) -> Provenance:
    digest = f"{number + 10:x}" * 64
    return Provenance(
        software_version=software_version(),
        bundle_name=f"bundle{number}",
        bundle_version=f"{number}",
        bundle_sha256=digest,
        models=tuple(ModelRef(district=one.key, weights_sha256=digest) for one in tuple(District)[: 4 - number]),
        segmenter=f"segmenter{number}",
        segmenter_version=f"{number}",
        device="cpu",
    )


def _source(number: int) -> SourceSeries:
    header = _header(number)
    z_mm = _grid(number).origin_mm[2]
    return SourceSeries(
        study_uid=header.StudyInstanceUID,
        series_uid=header.SeriesInstanceUID,
        header=header,
        instances=tuple(
            SourceInstance(
                sop_class_uid=header.SOPClassUID,
                sop_instance_uid=f"2.25.{1000 + 100 * number + (0 if number == _OTHER else index)}",
                position_mm=(0.0, 0.0, z_mm + 2.0 * index),
                frame_number=index + 1 if number == _OTHER else 0,
            )
            for index in range(10)
        ),
        earliest_acquisition=("", "") if number == _BARE else (header.AcquisitionDate, header.AcquisitionTime),
        lossy=number == _OTHER,
    )


def _header(number: int) -> Dataset:
    """The lowest slice's header; nobody's."""
    ds = Dataset()
    ds.SOPClassUID = LegacyConvertedEnhancedCTImageStorage if number == _OTHER else CTImageStorage
    ds.SOPInstanceUID = f"2.25.{1000 + 100 * number}"
    ds.StudyInstanceUID, ds.SeriesInstanceUID = f"2.25.{800 + number}", f"2.25.{900 + number}"
    ds.FrameOfReferenceUID, ds.Modality = f"2.25.{700 + number}", "CT"
    if number == _BARE:
        return ds
    ds.SpecificCharacterSet = ("ISO_IR 100", "ISO_IR 192")[number]
    ds.PatientName, ds.PatientID, ds.PatientBirthDate = f"NOBODY^{number}", f"NOBODY-{number}", f"1950010{number + 1}"
    ds.PatientSex, ds.PatientAge = "MF"[number], f"07{number}Y"
    ds.PatientSize, ds.PatientWeight = f"1.7{number}", f"7{number}"
    ds.IssuerOfPatientID, ds.TypeOfPatientID = f"ISSUER{number}", ("TEXT", "RFID")[number]
    ds.PatientIdentityRemoved = ("YES", "NO")[number]
    if number == _FULL:
        ds.DeidentificationMethod = "METHOD"
    ds.StudyDate, ds.StudyTime, ds.StudyID = f"2024010{number + 1}", f"0{number + 1}1500", f"STUDY{number}"
    ds.SeriesDate, ds.SeriesTime = f"2024011{number + 1}", f"0{number + 1}2500"
    ds.AcquisitionDate, ds.AcquisitionTime = f"2024012{number + 1}", f"0{number + 1}3500"
    ds.AccessionNumber, ds.StudyDescription = f"ACCESSION{number}", f"STUDY OF {number}"
    ds.ReferringPhysicianName, ds.InstitutionName = f"NOBODY^REFERRING {number}", f"INSTITUTION {number}"
    ds.BodyPartExamined = ("CHEST", "ABDOMEN")[number]
    ds.PatientPosition = ("HFS", "FFP")[number]
    ds.PositionReferenceIndicator = ("SN", "OM")[number]
    ds.LossyImageCompression = ("00", "01")[number]
    if number == _OTHER:
        ds.LossyImageCompressionRatio, ds.LossyImageCompressionMethod = "10", "ISO_15444_1"
    ds.SeriesNumber, ds.InstanceNumber = number + 2, number + 1
    if number == _FULL:
        _lie_on(ds, _grid(number))
    return ds


def _lie_on(ds: Dataset, grid: Grid) -> None:
    """The CT's planes are the PET's own: no resampling in the plane."""
    ds.Rows, ds.Columns = grid.shape[1:]
    ds.PixelSpacing = list(grid.spacing_mm[1:])
    ds.ImagePositionPatient = list(grid.origin_mm)
    ds.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
