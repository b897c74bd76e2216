"""A job that a gate holds, from `[gate]` in the configuration through the real pipeline to a person's decision."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import pytest
from tiny_bundle import write_tiny_bundle
from tiny_study import write_tiny_study
from typer.testing import CliRunner

from dicom_node.cli import app
from dicom_node.config import Config, ConfigError, load_config
from dicom_node.worker import Worker, pipeline_options
from pipeline.bundle import load_bundle
from pipeline.run import synthesize_series, write_result
from pipeline.types import GateOptions, OnProgress, PipelineOptions
from storage.incoming_file import PREAMBLE_BYTES
from storage.ledger import Ledger, open_ledger
from storage.records import DeliveryState, Job, JobState, SeriesInfo
from storage.spool import Spool

SERIES = "1.2.3"
CONFIG = """
[storage]
root = "spool"

[pipeline]
bundle = "{bundle}"
device = "cpu"
threads = 1

[gate]
max_lung_suv = 0.01

[[peers]]
name = "pacs"
ae_title = "PACS"

[[destinations]]
name = "pacs"
peer = "pacs"
"""


class EngineInProcess:
    """Runs the pipeline here, and not in a process of its own."""

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
        write_result(synthesize_series(paths, load_bundle(options.bundle), options, created=created), result_folder)


@dataclass
class Held:
    """One job that the output gate held, in a node's ledger and spool."""

    config: Path
    ledger: Ledger
    spool: Spool
    job_id: str

    @property
    def job(self) -> Job:
        return self.ledger.get(self.job_id)

    def ask(self, *words: str) -> str:
        result = CliRunner().invoke(app, [*words, "--config", str(self.config)], env={"COLUMNS": "200"})
        assert result.exit_code == 0, result.output
        return result.output


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Held]:
    config = tmp_path / "config.toml"
    config.write_text(CONFIG.format(bundle=write_tiny_bundle(tmp_path / "tiny")), encoding="utf-8")
    settings = load_config(config)
    spool = Spool(settings.storage.root, min_free_bytes=0)
    ledger = open_ledger(settings.ledger_url)
    job = ledger.open_job(SeriesInfo(study_uid="1.2", series_uid=SERIES, accession="ACC1"))
    for number, path in enumerate(write_tiny_study(tmp_path / "ct", series_uid=SERIES)):
        spool.adopt(spool.store_incoming("ab", f"{SERIES}.{number}", [path.read_bytes()[PREAMBLE_BYTES:]]), SERIES)
    spool.take_series(job.id, SERIES)
    ledger.move(job.id, JobState.QUEUED, code="chosen", text="chosen")
    Worker(settings, ledger, spool, EngineInProcess(), owner="node").work_one()  # type: ignore[arg-type]
    yield Held(config=config, ledger=ledger, spool=spool, job_id=job.id)
    ledger.close()


def test_an_implausible_result_is_held_with_reason_and_picture_until_a_person_releases_it(held: Held) -> None:
    assert (held.job.state, held.job.reason_code) == (JobState.HELD, "lung_uptake")
    assert held.ledger.claim_delivery("node", lease_s=60) is None
    said = held.ask("why", "ACC1")
    assert "lung_uptake: the mean SUV of lung" in said
    picture = f"outbox/{held.job_id}/overview.png"
    assert f"picture: {picture}" in said
    assert (held.spool.root / picture).read_bytes().startswith(b"\x89PNG")
    assert "HELD -> DELIVERING" in held.ask("jobs", "release", held.job_id[:8])
    assert held.ledger.claim_delivery("node", lease_s=60) is not None


def test_a_held_result_that_a_person_cancels_is_never_sent(held: Held) -> None:
    assert "HELD -> CANCELLED" in held.ask("jobs", "cancel", held.job_id[:8])
    assert held.ledger.claim_delivery("node", lease_s=60) is None
    assert {one.state for one in held.ledger.deliveries(held.job_id)} == {DeliveryState.CANCELLED}


def test_run_without_a_node_has_the_gates_of_the_configuration_and_keeps_what_they_would_hold(tmp_path: Path) -> None:
    bundle, config, out = write_tiny_bundle(tmp_path / "tiny"), tmp_path / "config.toml", tmp_path / "out"
    config.write_text(CONFIG.format(bundle=bundle), encoding="utf-8")
    write_tiny_study(tmp_path / "ct")
    words = ["run", str(tmp_path / "ct"), str(out), "--bundle", str(bundle), "--device", "cpu", "--config", str(config)]
    result = CliRunner().invoke(app, words, env={"COLUMNS": "200"})
    assert result.exit_code == 1
    assert "a gate would hold this result: lung_uptake: the mean SUV of lung" in result.output
    assert (out / "overview.png").is_file()


# --- [gate] ----------------------------------------------------------------------------------------------------------


def test_the_defaults_of_the_configuration_are_those_of_the_pipeline() -> None:
    assert pipeline_options(Config()).gate == GateOptions()


WRONG = {
    "a check that there is not": ("severity = { cihld = 'hold' }", "no check of a gate is called 'cihld'"),
    "a severity that there is not": ("severity = { child = 'warn' }", "'reject', 'hold' or 'note'"),
    "rejecting what is done": ("severity = { seam = 'reject' }", "seam can be hold or note, not reject"),
    "sending what is no number": ("severity = { non_finite = 'note' }", "non_finite can be hold, not note"),
    "a body of no size": ("body_mm = [600.0, 120.0]", "a lower and a higher size in mm"),
    "a district that there is not": ("required_districts = ['torso']", "[gate].required_districts"),
    "a negative age": ("min_age_years = -1", "[gate].min_age_years = -1"),
    "a share above one": ("max_not_evaluated = 1.5", "[gate].max_not_evaluated = 1.5"),
    "a factor that narrows": ("suv_factor = 0.5", "[gate].suv_factor = 0.5"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_key_of_the_gates_is_refused(case: str, tmp_path: Path) -> None:
    line, expected = WRONG[case]
    path = tmp_path / "config.toml"
    path.write_text(f"[gate]\n{line}", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert expected in str(caught.value)


def test_a_configured_severity_reaches_the_pipeline(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text('[gate]\nseverity = { child = "hold" }\nmin_age_years = 16', encoding="utf-8")
    gate = pipeline_options(load_config(path)).gate
    assert (gate.severity, gate.min_age_years) == ({"child": "hold"}, 16)
