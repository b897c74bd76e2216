"""The segmenter `nnunet_folder` with a real, tiny nnU-Net v2 model, through nnU-Net's own predictor."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from pydicom import Dataset
from scipy import ndimage
from tiny_nnunet import LABEL_HU, MOOSE_LABELS, write_model

from pipeline.districts import find_districts
from pipeline.districts.nnunet_folder import by_district, districts_by_name, read_model, turned
from pipeline.districts.nnunet_predict import mean_softmax, predict
from pipeline.errors import SegmenterUnavailable
from pipeline.types import CtVolume, District, DistrictOptions, Grid, SourceSeries

SOURCE = SourceSeries(
    study_uid="1.2", series_uid="1.2.3", header=Dataset(), instances=(), earliest_acquisition=("", "")
)
SPACING_MM = (6.0, 4.0, 5.0)
GRID = Grid(shape=(36, 34, 40), spacing_mm=SPACING_MM, origin_mm=(-90.0, 12.5, 700.0), frame_of_reference_uid="1.9")
HU = dict(zip(("air", "legs", "body", "head", "arms"), LABEL_HU, strict=True))


def ct() -> CtVolume:
    """A person of blocks, off the middle of an anisotropic field, with one arm: on the left and to the front."""
    hu = np.full(GRID.shape, HU["air"], dtype=np.float32)
    hu[2:12, 10:24, 6:28] = HU["legs"]
    hu[12:24, 10:24, 6:28] = HU["body"]
    hu[24:33, 12:22, 11:23] = HU["head"]
    hu[12:24, 10:17, 28:34] = HU["arms"]
    return CtVolume(hu=hu, grid=GRID, source=SOURCE)


def truth(volume: CtVolume) -> np.ndarray:
    districts = {"legs": District.LEGS, "body": District.TRUNK, "head": District.HEAD, "arms": District.ARMS}
    labels = np.zeros(GRID.shape, dtype=np.uint8)
    for name, district in districts.items():
        labels[volume.hu == HU[name]] = district
    return labels


def options(folder: Path | None, **others: Any) -> DistrictOptions:
    return DistrictOptions(chain=("nnunet_folder", "builtin"), nnunet_folder=folder, device="cpu", threads=1, **others)


def predicted(folder: Path, volume: CtVolume) -> tuple[np.ndarray, dict[str, Any]]:
    """The work of the segmenter's process, done in this one."""
    model = read_model(folder)
    settings = {
        "folder": str(model.folder),
        "checkpoints": [str(path) for path in model.checkpoints],
        "orientation": model.orientation,
        "device": "cpu",
    }
    maps, facts = predict(volume.hu, volume.grid, settings)
    return maps["labels"], facts


def test_a_model_folder_labels_every_voxel_of_the_body(tmp_path: Path) -> None:
    write_model(tmp_path, spacing_mm=SPACING_MM)
    volume = ct()
    result = find_districts(volume, GRID, options=options(tmp_path / "Dataset001_body"))
    body = result.labels > 0
    expected = truth(volume)
    assert (result.segmenter, result.present) == ("nnunet_folder", tuple(District))
    assert np.array_equal(result.labels[body & (expected > 0)], expected[body & (expected > 0)])
    assert (body & (expected > 0)).sum() > 0.85 * (expected > 0).sum()  # the body mask rounds corners off
    assert {d: c for d, c in result.confidence.items() if c <= 0.8} == {}  # less what was filled at the rim
    assert result.version.startswith("Dataset001_body nnUNetPlans 3d_fullres ")
    assert len(result.version) <= 64  # SoftwareVersions is LO
    assert not any("builtin" in note for note in result.notes)


def test_a_model_of_another_spacing_gives_the_same_districts_away_from_borders(tmp_path: Path) -> None:
    model = write_model(tmp_path, spacing_mm=(4.0, 6.0, 6.0))
    labels, _ = predicted(model, ct())
    found = np.zeros(GRID.shape, dtype=np.uint8)
    for value, district in read_model(model).districts.items():
        found[labels == value] = district
    expected = truth(ct())
    deep = ndimage.minimum_filter(expected, 5) == ndimage.maximum_filter(expected, 5)  # HU between two labels' are none
    assert set(np.unique(expected[deep])) == {0, *District}
    assert np.array_equal(found[deep], expected[deep])


@pytest.mark.parametrize(
    ("reader", "file_ending", "seen"),
    [
        ("NibabelIOWithReorient", ".nii.gz", "RAS"),
        ("SimpleITKIO", ".nii.gz", "LAS"),
        ("NibabelIO", ".nii.gz", "LAS"),
        ("SimpleITKIO", ".mha", "LPS"),
    ],
)
def test_the_network_sees_the_orientation_of_its_training_files(
    tmp_path: Path, reader: str, file_ending: str, seen: str
) -> None:
    model = write_model(tmp_path, spacing_mm=SPACING_MM, reader=reader, tap=(2, 2, 2))  # looks up, and on in y and x
    dataset = json.loads((model / "dataset.json").read_text(encoding="utf-8"))
    (model / "dataset.json").write_text(json.dumps({**dataset, "file_ending": file_ending}), encoding="utf-8")
    labels, _ = predicted(model, ct())
    dy, dx = -1 if seen[1] == "A" else 1, -1 if seen[0] == "R" else 1
    expected = np.zeros(GRID.shape, dtype=np.uint8)
    for value, hu in enumerate(LABEL_HU):
        expected[np.roll(ct().hu, (-1, -dy, -dx), (0, 1, 2)) == hu] = value
    inner = (slice(1, -1),) * 3
    assert read_model(model).orientation == seen
    assert np.array_equal(labels[inner], expected[inner])


def test_turning_round_twice_is_turning_back() -> None:
    volume = np.arange(24).reshape(2, 3, 4)
    assert np.array_equal(turned(turned(volume, "RAS"), "RAS"), volume)
    assert turned(volume, "LAS")[0, 0, 0] == volume[0, 2, 0]
    assert turned(volume, "RAS")[0, 0, 0] == volume[0, 2, 3]
    assert np.array_equal(turned(volume, "LPS"), volume)


def test_the_version_follows_the_weights(tmp_path: Path) -> None:
    one = write_model(tmp_path / "1", spacing_mm=SPACING_MM)
    other = write_model(tmp_path / "2", spacing_mm=SPACING_MM, tap=(0, 1, 1))
    assert predicted(one, ct())[1]["sha256"] != predicted(other, ct())[1]["sha256"]


def test_a_second_fold_is_averaged_in(tmp_path: Path) -> None:
    model = write_model(tmp_path / "1", spacing_mm=SPACING_MM)
    other = write_model(tmp_path / "2", spacing_mm=SPACING_MM, tap=(0, 1, 1))
    (other / "fold_0").rename(model / "fold_1")
    labels, facts = predicted(model, ct())
    alone, fact = predicted(write_model(tmp_path / "3", spacing_mm=SPACING_MM), ct())
    assert len(read_model(model).checkpoints) == 2
    assert facts["sha256"] != fact["sha256"]
    assert 0 < (labels != alone).mean() < 0.1  # at the borders between slices


def test_certainty_is_the_mean_softmax_of_the_label_that_won() -> None:
    logits = torch.full((3, 2, 1, 2), -100.0)
    logits[0, 0], logits[1, 1] = 100.0, 0.0
    logits[2, 1, 0, 1] = 0.0
    logits[1, 1, 0, 1] = 1.0
    expected = (1.0 + np.e / (np.e + 1)) / 2
    assert mean_softmax(logits) == {"0": pytest.approx(1.0), "1": pytest.approx(expected)}
    assert by_district({"1": 0.9, "2": 0.7}, {1: District.ARMS, 2: District.ARMS, 3: District.HEAD}) == {
        District.ARMS: 0.7
    }


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (MOOSE_LABELS, {1: District.LEGS, 2: District.TRUNK, 3: District.HEAD, 4: District.ARMS}),
        ({"background": 0, "Torso": 1, "ignore": 2}, {1: District.TRUNK}),
        (
            {"background": 0, "arm_left": 1, "right-arm": 2, "Leg L": 3, "leg_r": 4},
            {1: District.ARMS, 2: District.ARMS, 3: District.LEGS, 4: District.LEGS},
        ),
    ],
)
def test_labels_are_matched_by_their_names(labels: dict[str, int], expected: dict[int, District]) -> None:
    assert districts_by_name(labels, Path("model")) == expected


@pytest.mark.parametrize(
    ("labels", "named"),
    [
        ({"background": 0, "body": 1, "tail": 2}, "'tail'"),
        ({"background": 0, "body_fat": 1}, "'body_fat'"),
        ({"background": 0, "body": [1, 2]}, "region"),
        ({"background": 0}, "no labels"),
    ],
)
def test_labels_that_are_no_districts_are_refused_by_name(labels: dict[str, Any], named: str) -> None:
    with pytest.raises(SegmenterUnavailable, match=f"segmenter_bad_model: .*{named}"):
        districts_by_name(labels, Path("model"))


def test_without_a_model_folder_the_next_segmenter_is_tried_and_the_reason_kept() -> None:
    result = find_districts(ct(), GRID, options=options(None))
    assert result.segmenter == "builtin"
    assert result.notes[0] == "nnunet_folder: no model folder is set (pipeline.nnunet_folder)"


def test_a_model_that_is_too_slow_is_ended_and_the_next_segmenter_tried(tmp_path: Path) -> None:
    write_model(tmp_path, spacing_mm=SPACING_MM)
    result = find_districts(ct(), GRID, options=options(tmp_path / "Dataset001_body", timeout_s=0.1))
    assert result.segmenter == "builtin"
    assert "did not end within 0.1 s" in result.notes[0]


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda m: (m / "dataset.json").unlink(), "no dataset.json"),
        (lambda m: (m / "plans.json").write_text("{", encoding="utf-8"), "plans.json cannot be read"),
        (lambda m: (m / "plans.json").write_text("[]", encoding="utf-8"), "plans.json is no JSON object"),
        (lambda m: (m / "fold_0" / "checkpoint_final.pth").unlink(), "no fold_"),
        (lambda m: change(m, "plans.json", image_reader_writer="Tiff3DIO"), "'Tiff3DIO' is not known"),
        (lambda m: change(m, "dataset.json", channel_names={"0": "CT", "1": "PET"}), "2 input channels"),
    ],
)
def test_a_folder_that_is_no_model_for_a_ct_is_refused(tmp_path: Path, break_it: Any, said: str) -> None:
    model = write_model(tmp_path, spacing_mm=SPACING_MM)
    break_it(model)
    with pytest.raises(SegmenterUnavailable, match=f"segmenter_bad_model: .*{said}"):
        read_model(model)


def change(model: Path, name: str, **values: Any) -> None:
    content = json.loads((model / name).read_text(encoding="utf-8"))
    (model / name).write_text(json.dumps({**content, **values}), encoding="utf-8")


class Code:
    """What unpickles into a call."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("executed",)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"network_weights": Code(), "init_args": {}, "trainer_name": ""}, "tensors and numbers"),
        ({"state_dict": {}}, "no checkpoint of nnU-Net v2"),
    ],
)
def test_a_checkpoint_of_another_kind_is_refused_and_runs_no_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: dict[str, Any], said: str
) -> None:
    model = write_model(tmp_path, spacing_mm=SPACING_MM)
    torch.save(content, model / "fold_0" / "checkpoint_final.pth")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SegmenterUnavailable, match=f"segmenter_bad_model: .*{said}"):
        predicted(model, ct())
    assert not (tmp_path / "executed").exists()


def test_a_checkpoint_written_with_numpy_1_is_read(tmp_path: Path) -> None:
    path = write_model(tmp_path, spacing_mm=SPACING_MM) / "fold_0" / "checkpoint_final.pth"
    with ZipFile(path) as old:
        content = {name: old.read(name) for name in old.namelist()}
    pickled = next(name for name in content if name.endswith("data.pkl"))
    assert b"numpy._core.multiarray\n" in content[pickled]
    content[pickled] = content[pickled].replace(b"numpy._core.multiarray\n", b"numpy.core.multiarray\n")
    with ZipFile(path, "w") as new:
        for name, data in content.items():
            new.writestr(name, data)
    labels, _ = predicted(path.parent.parent, ct())
    assert np.array_equal(labels > 0, truth(ct()) > 0)


@pytest.mark.filterwarnings("ignore:Detected old nnU-Net plans format:UserWarning")
def test_plans_of_the_first_nnunet_v2_are_understood(tmp_path: Path) -> None:
    """MOOSE's clin_ct_body is of 2023: its plans describe the network in other words."""
    model = write_model(tmp_path, spacing_mm=SPACING_MM)
    plans = json.loads((model / "plans.json").read_text(encoding="utf-8"))
    configuration = plans["configurations"]["3d_fullres"]
    del configuration["architecture"]
    configuration |= {
        "UNet_class_name": "PlainConvUNet",
        "UNet_base_num_features": 4,
        "unet_max_num_features": 8,
        "n_conv_per_stage_encoder": [1, 1],
        "n_conv_per_stage_decoder": [1],
        "num_pool_per_axis": [1, 1, 1],
        "pool_op_kernel_sizes": [[1, 1, 1], [2, 2, 2]],
        "conv_kernel_sizes": [[3, 3, 3], [3, 3, 3]],
    }
    (model / "plans.json").write_text(json.dumps(plans), encoding="utf-8")
    path = model / "fold_0" / "checkpoint_final.pth"
    checkpoint = torch.load(path, weights_only=False)
    torch.manual_seed(0)
    network = PlainConvUNet(
        1, 2, [4, 8], torch.nn.Conv3d, 3, [1, 2], 1, 5, 1, True, torch.nn.InstanceNorm3d, {"eps": 1e-5, "affine": True}
    )
    torch.save({**checkpoint, "network_weights": network.state_dict()}, path)
    labels, facts = predicted(model, ct())
    assert labels.shape == GRID.shape
    assert set(np.unique(labels)) <= {0, *read_model(model).districts}
    assert len(facts["sha256"]) == 64


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    model = write_model(tmp_path, spacing_mm=SPACING_MM)
    path = model / "fold_0" / "checkpoint_final.pth"
    checkpoint = torch.load(path, weights_only=False)
    checkpoint["network_weights"].popitem()
    torch.save(checkpoint, path)
    with pytest.raises(SegmenterUnavailable, match=r"weights do not fit the network of its plans\.json"):
        predicted(model, ct())


def test_the_second_stage_of_a_cascade_is_refused(tmp_path: Path) -> None:
    model = write_model(tmp_path, spacing_mm=SPACING_MM)
    plans = json.loads((model / "plans.json").read_text(encoding="utf-8"))
    plans["configurations"]["3d_fullres"]["previous_stage"] = "3d_lowres"
    (model / "plans.json").write_text(json.dumps(plans), encoding="utf-8")
    with pytest.raises(SegmenterUnavailable, match="second stage of a cascade"):
        predicted(model, ct())


def test_a_fold_of_all_cases_serves_where_no_numbered_fold_is(tmp_path: Path) -> None:
    model = write_model(tmp_path, spacing_mm=SPACING_MM)
    (model / "fold_0").rename(model / "fold_all")
    assert [path.parent.name for path in read_model(model).checkpoints] == ["fold_all"]
