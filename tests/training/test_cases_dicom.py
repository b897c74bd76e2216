"""DICOM studies: parts found by Modality, chosen by reference and coverage, placed by position; what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import highdicom as hd
import numpy as np
import pydicom
import pytest
from case_tools import copy_series, edit, write_dicom_study
from pydicom import Dataset
from pydicom.sr.codedict import codes

from pipeline.geometry import resample
from pipeline.types import District
from training.cases import find_studies, read_study
from training.cases.segments import kind_of
from training.errors import DataError, StudyError
from training.phantom import Phantom, PhantomSpec, make_phantom
from training.phantom.segments import write_seg


@pytest.fixture(scope="module")
def phantom() -> Phantom:
    return make_phantom(PhantomSpec(seed=5, spacing_mm=(8, 8, 8), lesions=4, coverage=(0.5, 0.62)))


@pytest.fixture(scope="module")
def written(phantom: Phantom, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dicom_study(phantom, tmp_path_factory.mktemp("dicom"))


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "data"))


def refusal(folder: Path) -> tuple[str, str]:
    """Code and text of the one study of `folder`, which must be refused."""
    cohort = find_studies(folder)
    assert cohort.studies == ()
    (refused,) = cohort.refused
    return refused.code, refused.text


def test_a_study_is_read_as_it_was_painted(phantom: Phantom, written: Path) -> None:
    cohort = find_studies(written)
    assert (cohort.layout, cohort.phantom, cohort.refused) == ("tcia", True, ())
    (study,) = cohort.studies
    assert set(study.parts) == {"ct", "pet", "lesions", "districts"}
    read = read_study(study)
    np.testing.assert_allclose(read.hu, np.clip(phantom.hu, -1024, 3071), atol=0.51)
    np.testing.assert_allclose(read.suv, phantom.suv, atol=1e-3 * float(phantom.suv.max()))
    bright = phantom.suv > 1
    np.testing.assert_allclose(read.suv[bright], phantom.suv[bright], rtol=1e-3)
    np.testing.assert_allclose(read.pet_grid.origin_mm, phantom.grid.origin_mm, atol=1e-3)
    assert read.pet_grid.spacing_mm == phantom.grid.spacing_mm
    for name, truth in (("lesions", phantom.lesions > 0), ("districts", phantom.districts)):
        labels = read.labels[name]
        back = resample(labels.labels, labels.grid, read.pet_grid, fill=0, nearest=True)
        np.testing.assert_array_equal(back, truth)
    assert read.suv_details["rule"].startswith("BQML: START")
    assert read.suv_details["delay_s"] == 3600


def test_the_patients_id_is_nowhere_in_what_is_found(phantom: Phantom, written: Path) -> None:
    (study,) = find_studies(written).studies
    text = repr((study.id, study.patient, study.notes))
    assert f"PHANTOM^{phantom.spec.seed}" not in text
    assert len(study.patient) == 12


def test_a_name_in_the_patients_id_is_hashed(folder: Path) -> None:
    for part in "abcd":
        edit(folder / part, lambda ds: setattr(ds, "PatientID", "Mustermann Erika"))
    (study,) = find_studies(folder).studies
    assert "Mustermann" not in study.id
    assert study.id.startswith("study-")


def test_file_names_folders_and_instance_numbers_decide_nothing(written: Path, tmp_path: Path) -> None:
    before = read_study(find_studies(written).studies[0])
    for number, path in enumerate(sorted(written.rglob("*.dcm"), key=lambda p: p.name[::-1])):
        ds = pydicom.dcmread(path)
        ds.InstanceNumber = str(9999 - number)
        ds.save_as(tmp_path / f"IM{number:05d}")  # no suffix, all in one folder
    after = read_study(find_studies(tmp_path).studies[0])
    np.testing.assert_array_equal(before.suv, after.suv)
    np.testing.assert_array_equal(before.hu, after.hu)


def test_a_pet_written_head_first_and_right_to_left_is_turned(phantom: Phantom, folder: Path) -> None:
    def flip(ds: Dataset) -> None:
        x, y, z = (float(v) for v in ds.ImagePositionPatient)
        rows, columns = int(ds.Rows), int(ds.Columns)
        ds.ImagePositionPatient = [x + 8 * (columns - 1), y + 8 * (rows - 1), z]
        ds.ImageOrientationPatient = [-1, 0, 0, 0, -1, 0]
        ds.PixelData = np.ascontiguousarray(ds.pixel_array[::-1, ::-1]).tobytes()

    edit(folder / "b", flip)
    read = read_study(find_studies(folder).studies[0])
    np.testing.assert_allclose(read.suv, phantom.suv, atol=1e-3 * float(phantom.suv.max()))
    np.testing.assert_allclose(read.pet_grid.origin_mm, phantom.grid.origin_mm, atol=1e-3)


def test_every_slice_counts_by_its_own_slope_and_intercept(phantom: Phantom, folder: Path) -> None:
    def rescale(ds: Dataset) -> None:  # the same values by another slope, by slices, and an intercept
        factor = 1 + int(ds.InstanceNumber) % 3
        stored = ds.pixel_array.astype(np.int32) // factor
        ds.RescaleSlope = f"{float(ds.RescaleSlope) * factor:.8g}"
        ds.PixelData = stored.astype("<i2").tobytes()

    edit(folder / "b", rescale)
    read = read_study(find_studies(folder).studies[0])
    np.testing.assert_allclose(read.suv, phantom.suv, atol=1e-3 * float(phantom.suv.max()))


def test_a_study_without_pet_is_refused_by_name(folder: Path) -> None:
    shutil.rmtree(folder / "b")
    assert refusal(folder)[0] == "no_pet"


def test_a_study_without_ct_is_refused_by_name(folder: Path) -> None:
    shutil.rmtree(folder / "a")
    assert refusal(folder)[0] == "no_ct"


def test_localizers_are_no_ct(folder: Path) -> None:
    edit(folder / "a", lambda ds: setattr(ds, "ImageType", ["ORIGINAL", "PRIMARY", "LOCALIZER"]))
    assert refusal(folder)[0] == "no_ct"


def test_two_equal_pets_are_refused(folder: Path) -> None:
    copy_series(folder / "b", folder / "b2", "1.2.3.4")
    code, text = refusal(folder)
    assert code == "two_pets"
    assert "1.2.3.4" in text


def nac(ds: Dataset) -> None:
    ds.CorrectedImage = ["SCAT", "DECY"]


def static(ds: Dataset) -> None:
    ds.SeriesType = ["STATIC", "IMAGE"]


@pytest.mark.parametrize("change", [nac, static])
def test_of_two_pets_the_corrected_whole_body_one_is_taken(folder: Path, change: Callable[[Dataset], None]) -> None:
    copy_series(folder / "b", folder / "a2", "1.2.3.4", change)
    (study,) = find_studies(folder).studies
    assert {path.parent.name for path in study.parts["pet"]} == {"b"}


def test_of_two_pets_the_one_that_reaches_much_further_is_taken(folder: Path) -> None:
    edit(folder / "b", static)
    copy_series(folder / "b", folder / "a2", "1.2.3.4")
    for path in sorted((folder / "a2").glob("*.dcm"))[6:]:
        path.unlink()
    (study,) = find_studies(folder).studies
    assert {path.parent.name for path in study.parts["pet"]} == {"b"}


def test_a_pet_without_attenuation_correction_alone_is_refused(folder: Path) -> None:
    edit(folder / "b", nac)
    assert refusal(folder)[0] == "suv_not_corrected"


@pytest.mark.parametrize(
    ("keyword", "value", "code"),
    [
        ("PatientWeight", "0", "weight_missing"),
        ("PatientWeight", None, "weight_missing"),
        ("Units", "PROPCNTS", "suv_units"),
        ("DecayCorrection", "NONE", "suv_decay"),
        ("RescaleSlope", None, "suv_rescale"),
    ],
)
def test_a_pet_that_no_suv_follows_from_is_refused_before_a_voxel_is_read(
    folder: Path, keyword: str, value: str | None, code: str
) -> None:
    def change(ds: Dataset) -> None:
        if value is None:
            delattr(ds, keyword)
        else:
            setattr(ds, keyword, value)
        del ds.PixelData

    edit(folder / "b", change)
    assert refusal(folder)[0] == code


def test_among_several_cts_the_frame_of_reference_then_the_coverage_decides(folder: Path) -> None:
    copy_series(folder / "a", folder / "elsewhere", "1.2.3.4", lambda ds: setattr(ds, "FrameOfReferenceUID", "1.9"))
    copy_series(folder / "a", folder / "short", "1.2.3.5")
    for path in sorted((folder / "short").glob("*.dcm"))[:5]:
        path.unlink()
    (study,) = find_studies(folder).studies
    assert {path.parent.name for path in study.parts["ct"]} == {"a"}
    assert "CT chosen among 3 series" in study.notes


def test_a_ct_in_another_frame_of_reference_is_refused(folder: Path) -> None:
    edit(folder / "a", lambda ds: setattr(ds, "FrameOfReferenceUID", "1.9"))
    assert refusal(folder)[0] == "ct_elsewhere"


def test_a_series_without_any_frame_of_reference_lies_where_its_pet_lies(folder: Path) -> None:
    for part in "abcd":
        edit(folder / part, lambda ds: ds.pop("FrameOfReferenceUID", None))
    read = read_study(find_studies(folder).studies[0])
    assert read.ct_grid.frame_of_reference_uid == read.pet_grid.frame_of_reference_uid


@pytest.mark.parametrize("part", ["c", "d"])
def test_a_seg_in_another_frame_of_reference_is_refused(folder: Path, part: str) -> None:
    edit(folder / part, lambda ds: setattr(ds, "FrameOfReferenceUID", "1.9"))
    assert refusal(folder)[0] == "seg_elsewhere"


def test_a_seg_on_the_finer_ct_grid_keeps_that_grid(phantom: Phantom, tmp_path: Path) -> None:
    from training.phantom.dicom import write_ct_series, write_pet_series

    ct = write_ct_series(phantom, tmp_path / "ct", matrix=128)
    write_pet_series(phantom, tmp_path / "pet")
    write_seg(phantom, tmp_path / "seg", ct)
    read = read_study(find_studies(tmp_path).studies[0])
    grid = read.labels["districts"].grid
    assert grid.spacing_mm[1:] == pytest.approx(read.ct_grid.spacing_mm[1:], abs=1e-3)
    assert grid.spacing_mm[1] < read.pet_grid.spacing_mm[1]
    assert set(np.unique(read.labels["districts"].labels)) == {0, *np.unique(phantom.districts)}


def write_lesions(
    folder: Path, masks: list[np.ndarray], kind: hd.seg.SegmentationTypeValues, *, pet: Path, uid: str
) -> None:
    """A SEG on the grid of the PET in `pet`, with one lesion segment for each mask [z, y, x]."""
    segments = [
        hd.seg.SegmentDescription(
            segment_number=number,
            segment_label=f"Segment_{number}",
            segmented_property_category=codes.SCT.MorphologicallyAbnormalStructure,
            segmented_property_type=codes.SCT.Neoplasm,
            algorithm_type=hd.seg.SegmentAlgorithmTypeValues.MANUAL,
        )
        for number in range(1, len(masks) + 1)
    ]
    seg = hd.seg.Segmentation(
        source_images=[pydicom.dcmread(path) for path in sorted(pet.glob("*.dcm"))],
        pixel_array=np.stack(masks, axis=-1),
        segmentation_type=kind,
        segment_descriptions=segments,
        series_instance_uid=uid,
        series_number=9,
        sop_instance_uid=f"{uid}.1",
        instance_number=1,
        manufacturer="X",
        manufacturer_model_name="X",
        software_versions="1",
        device_serial_number="1",
    )
    folder.mkdir()
    seg.save_as(folder / "seg.dcm")


@pytest.mark.parametrize("kind", ["BINARY", "FRACTIONAL", "LABELMAP"])
def test_frames_lie_where_they_say_in_every_kind_of_seg(phantom: Phantom, folder: Path, kind: str) -> None:
    shutil.rmtree(folder / "d")
    masks = [np.zeros(phantom.grid.shape, np.uint8) for _ in range(2)]
    masks[0][3, 10, 20] = masks[0][9, 11, 21] = 1  # the empty slices between are left out of the file
    masks[1][4, 30:33, 40] = 1
    given = [mask * 0.8 for mask in masks] if kind == "FRACTIONAL" else masks
    write_lesions(folder / "d", given, hd.seg.SegmentationTypeValues(kind), pet=folder / "b", uid="1.2.3.9")
    read = read_study(find_studies(folder).studies[0])
    lesions = read.labels["lesions"]
    on_pet = resample(lesions.labels, lesions.grid, read.pet_grid, fill=0, nearest=True)
    np.testing.assert_array_equal(on_pet, masks[0] | masks[1])


def test_several_segs_of_lesions_are_united(phantom: Phantom, folder: Path) -> None:
    mask = np.zeros(phantom.grid.shape, np.uint8)
    mask[2:5, 10:12, 20] = 1
    binary = hd.seg.SegmentationTypeValues.BINARY
    write_lesions(folder / "e", [mask], binary, pet=folder / "b", uid="1.2.3.9")
    read = read_study(find_studies(folder).studies[0])
    np.testing.assert_array_equal(read.labels["lesions"].labels, mask | (phantom.lesions > 0))
    assert "lesions: 2 SEG objects united" in read.notes


def test_rounded_positions_of_frames_do_not_bend_the_grid(phantom: Phantom, folder: Path) -> None:
    before = read_study(find_studies(folder).studies[0]).labels["districts"]
    rng = np.random.default_rng(0)

    def jitter(ds: Dataset) -> None:
        for group in ds.PerFrameFunctionalGroupsSequence:
            x, y, z = group.PlanePositionSequence[0].ImagePositionPatient
            group.PlanePositionSequence[0].ImagePositionPatient = [x, y, round(z + rng.uniform(-0.02, 0.02), 3)]

    edit(folder / "c", jitter)
    after = read_study(find_studies(folder).studies[0]).labels["districts"]
    np.testing.assert_array_equal(before.labels, after.labels)
    assert after.grid.spacing_mm[0] == pytest.approx(8, abs=0.01)


def test_a_cut_off_seg_is_refused_when_it_is_read(folder: Path) -> None:
    path = folder / "d" / "seg.dcm"
    path.write_bytes(path.read_bytes()[:-200])
    (study,) = find_studies(folder).studies
    with pytest.raises(StudyError) as caught:
        read_study(study)
    assert caught.value.code == "unreadable"


def test_a_missing_slice_is_refused_before_a_voxel_is_read(folder: Path) -> None:
    for part in ("a", "b"):
        again = folder.parent / f"again-{part}"
        shutil.copytree(folder, again)
        sorted((again / part).glob("*.dcm"))[9].unlink()
        code, text = refusal(again)
        assert code == "missing_slices"
        assert text.startswith({"a": "CT", "b": "PET"}[part])


def test_a_gated_pet_with_two_images_at_one_place_is_refused(folder: Path) -> None:
    first = sorted((folder / "b").glob("*.dcm"))[4]
    ds = pydicom.dcmread(first)
    ds.SOPInstanceUID = "1.2.3.99"
    ds.file_meta.MediaStorageSOPInstanceUID = "1.2.3.99"
    ds.save_as(folder / "b" / "twin.dcm")
    assert refusal(folder)[0] == "duplicate_positions"


def test_an_oblique_pet_is_refused(folder: Path) -> None:
    c, s = np.cos(0.2), np.sin(0.2)
    edit(
        folder / "b",
        lambda ds: setattr(ds, "ImageOrientationPatient", [c.round(6), s.round(6), 0, -s.round(6), c.round(6), 0]),
    )
    assert refusal(folder)[0] == "geometry_oblique"


@pytest.mark.parametrize("keep", [0, 60, 400])
def test_a_file_that_cannot_be_read_refuses_its_study(folder: Path, keep: int) -> None:
    path = sorted((folder / "b").glob("*.dcm"))[3]
    path.write_bytes(path.read_bytes()[:keep])
    code, _ = refusal(folder)
    assert code == "unreadable"


def test_pixels_that_are_cut_off_are_refused_when_they_are_read(folder: Path) -> None:
    path = sorted((folder / "b").glob("*.dcm"))[3]
    path.write_bytes(path.read_bytes()[:-500])
    (study,) = find_studies(folder).studies
    with pytest.raises(StudyError) as caught:
        read_study(study)
    assert caught.value.code == "unreadable"


def test_a_ct_that_the_reader_refuses_is_refused_with_its_reason(folder: Path) -> None:
    path = sorted((folder / "a").glob("*.dcm"))[3]
    path.write_bytes(path.read_bytes()[:-500])
    (study,) = find_studies(folder).studies
    with pytest.raises(StudyError) as caught:
        read_study(study)
    assert caught.value.code == "truncated_pixel_data"
    assert caught.value.text.startswith("CT: ")


def test_an_infinite_suv_is_refused(folder: Path) -> None:
    first = sorted((folder / "b").glob("*.dcm"))[3]
    ds = pydicom.dcmread(first)
    ds.RescaleSlope = "1e38"
    ds.save_as(first)
    (study,) = find_studies(folder).studies
    with pytest.raises(StudyError) as caught, np.errstate(over="ignore"):
        read_study(study)
    assert caught.value.code == "nan_voxels"


def test_other_files_in_the_tree_are_passed_over(folder: Path) -> None:
    (folder / "LICENSE").write_text("CC BY")
    (folder / "a" / "note.txt").write_text("x")
    assert len(find_studies(folder).studies) == 1


def test_the_clinical_table_is_matched_by_study(folder: Path) -> None:
    uid = find_studies_uid(folder)
    (folder / "clinical.csv").write_text(
        f"Subject ID,Study UID,diagnosis,age,sex\nPH-5,1.2.3,MELANOMA,050Y,F\nPH-5,{uid},LYMPHOMA,051Y,F\n"
    )
    (study,) = find_studies(folder).studies
    assert (study.diagnosis, study.age) == ("lymphoma", 51.0)


def find_studies_uid(folder: Path) -> str:
    return str(pydicom.dcmread(next((folder / "a").glob("*.dcm")), specific_tags=["StudyInstanceUID"]).StudyInstanceUID)


def test_progress_reaches_every_file(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    find_studies(folder, lambda done, total: seen.append((done, total)))
    count = len(list(folder.rglob("*.dcm")))
    assert seen[-1] == (count, count)
    assert len(seen) == count


def test_a_tree_of_other_modalities_is_refused(folder: Path) -> None:
    for part in "bcd":
        shutil.rmtree(folder / part)
    edit(folder / "a", lambda ds: setattr(ds, "Modality", "MR"))
    with pytest.raises(DataError) as caught:
        find_studies(folder)
    assert caught.value.code == "data_unknown"


def segment(label: str, kind: hd.sr.CodedConcept | None = None, category: hd.sr.CodedConcept | None = None) -> Dataset:
    ds = Dataset()
    ds.SegmentLabel = label
    for name, code in (("Type", kind), ("Category", category)):
        if code is not None:
            setattr(ds, f"SegmentedProperty{name}CodeSequence", [code])
    return ds


ANATOMY = hd.sr.CodedConcept("91723000", "SCT", "Anatomical Structure")
KINDS = [
    (segment("trunk"), "districts", District.TRUNK),
    (segment("Left arm", category=ANATOMY), "districts", District.ARMS),
    (segment("x", hd.sr.CodedConcept("61685007", "SCT", "Lower limb")), "districts", District.LEGS),
    (segment("x", hd.sr.CodedConcept("T-D8000", "SRT", "Upper limb")), "districts", District.ARMS),
    (segment("RightLeg"), "districts", District.LEGS),
    (segment("upper extremities"), "districts", District.ARMS),
    (segment("x", hd.sr.CodedConcept("51185008", "SCT", "Thorax")), "lesions", None),  # where a lesion lies
    (segment("Lesion"), "lesions", None),
    (segment("Segment_1", hd.sr.CodedConcept("108369006", "SCT", "Neoplasm")), "lesions", None),
    (segment("Tumor, head", category=ANATOMY), "lesions", None),
    (segment("Segment_1"), "lesions", None),
    (segment("Background"), "other", None),
    (segment("Liver", hd.sr.CodedConcept("10200004", "SCT", "Liver"), ANATOMY), "other", None),
]


@pytest.mark.parametrize(("item", "kind", "district"), KINDS)
def test_segments_are_told_apart_by_code_and_label(item: Dataset, kind: str, district: District | None) -> None:
    assert kind_of(item) == (kind, district)


@pytest.mark.parametrize("subject", ["00123456", "A1234567", "pat-1234567", "DECADE"])
def test_a_hospitals_own_number_is_no_pseudonym(folder: Path, subject: str) -> None:
    for part in "abcd":
        edit(folder / part, lambda ds: setattr(ds, "PatientID", subject))
    (study,) = find_studies(folder).studies
    assert subject not in study.id


@pytest.mark.parametrize("declared", ["SpacingBetweenSlices", "nothing"])
def test_single_slices_far_apart_do_not_thicken(phantom: Phantom, folder: Path, declared: str) -> None:
    shutil.rmtree(folder / "d")
    mask = np.zeros(phantom.grid.shape, np.uint8)
    mask[3, 10, 20] = mask[8, 11, 21] = 1  # all that the file holds: two frames, 5 slices apart
    binary = hd.seg.SegmentationTypeValues.BINARY
    write_lesions(folder / "d", [mask], binary, pet=folder / "b", uid="1.2.3.9")

    def forget(ds: Dataset) -> None:
        del ds.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].SpacingBetweenSlices

    if declared == "nothing":
        edit(folder / "d", forget)
    read = read_study(find_studies(folder).studies[0])
    lesions = read.labels["lesions"]
    on_pet = resample(lesions.labels, lesions.grid, read.pet_grid, fill=0, nearest=True)
    np.testing.assert_array_equal(on_pet, mask)


def test_a_seg_that_cannot_be_read_is_not_named_by_its_file(folder: Path) -> None:
    path = (folder / "d" / "seg.dcm").rename(folder / "d" / "MUSTERMANN_ERIKA.dcm")
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(StudyError) as caught:
        read_study(find_studies(folder).studies[0])
    assert caught.value.code == "unreadable"
    assert "MUSTERMANN" not in caught.value.text
