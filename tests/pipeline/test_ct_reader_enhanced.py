"""Enhanced CT (multi-frame), and encodings that only other toolkits can write."""

from __future__ import annotations

import gdcm
import numpy as np
import pydicom
import pytest
from ct_factory import write_ct
from pydicom import Dataset
from pydicom.uid import (
    EnhancedCTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
    generate_uid,
)

from pipeline.ct_reader import choose_ct, read_ct
from pipeline.errors import UnsupportedSeries

SHAPE = (7, 16, 20)


def some_hu():
    return np.random.default_rng(5).integers(-1000, 2000, SHAPE).astype(np.int16)


def item(**values):
    ds = Dataset()
    for keyword, value in values.items():
        setattr(ds, keyword, value)
    return ds


def write_enhanced(folder, hu, *, order=None, shared=True, transfer_syntax=ExplicitVRLittleEndian, modify=None):
    """One Enhanced CT instance of `hu`, its frames stored in `order`; 3 x 2 x 1.5 mm from z = 100."""
    base = pydicom.dcmread(write_ct(folder / "classic", hu[:1], spacing_mm=(3, 2, 1.5), origin_mm=(-1, -2, 100))[0])
    (folder / "classic" / "0001.dcm").unlink()
    order = list(range(len(hu))) if order is None else order
    for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "RescaleSlope"):
        delattr(base, keyword)
    del base.RescaleIntercept, base.RescaleType, base.AcquisitionDate, base.AcquisitionTime
    base.SOPClassUID = base.file_meta.MediaStorageSOPClassUID = EnhancedCTImageStorage
    base.NumberOfFrames = len(hu)
    common = {
        "PixelMeasuresSequence": [item(PixelSpacing=[2, 1.5], SliceThickness=3)],
        "PlaneOrientationSequence": [item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])],
        "PixelValueTransformationSequence": [item(RescaleSlope=1, RescaleIntercept=-1024, RescaleType="HU")],
        "CTImageFrameTypeSequence": [item(FrameType=["ORIGINAL", "PRIMARY", "VOLUME", "NONE"])],
    }
    frames = [
        item(
            PlanePositionSequence=[item(ImagePositionPatient=[-1, -2, 100 + 3 * k])],
            FrameContentSequence=[item(FrameAcquisitionDateTime=f"202405060708{k + 10}")],
            **({} if shared else common),
        )
        for k in order
    ]
    base.SharedFunctionalGroupsSequence = [item(**(common if shared else {}))]
    base.PerFrameFunctionalGroupsSequence = frames
    words = (hu[order].astype(np.int32) + 1024).astype(">u2" if transfer_syntax == ExplicitVRBigEndian else "<u2")
    base.PixelData = words.tobytes()
    if modify:
        modify(base)
    if transfer_syntax.is_encapsulated:
        base.compress(transfer_syntax, generate_instance_uid=False)
    base.file_meta.TransferSyntaxUID = transfer_syntax
    path = folder / "enhanced.dcm"
    pydicom.dcmwrite(path, base, little_endian=transfer_syntax != ExplicitVRBigEndian, implicit_vr=False)
    return path


@pytest.mark.parametrize("shared", [True, False], ids=["shared groups", "per-frame groups"])
@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, RLELossless, JPEGLSLossless], ids=lambda s: s.name)
def test_the_frames_of_an_enhanced_ct_become_the_volume_in_the_order_of_their_positions(tmp_path, syntax, shared):
    hu = some_hu()
    path = write_enhanced(tmp_path, hu, order=[3, 0, 6, 1, 5, 2, 4], shared=shared, transfer_syntax=syntax)
    ct = read_ct(choose_ct(tmp_path))
    assert np.array_equal(ct.hu, hu)
    assert ct.grid.spacing_mm == (3.0, 2.0, 1.5)
    assert ct.grid.origin_mm == (-1.0, -2.0, 100.0)
    assert ct.source.earliest_acquisition == ("20240506", "070810")
    (instance,) = ct.source.instances
    assert instance.sop_class_uid == EnhancedCTImageStorage
    assert instance.position_mm[2] == 109
    assert path.exists()


def test_an_enhanced_ct_in_several_instances_is_one_volume(tmp_path):
    hu = some_hu()
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()

    def second(ds):
        ds.SeriesInstanceUID, ds.StudyInstanceUID, ds.FrameOfReferenceUID = "1.2.3", "1.2", "1.5"
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()

    def upper(ds):
        second(ds)
        for group in ds.PerFrameFunctionalGroupsSequence:
            group.PlanePositionSequence[0].ImagePositionPatient[2] += 9

    low = write_enhanced(tmp_path / "a", hu[:3], modify=second)
    high = write_enhanced(tmp_path / "b", hu[3:], modify=upper)
    ct = read_ct([high, low])
    assert np.array_equal(ct.hu, hu)
    assert [i.position_mm[2] for i in ct.source.instances] == [103.0, 113.5]


ENHANCED_FAULTS = {
    "a frame without groups": (lambda ds: ds.PerFrameFunctionalGroupsSequence.pop(), "missing_attribute"),
    "no rescale": (
        lambda ds: ds.SharedFunctionalGroupsSequence[0].__delattr__("PixelValueTransformationSequence"),
        "missing_attribute",
    ),
    "fewer pixels than frames": (lambda ds: setattr(ds, "PixelData", ds.PixelData[:-640]), "truncated_pixel_data"),
    "a localizer": (
        lambda ds: setattr(
            ds.SharedFunctionalGroupsSequence[0].CTImageFrameTypeSequence[0], "FrameType", ["ORIGINAL", "LOCALIZER"]
        ),
        "localizer",
    ),
    "two phases": (
        lambda ds: setattr(
            ds.PerFrameFunctionalGroupsSequence[2].PlanePositionSequence[0], "ImagePositionPatient", [-1, -2, 100]
        ),
        "duplicate_positions",
    ),
}


@pytest.mark.parametrize("case", ENHANCED_FAULTS)
def test_a_faulty_enhanced_ct_is_refused_by_name(tmp_path, case):
    change, code = ENHANCED_FAULTS[case]
    with pytest.raises(UnsupportedSeries) as refused:
        read_ct([write_enhanced(tmp_path, some_hu(), modify=change)])
    assert refused.value.code == code


def test_more_frames_than_allowed_are_refused(tmp_path):
    with pytest.raises(UnsupportedSeries, match="too_large"):
        read_ct([write_enhanced(tmp_path, some_hu())], max_slices=6)


@pytest.mark.parametrize("intercept", [-1024, 0], ids=["unsigned", "signed"])
def test_jpeg_lossless_is_read(tmp_path, intercept):
    hu = some_hu()
    paths = write_ct(tmp_path, hu, intercept=intercept)
    for path in paths:
        reader = gdcm.ImageReader()
        reader.SetFileName(str(path))
        assert reader.Read()
        change = gdcm.ImageChangeTransferSyntax()
        change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.JPEGLosslessProcess14_1))
        change.SetInput(reader.GetImage())
        assert change.Change()
        writer = gdcm.ImageWriter()
        writer.SetFileName(str(path))
        writer.SetFile(reader.GetFile())
        writer.SetImage(change.GetOutput())
        assert writer.Write()
    assert pydicom.dcmread(paths[0]).file_meta.TransferSyntaxUID == JPEGLosslessSV1
    assert np.array_equal(read_ct(paths).hu, hu)
