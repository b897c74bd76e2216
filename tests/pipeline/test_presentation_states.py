"""Inverse gray and hot iron for the synthetic PET, with the word SYNTHETIC over it."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from companion_samples import states_of
from outputs_samples import (
    Sample,
    header_only,
    read_back,
    sample_suv,
    source_of,
    write_sample_ct,
    write_series,
)
from PIL import Image
from pydicom import Dataset
from pydicom.data import get_palette_files
from pydicom.filereader import dcmread
from pydicom.pixels import apply_color_lut
from test_outputs_validators import VARIANTS, complaints, tool

from pipeline.outputs.quantize import quantize, slope_of
from pipeline.types import SuvVolume

CLASSES = {"gsps": "1.2.840.10008.5.1.4.1.1.11.1", "pcps": "1.2.840.10008.5.1.4.1.1.11.3"}


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    return Sample(source=source_of(write_sample_ct(tmp_path_factory.mktemp("ct"))), suv=sample_suv())


def data_sets(sample: Sample, encoding: str = "sc") -> dict[str, Dataset]:
    return {kind: read_back(series)[0] for kind, series in states_of(sample, encoding).items()}


@pytest.mark.parametrize("encoding", ["sc", "pet"])
def test_a_state_shows_every_plane_of_its_pet_series(sample: Sample, encoding: str) -> None:
    pet = sample.pet(encoding)
    for kind, series in states_of(sample, encoding).items():
        ds = read_back(series)[0]
        assert (series.kind, series.encoding, ds.SOPClassUID) == (kind, encoding, CLASSES[kind])
        (shown,) = ds.ReferencedSeriesSequence
        assert shown.SeriesInstanceUID == pet.series_uid
        assert [(i.ReferencedSOPClassUID, i.ReferencedSOPInstanceUID) for i in shown.ReferencedImageSequence] == [
            (i.sop_class_uid, i.sop_instance_uid) for i in pet.instances
        ]


def test_both_states_show_suv_0_to_5_of_the_planes_own_values(sample: Sample) -> None:
    bright = replace(sample, suv=SuvVolume(suv=sample.suv.suv * 3, grid=sample.suv.grid))  # above full scale
    for one in (sample, bright):
        plane = read_back(one.pet("sc"))[0]
        for ds in data_sets(one).values():
            assert ds["RescaleSlope"].value.original_string == plane["RescaleSlope"].value.original_string
            assert ds.RescaleIntercept == 0
            (window,) = ds.SoftcopyVOILUTSequence
            assert (window.WindowCenter, window.WindowWidth) == (2.5, 5)
            assert (window.VOILUTFunction, window.WindowCenterWidthExplanation) == ("LINEAR_EXACT", "SUV 0-5")
    assert slope_of(bright.suv.suv) == quantize(bright.suv.suv)[1] != slope_of(sample.suv.suv)


def test_gray_is_inverse_and_color_is_the_standards_hot_iron(sample: Sample) -> None:
    states = data_sets(sample)
    assert states["gsps"].PresentationLUTShape == "INVERSE"
    palette = dcmread(get_palette_files("hotiron.dcm")[0])
    levels = np.arange(256, dtype=np.uint8)
    wanted = apply_color_lut(levels, palette)
    shown = apply_color_lut(levels, states["pcps"])
    assert np.array_equal(shown // 257, wanted)
    assert shown.max() == 65535
    assert states["pcps"].ICCProfile


@pytest.mark.parametrize("kind", list(CLASSES))
def test_the_word_synthetic_lies_over_every_plane_and_in_no_voxel(sample: Sample, kind: str) -> None:
    ds = data_sets(sample)[kind]
    (annotation,) = ds.GraphicAnnotationSequence
    assert "ReferencedImageSequence" not in annotation  # absent: it is for all of them
    (banner,) = annotation.TextObjectSequence
    assert banner.UnformattedTextValue == "SYNTHETIC PET (AI) - NOT FOR DIAGNOSIS"
    assert banner.BoundingBoxAnnotationUnits == "DISPLAY"
    assert [layer.GraphicLayer for layer in ds.GraphicLayerSequence] == [annotation.GraphicLayer] == ["SYNTHETIC"]
    codes, _ = quantize(sample.suv.suv)
    assert np.array_equal(np.stack([plane.pixel_array for plane in read_back(sample.pet("sc"))]), codes)


def test_the_planes_keep_their_shape_on_the_screen(sample: Sample) -> None:
    for ds in data_sets(sample).values():
        (area,) = ds.DisplayedAreaSelectionSequence
        assert list(area.PresentationPixelSpacing) == [4.0, 4.07283]
        assert "PresentationPixelAspectRatio" not in area
        assert list(area.DisplayedAreaBottomRightHandCorner) == [11, 9]


def test_a_state_is_the_patients_and_says_what_it_is(sample: Sample) -> None:
    numbers = {"gsps": 9050, "pcps": 9060}
    header = sample.source.header
    for kind, ds in data_sets(sample).items():
        assert (ds.Modality, ds.SyntheticData, ds.SeriesNumber) == ("PR", "YES", numbers[kind])
        assert ds.SeriesDescription.startswith("SYNTHETIC")
        for keyword in ("PatientID", "PatientName", "StudyInstanceUID", "StudyDescription", "PatientWeight"):
            assert ds[keyword].value == header[keyword].value, keyword
        assert (ds.PresentationCreationDate, ds.PresentationCreationTime) == ("20240506", "070809.123456")
        assert ds.ContentCreatorName == "SYNPET^AI"
        assert len(ds.ContributingEquipmentSequence) == 3


def test_the_same_result_has_the_same_states_and_another_one_others(sample: Sample) -> None:
    first = states_of(sample)
    assert first == states_of(sample)
    later = states_of(replace(sample, created=sample.created + timedelta(days=1)))
    others = (states_of(sample, "pet"), states_of(sample.with_options(gsps_series_number=7, pcps_series_number=8)))
    for kind in CLASSES:
        assert later[kind].series_uid == first[kind].series_uid
        assert len({states[kind].series_uid for states in (first, *others)}) == 3
        assert len({states[kind].instances[0].sop_instance_uid for states in (first, *others)}) == 3


@pytest.mark.parametrize("encoding", ["sc", "pet"])
def test_dcmtk_shows_the_planes_inverse_and_black_from_suv_5(sample: Sample, encoding: str, tmp_path: Path) -> None:
    planes = write_series(sample.pet(encoding), tmp_path / "pet")
    (state,) = write_series(states_of(sample, encoding)["gsps"], tmp_path / "gsps")
    for plane, suv in zip(planes, sample.suv.suv, strict=True):
        picture = tmp_path / "shown.pgm"
        subprocess.run([tool("dcmp2pgm"), "-p", state, plane, picture], check=True, capture_output=True, timeout=60)
        shown = np.asarray(Image.open(picture)).astype(float)
        # DCMTK rounds to whole numbers after the modality LUT, here to whole SUV: 51 of 255 levels
        assert np.abs(shown - 255 * (1 - np.minimum(suv / 5, 1))).max() <= 51
        assert (shown[suv >= 5] == 0).all()
        assert (shown[suv == 0] == 255).all()


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.__name__.strip("_"))
def test_the_validator_finds_nothing(variant, tmp_path: Path) -> None:
    ct = write_sample_ct(tmp_path / "ct", variant)
    sample = Sample(source=source_of(ct), suv=sample_suv())
    for encoding in ("sc", "pet"):
        pet = write_series(sample.pet(encoding), tmp_path / encoding / "planes")
        for kind, series in states_of(sample, encoding).items():
            (path,) = write_series(series, tmp_path / encoding / kind)
            assert complaints(path) == []
            done = subprocess.run(
                [tool("dcentvfy"), *map(str, (*ct, *pet, path))], capture_output=True, text=True, timeout=60
            )
            assert (done.stdout + done.stderr).strip() == ""


def test_a_ct_without_any_attribute_costs_only_what_a_dicomdir_would_need(tmp_path: Path) -> None:
    for kind, series in states_of(Sample(source=header_only(), suv=sample_suv())).items():
        (path,) = write_series(series, tmp_path / kind)
        assert [line for line in complaints(path) if not line.endswith("needed to build DICOMDIR")] == []
