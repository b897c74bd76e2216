"""SUV per district as a structured report: TID 1500 in Comprehensive 3D SR (PS3.16 A, PS3.3 A.35.13).

One measurement group for each district in the field of view: mean and maximum SUVbw and the volume, of the values that
a reader of the PET series gets. Where a SEG of the districts is written beside it, a group is a volume of interest of
that SEG's segment (TID 1411); else it stands for the district by its name and site alone (TID 1501). The planes of the
PET series are the report's image library (TID 1600), and so the source of every measurement. A district that no
network was trusted with has no SUV: a comment says so.

The report is COMPLETE, UNVERIFIED and PRELIMINARY: a machine made it, and nobody has looked at it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import highdicom as hd
from highdicom.sr import RelationshipTypeValues as Relation
from pydicom import Dataset
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code
from pydicom.uid import SegmentationStorage

from pipeline.errors import OutputError
from pipeline.outputs.attributes import free_series_number, local_moment
from pipeline.outputs.codes import (
    ANATOMICAL_STRUCTURE,
    COMMENT,
    CT_PROCEDURE,
    DISTRICT_CODES,
    MAXIMUM,
    MEAN,
    MILLILITER,
    PET,
    SUV_BW,
    SUV_BW_UNITS,
    VOLUME,
)
from pipeline.outputs.companions import equipment, one_instance, stand_in, stand_ins, write_common_modules
from pipeline.outputs.explicit import IMPLEMENTATION_CLASS_UID
from pipeline.outputs.header import clean
from pipeline.outputs.modules import HASH_SHOWN, MANUFACTURER, MODEL_NAME, Uids, contributing_equipment, described
from pipeline.outputs.pet_series import AXIAL
from pipeline.types import DistrictStats, EncodedSeries, Grid, OutputOptions, Provenance, SourceSeries

KIND = "sr"
SERIES_DESCRIPTION = "SYNTHETIC FDG PET MEASUREMENTS - AI, RESEARCH ONLY"
EVALUATED = "SYNTHETIC PET PREDICTED FROM CT BY AI - NOT ACQUIRED - NOT FOR DIAGNOSIS"
NOT_EVALUATED = (
    "NOT EVALUATED: no network was trusted with this district. No statement is made about its uptake; "
    "zeros in the synthetic PET are not absence of uptake."
)
DECIMALS = 6  # g/ml, ml: far below half a step of the stored codes, and free of the noise of doubles
PIXELS = hd.sr.CodedConcept("{pixels}", "UCUM", "Pixels")
COSINE = hd.sr.CodedConcept("{-1:1}", "UCUM", "{-1:1}")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Segments:
    """The SEG whose segments are measured, if there is one. `uids` makes its tracking UIDs, written or not."""

    uids: Uids
    series: EncodedSeries | None
    source_series_uid: str  # of the CT that the districts were found on; "" if it has no usable UID

    @property
    def sop_instance_uid(self) -> str:
        return self.series.instances[0].sop_instance_uid if self.series else ""


def encode_measurement_report(
    stats: Sequence[DistrictStats],
    *,
    pet: EncodedSeries,
    seg: EncodedSeries | None,
    grid: Grid,
    source: SourceSeries,
    provenance: Provenance,
    options: OutputOptions,
    uids: Uids,
    created: datetime,
) -> EncodedSeries:
    """A one-instance SR series with a measurement group for every row of `stats`.

    Args:
        stats: of the districts that are present, in `District` order, from the de-quantized values (g/ml, ml).
        pet: the PET series that was measured; its planes are referenced.
        seg: the districts' SEG on that PET series, one segment for each row, or None where none is written.
        grid: of the PET.
        source: the CT.
        provenance: who made the PET.
        options: `sr_series_number`, and what all results share.
        uids: of the PET's encoding; a district's tracking UID is the same in report and SEG.
        created: aware time, stored with the job.

    Returns:
        A series of kind "sr" in the encoding of `pet`.

    Raises:
        OutputError: there is no district to report (no_districts), or as for the PET series.
    """
    if not stats:
        raise OutputError("no_districts", "writing the measurement report: no district is in the field of view")
    segments = _Segments(uids=uids, series=seg, source_series_uid=clean("UI", source.series_uid))
    if seg is not None and not segments.source_series_uid:
        segments = _Segments(uids=uids, series=None, source_series_uid="")  # a segment must name its source
    evidence = stand_ins(source, pet, *grid.shape[1:])
    if segments.series is not None:
        evidence.append(_seg_stand_in(source, segments.series))
    number = options.sr_series_number
    ds: Dataset = hd.sr.Comprehensive3DSR(
        evidence=evidence,
        content=_content(stats, pet, grid, provenance, segments),
        series_instance_uid=uids.uid(f"sr_series{segments.sop_instance_uid}", number),
        series_number=free_series_number(number, source),
        sop_instance_uid=uids.uid(f"sr{segments.sop_instance_uid}", number),
        instance_number=1,
        series_description=described(SERIES_DESCRIPTION, options),
        is_complete=True,
        is_final=False,
        **equipment(provenance),
    )
    now = local_moment(source, created)
    ds.ContentDate, ds.ContentTime = now.date, now.time
    contributors = contributing_equipment(provenance, now.date_time)
    write_common_modules(ds, source, options, created, contributors=contributors)
    return one_instance(ds, source, kind=KIND, encoding=pet.encoding)


def _seg_stand_in(source: SourceSeries, seg: EncodedSeries) -> Dataset:
    return stand_in(
        source.study_uid,
        sop_class_uid=SegmentationStorage,
        sop_instance_uid=seg.instances[0].sop_instance_uid,
        series_uid=seg.series_uid,
    )


def _content(
    stats: Sequence[DistrictStats], pet: EncodedSeries, grid: Grid, provenance: Provenance, segments: _Segments
) -> hd.sr.MeasurementReport:
    """TID 1500 with its image library in front of the measurements."""
    report = hd.sr.MeasurementReport(
        observation_context=_observer(provenance),
        procedure_reported=CT_PROCEDURE,
        imaging_measurements=[_group(n, row, provenance, segments) for n, row in enumerate(stats, start=1)],
    )
    items = report[0].ContentSequence
    items.insert(len(items) - 1, _image_library(pet, grid))
    return report


def _observer(provenance: Provenance) -> hd.sr.ObservationContext:
    """TID 1004: this software observed, no person did."""
    device = hd.sr.DeviceObserverIdentifyingAttributes(
        uid=IMPLEMENTATION_CLASS_UID,
        name=MODEL_NAME,
        manufacturer_name=MANUFACTURER,
        model_name=clean("LO", f"{provenance.bundle_name} {provenance.bundle_version}") or MODEL_NAME,
        serial_number=provenance.bundle_sha256[:HASH_SHOWN],
    )
    return hd.sr.ObservationContext(
        observer_device_context=hd.sr.ObserverContext(
            observer_type=codes.DCM.Device, observer_identifying_attributes=device
        )
    )


def _group(
    number: int, row: DistrictStats, provenance: Provenance, segments: _Segments
) -> hd.sr.VolumetricROIMeasurementsAndQualitativeEvaluations | hd.sr.MeasurementsAndQualitativeEvaluations:
    """What is known of one district; `number` is that of its segment."""
    district = row.district
    given: dict[str, Any] = {
        "tracking_identifier": hd.sr.TrackingIdentifier(
            uid=segments.uids.uid("track", int(district)), identifier=district.key
        ),
        "finding_category": ANATOMICAL_STRUCTURE,
        "finding_type": DISTRICT_CODES[district],
        "finding_sites": [hd.sr.FindingSite(anatomic_location=DISTRICT_CODES[district])],
        "algorithm_id": hd.sr.AlgorithmIdentification(
            name=clean("LO", provenance.bundle_name) or MODEL_NAME,
            version=clean("LO", provenance.bundle_version) or provenance.software_version,
        ),
        "measurements": _measurements(row),
    }
    group: hd.sr.VolumetricROIMeasurementsAndQualitativeEvaluations | hd.sr.MeasurementsAndQualitativeEvaluations
    if segments.series is None:
        group = hd.sr.MeasurementsAndQualitativeEvaluations(**given)
    else:
        segment = hd.sr.ReferencedSegment(
            sop_class_uid=SegmentationStorage,
            sop_instance_uid=segments.sop_instance_uid,
            segment_number=number,
            source_series=hd.sr.SourceSeriesForSegmentation(segments.source_series_uid),
        )
        group = hd.sr.VolumetricROIMeasurementsAndQualitativeEvaluations(**given, referenced_segment=segment)
    words = EVALUATED if row.evaluated else NOT_EVALUATED
    group[0].ContentSequence.append(
        hd.sr.TextContentItem(name=COMMENT, value=words, relationship_type=Relation.CONTAINS)
    )
    return group


def _measurements(row: DistrictStats) -> list[hd.sr.Measurement]:
    """TID 300: the volume, and of what was evaluated mean and maximum SUVbw."""
    values = [hd.sr.Measurement(name=VOLUME, value=round(row.volume_ml, DECIMALS), unit=MILLILITER)]
    if row.evaluated:
        values += [
            hd.sr.Measurement(name=SUV_BW, value=round(value, DECIMALS), unit=SUV_BW_UNITS, derivation=derivation)
            for value, derivation in ((row.suv_mean, MEAN), (row.suv_max, MAXIMUM))
        ]
    return values


def _image_library(pet: EncodedSeries, grid: Grid) -> hd.sr.ContainerContentItem:
    """TID 1600: one group of all planes, and what they share said once (TID 1602, 1604).

    A plane's position is left to the plane: 400 times three numbers would be most of the report, and of its time.
    """
    group = hd.sr.ContainerContentItem(name=codes.DCM.ImageLibraryGroup, relationship_type=Relation.CONTAINS)
    group.ContentSequence = hd.sr.ContentSequence(_shared_descriptors(grid))
    group.ContentSequence.extend(
        hd.sr.ImageContentItem(
            name=codes.SCT.Source,
            referenced_sop_class_uid=instance.sop_class_uid,
            referenced_sop_instance_uid=instance.sop_instance_uid,
            relationship_type=Relation.CONTAINS,
        )
        for instance in pet.instances
    )
    library = hd.sr.ContainerContentItem(name=codes.DCM.ImageLibrary, relationship_type=Relation.CONTAINS)
    library.ContentSequence = hd.sr.ContentSequence([group])
    return library


def _shared_descriptors(grid: Grid) -> list[hd.sr.ContentItem]:
    slice_mm, row_mm, column_mm = (round(s, 9) for s in grid.spacing_mm)
    _, rows, columns = grid.shape
    lengths = [
        (codes.DCM.HorizontalPixelSpacing, column_mm),
        (codes.DCM.VerticalPixelSpacing, row_mm),
        (codes.DCM.SliceThickness, slice_mm),
    ]
    cosines = [
        codes.DCM.ImageOrientationPatientRowX,
        codes.DCM.ImageOrientationPatientRowY,
        codes.DCM.ImageOrientationPatientRowZ,
        codes.DCM.ImageOrientationPatientColumnX,
        codes.DCM.ImageOrientationPatientColumnY,
        codes.DCM.ImageOrientationPatientColumnZ,
    ]
    return [
        hd.sr.CodeContentItem(name=codes.DCM.Modality, value=PET, relationship_type=Relation.HAS_ACQ_CONTEXT),
        hd.sr.UIDRefContentItem(
            name=codes.DCM.FrameOfReferenceUID,
            value=grid.frame_of_reference_uid,
            relationship_type=Relation.HAS_ACQ_CONTEXT,
        ),
        _number(codes.DCM.PixelDataRows, rows, PIXELS),
        _number(codes.DCM.PixelDataColumns, columns, PIXELS),
        *(_number(name, length, codes.UCUM.Millimeter) for name, length in lengths),
        *(_number(name, cosine, COSINE) for name, cosine in zip(cosines, AXIAL, strict=True)),
    ]


def _number(name: Code, value: float, unit: Code | hd.sr.CodedConcept) -> hd.sr.NumContentItem:
    return hd.sr.NumContentItem(name=name, value=value, unit=unit, relationship_type=Relation.HAS_ACQ_CONTEXT)
