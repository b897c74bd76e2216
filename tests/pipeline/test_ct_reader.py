"""Reading a CT series: what is handled, and that it is handled right."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from ct_factory import write_ct
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

from pipeline.ct_reader import choose_ct, find_series, read_ct
from pipeline.errors import UnsupportedSeries
from pipeline.gate.input import check_input
from pipeline.types import GateOptions, Stage

SHAPE = (6, 16, 20)


def some_hu(shape=SHAPE, seed=0):
    return np.random.default_rng(seed).integers(-1000, 2000, shape).astype(np.int16)


def test_a_series_in_any_file_order_becomes_the_volume_from_foot_to_head(tmp_path):
    hu = some_hu()
    paths = write_ct(tmp_path, hu, spacing_mm=(3, 2, 1.5), origin_mm=(-7, -9, -100))
    random.Random(1).shuffle(paths)
    ct = read_ct(paths)
    assert np.array_equal(ct.hu, hu)
    assert ct.grid.spacing_mm == (3.0, 2.0, 1.5)
    assert ct.grid.origin_mm == (-7.0, -9.0, -100.0)
    assert ct.source.notes == ()
    assert [i.position_mm[2] for i in ct.source.instances] == [-100, -97, -94, -91, -88, -85]
    assert ct.source.instances[0].position_mm[:2] == (-7 + 19 * 1.5 / 2, -9 + 15.0)


def test_positions_decide_where_instance_numbers_lie(tmp_path):
    def lie(ds, k):
        ds.InstanceNumber = 1 + (k * 5) % 6

    hu = some_hu()
    assert np.array_equal(read_ct(write_ct(tmp_path, hu, modify=lie)).hu, hu)


@pytest.mark.parametrize(
    "syntax",
    [
        ImplicitVRLittleEndian,
        ExplicitVRLittleEndian,
        ExplicitVRBigEndian,
        DeflatedExplicitVRLittleEndian,
        RLELossless,
        JPEGLSLossless,
        JPEG2000Lossless,
    ],
    ids=lambda s: s.name,
)
@pytest.mark.parametrize("intercept", [-1024, 0], ids=["unsigned", "signed"])
def test_every_encoding_gives_the_same_volume(tmp_path, syntax, intercept):
    hu = some_hu((3, 48, 40))  # openjpeg's encoder needs 32 pixels
    ct = read_ct(write_ct(tmp_path, hu, transfer_syntax=syntax, intercept=intercept))
    assert np.array_equal(ct.hu, hu)
    assert not ct.source.lossy


def test_rescale_is_taken_from_each_slice(tmp_path):
    def own_rescale(ds, k):
        ds.RescaleSlope, ds.RescaleIntercept = str(1 + k % 2), str(-1000 - 10 * k)

    hu = np.full(SHAPE, 100, np.int16)  # stored 1124
    ct = read_ct(write_ct(tmp_path, hu, modify=own_rescale))
    assert ct.hu[:, 0, 0].tolist() == [124, 1238, 104, 1218, 84, 1198]


def test_values_below_air_and_padding_are_air(tmp_path):
    def pad(ds, k):
        ds.add_new("PixelPaddingValue", "SS", 1234)

    hu = some_hu() % 1000
    hu[:, 0, :] = 1234
    hu[:, 1, :] = -3000
    ct = read_ct(write_ct(tmp_path, hu, intercept=0, modify=pad))
    assert np.all(ct.hu[:, :2] == -1024)
    assert np.array_equal(ct.hu[:, 2:], hu[:, 2:])


@pytest.mark.parametrize("limits", [(1200, 1300), (1300, 1200)])
def test_a_padding_range_is_air_from_end_to_end(tmp_path, limits):
    def pad(ds, k):
        ds.add_new("PixelPaddingValue", "SS", limits[0])
        ds.add_new("PixelPaddingRangeLimit", "SS", limits[1])

    hu = some_hu() % 1000
    hu[:, 0, :4] = 1200, 1250, 1300, 1301
    ct = read_ct(write_ct(tmp_path, hu, intercept=0, modify=pad))
    assert ct.hu[0, 0, :4].tolist() == [-1024, -1024, -1024, 1301]


def test_padding_written_as_unsigned_in_a_signed_series_is_still_padding(tmp_path):
    def pad(ds, k):
        ds.add_new("PixelPaddingValue", "US", 63536)  # -2000 as 16 bits

    hu = some_hu()
    hu[:, :3] = -2000
    ct = read_ct(write_ct(tmp_path, hu, intercept=24, modify=pad))
    assert np.all(ct.hu[:, :3] == -1024)


@pytest.mark.parametrize("signed", [0, 1])
def test_bits_above_the_stored_ones_are_no_part_of_the_value(tmp_path, signed):
    def overlay(ds, k):
        words = np.frombuffer(ds.PixelData, "<u2").copy()
        if signed:
            words = ((words.astype(np.int32) - 1024) & 0x0FFF).astype("<u2")
            ds.PixelRepresentation, ds.RescaleIntercept = 1, "0"
        words[::3] |= 0xF000
        ds.PixelData = words.tobytes()
        ds.BitsStored, ds.HighBit = 12, 11

    hu = some_hu()
    assert np.array_equal(read_ct(write_ct(tmp_path, hu, modify=overlay)).hu, hu)


def test_a_high_bit_of_15_with_12_stored_bits_is_shifted_down(tmp_path):
    def shift(ds, k):
        ds.PixelData = (np.frombuffer(ds.PixelData, "<u2") << 4).astype("<u2").tobytes()
        ds.BitsStored, ds.HighBit = 12, 15

    hu = some_hu()
    assert np.array_equal(read_ct(write_ct(tmp_path, hu, modify=shift)).hu, hu)


# Each case: direction cosines, and how the stored [slice, row, column] array looks as [z, y, x].
ALIGNED = {
    "supine": ((1, 0, 0, 0, 1, 0), lambda a: a),
    "prone": ((-1, 0, 0, 0, -1, 0), lambda a: a[:, ::-1, ::-1]),
    "downward normal": ((-1, 0, 0, 0, 1, 0), lambda a: a[::-1, :, ::-1]),
    "decubitus": ((0, 1, 0, -1, 0, 0), lambda a: a.transpose(0, 2, 1)[:, :, ::-1]),
    "coronal": ((1, 0, 0, 0, 0, -1), lambda a: a.transpose(1, 0, 2)[::-1]),
    "sagittal": ((0, 1, 0, 0, 0, -1), lambda a: a.transpose(1, 2, 0)[::-1, :, ::-1]),
}


@pytest.mark.parametrize("case", ALIGNED)
def test_aligned_planes_are_turned_into_lps_without_resampling(tmp_path, case):
    orientation, turned = ALIGNED[case]
    hu = some_hu()
    paths = write_ct(tmp_path, hu, spacing_mm=(3, 2, 1.5), origin_mm=(11, 22, 33), orientation=orientation)
    ct = read_ct(paths)
    assert np.array_equal(ct.hu, turned(hu))
    assert ct.source.notes == ()
    assert_same_points_as_simpleitk(ct, paths)


def assert_same_points_as_simpleitk(ct, paths):
    """Every voxel has the value that SimpleITK has at the same LPS position."""
    image = sitk.DICOMOrient(sitk.ReadImage([str(p) for p in paths]), "LPS")
    assert np.allclose(image.GetDirection(), np.eye(3).ravel())
    assert np.allclose(image.GetOrigin(), ct.grid.origin_mm, atol=1e-4)
    assert np.allclose(image.GetSpacing()[::-1], ct.grid.spacing_mm, atol=1e-4)
    assert np.array_equal(sitk.GetArrayFromImage(image), ct.hu)


def blob(points):
    """A smooth Hounsfield function of LPS points [..., 3] in mm: tissue around (5, -3, 10)."""
    distance = np.linalg.norm((points - np.array([5.0, -3.0, 10.0])) / np.array([30.0, 22.0, 26.0]), axis=-1)
    return 1000 * np.exp(-(distance**2)) - 1000


def write_sampled(folder, row, column, step, *, sizes=(40, 36, 30), spacing=(3.0, 3.0)):
    """A series whose planes sample `blob`; `step` (mm) leads from slice to slice, at right angles or not."""
    columns, rows, slices = sizes
    row, column, step = (np.asarray(v, float) for v in (row, column, step))
    middle = row * spacing[1] * (columns - 1) / 2 + column * spacing[0] * (rows - 1) / 2 + step * (slices - 1) / 2
    origin = np.array([5.0, -3.0, 10.0]) - middle
    k, j, i = np.meshgrid(range(slices), range(rows), range(columns), indexing="ij")
    points = origin + i[..., None] * row * spacing[1] + j[..., None] * column * spacing[0] + k[..., None] * step

    def place(ds, index):
        ds.ImagePositionPatient = [f"{v:.6f}" for v in origin + index * step]

    return write_ct(
        folder,
        blob(points),
        spacing_mm=(float(np.linalg.norm(step)), *spacing),
        orientation=tuple(np.round([*row, *column], 8)),
        modify=place,
    )


def rotation(axis, degrees):
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    x, y, z = np.asarray(axis, float) / np.linalg.norm(axis)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + s * cross + (1 - c) * cross @ cross


def assert_samples_blob(ct, *, tolerance):
    z, y, x = np.meshgrid(*[np.arange(n) for n in ct.grid.shape], indexing="ij")
    points = (np.stack([z, y, x, np.ones_like(z)], axis=-1) @ ct.grid.affine.T)[..., :3]
    inside = ct.hu > -1000
    assert inside.mean() > 0.3
    near = np.linalg.norm(points - np.array([5.0, -3.0, 10.0]), axis=-1) < 30
    assert np.all(inside[near])
    assert np.abs(ct.hu - blob(points))[near].max() < tolerance


@pytest.mark.parametrize("degrees", [-20.0, 12.0])
def test_a_tilted_gantry_is_resampled_to_where_the_anatomy_is(tmp_path, degrees):
    column = rotation((1, 0, 0), degrees) @ [0, 1, 0]
    ct = read_ct(write_sampled(tmp_path, (1, 0, 0), column, (0, 0, 3.0)))
    assert ct.source.notes == (f"gantry tilt of {abs(degrees):.1f} degrees resampled",)
    assert ct.grid.spacing_mm == pytest.approx((3.0, 3.0, 3.0))
    assert_samples_blob(ct, tolerance=12)


def test_oblique_planes_are_resampled_to_where_the_anatomy_is(tmp_path):
    turn = rotation((1, 2, 0.5), 17)
    ct = read_ct(write_sampled(tmp_path, turn @ [1, 0, 0], turn @ [0, 1, 0], turn @ [0, 0, 3.0]))
    assert ct.source.notes[0].startswith("oblique planes (")
    assert_samples_blob(ct, tolerance=15)


def test_what_no_plane_saw_is_air_after_resampling(tmp_path):
    turn = rotation((1, 0, 0), 30)
    ct = read_ct(write_sampled(tmp_path, turn @ [1, 0, 0], turn @ [0, 1, 0], turn @ [0, 0, 3.0]))
    corners = ct.hu[:: ct.hu.shape[0] - 1, :: ct.hu.shape[1] - 1]
    assert np.all(corners == -1024)


def test_a_misalignment_below_half_a_voxel_is_not_resampled(tmp_path):
    hu = some_hu()
    ct = read_ct(write_ct(tmp_path, hu, orientation=(0.9999999, 0.0004, 0, -0.0004, 0.9999999, 0)))
    assert np.array_equal(ct.hu, hu)


def test_identical_duplicates_are_dropped_with_a_note(tmp_path):
    hu = some_hu()
    paths = write_ct(tmp_path, hu, series_uid="1.2.3")
    copy = pydicom.dcmread(paths[2])
    copy.SOPInstanceUID = copy.file_meta.MediaStorageSOPInstanceUID = "1.2.3.99"
    copy.save_as(tmp_path / "again.dcm")
    ct = read_ct([tmp_path / "again.dcm", *paths, paths[4]])
    assert np.array_equal(ct.hu, hu)
    assert ct.source.notes == ("2 duplicate images with identical pixels dropped",)
    assert len(ct.source.instances) == 6


def test_small_jitter_of_the_positions_is_evened_out_with_a_note(tmp_path):
    def jitter(ds, k):
        ds.ImagePositionPatient = [0, 0, round(3 * k + (0.1 if k == 2 else 0), 3)]

    ct = read_ct(write_ct(tmp_path, some_hu(), modify=jitter))
    assert ct.source.notes == ("slice positions jitter by up to 0.100 mm: taken as regular",)
    assert ct.grid.spacing_mm[0] == 3.0


def test_localizers_among_the_slices_are_dropped_with_a_note(tmp_path):
    def first_is_localizer(ds, k):
        if k == 0:
            ds.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
            del ds.ImagePositionPatient

    hu = some_hu()
    ct = read_ct(write_ct(tmp_path, hu, modify=first_is_localizer))
    assert np.array_equal(ct.hu, hu[1:])
    assert ct.source.notes == ("1 localizer images dropped",)


@pytest.mark.parametrize(
    "keyword", ["FrameOfReferenceUID", "StudyInstanceUID", "SeriesInstanceUID"], ids=["frame", "study", "series"]
)
def test_a_uid_that_no_file_has_is_derived_and_stays_the_same(tmp_path, keyword):
    def blank(ds, k):
        setattr(ds, keyword, "")

    paths = write_ct(tmp_path, some_hu(), series_uid="1.2.3", modify=blank)
    first, again = read_ct(paths), read_ct(paths[::-1])
    derived = getattr(first.source.header, keyword)
    assert derived.startswith("2.25.")
    assert len(derived) <= 64
    assert derived in first.source.notes[0]
    assert derived == getattr(again.source.header, keyword)
    assert first.grid.frame_of_reference_uid == first.source.header.FrameOfReferenceUID
    assert (first.source.study_uid, first.source.series_uid) == (
        first.source.header.StudyInstanceUID,
        first.source.header.SeriesInstanceUID,
    )


def test_the_header_is_the_lowest_slices_without_pixels_and_private_elements(tmp_path):
    def private(ds, k):
        block = ds.private_block(0x0029, "ACME", create=True)
        block.add_new(0x10, "UN", b"\xff" * 7 if k % 2 else b"\x00\x01")
        ds.PatientComments = f"slice {k}"

    ct = read_ct(write_ct(tmp_path, some_hu(), patient_name="山田^太郎", modify=private))
    header = ct.source.header
    assert header.PatientComments == "slice 0"
    assert header.PatientName == "山田^太郎"
    assert "PixelData" not in header
    assert not any(e.tag.is_private for e in header)


@pytest.mark.parametrize(
    "broken", [b"\x18\x00\x50\x11FD\x04\x000770", b"\x18\x00\x50\x11IS\x04\x00a\\bc"], ids=["length", "text"]
)
def test_a_header_element_that_cannot_be_read_is_left_out_with_a_note(tmp_path, broken):
    def exposure(ds, k):
        ds.add_new("ExposureTime", "IS", "0770")
        ds.add_new("Exposure", "IS", "0012")

    paths = write_ct(tmp_path, some_hu(), modify=exposure)
    sound = b"\x18\x00\x50\x11IS\x04\x000770"
    assert sound in paths[0].read_bytes()
    paths[0].write_bytes(paths[0].read_bytes().replace(sound, broken))
    ct = read_ct(paths)
    assert "ExposureTime" not in ct.source.header
    assert ct.source.header.Exposure == 12
    assert ct.source.notes == ("header elements that cannot be read left out: (0018,1150)",)


def test_the_earliest_acquisition_of_all_slices_counts(tmp_path):
    def times(ds, k):
        ds.AcquisitionTime = ["101530.5", "101529", "101531", "1016", "1017", "1018"][k]

    assert read_ct(write_ct(tmp_path, some_hu(), modify=times)).source.earliest_acquisition == ("20240102", "101529")


MOMENTS = {
    "date-time": ({"AcquisitionDateTime": "20230405060708.9+0200"}, ("20230405", "060708.9")),
    "series": ({"AcquisitionDate": "", "AcquisitionTime": ""}, ("20240102", "102000")),
    "study": ({"AcquisitionDate": "", "SeriesDate": ""}, ("20240102", "101500")),
    "broken": ({"AcquisitionDate": "yesterday", "SeriesTime": "noon"}, ("20240102", "101500")),
    "none": ({"AcquisitionDate": "", "SeriesDate": "", "StudyDate": ""}, ("", "")),
}


@pytest.mark.parametrize("case", MOMENTS)
@pytest.mark.filterwarnings("ignore:Invalid value for VR")
def test_the_acquisition_time_falls_back_to_series_and_study(tmp_path, case):
    changes, expected = MOMENTS[case]

    def change(ds, k):
        for keyword, value in changes.items():
            setattr(ds, keyword, value)

    assert read_ct(write_ct(tmp_path, some_hu(), modify=change)).source.earliest_acquisition == expected


def test_lossy_compression_in_the_past_is_remembered(tmp_path):
    def lossy(ds, k):
        ds.LossyImageCompression = "01" if k == 3 else "00"

    assert read_ct(write_ct(tmp_path, some_hu(), modify=lossy)).source.lossy


def test_progress_goes_over_every_file_twice_and_an_exception_in_it_ends_the_reading(tmp_path):
    paths = write_ct(tmp_path, some_hu())
    seen = []
    read_ct(paths, on_progress=seen.append)
    assert [p.done for p in seen] == list(range(1, 13))
    assert {(p.stage, p.total) for p in seen} == {(Stage.READ, 12)}

    class Cancelled(Exception):
        pass

    def cancel(progress):
        if progress.done == 8:
            raise Cancelled

    with pytest.raises(Cancelled):
        read_ct(paths, on_progress=cancel)


def test_bytes_after_the_pixel_data_do_no_harm(tmp_path):
    def trail(ds, k):
        ds.add_new(0xFFFCFFFC, "OB", b"\0" * 64)  # Data Set Trailing Padding

    hu = some_hu()
    assert np.array_equal(read_ct(write_ct(tmp_path, hu, modify=trail)).hu, hu)


# --- folders -------------------------------------------------------------------------------------------------------


def test_series_are_found_in_nested_folders_among_other_files(tmp_path):
    one = write_ct(tmp_path / "a" / "b", some_hu(), series_uid="1.2.3")
    two = write_ct(tmp_path / "c", some_hu(), series_uid="1.2.4")
    (tmp_path / "notes.txt").write_text("not DICOM")
    (tmp_path / "a" / "empty.dcm").touch()
    assert find_series(tmp_path) == {"1.2.3": one, "1.2.4": two}


def test_the_ct_with_most_coverage_is_chosen_and_never_a_localizer_or_another_modality(tmp_path):
    def mr(ds, k):
        ds.Modality = "MR"

    localizer = ("ORIGINAL", "PRIMARY", "LOCALIZER")
    write_ct(tmp_path / "short", some_hu((9, 8, 8)), spacing_mm=(1, 1, 1))
    long = write_ct(tmp_path / "long", some_hu((9, 8, 8)), spacing_mm=(5, 1, 1))
    write_ct(tmp_path / "scout", some_hu((9, 8, 8)), spacing_mm=(50, 1, 1), image_type=localizer)
    write_ct(tmp_path / "mr", some_hu((9, 8, 8)), spacing_mm=(60, 1, 1), modify=mr)
    assert choose_ct(tmp_path) == long


def test_of_two_reconstructions_of_one_scan_the_finer_is_chosen(tmp_path):
    write_ct(tmp_path / "thick", some_hu((5, 8, 8)), spacing_mm=(4, 1, 1))
    thin = write_ct(tmp_path / "thin", some_hu((9, 8, 8)), spacing_mm=(2, 1, 1))
    assert choose_ct(tmp_path) == thin


def test_a_lone_faulty_ct_series_is_returned_so_that_reading_names_the_fault(tmp_path):
    paths = write_ct(tmp_path, some_hu(), modify=lambda ds, k: ds.__delattr__("PixelSpacing"))
    assert choose_ct(tmp_path) == paths
    with pytest.raises(UnsupportedSeries, match="missing_attribute"):
        read_ct(paths)


@pytest.mark.parametrize(
    ("write", "code"),
    [
        (lambda folder: (folder / "a.txt").write_text("hello"), "not_dicom"),
        (lambda folder: write_ct(folder, some_hu(), image_type=("ORIGINAL", "PRIMARY", "LOCALIZER")), "localizer"),
        (lambda folder: write_ct(folder, some_hu(), modify=lambda ds, k: setattr(ds, "Modality", "MR")), "not_ct"),
    ],
)
def test_a_folder_without_a_ct_says_why(tmp_path, write, code):
    write(tmp_path)
    with pytest.raises(UnsupportedSeries) as refused:
        choose_ct(tmp_path)
    assert refused.value.code == code


# --- the real series -----------------------------------------------------------------------------------------------

REAL: dict[str, tuple[tuple[int, ...], tuple[float, ...], int, list[str]]] = {
    "ct-chest": ((102, 512, 512), (3.0, 0.8828125, 0.8828125), 0, []),
    "ct-abdomen-feet-first": ((160, 512, 512), (3.0, 1.03, 1.03), 0, []),
    "ct-arms-jpeg2000": (  # its UIDs and its patient's age were blanked; the circle of the field cuts both arms
        (20, 512, 512),
        (2.0, 0.9765625, 0.9765625),
        2,
        ["age_unknown", "field_of_view_cut"],
    ),
}


@pytest.mark.realdata
@pytest.mark.parametrize("folder", REAL)
def test_a_real_series_reads_as_simpleitk_reads_it_and_passes_the_gate(real_data: Path, folder):
    shape, spacing, notes, codes = REAL[folder]
    ct = read_ct(choose_ct(real_data / folder))
    assert ct.grid.shape == shape
    assert ct.grid.spacing_mm == pytest.approx(spacing)
    assert len(ct.source.notes) == notes
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(real_data / folder)))
    image = sitk.DICOMOrient(reader.Execute(), "LPS")
    assert np.allclose(image.GetOrigin(), ct.grid.origin_mm, atol=0.01)
    assert np.allclose(image.GetSpacing()[::-1], ct.grid.spacing_mm, atol=0.001)
    expected = np.maximum(sitk.GetArrayFromImage(image).astype(np.float32), -1024)
    assert np.abs(ct.hu - expected).max() <= 0.5
    assert [one.code for one in check_input(ct, GateOptions(min_coverage_mm=40))] == codes
