"""`dicom-node why` names the cause, and says what helps."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

import pipeline.bundle_paths
from dicom_node.cli import app
from dicom_node.cli.why import BUNDLE_CODES
from dicom_node.config import load_config
from storage.ledger import Ledger, open_ledger
from storage.records import JobState, SeriesInfo

REJECTED = "'CT_2' at '10.0.0.9': no peer has this AE title"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.toml"
    path.write_text("[intake]\nmin_free_bytes = 1\n", encoding="utf-8")
    (tmp_path / "spool").mkdir(mode=0o700)
    return path


@pytest.fixture
def ledger(config: Path) -> Iterator[Ledger]:
    opened = open_ledger(load_config(config).ledger_url)
    yield opened
    opened.close()


def ask(config: Path, *words: str) -> str:
    return CliRunner().invoke(app, [*words, "--config", str(config)], env={"COLUMNS": "200"}).output


def test_a_check_leaves_nothing_in_the_ledger(config: Path, ledger: Ledger) -> None:
    assert "opens and takes a write" in ask(config, "check")
    assert ledger.search_events() == []


def test_the_cause_is_not_hidden_by_what_an_earlier_versions_check_wrote(config: Path, ledger: Ledger) -> None:
    ledger.note("", "calling_ae_unknown", REJECTED)
    for _ in range(30):
        ledger.note("", "check", "dicom-node check")
    said = ask(config, "why", "ACC1")
    assert REJECTED in said
    assert "dicom-node check\n" not in said


def test_what_was_said_again_and_again_is_one_line_and_hides_nothing(config: Path, ledger: Ledger) -> None:
    ledger.note("", "calling_ae_unknown", REJECTED)
    for _ in range(30):
        ledger.note("", "backup_failed", "the disk is full")
    said = ask(config, "why", "ACC1")
    assert REJECTED in said
    assert said.count("the disk is full") == 1
    assert "the disk is full (30 times since " in said


def test_a_program_is_told_how_often_each_was_said(config: Path, ledger: Ledger) -> None:
    for code in ("one", "two", "one"):
        ledger.note("", code, "the same text")
    told = json.loads(ask(config, "why", "ACC1", "--json"))["unassigned"]
    assert [(one["code"], one["times"]) for one in told] == [("two", 1), ("one", 2)]
    assert told[1]["first"] < told[1]["time"]


def failed(ledger: Ledger, number: int, code: str) -> str:
    job = ledger.open_job(SeriesInfo(study_uid=f"1.{number}", series_uid=f"1.{number}.1", accession=f"ACC{number}"))
    ledger.move(job.id, JobState.QUEUED, code="chosen", text="the only CT of the study")
    ledger.claim("worker", lease_s=60)
    ledger.fail_run(job.id, "worker", code=code, text="said by the engine", permanent=True, max_attempts=3)
    return job.id[:8]


def test_a_job_without_a_bundle_is_not_just_to_be_retried(config: Path, ledger: Ledger) -> None:
    for number, code in enumerate(BUNDLE_CODES):
        job_id = failed(ledger, number, code)
        [advice] = [line for line in ask(config, "why", f"ACC{number}").splitlines() if "what to do" in line]
        assert advice.index("[pipeline].bundle") < advice.index("models verify") < advice.index("restart the node")
        assert advice.endswith(f"dicom-node jobs retry {job_id}")
    job_id = failed(ledger, 100, "engine_killed")
    assert f"what to do: dicom-node jobs retry {job_id}" in ask(config, "why", "ACC100")


def test_every_code_of_a_bundle_is_known() -> None:
    source = Path(pipeline.bundle_paths.__file__).with_name("bundle.py").read_text(encoding="utf-8")
    listed = source.partition("BundleError codes: ")[2].partition('"""')[0]
    assert set(re.findall("[a-z_]+", listed)) == BUNDLE_CODES
