"""Enhanced CT (multi-frame) made of single-frame CT files: the same voxels in the other encoding.

Input: the files of one classic series (`ct_factory.write_ct`). Output: one Enhanced CT Image, or the parts of a
concatenation, with shared and per-frame functional groups (PS3.3 A.38, C.7.6.16).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pydicom
from encoded_ct import encode
from pydicom import Dataset
from pydicom.uid import EnhancedCTImageStorage, ExplicitVRLittleEndian, generate_uid

Modify = Callable[[Dataset], None]
DIMENSION = "1.2.3.4.5"
_NOT_AT_TOP = (
    *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness", "RescaleSlope"),
    *("RescaleIntercept", "RescaleType", "AcquisitionDate", "AcquisitionTime", "KVP", "ConvolutionKernel"),
    *("WindowCenter", "WindowWidth", "ImageType", "BodyPartExamined"),
)


def item(**values: Any) -> Dataset:
    """A sequence item with these elements."""
    ds = Dataset()
    for keyword, value in values.items():
        setattr(ds, keyword, value)
    return ds


def write_enhanced(
    folder: Path,
    classic: Sequence[Path],
    *,
    order: Sequence[int] | None = None,
    parts: int = 1,
    shared: bool = True,
    transfer_syntax: str = ExplicitVRLittleEndian,
    modify: Modify | None = None,
) -> list[Path]:
    """Write the planes of `classic` as frames in `order`, over `parts` instances of one concatenation.

    `shared` puts what all frames have in common into the shared groups, else each frame has its own. `modify(ds)`
    changes each part last, before it is compressed and written. The files of `classic` have one pixel format.
    """
    folder.mkdir(parents=True, exist_ok=True)
    planes = [pydicom.dcmread(path) for path in classic]
    planes = [planes[k] for k in (order if order is not None else range(len(planes)))]
    concatenation = generate_uid()
    sizes = [len(planes[part::parts]) for part in range(parts)]
    paths, at = [], 0
    for part, size in enumerate(sizes):
        ds = _multi_frame(planes[at : at + size], shared=shared, first=at)
        ds.InstanceNumber = part + 1
        if parts > 1:
            ds.ConcatenationUID, ds.InConcatenationNumber = concatenation, part + 1
            ds.InConcatenationTotalNumber, ds.ConcatenationFrameOffsetNumber = parts, at
            ds.SOPInstanceUIDOfConcatenationSource = generate_uid(entropy_srcs=[concatenation])
        at += size
        path = folder / f"enhanced-{part + 1}.dcm"
        _write(ds, path, transfer_syntax, modify)
        paths.append(path)
    return paths


def _write(ds: Dataset, path: Path, transfer_syntax: str, modify: Modify | None) -> None:
    if modify:
        modify(ds)
    if not ds.file_meta.TransferSyntaxUID.is_encapsulated:
        encode(ds, transfer_syntax)
    pydicom.dcmwrite(path, ds, enforce_file_format=True)


def _multi_frame(planes: Sequence[Dataset], *, shared: bool, first: int) -> Dataset:
    """One instance with a frame for each of `planes`; the first is frame `first` of the whole."""
    ds = Dataset()
    ds.update(planes[0])
    ds.file_meta = planes[0].file_meta
    common = _common_groups(planes[0])
    for keyword in _NOT_AT_TOP:
        if keyword in ds:
            delattr(ds, keyword)
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = EnhancedCTImageStorage
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid(
        entropy_srcs=[ds.SeriesInstanceUID, "frames", str(first)]
    )
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    _top_level(ds)
    ds.NumberOfFrames = len(planes)
    ds.SharedFunctionalGroupsSequence = [item(**(common if shared else {}))]
    ds.PerFrameFunctionalGroupsSequence = [
        item(**_frame_groups(plane, first + k + 1), **({} if shared else _common_groups(plane)))
        for k, plane in enumerate(planes)
    ]
    ds.PixelData = b"".join(plane.PixelData for plane in planes)
    return ds


def _top_level(ds: Dataset) -> None:
    """What the Enhanced CT Image IOD asks for beside a classic header."""
    kind = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    ds.ImageType = kind
    ds.PixelPresentation, ds.VolumetricProperties, ds.VolumeBasedCalculationTechnique = "MONOCHROME", "VOLUME", "NONE"
    ds.AcquisitionDateTime, ds.AcquisitionDuration = "20240102102100", 10.0
    ds.MultienergyCTAcquisition = "NO"
    ds.ContentQualification, ds.BurnedInAnnotation, ds.LossyImageCompression = "RESEARCH", "NO", "00"
    ds.PresentationLUTShape = "IDENTITY"
    ds.DeviceSerialNumber, ds.SoftwareVersions = "1", "1"
    ds.AcquisitionContextSequence = []
    ds.DimensionOrganizationSequence = [item(DimensionOrganizationUID=DIMENSION)]
    ds.DimensionIndexSequence = [
        item(
            DimensionOrganizationUID=DIMENSION,
            DimensionIndexPointer=0x00209057,  # In-Stack Position Number
            FunctionalGroupPointer=0x00209111,  # Frame Content Sequence
        )
    ]


def _common_groups(plane: Dataset) -> dict[str, list[Dataset]]:
    """What all frames of one stack have in common."""
    slope, intercept = plane.RescaleSlope, plane.RescaleIntercept
    return {
        **_scan_groups(plane),
        "PixelMeasuresSequence": [item(PixelSpacing=plane.PixelSpacing, SliceThickness=plane.SliceThickness)],
        "PlaneOrientationSequence": [item(ImageOrientationPatient=plane.ImageOrientationPatient)],
        "PixelValueTransformationSequence": [item(RescaleSlope=slope, RescaleIntercept=intercept, RescaleType="HU")],
        "FrameVOILUTSequence": [item(WindowCenter="40", WindowWidth="400")],
        "CTReconstructionSequence": [
            item(
                ReconstructionAlgorithm="FILTER_BACK_PROJ",
                ConvolutionKernel=plane.ConvolutionKernel,
                ConvolutionKernelGroup="SOFT_TISSUE",
                ImageFilter="NONE",
                ReconstructionFieldOfView=[500.0, 500.0],
                ReconstructionPixelSpacing=[float(v) for v in plane.PixelSpacing],
                ReconstructionAngle=360.0,
            )
        ],
        "FrameAnatomySequence": [
            item(
                FrameLaterality="U",
                AnatomicRegionSequence=[
                    item(CodeValue="38266002", CodingSchemeDesignator="SCT", CodeMeaning="Entire body")
                ],
            )
        ],
        "CTImageFrameTypeSequence": [
            item(
                FrameType=["ORIGINAL", "PRIMARY", "VOLUME", "NONE"],
                PixelPresentation="MONOCHROME",
                VolumetricProperties="VOLUME",
                VolumeBasedCalculationTechnique="NONE",
            )
        ],
    }


def _scan_groups(plane: Dataset) -> dict[str, list[Dataset]]:
    """What an ORIGINAL image has to say of the scanner (PS3.3 C.8.15.3); nothing here looks at it."""
    center = [0.0, 0.0, 0.0]
    return {
        "IrradiationEventIdentificationSequence": [item(IrradiationEventUID=f"{DIMENSION}.1")],
        "CTAcquisitionTypeSequence": [item(AcquisitionType="SPIRAL", ConstantVolumeFlag="NO", FluoroscopyFlag="NO")],
        "CTAcquisitionDetailsSequence": [
            item(
                RotationDirection="CW",
                RevolutionTime=0.5,
                SingleCollimationWidth=0.6,
                TotalCollimationWidth=38.4,
                TableHeight=100.0,
                GantryDetectorTilt=0.0,
                DataCollectionDiameter=500.0,
            )
        ],
        "CTTableDynamicsSequence": [item(TableSpeed=60.0, TableFeedPerRotation=30.0, SpiralPitchFactor=0.8)],
        "CTPositionSequence": [
            item(TablePosition=0.0, DataCollectionCenterPatient=center, ReconstructionTargetCenterPatient=center)
        ],
        "CTGeometrySequence": [item(DistanceSourceToDetector=1085.0, DistanceSourceToDataCollectionCenter=595.0)],
        "CTExposureSequence": [
            item(
                ExposureTimeInms=500.0,
                XRayTubeCurrentInmA=100.0,
                ExposureInmAs=50.0,
                ExposureModulationType="NONE",
            )
        ],
        "CTXRayDetailsSequence": [
            item(
                KVP=plane.KVP,
                FocalSpots=[1.0],
                FilterType="WEDGE",
                FilterMaterial="ALUMINUM",
                CalciumScoringMassFactorPatient=0.7,
                EnergyWeightingFactor=1.0,
            )
        ],
    }


def _frame_groups(plane: Dataset, position: int) -> dict[str, list[Dataset]]:
    moment = f"{plane.AcquisitionDate}{plane.AcquisitionTime}"
    content = item(
        FrameAcquisitionNumber=1,
        FrameReferenceDateTime=moment,
        FrameAcquisitionDateTime=moment,
        FrameAcquisitionDuration=1.0,
        StackID="1",
        InStackPositionNumber=position,
        DimensionIndexValues=[position],
    )
    return {
        "PlanePositionSequence": [item(ImagePositionPatient=plane.ImagePositionPatient)],
        "FrameContentSequence": [content],
    }


def frame_item(ds: Dataset, frame: int, sequence: str) -> Dataset:
    """The item of a per-frame group, to be changed by `modify`."""
    return ds.PerFrameFunctionalGroupsSequence[frame][sequence].value[0]
