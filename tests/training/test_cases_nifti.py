"""The NIfTI and nnU-Net layouts: what is found, how it is turned, what is refused."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
from case_tools import ORIGIN, SHAPE, SPACING, hounsfield, volume, write_nifti, write_nifti_study

from training.cases import find_studies, read_study
from training.cases.nifti import read_nifti
from training.errors import DataError, StudyError

CASE, STUDY = "PETCT_0a1b2c3d4e", "03-23-2003-NA-PET-CT whole body-11111"
ORDERS = ["".join(signs) for axes in itertools.permutations(("LR", "PA", "SI")) for signs in itertools.product(*axes)]


@pytest.mark.parametrize("axes", ORDERS)
def test_every_voxel_keeps_its_place_whatever_the_order_of_the_axes(tmp_path: Path, axes: str) -> None:
    path = write_nifti(tmp_path / "SUV.nii.gz", volume(), axes=axes)
    array, grid = read_nifti(path, "pet", "1.2.3")
    np.testing.assert_array_equal(array, volume())
    assert (grid.shape, grid.spacing_mm, grid.origin_mm) == (SHAPE, SPACING, ORIGIN)
    # and independently of how the file was written: nibabel's own affine leads from a voxel to the same place
    image = nibabel.load(path)
    index = (1, 2, 3)
    ras = image.affine @ [*index, 1]
    z, y, x = (round((p - o) / s) for p, o, s in zip((ras[2], -ras[1], -ras[0]), ORIGIN[::-1], SPACING, strict=True))
    assert array[z, y, x] == np.asarray(image.dataobj)[index]


def test_a_scaled_file_is_read_with_its_slope(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(np.full((3, 3, 3), 7, np.int16), np.eye(4))
    image.header.set_slope_inter(0.5, -1.0)
    nibabel.save(image, tmp_path / "SUV.nii.gz")
    array, _ = read_nifti(tmp_path / "SUV.nii.gz", "pet", "1.2.3")
    raw = nibabel.load(tmp_path / "SUV.nii.gz")
    np.testing.assert_allclose(array, np.asarray(raw.dataobj).transpose(2, 1, 0))
    assert array.dtype == np.float32


def turned(degrees: float) -> np.ndarray:
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])


def test_an_oblique_volume_is_refused_and_a_rounding_error_is_not(tmp_path: Path) -> None:
    oblique = write_nifti(tmp_path / "a" / "SUV.nii.gz", volume(), turn=turned(10))
    with pytest.raises(StudyError, match=r"10\.00 degrees") as caught:
        read_nifti(oblique, "pet", "1.2.3")
    assert caught.value.code == "geometry_oblique"
    nearly = write_nifti(tmp_path / "b" / "SUV.nii.gz", volume(), turn=turned(0.01))
    np.testing.assert_array_equal(read_nifti(nearly, "pet", "1.2.3")[0], volume())


def test_a_study_is_read_whole_and_the_ct_itself_before_its_resampled_form(tmp_path: Path) -> None:
    write_nifti_study(tmp_path / CASE / STUDY)
    cohort = find_studies(tmp_path)
    assert (cohort.layout, len(cohort.studies), cohort.refused) == ("nifti", 1, ())
    (study,) = cohort.studies
    assert study.id.startswith(CASE)
    read = read_study(study)
    np.testing.assert_array_equal(read.hu, hounsfield())  # CT.nii.gz, not CTres.nii.gz
    np.testing.assert_array_equal(read.suv, volume())
    assert np.argwhere(read.labels["lesions"].labels).tolist() == [[2, 3, 1]]
    assert read.ct_grid == read.pet_grid == read.labels["lesions"].grid
    assert "SUV" in read.suv_details["rule"]


def test_only_a_resampled_ct_is_used_with_a_note(tmp_path: Path) -> None:
    write_nifti_study(tmp_path / CASE / STUDY, without=("CT",))
    (study,) = find_studies(tmp_path).studies
    assert any("CTres" in note for note in study.notes)
    np.testing.assert_array_equal(read_study(study).hu, hounsfield(2))


@pytest.mark.parametrize(
    ("without", "code"),
    [(("SUV", "PET"), "no_pet"), (("SUV",), "suv_missing"), (("CT", "CTres"), "no_ct")],
)
def test_an_incomplete_study_is_refused_by_name(tmp_path: Path, without: tuple[str, ...], code: str) -> None:
    write_nifti_study(tmp_path / "a" / "s1")
    write_nifti_study(tmp_path / "b" / "s1", without=without)
    cohort = find_studies(tmp_path)
    assert len(cohort.studies) == 1
    assert [refused.code for refused in cohort.refused] == [code]


def test_a_file_that_is_no_nifti_is_refused_when_studies_are_looked_for(tmp_path: Path) -> None:
    folder = write_nifti_study(tmp_path / CASE / STUDY)
    (folder / "SUV.nii.gz").write_bytes(b"not gzip at all")
    (refused,) = find_studies(tmp_path).refused
    assert refused.code == "unreadable"
    assert "SUV.nii.gz" in refused.text


def test_a_file_cut_off_in_its_voxels_is_refused_when_it_is_read(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).random((30, 30, 30)).astype(np.float32)
    folder = write_nifti_study(tmp_path / CASE / STUDY, SUV=noise)
    whole = (folder / "SUV.nii.gz").read_bytes()
    (folder / "SUV.nii.gz").write_bytes(whole[: len(whole) * 3 // 4])
    (study,) = find_studies(tmp_path).studies
    with pytest.raises(StudyError) as caught:
        read_study(study)
    assert caught.value.code == "unreadable"


@pytest.mark.parametrize(("name", "value"), [("SUV", np.nan), ("SUV", np.inf), ("CT", np.nan), ("CT", -np.inf)])
def test_nan_and_infinite_voxels_are_refused(tmp_path: Path, name: str, value: float) -> None:
    bad = volume() if name == "SUV" else hounsfield()
    bad[1, 2, 3] = value
    write_nifti_study(tmp_path / CASE / STUDY, **{name: bad})
    (study,) = find_studies(tmp_path).studies
    with pytest.raises(StudyError, match=rf"{name}: 1 of 120 voxels") as caught:
        read_study(study)
    assert caught.value.code == "nan_voxels"


def test_padding_below_air_is_air(tmp_path: Path) -> None:
    padded = hounsfield()
    padded[0, 0, 0] = -3024
    write_nifti_study(tmp_path / CASE / STUDY, CT=padded)
    assert read_study(find_studies(tmp_path).studies[0]).hu.min() == -1024


def test_labels_keep_their_own_grid(tmp_path: Path) -> None:
    folder = write_nifti_study(tmp_path / CASE / STUDY, without=("SEG",))
    fine = np.zeros((12, 10, 8), np.uint8)
    fine[4, 6, 2] = 1
    write_nifti(folder / "SEG.nii.gz", fine, spacing=(2.5, 2.0, 1.5), axes="LAS")
    (study,) = find_studies(tmp_path).studies
    lesions = read_study(study).labels["lesions"]
    assert lesions.grid.spacing_mm == (2.5, 2.0, 1.5)
    assert np.argwhere(lesions.labels).tolist() == [[4, 6, 2]]


def test_a_label_map_that_lies_elsewhere_is_refused(tmp_path: Path) -> None:
    folder = write_nifti_study(tmp_path / CASE / STUDY, without=("SEG",))
    write_nifti(folder / "SEG.nii.gz", np.ones(SHAPE, np.uint8), origin=(-30.0, -20.0, 900.0))
    (study,) = find_studies(tmp_path).studies
    with pytest.raises(StudyError) as caught:
        read_study(study)
    assert caught.value.code == "seg_elsewhere"


def test_ct_and_pet_that_do_not_overlap_are_refused(tmp_path: Path) -> None:
    folder = write_nifti_study(tmp_path / CASE / STUDY, without=("CT",))
    write_nifti(folder / "CT.nii.gz", hounsfield(), origin=(-30.0, -20.0, 900.0))
    (study,) = find_studies(tmp_path).studies
    with pytest.raises(StudyError) as caught:
        read_study(study)
    assert caught.value.code == "no_overlap"


def test_districts_and_organs_are_read_with_their_names(tmp_path: Path) -> None:
    districts, organs = np.full(SHAPE, 2, np.uint8), np.full(SHAPE, 7, np.uint8)
    districts[5] = 1
    write_nifti_study(tmp_path / CASE / STUDY, DISTRICTS=districts, ORGANS=organs)
    (tmp_path / "organs.json").write_text('{"1": "brain", "7": "liver"}')
    cohort = find_studies(tmp_path)
    assert (cohort.organ_names[0], cohort.organ_names[1], cohort.organ_names[7]) == ("none", "brain", "liver")
    read = read_study(cohort.studies[0])
    np.testing.assert_array_equal(read.labels["districts"].labels, districts)
    np.testing.assert_array_equal(read.labels["organs"].labels, organs)


def test_a_district_that_is_none_is_refused(tmp_path: Path) -> None:
    write_nifti_study(tmp_path / CASE / STUDY, DISTRICTS=np.full(SHAPE, 9, np.uint8))
    with pytest.raises(StudyError, match="0 to 4"):
        read_study(find_studies(tmp_path).studies[0])


def test_two_studies_of_a_case_are_of_one_patient_and_have_ids_of_their_own(tmp_path: Path) -> None:
    for case, study in ((CASE, STUDY), (CASE, "01-01-2005-NA-x-22222"), ("PETCT_ffffffffff", STUDY)):
        write_nifti_study(tmp_path / case / study)
    first, second = find_studies(tmp_path), find_studies(tmp_path)
    assert [s.id for s in first.studies] == [s.id for s in second.studies]
    assert len({s.id for s in first.studies}) == 3
    assert len({s.patient for s in first.studies}) == 2


def test_a_case_that_could_be_a_name_is_not_shown(tmp_path: Path) -> None:
    write_nifti_study(tmp_path / "MUSTERMANN^ERIKA" / STUDY)
    (study,) = find_studies(tmp_path).studies
    assert "MUSTERMANN" not in study.id
    assert "ERIKA" not in study.id


def test_the_metadata_table_gives_diagnosis_age_and_sex(tmp_path: Path) -> None:
    write_nifti_study(tmp_path / CASE / STUDY)
    (tmp_path / "Clinical Metadata.csv").write_text(f"Subject ID,diagnosis,age,sex\n{CASE},MELANOMA,055Y,F\n")
    (study,) = find_studies(tmp_path).studies
    assert (study.diagnosis, study.age, study.sex) == ("melanoma", 55.0, "F")


def test_a_table_with_other_columns_stops_the_search(tmp_path: Path) -> None:
    write_nifti_study(tmp_path / CASE / STUDY)
    (tmp_path / "clinical.csv").write_text("Fall,Befund\n1,2\n")
    with pytest.raises(DataError, match="Befund") as caught:
        find_studies(tmp_path)
    assert caught.value.code == "metadata_columns"


def test_progress_counts_every_file(tmp_path: Path) -> None:
    write_nifti_study(tmp_path / CASE / STUDY)
    seen: list[tuple[int, int]] = []
    find_studies(tmp_path, lambda done, total: seen.append((done, total)))
    assert seen == [(n, 5) for n in range(1, 6)]


@pytest.mark.parametrize("what", ["missing", "empty", "other", "file"])
def test_a_folder_without_studies_is_refused(tmp_path: Path, what: str) -> None:
    folder = tmp_path / "data"
    if what != "missing":
        folder.mkdir()
    if what == "other":
        (folder / "notes.txt").write_text("nothing here")
    if what == "file":
        folder = tmp_path / "x.txt"
        folder.write_text("x")
    with pytest.raises(DataError) as caught:
        find_studies(folder)
    assert caught.value.code == ("data_unknown" if what == "other" else "data_missing")


def test_two_layouts_in_one_folder_are_refused(tmp_path: Path) -> None:
    write_nifti_study(tmp_path / CASE / STUDY)
    write_nnunet(tmp_path, "fdg_0a1b2c3d4e_x")
    with pytest.raises(DataError, match="nnunet, nifti"):
        find_studies(tmp_path)


def write_nnunet(root: Path, case: str, *, swapped: bool = False, without: int | None = None) -> None:
    channels = [hounsfield(), volume()]
    for channel, array in enumerate(channels[::-1] if swapped else channels):
        if channel != without:
            write_nifti(root / "imagesTr" / f"{case}_{channel:04d}.nii.gz", array)
    lesions = np.zeros(SHAPE, np.uint8)
    lesions[1, 1, 1] = 1
    write_nifti(root / "labelsTr" / f"{case}.nii.gz", lesions)


def names(root: Path, first: str, second: str, key: str = "channel_names") -> None:
    (root / "dataset.json").write_text(json.dumps({key: {"0": first, "1": second}}))


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("told", ["names", "modality", "voxels", "ambiguous"])
def test_the_ct_channel_is_found_by_name_or_by_its_air(tmp_path: Path, swapped: bool, told: str) -> None:
    write_nnunet(tmp_path, "fdg_0a1b2c3d4e_03-23-2003-NA-PET-CT Ganz-11111", swapped=swapped)
    if told == "names":
        names(tmp_path, *(("SUV", "CT") if swapped else ("CT", "SUV")))
    if told == "modality":
        names(tmp_path, *(("PET", "CT") if swapped else ("CT", "PET")), key="modality")
    if told == "ambiguous":
        names(tmp_path, "CT", "CT")  # as some releases write it, for the normalization
    cohort = find_studies(tmp_path)
    assert cohort.layout == "nnunet"
    (study,) = cohort.studies
    read = read_study(study)
    np.testing.assert_array_equal(read.hu, hounsfield())
    np.testing.assert_array_equal(read.suv, volume())
    assert np.argwhere(read.labels["lesions"].labels).tolist() == [[1, 1, 1]]


def test_a_dataset_json_that_the_voxels_contradict_is_refused(tmp_path: Path) -> None:
    write_nnunet(tmp_path, "fdg_0a1b2c3d4e_x", swapped=True)
    names(tmp_path, "CT", "SUV")
    (study,) = find_studies(tmp_path).studies
    with pytest.raises(StudyError) as caught:
        read_study(study)
    assert caught.value.code == "channels_swapped"


@pytest.mark.parametrize(("without", "code"), [(1, "no_pet"), (0, "no_ct")])
def test_a_case_without_a_channel_is_refused(tmp_path: Path, without: int, code: str) -> None:
    names(tmp_path, "CT", "SUV")
    write_nnunet(tmp_path, "fdg_0a1b2c3d4e_x")
    write_nnunet(tmp_path, "fdg_ffffffffff_x", without=without)
    cohort = find_studies(tmp_path)
    assert len(cohort.studies) == 1
    assert [refused.code for refused in cohort.refused] == [code]


def test_an_nnunet_case_name_holds_the_patient(tmp_path: Path) -> None:
    names(tmp_path, "CT", "SUV")
    for case in ("fdg_0a1b2c3d4e_03-23-2003-a", "fdg_0a1b2c3d4e_05-01-2004-b", "fdg_ffffffffff_03-23-2003-a"):
        write_nnunet(tmp_path, case)
    (tmp_path / "meta.csv").write_text(
        "Subject ID;Study Date;diagnosis\nPETCT_0a1b2c3d4e;2003-03-23;LYMPHOMA\nPETCT_0a1b2c3d4e;2004-05-01;NEGATIVE\n"
    )
    studies = find_studies(tmp_path).studies
    assert len({study.patient for study in studies}) == 2
    assert sorted(study.diagnosis for study in studies) == ["lymphoma", "negative", "unknown"]


def test_studies_that_would_have_one_id_are_refused_by_name(tmp_path: Path) -> None:
    for case in ("a", "b"):
        write_nifti_study(tmp_path / case / "baseline" / "nifti")  # one folder too deep
    write_nifti_study(tmp_path / CASE / STUDY)
    cohort = find_studies(tmp_path)
    assert len(cohort.studies) == 1
    (refused,) = cohort.refused
    assert refused.code == "same_name"
    assert "2 studies" in refused.text


def test_a_table_by_case_does_not_tear_a_patient_apart(tmp_path: Path) -> None:
    names(tmp_path, "CT", "SUV")
    cases = ("fdg_0a1b2c3d4e_03-23-2003-a", "fdg_0a1b2c3d4e_05-01-2004-b", "2023_001", "2023_002")
    for case in cases:
        write_nnunet(tmp_path, case)
    (tmp_path / "meta.csv").write_text("case,diagnosis\n" + "".join(f"{case},MELANOMA\n" for case in cases))
    studies = find_studies(tmp_path).studies
    assert {study.diagnosis for study in studies} == {"melanoma"}
    assert len({study.patient for study in studies}) == 3  # and numbers that only look alike stay two patients
