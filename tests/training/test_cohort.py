"""Cohorts of phantoms in the published layouts, read back with nibabel and pydicom."""

from __future__ import annotations

import csv
import errno
import gzip
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from pydicom import dcmread
from pydicom.dataset import FileDataset

from pipeline.types import Grid
from training.errors import DataError
from training.phantom import Phantom, make_phantom
from training.phantom import cohort as cohort_module
from training.phantom.cohort import TABLE, read_summary, write_cohort
from training.phantom.dicom import activity_per_suv
from training.phantom.nifti import ras_affine
from training.phantom.plan import PlannedStudy, plan_cohort

SPACING = (16.0, 8.0, 8.0)
CT_PIXEL_MM = 5.0
SEED = 2  # negative, lymphoma, and a melanoma that comes twice
CASES = 4
SHIFTS = ((0, 2), (1, 2), (-1, 2), (1, 1), (-1, 1))  # voxels, axis


def write(out: Path, layout: str, *, cases: int = CASES, seed: int = SEED, workers: int = 1) -> Path:
    write_cohort(
        out,
        cases=cases,
        layout=layout,  # type: ignore[arg-type]
        seed=seed,
        spacing_mm=SPACING,
        ct_pixel_mm=CT_PIXEL_MM,
        workers=workers,
    )
    return out


def plans() -> list[PlannedStudy]:
    return plan_cohort(CASES, SEED, SPACING)


def rows(out: Path) -> list[dict[str, str]]:
    with (out / TABLE).open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def nifti(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("cohort") / "nifti", "nifti", workers=2)


@pytest.fixture(scope="module")
def tcia(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("cohort") / "tcia", "tcia", cases=3)


@pytest.fixture(scope="module")
def phantoms() -> list[Phantom]:
    return [make_phantom(plan.spec) for plan in plans()]


def study_folder(out: Path, plan: PlannedStudy) -> Path:
    (folder,) = out.glob(f"PETCT_{plan.subject}/{plan.scanned:%m-%d-%Y}-NA-*")
    return folder


def volume(path: Path) -> np.ndarray:
    """[z, y, x]."""
    return np.asanyarray(nib.load(path).dataobj).transpose(2, 1, 0)  # type: ignore[attr-defined]


def test_nifti_holds_the_phantoms_suv_districts_organs_and_lesions(nifti: Path, phantoms: list[Phantom]) -> None:
    for plan, phantom in zip(plans(), phantoms, strict=True):
        folder = study_folder(nifti, plan)
        assert np.array_equal(volume(folder / "SUV.nii.gz"), phantom.suv)
        assert np.array_equal(volume(folder / "DISTRICTS.nii.gz"), phantom.districts)
        assert np.array_equal(volume(folder / "ORGANS.nii.gz"), phantom.organs)
        assert np.array_equal(volume(folder / "SEG.nii.gz"), phantom.lesions > 0)
        activity = volume(folder / "PET.nii.gz")
        assert activity.dtype == np.float32
        assert np.allclose(activity, phantom.suv * activity_per_suv(phantom), rtol=1e-5)
    names = json.loads((nifti / "organs.json").read_text())
    assert [names[str(label)] for label in range(1, len(names) + 1)] == list(phantoms[0].organ_names[1:])


def test_the_affine_puts_a_voxel_where_it_is_in_ras(nifti: Path, phantoms: list[Phantom]) -> None:
    """The bladder lies in front of the spine and the liver on the right side: smaller x, larger y in RAS."""
    grid = phantoms[0].grid
    image = nib.load(study_folder(nifti, plans()[0]) / "SUV.nii.gz")
    assert nib.aff2axcodes(image.affine) == ("L", "P", "S")  # type: ignore[attr-defined]
    index = np.array([3, 5, 7, 1])  # z, y, x
    lps = grid.affine @ index
    assert (image.affine @ [7, 5, 3, 1])[:3] == pytest.approx(lps[:3] * (-1, -1, 1), abs=1e-3)  # type: ignore[attr-defined]
    whole = make_phantom(replace(plans()[0].spec, coverage=(0.0, 1.0)))
    where = {
        name: (ras_affine(whole.grid) @ [*np.argwhere(whole.organ(name)).mean(axis=0)[::-1], 1])[:3]
        for name in ("liver", "spleen", "bladder", "spinal_cord")
    }
    assert where["liver"][0] > where["spleen"][0]  # RAS: x grows to the patient's right
    assert where["bladder"][1] > where["spinal_cord"][1]  # and y to the front


def test_the_ct_is_finer_than_the_pet_in_the_same_slices(nifti: Path) -> None:
    for plan in plans():
        folder = study_folder(nifti, plan)
        ct, pet = nib.load(folder / "CT.nii.gz"), nib.load(folder / "PET.nii.gz")
        assert ct.header.get_zooms() == pytest.approx((CT_PIXEL_MM, CT_PIXEL_MM, SPACING[0]))  # type: ignore[attr-defined]
        assert ct.affine[2] == pytest.approx(pet.affine[2])  # type: ignore[attr-defined]
        edges = [i.affine @ [*(-0.5,) * 3, 1] for i in (ct, pet)]  # type: ignore[attr-defined]
        assert edges[0][:2] == pytest.approx(edges[1][:2], abs=CT_PIXEL_MM)
        hu = volume(folder / "CT.nii.gz")
        assert np.array_equal(hu, np.rint(hu))
        plane = np.asarray(ct.affine)[:3, 3] - np.asarray(pet.affine)[:3, 3]  # type: ignore[attr-defined]
        assert plane[2] == pytest.approx(0, abs=1e-3)


def test_ctres_is_the_ct_at_the_pets_voxels(nifti: Path, phantoms: list[Phantom]) -> None:
    """The phantom painted on the PET's grid differs at edges and by its noise only."""
    for plan, phantom in zip(plans()[:2], phantoms, strict=False):
        resampled = volume(study_folder(nifti, plan) / "CTres.nii.gz")
        assert resampled.shape == phantom.grid.shape
        lung = phantom.organ("lung") if phantom.organ("lung").any() else phantom.organ("fat")
        assert np.median(resampled[lung]) == pytest.approx(np.median(phantom.hu[lung]), abs=15)
        alike = [np.corrcoef(np.roll(resampled, s, axis=a).ravel(), phantom.hu.ravel())[0, 1] for s, a in SHIFTS]
        assert alike[0] > 0.95
        assert abs(alike[1] - alike[2]) < 0.01  # no half voxel to either side
        assert abs(alike[3] - alike[4]) < 0.01


def test_the_table_tells_diagnosis_age_and_sex_with_several_rows_a_study(nifti: Path) -> None:
    table = rows(nifti)
    by_study: dict[str, list[dict[str, str]]] = {}
    for row in table:
        by_study.setdefault(row["Study UID"], []).append(row)
    assert len(by_study) == CASES
    assert {row["Modality"] for row in table} == {"CT", "PT", "SEG"}
    for plan in plans():
        own = [row for row in table if f"{plan.scanned:%m-%d-%Y}-NA" in row["File Location"]]
        assert len(own) >= 3
        assert {row["diagnosis"] for row in own} == {plan.diagnosis.upper()}
        assert {(row["age"], row["sex"]) for row in own} == {(f"{plan.age_years:03d}Y", plan.sex)}
        assert {row["Subject ID"] for row in own} == {f"PETCT_{plan.subject}"}


def test_a_repeat_study_is_of_the_same_person_on_another_day(phantoms: list[Phantom]) -> None:
    first, second = plans()[2:]
    assert (first.subject, first.sex, first.diagnosis) == (second.subject, second.sex, second.diagnosis)
    assert second.scanned > first.scanned
    assert phantoms[2].weight_kg == phantoms[3].weight_kg
    assert phantoms[2].grid.frame_of_reference_uid != phantoms[3].grid.frame_of_reference_uid
    same = replace(first.spec, coverage=(0.4, 0.9), lesions=0)
    again = replace(second.spec, coverage=(0.4, 0.9), lesions=0)
    one, two = make_phantom(same), make_phantom(again)
    volumes = [[(p.organs == label).sum() for label in (1, 2, 12)] for p in (one, two)]
    assert volumes[0] == pytest.approx(volumes[1], rel=0.05)
    assert not np.allclose(one.suv[one.organ("liver")].mean(), two.suv[two.organ("liver")].mean(), rtol=1e-3)
    assert len({plan.subject for plan in plans()}) == 3


def test_negatives_have_no_lesions_and_the_others_have(nifti: Path) -> None:
    for plan in plans():
        lesions = volume(study_folder(nifti, plan) / "SEG.nii.gz")
        assert lesions.any() == (plan.diagnosis != "negative")


def test_half_of_a_large_cohort_is_negative_and_an_eighth_comes_twice() -> None:
    many = plan_cohort(900, 5, SPACING)
    share = {name: count / 900 for name, count in Counter(plan.diagnosis for plan in many).items()}
    assert share["negative"] == pytest.approx(0.5, abs=0.05)
    assert min(share.values()) > 0.1
    visits = Counter(plan.subject for plan in many)
    assert sum(count == 2 for count in visits.values()) / len(visits) == pytest.approx(0.125, abs=0.01)
    assert {plan.spec.fov_mm for plan in many} == {500.0, 600.0}
    assert not {p.subject for p in many} & {p.subject for p in plan_cohort(900, 6, SPACING)}
    assert plan_cohort(30, 5, SPACING) == many[:30]


def test_tcia_holds_ct_pet_and_segs_under_the_collections_names(tcia: Path, phantoms: list[Phantom]) -> None:
    for plan, phantom in zip(plans()[:3], phantoms, strict=False):
        (study,) = tcia.glob(f"manifest-*/FDG-PET-CT-Lesions/PETCT_{plan.subject}/{plan.scanned:%m-%d-%Y}-NA-*")
        found = {folder.name: [dcmread(path) for path in sorted(folder.iterdir())] for folder in study.iterdir()}
        assert study.name[-5:] == next(iter(found.values()))[0].StudyInstanceUID[-5:]
        for name, objects in found.items():
            assert name.endswith(f"-{objects[0].SeriesInstanceUID[-5:]}")
            assert ".000000-" in name
            assert {ds.PatientID for ds in objects} == {f"PETCT_{plan.subject}"}
        series = Counter(objects[0].Modality for objects in found.values())
        assert series == {"CT": 1, "PT": 1, "SEG": 1 if plan.diagnosis == "negative" else 2}
        (pet,) = (objects for objects in found.values() if objects[0].Modality == "PT")
        assert np.abs(suv_of(pet) - phantom.suv).max() < 2e-3 * phantom.suv.max()
        assert (pet[0].PatientSex, pet[0].PatientAge) == (plan.sex, f"{plan.age_years:03d}Y")
        (ct,) = (objects for objects in found.values() if objects[0].Modality == "CT")
        assert [float(v) for v in ct[0].PixelSpacing] == [CT_PIXEL_MM] * 2
        assert ct[0].FrameOfReferenceUID == pet[0].FrameOfReferenceUID


def suv_of(slices: list[FileDataset]) -> np.ndarray:
    """By QIBA's rule for BQML and DecayCorrection START, one hour after injection."""
    slices = sorted(slices, key=lambda ds: float(ds.ImagePositionPatient[2]))
    item = slices[0].RadiopharmaceuticalInformationSequence[0]
    dose = float(item.RadionuclideTotalDose) * 2 ** (-3600 / float(item.RadionuclideHalfLife))
    activity = np.stack([ds.pixel_array * float(ds.RescaleSlope) for ds in slices])
    return np.asarray(activity * float(slices[0].PatientWeight) * 1000 / dose)


def test_the_seg_of_the_lesions_lies_on_the_pets_grid(tcia: Path, phantoms: list[Phantom]) -> None:
    phantom = phantoms[1]
    (path,) = tcia.glob(f"manifest-*/*/PETCT_{plans()[1].subject}/*/5.000000-*/*.dcm")
    seg = dcmread(path)
    assert [s.SegmentLabel for s in seg.SegmentSequence] == ["Lesion"]
    assert (seg.Rows, seg.Columns) == phantom.grid.shape[1:]
    assert seg.pixel_array.sum() == (phantom.lesions > 0).sum()
    heights = {
        round(float(f.PlanePositionSequence[0].ImagePositionPatient[2]), 2)
        for f in seg.PerFrameFunctionalGroupsSequence
    }
    dz, z0 = phantom.grid.spacing_mm[0], phantom.grid.origin_mm[2]
    expected = np.flatnonzero((phantom.lesions > 0).any(axis=(1, 2))) * dz + z0
    assert sorted(heights) == pytest.approx(list(expected), abs=0.02)


def test_nnunet_has_the_ct_on_the_pets_grid_and_names_its_channels(tmp_path: Path, phantoms: list[Phantom]) -> None:
    out = write(tmp_path / "nnunet", "nnunet", cases=2)
    described = json.loads((out / "dataset.json").read_text())
    assert described["channel_names"] == {"0": "CT", "1": "SUV"}
    assert (described["phantom"], described["numTraining"], described["file_ending"]) == (True, 2, ".nii.gz")
    for plan, phantom in zip(plans()[:2], phantoms, strict=False):
        (ct,) = (out / "imagesTr").glob(f"fdg_{plan.subject}_*_0000.nii.gz")
        case = ct.name.removesuffix("_0000.nii.gz")
        assert volume(ct).shape == phantom.grid.shape
        assert volume(ct).min() < -900
        assert np.array_equal(volume(out / "imagesTr" / f"{case}_0001.nii.gz"), phantom.suv)
        assert np.array_equal(volume(out / "labelsTr" / f"{case}.nii.gz"), phantom.lesions > 0)
        assert np.array_equal(volume(out / "districtsTr" / f"{case}.nii.gz"), phantom.districts)
    assert len(list((out / "imagesTr").iterdir())) == 4


def test_every_cohort_says_that_it_was_computed(nifti: Path, tcia: Path) -> None:
    for out in (nifti, tcia):
        assert json.loads((out / "dataset.json").read_text())["phantom"] is True
        assert "not patients" in (out / "README.txt").read_text()


@pytest.mark.parametrize("layout", ["nifti", "tcia"])
def test_the_same_seed_gives_the_same_bytes(layout: str, tmp_path: Path) -> None:
    one, two = (write(tmp_path / name, layout, cases=1, seed=8) for name in ("a", "b"))
    files = [sorted(p.relative_to(out) for p in out.rglob("*") if p.is_file()) for out in (one, two)]
    assert files[0] == files[1]
    assert len(files[0]) > 10
    different = [str(name) for name in files[0] if (one / name).read_bytes() != (two / name).read_bytes()]
    assert different == []


def test_an_interrupted_cohort_goes_on_and_writes_no_study_twice(
    nifti: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, painted = tmp_path / "cohort", []
    paint = cohort_module.paint_study

    def stop_at_the_third(plan: PlannedStudy, ct_pixel_mm: float) -> object:
        painted.append(plan.index)
        if len(painted) == 3:
            raise KeyboardInterrupt
        return paint(plan, ct_pixel_mm)

    monkeypatch.setattr(cohort_module, "paint_study", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        write(out, "nifti")
    assert not (out / "dataset.json").exists()
    lost = study_folder(out, plans()[0])
    (lost / "SUV.nii.gz").rename(tmp_path / "SUV.nii.gz")
    lost.rename(tmp_path / "lost")  # a folder that went missing is written again
    write(out, "nifti")
    assert painted == [0, 1, 2, 0, 2, 3]
    assert read_summary(out).studies == CASES
    for name in ("SUV.nii.gz", "CT.nii.gz"):
        a, b = (gzip.decompress((study_folder(o, plans()[0]) / name).read_bytes()) for o in (out, nifti))
        assert a == b
    assert rows(out) == rows(nifti)


def test_a_folder_with_anything_else_in_it_is_refused(nifti: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"other arguments .*seed 2") as found:
        write(nifti, "nifti", seed=SEED + 1)
    assert found.value.code == "cohort_other"
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="is not empty"):
        write(tmp_path, "nifti")
    with pytest.raises(DataError, match="layout 'bids'") as found:
        write(tmp_path / "new", "bids")
    assert found.value.code == "cohort_arguments"
    assert not (tmp_path / "new").exists()


def test_progress_counts_up_to_all_studies_also_when_all_are_there(nifti: Path) -> None:
    seen: list[tuple[int, int]] = []
    write_cohort(
        nifti,
        cases=CASES,
        layout="nifti",
        seed=SEED,
        spacing_mm=SPACING,
        ct_pixel_mm=CT_PIXEL_MM,
        on_progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(CASES, CASES)]


def test_a_volume_off_its_grid_is_not_written(tmp_path: Path) -> None:
    from training.phantom.nifti import write_nifti

    grid = Grid(shape=(2, 3, 4), spacing_mm=(1, 1, 1), origin_mm=(0, 0, 0), frame_of_reference_uid="1.2")
    with pytest.raises(ValueError, match="does not fit grid"):
        write_nifti(tmp_path / "a.nii.gz", np.zeros((2, 3, 5), np.float32), grid)


def test_a_full_disk_is_one_line_and_a_later_call_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(cohort_module, "paint_study", full)
        with pytest.raises(DataError, match="No space left") as found:
            write(tmp_path / "data", "nifti", cases=1)
    assert found.value.code == "no_space"
    write(tmp_path / "data", "nifti", cases=1)
    assert read_summary(tmp_path / "data").studies == 1
