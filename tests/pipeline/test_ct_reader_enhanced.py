"""Enhanced CT (multi-frame): the same volume as its planes would give as single frames, or a named reason."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

import gdcm
import highdicom as hd
import numpy as np
import pydicom
import pytest
from ct_factory import write_ct
from enhanced_ct import frame_item, item, write_enhanced
from outputs_samples import Sample, read_back, sample_suv
from pydicom import Dataset
from pydicom.encaps import encapsulate, encapsulate_extended, generate_frames
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    EnhancedCTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    LegacyConvertedEnhancedCTImageStorage,
    RLELossless,
    generate_uid,
)

from pipeline.ct_groups import Concatenation, missing_parts
from pipeline.ct_reader import choose_ct, read_ct
from pipeline.errors import UnsupportedSeries
from pipeline.types import CtVolume, Grid, SuvVolume

SHAPE = (7, 32, 36)
NATIVE = (ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian)


def some_hu(shape: tuple[int, int, int] = SHAPE) -> np.ndarray[Any, Any]:
    return np.random.default_rng(5).integers(-1000, 2000, shape).astype(np.int16)


def classic(folder: Path, hu: np.ndarray[Any, Any], **kwargs: Any) -> list[Path]:
    """Single-frame files of `hu`: 3 x 2 x 1.5 mm from z = 100, outside of the folder that a test reads."""
    given = {"spacing_mm": (3, 2, 1.5), "origin_mm": (-1, -2, 100), **kwargs}
    return write_ct(folder.with_name(f"{folder.name}-classic"), hu, **given)


def enhanced(folder: Path, hu: np.ndarray[Any, Any], **kwargs: Any) -> list[Path]:
    return write_enhanced(folder, classic(folder, hu), **kwargs)


def refusal(paths: list[Path], **kwargs: Any) -> UnsupportedSeries:
    with pytest.raises(UnsupportedSeries) as refused:
        read_ct(paths, **kwargs)
    return refused.value


# -- the same volume


@pytest.mark.parametrize("shared", [True, False], ids=["shared groups", "per-frame groups"])
@pytest.mark.parametrize(
    "syntax", [*NATIVE, RLELossless, JPEGLSLossless, JPEG2000Lossless], ids=lambda uid: pydicom.uid.UID(uid).name
)
def test_the_frames_of_an_enhanced_ct_become_the_volume_in_the_order_of_their_positions(
    tmp_path: Path, syntax: str, shared: bool
) -> None:
    hu = some_hu()
    folder = tmp_path / "ct"
    singles = classic(folder, hu)
    write_enhanced(folder, singles, order=[3, 0, 6, 1, 5, 2, 4], shared=shared, transfer_syntax=syntax)
    ct, same = read_ct(choose_ct(folder)), read_ct(singles)
    assert np.array_equal(ct.hu, hu)
    assert np.array_equal(ct.hu, same.hu)
    assert ct.grid == same.grid
    assert ct.source.earliest_acquisition == same.source.earliest_acquisition == ("20240102", "102100")
    assert {i.sop_class_uid for i in ct.source.instances} == {EnhancedCTImageStorage}
    assert len({i.sop_instance_uid for i in ct.source.instances}) == 1
    assert [i.frame_number for i in ct.source.instances] == [2, 4, 6, 1, 7, 5, 3]
    assert [i.position_mm for i in ct.source.instances] == [i.position_mm for i in same.source.instances]
    assert {i.frame_number for i in same.source.instances} == {0}


def test_the_validator_takes_what_the_tests_write_for_an_enhanced_ct(tmp_path: Path) -> None:
    dciodvfy = shutil.which("dciodvfy", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert dciodvfy, "make setup installs it"
    for path in [*enhanced(tmp_path / "a", some_hu()), *enhanced(tmp_path / "b", some_hu(), parts=2)]:
        said = subprocess.run([dciodvfy, str(path)], capture_output=True, text=True, check=False)
        assert "EnhancedCTImage" in said.stdout + said.stderr
        assert "Error" not in said.stdout + said.stderr


def test_a_legacy_converted_enhanced_ct_is_the_volume_of_its_sources(tmp_path: Path) -> None:
    hu = some_hu()
    singles = classic(tmp_path / "ct", hu)
    converted = hd.legacy.LegacyConvertedEnhancedCTImage(
        [pydicom.dcmread(path) for path in singles],
        series_instance_uid=generate_uid(),
        series_number=3,
        sop_instance_uid=generate_uid(),
        instance_number=1,
    )
    converted.save_as(tmp_path / "legacy.dcm")
    ct, same = read_ct([tmp_path / "legacy.dcm"]), read_ct(singles)
    assert np.array_equal(ct.hu, same.hu)
    assert ct.grid == same.grid
    assert {i.sop_class_uid for i in ct.source.instances} == {LegacyConvertedEnhancedCTImageStorage}


def test_the_parts_of_a_concatenation_are_one_volume_whose_frames_are_counted_in_each_part(tmp_path: Path) -> None:
    hu = some_hu()
    low, high = enhanced(tmp_path, hu, parts=2)
    ct = read_ct([high, low])
    assert np.array_equal(ct.hu, hu)
    assert [i.frame_number for i in ct.source.instances] == [1, 2, 3, 4, 1, 2, 3]
    assert len({i.sop_instance_uid for i in ct.source.instances}) == 2


@pytest.mark.parametrize("part", [0, 2])
def test_a_concatenation_with_a_part_missing_is_refused_also_where_nothing_gapes(tmp_path: Path, part: int) -> None:
    paths = enhanced(tmp_path, some_hu((9, 32, 36)), parts=3)
    fault = refusal([path for k, path in enumerate(paths) if k != part])
    assert fault.code == "missing_slices"
    assert "1 of 3 parts" in fault.text


def test_parts_below_the_highest_are_missed_without_a_total() -> None:
    parts = [Concatenation(uid="1.2", number=number, total=0) for number in (1, 4)]
    assert missing_parts(parts) == (2, 4)
    assert missing_parts([*parts, Concatenation(uid="1.3", number=1, total=2)]) == (3, 6)
    assert missing_parts([Concatenation(uid="1.2", number=0, total=2)]) == missing_parts([]) == (0, 0)


def test_localizers_among_the_frames_are_dropped_with_a_note_wherever_they_lie(tmp_path: Path) -> None:
    def localizer(ds: Dataset) -> None:
        ds.ImageType[2] = "VOLUME"
        frame = ds.PerFrameFunctionalGroupsSequence[0]
        frame.CTImageFrameTypeSequence = [item(FrameType=["ORIGINAL", "PRIMARY", "LOCALIZER", "NONE"])]
        frame.PlaneOrientationSequence = [item(ImageOrientationPatient=[1, 0, 0, 0, 0, -1])]
        del frame.PlanePositionSequence

    hu = some_hu()
    ct = read_ct(enhanced(tmp_path, hu, modify=localizer))
    assert np.array_equal(ct.hu, hu[1:])
    assert [i.frame_number for i in ct.source.instances] == [2, 3, 4, 5, 6, 7]
    assert "1 localizer images dropped" in ct.source.notes


def test_the_header_that_outputs_copy_from_is_that_of_a_single_frame(tmp_path: Path) -> None:
    singles = classic(tmp_path, some_hu())
    header = read_ct(write_enhanced(tmp_path, singles)).source.header
    first = pydicom.dcmread(singles[0], stop_before_pixels=True)
    for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "Rows", "PatientID"):
        assert header[keyword].value == first[keyword].value
    assert "PerFrameFunctionalGroupsSequence" not in header
    assert header.ImageType == ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]


# -- fragments


def compressed(folder: Path, change: Callable[[Dataset, list[bytes]], None]) -> tuple[Path, np.ndarray[Any, Any]]:
    """An Enhanced CT in JPEG-LS whose fragments `change` puts in anew."""
    hu = some_hu()

    def modify(ds: Dataset) -> None:
        ds.compress(JPEGLSLossless, generate_instance_uid=False)
        change(ds, list(generate_frames(ds.PixelData, number_of_frames=len(hu))))
        ds["PixelData"].is_undefined_length = True

    (path,) = enhanced(folder, hu, modify=modify)
    return path, hu


def extended(ds: Dataset, frames: list[bytes]) -> None:
    ds.PixelData, ds.ExtendedOffsetTable, ds.ExtendedOffsetTableLengths = encapsulate_extended(frames)


FRAGMENTS: dict[str, Callable[[Dataset, list[bytes]], None]] = {
    "basic offset table": lambda ds, frames: setattr(ds, "PixelData", encapsulate(frames)),
    "empty offset table": lambda ds, frames: setattr(ds, "PixelData", encapsulate(frames, has_bot=False)),
    "several fragments": lambda ds, frames: setattr(ds, "PixelData", encapsulate(frames, fragments_per_frame=3)),
    "several fragments, empty table": lambda ds, frames: setattr(
        ds, "PixelData", encapsulate(frames, fragments_per_frame=3, has_bot=False)
    ),
    "extended offset table": extended,
}


@pytest.mark.parametrize("case", FRAGMENTS)
def test_frames_are_found_however_their_fragments_are_listed(tmp_path: Path, case: str) -> None:
    path, hu = compressed(tmp_path, FRAGMENTS[case])
    assert np.array_equal(read_ct([path]).hu, hu)


def test_one_frame_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, hu = compressed(tmp_path, FRAGMENTS["empty offset table"])
    read: list[int] = []
    really = pydicom.encaps.generate_fragments

    def counted(source: Any, **kwargs: Any) -> Iterator[bytes]:
        for fragment in really(source, **kwargs):
            if isinstance(source, BufferedReader):  # the file, not the one frame that is decoded
                read.append(len(fragment))
            yield fragment

    monkeypatch.setattr("pydicom.encaps.generate_fragments", counted)
    planes = []

    def on_progress(progress: Any) -> None:
        if progress.text == "pixels":
            planes.append(len(read))

    read_ct([path], on_progress=on_progress)
    assert planes == list(range(1, len(hu) + 1))


# -- refused by name


def two_stacks(ds: Dataset) -> None:
    for k in (4, 5, 6):
        frame_item(ds, k, "FrameContentSequence").StackID = "2"
        frame_item(ds, k, "PlanePositionSequence").ImagePositionPatient = [-1, -2, 300 + k]


def two_phases(ds: Dataset) -> None:
    for k in range(7):
        frame_item(ds, k, "FrameContentSequence").TemporalPositionIndex = k // 4 + 1
        frame_item(ds, k, "PlanePositionSequence").ImagePositionPatient = [-1, -2, 100 + 3 * (k % 4)]


def shared_group(sequence: str, keyword: str, value: object) -> Callable[[Dataset], None]:
    return lambda ds: setattr(ds.SharedFunctionalGroupsSequence[0][sequence].value[0], keyword, value)


ENHANCED_FAULTS: dict[str, tuple[Callable[[Dataset], Any], str]] = {
    "a frame without groups": (lambda ds: ds.PerFrameFunctionalGroupsSequence.pop(), "missing_attribute"),
    "no frames": (lambda ds: setattr(ds, "NumberOfFrames", 0), "missing_attribute"),
    "fewer frames than none": (lambda ds: setattr(ds, "NumberOfFrames", -1), "missing_attribute"),
    "a frame without a position": (
        lambda ds: ds.PerFrameFunctionalGroupsSequence[3].__delattr__("PlanePositionSequence"),
        "missing_attribute",
    ),
    "no rescale": (
        lambda ds: ds.SharedFunctionalGroupsSequence[0].__delattr__("PixelValueTransformationSequence"),
        "missing_attribute",
    ),
    "fewer pixels than frames": (lambda ds: setattr(ds, "PixelData", ds.PixelData[:-2304]), "truncated_pixel_data"),
    "a localizer": (
        shared_group("CTImageFrameTypeSequence", "FrameType", ["ORIGINAL", "PRIMARY", "LOCALIZER", "NONE"]),
        "localizer",
    ),
    "projections": (
        shared_group("CTImageFrameTypeSequence", "VolumeBasedCalculationTechnique", "MAX_IP"),
        "projection_image",
    ),
    "two planes at one position": (
        lambda ds: setattr(frame_item(ds, 2, "PlanePositionSequence"), "ImagePositionPatient", [-1, -2, 100]),
        "duplicate_positions",
    ),
    "two stacks": (two_stacks, "several_stacks"),
    "two phases": (two_phases, "several_phases"),
}


@pytest.mark.parametrize("case", ENHANCED_FAULTS)
def test_a_faulty_enhanced_ct_is_refused_by_name(tmp_path: Path, case: str) -> None:
    change, code = ENHANCED_FAULTS[case]
    assert refusal(enhanced(tmp_path, some_hu(), modify=change)).code == code


def test_two_stacks_that_follow_each_other_are_one_volume(tmp_path: Path) -> None:
    def name_stacks(ds: Dataset) -> None:
        for k in range(7):
            frame_item(ds, k, "FrameContentSequence").StackID = "AB"[k // 4]

    hu = some_hu()
    assert np.array_equal(read_ct(enhanced(tmp_path, hu, modify=name_stacks)).hu, hu)


def test_more_frames_than_allowed_are_refused(tmp_path: Path) -> None:
    assert refusal(enhanced(tmp_path, some_hu()), max_slices=6).code == "too_large"


# -- what the result says of its source


def references(ct: CtVolume, z_mm: list[float]) -> list[Dataset]:
    """The PET planes on the CT's own grid, in height from z_mm[0] in steps of z_mm[1] - z_mm[0]."""
    like = sample_suv()
    grid = Grid(
        shape=(len(z_mm), *ct.grid.shape[1:]),
        spacing_mm=(z_mm[1] - z_mm[0], *ct.grid.spacing_mm[1:]),
        origin_mm=(*ct.grid.origin_mm[:2], z_mm[0]),
        frame_of_reference_uid=ct.grid.frame_of_reference_uid,
    )
    suv = SuvVolume(suv=np.resize(like.suv, grid.shape), grid=grid)
    return read_back(Sample(source=ct.source, suv=suv).pet("sc"))


def test_a_plane_names_the_frames_that_it_is_made_of(tmp_path: Path) -> None:
    """Referenced Frame Number is in the source images, which have it, and not in the common reference (PS3.3 10-3)."""
    ct = read_ct(enhanced(tmp_path, some_hu(), order=[3, 0, 6, 1, 5, 2, 4]))
    planes = references(ct, [100.0, 101.5, 103.0])
    frames = [plane.SourceImageSequence[0].ReferencedFrameNumber for plane in planes]
    assert frames == [2, [2, 4], 4]
    assert [len(plane.SourceImageSequence) for plane in planes] == [1, 1, 1]
    preserved = [plane.SourceImageSequence[0].SpatialLocationsPreserved for plane in planes]
    assert preserved == ["YES", "NO", "YES"]
    for plane in planes:
        (series,) = plane.ReferencedSeriesSequence
        (instance,) = series.ReferencedInstanceSequence
        assert instance.ReferencedSOPInstanceUID == ct.source.instances[0].sop_instance_uid
        assert "ReferencedFrameNumber" not in instance


def test_a_plane_between_two_parts_of_a_concatenation_names_a_frame_of_each(tmp_path: Path) -> None:
    ct = read_ct(enhanced(tmp_path, some_hu(), parts=2))
    (_, between, _) = references(ct, [109.0, 110.5, 112.0])
    assert [image.ReferencedFrameNumber for image in between.SourceImageSequence] == [4, 1]
    assert len({image.ReferencedSOPInstanceUID for image in between.SourceImageSequence}) == 2


# -- an encoding that only another toolkit writes


@pytest.mark.parametrize("intercept", [-1024, 0], ids=["unsigned", "signed"])
def test_jpeg_lossless_is_read(tmp_path: Path, intercept: int) -> None:
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
