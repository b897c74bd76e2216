"""Text of a stranger that would break a log line, a terminal, SQL, a shell, HTML or a spreadsheet."""

from __future__ import annotations

import csv
import io
import json
import re
import sqlite3
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from hostile_tools import NASTY, assert_one_line_each
from intake_tools import Intake, config, running_intake, small_ct
from pydicom import Dataset
from typer.testing import CliRunner

from dicom_node.cli import app
from dicom_node.config import LogConfig
from dicom_node.log import configure_logging

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
RUNNER = CliRunner()
FIELDS = (
    *("StudyDescription", "SeriesDescription", "Manufacturer", "ConvolutionKernel", "BodyPartExamined"),
    *("AccessionNumber", "PatientID", "PatientName", "ProtocolName", "ImageComments"),
)


def spoilt(text: str) -> object:
    """What makes every text of a data set `text`."""

    def modify(ds: Dataset, _: int) -> None:
        for keyword in FIELDS:
            ds.add_new(keyword, "UT", text)  # no length to keep to; the VR on the wire is the sender's affair

    return modify


@pytest.fixture(scope="module")
def spool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Intake, Path, str]]:
    """An intake with a series for each nasty text and what was logged meanwhile; the configuration for commands."""
    folder = tmp_path_factory.mktemp("nasty")
    out = io.StringIO()
    configure_logging(LogConfig(), stream=out)
    try:
        with running_intake(folder, config(), listen=False) as intake:
            for number, text in enumerate(NASTY):
                paths = small_ct(folder / "ct" / str(number), 4, modify=spoilt(text))
                token = intake.registry.open(calling_ae=text.replace("\n", " ")[:16], address="127.0.0.1", peer="")
                assert token is not None
                intake.put(paths, token)
                intake.registry.close(token)
                intake.ledger.note("", "association_rejected", f"{text!a}: no peer", details={"reason": text})
            intake.pass_time(31)
            path = folder / "config.toml"
            path.write_text(
                f'[storage]\nroot = "{folder / "spool"}"\ndatabase_url = "sqlite:///{folder / "ledger.sqlite"}"\n'
            )
            yield intake, path, out.getvalue()
    finally:
        structlog.reset_defaults()


def run(config_file: Path, *words: str) -> str:
    result = RUNNER.invoke(app, [*words, "--config", str(config_file)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.output


def controls(text: str) -> set[str]:
    """What a terminal would obey: control characters and those that turn the direction of writing."""
    return {c for c in text if unicodedata.category(c) in ("Cc", "Cf") and c not in "\n"}


def test_each_becomes_a_job_and_no_log_line_is_of_their_making(spool: tuple[Intake, Path, str]) -> None:
    intake, _, logged = spool
    assert len(intake.jobs()) == len(NASTY)
    assert {job.state for job in intake.jobs()} == {"QUEUED"}
    assert_one_line_each(logged)
    assert controls(logged) == set()


@pytest.mark.parametrize("words", [("jobs", "list"), ("jobs", "list", "--json"), ("jobs", "list", "--csv")])
def test_no_listing_obeys_them(spool: tuple[Intake, Path, str], words: tuple[str, ...]) -> None:
    assert controls(run(spool[1], *words)) == set()


def test_each_is_shown_and_explained_without_being_obeyed(spool: tuple[Intake, Path, str]) -> None:
    intake, path, _ = spool
    for job in intake.jobs()[::4]:
        shown = run(path, "jobs", "show", job.id[:12])
        assert job.id[:8] in shown
        assert controls(shown) == set()
    for wanted in ("; DROP TABLE", "$(touch /tmp/x)", intake.jobs()[0].info.study_uid):
        assert controls(run(path, "why", wanted)) == set()
    assert controls(run(path, "jobs", "show", intake.jobs()[0].id, "--json")) == set()


def test_json_has_the_printable_texts_as_they_came(spool: tuple[Intake, Path, str]) -> None:
    rows = json.loads(run(spool[1], "jobs", "list", "--json"))
    found = {row["series_description"] for row in rows}
    assert {text for text in NASTY if text.isprintable()} <= found


def test_no_cell_of_the_csv_is_a_formula(spool: tuple[Intake, Path, str]) -> None:
    rows = list(csv.reader(io.StringIO(run(spool[1], "jobs", "list", "--csv"))))
    assert len(rows) == len(NASTY) + 1
    assert len({len(row) for row in rows}) == 1
    assert [cell for row in rows for cell in row if cell[:1] in ("=", "+", "-", "@", "\t", "\r", "\n")] == []


def test_the_ledger_has_all_its_tables_and_finds_them_by_their_text(spool: tuple[Intake, Path, str]) -> None:
    intake, path, _ = spool
    with sqlite3.connect(path.parent / "ledger.sqlite") as database:
        tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    assert {"jobs", "events"} <= {re.sub("^job$", "jobs", name) for name in tables}, tables
    for job in intake.jobs():
        assert [found.id for found in intake.jobs(job.info.series_uid)] == [job.id]
