"""A shadow bundle on live jobs: figures in the ledger and in result.json, nothing in DICOM, no harm to the job."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread
from tiny_bundle import write_tiny_bundle
from tiny_study import write_tiny_study
from typer.testing import CliRunner

from dicom_node.cli import app
from dicom_node.config import (
    Config,
    DestinationConfig,
    EngineConfig,
    GateConfig,
    PeerConfig,
    PipelineConfig,
    StorageConfig,
)
from dicom_node.engine import EngineStopped
from dicom_node.engine.local import LocalEngine
from dicom_node.worker import Worker
from pipeline.result import read_summary
from storage.incoming_file import PREAMBLE_BYTES
from storage.ledger import open_ledger
from storage.records import Event, Job, JobState, SeriesInfo
from storage.spool import Spool


@pytest.fixture(scope="module")
def engine() -> Iterator[LocalEngine]:
    made = LocalEngine(job_timeout_s=120)
    yield made
    made.close()


@pytest.fixture(scope="module")
def ct_files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_tiny_study(tmp_path_factory.mktemp("ct"))


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Installed bundles: "main" and, with other weights, "next"."""
    folder = tmp_path_factory.mktemp("bundles")
    write_tiny_bundle(folder / "main")
    write_tiny_bundle(folder / "next", seed=40)
    return folder


class Site:
    """A spool and a ledger with one queued CT, and a worker with the real engine."""

    def __init__(self, root: Path, bundles: Path, ct_files: list[Path], *, shadow: str, deliver: bool = False) -> None:
        self.root = root
        peer = PeerConfig(name="pacs", ae_title="PACS")
        self.config = Config(
            storage=StorageConfig(root=root),
            pipeline=PipelineConfig(bundle="main", bundles=bundles, shadow=shadow, device="cpu", threads=1),
            gate=GateConfig(min_coverage_mm=30),
            engine=EngineConfig(max_attempts=1),
            peers=(peer,),
            destinations=(DestinationConfig(name="pacs", peer="pacs"),) if deliver else (),
        )
        self.spool = Spool(root, min_free_bytes=0)
        self.ledger = open_ledger(f"sqlite:///{root / 'ledger.sqlite'}")
        header = dcmread(ct_files[0], stop_before_pixels=True)
        info = SeriesInfo(study_uid=header.StudyInstanceUID, series_uid=header.SeriesInstanceUID)
        job = self.ledger.open_job(info)
        for index, path in enumerate(ct_files):
            stored = self.spool.store_incoming("ab", f"1.2.3.{index}", [path.read_bytes()[PREAMBLE_BYTES:]])
            self.spool.adopt(stored, info.series_uid)
        self.spool.take_series(job.id, info.series_uid)
        self.ledger.move(job.id, JobState.QUEUED, code="chosen", text="chosen")
        self.job_id = job.id

    def work(self, engine: Any) -> Job:
        assert Worker(self.config, self.ledger, self.spool, engine, owner="w").work_one()
        return self.ledger.get(self.job_id)

    @property
    def result(self) -> Path:
        return self.spool.result_folder(self.job_id)

    def event(self, code: str) -> Event:
        return next(event for event in self.ledger.events(self.job_id) if event.code == code)


@pytest.fixture
def site(tmp_path: Path, bundles: Path, ct_files: list[Path]) -> Iterator[Any]:
    made: list[Site] = []

    def make(name: str = "spool", **changes: Any) -> Site:
        made.append(Site(tmp_path / name, bundles, ct_files, **changes))
        return made[-1]

    yield make
    for one in made:
        one.ledger.close()


def test_the_figures_are_stored_and_nothing_of_the_shadow_is_written_or_sent(site: Any, engine: LocalEngine) -> None:
    plain, shadowed = site("plain", shadow="", deliver=True), site("shadowed", shadow="next", deliver=True)
    plain.work(engine)
    job = shadowed.work(engine)
    assert job.state is JobState.DELIVERING
    kept = job.details["shadow"]
    assert [row["region"] for row in kept["regions"]][:2] == ["body", "trunk"]
    assert all(row["mae_suv"] > 0 for row in kept["regions"])
    stored = read_summary(shadowed.result).shadow
    assert stored is not None
    assert stored.model_dump(mode="json") == kept
    assert "MAE" in shadowed.event("shadow_compared").text

    before, after = read_summary(plain.result), read_summary(shadowed.result)
    assert after.series == before.series  # the very same UIDs
    assert after.provenance == before.provenance
    names = sorted(path.relative_to(plain.result) for path in plain.result.rglob("*"))
    assert sorted(path.relative_to(shadowed.result) for path in shadowed.result.rglob("*")) == names
    sent = [(d.kind, d.series_uid) for d in shadowed.ledger.deliveries(shadowed.job_id)]
    assert sent == [(d.kind, d.series_uid) for d in plain.ledger.deliveries(plain.job_id)]


def test_without_a_shadow_there_is_no_word_of_one(site: Any, engine: LocalEngine) -> None:
    made = site(shadow="")
    job = made.work(engine)
    assert job.state is JobState.DONE
    assert "shadow" not in job.details
    assert read_summary(made.result).shadow is None
    assert not [event for event in made.ledger.events(job.id) if event.code.startswith("shadow")]


def test_a_missing_shadow_leaves_the_job_done_and_says_why(site: Any, engine: LocalEngine) -> None:
    made = site(shadow="gone")
    job = made.work(engine)
    assert job.state is JobState.DONE
    assert "bundle_missing" in made.event("shadow_failed").text
    assert "shadow" not in job.details


def test_a_broken_shadow_leaves_the_job_done(site: Any, engine: LocalEngine, tmp_path: Path) -> None:
    broken = write_tiny_bundle(tmp_path / "broken")
    weights = broken / "trunk.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    made = site(shadow=str(broken))
    assert made.work(engine).state is JobState.DONE
    assert "weights_altered" in made.event("shadow_failed").text
    assert read_summary(made.result).shadow is None


def test_an_engine_that_dies_under_the_shadow_leaves_the_job_done(site: Any) -> None:
    class Dying(LocalEngine):
        def shadow(self, *arguments: Any, **others: Any) -> Any:
            self._process.kill()  # type: ignore[union-attr]
            return super().shadow(*arguments, **others)

    engine = Dying(job_timeout_s=120)
    try:
        made = site(shadow="next")
        assert made.work(engine).state is JobState.DONE
        text = made.event("shadow_failed").text
        assert "engine_crashed" in text or "volumes_gone" in text
    finally:
        engine.close()


def test_a_node_that_ends_does_not_wait_for_a_shadow(site: Any, engine: LocalEngine) -> None:
    asked: list[bool] = []
    workers: list[Worker] = []

    class Slow:
        def __getattr__(self, name: str) -> Any:
            return getattr(engine, name)

        def shadow(self, *_: Any, should_stop: Callable[[], bool]) -> Any:
            asked.append(should_stop())
            workers[0].stop(grace_s=600)
            asked.append(should_stop())
            raise EngineStopped("engine_stopped", "told to stop")

    made = site(shadow="next")
    workers.append(Worker(made.config, made.ledger, made.spool, Slow(), owner="w"))
    assert workers[0].work_one()
    assert asked == [False, True]
    assert made.ledger.get(made.job_id).state is JobState.DONE
    assert made.event("shadow_failed")


def test_an_error_nobody_expected_leaves_the_worker_at_work(site: Any, engine: LocalEngine) -> None:
    class Odd:
        def __getattr__(self, name: str) -> Any:
            return getattr(engine, name)

        def shadow(self, *_: Any, **__: Any) -> Any:
            raise ZeroDivisionError

    made = site(shadow="next")
    assert made.work(Odd()).state is JobState.DONE
    assert "ZeroDivisionError" in made.event("shadow_failed").text


def test_jobs_show_prints_the_figures(site: Any, engine: LocalEngine, tmp_path: Path) -> None:
    made = site(shadow="next")
    made.work(engine)
    config = tmp_path / "config.toml"
    config.write_text(f'[storage]\nroot = "{made.root}"\n', encoding="utf-8")
    words = ["jobs", "show", made.job_id, "--config", str(config)]
    shown = CliRunner().invoke(app, words, env={"COLUMNS": "200"})
    assert shown.exit_code == 0
    assert "shadow tiny 1" in shown.output
    assert "compared, not sent" in shown.output
    assert "shadow_compared" in shown.output
