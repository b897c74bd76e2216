"""Research software reads the result as a volume: SimpleITK new and old, dcm2niix, pydicom, highdicom."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import highdicom as hd
import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.pixels import apply_modality_lut
from reader_study import ENCODINGS, SUV_TOLERANCE, Written
from reader_tools import HERE, old_simpleitk, program

from pipeline.types import District

NIFTI_SLOPE = 1e-6  # SUV: a NIfTI header holds the slope as a float32
IDENTITY = (1, 0, 0, 0, 1, 0, 0, 0, 1)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_simpleitk_reads_suv_and_geometry(encoding: str, written: Written) -> None:
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(written.results[encoding]["pet"])))
    image = reader.Execute()
    grid = written.study.suv.grid
    assert np.abs(sitk.GetArrayFromImage(image) - written.study.shown).max() <= SUV_TOLERANCE
    assert image.GetSpacing() == pytest.approx(grid.spacing_mm[::-1], abs=1e-4)
    assert image.GetOrigin() == pytest.approx(grid.origin_mm, abs=1e-3)
    assert image.GetDirection() == pytest.approx(IDENTITY)


@pytest.fixture(scope="module", params=ENCODINGS)
def read_by_the_old_one(
    request: pytest.FixtureRequest, written: Written, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[str, Any], NDArray[np.float64]]:
    """The encoding, what SimpleITK 2.2.1 says of the series, and its values."""
    out = tmp_path_factory.mktemp("old-simpleitk") / "suv.npy"
    script = [sys.executable, str(HERE / "read_with_simpleitk.py"), str(old_simpleitk())]
    done = subprocess.run(
        [*script, str(written.results[request.param]["pet"]), str(out)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["version"].startswith("2.2.1"), "another SimpleITK came first on the path"
    return request.param, said, np.load(out)


def test_an_old_simpleitk_reads_the_geometry_of_a_pet_image_only(
    read_by_the_old_one: tuple[str, dict[str, Any], NDArray[np.float64]], written: Written
) -> None:
    encoding, said, _ = read_by_the_old_one
    grid = written.study.suv.grid
    if encoding == "pet":
        assert said["spacing"] == pytest.approx(grid.spacing_mm[::-1], abs=1e-4)
        assert said["origin"] == pytest.approx(grid.origin_mm, abs=1e-3)
    else:  # its GDCM reads no plane geometry from a Secondary Capture: docs/viewers.md says so
        assert said["spacing"] == [1, 1, 1]
        assert said["origin"] == [0, 0, 0]
    assert said["direction"] == pytest.approx(IDENTITY)


def test_an_old_simpleitk_reads_the_suv_of_either_encoding(
    read_by_the_old_one: tuple[str, dict[str, Any], NDArray[np.float64]], written: Written
) -> None:
    _, __, values = read_by_the_old_one
    assert np.abs(values - written.study.shown).max() <= SUV_TOLERANCE


@pytest.mark.parametrize("of_debian", [False, True], ids=["pypi", "debian"])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_dcm2niix_writes_suv_affine_and_units(encoding: str, of_debian: bool, written: Written, tmp_path: Path) -> None:
    command = [
        program("dcm2niix", "dcm2niix", beside=not of_debian),
        "-f",
        "out",
        "-o",
        str(tmp_path),
        str(written.results[encoding]["pet"]),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    image = nibabel.load(tmp_path / "out.nii")
    assert isinstance(image, nibabel.Nifti1Image)
    image = nibabel.as_closest_canonical(image)  # R, A, S: dcm2niix may store rows the other way round
    grid = written.study.suv.grid
    values = np.asarray(image.dataobj)[::-1, ::-1].transpose(2, 1, 0)  # to L, P, S and [z, y, x]
    assert np.abs(values - written.study.shown).max() <= SUV_TOLERANCE + NIFTI_SLOPE
    dz, dy, dx = grid.spacing_mm
    nx, ny, _ = image.shape
    x, y, z = grid.origin_mm
    corner = (-(x + (nx - 1) * dx), -(y + (ny - 1) * dy), z)  # of the most right, back, low voxel, in RAS
    expected = np.diag([dx, dy, dz, 1.0])
    expected[:3, 3] = corner
    assert np.allclose(image.affine, expected, atol=1e-3)
    sidecar = json.loads((tmp_path / "out.json").read_text())
    assert (sidecar["Units"], sidecar["Modality"]) == ("GML", "PT")
    assert sidecar["SeriesDescription"].startswith("SYNTHETIC")


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_pydicom_reads_suv(encoding: str, written: Written) -> None:
    for path, plane in zip(written.files(encoding), written.study.shown, strict=True):
        ds = dcmread(path)
        suv = apply_modality_lut(ds.pixel_array, ds)
        assert np.abs(suv - plane).max() <= SUV_TOLERANCE


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_highdicom_reads_suv_by_the_real_world_value_mapping(encoding: str, written: Written) -> None:
    paths = written.files(encoding)
    grid = written.study.suv.grid
    volume = hd.get_volume_from_series([dcmread(path) for path in paths], apply_real_world_transform=True)
    volume = volume.to_patient_orientation(hd.PatientOrientationValuesBiped.H.value + "PL")
    assert np.abs(volume.array - written.study.shown).max() <= SUV_TOLERANCE
    assert volume.spacing == pytest.approx(grid.spacing_mm, abs=1e-4)
    assert volume.position == pytest.approx(grid.origin_mm, abs=1e-3)
    assert volume.frame_of_reference_uid == grid.frame_of_reference_uid


def test_highdicom_reads_the_districts_on_the_grid_of_the_pet(written: Written) -> None:
    seg = hd.seg.segread(*written.files("sc", "seg"))
    labels = written.study.districts.labels
    volume = seg.get_volume(combine_segments=True, skip_overlap_checks=True, relabel=False)
    volume = volume.to_patient_orientation("HPL")
    grid = written.study.suv.grid
    assert volume.spacing == pytest.approx(grid.spacing_mm, abs=1e-4)
    lowest = round((volume.position[2] - grid.origin_mm[2]) / grid.spacing_mm[0])  # empty planes may be left out
    found = np.zeros_like(labels)
    found[lowest : lowest + volume.shape[0]] = volume.array
    present = [d for d in District if (labels == d).any()]
    by_number = {number: seg.get_segment_description(number).segment_label for number in seg.segment_numbers}
    for number, district in zip(by_number, present, strict=True):
        assert district.key in by_number[number].lower()
        assert np.array_equal(found == number, labels == district)
