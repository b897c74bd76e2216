"""Reading a CT series: what is refused, by which code, and that the sentence helps."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import pytest
from ct_factory import write_ct
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    EncapsulatedPDFStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
    SecondaryCaptureImageStorage,
)

from pipeline.ct_reader import read_ct
from pipeline.errors import UnsupportedSeries

SHAPE = (8, 16, 20)
NAME = "GEHEIM^NAME"


def some_hu(shape=SHAPE):
    return np.random.default_rng(3).integers(-1000, 2000, shape).astype(np.int16)


def refusal(paths, **options):
    """The error of reading `paths`; its sentence never names the patient."""
    with pytest.raises(UnsupportedSeries) as refused:
        read_ct(paths, **options)
    assert "GEHEIM" not in str(refused.value)
    assert "\n" not in refused.value.text
    return refused.value


def series(folder, modify=None, **options):
    return write_ct(folder, some_hu(), patient_name=NAME, patient_id=NAME, modify=modify, **options)


def put(**values):
    """Set these keywords in every slice."""

    def change(ds, k):
        for keyword, value in values.items():
            setattr(ds, keyword, value)

    return change


def put_in(slice_number, **values):
    """Set these keywords in one slice."""

    def change(ds, k):
        if k == slice_number:
            put(**values)(ds, k)

    return change


def drop(*keywords):
    def change(ds, k):
        for keyword in keywords:
            delattr(ds, keyword)

    return change


def place(*heights):
    def change(ds, k):
        ds.ImagePositionPatient = [0, 0, heights[k]]

    return change


CASES = {
    "another modality": (put(Modality="MR"), "not_ct", "is no CT image"),
    "a photograph": (put(SOPClassUID=SecondaryCaptureImageStorage), "not_ct", "Secondary Capture"),
    "a report": (put(SOPClassUID=EncapsulatedPDFStorage), "not_ct", "PDF"),
    "localizer": (put(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), "localizer", "all 8 images"),
    "no position": (drop("ImagePositionPatient"), "missing_attribute", "ImagePositionPatient of 3"),
    "no orientation": (drop("ImageOrientationPatient"), "missing_attribute", "ImageOrientationPatient of 6"),
    "no pixel spacing": (drop("PixelSpacing"), "missing_attribute", "PixelSpacing of 2"),
    "no slope": (drop("RescaleSlope"), "missing_attribute", "RescaleSlope"),
    "no intercept": (drop("RescaleIntercept"), "missing_attribute", "RescaleIntercept"),
    "empty intercept": (put(RescaleIntercept=None), "missing_attribute", "RescaleIntercept"),
    "no rows": (drop("Rows"), "missing_attribute", "Rows"),
    "two coordinates": (put(ImagePositionPatient=[0, 0]), "missing_attribute", "ImagePositionPatient of 3"),
    "slope of zero": (put(RescaleSlope="0"), "unsupported_pixel_format", "RescaleSlope of 0"),
    "effective atomic numbers": (put(RescaleType="Z_EFF"), "unsupported_pixel_format", "RescaleType"),
    "pixel spacing of zero": (put(PixelSpacing=[0, 0]), "unsupported_geometry", "no scanner"),
    "far away": (put_in(2, ImagePositionPatient=[0, 0, 1e9]), "unsupported_geometry", "no scanner"),
    "8 bits": (put(BitsAllocated=8, BitsStored=8, HighBit=7), "unsupported_pixel_format", "8 bits allocated"),
    "32 bits": (put(BitsAllocated=32, BitsStored=32, HighBit=31), "unsupported_pixel_format", "32 bits allocated"),
    "8 of 16 bits": (put(BitsStored=8, HighBit=7), "unsupported_pixel_format", "8 bits stored"),
    "13 bits up to bit 11": (put(BitsStored=13, HighBit=11), "unsupported_pixel_format", "high bit 11"),
    "color": (put(SamplesPerPixel=3, PhotometricInterpretation="RGB"), "unsupported_pixel_format", "3 samples"),
    "inverted": (put(PhotometricInterpretation="MONOCHROME1"), "unsupported_pixel_format", "MONOCHROME2"),
    "frames in a classic CT": (put(NumberOfFrames=2), "unsupported_pixel_format", "2 frames"),
    "no pixel data": (drop("PixelData"), "no_pixel_data", "has no pixel data"),
    "empty pixel data": (put(PixelData=b""), "no_pixel_data", "has no pixel data"),
    "half the pixel data": (put(PixelData=b"\0" * 320), "truncated_pixel_data", "640 are expected"),
    "two series": (put_in(3, SeriesInstanceUID="1.2.9"), "mixed_series", "2 Series Instance UIDs"),
    "a series UID missing in one": (put_in(3, SeriesInstanceUID=""), "mixed_series", "2 Series Instance UIDs"),
    "two studies": (put_in(3, StudyInstanceUID="1.2.9"), "mixed_series", "2 Study Instance UIDs"),
    "two frames of reference": (put_in(0, FrameOfReferenceUID="1.2.9"), "mixed_frame_of_reference", "2 Frame"),
    "one without frame of reference": (put_in(0, FrameOfReferenceUID=""), "mixed_frame_of_reference", "2 Frame"),
    "two pixel spacings": (put_in(4, PixelSpacing=[2, 2.1]), "mixed_spacing", "mixes pixel spacings"),
    "two orientations": (put_in(4, ImageOrientationPatient=[0, 1, 0, -1, 0, 0]), "mixed_orientation", "several"),
    "not at right angles": (
        put(ImageOrientationPatient=[1, 0, 0, 0.7, 0.7, 0]),
        "unsupported_geometry",
        "right angles",
    ),
    "not of unit length": (put(ImageOrientationPatient=[2, 0, 0, 0, 1, 0]), "unsupported_geometry", "unit vectors"),
    "a slice missing": (place(0, 3, 6, 12, 15, 18, 21, 24), "missing_slices", "1 slices are missing, first between"),
    "three slices missing": (place(0, 3, 6, 18, 21, 24, 27, 30), "missing_slices", "(0.0, 0.0, 6.0) mm and (0.0, 0.0"),
    "two slice spacings": (place(0, 3, 6, 9, 14, 19, 24, 29), "mixed_spacing", "steps from 3.000 to 5.000 mm"),
    "creeping spacing": (place(0, 3, 6, 9, 12.2, 15.4, 18.6, 21.8), "mixed_spacing", "one spacing is expected"),
    "different images at one position": (place(0, 3, 6, 6, 9, 12, 15, 18), "duplicate_positions", "2 different images"),
    "all at one position": (place(*[5] * 8), "duplicate_positions", "8 different images"),
    "shared SOP Instance UID": (put(SOPInstanceUID="1.2.3.4"), "mixed_series", "share one SOP Instance UID"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_series_is_refused_by_name(tmp_path, case):
    modify, code, words = CASES[case]
    error = refusal(series(tmp_path, modify))
    assert (error.code, words in error.text) == (code, True), error.text


@pytest.mark.filterwarnings("ignore:Invalid value for VR", "ignore:The value length")
@pytest.mark.parametrize("uid", ["../../etc/passwd", "1." * 32 + "1", "1.2\n3", "1..2", "abc"])
@pytest.mark.parametrize("keyword", ["SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "FrameOfReferenceUID"])
def test_a_uid_that_is_none_is_refused_and_not_repeated(tmp_path, uid, keyword):
    error = refusal(series(tmp_path, put(**{keyword: uid})))
    assert error.code == "missing_attribute"
    assert f"a {keyword} that is not a valid UID" in error.text
    assert uid not in error.text


def test_a_lost_slice_between_many_is_named_by_the_positions_beside_it(tmp_path):
    paths = series(tmp_path, spacing_mm=(2.5, 1, 1), origin_mm=(-10, -8, -431))
    del paths[4]
    error = refusal(paths)
    assert error.code == "missing_slices"
    assert "between (-10.0, -8.0, -423.5) mm and (-10.0, -8.0, -418.5) mm" in error.text


@pytest.mark.parametrize(("count", "code"), [(0, "too_few_slices"), (1, "single_slice"), (2, "too_few_slices")])
def test_too_few_slices_are_refused(tmp_path, count, code):
    assert refusal(series(tmp_path)[:count]).code == code


def test_planes_that_drift_sideways_are_refused(tmp_path):
    def drift(ds, k):
        ds.ImagePositionPatient = [0, 2 * (k % 2), 3 * k]

    assert refusal(series(tmp_path, drift)).code == "unsupported_geometry"


def test_slices_that_step_within_their_own_plane_are_refused(tmp_path):
    def slide(ds, k):
        ds.ImagePositionPatient = [0, 10 * k, 3 * k]

    error = refusal(series(tmp_path, slide))
    assert error.code == "unsupported_geometry"
    assert "73 degrees" in error.text


def test_another_matrix_in_one_slice_is_refused(tmp_path):
    paths = series(tmp_path / "a", series_uid="1.2.3", study_uid="1.2", frame_of_reference_uid="1.5")
    other = write_ct(
        tmp_path / "b", some_hu((8, 16, 24)), series_uid="1.2.3", study_uid="1.2", frame_of_reference_uid="1.5"
    )
    error = refusal([*paths[:4], *other[4:]])
    assert (error.code, "2 matrix sizes" in error.text) == ("mixed_spacing", True)


def test_more_slices_than_allowed_are_refused_before_they_are_read(tmp_path):
    assert refusal(series(tmp_path), max_slices=7).code == "too_large"
    assert read_ct(sorted(tmp_path.iterdir()), max_slices=8).grid.shape == SHAPE


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"\0" * 128 + b"DICM", b"\0" * 4096, b"\0" * 128 + b"DICM" + b"\xff" * 99]
)
def test_a_file_that_is_no_dicom_is_refused_by_its_number(tmp_path, content):
    paths = series(tmp_path)
    paths[2].write_bytes(content)
    error = refusal(paths)
    assert error.code in ("not_dicom", "not_ct")
    assert "file 3 of 8" in error.text


@pytest.mark.parametrize(
    "syntax",
    [
        ExplicitVRLittleEndian,
        ImplicitVRLittleEndian,
        ExplicitVRBigEndian,
        DeflatedExplicitVRLittleEndian,
        RLELossless,
        JPEGLSLossless,
        JPEG2000Lossless,
    ],
    ids=lambda s: s.name,
)
def test_a_file_cut_off_in_its_pixel_data_is_refused(tmp_path, syntax):
    paths = write_ct(tmp_path, some_hu((4, 48, 40)), transfer_syntax=syntax)
    whole = paths[1].read_bytes()
    paths[1].write_bytes(whole[: len(whole) - 700])
    expected = {"truncated_pixel_data", "undecodable_pixel_data"}
    if syntax == DeflatedExplicitVRLittleEndian:
        expected = {"not_dicom"}  # what is left of the stream cannot be inflated
    assert refusal(paths).code in expected


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless, JPEG2000Lossless], ids=lambda s: s.name)
def test_broken_compressed_pixels_are_refused(tmp_path, syntax):
    paths = write_ct(tmp_path, some_hu((4, 48, 40)), transfer_syntax=syntax)
    data = bytearray(paths[2].read_bytes())
    start = data.index(b"\xe0\x7f\x10\x00") + 12 + 8 + 4
    data[start + 8 : start + 300] = b"\x55" * (292)
    paths[2].write_bytes(bytes(data))
    assert refusal(paths).code in ("undecodable_pixel_data", "not_dicom", "truncated_pixel_data")


def test_a_run_length_segment_that_overruns_its_plane_is_refused_though_the_decoder_panics(tmp_path):
    paths = write_ct(tmp_path, some_hu((4, 48, 40)), transfer_syntax=RLELossless)
    data = bytearray(paths[2].read_bytes())
    first = data.index(b"\xe0\x7f\x10\x00") + 12 + 12 + 8 + 64  # element, offset table, item, RLE header
    data[first : first + 200] = bytes([0x81, 7] * 100)  # each pair is a run of 128 bytes: 12,800 for 1,920 pixels
    paths[2].write_bytes(bytes(data))
    assert refusal(paths).code == "undecodable_pixel_data"


def test_an_unknown_transfer_syntax_is_refused(tmp_path):
    paths = series(tmp_path)
    data = paths[0].read_bytes()
    paths[0].write_bytes(data.replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.9\0"))
    assert refusal(paths).code == "unsupported_pixel_format"


def test_a_bitwise_fuzzed_header_is_read_or_refused_and_never_crashes(tmp_path):
    paths = series(tmp_path)
    whole = paths[0].read_bytes()
    rng = np.random.default_rng(11)
    for _ in range(150):
        data = bytearray(whole)
        for at in rng.integers(128, len(whole) - 640, 6):
            data[at] = rng.integers(256)
        paths[0].write_bytes(bytes(data))
        with suppress(UnsupportedSeries):
            assert np.isfinite(read_ct(paths).hu).all()
