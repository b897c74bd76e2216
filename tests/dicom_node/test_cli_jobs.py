"""The ledger's commands, run as a person runs them, on a ledger with known jobs."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from dicom_node.cli import app
from dicom_node.cli.common import local_time
from dicom_node.cli.jobs import waiting_text
from dicom_node.config import load_config
from storage.errors import LedgerError
from storage.ledger import Ledger, open_ledger
from storage.records import Delivery, DeliveryState, JobState, NewDelivery, SeriesInfo

RUNNER = CliRunner()
HOSTILE = "[red]x[/red]\x1b[2J"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.toml"
    path.write_text('[storage]\nroot = "spool"\n', encoding="utf-8")
    return path


@pytest.fixture
def ledger(config: Path) -> Iterator[Ledger]:
    (config.parent / "spool").mkdir()
    opened = open_ledger(load_config(config).ledger_url)
    yield opened
    opened.close()


def info(number: int, **fields: str) -> SeriesInfo:
    base = {
        "study_uid": f"1.2.{number}",
        "series_uid": f"1.2.{number}.1",
        "accession": f"ACC{number}",
        "patient_id": f"PID{number}",
        "calling_ae": "SCANNER",
        "peer_address": "127.0.0.1",
    }
    return SeriesInfo(**{**base, **fields})


def ask(config: Path, *words: str) -> Result:
    return RUNNER.invoke(app, [*words, "--config", str(config)], env={"COLUMNS": "200"})


def run_to_delivering(ledger: Ledger, number: int) -> str:
    job = ledger.open_job(info(number))
    ledger.move(job.id, JobState.QUEUED, code="chosen", text="the only CT of the study")
    claimed = ledger.claim("worker", lease_s=60)
    assert claimed is not None
    new = NewDelivery(destination="pacs", kind="pet", encoding="sc", series_uid="1.9", instances=3)
    ledger.complete_run(
        job.id,
        "worker",
        deliveries=[new],
        held=None,
        details={
            "stage_seconds": {"read": 1.5, "synthesis": 20.25},
            "stats": [
                {
                    "district": "head",
                    "volume_ml": 4000.0,
                    "suv_mean": 2.5,
                    "suv_max": 12.0,
                    "confidence": 0.9,
                    "evaluated": True,
                },
                {
                    "district": "arms",
                    "volume_ml": 900.0,
                    "suv_mean": 0.0,
                    "suv_max": 0.0,
                    "confidence": 0.2,
                    "evaluated": False,
                },
            ],
        },
    )
    return job.id


def test_without_a_ledger_no_command_makes_one(config: Path) -> None:
    result = ask(config, "jobs", "list")
    assert isinstance(result.exception, LedgerError)
    assert "no node has run" in str(result.exception)
    assert not (config.parent / "spool").exists()


def test_the_list_of_an_empty_ledger_says_so(config: Path, ledger: Ledger) -> None:
    result = ask(config, "jobs", "list")
    assert result.exit_code == 0
    assert "no job matches" in result.output


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--accession", "ACC1"), {"ACC1"}),
        (("--patient-id", "PID2"), {"ACC2"}),
        (("--study", "1.2.1"), {"ACC1"}),
        (("--series", "1.2.2.1"), {"ACC2"}),
        (("--peer", "OTHER"), {"ACC2"}),
        (("--state", "REJECTED"), {"ACC1"}),
        (("--state", "rejected", "--state", "RECEIVING"), {"ACC1", "ACC2"}),
        (("--since", "1h"), {"ACC1", "ACC2"}),
        (("--until", "1h"), set()),
        (("--since", "2100-01-01"), set()),
        (("--limit", "1"), {"ACC2"}),
    ],
)
def test_a_filter_narrows_the_list(config: Path, ledger: Ledger, words: tuple[str, ...], expected: set[str]) -> None:
    first = ledger.open_job(info(1))
    ledger.move(first.id, JobState.REJECTED, code="localizer", text="a localizer is not used")
    ledger.open_job(info(2, calling_ae="OTHER"))
    result = ask(config, "jobs", "list", "--json", *words)
    assert result.exit_code == 0, result.output
    assert {job["accession"] for job in json.loads(result.output)} == expected


def test_csv_has_a_header_and_neutralises_formulas(config: Path, ledger: Ledger) -> None:
    ledger.open_job(info(1, series_description="=cmd|'/c calc'!A1"))
    rows = list(csv.DictReader(io.StringIO(ask(config, "jobs", "list", "--csv").output)))
    assert rows[0]["accession"] == "ACC1"
    assert rows[0]["series_description"].startswith("'=")


def test_a_hostile_description_reaches_the_terminal_as_text(config: Path, ledger: Ledger) -> None:
    ledger.open_job(info(1, series_description=HOSTILE))
    for words in (("jobs", "list"), ("why", "ACC1")):
        output = ask(config, *words).output
        assert "[red]x[/red]" in output.replace("\n", "")
        assert "\x1b[2J" not in output


def test_show_prints_stages_suv_deliveries_and_events(config: Path, ledger: Ledger) -> None:
    job_id = run_to_delivering(ledger, 1)
    output = ask(config, "jobs", "show", job_id[:8]).output
    for expected in ("synthesis", "20.25", "head", "12.00", "not evaluated", "pet (sc)", "0/3", "PENDING"):
        assert expected in output, expected
    whole = json.loads(ask(config, "jobs", "show", job_id, "--json").output)
    assert whole["state"] == "DELIVERING"
    assert whole["deliveries"][0]["destination"] == "pacs"
    assert len(whole["events"]) >= 3


def test_show_tells_how_far_a_delivery_is_proven_and_what_is_awaited(config: Path, ledger: Ledger) -> None:
    job_id = run_to_delivering(ledger, 1)
    row = ledger.claim_delivery("s", lease_s=60)
    assert row is not None
    goal = DeliveryState.VISIBLE
    ledger.finish_delivery(row.id, "s", state=DeliveryState.SENT, sent=3, statuses={}, goal=goal)
    assert ledger.claim_proof("s", lease_s=60)
    ledger.finish_proof(row.id, "s", state=DeliveryState.COMMITTED, goal=goal)
    output = ask(config, "jobs", "show", job_id).output
    times = ledger.deliveries(job_id)[0]
    for state, moment in ((DeliveryState.SENT, times.sent_at), (DeliveryState.COMMITTED, times.committed_at)):
        assert f"{state.value} {local_time(moment)}" in output
    assert "VISIBLE is awaited" in output
    assert "VISIBLE is awaited" in ask(config, "why", "ACC1").output
    whole = json.loads(ask(config, "jobs", "show", job_id, "--json").output)["deliveries"][0]
    assert (whole["state"], whole["goal"], whole["visible_at"]) == ("COMMITTED", "VISIBLE", None)


def attempt(ledger: Ledger, code: str, statuses: dict[str, str], *, next_attempt: datetime | None = None) -> None:
    """One attempt that did not succeed, of the delivery that has waited longest."""
    row = ledger.claim_delivery("s", lease_s=60)
    assert row is not None
    state = DeliveryState.PENDING if next_attempt else DeliveryState.FAILED
    ledger.finish_delivery(row.id, "s", state=state, sent=0, statuses=statuses, code=code, next_attempt=next_attempt)


def why_column(output: str) -> str:
    return output.strip().splitlines()[-1].partition("SCANNER")[2].strip(" │|")


def test_the_list_says_why_a_result_is_not_delivered_and_when_it_is_tried_again(config: Path, ledger: Ledger) -> None:
    run_to_delivering(ledger, 1)
    assert why_column(ask(config, "jobs", "list").output) == "pacs: PENDING"
    soon = datetime.now(UTC) + timedelta(minutes=5)
    attempt(ledger, "connection_failed", {f"1.9.{n}": "not_sent" for n in range(3)}, next_attempt=soon)
    expected = f"pacs: connection_failed, next {soon.astimezone():%H:%M:%S}"
    assert why_column(ask(config, "jobs", "list").output) == expected


WAITING = Delivery(
    id=1, job_id="j", destination="pacs", kind="pet", encoding="sc", series_uid="1.9", instances=3,
    state=DeliveryState.PENDING,
)  # fmt: skip
VISIBLE = {"goal": DeliveryState.VISIBLE}


@pytest.mark.parametrize(
    ("deliveries", "expected"),
    [
        ([{"state": DeliveryState.SENDING}], "pacs: SENDING"),
        ([{"state": DeliveryState.SENT}], ""),
        ([{"state": DeliveryState.SENT, **VISIBLE}], "pacs: VISIBLE is awaited"),
        ([{"state": DeliveryState.SENT, **VISIBLE, "reason_code": "find_refused"}], "pacs: find_refused"),
        ([{}, {"kind": "mip", "reason_code": "no_response"}], "pacs: no_response"),
        ([{"state": DeliveryState.SENT}, {"kind": "mip"}], "pacs: PENDING"),
        ([{"state": DeliveryState.CANCELLED, "reason_code": "optional_refused"}], ""),
        (
            [{}, {"destination": "far", "state": DeliveryState.FAILED, "reason_code": "instances_refused"}],
            "far: instances_refused; pacs: PENDING",
        ),
    ],
)
def test_a_job_waits_for_the_deliveries_that_are_not_where_they_shall_be(
    deliveries: list[dict[str, Any]], expected: str
) -> None:
    assert waiting_text([replace(WAITING, **fields) for fields in deliveries]) == expected


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [
        ({f"1.9.{n}": "not_sent" for n in range(3)}, "each of 3 instances: not_sent (the attempt ended before"),
        ({"1.9.1": "0xA700"}, "1.9.1: 0xA700 Refused: Out of Resources"),
        ({"1.9.1": "not_committed_0x0112"}, "1.9.1: not_committed_0x0112"),
    ],
)
def test_show_says_in_words_what_became_of_instances(
    config: Path, ledger: Ledger, statuses: dict[str, str], expected: str
) -> None:
    job_id = run_to_delivering(ledger, 1)
    attempt(ledger, "connection_failed", statuses)
    output = ask(config, "jobs", "show", job_id).output
    assert f"  pacs, pet (sc): {expected}" in output
    assert "*" not in output


def test_an_unknown_job_is_an_error(config: Path, ledger: Ledger) -> None:
    result = ask(config, "jobs", "show", "ffff")
    assert result.exit_code == 1
    assert "jobs list" in result.output


def test_cancel_retry_and_release_move_the_job(config: Path, ledger: Ledger) -> None:
    job = ledger.open_job(info(1))
    ledger.move(job.id, JobState.HELD, code="rule_hold", text="rule 'x' holds it")
    assert "HELD -> QUEUED" in ask(config, "jobs", "release", job.id[:8]).output
    assert "QUEUED -> CANCELLED" in ask(config, "jobs", "cancel", job.id[:8]).output
    assert "CANCELLED -> QUEUED" in ask(config, "jobs", "retry", job.id[:8]).output
    assert ledger.get(job.id).state is JobState.QUEUED


def test_a_command_that_the_state_forbids_says_so(config: Path, ledger: Ledger) -> None:
    job = ledger.open_job(info(1))
    result = ask(config, "jobs", "release", job.id)
    assert result.exit_code == 1
    assert "RECEIVING" in result.output


def test_why_explains_the_series_that_was_used_and_the_one_that_was_not(config: Path, ledger: Ledger) -> None:
    job_id = run_to_delivering(ledger, 1)
    delivery = ledger.claim_delivery("sender", lease_s=60)
    assert delivery is not None
    ledger.finish_delivery(
        delivery.id,
        "sender",
        state=DeliveryState.FAILED,
        sent=0,
        statuses={},
        code="association_rejected",
        text="called AE title not recognized",
    )
    other = ledger.open_job(info(1, series_uid="1.2.1.2", series_description="TOPOGRAM"))
    ledger.move(other.id, JobState.REJECTED, code="localizer", text="a localizer is not used")
    output = " ".join(ask(config, "why", "ACC1").output.split())
    assert "failed" in output
    assert "called AE title not recognized" in output
    assert f"dicom-node jobs retry {job_id[:8]}" in output
    assert "'TOPOGRAM'" in output
    assert "localizer: a localizer is not used" in output


def test_why_also_takes_a_uid(config: Path, ledger: Ledger) -> None:
    ledger.open_job(info(1))
    for wanted in ("1.2.1", "1.2.1.1"):
        assert "is still arriving" in ask(config, "why", wanted).output


def test_why_of_something_unknown_tells_what_to_do(config: Path, ledger: Ledger) -> None:
    result = ask(config, "why", "NOBODY")
    assert result.exit_code == 1
    assert "never arrived" in result.output


def test_a_wrong_time_is_a_usage_error(config: Path, ledger: Ledger) -> None:
    assert ask(config, "jobs", "list", "--since", "yesterday").exit_code == 2
