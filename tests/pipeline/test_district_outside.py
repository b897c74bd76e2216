"""A segmenter's own process and the checks of its answer, by functions that behave well and badly."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom import Dataset

from pipeline.districts.outside import (
    APART,
    HU_FILE,
    checked,
    confidences,
    connected_share,
    find_body,
    finished,
    nearest_filled,
    require_package,
    run_apart,
)
from pipeline.errors import DistrictError, SegmenterUnavailable
from pipeline.geometry import grid_at_spacing
from pipeline.types import CtVolume, District, DistrictMap, DistrictOptions, Grid, LabelVolume, SourceSeries

SOURCE = SourceSeries(
    study_uid="1.2", series_uid="1.2.3", header=Dataset(), instances=(), earliest_acquisition=("", "")
)
GRID = Grid(
    shape=(24, 30, 40), spacing_mm=(6.0, 4.0, 5.0), origin_mm=(-90.0, 12.5, 700.0), frame_of_reference_uid="1.9"
)
OPTIONS = DistrictOptions(threads=1)


def volume() -> CtVolume:
    """A block of soft tissue, off the middle of the field."""
    hu = np.full(GRID.shape, -1000.0, dtype=np.float32)
    hu[4:20, 5:20, 6:30] = 20.0
    return CtVolume(hu=hu, grid=GRID, source=SOURCE)


def is_gone(process: int) -> bool:
    """Ended, or a zombie that nobody has collected."""
    try:
        state = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state in "ZX"


def wait_until_gone(process: int) -> bool:
    return any(is_gone(process) or time.sleep(0.1) for _ in range(300))


def test_a_segmenter_works_in_another_process_on_voxels_and_grid_alone() -> None:
    answer = run_apart("outside_works:label_by_hu", volume(), {"above": 0}, options=OPTIONS)
    assert np.array_equal(answer.maps["labels"], volume().hu > 0)
    assert answer.facts["spacing_mm"] == list(GRID.spacing_mm)
    assert answer.facts["frame"] == ""
    assert answer.facts["process"] != os.getpid()


@pytest.mark.parametrize(
    ("work", "settings", "code", "text"),
    [
        ("refuse", {}, "segmenter_bad_model", "made for mice"),
        ("crash", {}, "segmenter_crashed", "ValueError: a library's own words"),
        ("run_out_of_memory", {}, "segmenter_out_of_memory", "memory"),
        ("die", {"signal": signal.SIGKILL}, "segmenter_out_of_memory", "killed by the system"),
        ("leave", {}, "segmenter_crashed", "code 7 and no answer: last words"),
    ],
)
def test_whatever_ends_a_segmenter_is_a_reason_to_try_the_next(
    work: str, settings: dict[str, int], code: str, text: str
) -> None:
    with pytest.raises(SegmenterUnavailable) as caught:
        run_apart(f"outside_works:{work}", volume(), settings, options=OPTIONS)
    assert caught.value.code == code
    assert text in caught.value.text


def test_a_segmenter_that_hangs_is_ended_with_whatever_it_started(tmp_path: Path) -> None:
    note = tmp_path / "note"
    for timeout_s in (8.0, 60.0):  # a slow machine needs the first for the process's imports alone
        options = DistrictOptions(threads=1, timeout_s=timeout_s)
        with pytest.raises(SegmenterUnavailable) as caught:
            run_apart("outside_works:hang", volume(), {"note": str(note)}, options=options)
        assert (caught.value.code, "segmenter_timeout_s" in caught.value.text) == ("segmenter_timeout", True)
        if note.exists():
            break
    process, child, folder = note.read_text(encoding="utf-8").split()
    assert is_gone(int(process))
    assert wait_until_gone(int(child))
    assert not Path(folder).exists()


def test_a_segmenter_ends_and_removes_the_voxels_when_its_parent_is_killed(tmp_path: Path) -> None:
    folder, note = tmp_path / "voxels", tmp_path / "note"
    folder.mkdir()
    np.save(folder / HU_FILE, volume().hu)
    request = (
        '{"work": "outside_works:hang", "threads": 1, "settings": {"note": "%s"}, "grid": {"shape": [24, 30, 40], '
        '"spacing_mm": [6, 4, 5], "origin_mm": [0, 0, 0], "frame_of_reference_uid": ""}}'
    )
    (folder / "request.json").write_text(request % note, encoding="utf-8")
    parent_code = (
        "import os, subprocess, sys, time;"
        f"subprocess.Popen([sys.executable, '-m', '{APART}', r'{folder}', str(os.getpid())],"
        f" cwd=r'{folder}', start_new_session=True); time.sleep(600)"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p or os.curdir for p in sys.path)}
    with subprocess.Popen([sys.executable, "-c", parent_code], env=env, cwd=Path.cwd()) as parent:
        assert any(note.exists() or time.sleep(0.1) for _ in range(1200))
        parent.kill()
    process, child, _ = note.read_text(encoding="utf-8").split()
    assert wait_until_gone(int(process))
    assert wait_until_gone(int(child))
    assert not folder.exists()


def test_a_temporary_folder_without_room_is_a_reason_to_try_the_next() -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(SegmenterUnavailable) as caught:
            run_apart("outside_works:label_by_hu", volume(), {"above": 0}, options=OPTIONS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (caught.value.code, "TMPDIR" in caught.value.text) == ("segmenter_no_space", True)


def test_a_package_that_is_missing_is_named_with_its_extra() -> None:
    with pytest.raises(SegmenterUnavailable, match=r"segmenter_not_installed: .*no_such_package.*\.\[extra\]"):
        require_package("no_such_package", "extra")


def test_a_label_that_was_never_declared_is_refused() -> None:
    labels = np.zeros(GRID.shape, dtype=np.int16)
    labels[3, 4, 5] = 9
    with pytest.raises(SegmenterUnavailable, match=r"segmenter_bad_labels: .*label 9, declared are \[1, 2\]"):
        checked(labels, GRID, (1, 2))


@pytest.mark.parametrize("labels", [np.zeros((24, 30, 41), np.uint8), np.zeros(GRID.shape, np.float32)])
def test_labels_of_another_shape_or_kind_are_refused(labels: np.ndarray) -> None:
    with pytest.raises(SegmenterUnavailable, match="segmenter_bad_labels"):
        checked(labels, GRID, (1, 2))


def test_declared_labels_are_kept() -> None:
    labels = np.zeros(GRID.shape, dtype=np.int32)
    labels[5:8] = 2
    assert checked(labels, GRID, (1, 2)).dtype == np.uint8
    assert np.array_equal(checked(labels, GRID, (1, 2)), labels)


def done(labels: LabelVolume, grid: Grid = GRID) -> DistrictMap:
    return finished(labels, volume(), grid, segmenter="x", version="1", certainty={District.TRUNK: 0.8})


def test_every_body_voxel_gets_one_district_and_nothing_outside_has_one() -> None:
    labels = np.zeros(GRID.shape, dtype=np.uint8)
    labels[2:12, :, :] = District.LEGS  # air beside the body too
    labels[15:, :, :] = District.TRUNK  # slices 12 to 14 are left to the nearest
    result, body = done(labels), find_body(volume(), GRID)
    assert np.array_equal(result.labels > 0, body)
    assert set(np.unique(result.labels[:13][body[:13]])) == {District.LEGS}
    assert set(np.unique(result.labels[14:][body[14:]])) == {District.TRUNK}
    assert any("nearest label" in note for note in result.notes)


def test_confidence_is_certainty_times_what_the_segmenter_labeled_itself() -> None:
    labels = np.full(GRID.shape, District.TRUNK, dtype=np.uint8)
    whole = done(labels)
    assert (whole.confidence, whole.notes) == ({District.TRUNK: pytest.approx(0.8)}, ())
    labels[10:] = 0
    body = find_body(volume(), GRID)
    given = (body & (labels > 0)).sum() / body.sum()
    assert done(labels).confidence == {District.TRUNK: pytest.approx(0.8 * given)}


def test_the_body_is_found_on_the_result_s_own_grid() -> None:
    coarse = grid_at_spacing(GRID, (8.0, 8.0, 8.0))
    found = done(np.full(coarse.shape, District.TRUNK, dtype=np.uint8), coarse)
    assert np.array_equal(found.labels > 0, find_body(volume(), coarse))


def test_labels_outside_of_the_body_alone_are_no_districts() -> None:
    labels = np.zeros(GRID.shape, dtype=np.uint8)
    labels[:2] = District.HEAD
    with pytest.raises(SegmenterUnavailable, match="segmenter_no_districts"):
        done(labels)


def test_a_volume_without_a_patient_is_refused_for_every_segmenter() -> None:
    air = CtVolume(hu=np.full(GRID.shape, -1000.0, np.float32), grid=GRID, source=SOURCE)
    with pytest.raises(DistrictError) as caught:
        finished(np.ones(GRID.shape, np.uint8), air, GRID, segmenter="x", version="1", certainty={})
    assert caught.value.code == "no_body"
    assert not isinstance(caught.value, SegmenterUnavailable)


@given(st.integers(0, 2**32 - 1), st.floats(0.0, 0.9))
def test_filling_keeps_what_is_there_and_leaves_no_hole(seed: int, empty: float) -> None:
    rng = np.random.default_rng(seed)
    body = rng.random((5, 6, 7)) < 0.7
    labels = np.where(rng.random(body.shape) < empty, 0, rng.integers(1, 5, body.shape)).astype(np.uint8)
    body.flat[0] = True
    labels.flat[0] = 3
    filled = nearest_filled(labels, body, (3.0, 1.0, 2.0))
    assert np.array_equal(filled > 0, body)
    kept = body & (labels > 0)
    assert np.array_equal(filled[kept], labels[kept])


def test_nearest_is_meant_in_mm() -> None:
    labels = np.zeros((3, 1, 3), dtype=np.uint8)
    labels[0, 0, 0], labels[2, 0, 2] = District.HEAD, District.LEGS  # from the middle left: 10 mm up, 1 + 10 mm away
    filled = nearest_filled(labels, np.ones(labels.shape, bool), (10.0, 1.0, 1.0))
    assert filled[0, 0, 2] == District.HEAD
    assert filled[2, 0, 0] == District.LEGS


def test_scattered_labels_lower_the_confidence() -> None:
    mask = np.zeros((1, 1, 12), bool)
    mask[0, 0, [0, 1, 2, 3, 5, 7]] = True
    assert connected_share(mask, 1) == pytest.approx(4 / 6)
    assert connected_share(mask, 2) == pytest.approx(5 / 6)
    assert connected_share(np.zeros_like(mask), 1) == 0.0
    labels = np.where(mask, District.ARMS, 0).astype(np.uint8)
    assert confidences(labels, labels, {}) == {District.ARMS: pytest.approx(5 / 6)}
