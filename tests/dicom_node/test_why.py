"""`dicom-node why` names the cause, and says what helps."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dicom_node.cli import app
from dicom_node.config import load_config
from storage.ledger import Ledger, open_ledger

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
