"""The districts' SUV as a TID 1500 report, read back by other people's software."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from datetime import timedelta
from io import BytesIO
from pathlib import Path
from typing import Any

import highdicom as hd
import numpy as np
import pytest
from companion_samples import report_of, seg_of
from outputs_samples import (
    CT_SERIES_UID,
    FRAME_UID,
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
from test_output_seg import district_map
from test_outputs_validators import VARIANTS, complaints, tool

from pipeline.errors import OutputError
from pipeline.outputs.measurement_report import encode_measurement_report
from pipeline.types import District, EncodedSeries

ACCESSION = "Element=<AccessionNumber> IE <Series> versus <Study>"  # dcentvfy's table has it in the SR Document modules


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    return Sample(source=source_of(write_sample_ct(tmp_path_factory.mktemp("ct"))), suv=sample_suv())


def groups_of(series: EncodedSeries) -> dict[str, Any]:
    """The measurement groups as highdicom reads them, by the district's name."""
    report = hd.sr.srread(BytesIO(series.instances[0].data)).content
    found = [*report.get_volumetric_roi_measurement_groups(), *report.get_image_measurement_groups()]
    return {group.tracking_identifier: group for group in found}


def values_of(group: Any) -> dict[str, tuple[float, str]]:
    """Derivation, or the measurement's name where it has none, to value and unit."""
    return {
        (m.derivation.meaning if m.derivation else m.name.meaning): (m.value, m.unit.value)
        for m in group.get_measurements()
    }


def one(series: EncodedSeries) -> Dataset:
    (ds,) = read_back(series)
    return ds


@pytest.mark.parametrize("encoding", ["sc", "pet"])
@pytest.mark.parametrize("with_seg", [False, True])
def test_a_report_says_what_a_reader_of_the_pet_measures(sample: Sample, encoding: str, with_seg: bool) -> None:
    pet = read_back(sample.pet(encoding))
    values = np.stack([ds.pixel_array * float(ds.RescaleSlope) for ds in pet])
    labels, voxel_ml = district_map().labels, sample.suv.grid.voxel_ml
    groups = groups_of(
        report_of(sample, encoding=encoding, seg=seg_of(sample, encoding=encoding) if with_seg else None)
    )
    assert list(groups) == [d.key for d in District]
    for district in District:
        inside = values[labels == district]
        measured = values_of(groups[district.key])
        assert measured["Mean"] == (pytest.approx(inside.mean(), abs=1e-6), "g/ml{SUVbw}")
        assert measured["Maximum"] == (pytest.approx(inside.max(), abs=1e-6), "g/ml{SUVbw}")
        assert measured["Volume"] == (pytest.approx(inside.size * voxel_ml, abs=1e-6), "mL")
        names = {m.name.value for m in groups[district.key].get_measurements() if m.derivation}
        assert names == {"126401"}


def test_a_district_is_named_by_site_and_tracked_as_in_the_seg(sample: Sample) -> None:
    groups = groups_of(report_of(sample))
    segments = one(seg_of(sample)).SegmentSequence
    for segment, group, code in zip(
        segments, groups.values(), ("69536005", "22943007", "53120007", "61685007"), strict=True
    ):
        assert group.tracking_uid == segment.TrackingUID
        assert [site.value.value for site in group.finding_sites] == [code]
        assert (group.finding_category.value, group.finding_type.value) == ("91723000", code)


def test_a_measurement_of_a_written_seg_points_to_its_segment(sample: Sample) -> None:
    present = (District.TRUNK, District.LEGS)
    seg = seg_of(sample, *present)
    groups = groups_of(report_of(sample, *present, seg=seg))
    for number, district in enumerate(present, start=1):
        segment = groups[district.key].referenced_segment
        assert segment.referenced_sop_instance_uid == seg.instances[0].sop_instance_uid
        assert list(segment.referenced_segment_numbers) == [number]
        assert segment.source_series_for_segmentation.value == CT_SERIES_UID
    assert "Referenced Segment" not in str(one(report_of(sample, *present)))


def test_a_ct_without_a_usable_series_uid_costs_the_segments_and_not_the_report(sample: Sample) -> None:
    unnamed = replace(sample, source=replace(sample.source, series_uid="Ä"))
    groups = groups_of(report_of(unnamed, seg=seg_of(unnamed)))
    assert len(groups) == 4
    assert not any(isinstance(g, hd.sr.VolumetricROIMeasurementsAndQualitativeEvaluations) for g in groups.values())


def test_a_district_without_a_network_has_no_suv_and_says_so(sample: Sample) -> None:
    groups = groups_of(report_of(sample, not_evaluated=(District.ARMS,)))
    assert set(values_of(groups["arms"])) == {"Volume"}
    told = {
        name: item.value
        for name, group in groups.items()
        for item in group[0].ContentSequence
        if item.value_type is hd.sr.ValueTypeValues.TEXT and item.name.value == "121106"
    }
    assert "NOT EVALUATED" in told["arms"]
    assert [name for name, words in told.items() if "SYNTHETIC PET PREDICTED FROM CT" in words] == [
        "head",
        "trunk",
        "legs",
    ]


def test_the_image_library_is_the_pet_series_plane_by_plane(sample: Sample) -> None:
    pet = sample.pet("pet")
    ds = one(report_of(sample, encoding="pet"))
    library = next(i for i in ds.ContentSequence if i.ConceptNameCodeSequence[0].CodeValue == "111028")
    (group,) = library.ContentSequence
    images = [item for item in group.ContentSequence if item.ValueType == "IMAGE"]
    assert [i.ReferencedSOPSequence[0].ReferencedSOPInstanceUID for i in images] == [
        i.sop_instance_uid for i in pet.instances
    ]
    (frame,) = (i.UID for i in group.ContentSequence if i.ValueType == "UIDREF")
    assert frame == FRAME_UID


def test_the_evidence_is_the_pet_series_and_the_seg(sample: Sample) -> None:
    seg = seg_of(sample)
    (study,) = one(report_of(sample, seg=seg)).CurrentRequestedProcedureEvidenceSequence
    named = {s.SeriesInstanceUID: len(s.ReferencedSOPSequence) for s in study.ReferencedSeriesSequence}
    assert named == {sample.pet("sc").series_uid: 6, seg.series_uid: 1}
    assert study.StudyInstanceUID == sample.source.study_uid


def test_a_report_is_complete_unverified_preliminary_and_synthetic(sample: Sample) -> None:
    series = report_of(sample)
    ds = one(series)
    assert (series.kind, series.encoding) == ("sr", "sc")
    assert ds.SOPClassUID == "1.2.840.10008.5.1.4.1.1.88.34"
    assert (ds.CompletionFlag, ds.VerificationFlag, ds.PreliminaryFlag) == ("COMPLETE", "UNVERIFIED", "PRELIMINARY")
    assert (ds.Modality, ds.SyntheticData, ds.SeriesNumber) == ("SR", "YES", 9040)
    assert ds.SeriesDescription.startswith("SYNTHETIC")
    assert ds.ContentTemplateSequence[0].TemplateIdentifier == "1500"
    assert (ds.ContentDate, ds.InstanceCreationDate, ds.SeriesDate) == ("20240506", "20240506", "20240102")
    header = sample.source.header
    for keyword in ("PatientID", "PatientName", "StudyInstanceUID", "StudyDescription", "PatientWeight", "PatientSize"):
        assert ds[keyword].value == header[keyword].value, keyword
    assert len(ds.ContributingEquipmentSequence) == 3
    assert "SYNTHETIC" not in ds.StudyDescription


def test_the_same_result_has_the_same_report_and_another_one_another(sample: Sample) -> None:
    first = report_of(sample)
    assert first == report_of(sample)
    later = report_of(replace(sample, created=sample.created + timedelta(days=1)))
    assert later.series_uid == first.series_uid
    others = [
        report_of(sample, encoding="pet"),
        report_of(sample, seg=seg_of(sample)),  # what it says of the segments is another content
        report_of(sample.with_options(sr_series_number=77)),
        report_of(replace(sample, provenance=replace(PROVENANCE, bundle_sha256="00" * 32))),
    ]
    series = (first, *others)
    assert len({s.series_uid for s in series}) == len({s.instances[0].sop_instance_uid for s in series}) == 5


def test_a_report_of_no_district_is_an_error(sample: Sample) -> None:
    with pytest.raises(OutputError) as caught:
        encode_measurement_report(
            (),
            pet=sample.pet("sc"),
            seg=None,
            grid=sample.suv.grid,
            **{k: v for k, v in sample._common("sc").items() if k != "encoding"},
        )
    assert caught.value.code == "no_districts"


def test_dcmtk_prints_the_report(sample: Sample, tmp_path: Path) -> None:
    (path,) = write_series(report_of(sample, not_evaluated=(District.ARMS,)), tmp_path / "sr")
    done = subprocess.run([tool("dsrdump"), "+Pl", str(path)], capture_output=True, text=True, timeout=60)
    known = "W: The VR checker does not support this Specific Character Set: ISO_IR 192"  # a word on DCMTK, not on us
    assert (done.returncode, done.stderr.replace(known, "").strip()) == (0, "")
    assert done.stdout.count('NUM:(,,"SUVbw")') == 6  # three districts were evaluated
    assert done.stdout.count('NUM:(,,"Volume")') == 4
    assert done.stdout.count("NOT EVALUATED") == 1


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.__name__.strip("_"))
def test_the_validator_finds_nothing(variant, tmp_path: Path) -> None:
    ct = write_sample_ct(tmp_path / "ct", variant)
    sample = Sample(source=source_of(ct), suv=sample_suv())
    for encoding, with_seg in (("sc", False), ("pet", True)):
        folder, seg = tmp_path / encoding, seg_of(sample, encoding=encoding)
        given = seg if with_seg else None
        (report,) = write_series(report_of(sample, encoding=encoding, seg=given), folder / "sr")
        assert complaints(report) == []
        beside = write_series(sample.pet(encoding), folder / "pet") + write_series(seg, folder / "seg")
        done = subprocess.run(
            [tool("dcentvfy"), *map(str, (*ct, *beside, report))], capture_output=True, text=True, timeout=60
        )
        assert [line for line in (done.stdout + done.stderr).splitlines() if ACCESSION not in line] == []


def test_a_ct_without_any_attribute_costs_only_what_a_dicomdir_would_need(tmp_path: Path) -> None:
    (path,) = write_series(report_of(Sample(source=header_only(), suv=sample_suv())), tmp_path / "sr")
    assert [line for line in complaints(path) if not line.endswith("needed to build DICOMDIR")] == []
