"""The PET series, written and read back attribute by attribute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ct_factory import write_ct
from outputs_samples import (
    CT_SERIES_UID,
    FRAME_UID,
    STUDY_UID,
    Sample,
    header_only,
    read_back,
    sample_suv,
    source_of,
    write_sample_ct,
)
from pydicom import Dataset, dcmread, dcmwrite
from pydicom.dataelem import DataElement
from pydicom.multival import MultiValue

from pipeline.ct_reader import read_ct
from pipeline.errors import OutputError
from pipeline.outputs.explicit import SeriesTemplate
from pipeline.outputs.pet_series import bracketing
from pipeline.types import District, Grid, Progress, Stage, SuvVolume

PET_CLASS, SC_CLASS = "1.2.840.10008.5.1.4.1.1.128", "1.2.840.10008.5.1.4.1.1.7"
ABSENT, EMPTY, ANY = object(), object(), object()

# keyword -> what every instance of the sample must hold, in both encodings (dicom-output, attribute table)
BOTH: dict[str, Any] = {
    "SpecificCharacterSet": "ISO_IR 192",  # the CT's
    "SyntheticData": "YES",
    "InstanceCreationDate": "20240506",
    "InstanceCreationTime": "070809.123456",
    "PatientName": "PHANTOM^TEST",
    "PatientID": "PH-1",
    "IssuerOfPatientID": ABSENT,
    "PatientBirthDate": "19600101",
    "PatientSex": "O",
    "PatientIdentityRemoved": ABSENT,
    "StudyInstanceUID": STUDY_UID,
    "StudyDate": "20240102",
    "StudyTime": "101500",
    "AccessionNumber": "ACC1",
    "ReferringPhysicianName": EMPTY,
    "StudyDescription": "WHOLE BODY",
    "StudyID": "1",
    "PatientAge": ABSENT,
    "PatientSize": 1.7,
    "PatientWeight": 70,
    "Modality": "PT",
    "SeriesNumber": 9001,
    "SeriesDescription": "SYNTHETIC FDG PET SUVbw - AI, RESEARCH ONLY",
    "SeriesDate": "20240102",
    "SeriesTime": "102100",
    "BodyPartExamined": "WHOLEBODY",
    "PatientPosition": ABSENT,
    "ReferencedPerformedProcedureStepSequence": ABSENT,
    "RequestAttributesSequence": ABSENT,
    "FrameOfReferenceUID": FRAME_UID,
    "PositionReferenceIndicator": EMPTY,
    "Manufacturer": "dicom-node project",
    "ManufacturerModelName": "dicom-node synthetic PET",
    "SoftwareVersions": "0.1.0",
    "DeviceSerialNumber": "abababababab",
    "Units": "GML",
    "SUVType": "BW",
    "CountsSource": "EMISSION",
    "SeriesType": ["WHOLE BODY", "IMAGE"],
    "NumberOfSlices": 6,
    "CorrectedImage": ["ATTN", "DECY"],
    "DecayCorrection": "START",
    "CollimatorType": EMPTY,
    "AttenuationCorrectionMethod": ABSENT,
    "ReconstructionMethod": ABSENT,
    "ScatterCorrectionMethod": ABSENT,
    "AcquisitionNumber": 1,
    "ContentDate": "20240506",
    "ContentTime": "070809.123456",
    "DerivationCodeSequence": ABSENT,
    "ImageComments": "SYNTHETIC PET PREDICTED FROM CT BY AI - NOT ACQUIRED - NOT FOR DIAGNOSIS",
    "BurnedInAnnotation": "NO",
    "LossyImageCompression": "00",
    "LossyImageCompressionRatio": ABSENT,
    "RecognizableVisualFeatures": ABSENT,
    "PixelSpacing": [4.0, 4.07283],
    "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
    "SliceThickness": 4.5,
    "SpacingBetweenSlices": ABSENT,
    "SamplesPerPixel": 1,
    "PhotometricInterpretation": "MONOCHROME2",
    "Rows": 9,
    "Columns": 11,
    "BitsAllocated": 16,
    "BitsStored": 16,
    "HighBit": 15,
    "PixelRepresentation": 0,
    "RescaleIntercept": "0",
    "RescaleSlope": "0.0009999",
    "FrameReferenceTime": 0,
    "AcquisitionDate": "20240102",
    "AcquisitionTime": "102100",
    "ActualFrameDuration": EMPTY,
    "DecayFactor": 1,
    "WindowCenter": [3, 5.5],  # LINEAR: center - 0.5 - (width - 1) / 2 = 0, center - 0.5 + (width - 1) / 2 = 5
    "WindowWidth": [6, 11],
    "WindowCenterWidthExplanation": ["SUV 0-5", "SUV 0-10"],
    "ContentQualification": ABSENT,
    "KVP": ABSENT,
    "ConvolutionKernel": ABSENT,
}
DIFFERENT: dict[str, dict[str, Any]] = {
    "pet": {
        "SOPClassUID": PET_CLASS,
        "ImageType": ["DERIVED", "PRIMARY"],
        "ConversionType": ABSENT,
        "PatientOrientation": ABSENT,
        "RescaleType": ABSENT,
        "SecondaryCaptureDeviceManufacturer": ABSENT,
        "SecondaryCaptureDeviceManufacturerModelName": ABSENT,
        "SecondaryCaptureDeviceSoftwareVersions": ABSENT,
    },
    "sc": {
        "SOPClassUID": SC_CLASS,
        "ImageType": ["DERIVED", "SECONDARY"],
        "ConversionType": "SYN",
        "PatientOrientation": ["L", "P"],
        "RescaleType": "US",
        "SecondaryCaptureDeviceManufacturer": "dicom-node project",
        "SecondaryCaptureDeviceManufacturerModelName": "dicom-node synthetic PET",
        "SecondaryCaptureDeviceSoftwareVersions": "0.1.0",
    },
}


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    return Sample(source=source_of(write_sample_ct(tmp_path_factory.mktemp("ct"))), suv=sample_suv())


def check(ds: Dataset, keyword: str, expected: Any) -> None:
    if expected is ABSENT:
        assert keyword not in ds
        return
    value = ds[keyword].value
    if expected is EMPTY:
        assert ds[keyword].is_empty
    elif isinstance(expected, list):
        assert list(value) == expected
    else:
        assert not isinstance(value, MultiValue)
        assert value == expected


@pytest.mark.parametrize("encoding", ["sc", "pet"])
def test_every_instance_has_the_attributes_of_the_table(sample: Sample, encoding: str):
    for ds in read_back(sample.pet(encoding)):
        for keyword, expected in (BOTH | DIFFERENT[encoding]).items():
            check(ds, keyword, expected)


def test_the_table_names_every_attribute_that_is_written(sample: Sample):
    elsewhere = {
        "SOPInstanceUID",
        "SeriesInstanceUID",
        "ContributingEquipmentSequence",
        "DerivationDescription",
        "ReferencedSeriesSequence",
        "SourceImageSequence",
        "RadiopharmaceuticalInformationSequence",
        "PatientOrientationCodeSequence",
        "PatientGantryRelationshipCodeSequence",
        "RealWorldValueMappingSequence",
        "InstanceNumber",
        "ImageIndex",
        "ImagePositionPatient",
        "SliceLocation",
        "PixelData",
    }
    for encoding in ("sc", "pet"):
        expected = {k for k, v in (BOTH | DIFFERENT[encoding]).items() if v is not ABSENT} | elsewhere
        assert {elem.keyword for elem in read_back(sample.pet(encoding))[0]} == expected


def test_the_encodings_differ_exactly_where_they_must(sample: Sample):
    uids = {"SOPInstanceUID", "SeriesInstanceUID"}
    for sc, pet in zip(read_back(sample.pet("sc")), read_back(sample.pet("pet")), strict=True):
        keywords = {elem.keyword for ds in (sc, pet) for elem in ds}
        assert {k for k in keywords if sc.get(k) != pet.get(k)} == set(DIFFERENT["sc"]) | uids


@pytest.mark.parametrize("encoding", ["sc", "pet"])
def test_the_bytes_are_what_pydicom_would_write(sample: Sample, encoding: str):
    for instance in sample.pet(encoding).instances:
        buffer = BytesIO()
        ds = dcmread(BytesIO(instance.data))
        dcmwrite(buffer, ds, enforce_file_format=True)
        assert buffer.getvalue() == instance.data
        assert [elem.tag for elem in ds] == sorted(elem.tag for elem in ds)
        assert ds.file_meta.MediaStorageSOPInstanceUID == ds.SOPInstanceUID == instance.sop_instance_uid
        assert ds.file_meta.MediaStorageSOPClassUID == ds.SOPClassUID == instance.sop_class_uid
        assert ds.file_meta.TransferSyntaxUID == instance.transfer_syntax_uid == "1.2.840.10008.1.2.1"


def test_instances_go_from_foot_to_head_with_their_place_and_number(sample: Sample):
    series = sample.pet("sc")
    assert [i.file_name for i in series.instances] == [f"000{n}.dcm" for n in range(1, 7)]
    for index, ds in enumerate(read_back(series)):
        assert ds.InstanceNumber == ds.ImageIndex == index + 1
        assert [float(v) for v in ds.ImagePositionPatient] == [-24.3, -15.1, -100 + 4.5 * index]
        assert ds.SliceLocation == -100 + 4.5 * index
        assert ds.SeriesInstanceUID == series.series_uid


@pytest.mark.parametrize("encoding", ["sc", "pet"])
def test_the_pixels_are_the_suv(sample: Sample, encoding: str):
    for plane, ds in zip(sample.suv.suv, read_back(sample.pet(encoding)), strict=True):
        values = ds.pixel_array * float(ds.RescaleSlope)
        assert np.abs(values - plane).max() <= 0.0005
        assert ds.pixel_array.max() <= 32767
        assert ds["PixelData"].VR == "OW"


def test_no_slice_has_a_maximum_that_is_an_integer():
    suv = sample_suv((20, 3, 3)).suv * 0
    suv[:, 1, 1] = np.arange(1, 21)
    grid = replace(sample_suv().grid, shape=suv.shape)
    top = suv.copy()
    top[-1] = 40  # above full scale: another slope
    for volume in (suv, top):
        sample = Sample(source=header_only(), suv=SuvVolume(suv=volume, grid=grid))
        slices = read_back(sample.pet("sc"))
        assert len({ds.RescaleSlope.original_string for ds in slices}) == 1
        for ds in slices:
            assert not float(ds.pixel_array.max() * float(ds.RescaleSlope)).is_integer()


def test_source_images_are_the_one_or_two_ct_slices_around_the_plane(sample: Sample):
    by_position = {round(i.position_mm[2]): i.sop_instance_uid for i in sample.source.instances}
    expected = [[-100], [-97, -94], [-91], [-88, -85], [-82], [-79, -76]]
    for ds, positions in zip(read_back(sample.pet("pet")), expected, strict=True):
        uids = [by_position[p] for p in positions]
        assert [item.ReferencedSOPInstanceUID for item in ds.SourceImageSequence] == uids
        series = ds.ReferencedSeriesSequence[0]
        assert series.SeriesInstanceUID == CT_SERIES_UID
        assert [item.ReferencedSOPInstanceUID for item in series.ReferencedInstanceSequence] == uids
        for item in ds.SourceImageSequence:
            assert item.ReferencedSOPClassUID == "1.2.840.10008.5.1.4.1.1.2"
            assert item.PurposeOfReferenceCodeSequence[0].CodeValue == "121322"
            assert item.SpatialLocationsPreserved == "NO"


def test_locations_are_preserved_where_the_plane_is_the_cts_own(sample: Sample):
    grid = Grid(shape=(9, 16, 20), spacing_mm=(3, 2, 2.5), origin_mm=(-25, -16, -100), frame_of_reference_uid=FRAME_UID)
    same = replace(sample, suv=SuvVolume(suv=np.zeros(grid.shape, np.float32), grid=grid))
    for ds in read_back(same.pet("pet")):
        assert [item.SpatialLocationsPreserved for item in ds.SourceImageSequence] == ["YES"]
    for change in ({"origin_mm": (-25, -16.5, -100)}, {"spacing_mm": (3, 2, 2.6)}, {"shape": (9, 16, 19)}):
        other = replace(grid, **change)
        moved = replace(sample, suv=SuvVolume(suv=np.zeros(other.shape, np.float32), grid=other))
        assert read_back(moved.pet("pet"))[0].SourceImageSequence[0].SpatialLocationsPreserved == "NO"


BRACKETS = [(-1.0, [0]), (0.0, [0]), (0.004, [0]), (1.0, [0, 1]), (2.995, [1]), (7.0, [2]), (6.0, [2])]


@pytest.mark.parametrize(("z_mm", "found"), BRACKETS)
def test_a_plane_is_bracketed(z_mm: float, found: list[int]):
    assert list(range(3))[bracketing(np.array([0.0, 3.0, 6.0]), z_mm)] == found
    assert [][bracketing(np.array([]), z_mm)] == []


CORONAL, SAGITTAL, OBLIQUE = (1, 0, 0, 0, 0, -1), (0, 1, 0, 0, 0, -1), (1, 0, 0, 0, 0.6, -0.8)


@pytest.mark.parametrize("orientation", [CORONAL, SAGITTAL, OBLIQUE])
def test_a_plane_across_all_ct_slices_names_all_of_them(sample: Sample, tmp_path: Path, orientation: tuple[float, ...]):
    hu = np.zeros((7, 8, 8), np.int16)
    ct = read_ct(write_ct(tmp_path, hu, spacing_mm=(3, 2, 2), orientation=orientation))
    uids = [i.sop_instance_uid for i in ct.source.instances]
    suv = SuvVolume(suv=np.zeros(ct.hu.shape, np.float32), grid=ct.grid)
    for ds in read_back(replace(sample, source=ct.source, suv=suv).pet("sc")):
        assert [item.ReferencedSOPInstanceUID for item in ds.SourceImageSequence] == uids
        (series,) = ds.ReferencedSeriesSequence
        assert [item.ReferencedSOPInstanceUID for item in series.ReferencedInstanceSequence] == uids
        assert {item.SpatialLocationsPreserved for item in ds.SourceImageSequence} == {"NO"}


def along_z(ds: Dataset, index: int) -> None:
    ds.ImagePositionPatient = [-8, -8, 3 * index]  # the table moves along z, however the gantry is tilted


@pytest.mark.parametrize(("degrees", "modify"), [(20, along_z), (5, None)])
def test_a_tilted_gantry_and_a_slightly_oblique_ct_still_name_the_slices_around_the_plane(
    sample: Sample, tmp_path: Path, degrees: float, modify: Callable[[Dataset, int], None] | None
):
    orientation = (1, 0, 0, 0, np.cos(np.radians(degrees)), np.sin(np.radians(degrees)))
    ct = read_ct(write_ct(tmp_path, np.zeros((30, 8, 8), np.int16), orientation=orientation, modify=modify))
    suv = SuvVolume(suv=np.zeros(ct.hu.shape, np.float32), grid=ct.grid)
    for ds in read_back(replace(sample, source=ct.source, suv=suv).pet("sc")):
        assert 1 <= len(ds.SourceImageSequence) <= 2


def test_a_ct_whose_uids_are_no_uids_is_not_referenced(sample: Sample):
    bad = tuple(replace(i, sop_instance_uid="1.2/3é") for i in sample.source.instances)
    for source in (
        replace(sample.source, instances=bad),
        replace(sample.source, series_uid="Ä"),
        replace(sample.source, instances=()),
    ):
        ds = read_back(replace(sample, source=source).pet("pet"))[0]
        assert "SourceImageSequence" not in ds
        assert "ReferencedSeriesSequence" not in ds


def test_no_dose_is_ever_claimed(sample: Sample):
    for encoding in ("sc", "pet"):
        (item,) = read_back(sample.pet(encoding))[0].RadiopharmaceuticalInformationSequence
        assert item.RadionuclideTotalDose == 0
        assert item.Radiopharmaceutical == "NONE ADMINISTERED (SYNTHETIC)"
        assert item.RadionuclideHalfLife == 6586.2
        assert item["RadionuclideCodeSequence"].is_empty
        assert item.RadiopharmaceuticalStartTime == "102100"
        assert item.RadiopharmaceuticalStartDateTime == "20240102102100"


def test_real_world_values_repeat_the_rescale(sample: Sample):
    (mapping,) = read_back(sample.pet("pet"))[0].RealWorldValueMappingSequence
    assert (mapping.LUTLabel, mapping.LUTExplanation) == ("SUVbw", "SUVbw")
    assert (mapping.RealWorldValueSlope, mapping.RealWorldValueIntercept) == (0.0009999, 0)
    assert (mapping.RealWorldValueFirstValueMapped, mapping.RealWorldValueLastValueMapped) == (0, 32767)
    assert mapping["RealWorldValueLastValueMapped"].VR == "US"
    units = mapping.MeasurementUnitsCodeSequence[0]
    assert (units.CodeValue, units.CodingSchemeDesignator) == ("g/ml{SUVbw}", "UCUM")
    quantity = mapping.QuantityDefinitionSequence[0]
    assert quantity.ValueType == "CODE"
    assert quantity.ConceptNameCodeSequence[0].CodeValue == "246205007"
    assert quantity.ConceptCodeSequence[0].CodeValue == "126401"


def test_every_network_and_the_segmenter_are_named(sample: Sample):
    ds = read_back(sample.pet("pet"))[0]
    head, trunk, segmenter = ds.ContributingEquipmentSequence
    for item, model, digest in ((head, "phantom head", "c1" * 6), (trunk, "phantom trunk", "d2" * 6)):
        assert item.PurposeOfReferenceCodeSequence[0].CodeValue == "109100"
        assert (item.ManufacturerModelName, item.SoftwareVersions, item.DeviceSerialNumber) == (model, "3", digest)
        assert digest in item.ContributionDescription
        assert item.ContributionDateTime == "20240506070809.123456"
    assert segmenter.PurposeOfReferenceCodeSequence[0].CodeValue == "109102"
    assert (segmenter.ManufacturerModelName, segmenter.SoftwareVersions) == ("builtin", "2")
    assert "predicted from CT by phantom 3" in ds.DerivationDescription


@pytest.mark.parametrize("encoding", ["sc", "pet"])
def test_a_district_that_was_not_evaluated_is_named_where_its_zeros_are(sample: Sample, encoding: str):
    suv = replace(sample.suv, not_evaluated=(District.ARMS, District.LEGS))
    long_name = replace(sample.provenance, bundle_name="x" * 64, bundle_version="9" * 64)
    words = "; NOT EVALUATED (zero is no statement): arms, legs"
    partial = replace(sample, suv=suv, provenance=long_name)
    for ds in (*read_back(partial.pet(encoding)), *read_back(partial.mip())):
        assert ds.ImageComments == f"{BOTH['ImageComments']}{words}"
        assert ds.DerivationDescription.endswith(words)
        assert len(ds.DerivationDescription) <= 1024  # ST
    for ds in read_back(sample.pet(encoding)):
        assert "EVALUATED" not in ds.ImageComments + ds.DerivationDescription


def test_the_markers_can_be_asked_for(sample: Sample):
    marked = sample.with_options(emit_sc_markers=True)
    for encoding in ("sc", "pet"):
        ds = read_back(marked.pet(encoding))[0]
        assert (ds.ConversionType, ds.ContentQualification) == ("SYN", "RESEARCH")


def test_the_same_inputs_give_the_same_bytes_and_other_inputs_other_uids(sample: Sample):
    first = sample.pet("sc")
    assert first == sample.pet("sc")
    others = [
        sample.pet("pet"),
        sample.with_options(series_number=5).pet("sc"),
        replace(sample, provenance=replace(sample.provenance, bundle_sha256="00" * 32)).pet("sc"),
    ]
    assert len({s.series_uid for s in (first, *others)}) == 4
    assert len({i.sop_instance_uid for s in (first, *others) for i in s.instances}) == 24
    later = replace(sample, created=sample.created + timedelta(days=1)).pet("sc")
    assert later.series_uid == first.series_uid  # the job's time is stored with the job, not part of the identity


def test_progress_counts_the_instances(sample: Sample):
    from pipeline.outputs.pet_series import encode_pet_series

    seen: list[Progress] = []
    encode_pet_series(sample.suv, **sample._common("sc"), on_progress=seen.append)
    assert [(p.stage, p.done, p.total) for p in seen] == [(Stage.WRITE, n, 6) for n in range(1, 7)]


def test_what_cannot_be_written_is_refused_with_a_reason(sample: Sample):
    with pytest.raises(OutputError, match="unknown_encoding"):
        sample.pet("mr")
    grid = replace(sample.suv.grid, frame_of_reference_uid="")
    with pytest.raises(OutputError, match="no_frame_of_reference"):
        replace(sample, suv=SuvVolume(suv=sample.suv.suv, grid=grid)).pet("sc")
    long = Grid(shape=(65536, 1, 1), spacing_mm=(1, 1, 1), origin_mm=(0, 0, 0), frame_of_reference_uid=FRAME_UID)
    with pytest.raises(OutputError, match="too_large"):
        replace(sample, suv=SuvVolume(suv=np.zeros(long.shape, np.float32), grid=long)).pet("sc")


def test_a_tag_cannot_be_both_shared_and_varying():
    shared = Dataset()
    shared.SOPClassUID = SC_CLASS
    shared.add(DataElement("InstanceNumber", "IS", "1"))
    with pytest.raises(ValueError, match="00200013"):
        SeriesTemplate(shared, [0x00200013])


def test_a_single_plane_is_a_series_of_one(sample: Sample):
    series = replace(sample, suv=sample_suv((1, 3, 5))).pet("sc")
    (ds,) = read_back(series)
    assert (ds.NumberOfSlices, ds.Rows, ds.Columns) == (1, 3, 5)
    assert len(ds.PixelData) == 30


def test_files_can_be_read_without_reading_the_pixels(sample: Sample, tmp_path: Path):
    path = tmp_path / "1.dcm"
    path.write_bytes(sample.pet("sc").instances[0].data)
    assert "PixelData" not in dcmread(path, stop_before_pixels=True)
