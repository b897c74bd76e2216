"""Headers and series geometry."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from ct_factory import write_ct
from intake_tools import small_ct
from pydicom import Dataset, dcmread
from pydicom.sequence import Sequence
from pydicom.uid import CTImageStorage, DeflatedExplicitVRLittleEndian, EnhancedCTImageStorage

from dicom_node.headers import BadInstance, InstanceHeader, geometry_of, read_header
from pipeline.codestream import MAX_INFLATED_BYTES

PREFIX = b"\0" * 128 + b"DICM"


def at(*z_mm: float, orientation: tuple[float, ...] = (1, 0, 0, 0, 1, 0)) -> list[InstanceHeader]:
    uids = {"study_uid": "1.1", "series_uid": "1.2", "sop_class_uid": CTImageStorage}
    return [
        InstanceHeader(sop_instance_uid=f"1.3.{k}", positions=((1.0, 2.0, z),), orientation=orientation, **uids)
        for k, z in enumerate(z_mm)
    ]


def test_a_header_is_read_without_pixels_and_without_the_name(tmp_path: Path) -> None:
    (path, *_) = small_ct(tmp_path, accession="A1", patient_name="GEHEIM^NAME")
    header = read_header(path)
    ds = dcmread(path)
    assert (header.study_uid, header.series_uid) == (ds.StudyInstanceUID, ds.SeriesInstanceUID)
    assert header.image_type == ("ORIGINAL", "PRIMARY", "AXIAL")
    assert (header.accession, header.patient_id, header.kernel) == ("A1", "PH-1", "B40f")
    assert header.positions == (tuple(ds.ImagePositionPatient),)
    assert "GEHEIM" not in repr(header)


@pytest.mark.parametrize(
    ("charset", "text"),
    [
        ("ISO_IR 100", "Müller Körper"),
        ("ISO_IR 192", "山田 Тест"),
        ("ISO_IR 144", "Тест"),
        (["", "ISO 2022 IR 87"], "体幹"),
    ],
)
def test_text_is_read_in_its_character_set(tmp_path: Path, charset: str | list[str], text: str) -> None:
    def change(ds: Dataset, _k: int) -> None:
        ds.SpecificCharacterSet = charset
        ds.PatientName = "X"
        ds.SeriesDescription = text

    (path, *_) = small_ct(tmp_path, modify=change)
    assert read_header(path).series_description == text


def test_invalid_values_cause_no_warning_that_would_show_them(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")

        def change(ds: Dataset, _k: int) -> None:
            ds.StudyDate = "yesterday <script>"
            ds.AccessionNumber = "x" * 40
            ds.SliceThickness = "1"
            ds["SliceThickness"]._value = "thick"

        (path, *_) = small_ct(tmp_path, modify=change)
    header = read_header(path)  # warnings are errors here
    assert header.thickness_mm == 0.0
    assert header.study_date == "yesterday <script>"


def uid_fault(keyword: str, value: str | None) -> Callable[[Dataset, int], None]:
    def change(ds: Dataset, _k: int) -> None:
        if value is None:
            delattr(ds, keyword)
        else:
            ds.add_new(keyword, "UT", value)  # not validated, and 16-bit safe in implicit VR

    return change


@pytest.mark.parametrize(
    ("keyword", "value", "code"),
    [
        ("StudyInstanceUID", None, "missing_uid"),
        ("SeriesInstanceUID", None, "missing_uid"),
        ("SeriesInstanceUID", "../../x", "bad_uid"),
        ("SeriesInstanceUID", "1." + "2" * 64, "bad_uid"),
        ("StudyInstanceUID", "1.2\n3", "bad_uid"),
    ],
)
def test_a_missing_or_hostile_uid_has_a_code_and_one_line(
    tmp_path: Path, keyword: str, value: str | None, code: str
) -> None:
    (path, *_) = small_ct(tmp_path, transfer_syntax="1.2.840.10008.1.2", modify=uid_fault(keyword, value))
    with pytest.raises(BadInstance) as caught:
        read_header(path)
    assert caught.value.code == code
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"hello", PREFIX, PREFIX + bytes(range(256)) * 9])
def test_what_is_not_dicom_has_a_code(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "1.2.dcm"
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(BadInstance) as caught:
            read_header(path)
    assert caught.value.code in {"not_dicom", "missing_uid"}


def test_even_slices_have_no_gap() -> None:
    geometry = geometry_of(at(10, 5, 0, 15))
    assert geometry.z_mm == (0, 5, 10, 15)
    assert (geometry.spacing_mm, geometry.coverage_mm, geometry.gaps_mm) == (5, 20, ())


def test_a_missing_slice_is_a_gap() -> None:
    assert geometry_of(at(0, 5, 10, 20, 25, 30)).gaps_mm == ((10, 20),)


def test_jitter_and_duplicate_positions_are_no_gap() -> None:
    assert geometry_of(at(0, 5.4, 10, 14.6, 20, 20, 25)).gaps_mm == ()
    assert len(geometry_of(at(0, 0, 5, 5, 10, 10)).z_mm) == 3


def test_mixed_spacing_is_left_to_the_reader() -> None:
    assert geometry_of(at(0, 1, 2, 3, 4, 5, 10, 15, 20, 25)).gaps_mm == ()


def test_feet_first_and_reversed_normals_give_the_same_coverage() -> None:
    assert geometry_of(at(0, 5, 10, orientation=(-1, 0, 0, 0, 1, 0))).coverage_mm == 15


def test_a_coronal_series_is_measured_along_its_own_normal() -> None:
    geometry = geometry_of(at(0, 5, orientation=(1, 0, 0, 0, 0, -1)))
    assert geometry.normal == (0, 1, 0)
    assert len(geometry.z_mm) == 1


def test_without_positions_there_is_no_geometry() -> None:
    bare = [InstanceHeader(study_uid="1", series_uid="1", sop_instance_uid="1", sop_class_uid="1")]
    geometry = geometry_of(bare)
    assert geometry.normal is None
    assert geometry.instances_without_place == 1
    assert geometry_of(at(0, 5, orientation=(0, 0, 0, 0, 0, 0))).normal == (0, 0, 1)


def test_the_frames_of_an_enhanced_ct_are_its_slices(tmp_path: Path) -> None:
    (path, *_) = small_ct(tmp_path)
    ds = dcmread(path)
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = EnhancedCTImageStorage
    shared, plane = Dataset(), Dataset()
    plane.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    shared.PlaneOrientationSequence = Sequence([plane])
    ds.SharedFunctionalGroupsSequence = Sequence([shared])
    frames = []
    for z in (0, 5, 10):
        frame, place = Dataset(), Dataset()
        place.ImagePositionPatient = [0, 0, z]
        frame.PlanePositionSequence = Sequence([place])
        frames.append(frame)
    ds.PerFrameFunctionalGroupsSequence = Sequence(frames)
    ds.save_as(path)
    geometry = geometry_of([read_header(path)])
    assert (geometry.z_mm, geometry.coverage_mm) == ((0, 5, 10), 15)


@pytest.mark.realdata
@pytest.mark.parametrize(("name", "slices"), [("ct-chest", 102), ("ct-abdomen-feet-first", 160)])
def test_real_series_are_whole(real_data: Path, name: str, slices: int) -> None:
    headers = []
    for path in sorted((real_data / name).rglob("*")):
        with suppress(BadInstance, IsADirectoryError):  # the license text is no DICOM file
            headers.append(read_header(path))
    geometry = geometry_of(headers)
    assert (len(geometry.z_mm), geometry.gaps_mm) == (slices, ())
    assert geometry.spacing_mm == pytest.approx(3.0, abs=0.01)


def test_a_data_set_cut_inside_a_sequence_is_not_dicom_and_not_a_disk_error(tmp_path: Path) -> None:
    (path,) = write_ct(tmp_path, np.zeros((1, 8, 8), np.int16), modify=_with_open_sequence)
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"1.2.3.4.5.6.7") + 13])
    with pytest.raises(BadInstance) as caught:
        read_header(path)
    assert caught.value.code == "not_dicom"


def _with_open_sequence(ds: Dataset, _: int) -> None:
    item = Dataset()
    item.ReferencedSOPInstanceUID = "1.2.3.4.5.6.7"
    item.is_undefined_length_sequence_item = True
    ds.ReferencedImageSequence = [item]
    ds["ReferencedImageSequence"].is_undefined_length = True


def test_a_deflated_bomb_is_refused_before_it_fills_the_memory(tmp_path: Path) -> None:
    (path,) = write_ct(
        tmp_path, np.zeros((1, 8, 8), np.int16), transfer_syntax=DeflatedExplicitVRLittleEndian, modify=_with_zeros
    )
    assert path.stat().st_size < 1 << 20
    with pytest.raises(BadInstance) as caught:
        read_header(path)
    assert caught.value.code == "too_large"


def _with_zeros(ds: Dataset, _: int) -> None:
    ds.add_new(0x00420011, "OB", bytes(MAX_INFLATED_BYTES + 2))


@pytest.mark.parametrize("value", [["0", "0", "1.7e308"], ["1e6", "0", "0"]])
def test_a_position_outside_every_scanner_is_no_position(tmp_path: Path, value: list[str]) -> None:
    def far(ds: Dataset, _: int) -> None:
        ds.ImagePositionPatient = value

    (path,) = write_ct(tmp_path, np.zeros((1, 8, 8), np.int16), modify=far)
    assert read_header(path).positions == ()
