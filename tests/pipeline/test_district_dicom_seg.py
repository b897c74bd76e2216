"""Districts from a SEG of the study: what is taken, and every way in which one is refused."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from ct_factory import write_ct
from numpy.typing import NDArray
from pydicom import Dataset, dcmread
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code
from pydicom.uid import JPEGLSLossless, RLELossless
from seg_factory import write_seg

from pipeline.ct_reader import read_ct
from pipeline.districts import find_districts
from pipeline.districts.dicom_seg import NAME, district_of, segment
from pipeline.districts.outside import find_body
from pipeline.districts.seg_object import Segment, is_segmentation
from pipeline.errors import DistrictError, SegmenterUnavailable
from pipeline.geometry import grid_at_spacing, resample
from pipeline.outputs.district_seg import encode_district_seg
from pipeline.outputs.pet_series import encode_pet_series
from pipeline.provenance import ResultUids
from pipeline.types import CtVolume, District, DistrictMap, DistrictOptions, OutputOptions, Provenance, SuvVolume
from training.phantom import PhantomSpec, make_phantom

SPACING_MM = (8.0, 8.0, 8.0)
HEAD, TRUNK, ARMS, LEGS = District
CODES = {
    "Head": codes.SCT.Head,
    "Trunk": codes.SCT.Trunk,
    "Left arm": codes.SCT.UpperLimb,
    "Right arm": codes.SCT.UpperLimb,
    "Legs": codes.SCT.LowerLimb,
}
Masks = dict[str, NDArray[np.bool_]]


class Case:
    """A phantom's CT as files and as a volume, and its true districts as masks over the CT's slices."""

    def __init__(self, folder: Path) -> None:
        self.phantom = make_phantom(PhantomSpec(seed=2, spacing_mm=SPACING_MM, pose="sides", coverage=(0.3, 1.02)))
        self.paths = write_ct(folder, self.phantom.hu, spacing_mm=SPACING_MM)
        self.ct: CtVolume = read_ct(self.paths)
        labels = self.phantom.districts
        left = np.arange(labels.shape[2])[None, None, :] >= labels.shape[2] // 2  # LPS: x grows to the left
        self.masks: Masks = {
            "Head": labels == HEAD,
            "Trunk": labels == TRUNK,
            "Left arm": (labels == ARMS) & left,
            "Right arm": (labels == ARMS) & ~left,
            "Legs": labels == LEGS,
        }

    def districts(self, *segs: Path, spacing_mm: tuple[float, float, float] = SPACING_MM) -> DistrictMap:
        grid = grid_at_spacing(self.ct.grid, spacing_mm)
        return segment(self.ct, grid, DistrictOptions(chain=(NAME,), segmentations=segs))

    def refusal(self, *segs: Path) -> SegmenterUnavailable:
        with pytest.raises(SegmenterUnavailable) as caught:
            self.districts(*segs)
        return caught.value


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("ct"))


def seg(case: Case, path: Path, masks: Masks | None = None, **changes: object) -> Path:
    return write_seg(path, case.paths, masks or case.masks, **{"kinds": CODES, **changes})  # type: ignore[arg-type]


def expected(case: Case, found: DistrictMap) -> NDArray[np.bool_]:
    """Voxels that are the phantom's district, among those that are body for both."""
    truth = resample(case.phantom.districts, case.phantom.grid, case.phantom.grid, fill=0, nearest=True)
    both = (truth > 0) & (found.labels > 0)
    return np.asarray((truth == found.labels)[both])


# ---- what is taken


def test_coded_segments_become_districts_and_the_two_arms_one(case: Case, tmp_path: Path) -> None:
    found = case.districts(seg(case, tmp_path / "s.dcm"))
    assert found.present == (HEAD, TRUNK, ARMS, LEGS)
    assert expected(case, found).mean() == 1.0
    assert found.segmenter == "dicom_seg"
    assert all(c > 0.9 for c in found.confidence.values())


def test_every_body_voxel_has_one_district_and_nothing_outside_has(case: Case, tmp_path: Path) -> None:
    found = case.districts(seg(case, tmp_path / "s.dcm"), spacing_mm=(7.0, 9.0, 6.0))
    assert found.labels.shape == found.grid.shape != case.ct.grid.shape
    assert np.array_equal(found.labels > 0, find_body(case.ct, found.grid))


def test_what_the_seg_leaves_out_is_filled_from_the_nearest_and_costs_confidence(case: Case, tmp_path: Path) -> None:
    whole = case.districts(seg(case, tmp_path / "a.dcm"))
    thinned = {**case.masks, "Legs": case.masks["Legs"].copy()}
    thinned["Legs"][:, :, ::4] = False
    found = case.districts(seg(case, tmp_path / "b.dcm", thinned))
    assert np.mean(found.labels == whole.labels) > 0.999
    assert found.confidence[LEGS] == pytest.approx(0.75 * whole.confidence[LEGS], abs=0.1)
    assert found.confidence[HEAD] == whole.confidence[HEAD]
    assert any("got the nearest district" in note for note in found.notes)


@pytest.mark.parametrize(
    ("label", "kind", "district"),
    [
        ("x", Code("T-D1100", "SRT", "Head"), HEAD),
        ("x", Code("T-D8000", "SRT", "Upper extremity"), ARMS),
        ("x", codes.SCT.Thorax, TRUNK),
        ("x", codes.SCT.Foot, LEGS),
        ("Head", None, HEAD),
        ("torso", None, TRUNK),
        ("arm_left", None, ARMS),
        ("LEFT UPPER EXTREMITY", None, ARMS),
        ("Legs", codes.SCT.Tissue, LEGS),
        ("lower limbs", None, LEGS),
        ("Lower-Extremities, both", None, LEGS),
        ("rightArm", None, ARMS),
        ("L leg", None, LEGS),
        ("Head_and_Neck", None, HEAD),
        ("heads", None, None),
        ("head of femur", None, None),
        ("forearm vein", None, None),
        ("body", None, None),
        ("", None, None),
        ("legs", codes.SCT.Head, HEAD),  # the code is asked first
    ],
)
def test_a_segment_is_matched_by_code_then_by_label(label: str, kind: Code | None, district: District | None) -> None:
    assert district_of(Segment(number=1, label=label, kind=kind, algorithm="")) is district


def test_labels_alone_are_enough(case: Case, tmp_path: Path) -> None:
    found = case.districts(seg(case, tmp_path / "s.dcm", kinds={}))
    assert expected(case, found).mean() == 1.0


@pytest.mark.parametrize("transfer_syntax", ["1.2.840.10008.1.2.1", RLELossless, JPEGLSLossless])
def test_a_fractional_seg_counts_from_half_on(transfer_syntax: str, case: Case, tmp_path: Path) -> None:
    path = seg(case, tmp_path / "s.dcm", segmentation_type="FRACTIONAL", transfer_syntax=transfer_syntax)
    assert expected(case, case.districts(path)).mean() == 1.0


def test_a_seg_of_a_ct_that_was_written_from_head_to_foot_and_mirrored_rows(case: Case, tmp_path: Path) -> None:
    z, y, x = case.phantom.grid.shape
    turned = write_ct(
        tmp_path / "ct",
        case.phantom.hu[::-1, ::-1, ::-1],
        spacing_mm=SPACING_MM,
        orientation=(-1, 0, 0, 0, -1, 0),
        origin_mm=((x - 1) * 8.0, (y - 1) * 8.0, -(z - 1) * 8.0 + 500),
        modify=lambda ds, k: setattr(ds, "ImagePositionPatient", [(x - 1) * 8.0, (y - 1) * 8.0, 500 - 8.0 * k]),
    )
    masks = {label: mask[::-1, ::-1, ::-1] for label, mask in case.masks.items()}
    path = write_seg(tmp_path / "s.dcm", turned, masks, kinds=CODES)
    ct = read_ct(turned)
    found = segment(ct, ct.grid, DistrictOptions(segmentations=(path,)))
    assert expected(case, found).mean() == 1.0


def test_our_own_seg_serves_when_another_program_has_stored_it_and_not_before(case: Case, tmp_path: Path) -> None:
    grid = grid_at_spacing(case.ct.grid, (10.0, 10.0, 10.0))
    first = find_districts(case.ct, grid, options=DistrictOptions(chain=("builtin",)))
    provenance = Provenance(
        software_version="1",
        bundle_name="b",
        bundle_version="1",
        bundle_sha256="0" * 64,
        models=(),
        segmenter="builtin",
        segmenter_version="1",
        device="cpu",
    )
    source, output = case.ct.source, OutputOptions()
    given = {
        "source": source,
        "provenance": provenance,
        "options": output,
        "uids": ResultUids(source=source, provenance=provenance, options=output, encoding="sc"),
        "created": datetime(2024, 1, 1, tzinfo=UTC),
    }
    nothing = SuvVolume(suv=np.zeros(grid.shape, dtype=np.float32), grid=grid)
    pet = encode_pet_series(nothing, encoding="sc", **given)
    series = encode_district_seg(first, pet=pet, **given)
    path = tmp_path / "s.dcm"
    path.write_bytes(series.instances[0].data)
    assert case.refusal(path).code == "seg_own"
    ds = dcmread(path)
    ds.Manufacturer = "A viewer"
    ds.save_as(path)
    again = segment(case.ct, grid, DistrictOptions(segmentations=(path,)))
    both = (first.labels > 0) & (again.labels > 0)
    assert np.array_equal(first.labels[both], again.labels[both])
    assert both.sum() > 0.98 * (first.labels > 0).sum()


def test_a_seg_that_was_drawn_on_a_pet_made_of_the_ct_counts_as_one_of_the_ct(case: Case, tmp_path: Path) -> None:
    def drawn_on_the_pet(ds: Dataset) -> None:
        (series,) = ds.ReferencedSeriesSequence
        series.SeriesInstanceUID = "2.25.4711"
        del series.ReferencedInstanceSequence[:]
        ds.pop("SourceImageSequence", None)
        for frame in ds.PerFrameFunctionalGroupsSequence:
            del frame.DerivationImageSequence

    path = seg(case, tmp_path / "s.dcm", modify=drawn_on_the_pet)
    assert case.refusal(path).code == "no_seg"
    options = DistrictOptions(segmentations=(path,), result_series=("2.25.4711",))
    assert expected(case, segment(case.ct, case.ct.grid, options)).mean() == 1.0


def test_the_newest_seg_that_serves_is_taken(case: Case, tmp_path: Path) -> None:
    old = seg(case, tmp_path / "old.dcm", content_date="20240101", content_time="100000")
    new = seg(case, tmp_path / "new.dcm", content_date="20240102", content_time="090000")
    bad = seg(case, tmp_path / "bad.dcm", {"Head": case.masks["Head"]}, content_date="20240103", content_time="080000")
    uid = dcmread(new).SOPInstanceUID
    assert any(uid in note for note in case.districts(old, new).notes)
    assert any(uid in note for note in case.districts(new, bad, old).notes)


def test_another_file_under_the_same_uid_is_another_version(case: Case, tmp_path: Path) -> None:
    first = seg(case, tmp_path / "a.dcm", sop_instance_uid="1.2.3.4")
    swapped = {**case.masks, "Head": case.masks["Legs"], "Legs": case.masks["Head"]}
    second = seg(case, tmp_path / "b.dcm", swapped, sop_instance_uid="1.2.3.4")
    versions = [case.districts(path).version for path in (first, second)]
    assert versions[0] != versions[1]
    assert all(version.endswith("Outliner") for version in versions)


def test_the_chain_goes_on_without_a_seg_and_says_why(case: Case) -> None:
    found = find_districts(case.ct, case.ct.grid, options=DistrictOptions(chain=(NAME, "builtin")))
    assert found.segmenter == "builtin"
    assert found.notes[0] == "dicom_seg: there is no SEG in the study that refers to the CT series"


# ---- what is refused


def test_a_seg_of_another_series_is_not_looked_at(case: Case, tmp_path: Path) -> None:
    other = write_ct(tmp_path / "ct", case.phantom.hu, spacing_mm=SPACING_MM)
    path = write_seg(tmp_path / "s.dcm", other, case.masks, kinds=CODES)
    assert case.refusal(path).code == "no_seg"


def test_a_seg_of_another_frame_of_reference_is_refused(case: Case, tmp_path: Path) -> None:
    path = seg(case, tmp_path / "s.dcm", modify=lambda ds: setattr(ds, "FrameOfReferenceUID", "1.2.3"))
    assert case.refusal(path).code == "seg_frame_of_reference"


def _tilted(ds: Dataset) -> None:
    item = ds.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence[0]
    item.ImageOrientationPatient = [1, 0, 0, 0, 0.9848, 0.1736]


def _sheared(ds: Dataset) -> None:
    for k, frame in enumerate(ds.PerFrameFunctionalGroupsSequence):
        x, y, z = frame.PlanePositionSequence[0].ImagePositionPatient
        frame.PlanePositionSequence[0].ImagePositionPatient = [x, y + k % 7, z]


def _uneven(ds: Dataset) -> None:
    for k, frame in enumerate(ds.PerFrameFunctionalGroupsSequence):
        x, y, z = frame.PlanePositionSequence[0].ImagePositionPatient
        frame.PlanePositionSequence[0].ImagePositionPatient = [x, y, float(z) + 3 * (k % 2)]


def _no_number(ds: Dataset) -> None:
    ds.PerFrameFunctionalGroupsSequence[3].PlanePositionSequence[0].ImagePositionPatient = ["0", "0"]


@pytest.mark.parametrize("wrong", [_tilted, _sheared, _uneven])
def test_a_seg_that_is_not_on_planes_like_the_cts_is_refused(wrong, case: Case, tmp_path: Path) -> None:
    assert case.refusal(seg(case, tmp_path / "s.dcm", modify=wrong)).code == "seg_geometry"


def _elsewhere(ds: Dataset, shift_mm: float) -> None:
    places = {id(item): item for f in ds.PerFrameFunctionalGroupsSequence for item in f.PlanePositionSequence}
    for item in places.values():  # frames of several segments share one
        x, y, z = item.ImagePositionPatient
        item.ImagePositionPatient = [float(x) + shift_mm, y, z]


@pytest.mark.parametrize("shift_mm", [400.0, 1e5])
def test_a_seg_that_lies_elsewhere_is_refused(shift_mm: float, case: Case, tmp_path: Path) -> None:
    path = seg(case, tmp_path / "s.dcm", modify=partial(_elsewhere, shift_mm=shift_mm))
    assert case.refusal(path).code == "seg_coverage"


def test_a_seg_of_half_of_the_body_is_refused_with_the_share(case: Case, tmp_path: Path) -> None:
    upper = {label: mask.copy() for label, mask in case.masks.items()}
    for mask in upper.values():
        mask[: mask.shape[0] // 2] = False
    reason = case.refusal(seg(case, tmp_path / "s.dcm", {k: m for k, m in upper.items() if m.any()}))
    assert reason.code == "seg_coverage"
    assert "% of the body's volume, at least 90% are wanted" in reason.text


def test_a_seg_of_most_of_the_volume_but_not_of_the_length_is_refused(case: Case, tmp_path: Path) -> None:
    """Thin ends hold little volume: without the second rule a head could be left to the trunk."""
    body = case.phantom.districts > 0
    from_the_top = np.cumsum(body.sum(axis=(1, 2))[::-1]) / body.sum()
    cut = len(body) - int(np.argmax(from_the_top > 0.07))
    thinned = {label: mask & (np.arange(len(body)) < cut)[:, None, None] for label, mask in case.masks.items()}
    assert body[cut:].any(axis=(1, 2)).sum() > 0.12 * body.any(axis=(1, 2)).sum()
    reason = case.refusal(seg(case, tmp_path / "s.dcm", {k: m for k, m in thinned.items() if m.any()}))
    assert reason.code == "seg_coverage"
    assert "extent along z" in reason.text


@pytest.mark.parametrize("spacing_mm", [SPACING_MM, (4.0, 4.0, 4.0)])
def test_a_seg_that_lacks_one_arm_is_refused_however_little_of_the_body_it_is(
    spacing_mm: tuple[float, float, float], case: Case, tmp_path: Path
) -> None:
    path = seg(case, tmp_path / "s.dcm", {label: mask for label, mask in case.masks.items() if label != "Left arm"})
    with pytest.raises(SegmenterUnavailable) as caught:
        case.districts(path, spacing_mm=spacing_mm)
    assert caught.value.code == "seg_coverage"
    assert "leaves out a part" in caught.value.text


def test_segments_that_overlap_widely_are_refused(case: Case, tmp_path: Path) -> None:
    both = {**case.masks, "Legs": case.masks["Legs"] | case.masks["Trunk"]}
    reason = case.refusal(seg(case, tmp_path / "s.dcm", both))
    assert reason.code == "seg_overlap"
    assert "% of the body" in reason.text


def test_in_a_sliver_of_overlap_the_first_segment_counts(case: Case, tmp_path: Path) -> None:
    trunk = case.masks["Trunk"]
    sliver = np.zeros_like(trunk)
    sliver[tuple(np.argwhere(trunk)[::200].T)] = True
    both = {**case.masks, "Legs": case.masks["Legs"] | sliver}
    found = case.districts(seg(case, tmp_path / "s.dcm", both))
    assert expected(case, found).mean() == 1.0
    assert any("the first segment counts" in note for note in found.notes)


def test_parts_of_one_district_may_overlap(case: Case, tmp_path: Path) -> None:
    both = {**case.masks, "Hand": case.masks["Left arm"]}
    kinds = {**CODES, "Hand": codes.SCT.Hand}
    assert expected(case, case.districts(seg(case, tmp_path / "s.dcm", both, kinds=kinds))).mean() == 1.0


def test_a_seg_of_organs_is_no_district(case: Case, tmp_path: Path) -> None:
    reason = case.refusal(seg(case, tmp_path / "s.dcm", {"Liver": case.masks["Trunk"]}, kinds={}))
    assert reason.code == "seg_no_districts"


def _undeclared(ds: Dataset) -> None:
    ds.PerFrameFunctionalGroupsSequence[0].SegmentIdentificationSequence[0].ReferencedSegmentNumber = 99


def _no_segments(ds: Dataset) -> None:
    del ds.SegmentSequence


def _no_frames(ds: Dataset) -> None:
    del ds.PerFrameFunctionalGroupsSequence


def _short_pixels(ds: Dataset) -> None:
    ds.PixelData = ds.PixelData[:100]


def _too_few_headers(ds: Dataset) -> None:
    ds.NumberOfFrames = int(ds.NumberOfFrames) + 5


def _strange_type(ds: Dataset) -> None:
    ds.SegmentationType = "LABELMAP"


@pytest.mark.parametrize(
    "wrong", [_undeclared, _no_segments, _no_frames, _short_pixels, _too_few_headers, _strange_type, _no_number]
)
def test_a_broken_seg_is_refused_and_does_not_end_the_job(wrong, case: Case, tmp_path: Path) -> None:
    reason = case.refusal(seg(case, tmp_path / "s.dcm", modify=wrong))
    assert reason.code in {"seg_unreadable", "seg_geometry"}


def test_a_seg_of_absurd_size_is_refused_before_memory_is_taken(case: Case, tmp_path: Path) -> None:
    def far_apart(ds: Dataset) -> None:
        x, y, _ = ds.PerFrameFunctionalGroupsSequence[0].PlanePositionSequence[0].ImagePositionPatient
        ds.PerFrameFunctionalGroupsSequence[0].PlanePositionSequence[0].ImagePositionPatient = [x, y, 8.0e6]

    assert case.refusal(seg(case, tmp_path / "s.dcm", modify=far_apart)).code == "seg_too_large"


def test_a_file_that_is_no_seg_is_refused(case: Case, tmp_path: Path) -> None:
    junk = tmp_path / "junk.dcm"
    junk.write_bytes(b"\0" * 128 + b"DICM" + bytes(range(256)))
    assert case.refusal(junk).code == "seg_unreadable"
    assert case.refusal(case.paths[0]).code == "seg_unreadable"
    assert not is_segmentation(junk)
    assert not is_segmentation(case.paths[0])
    assert is_segmentation(seg(case, tmp_path / "s.dcm"))


def test_no_body_is_no_matter_of_the_seg(case: Case, tmp_path: Path) -> None:
    air = replace(case.ct, hu=np.full_like(case.ct.hu, -1000.0))
    with pytest.raises(DistrictError) as caught:
        segment(air, air.grid, DistrictOptions(segmentations=(seg(case, tmp_path / "s.dcm"),)))
    assert caught.value.code == "no_body"
    assert not isinstance(caught.value, SegmenterUnavailable)
