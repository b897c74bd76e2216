"""`prepare` over a cohort: resumed after any end, refusals by name, foreign folders, a full disk, the page."""

from __future__ import annotations

import errno
import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from prepare_tools import read_small, small_cohort, small_phantom, studies_of, studies_read, write_study
from tiny_prepared import tiny_recipe

from training.cases.types import Cohort
from training.errors import DataError
from training.preparation import outputs
from training.preparation.outputs import check_space, expected_voxels, locked
from training.preparation.prepare import PrepareProgress, prepare_cohort
from training.preparation.review import review_page
from training.prepared import MANIFEST, STUDY, PreparedManifest, RefusedStudy, open_prepared
from training.recipe import Recipe

TESTS = Path(__file__).parent


def recipe(**prepare: Any) -> Recipe:
    return tiny_recipe(prepare={"spacing_mm": None, **prepare})


def prepared(cohort: Cohort, out: Path, how: Recipe | None = None, **options: Any) -> PreparedManifest:
    return prepare_cohort(cohort, out, how or recipe(), read=read_small, **({"workers": 1} | options))


class Finished(NamedTuple):
    cohort: Cohort
    data: Path
    out: Path


@pytest.fixture(scope="module")
def finished_once(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("prepare")
    cohort = small_cohort(folder / "data")
    prepared(cohort, folder / "out")
    studies_read(folder / "data")
    return Finished(cohort, folder / "data", folder / "out")


@pytest.fixture
def finished(finished_once: Finished, tmp_path: Path) -> Finished:
    """A finished folder of one's own to spoil."""
    out = tmp_path / "out"
    shutil.copytree(finished_once.out, out)
    studies_read(finished_once.data)
    return finished_once._replace(out=out)


def digest(out: Path) -> str:
    return open_prepared(out).manifest.digest


def test_a_cohort_becomes_a_prepared_set(finished: Finished) -> None:
    opened = open_prepared(finished.out)
    assert [study.id for study in opened.manifest.studies] == [f"study-{n}" for n in range(5)]
    assert {study.split for study in opened.manifest.studies} == {"train", "validation", "test"}
    assert opened.manifest.phantom
    assert opened.manifest.spacing_mm == (10.0, 10.0, 10.0)
    assert opened.manifest.studies[0].suv == {"rule": "phantom"}
    assert opened.manifest.statistics["trunk"]["studies"] == len(opened.studies("train"))
    study = opened.load(opened.manifest.studies[0])
    assert study.lesions.max() == 1


def test_done_again_nothing_is_read_and_nothing_changes(finished: Finished) -> None:
    before = digest(finished.out)
    kept: list[PrepareProgress] = []
    prepare_cohort(finished.cohort, finished.out, recipe(), read=read_small, workers=1, on_progress=kept.append)
    assert studies_read(finished.data) == []
    assert digest(finished.out) == before
    assert [p.kept for p in kept] == [False] + [True] * 5


@pytest.mark.parametrize("spoil", ["study.json", "cut array", "altered array", "no folder", "half written"])
def test_only_the_study_that_is_not_whole_is_prepared_again(finished: Finished, spoil: str) -> None:
    before, folder = digest(finished.out), finished.out / "studies" / "study-2"
    array = folder / "pet.npy"
    if spoil == "study.json":
        (folder / STUDY).unlink()
    elif spoil == "cut array":
        array.write_bytes(array.read_bytes()[:-100])
    elif spoil == "altered array":
        data = bytearray(array.read_bytes())
        data[-1] ^= 1
        array.write_bytes(data)
    elif spoil == "no folder":
        shutil.rmtree(folder)
    else:  # killed between two arrays
        (folder / STUDY).unlink()
        (folder / "lesions.npy").unlink()
        (folder / "pet.npy.tmp").write_bytes(b"x")
        (finished.out / MANIFEST).unlink()
    prepared(finished.cohort, finished.out)
    assert studies_read(finished.data) == ["study-2"]
    assert digest(finished.out) == before
    assert not list(folder.glob("*.tmp"))


def test_a_study_whose_files_changed_is_prepared_again(finished: Finished, tmp_path: Path) -> None:
    phantom = small_phantom(1)
    changed = write_study(tmp_path / "data", 1, phantom, suv=phantom.suv * np.float32(2))
    studies = tuple(changed if study.id == changed.id else study for study in finished.cohort.studies)
    before = open_prepared(finished.out).manifest.studies[1].files["pet"]
    after = prepared(replace(finished.cohort, studies=studies), finished.out)
    assert studies_read(finished.data) == []
    assert studies_read(tmp_path / "data") == ["study-1"]
    assert after.studies[1].files["pet"] != before


def test_a_mended_metadata_table_is_taken_over_without_preparing_again(finished: Finished) -> None:
    first = replace(finished.cohort.studies[0], diagnosis="melanoma", patient="another")
    after = prepared(replace(finished.cohort, studies=(first, *finished.cohort.studies[1:])), finished.out)
    assert studies_read(finished.data) == []
    assert (after.studies[0].diagnosis, after.studies[0].patient) == ("melanoma", "another")


def test_a_deleted_picture_is_drawn_again(finished: Finished) -> None:
    picture = finished.out / "review" / "study-3.png"
    whole = picture.read_bytes()
    assert whole.startswith(b"\x89PNG")
    picture.unlink()
    prepared(finished.cohort, finished.out)
    assert picture.read_bytes() == whole
    assert studies_read(finished.data) == []


def test_two_processes_give_what_one_gives(finished: Finished, tmp_path: Path) -> None:
    parallel = prepared(finished.cohort, tmp_path / "parallel", workers=2)
    assert parallel.digest == digest(finished.out)


def test_refused_studies_are_named_and_the_others_go_on(tmp_path: Path) -> None:
    data, phantom = tmp_path / "data", small_phantom(1)
    studies = [
        write_study(data, 0, phantom, refuse=1),
        write_study(data, 1, phantom, fault=1),
        write_study(data, 2, phantom),
        write_study(data, 3, phantom, spacing=(10.0, 10.0, 11.0)),
        write_study(data, 4, phantom, hu=np.full_like(phantom.hu, np.nan)),
        write_study(data, 5, phantom),
    ]
    gone = write_study(data, 6, phantom)
    gone.parts["ct"][0].unlink()
    earlier = RefusedStudy(study="study-7", code="pet_missing", text="no PET")
    cohort = Cohort(layout="nifti", studies=(*studies, gone), refused=(earlier,))
    manifest = prepared(cohort, tmp_path / "out")
    assert [study.id for study in manifest.studies] == ["study-2", "study-5"]
    assert {entry.study: entry.code for entry in manifest.refused} == {
        "study-0": "suv_weight",
        "study-1": "unexpected",
        "study-3": "spacing_differs",
        "study-4": "nan_voxels",
        "study-6": "files_missing",
        "study-7": "pet_missing",
    }
    assert "must not be stored" not in (tmp_path / "out" / MANIFEST).read_text()
    assert sorted(path.name for path in (tmp_path / "out" / "studies").iterdir()) == ["study-2", "study-5"]
    assert sorted(path.name for path in (tmp_path / "out" / "review").iterdir()) == ["study-2.png", "study-5.png"]


def test_a_cohort_without_a_usable_study_is_refused(tmp_path: Path) -> None:
    study = write_study(tmp_path / "data", 0, small_phantom(1), refuse=1)
    with pytest.raises(DataError, match=r"study-0: the patient's weight is 0") as error:
        prepared(Cohort(layout="nifti", studies=(study,)), tmp_path / "out")
    assert error.value.code == "data_unusable"
    assert not (tmp_path / "out" / MANIFEST).exists()


def test_a_folder_of_another_recipe_is_refused_and_left_as_it_is(finished: Finished) -> None:
    before = (finished.out / MANIFEST).read_bytes()
    other = recipe(districts=["given", "builtin"])
    for _ in range(2):  # the second time from the studies alone
        with pytest.raises(DataError) as error:
            prepared(finished.cohort, finished.out, other)
        assert error.value.code == "prepared_foreign"
        if (finished.out / MANIFEST).exists():
            assert (finished.out / MANIFEST).read_bytes() == before
            (finished.out / MANIFEST).unlink()
    assert studies_read(finished.data) == []


def test_a_folder_with_a_strange_manifest_is_refused(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text(json.dumps({"name": "a bundle"}))
    with pytest.raises(DataError) as error:
        prepared(Cohort(layout="nifti", studies=()), tmp_path)
    assert error.value.code == "prepared_foreign"


def test_a_recipe_that_prepares_in_the_same_way_leaves_the_digest_of_the_data(finished: Finished) -> None:
    before = digest(finished.out)
    prepared(finished.cohort, finished.out, recipe().model_copy(update={"name": "ablation"}))
    assert digest(finished.out) == before


def test_only_one_call_works_in_a_folder_at_a_time(finished: Finished) -> None:
    with locked(finished.out), pytest.raises(DataError) as error:
        prepared(finished.cohort, finished.out)
    assert error.value.code == "prepared_busy"


def test_a_folder_that_cannot_be_written_is_refused_first(finished: Finished, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError) as error:
        prepared(finished.cohort, tmp_path / "file" / "out")
    assert error.value.code == "cannot_write"
    assert studies_read(finished.data) == []


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"prepare": {"districts": ["given", "moose"]}}, "unknown_segmenter"),
        ({"split": {"unit": "study"}}, "split_leaks"),
    ],
)
def test_a_recipe_that_cannot_be_followed_is_refused_first(
    finished: Finished, tmp_path: Path, changes: dict[str, Any], code: str
) -> None:
    with pytest.raises(DataError) as error:
        prepared(finished.cohort, tmp_path / "new", tiny_recipe(**changes))
    assert error.value.code == code
    assert studies_read(finished.data) == []


def test_ray_that_is_not_installed_is_named(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"dicom-node\[ray\]") as error:
        prepared(finished.cohort, tmp_path / "new", engine="ray")
    assert error.value.code == "engine_missing"


def test_a_disk_that_fills_up_ends_the_work_and_a_later_call_goes_on(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, out = outputs.write_whole, tmp_path / "full"

    def until_full(path: Path, data: bytes) -> None:
        if path.parent.name == "study-2" and path.name == "districts.npy":
            path.with_name("districts.npy.tmp").write_bytes(data[:10])
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, data)

    monkeypatch.setattr(outputs, "write_whole", until_full)
    with pytest.raises(DataError, match="the same command goes on") as error:
        prepared(finished.cohort, out)
    assert error.value.code == "no_space"
    assert sorted(path.name for path in (out / "studies").iterdir()) == ["study-0", "study-1"]
    assert not (out / MANIFEST).exists()
    monkeypatch.undo()
    studies_read(finished.data)
    assert prepared(finished.cohort, out).digest == digest(finished.out)
    assert studies_read(finished.data) == ["study-2", "study-3", "study-4"]


SCRIPT = """
import os, resource, signal, sys
from pathlib import Path
sys.path[:0] = [{tests!r}, {training!r}]
from prepare_tools import read_small, small_cohort
from test_prepare import recipe
from training.preparation import outputs
from training.errors import DataError
from training.preparation.prepare import prepare_cohort

def killed_on_the_way(path, data):
    if (path.parent.name, path.name) == ("study-1", "lesions.npy"):
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, data)

cohort = small_cohort(Path({data!r}), 3)
{spoil}
try:
    prepare_cohort(cohort, Path({out!r}), recipe(), read=read_small, workers=1)
except DataError as error:
    print(error.code)
"""
LIMITED = "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))"
KILLED = "write, outputs.write_whole = outputs.write_whole, killed_on_the_way"


def run_script(folder: Path, spoil: str) -> subprocess.CompletedProcess[str]:
    """Prepare three studies into folder/out in a process of its own."""
    places = {"tests": TESTS.parent, "training": TESTS, "data": folder / "data", "out": folder / "out"}
    script = SCRIPT.format(spoil=spoil, **{name: str(path) for name, path in places.items()})
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)


def test_a_limit_of_the_system_on_files_leaves_no_half_study(tmp_path: Path) -> None:
    ended = run_script(tmp_path, LIMITED)
    assert ended.stdout.strip() == "no_space", ended.stderr
    assert not list((tmp_path / "out").glob("studies/*/*"))


def test_killed_within_a_study_the_next_call_goes_on_from_there(finished: Finished, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    assert run_script(folder, KILLED).returncode == -signal.SIGKILL
    assert (folder / "out" / "studies" / "study-1" / "pet.npy").exists()
    assert studies_read(folder / "data") == ["study-0", "study-1"]
    with pytest.raises(DataError, match="run `dicom-node train prepare` to its end"):
        open_prepared(folder / "out")
    cohort = replace(finished.cohort, studies=studies_of(folder / "data"))
    after = prepared(cohort, folder / "out")
    assert studies_read(folder / "data") == ["study-1", "study-2"]
    assert [study.files for study in after.studies] == [
        study.files for study in open_prepared(finished.out).manifest.studies[:3]
    ]


def test_what_will_not_fit_is_refused_before_the_work(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outputs, "expected_voxels", lambda study, spacing: 10**15)
    with pytest.raises(DataError, match="MB are free") as error:
        check_space(tmp_path, finished.cohort, recipe())
    assert error.value.code == "no_space"
    check_space(finished.out, finished.cohort, recipe())  # all of it is there already


def test_the_size_of_a_study_is_known_from_headers(tmp_path: Path) -> None:
    import nibabel

    from training.phantom.dicom import write_pet_series

    phantom = small_phantom(1)
    pet = tmp_path / "SUV.nii.gz"
    nibabel.save(nibabel.Nifti1Image(phantom.suv.T, np.diag([10.0, 10.0, 10.0, 1.0])), pet)
    study = write_study(tmp_path, 0, phantom)
    nifti = replace(study, parts={"pet": (pet,)})
    dicom = replace(study, parts={"pet": tuple(write_pet_series(phantom, tmp_path / "PET"))})
    for one in (nifti, dicom):
        assert expected_voxels(one, None) == phantom.suv.size
        assert expected_voxels(one, (5.0, 5.0, 5.0)) == pytest.approx(8 * phantom.suv.size, rel=0.01)
    assert expected_voxels(study, None) == 0  # what cannot be read is refused when its turn comes


def test_the_page_shows_every_study_and_escapes_what_it_shows(finished: Finished) -> None:
    page = (finished.out / "review.html").read_text()
    for n in range(5):
        assert f'src="review/study-{n}.png"' in page
    assert "synthetic phantom" in page
    manifest = open_prepared(finished.out).manifest
    hostile = manifest.model_copy(
        update={
            "phantom": False,
            "refused": (RefusedStudy(study="<script>", code="x", text="a & <b>"),),
            "studies": (manifest.studies[0].model_copy(update={"notes": ("<img src=x>",)}),),
        }
    )
    page = review_page(hostile)
    assert "synthetic phantom" not in page
    assert "<script>" not in page
    assert "<img src=x>" not in page
    assert page.index("a &amp; &lt;b&gt;") < page.index("study-0")


def test_a_mended_metadata_table_takes_its_complaint_with_it(finished: Finished) -> None:
    studies = finished.cohort.studies
    complaint = "not in the metadata table: the diagnosis is unknown"
    with_note = prepared(
        replace(finished.cohort, studies=(replace(studies[0], notes=(complaint,)), *studies[1:])), finished.out
    )
    assert complaint in with_note.studies[0].notes
    mended = prepared(finished.cohort, finished.out)
    assert complaint not in mended.studies[0].notes
    assert studies_read(finished.data) == []


def test_an_emptied_array_is_named(finished: Finished) -> None:
    path = finished.out / "studies" / finished.cohort.studies[0].id / "pet.npy"
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"pet\.npy") as caught:
        open_prepared(finished.out)
    assert caught.value.code == "prepared_altered"


def test_a_manifest_with_an_array_of_another_kind_is_refused(finished: Finished) -> None:
    path = finished.out / MANIFEST
    manifest = json.loads(path.read_text())
    manifest["studies"][0]["files"]["dose"] = "00"
    path.write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="dose") as caught:
        open_prepared(finished.out)
    assert caught.value.code == "prepared_invalid"
