"""The segmenter `totalsegmentator`: the rule on made label maps, and the seams with a recorded stand-in package.

The stand-in (`tests/recorded_totalsegmentator`) has the package's own function signature and gives label maps that a
test has put beside it; it notes what it found of configuration and environment when it was imported.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from pydicom import Dataset
from scipy import ndimage

from pipeline.ct_reader import choose_ct, read_ct
from pipeline.districts import find_districts
from pipeline.districts.outside import find_body, nearest_filled
from pipeline.districts.totalsegmentator import (
    choose_variant,
    default_weights,
    from_nifti,
    nifti_affine,
    offline,
)
from pipeline.districts.totalsegmentator_rule import combined, head_border
from pipeline.errors import SegmenterUnavailable
from pipeline.types import CtVolume, District, DistrictOptions, Grid, LabelVolume, SourceSeries

STAND_IN = Path(__file__).parent.parent / "recorded_totalsegmentator"
SOURCE = SourceSeries(
    study_uid="1.2", series_uid="1.2.3", header=Dataset(), instances=(), earliest_acquisition=("", "")
)
GRID = Grid(
    shape=(60, 30, 60), spacing_mm=(8.0, 5.0, 5.0), origin_mm=(-250.0, 40.0, 100.0), frame_of_reference_uid="1.9"
)
SKULL, C4, T6, L3, HIP, HUMERUS, FEMUR, LIVER = 91, 47, 38, 29, 77, 69, 75, 5
TRUNK, EXTREMITIES = 1, 2


def person(*, arms: str = "sides") -> tuple[LabelVolume, LabelVolume, LabelVolume]:
    """Label maps of `total` and `body`, and the districts: a person of blocks, legs at the lowest slices.

    The arms hang down beside the trunk, with the hands on the thighs ("sides"), or go up ("raised"); only the
    humerus of an arm and the femur of a leg are bones that `total` knows.
    """
    total, body, truth = (np.zeros(GRID.shape, dtype=np.uint8) for _ in range(3))

    def part(z: tuple[int, int], x: tuple[int, int], where: int, district: District) -> None:
        box = slice(*z), slice(8, 22), slice(*x)
        body[box], truth[box] = where, district

    def bone(z: tuple[int, int], x: tuple[int, int], label: int) -> None:
        total[slice(*z), 13:17, slice(*x)] = label

    part((0, 22), (20, 29), EXTREMITIES, District.LEGS)
    part((0, 22), (31, 40), EXTREMITIES, District.LEGS)
    part((22, 46), (18, 42), TRUNK, District.TRUNK)
    part((46, 58), (24, 36), TRUNK, District.HEAD)
    reach = (18, 46) if arms == "sides" else (40, 60)
    for x in ((11, 18), (42, 49)):
        part(reach, x, EXTREMITIES, District.ARMS)
        middle = (x[0] + 2, x[0] + 5)
        bone((34, 44) if arms == "sides" else (41, 50), middle, HUMERUS)
    if arms == "sides":  # fingers that touch the thigh
        body[19, 15, 18:20] = EXTREMITIES
    for x in ((23, 26), (34, 37)):
        bone((6, 24), x, FEMUR)
    bone((47, 50), (28, 32), C4)
    bone((52, 56), (26, 34), SKULL)
    bone((34, 45), (28, 32), T6)
    bone((27, 33), (28, 32), L3)
    bone((22, 26), (20, 40), HIP)
    bone((30, 32), (20, 26), LIVER)
    return total, body, truth


def districts_of(total: LabelVolume, body: LabelVolume) -> LabelVolume:
    return combined(total, body, GRID.spacing_mm)


@pytest.mark.parametrize("arms", ["sides", "raised"])
def test_trunk_and_extremities_become_four_districts_by_their_bones(arms: str) -> None:
    total, body, truth = person(arms=arms)
    labels = districts_of(total, body)
    wrong = (truth > 0) & (labels != truth)
    assert np.array_equal(labels > 0, (truth > 0) | (body > 0))
    assert wrong.mean() < 0.001


def test_a_hand_that_lies_on_a_thigh_stays_arm() -> None:
    total, body, truth = person()
    body[18:21, 12:18, 18:20] = EXTREMITIES  # 30 x 24 mm of skin on skin
    labels = districts_of(total, body)
    arms = truth == District.ARMS
    assert (labels[arms] == District.ARMS).mean() > 0.99
    assert (labels[truth == District.LEGS] == District.LEGS).mean() > 0.99


def test_the_head_begins_where_cervical_vertebrae_part_from_thoracic_ones() -> None:
    total, body, _ = person()
    labels = districts_of(total, body)
    head = np.flatnonzero((labels == District.HEAD).any(axis=(1, 2)))
    assert (head[0], head[-1]) == (46, 57)  # half-way between T6's end (44) and C4's begin (47)


def test_without_bones_of_the_head_there_is_no_head_and_without_any_of_the_trunk_nothing_else() -> None:
    some, none = np.zeros((6, 2, 2), bool), np.zeros((6, 2, 2), bool)
    some[2:4] = True
    assert head_border(none, some) == 6
    assert head_border(some, none) == 0
    assert head_border(none, none) == 6
    assert head_border(some, np.roll(some, 2, 0)) != 0  # upside down: as little wrong as can be


def test_a_head_of_a_humerus_within_the_trunk_is_arm_and_a_head_of_a_femur_there_is_trunk() -> None:
    total, body, _ = person()
    total[40:42, 13:17, 38:42], total[22:24, 13:17, 23:26] = HUMERUS, FEMUR
    labels = districts_of(total, body)
    assert set(np.unique(labels[40:42, 13:17, 38:42])) == {District.ARMS}
    assert set(np.unique(labels[22:24, 13:17, 23:26])) == {District.TRUNK}


def test_limbs_without_a_known_bone_are_legs_below_the_trunk_and_arms_beside_it() -> None:
    total, body, truth = person()
    total[np.isin(total, (HUMERUS, FEMUR))] = 0
    body[19, 15, 18:20] = 0
    labels = districts_of(total, body)
    limbs = np.isin(truth, (District.ARMS, District.LEGS))
    assert (labels[limbs] == truth[limbs]).mean() > 0.99


def test_a_scan_of_legs_alone_is_legs() -> None:
    total, body, _ = person()
    labels = districts_of(total[:18] * 0, body[:18])
    assert set(np.unique(labels)) == {0, District.LEGS}


def test_where_body_says_nothing_the_organs_speak() -> None:
    total, body, truth = person()
    labels = districts_of(total, body * 0)
    assert np.array_equal(labels > 0, total > 0)
    organs = np.isin(total, (SKULL, C4, T6, L3, LIVER, HIP, HUMERUS))
    assert np.array_equal(labels[organs], truth[organs])


def test_nothing_gives_nothing() -> None:
    empty = np.zeros(GRID.shape, dtype=np.uint8)
    assert not districts_of(empty, empty).any()


def write_weights(folder: Path, *numbers: int) -> Path:
    for number in numbers:
        (folder / f"Dataset{number}_x" / "nnUNetTrainer__nnUNetPlans__3d_fullres" / "fold_0").mkdir(parents=True)
    return folder


@pytest.mark.parametrize(
    ("numbers", "fast"),
    [((297, 300), (True, True)), ((291, 292, 293, 294, 295, 299), (False, False)), ((297, 299), (True, False))],
)
def test_the_variant_follows_from_the_weights(
    tmp_path: Path, numbers: tuple[int, ...], fast: tuple[bool, bool]
) -> None:
    weights = write_weights(tmp_path, *numbers)
    assert (choose_variant(weights, "total"), choose_variant(weights, "body")) == fast


def test_missing_weights_are_named_and_nothing_is_run(tmp_path: Path) -> None:
    weights = write_weights(tmp_path, 291, 292, 300)
    with pytest.raises(SegmenterUnavailable, match=r"segmenter_weights_missing: .*task total: Dataset297 \(or"):
        choose_variant(weights, "total")


def test_weights_are_looked_for_where_totalsegmentator_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("TOTALSEG_WEIGHTS_PATH", "TOTALSEG_HOME_DIR"):
        monkeypatch.delenv(name, raising=False)
    assert default_weights() == Path.home() / ".totalsegmentator" / "nnunet" / "results"
    monkeypatch.setenv("TOTALSEG_HOME_DIR", str(tmp_path))
    assert default_weights() == tmp_path / "nnunet" / "results"
    monkeypatch.setenv("TOTALSEG_WEIGHTS_PATH", str(tmp_path / "w"))
    assert default_weights() == tmp_path / "w"


def test_no_proxy_of_the_node_leads_the_segmenter_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = offline(tmp_path)
    assert {found[f"{s}_proxy"] for s in ("http", "https", "all")} == {"http://127.0.0.1:9"}
    assert found["HTTPS_PROXY"] == found["https_proxy"]
    assert found["NO_PROXY"] == ""


def test_a_nifti_s_affine_gives_ras_positions() -> None:
    first, last = nifti_affine(GRID) @ (0, 0, 0, 1), nifti_affine(GRID) @ (59, 29, 59, 1)
    assert tuple(first[:3]) == (250.0, -40.0, 100.0)
    assert tuple(last[:3]) == (250.0 - 59 * 5, -40.0 - 29 * 5, 100.0 + 59 * 8)


def test_labels_that_lie_elsewhere_are_refused() -> None:
    labels = np.arange(24).reshape(2, 3, 4)
    assert from_nifti(labels, np.eye(4), np.eye(4), "body")[3, 2, 1] == labels[1, 2, 3]
    with pytest.raises(SegmenterUnavailable, match="segmenter_bad_labels: its task body"):
        from_nifti(labels, np.diag([-1.0, 1, 1, 1]), np.eye(4), "body")


def ct(body: LabelVolume) -> CtVolume:
    hu = np.where(body > 0, 30.0, -1000.0).astype(np.float32)
    return CtVolume(hu=hu, grid=GRID, source=SOURCE)


def options(weights: Path) -> DistrictOptions:
    return DistrictOptions(
        chain=("totalsegmentator", "builtin"), totalsegmentator_weights=weights, device="cpu", threads=1
    )


def record(folder: Path, **maps: np.ndarray) -> Path:
    """Weights with the label maps that the stand-in will give."""
    for name, labels in maps.items():
        np.save(folder / f"{name}.npy", labels)
    return write_weights(folder, 297, 300)


def test_the_segmenter_runs_both_tasks_offline_with_statistics_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(STAND_IN)
    total, body, truth = person(arms="raised")
    result = find_districts(ct(body), GRID, options=options(record(tmp_path, total=total, body=body)))
    inside = (result.labels > 0) & (truth > 0)
    assert (result.segmenter, result.version) == ("totalsegmentator", "2.18.0 total-fast body-fast")
    assert np.mean(result.labels[inside] == truth[inside]) > 0.97
    assert result.present == tuple(District)
    noted = json.loads((tmp_path / "noted.json").read_text(encoding="utf-8"))
    assert noted["at_import"]["send_usage_stats"] is False
    assert noted["at_import"]["home"] != str(Path.home() / ".totalsegmentator")
    assert (noted["weights"], noted["proxy"]) == (str(tmp_path), "http://127.0.0.1:9")
    assert noted["calls"] == [["total", True, "cpu"], ["body", True, "cpu"]]
    assert not Path(noted["at_import"]["home"]).exists()


@pytest.mark.parametrize(
    ("task", "value", "reason"),
    [("total", 118, "label 118"), ("body", 3, "label 3, declared are [1, 2]"), ("body", None, "gave")],
)
def test_labels_that_the_tasks_do_not_have_make_way_for_the_next_segmenter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str, value: int | None, reason: str
) -> None:
    monkeypatch.syspath_prepend(STAND_IN)
    total, body, _ = person()
    maps = {"total": total.copy(), "body": body.copy()}
    if value is None:
        maps[task] = maps[task][1:]  # a slice too few
    else:
        maps[task][30, 15, 30] = value
    result = find_districts(ct(body), GRID, options=options(record(tmp_path, **maps)))
    assert result.segmenter == "builtin"
    assert result.notes[0].startswith("totalsegmentator: it gave")
    assert reason in result.notes[0]


def test_a_package_that_is_not_installed_makes_way_for_the_next_segmenter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    _, body, _ = person()
    result = find_districts(ct(body), GRID, options=options(write_weights(tmp_path, 297, 300)))
    assert result.segmenter == "builtin"
    assert result.notes[0] == (
        "totalsegmentator: the package totalsegmentator is not installed (pip install '.[totalsegmentator]')"
    )


VERTEBRAE, HUMERI, RIBS = range(26, 51), (69, 70), range(92, 116)


@pytest.mark.realdata
def test_the_rule_on_the_recorded_117_classes_of_a_real_series(real_data: Path) -> None:
    import SimpleITK as sitk

    volume = read_ct(choose_ct(real_data / "ct-arms-jpeg2000"))
    image = sitk.ReadImage(str(real_data / "ct-arms-jpeg2000-labels117.nii.gz"))
    total = sitk.GetArrayFromImage(sitk.DICOMOrient(image, "LPS")).astype(np.uint8)
    mask = find_body(volume, volume.grid)
    parts = np.stack([largest_first(plane) for plane in mask])  # as `body` gives it: trunk, and the arms beside it
    labels = nearest_filled(combined(total, parts, volume.grid.spacing_mm), mask, volume.grid.spacing_mm)
    assert set(np.unique(labels)) == {0, District.TRUNK, District.ARMS}
    assert np.mean(labels[np.isin(total, HUMERI) & mask] == District.ARMS) >= 0.95
    assert np.mean(labels[np.isin(total, (*VERTEBRAE, *RIBS)) & mask] == District.TRUNK) >= 0.95


def largest_first(plane: np.ndarray) -> np.ndarray:
    """1 in the largest part of a slice, 2 in the others."""
    parts, _ = ndimage.label(plane)
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    return np.where(parts == sizes.argmax(), TRUNK, np.where(plane, EXTREMITIES, 0)).astype(np.uint8)
