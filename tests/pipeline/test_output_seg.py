"""The district map as a DICOM SEG, read back by other people's software."""

from __future__ import annotations

import subprocess
import warnings
from dataclasses import replace
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path

import highdicom as hd
import numpy as np
import pytest
import SimpleITK as sitk
from outputs_samples import (
    CREATED,
    CT_SERIES_UID,
    FRAME_UID,
    OPTIONS,
    PROVENANCE,
    Sample,
    header_only,
    read_back,
    sample_suv,
    source_of,
    write_sample_ct,
    write_series,
)
from pydicom import Dataset
from pydicom.sr.codedict import codes
from test_outputs_validators import VARIANTS, complaints, tool

from pipeline.errors import OutputError
from pipeline.outputs.district_seg import encode_district_seg
from pipeline.provenance import ResultUids
from pipeline.types import District, DistrictMap, EncodedSeries, OutputOptions, Provenance, SourceSeries

SHAPE = (6, 9, 11)


def district_map(*present: District, shape: tuple[int, int, int] = SHAPE) -> DistrictMap:
    """Boxes of the districts, head on top, on the grid of `sample_suv`; a slice without any district at the foot."""
    labels = np.zeros(shape, dtype=np.uint8)
    places = {
        District.HEAD: np.s_[5:, 3:6, 4:7],
        District.TRUNK: np.s_[2:5, 2:8, 3:8],
        District.ARMS: np.s_[3:5, 2:8, 0:2],
        District.LEGS: np.s_[1:2, 2:8, 3:9],
    }
    for district in present or tuple(District):
        labels[places[district]] = district
    confidence = dict.fromkeys(present or District, 0.875)
    return DistrictMap(
        labels=labels, grid=sample_suv(shape).grid, segmenter="builtin", version="2", confidence=confidence
    )


def encode(
    districts: DistrictMap,
    source: SourceSeries,
    *,
    options: OutputOptions = OPTIONS,
    provenance: Provenance = PROVENANCE,
    created: datetime = CREATED,
    not_evaluated: tuple[District, ...] = (),
    encoding: str = "sc",
) -> EncodedSeries:
    """The SEG of the PET series that `pet_of` gives."""
    sample = Sample(
        source=source, suv=sample_suv(districts.grid.shape), options=options, provenance=provenance, created=created
    )
    return encode_district_seg(
        districts,
        pet=sample.pet(encoding),
        source=source,
        provenance=provenance,
        options=options,
        uids=ResultUids(source=source, provenance=provenance, options=options, encoding=encoding),
        created=created,
        not_evaluated=not_evaluated,
    )


@pytest.fixture(scope="module")
def ct(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_sample_ct(tmp_path_factory.mktemp("ct"))


@pytest.fixture(scope="module")
def source(ct: list[Path]) -> SourceSeries:
    return source_of(ct)


def one(series: EncodedSeries) -> Dataset:
    (ds,) = read_back(series)
    return ds


def test_highdicom_reads_every_voxel_back(source: SourceSeries) -> None:
    districts = district_map()
    (instance,) = encode(districts, source).instances
    seg = hd.seg.segread(BytesIO(instance.data))
    volume = seg.get_volume(combine_segments=True, allow_missing_positions=True).to_patient_orientation("HPL")
    first = round((volume.position[2] - districts.grid.origin_mm[2]) / districts.grid.spacing_mm[0])
    numbers = {n: District[seg.get_segment_description(n).segment_label.upper()] for n in seg.segment_numbers}
    found = np.vectorize(lambda n: numbers.get(n, 0))(volume.array)
    read = np.zeros(SHAPE, dtype=np.uint8)
    read[first : first + len(found)] = found
    assert np.array_equal(read, districts.labels)
    assert volume.spacing == pytest.approx(districts.grid.spacing_mm, abs=1e-6)
    assert volume.position[:2] == pytest.approx(districts.grid.origin_mm[:2], abs=1e-6)


def test_simpleitk_reads_the_frames_of_a_single_district(source: SourceSeries, tmp_path: Path) -> None:
    districts = district_map(District.TRUNK, shape=(6, 9, 16))  # its GDCM wants frames of whole bytes
    (path,) = write_series(encode(districts, source), tmp_path / "seg")
    frames = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
    assert np.array_equal(frames > 0, districts.labels[2:5] == District.TRUNK)


@pytest.mark.parametrize("present", [(District.TRUNK,), (District.HEAD, District.LEGS), tuple(District)])
def test_a_district_that_is_absent_has_no_segment(present: tuple[District, ...], source: SourceSeries) -> None:
    ds = one(encode(district_map(*present), source))
    assert [item.SegmentLabel for item in ds.SegmentSequence] == [d.key for d in present]
    assert [item.SegmentNumber for item in ds.SegmentSequence] == list(range(1, len(present) + 1))


def test_a_map_without_any_district_is_an_error(source: SourceSeries) -> None:
    empty = replace(district_map(), labels=np.zeros(SHAPE, dtype=np.uint8), confidence={})
    with pytest.raises(OutputError) as caught:
        encode(empty, source)
    assert caught.value.code == "no_districts"


def test_segments_are_coded_and_name_the_segmenter(source: SourceSeries) -> None:
    ds = one(encode(district_map(), source, not_evaluated=(District.ARMS,)))
    assert ds.SegmentationType == "BINARY"
    wanted = ("69536005", "22943007", "53120007", "61685007")
    for item, code in zip(ds.SegmentSequence, wanted, strict=True):
        category, kind = item.SegmentedPropertyCategoryCodeSequence[0], item.SegmentedPropertyTypeCodeSequence[0]
        assert (category.CodeValue, category.CodingSchemeDesignator) == ("91723000", "SCT")
        assert (kind.CodeValue, kind.CodingSchemeDesignator) == (code, "SCT")
        assert item.SegmentAlgorithmType == "AUTOMATIC"
        assert item.SegmentAlgorithmName == "builtin"
        assert item.SegmentationAlgorithmIdentificationSequence[0].AlgorithmVersion == "2"
    described = [item.SegmentDescription for item in ds.SegmentSequence]
    assert described[0] == "head, confidence 0.88"
    assert [d for d in described if "NOT EVALUATED" in d] == [described[2]]
    assert kind.CodeMeaning == codes.SCT.LowerLimb.meaning


def test_the_object_is_the_cts_patient_study_and_frame_of_reference(source: SourceSeries) -> None:
    ds = one(encode(district_map(), source))
    header = source.header
    for keyword in ("PatientID", "PatientName", "StudyInstanceUID", "StudyDescription", "PatientWeight", "StudyDate"):
        assert ds[keyword].value == header[keyword].value, keyword
    assert ds.FrameOfReferenceUID == FRAME_UID
    assert ds.Modality == "SEG"
    assert ds.SyntheticData == "YES"
    assert ds.Manufacturer != header.Manufacturer
    assert ds.SeriesNumber == 9020
    assert ds.SeriesDescription.startswith("SYNTHETIC")


@pytest.mark.parametrize("encoding", ["sc", "pet"])
def test_the_pet_of_its_encoding_is_referenced_and_each_frame_names_the_plane_that_it_lies_on(
    encoding: str, source: SourceSeries
) -> None:
    written = encode(district_map(), source, encoding=encoding)
    ds, pet = one(written), read_back(Sample(source=source, suv=sample_suv()).pet(encoding))
    assert (written.kind, written.encoding) == ("seg", encoding)
    (series,) = ds.ReferencedSeriesSequence
    assert series.SeriesInstanceUID == pet[0].SeriesInstanceUID
    named = [(i.ReferencedSOPClassUID, i.ReferencedSOPInstanceUID) for i in series.ReferencedInstanceSequence]
    assert named == [(plane.SOPClassUID, plane.SOPInstanceUID) for plane in pet]
    planes = {plane.SOPInstanceUID: plane for plane in pet}
    for frame in ds.PerFrameFunctionalGroupsSequence:
        (derivation,) = frame.DerivationImageSequence
        (image,) = derivation.SourceImageSequence
        plane = planes[image.ReferencedSOPInstanceUID]
        position = [float(v) for v in frame.PlanePositionSequence[0].ImagePositionPatient]
        assert position == pytest.approx([float(v) for v in plane.ImagePositionPatient], abs=1e-3)
        assert image.SpatialLocationsPreserved == "YES"
        assert (plane.Rows, plane.Columns) == (ds.Rows, ds.Columns)
        assert plane.FrameOfReferenceUID == ds.FrameOfReferenceUID


def test_the_ct_is_the_related_series(source: SourceSeries) -> None:
    (related,) = one(encode(district_map(), source)).RelatedSeriesSequence
    assert (related.StudyInstanceUID, related.SeriesInstanceUID) == (source.study_uid, CT_SERIES_UID)
    (purpose,) = related.PurposeOfReferenceCodeSequence
    assert (purpose.CodeValue, purpose.CodingSchemeDesignator) == ("122401", "DCM")


def test_a_ct_without_a_usable_series_uid_is_not_named(source: SourceSeries) -> None:
    assert "RelatedSeriesSequence" not in one(encode(district_map(), replace(source, series_uid="")))


def test_the_same_result_has_the_same_bytes_and_another_segmenter_other_uids(source: SourceSeries) -> None:
    (first,), (again,) = (encode(district_map(), source).instances for _ in range(2))
    assert first.data == again.data
    (other,) = encode(district_map(), source, provenance=replace(PROVENANCE, segmenter_version="3")).instances
    (moved,) = encode(district_map(), source, options=replace(OPTIONS, seg_series_number=9021)).instances
    (pet,) = encode(district_map(), source, encoding="pet").instances
    assert len({one.sop_instance_uid for one in (first, other, moved, pet)}) == 4


def test_a_ct_of_series_number_9020_pushes_ours_on(tmp_path: Path) -> None:
    taken = source_of(write_sample_ct(tmp_path, series_number=9020))
    assert one(encode(district_map(), taken)).SeriesNumber == 9120


def test_no_warning_quotes_a_patients_name(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    warnings.simplefilter("always")
    source = source_of(write_sample_ct(tmp_path, patient_name="SMITH", patient_id="X" * 70))
    assert one(encode(district_map(), source)).PatientName == "SMITH"
    assert not [w for w in recwarn.list if "SMITH" in str(w.message)]


def test_dates_are_the_cts_and_the_jobs(source: SourceSeries) -> None:
    ds = one(encode(district_map(), source, created=datetime(2025, 1, 2, 3, 4, 5, tzinfo=UTC)))
    assert (ds.SeriesDate, ds.SeriesTime) == ("20240102", "102100")
    assert (ds.ContentDate, ds.InstanceCreationDate) == ("20250102", "20250102")


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.__name__.strip("_"))
def test_the_validator_finds_nothing(variant, tmp_path: Path) -> None:
    ct_paths = write_sample_ct(tmp_path / "ct", variant)
    sample = Sample(source=source_of(ct_paths), suv=sample_suv())
    for encoding in ("sc", "pet"):
        (path,) = write_series(encode(district_map(), sample.source, encoding=encoding), tmp_path / encoding / "seg")
        assert complaints(path) == []
        study = (*ct_paths, *write_series(sample.pet(encoding), tmp_path / encoding / "pet"), path)
        done = subprocess.run([tool("dcentvfy"), *map(str, study)], capture_output=True, text=True, timeout=60)
        assert (done.stdout + done.stderr).strip() == ""


def test_a_ct_without_any_attribute_costs_only_what_a_dicomdir_would_need(tmp_path: Path) -> None:
    (path,) = write_series(encode(district_map(District.HEAD), header_only()), tmp_path / "seg")
    assert [line for line in complaints(path) if not line.endswith("needed to build DICOMDIR")] == []
