"""The engine's process: real jobs with a tiny bundle, refusals, crashes, kills."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from tiny_bundle import write_tiny_bundle
from tiny_study import write_tiny_study

from dicom_node.engine import EngineCrash, EngineStopped
from dicom_node.engine.child import Broken, Done, Refused, describe
from dicom_node.engine.local import LocalEngine, pipeline_error
from pipeline.errors import BundleError, PipelineError, UnsupportedSeries
from pipeline.result import read_summary
from pipeline.types import GeometryError, PipelineOptions, Progress, Stage

CREATED = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture(scope="module")
def ct_files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_tiny_study(tmp_path_factory.mktemp("ct"))


@pytest.fixture(scope="module")
def options(bundle: Path) -> PipelineOptions:
    return PipelineOptions(bundle=bundle, device="cpu", threads=1)


@pytest.fixture(scope="module")
def engine() -> Iterator[LocalEngine]:
    """One process for the tests that leave it alive, as in the node."""
    made = LocalEngine(job_timeout_s=120)
    yield made
    made.close()


def run(engine: LocalEngine, paths: list[Path], options: PipelineOptions, folder: Path, **changes: Any) -> None:
    arguments: dict[str, Any] = {"on_progress": lambda p: None, "should_stop": lambda: False, **changes}
    engine.run("abc", paths, options, folder, CREATED, **arguments)


def test_a_job_leaves_a_whole_result_and_reports_every_stage(
    engine: LocalEngine, ct_files: list[Path], options: PipelineOptions, tmp_path: Path
) -> None:
    seen: list[Progress] = []
    run(engine, ct_files, options, tmp_path / "result", on_progress=seen.append)
    summary = read_summary(tmp_path / "result")
    assert {s.kind for s in summary.series} == {"pet", "mip"}
    stages = [stage for stage in Stage if stage is not Stage.UNCERTAINTY]  # not asked for
    assert list(dict.fromkeys(p.stage for p in seen)) == stages


def test_the_same_job_again_gives_the_same_bytes_from_the_same_process(
    engine: LocalEngine, ct_files: list[Path], options: PipelineOptions, tmp_path: Path
) -> None:
    run(engine, ct_files, options, tmp_path / "first")
    pid = engine.pid
    run(engine, ct_files, options, tmp_path / "second")
    assert engine.pid == pid
    first = {p.relative_to(tmp_path / "first"): p.read_bytes() for p in (tmp_path / "first").rglob("*.dcm")}
    second = {p.relative_to(tmp_path / "second"): p.read_bytes() for p in (tmp_path / "second").rglob("*.dcm")}
    assert first
    assert first == second


def test_a_refusal_comes_with_its_class_code_and_text_and_leaves_the_process_alive(
    engine: LocalEngine, ct_files: list[Path], options: PipelineOptions, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedSeries) as caught:
        run(engine, ct_files[:1], options, tmp_path / "result")
    assert caught.value.code == "single_slice"
    pid = engine.pid
    with pytest.raises(BundleError) as missing:
        run(engine, ct_files, replace(options, bundle=tmp_path / "none"), tmp_path / "result")
    assert missing.value.code == "bundle_missing"
    assert engine.pid == pid
    assert not (tmp_path / "result").exists()


def test_an_altered_bundle_is_refused_although_it_was_loaded_before(
    engine: LocalEngine, ct_files: list[Path], options: PipelineOptions, tmp_path: Path
) -> None:
    folder = write_tiny_bundle(tmp_path / "bundle")
    altered = replace(options, bundle=folder)
    run(engine, ct_files, altered, tmp_path / "good")
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"window": 16', '"window": 17', 1))
    with pytest.raises(BundleError):
        run(engine, ct_files, altered, tmp_path / "bad")


def test_a_killed_process_is_a_crash_that_names_the_signal_and_is_replaced(
    ct_files: list[Path], options: PipelineOptions, tmp_path: Path
) -> None:
    engine = LocalEngine(job_timeout_s=120)

    def kill(progress: Progress) -> None:
        if progress.stage is Stage.READ and engine.pid is not None:  # later a busy machine may be told after its end
            os.kill(engine.pid, signal.SIGKILL)

    try:
        with pytest.raises(EngineCrash) as caught:
            run(engine, ct_files, options, tmp_path / "result", on_progress=kill)
        assert caught.value.code == "engine_crashed"
        assert "SIGKILL" in caught.value.text
        assert not (tmp_path / "result").exists()
        run(engine, ct_files, options, tmp_path / "result")
        assert (tmp_path / "result" / "result.json").is_file()
    finally:
        engine.close()


def test_a_process_that_died_between_two_jobs_is_replaced_without_a_word(
    ct_files: list[Path], options: PipelineOptions, tmp_path: Path
) -> None:
    engine = LocalEngine(job_timeout_s=120)
    try:
        engine.warm_up(options)
        first = engine.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        while engine.pid is not None:
            time.sleep(0.01)
        run(engine, ct_files, options, tmp_path / "result")
        assert engine.pid not in (None, first)
    finally:
        engine.close()


def test_a_stop_kills_the_process_and_leaves_nothing(
    ct_files: list[Path], options: PipelineOptions, tmp_path: Path
) -> None:
    engine = LocalEngine(job_timeout_s=120)
    try:
        with pytest.raises(EngineStopped):
            run(engine, ct_files, options, tmp_path / "result", should_stop=lambda: True)
        assert engine.pid is None
        assert not (tmp_path / "result").exists()
    finally:
        engine.close()


def test_a_job_that_overruns_its_time_is_killed(ct_files: list[Path], options: PipelineOptions, tmp_path: Path) -> None:
    engine = LocalEngine(job_timeout_s=0.01)
    try:
        with pytest.raises(EngineCrash) as caught:
            run(engine, ct_files, options, tmp_path / "result")
        assert caught.value.code == "engine_timeout"
        assert engine.pid is None
    finally:
        engine.close()


def test_a_process_that_hangs_in_the_middle_of_a_job_is_killed_at_its_time_out_and_the_next_job_has_a_new_one(
    ct_files: list[Path], options: PipelineOptions, tmp_path: Path
) -> None:
    passed_s = 0.0
    engine = LocalEngine(job_timeout_s=3600.0, clock=lambda: time.monotonic() + passed_s)
    hung: list[int] = []

    def hang(progress: Progress) -> None:
        nonlocal passed_s
        if progress.stage is Stage.READ and engine.pid is not None and not hung:
            hung.append(engine.pid)
            os.kill(engine.pid, signal.SIGSTOP)
            while _state(engine.pid) != "T":  # every thread of it
                time.sleep(0.01)
            passed_s = 3600.0

    try:
        with pytest.raises(EngineCrash) as caught:
            run(engine, ct_files, options, tmp_path / "result", on_progress=hang)
        assert caught.value.code == "engine_timeout"
        assert "did not end within 3600 s (engine.job_timeout_s)" in caught.value.text
        assert not _runs(hung[0])
        assert not (tmp_path / "result").exists()
        run(engine, ct_files, options, tmp_path / "result")
        assert engine.pid not in (None, *hung)
        assert (tmp_path / "result" / "result.json").is_file()
    finally:
        engine.close()


def test_a_closed_engine_starts_nothing(ct_files: list[Path], options: PipelineOptions, tmp_path: Path) -> None:
    engine = LocalEngine(job_timeout_s=1)
    engine.close()
    with pytest.raises(EngineStopped):
        run(engine, ct_files, options, tmp_path / "result")


PARENT = """
import sys, time
from pathlib import Path
from dicom_node.engine.local import LocalEngine
from pipeline.types import PipelineOptions

if __name__ == "__main__":
    engine = LocalEngine(job_timeout_s=60)
    engine.warm_up(PipelineOptions(bundle=Path("none")))
    print(engine.pid, flush=True)
    time.sleep(60)
"""


def test_the_process_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.kill()
        parent.wait()
    for _ in range(6000):
        if not _runs(child):
            return
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    pytest.fail("the engine outlived its parent")


def _runs(pid: int) -> bool:
    """Whether the process runs; an orphan that nobody has waited for yet is dead all the same."""
    return _state(pid) not in ("Z", "")


def _state(pid: int) -> str:
    """As proc(5) has it: "T" is stopped, "Z" ended and not waited for; "" is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return ""


def test_an_unexpected_error_is_described_without_its_message() -> None:
    try:
        raise ValueError("DOE^JANE has a bad birth date")
    except ValueError as error:
        text = describe(error)
    assert text.startswith("ValueError in test_engine.py:")
    assert "DOE" not in text


def test_messages_name_their_job() -> None:
    assert Done(job_id="a").job_id == Broken(job_id="a", text="").job_id == "a"
    assert Refused(job_id="a", error_class="X", code="c", text="t").code == "c"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("UnsupportedSeries", UnsupportedSeries),
        ("BundleError", BundleError),
        ("GeometryError", GeometryError),
        ("DeviceError", PipelineError),  # one that this process does not know keeps its code and text
        ("annotations", PipelineError),
    ],
)
def test_an_error_has_its_class_again_in_the_node(name: str, expected: type[PipelineError]) -> None:
    error = pipeline_error(name, "some_code", "some text")
    assert isinstance(error, expected)
    assert (error.code, error.text) == ("some_code", "some text")


def test_computing_gives_way_to_receiving(engine: LocalEngine, options: PipelineOptions) -> None:
    engine.warm_up(options)
    assert engine.pid is not None
    assert os.getpriority(os.PRIO_PROCESS, engine.pid) >= os.getpriority(os.PRIO_PROCESS, 0) + 1
