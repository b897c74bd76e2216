"""The synthetic PET series: one writer for both encodings.

"sc" is Secondary Capture Image Storage with Modality PT, plane geometry and every SUV attribute; "pet" is PET Image
Storage. They differ in `_encoding_differences` and nowhere else.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from datetime import datetime
from functools import cache

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.dataelem import DataElement
from pydicom.uid import PositronEmissionTomographyImageStorage, SecondaryCaptureImageStorage

from pipeline.errors import OutputError
from pipeline.outputs.attributes import (
    copy_patient_orientation,
    copy_position_reference,
    free_series_number,
    series_moment,
    set_character_set,
)
from pipeline.outputs.codes import QUANTITY, SOURCE_IMAGE, SUV_BW, SUV_BW_UNITS, code_item
from pipeline.outputs.explicit import (
    EXPLICIT_VR_LITTLE_ENDIAN,
    PIXEL_DATA,
    SeriesTemplate,
    element,
    element_header,
    encode_dataset,
    sequence,
    text_element,
)
from pipeline.outputs.header import clean, ds_text, numbers_of, unsigned_of
from pipeline.outputs.modules import Uids, described, result_dataset, secondary_capture
from pipeline.outputs.quantize import MAX_CODE, CodeVolume, quantize
from pipeline.types import (
    EncodedInstance,
    EncodedSeries,
    Grid,
    OnProgress,
    OutputOptions,
    Progress,
    Provenance,
    SourceInstance,
    SourceSeries,
    Stage,
    SuvVolume,
)

SOP_CLASSES = {"sc": SecondaryCaptureImageStorage, "pet": PositronEmissionTomographyImageStorage}

F18_HALF_LIFE_S = "6586.2"  # PS3.3 C.8.9.2 asks for it; F-18: 109.77 min
SAME_PLACE_MM = 0.01
ALONG_Z = 0.866  # cos 30 degrees: planes turned further no longer lie at their center's z, not even roughly
AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)

SOP_INSTANCE_UID = 0x00080018
REFERENCED_SERIES = 0x00081115
REFERENCED_INSTANCES = 0x0008114A
REFERENCED_SOP_CLASS = 0x00081150
REFERENCED_SOP_INSTANCE = 0x00081155
REFERENCED_FRAMES = 0x00081160
SOURCE_IMAGES = 0x00082112
SERIES_INSTANCE_UID = 0x0020000E
INSTANCE_NUMBER = 0x00200013
IMAGE_POSITION = 0x00200032
SLICE_LOCATION = 0x00201041
LOCATIONS_PRESERVED = 0x0028135A
IMAGE_INDEX = 0x00541330
VARYING = (
    SOP_INSTANCE_UID,
    REFERENCED_SERIES,
    SOURCE_IMAGES,
    INSTANCE_NUMBER,
    IMAGE_POSITION,
    SLICE_LOCATION,
    IMAGE_INDEX,
    PIXEL_DATA,
)


def encode_pet_series(
    suv: SuvVolume,
    *,
    source: SourceSeries,
    provenance: Provenance,
    options: OutputOptions,
    encoding: str,
    uids: Uids,
    created: datetime,
    on_progress: OnProgress | None = None,
) -> EncodedSeries:
    """One instance per plane of `suv` ([z, y, x], g/ml), foot to head, in the CT's study and frame of reference.

    `encoding` is "sc" or "pet"; `created` is aware and part of the bytes: the same arguments give the same bytes.
    Raises OutputError where the series cannot be written (unknown encoding, no frame of reference, too large).
    """
    if encoding not in SOP_CLASSES:
        raise OutputError(
            "unknown_encoding", f"writing the PET series: encoding {encoding!r} is neither 'sc' nor 'pet'"
        )
    check_grid(suv.grid)
    codes, slope = quantize(suv.suv)
    shared = _shared_dataset(suv, slope, source, provenance, options, encoding, uids, created)
    template = SeriesTemplate(shared, VARYING)
    instances = []
    total = suv.grid.shape[0]
    for index, elements in enumerate(varying_elements(suv.grid, codes, source, uids)):
        sop_instance_uid = uids.uid("inst", index)
        instances.append(
            EncodedInstance(
                sop_class_uid=str(SOP_CLASSES[encoding]),
                sop_instance_uid=sop_instance_uid,
                transfer_syntax_uid=EXPLICIT_VR_LITTLE_ENDIAN,
                file_name=f"{index + 1:04d}.dcm",
                data=template.instance(sop_instance_uid, elements),
            )
        )
        if on_progress is not None:
            on_progress(Progress(stage=Stage.WRITE, done=index + 1, total=total, text=encoding))
    return EncodedSeries(kind="pet", encoding=encoding, series_uid=uids.uid("series"), instances=tuple(instances))


def bracketing(positions_mm: NDArray[np.float64], z_mm: float) -> slice:
    """The one position at `z_mm`, or the two around it; beyond an end, the nearest one. Positions are ascending."""
    above = int(np.searchsorted(positions_mm, z_mm - SAME_PLACE_MM))
    if above == len(positions_mm):
        return slice(max(above - 1, 0), above)
    if above == 0 or positions_mm[above] - z_mm <= SAME_PLACE_MM:
        return slice(above, above + 1)
    return slice(above - 1, above + 1)


def stacked_along_z(positions_mm: NDArray[np.float64]) -> bool:
    """Whether CT instances at these centers, [n, 3] x, y, z, follow each other along z: axial, gantry tilt included.

    Each plane of any other stack, coronal, sagittal or strongly oblique, is made of all of its instances.
    """
    if len(positions_mm) < 2:
        return True
    way = positions_mm[-1] - positions_mm[0]
    return bool(abs(way[2]) >= ALONG_Z * np.linalg.norm(way))


def in_plane_grid_is_the_ct(grid: Grid, header: Dataset) -> bool:
    """Whether a plane of `grid` has the very pixels of the CT's: rows, columns, spacing, position, axial."""
    orientation = numbers_of(header, "ImageOrientationPatient")
    spacing = numbers_of(header, "PixelSpacing")
    position = numbers_of(header, "ImagePositionPatient")
    if (len(orientation), len(spacing), len(position)) != (6, 2, 3):
        return False
    return (
        (unsigned_of(header, "Rows"), unsigned_of(header, "Columns")) == grid.shape[1:]
        and np.allclose(orientation, AXIAL, rtol=0, atol=1e-5)
        and np.allclose(spacing, grid.spacing_mm[1:], rtol=0, atol=SAME_PLACE_MM / max(grid.shape[1:]))
        and np.allclose(position[:2], grid.origin_mm[:2], rtol=0, atol=SAME_PLACE_MM)
    )


def check_grid(grid: Grid) -> None:
    """Raises OutputError where instances on this grid cannot be written (too_large, no_frame_of_reference)."""
    if max(grid.shape) > 0xFFFF:
        raise OutputError("too_large", f"writing the PET series: grid {grid.shape} exceeds 65535 in one direction")
    if not clean("UI", grid.frame_of_reference_uid):
        raise OutputError("no_frame_of_reference", "writing the PET series: the grid has no frame of reference UID")


def _shared_dataset(
    suv: SuvVolume,
    slope: str,
    source: SourceSeries,
    provenance: Provenance,
    options: OutputOptions,
    encoding: str,
    uids: Uids,
    created: datetime,
) -> Dataset:
    """Everything that is the same in all instances."""
    ds = result_dataset(
        source=source, provenance=provenance, options=options, created=created, not_evaluated=suv.not_evaluated
    )
    ds.SOPClassUID = SOP_CLASSES[encoding]
    ds.Modality = "PT"
    ds.SeriesInstanceUID = uids.uid("series")
    ds.SeriesNumber = free_series_number(options.series_number, source)
    ds.SeriesDescription = described(clean("LO", options.series_description), options)
    ds.FrameOfReferenceUID = suv.grid.frame_of_reference_uid
    ds.BurnedInAnnotation = "NO"
    copy_position_reference(ds, source)
    copy_patient_orientation(ds, source, options)
    _pet_modules(ds, suv.grid, source, created)
    plane_and_pixels(ds, suv.grid)
    _value_mapping(ds, slope)
    _encoding_differences(ds, encoding, provenance, options)
    set_character_set(ds, source)
    return ds


def _pet_modules(ds: Dataset, grid: Grid, source: SourceSeries, created: datetime) -> None:
    """PET Series, PET Isotope and PET Image (PS3.3 C.8.9.1, C.8.9.2, C.8.9.4), except what differs by slice."""
    begun = series_moment(source, created)
    ds.Units = "GML"
    ds.SUVType = "BW"
    ds.CountsSource = "EMISSION"
    ds.SeriesType = ["WHOLE BODY", "IMAGE"]
    ds.NumberOfSlices = grid.shape[0]
    ds.CorrectedImage = ["ATTN", "DECY"]
    ds.DecayCorrection = "START"
    ds.CollimatorType = ""
    ds.RadiopharmaceuticalInformationSequence = [_no_radiopharmaceutical(begun.time, begun.date_time)]
    ds.FrameReferenceTime = "0"
    ds.AcquisitionDate, ds.AcquisitionTime = begun.date, begun.time
    ds.ActualFrameDuration = None
    ds.DecayFactor = "1"


def _no_radiopharmaceutical(start_time: str, start_date_time: str) -> Dataset:
    """Nothing was injected: a dose of 0 is the truth, is accepted by viewers that ask for one, and makes every
    dose-based SUV formula refuse instead of scaling the SUV a second time."""
    item = Dataset()
    item.RadionuclideCodeSequence = []
    item.Radiopharmaceutical = "NONE ADMINISTERED (SYNTHETIC)"
    item.RadionuclideTotalDose = "0"
    item.RadionuclideHalfLife = F18_HALF_LIFE_S
    item.RadiopharmaceuticalStartTime = start_time
    item.RadiopharmaceuticalStartDateTime = start_date_time
    return item


def plane_and_pixels(ds: Dataset, grid: Grid) -> None:
    """Image Plane and Image Pixel (PS3.3 C.7.6.2, C.7.6.3), except position and pixel data."""
    slice_mm, row_mm, column_mm = grid.spacing_mm
    ds.PixelSpacing = [ds_text(row_mm), ds_text(column_mm)]
    ds.ImageOrientationPatient = [ds_text(cosine) for cosine in AXIAL]
    ds.SliceThickness = ds_text(slice_mm)
    ds.SamplesPerPixel = 1
    ds.PhotometricInterpretation = "MONOCHROME2"
    ds.Rows, ds.Columns = grid.shape[1:]
    ds.BitsAllocated = 16
    ds.BitsStored = 16
    ds.HighBit = 15
    ds.PixelRepresentation = 0


def set_windows(ds: Dataset, quantity: str, tops: Sequence[int]) -> None:
    """Windows from 0 to each of `tops` by the LINEAR function (PS3.3 C.11.2.1.2.1), which is the default.

    The function is not named: OHIF 3.13 takes the first letter of VOILUTFunction for the word and draws nothing.
    """
    ds.WindowCenter = [ds_text((top + 1) / 2) for top in tops]
    ds.WindowWidth = [ds_text(top + 1) for top in tops]
    ds.WindowCenterWidthExplanation = [f"{quantity} 0-{top}" for top in tops]


def _value_mapping(ds: Dataset, slope: str) -> None:
    """Rescale, window and real world values: stored codes to SUVbw, one slope for all slices."""
    ds.RescaleIntercept = "0"
    ds.RescaleSlope = slope
    set_windows(ds, "SUV", (5, 10))
    mapping = Dataset()
    mapping.LUTExplanation = "SUVbw"
    mapping.LUTLabel = "SUVbw"
    mapping.add(DataElement("RealWorldValueFirstValueMapped", "US", 0))
    mapping.add(DataElement("RealWorldValueLastValueMapped", "US", MAX_CODE))
    mapping.RealWorldValueIntercept = 0.0
    mapping.RealWorldValueSlope = float(slope)
    mapping.MeasurementUnitsCodeSequence = [code_item(SUV_BW_UNITS)]
    quantity = Dataset()
    quantity.ValueType = "CODE"
    quantity.ConceptNameCodeSequence = [code_item(QUANTITY)]
    quantity.ConceptCodeSequence = [code_item(SUV_BW)]
    mapping.QuantityDefinitionSequence = [quantity]
    ds.RealWorldValueMappingSequence = [mapping]


def _encoding_differences(ds: Dataset, encoding: str, provenance: Provenance, options: OutputOptions) -> None:
    """All that tells "sc" from "pet", besides the SOP class and the UIDs."""
    if encoding == "sc":
        ds.ImageType = ["DERIVED", "SECONDARY"]
        ds.PatientOrientation = ["L", "P"]
        ds.RescaleType = "US"  # Type 1 here; in "pet" it would hide the unit
        secondary_capture(ds, provenance)
    else:
        ds.ImageType = ["DERIVED", "PRIMARY"]
        if options.emit_sc_markers:
            ds.ConversionType = "SYN"
    if options.emit_sc_markers:
        ds.ContentQualification = "RESEARCH"


def varying_elements(
    grid: Grid, codes: CodeVolume, source: SourceSeries, uids: Uids
) -> Iterator[dict[int, tuple[bytes | memoryview, ...]]]:
    """The encoded elements that differ, plane by plane from the foot."""
    purpose = encode_dataset(_purpose())
    aligned = in_plane_grid_is_the_ct(grid, source.header)
    x_mm, y_mm, first_z_mm = grid.origin_mm
    in_plane = f"{ds_text(x_mm)}\\{ds_text(y_mm)}"
    pixel_header = element_header(PIXEL_DATA, "OW", codes[0].nbytes)
    instances = with_good_uids(source)
    positions_mm = np.array([instance.position_mm for instance in instances]).reshape(-1, 3)
    axial = stacked_along_z(positions_mm)
    all_frames = _frames_by_instance(instances)

    @cache  # neighbouring planes share their CT instances
    def references(found: tuple[SourceInstance, ...], preserved: bool) -> tuple[bytes, bytes]:
        images = _source_images(found, all_frames, preserved, purpose)
        return _referenced_series(found, source.series_uid), images

    for index, plane in enumerate(codes.astype("<u2", copy=False)):
        z_mm = first_z_mm + index * grid.spacing_mm[0]
        found = instances[bracketing(positions_mm[:, 2], z_mm)] if axial else instances
        preserved = aligned and len(found) == 1 and abs(found[0].position_mm[2] - z_mm) <= SAME_PLACE_MM
        referenced_series, source_images = references(found, preserved)
        z_text = ds_text(z_mm)
        number = index + 1
        yield {
            SOP_INSTANCE_UID: (text_element(SOP_INSTANCE_UID, "UI", uids.uid("inst", index)),),
            REFERENCED_SERIES: (referenced_series,),
            SOURCE_IMAGES: (source_images,),
            INSTANCE_NUMBER: (text_element(INSTANCE_NUMBER, "IS", str(number)),),
            IMAGE_POSITION: (text_element(IMAGE_POSITION, "DS", f"{in_plane}\\{z_text}"),),
            SLICE_LOCATION: (text_element(SLICE_LOCATION, "DS", z_text),),
            IMAGE_INDEX: (element(IMAGE_INDEX, "US", struct.pack("<H", number)),),
            PIXEL_DATA: (pixel_header, np.ascontiguousarray(plane).data.cast("B")),
        }


def with_good_uids(source: SourceSeries) -> tuple[SourceInstance, ...]:
    """The CT instances that can be referenced: a UID is somebody else's input."""
    if not clean("UI", source.series_uid):
        return ()
    return tuple(i for i in source.instances if clean("UI", i.sop_class_uid) and clean("UI", i.sop_instance_uid))


def _purpose() -> Dataset:
    item = Dataset()
    item.PurposeOfReferenceCodeSequence = [code_item(SOURCE_IMAGE)]
    return item


def _reference(sop_class_uid: str, sop_instance_uid: str, frames: Sequence[int] = ()) -> bytes:
    """The SOP Instance Reference macro, or with `frames` the one for images (PS3.3 tables 10-11 and 10-3)."""
    elements = text_element(REFERENCED_SOP_CLASS, "UI", sop_class_uid) + text_element(
        REFERENCED_SOP_INSTANCE, "UI", sop_instance_uid
    )
    return elements + (text_element(REFERENCED_FRAMES, "IS", "\\".join(map(str, frames))) if frames else b"")


_Frames = dict[tuple[str, str], list[int]]  # by SOP class and instance


def _frames_by_instance(found: Sequence[SourceInstance]) -> _Frames:
    """The frames of each instance in `found`, ascending; none for a single-frame instance."""
    frames: _Frames = {}
    for one in found:
        frames.setdefault((one.sop_class_uid, one.sop_instance_uid), []).append(one.frame_number)
    return {uids: sorted(number for number in numbers if number) for uids, numbers in frames.items()}


def _referenced_series(found: Sequence[SourceInstance], series_uid: str) -> bytes:
    if not found:
        return b""
    instances = sequence(REFERENCED_INSTANCES, [_reference(*uids) for uids in _frames_by_instance(found)])
    return sequence(REFERENCED_SERIES, [instances + text_element(SERIES_INSTANCE_UID, "UI", series_uid)])


def _source_images(found: Sequence[SourceInstance], all_frames: _Frames, preserved: bool, purpose: bytes) -> bytes:
    """One item for each instance; its frames are named unless it is all of them (Type 1C, PS3.3 table 10-3)."""
    if not found:
        return b""
    locations = text_element(LOCATIONS_PRESERVED, "CS", "YES" if preserved else "NO")
    items = []
    for uids, frames in _frames_by_instance(found).items():
        named = () if frames == all_frames[uids] else frames
        items.append(_reference(*uids, named) + locations + purpose)
    return sequence(SOURCE_IMAGES, items)
