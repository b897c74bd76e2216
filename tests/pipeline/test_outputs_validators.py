"""The objects before other people's eyes: dicom3tools' validators, SimpleITK, dcm2niix."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from outputs_samples import Sample, header_only, sample_suv, source_of, write_sample_ct, write_series
from pydicom import Dataset, dcmread
from pydicom.errors import InvalidDicomError

from pipeline.types import EncodedSeries, SourceSeries

NOT_IN_IOD = "Attribute is not present in standard DICOM IOD"  # what Secondary Capture with SUV attributes must get


def tool(name: str) -> str:
    """A command line tool beside the interpreter or on the path; skips with the reason where it is missing."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if not found:
        pytest.skip(f"{name} is not installed")
    return found


def complaints(path: Path) -> list[str]:
    done = subprocess.run([tool("dciodvfy"), "-new", str(path)], capture_output=True, text=True, timeout=60)
    lines = (done.stdout + done.stderr).splitlines()
    return [line for line in lines if "Error" in line or "Warning" in line or "rror" in line[:5]]


def _plain(_: Dataset, __: int) -> None:
    """As the factory writes it."""


def _japanese(ds: Dataset, _: int) -> None:
    ds.PatientName = "Yamada^Tarou=山田^太郎=やまだ^たろう"


def _de_identified(ds: Dataset, _: int) -> None:
    code = Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = "113100", "DCM", "Basic Profile"
    ds.PatientIdentityRemoved = "YES"
    ds.DeidentificationMethod = "Per PS3.15"
    ds.DeidentificationMethodCodeSequence = [code]


def _lossy(ds: Dataset, _: int) -> None:
    ds.LossyImageCompression = "01"
    ds.LossyImageCompressionRatio = "12.5"
    ds.LossyImageCompressionMethod = "ISO_15444_1"


def _feet_first_without_weight(ds: Dataset, _: int) -> None:
    ds.PatientPosition = "FFP"
    del ds.PatientWeight
    del ds.PatientSize
    ds.TimezoneOffsetFromUTC = "+0100"
    ds.PatientAge = "064Y"


def _leg(ds: Dataset, _: int) -> None:
    ds.BodyPartExamined = "LEG"
    ds.Laterality = "R"


def _unknown_position(ds: Dataset, _: int) -> None:
    ds.PatientPosition = ""
    ds.BodyPartExamined = "CHEST"


VARIANTS = (_plain, _japanese, _de_identified, _lossy, _feet_first_without_weight, _leg, _unknown_position)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.__name__.strip("_"))
def test_the_validator_finds_nothing_but_what_secondary_capture_must_get(variant, tmp_path: Path):
    sample = Sample(source=source_of(write_sample_ct(tmp_path / "ct", variant)), suv=sample_suv())
    _check_all(sample, tmp_path)


def test_a_ct_without_any_attribute_costs_only_what_a_dicomdir_would_need(tmp_path: Path):
    sample = Sample(source=header_only(), suv=sample_suv())
    for name, series in (("pet", sample.pet("pet")), ("mip", sample.mip())):
        for path in _first_and_last(series, tmp_path / name):
            assert [line for line in complaints(path) if not line.endswith("needed to build DICOMDIR")] == []


def test_the_validator_accepts_the_options(tmp_path: Path):
    sample = Sample(source=source_of(write_sample_ct(tmp_path / "ct")), suv=sample_suv())
    _check_all(sample.with_options(omit_patient_size=True, institution_name="Städtisches Klinikum"), tmp_path)


def _check_all(sample: Sample, folder: Path) -> None:
    for path in _first_and_last(sample.pet("pet"), folder / "pet"):
        assert complaints(path) == []
    for path in _first_and_last(sample.mip(), folder / "mip"):
        assert complaints(path) == []
    for path in _first_and_last(sample.pet("sc"), folder / "sc"):
        found = complaints(path)
        assert found, "the known warnings are expected: is the validator the one that runs?"
        assert [line for line in found if not (line.startswith("Warning") and line.endswith(NOT_IN_IOD))] == []


def _first_and_last(series: EncodedSeries, folder: Path) -> list[Path]:
    paths = write_series(series, folder)
    return sorted({paths[0], paths[-1]})


@pytest.mark.parametrize("encoding", ["sc", "pet"])
def test_ct_result_and_mip_agree_on_patient_and_study(encoding: str, tmp_path: Path):
    ct = write_sample_ct(tmp_path / "ct", _japanese)
    sample = Sample(source=source_of(ct), suv=sample_suv())
    result = write_series(sample.pet(encoding), tmp_path / "result")
    mip = write_series(sample.mip(encoding), tmp_path / "mip")
    done = subprocess.run(
        [tool("dcentvfy"), *map(str, (*ct, *result, *mip))], capture_output=True, text=True, timeout=60
    )
    assert (done.stdout + done.stderr).strip() == ""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> SourceSeries:
    return source_of(write_sample_ct(tmp_path_factory.mktemp("ct")))


@pytest.mark.parametrize("encoding", ["sc", "pet"])
def test_simpleitk_reads_suv_and_geometry(encoding: str, source: SourceSeries, tmp_path: Path):
    suv = sample_suv()
    write_series(Sample(source=source, suv=suv).pet(encoding), tmp_path / "s")
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(tmp_path / "s")))
    image = reader.Execute()
    assert np.abs(sitk.GetArrayFromImage(image) - suv.suv).max() <= 0.0005
    assert image.GetOrigin() == pytest.approx(suv.grid.origin_mm, abs=0.01)
    assert image.GetSpacing() == pytest.approx(suv.grid.spacing_mm[::-1], abs=0.001)
    assert image.GetDirection() == pytest.approx((1, 0, 0, 0, 1, 0, 0, 0, 1), abs=1e-9)


@pytest.mark.parametrize("encoding", ["sc", "pet"])
def test_dcm2niix_reads_suv_and_geometry(encoding: str, source: SourceSeries, tmp_path: Path):
    suv = sample_suv()
    write_series(Sample(source=source, suv=suv).pet(encoding), tmp_path / "s")
    done = subprocess.run(
        [tool("dcm2niix"), "-f", "out", "-o", str(tmp_path), str(tmp_path / "s")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    image = nibabel.load(tmp_path / "out.nii")
    to_lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ image.affine
    values = np.asarray(image.dataobj)
    nz, ny, nx = suv.grid.shape
    dz, dy, dx = suv.grid.spacing_mm
    for index in np.ndindex(nx, ny, nz):  # voxel by voxel: dcm2niix may store rows the other way round
        x, y, z, _ = to_lps @ (*index, 1)
        i, j, k = ((p - o) / s for p, o, s in zip((x, y, z), suv.grid.origin_mm, (dx, dy, dz), strict=True))
        assert max(abs(i - round(i)) * dx, abs(j - round(j)) * dy, abs(k - round(k)) * dz) <= 0.01
        assert abs(values[index] - suv.suv[round(k), round(j), round(i)]) <= 0.0005
    sidecar = json.loads((tmp_path / "out.json").read_text())
    assert sidecar["Units"] == "GML"
    assert sidecar["Modality"] == "PT"


NOT_OURS = ("needed to build DICOMDIR", "Retired Person Name form")  # what the CT's own header lacks or has


@pytest.mark.realdata
@pytest.mark.parametrize("name", ["ct-chest", "ct-abdomen-feet-first", "ct-arms-jpeg2000"])
def test_the_validator_accepts_the_result_of_a_real_ct(name: str, real_data: Path, tmp_path: Path):
    headers = [h for path in sorted((real_data / name).iterdir()) if (h := _header(path)) is not None]
    headers.sort(key=lambda h: float(h.ImagePositionPatient[2]))
    study_uid = headers[0].get("StudyInstanceUID") or "2.25.1"
    series_uid = headers[0].get("SeriesInstanceUID") or "2.25.2"
    source = replace(header_only(), header=headers[0], study_uid=study_uid, series_uid=series_uid)
    sample = Sample(source=source, suv=sample_suv())
    for kind, series in (("pet", sample.pet("pet")), ("mip", sample.mip())):
        for path in _first_and_last(series, tmp_path / kind):
            assert [line for line in complaints(path) if not line.endswith(NOT_OURS)] == []


def _header(path: Path) -> Dataset | None:
    try:
        return dcmread(path, stop_before_pixels=True)
    except InvalidDicomError:
        return None  # a licence text beside the images
