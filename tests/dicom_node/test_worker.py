"""What the worker makes of everything an engine can do to it: real ledger and spool, scripted engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import structlog

from dicom_node.config import Config, DestinationConfig, EngineConfig, PeerConfig, StorageConfig
from dicom_node.engine import EngineCrash, EngineStopped
from dicom_node.lineage import RERUN
from dicom_node.worker import Worker, judge, new_deliveries, pipeline_options
from pipeline.errors import BundleError, DistrictError, GateRefusal, OutputError, UnsupportedSeries
from pipeline.result import SeriesSummary, read_summary, write_result
from pipeline.types import (
    EncodedInstance,
    EncodedSeries,
    GateFinding,
    OnProgress,
    PipelineOptions,
    Progress,
    Provenance,
    ResultSet,
    Stage,
)
from storage.errors import NoSpace, NotFound
from storage.ledger import Ledger, open_ledger
from storage.records import DeliveryState, Job, JobState, NewDelivery, SeriesInfo
from storage.spool import Spool

OWNER = "node-test"
SC = "1.2.840.10008.5.1.4.1.1.7"
SERIES = "1.2.3"


def result(*, held: GateFinding | None = None) -> ResultSet:
    """A PET series of two instances and a picture of one."""

    def series(kind: str, uid: str, count: int) -> EncodedSeries:
        instances = tuple(
            EncodedInstance(
                sop_class_uid=SC,
                sop_instance_uid=f"{uid}.{i}",
                transfer_syntax_uid="1.2.840.10008.1.2.1",
                file_name=f"{i:04d}.dcm",
                data=b"x",
            )
            for i in range(1, count + 1)
        )
        return EncodedSeries(kind=kind, encoding="sc", series_uid=uid, instances=instances)

    return ResultSet(
        series=(series("pet", "2.25.1", 2), series("mip", "2.25.2", 1)),
        stats=(),
        provenance=Provenance(
            software_version="1",
            bundle_name="tiny",
            bundle_version="1",
            bundle_sha256="0" * 64,
            models=(),
            segmenter="builtin",
            segmenter_version="1",
            device="cpu",
        ),
        overview_png=b"png",
        stage_seconds={"read": 1.0},
        held=held,
    )


class ScriptedEngine:
    """Does one step of its script at each run: a result is written, an error raised, a function called."""

    def __init__(self, *script: Any) -> None:
        self.script = list(script)
        self.runs: list[tuple[str, int, datetime]] = []
        self.options: list[PipelineOptions] = []

    def run(
        self,
        job_id: str,
        paths: Sequence[Path],
        options: PipelineOptions,
        result_folder: Path,
        created: datetime,
        *,
        on_progress: OnProgress,
        should_stop: Callable[[], bool],
    ) -> None:
        self.runs.append((job_id, len(paths), created))
        self.options.append(options)
        step = self.script.pop(0)
        on_progress(Progress(stage=Stage.READ, done=0, total=1))
        if isinstance(step, Exception):
            raise step
        if callable(step):
            step()
        if should_stop():
            raise EngineStopped("stopped", "told to")
        on_progress(Progress(stage=Stage.WRITE, done=0, total=1))
        write_result(step if isinstance(step, ResultSet) else result(), result_folder)

    def warm_up(self, options: PipelineOptions) -> None:
        pass

    def close(self) -> None:
        pass


class Bench:
    """A ledger with a clock that the test turns, a spool, and one queued job with three files."""

    def __init__(self, root: Path) -> None:
        self.now = datetime(2026, 1, 1, tzinfo=UTC)
        self.spool = Spool(root, min_free_bytes=0)
        self.ledger: Ledger = open_ledger(f"sqlite:///{root / 'ledger.sqlite'}", clock=lambda: self.now)
        peer = PeerConfig(name="pacs", ae_title="PACS")
        self.config = Config(
            storage=StorageConfig(root=root),
            peers=(peer,),
            destinations=(DestinationConfig(name="pacs", peer="pacs"),),
            engine=EngineConfig(max_attempts=3, retry_s=10),
        )
        self.job_id = self.queue_job()

    def queue_job(self) -> str:
        job = self.ledger.open_job(SeriesInfo(study_uid="1.2", series_uid=SERIES))
        for i in range(3):
            path = self.spool.store_incoming("ab", f"1.2.3.{i}", [b"ct"])
            self.spool.adopt(path, SERIES)
        self.spool.take_series(job.id, SERIES)
        self.ledger.move(job.id, JobState.QUEUED, code="chosen", text="chosen")
        return job.id

    def worker(self, engine: ScriptedEngine, **changes: Any) -> Worker:
        return Worker(self.config, self.ledger, self.spool, engine, owner=OWNER, clock=lambda: self.now, **changes)

    @property
    def job(self) -> Job:
        return self.ledger.get(self.job_id)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path / "spool")
    yield made
    made.ledger.close()


def test_a_result_opens_its_deliveries_and_the_ledger_knows_times_and_lineage(bench: Bench) -> None:
    engine, told = ScriptedEngine("ok"), []
    worker = bench.worker(engine, on_result=lambda: told.append(True))
    assert worker.work_one()
    assert bench.job.state is JobState.DELIVERING
    assert bench.job.details["stage_seconds"] == {"read": 1.0}
    assert bench.job.details["provenance"]["bundle_name"] == "tiny"
    assert [(d.kind, d.instances) for d in bench.ledger.deliveries(bench.job_id)] == [("pet", 2), ("mip", 1)]
    assert [e.stage for e in bench.ledger.events(bench.job_id) if e.code == "stage_done"] == ["read", "write"]
    assert engine.runs == [(bench.job_id, 3, bench.job.created)]
    assert told == [True]
    assert not worker.work_one()


def test_without_destinations_the_job_is_done(bench: Bench) -> None:
    bench.config = bench.config.model_copy(update={"destinations": ()})
    bench.worker(ScriptedEngine("ok")).work_one()
    assert bench.job.state is JobState.DONE


def test_a_result_that_the_gate_stopped_is_held_and_not_sent(bench: Bench) -> None:
    bench.worker(ScriptedEngine(result(held=GateFinding(code="suv_range", text="too hot")))).work_one()
    assert (bench.job.state, bench.job.reason_code) == (JobState.HELD, "suv_range")
    assert bench.ledger.claim_delivery(OWNER, lease_s=60) is None
    bench.ledger.release(bench.job_id)
    assert bench.ledger.claim_delivery(OWNER, lease_s=60) is not None


def test_a_result_that_an_earlier_life_left_is_not_computed_again(bench: Bench) -> None:
    write_result(result(), bench.spool.result_folder(bench.job_id))
    engine = ScriptedEngine()
    bench.worker(engine).work_one()
    assert engine.runs == []
    assert bench.job.state is JobState.DELIVERING


def test_half_a_result_of_an_earlier_life_is_removed(bench: Bench) -> None:
    folder = bench.spool.result_folder(bench.job_id)
    left = folder.with_name(folder.name + ".tmp")
    left.mkdir()
    (left / "0001.dcm").write_bytes(b"half")
    bench.worker(ScriptedEngine(EngineCrash("engine_crashed", "killed"))).work_one()
    assert not left.exists()


def test_a_crash_is_tried_again_with_growing_pauses_and_then_fails(bench: Bench) -> None:
    engine = ScriptedEngine(*[EngineCrash("engine_crashed", "killed by SIGKILL")] * 3)
    worker = bench.worker(engine)
    pauses = []
    while worker.work_one():
        if bench.job.not_before is not None and bench.job.state is JobState.QUEUED:
            pauses.append((bench.job.not_before - bench.now).total_seconds())
            assert not worker.work_one()
            bench.now = bench.job.not_before
    assert pauses == [10.0, 20.0]
    assert (bench.job.state, bench.job.reason_code, bench.job.attempts) == (JobState.FAILED, "engine_crashed", 3)
    assert len({created for _, _, created in engine.runs}) == 1  # so the bytes would be the same


def test_a_crash_and_then_a_result_is_a_result(bench: Bench) -> None:
    worker = bench.worker(ScriptedEngine(EngineCrash("engine_crashed", "killed"), "ok"))
    worker.work_one()
    bench.now += timedelta(seconds=60)
    worker.work_one()
    assert (bench.job.state, bench.job.attempts) == (JobState.DELIVERING, 2)


@pytest.mark.parametrize(
    ("error", "state", "code"),
    [
        (UnsupportedSeries("single_slice", "one slice"), JobState.REJECTED, "single_slice"),
        (DistrictError("no_body", "no body"), JobState.REJECTED, "no_body"),
        (DistrictError("no_segmenter", "none could run"), JobState.FAILED, "no_segmenter"),  # not the series' fault
        (GateRefusal("coverage", "too short"), JobState.REJECTED, "coverage"),
        (BundleError("weights_altered", "altered"), JobState.FAILED, "weights_altered"),
        (OutputError("invalid_result", "bad"), JobState.FAILED, "invalid_result"),
        (OutputError("not_written", "disk full"), JobState.QUEUED, "not_written"),
        (EngineCrash("engine_timeout", "too long"), JobState.QUEUED, "engine_timeout"),
        (NoSpace("full"), JobState.QUEUED, "no_space"),
        (ValueError("DOE^JANE"), JobState.QUEUED, "internal_error"),
    ],
)
def test_what_becomes_of_a_job_after_an_error(bench: Bench, error: Exception, state: JobState, code: str) -> None:
    bench.worker(ScriptedEngine(error)).work_one()
    assert (bench.job.state, bench.job.reason_code) == (state, code)
    assert "DOE" not in bench.job.reason


def test_a_series_that_is_gone_from_the_spool_fails_by_name(bench: Bench) -> None:
    bench.spool.discard_work(bench.job_id)
    bench.worker(ScriptedEngine()).work_one()
    assert (bench.job.state, bench.job.reason_code) == (JobState.FAILED, "input_gone")
    assert judge(NotFound("x")).permanent


def test_a_job_computed_in_place_never_forgets_the_series_that_it_sent(bench: Bench) -> None:
    other = result()
    pet = replace(other.series[0], series_uid="2.25.9")
    worker = bench.worker(ScriptedEngine("ok", replace(other, series=(pet, *other.series[1:]))))
    worker.work_one()
    while (row := bench.ledger.claim_delivery("s", lease_s=60)) is not None:
        state, sent = (DeliveryState.SENT, row.instances) if row.kind == "pet" else (DeliveryState.FAILED, 0)
        bench.ledger.finish_delivery(row.id, "s", state=state, sent=sent, statuses={})
    before = bench.ledger.deliveries(bench.job_id)
    assert before[0].sent
    bench.spool.discard_result(bench.job_id)
    bench.ledger.retry(bench.job_id, rerun=True)
    worker.work_one()
    assert (bench.job.state, bench.job.reason_code) == (JobState.FAILED, "other_series")
    assert bench.ledger.deliveries(bench.job_id) == before
    assert not bench.spool.has_result(bench.job_id)


def other_result() -> ResultSet:
    """The same with other UIDs, as of another bundle."""
    plain = result()
    return replace(plain, series=tuple(replace(one, series_uid=f"{one.series_uid}.9") for one in plain.series))


class Routed:
    """Jobs of the same slices, an hour apart; each one's deliveries fail, so that the series is taken up again."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.engine = ScriptedEngine()

    def run(self, *results: ResultSet, rerun: bool = False) -> Job:
        bench = self.bench
        if self.engine.runs:
            bench.now += timedelta(hours=1)
            bench.job_id = bench.queue_job()
        bench.ledger.update(bench.job_id, source_digest="d", details={RERUN: ["bundle"]} if rerun else {})
        self.engine.script += results
        bench.worker(self.engine).work_one()
        assert self.engine.script == []
        while (row := bench.ledger.claim_delivery("s", lease_s=60)) is not None:
            bench.ledger.finish_delivery(row.id, "s", state=DeliveryState.FAILED, sent=1, statuses={})
        assert bench.job.state is JobState.FAILED
        return bench.job

    @property
    def times(self) -> list[datetime]:
        """That the runs were told to write."""
        return [created for _, _, created in self.engine.runs]


def test_one_series_uid_has_one_time_whatever_job_writes_it(bench: Bench) -> None:
    routed = Routed(bench)
    first = routed.run(result())
    again = routed.run(other_result(), rerun=True)
    assert routed.times == [first.created, again.created]
    routed.run(other_result())  # routed again: the bundle of the second job
    assert routed.times[2:] == [again.created]
    routed.run(result(), result())  # the first bundle again: known when the series is there
    assert routed.times[3:] == [again.created, first.created]
    assert len({one.created for one in bench.ledger.jobs_of_series(SERIES)}) == 4


def test_a_series_of_its_own_is_written_once(bench: Bench) -> None:
    routed = Routed(bench)
    routed.run(result())
    routed.run(other_result(), rerun=True)
    assert len(routed.times) == 2


def test_a_job_that_is_cancelled_while_it_runs_leaves_no_result(bench: Bench) -> None:
    worker = bench.worker(ScriptedEngine(lambda: bench.ledger.cancel(bench.job_id)))
    worker.work_one()
    assert bench.job.state is JobState.CANCELLED
    assert not bench.spool.has_result(bench.job_id)
    assert bench.ledger.deliveries(bench.job_id) == []


def test_a_job_in_other_hands_is_left_to_them(bench: Bench) -> None:
    def lose() -> None:
        bench.now += timedelta(hours=1)
        bench.ledger.sweep(max_attempts=3, retry_s=0)
        bench.now += timedelta(seconds=1)
        assert bench.ledger.claim("node-other", lease_s=3600)

    bench.worker(ScriptedEngine(lose)).work_one()
    assert (bench.job.state, bench.job.lease_owner) == (JobState.RUNNING, "node-other")
    assert bench.spool.has_result(bench.job_id)  # the same bytes: the other one may find them


def test_a_stop_without_grace_gives_the_job_back_even_at_its_last_attempt(bench: Bench) -> None:
    bench.config = bench.config.model_copy(update={"engine": EngineConfig(max_attempts=1)})
    worker: Worker
    engine = ScriptedEngine(lambda: worker.stop(grace_s=0))
    worker = bench.worker(engine)
    worker.work_one()
    assert (bench.job.state, bench.job.reason_code) == (JobState.QUEUED, "interrupted")


def test_a_stop_with_grace_lets_the_job_end(bench: Bench) -> None:
    worker: Worker
    engine = ScriptedEngine(lambda: worker.stop(grace_s=60))
    worker = bench.worker(engine)
    worker.work_one()
    assert bench.job.state is JobState.DELIVERING


def test_a_start_takes_back_what_its_earlier_life_ran_and_nothing_else(bench: Bench) -> None:
    assert bench.ledger.claim(OWNER, lease_s=3600)
    other = bench.queue_job()
    assert bench.ledger.claim("node-other", lease_s=3600)
    with structlog.testing.capture_logs() as logs:
        bench.worker(ScriptedEngine()).reclaim()
    assert (bench.job.state, bench.job.reason_code) == (JobState.QUEUED, "restarted")
    assert bench.ledger.get(other).state is JobState.RUNNING
    (line,) = logs
    assert (line["event"], line["state"]) == ("job.reclaimed", "QUEUED")
    assert line["reason"].startswith("its worker is gone")


def test_a_job_that_takes_the_node_down_again_and_again_fails(bench: Bench) -> None:
    worker = bench.worker(ScriptedEngine())
    for _ in range(3):
        assert bench.ledger.claim(OWNER, lease_s=3600)
        worker.reclaim()
    assert (bench.job.state, bench.job.reason_code) == (JobState.FAILED, "restarted")


def test_the_thread_works_and_stops(bench: Bench) -> None:
    worker = bench.worker(ScriptedEngine("ok"), poll_s=0.01)
    worker.start()
    assert worker.alive
    while bench.job.state is not JobState.DELIVERING:
        worker.wake()
    worker.stop(grace_s=1)
    assert not worker.alive


def test_the_engine_is_asked_for_each_encoding_that_a_destination_wants(bench: Bench) -> None:
    def config(*encodings: str) -> Config:
        destinations = tuple(DestinationConfig(name=f"d{i}", peer="pacs", encoding=e) for i, e in enumerate(encodings))
        return bench.config.model_copy(update={"destinations": destinations})

    assert pipeline_options(config()).output.encodings == ("sc",)
    assert pipeline_options(config("pet")).output.encodings == ("pet",)
    assert pipeline_options(config("pet", "sc", "pet")).output.encodings == ("sc", "pet")


def _series(kind: str, encoding: str) -> SeriesSummary:
    return SeriesSummary(
        kind=kind,
        encoding=encoding,
        series_uid=f"1.{kind}.{encoding}",
        sop_class_uid=SC,
        instances=3,
        folder=f"{kind}-{encoding}",
    )


@pytest.mark.parametrize(
    ("destination", "expected"),
    [
        ({"encoding": "sc"}, ["pet-sc", "mip-sc"]),
        ({"encoding": "pet"}, ["pet-pet", "mip-sc"]),
        ({"encoding": "pet", "send_mip": False}, ["pet-pet"]),
    ],
)
def test_a_destination_gets_the_series_in_its_encoding(destination: dict[str, Any], expected: list[str]) -> None:
    series = [_series("pet", "sc"), _series("pet", "pet"), _series("mip", "sc")]
    rows: list[NewDelivery] = new_deliveries(series, [DestinationConfig(name="pacs", peer="pacs", **destination)])
    assert [f"{row.kind}-{row.encoding}" for row in rows] == expected
    assert all(row.destination == "pacs" and row.instances == 3 for row in rows)


def test_the_result_on_disk_is_what_the_ledger_is_told(bench: Bench) -> None:
    bench.worker(ScriptedEngine("ok")).work_one()
    summary = read_summary(bench.spool.result_folder(bench.job_id))
    assert [s["series_uid"] for s in bench.job.details["result_series"]] == [s.series_uid for s in summary.series]
