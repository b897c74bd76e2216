"""The district map as one DICOM Segmentation object: what a radiologist lays over the CT or the synthetic PET.

BINARY, one segment for each district in the field of view, on the result's grid and in the CT's Frame of Reference
(PS3.3 A.51). It refers to the planes of one PET series, whose grid it shares, so there is one for each encoding of the
PET; the CT that the districts were found on is its related series. highdicom makes the object; patient, study, dates,
UIDs and references are then written by the same white list as every other result's, because a CT header is somebody
else's input.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

import highdicom as hd
import numpy as np
from highdicom.color import CIELabColor
from pydicom import Dataset
from pydicom.uid import CTImageStorage

from pipeline.errors import OutputError
from pipeline.outputs.attributes import (
    body_part_examined,
    copy_lossy_history,
    copy_position_reference,
    free_series_number,
    local_moment,
)
from pipeline.outputs.codes import (
    ANATOMICAL_STRUCTURE,
    ARTIFICIAL_INTELLIGENCE,
    DISTRICT_CODES,
    SAME_ANATOMY,
    SEGMENTATION,
    SOURCE_IMAGE,
    code_item,
)
from pipeline.outputs.companions import CONTENT_CREATOR, equipment, one_instance, stand_in, write_common_modules
from pipeline.outputs.header import clean
from pipeline.outputs.modules import TEST_COMMENTS, Uids, contributing_equipment, described
from pipeline.outputs.pet_series import AXIAL
from pipeline.outputs.picture import DISTRICT_COLORS
from pipeline.types import (
    District,
    DistrictMap,
    EncodedInstance,
    EncodedSeries,
    Grid,
    OutputOptions,
    Provenance,
    SourceSeries,
)

KIND = "seg"
SERIES_DESCRIPTION = "SYNTHETIC FDG PET DISTRICTS - AI, RESEARCH ONLY"
CONTENT_LABEL = "DISTRICTS"
CONTENT_DESCRIPTION = "Body districts found on CT for a synthetic PET"  # LO: at most 64 characters
FRAME_DERIVATION = "Found on the CT, on the pixels of the synthetic PET"
UNKNOWN_VERSION = "unknown"  # AlgorithmVersion is Type 1


def encode_district_seg(
    districts: DistrictMap,
    *,
    pet: EncodedSeries,
    source: SourceSeries,
    provenance: Provenance,
    options: OutputOptions,
    uids: Uids,
    created: datetime,
    not_evaluated: Sequence[District] = (),
) -> EncodedSeries:
    """A one-instance Segmentation series (PS3.3 A.51, C.8.20.2) of the districts that are present.

    Args:
        districts: the labels on the result's grid; a district that is absent gets no segment.
        pet: the PET series on that grid, one instance for each plane, foot to head; all are referenced.
        source: the CT, the related series.
        provenance: who made the result; its segmenter is the segments' algorithm.
        options: `seg_series_number`, and what all results share.
        uids: of the PET's encoding.
        created: aware time, stored with the job.
        not_evaluated: districts that no network was trusted with; their segments say so.

    Returns:
        A series of kind "seg" in the encoding of `pet`.

    Raises:
        OutputError: there is no district to write (no_districts), or as for the PET series.
    """
    present = districts.present
    if not present:
        raise OutputError("no_districts", "writing the districts: the map has no district in it")
    ds = hd.seg.Segmentation(
        source_images=[_source_image(districts.grid, source)],
        pixel_array=_numbered(districts, present),
        segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=[_segment(n, d, provenance, uids) for n, d in enumerate(present, start=1)],
        series_instance_uid=uids.uid("seg_series", options.seg_series_number),
        series_number=free_series_number(options.seg_series_number, source),
        sop_instance_uid=uids.uid("seg", options.seg_series_number),
        instance_number=1,
        **equipment(provenance),
        content_label=CONTENT_LABEL,
        content_description=CONTENT_DESCRIPTION,
        content_creator_name=CONTENT_CREATOR,
        series_description=described(SERIES_DESCRIPTION, options),
        pixel_measures=_pixel_measures(districts.grid),
        plane_orientation=hd.PlaneOrientationSequence("PATIENT", AXIAL),
        plane_positions=_plane_positions(districts.grid),
        omit_empty_frames=True,
    )
    _describe_segments(ds, districts, present, not_evaluated)
    _write_modules(ds, source, provenance, options, created)
    _fix_dimension_uid(ds, uids.uid("dimorg"))
    _write_references(ds, pet, districts.grid, source)
    return one_instance(ds, source, kind=KIND, encoding=pet.encoding)


def _source_image(grid: Grid, source: SourceSeries) -> Dataset:
    """What highdicom wants of a source image.

    Its plane and spacing agree with none of ours, so that highdicom takes over neither.
    """
    series_uid = clean("UI", source.series_uid) or "0.0"
    ds = stand_in(source.study_uid, sop_class_uid=CTImageStorage, sop_instance_uid=series_uid, series_uid=series_uid)
    ds.Modality = "CT"
    ds.FrameOfReferenceUID = grid.frame_of_reference_uid
    ds.ImageOrientationPatient = list(AXIAL)
    slice_mm, row_mm, column_mm = grid.spacing_mm
    ds.ImagePositionPatient = [0.0, 0.0, round(grid.origin_mm[2] - 2 * slice_mm, 3)]
    ds.PixelSpacing = [round(2 * row_mm, 3), round(2 * column_mm, 3)]
    ds.SliceThickness = round(slice_mm, 3)
    ds.Rows, ds.Columns = grid.shape[1:]
    return ds


def _numbered(districts: DistrictMap, present: Sequence[District]) -> np.ndarray:
    """Segment numbers [z, y, x]: 1.. without a gap, as PS3.3 C.8.20.2 wants them, 0 where there is no district."""
    table = np.zeros(256, dtype=np.uint8)
    for number, district in enumerate(present, start=1):
        table[district] = number
    return table[districts.labels]


def _segment(number: int, district: District, provenance: Provenance, uids: Uids) -> hd.seg.SegmentDescription:
    red, green, blue = (int(DISTRICT_COLORS[district][i : i + 2], 16) for i in (1, 3, 5))
    return hd.seg.SegmentDescription(
        segment_number=number,
        segment_label=district.key,
        segmented_property_category=ANATOMICAL_STRUCTURE,
        segmented_property_type=DISTRICT_CODES[district],
        algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=hd.AlgorithmIdentificationSequence(
            name=clean("LO", provenance.segmenter),
            family=ARTIFICIAL_INTELLIGENCE,
            version=clean("LO", provenance.segmenter_version) or UNKNOWN_VERSION,
        ),
        tracking_id=district.key,
        tracking_uid=uids.uid("track", int(district)),
        display_color=CIELabColor.from_rgb(red, green, blue),
    )


def _describe_segments(
    ds: Dataset, districts: DistrictMap, present: Sequence[District], not_evaluated: Sequence[District]
) -> None:
    """SegmentDescription (0062,0006): how sure the segmenter was, and whether the PET says anything there."""
    for item, district in zip(ds.SegmentSequence, present, strict=True):
        text = f"{district.key}, confidence {districts.confidence.get(district, 0.0):.2f}"
        item.SegmentDescription = text + (", NOT EVALUATED in the synthetic PET" if district in not_evaluated else "")


def _pixel_measures(grid: Grid) -> hd.PixelMeasuresSequence:
    slice_mm, row_mm, column_mm = (round(s, 9) for s in grid.spacing_mm)
    return hd.PixelMeasuresSequence(
        pixel_spacing=(row_mm, column_mm), slice_thickness=slice_mm, spacing_between_slices=slice_mm
    )


def _plane_positions(grid: Grid) -> list[hd.PlanePositionSequence]:
    x_mm, y_mm, first_z_mm = grid.origin_mm
    return [
        hd.PlanePositionSequence(
            "PATIENT", (round(x_mm, 9), round(y_mm, 9), round(first_z_mm + k * grid.spacing_mm[0], 9))
        )
        for k in range(grid.shape[0])
    ]


def _write_modules(
    ds: Dataset,
    source: SourceSeries,
    provenance: Provenance,
    options: OutputOptions,
    created: datetime,
) -> None:
    """Patient, study, series and equipment as in every other result, in place of what highdicom took over."""
    now = local_moment(source, created)
    segmenter = contributing_equipment(provenance, now.date_time)[-1:]
    write_common_modules(ds, source, options, created, contributors=segmenter)
    copy_position_reference(ds, source)
    ds.ContentDate, ds.ContentTime = now.date, now.time
    ds.BodyPartExamined = body_part_examined(source)
    if options.test:
        ds.ImageComments = TEST_COMMENTS
    copy_lossy_history(ds, source)


def _fix_dimension_uid(ds: Dataset, uid: str) -> None:
    """highdicom makes one up at each call; the same result has the same bytes."""
    for item in (*ds.DimensionOrganizationSequence, *ds.DimensionIndexSequence):
        item.DimensionOrganizationUID = uid


def _write_references(ds: Dataset, pet: EncodedSeries, grid: Grid, source: SourceSeries) -> None:
    """The PET: all of it for the object (PS3.3 C.12.2), and for each frame the plane that it has the pixels of.

    The CT is a related series (PS3.3 C.7.3.1), and the source of the PET's planes. It is not named beside the PET: of
    several series OHIF 3.13 takes the one that arrived first, and draws nothing if its rows and columns are others.
    """
    ds.pop("SourceImageSequence", None)
    series = Dataset()
    series.SeriesInstanceUID = pet.series_uid
    series.ReferencedInstanceSequence = [_reference(instance) for instance in pet.instances]
    ds.ReferencedSeriesSequence = [series]
    if clean("UI", source.series_uid):
        ds.RelatedSeriesSequence = [_related(source)]
    planes = [_derivation(instance) for instance in pet.instances]
    for frame in ds.PerFrameFunctionalGroupsSequence:
        z_mm = float(frame.PlanePositionSequence[0].ImagePositionPatient[2])
        frame.DerivationImageSequence = [planes[round((z_mm - grid.origin_mm[2]) / grid.spacing_mm[0])]]


def _related(source: SourceSeries) -> Dataset:
    item = Dataset()
    item.StudyInstanceUID = clean("UI", source.study_uid)
    item.SeriesInstanceUID = clean("UI", source.series_uid)
    item.PurposeOfReferenceCodeSequence = [code_item(SAME_ANATOMY)]
    return item


def _reference(instance: EncodedInstance) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID = instance.sop_class_uid
    item.ReferencedSOPInstanceUID = instance.sop_instance_uid
    return item


def _derivation(plane: EncodedInstance) -> Dataset:
    """The Derivation Image macro (PS3.3 C.7.6.16.2.6)."""
    image = _reference(plane)
    image.PurposeOfReferenceCodeSequence = [code_item(SOURCE_IMAGE)]
    image.SpatialLocationsPreserved = "YES"
    derivation = Dataset()
    derivation.DerivationDescription = FRAME_DERIVATION
    derivation.DerivationCodeSequence = [code_item(SEGMENTATION)]
    derivation.SourceImageSequence = [image]
    return derivation
