"""`dicom-node recall`: every result of a model version, and the notes that reject them, once."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_pacs import free_port
from orthanc import running_orthanc
from pydicom import dcmread
from recall_tools import Bench, write_config
from typer.testing import CliRunner, Result

from dicom_node.cli import app
from dicom_node.cli.recall import Why
from dicom_node.delivery import Deliveries, outbox_files
from pipeline.outputs.rejection_note import RejectionReason
from storage.records import REJECTION, DeliveryState, JobState

RUNNER = CliRunner()
ROOT = Path(__file__).parents[2]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    write_config(made)
    yield made
    made.ledger.close()


def ask(bench: Bench, *words: str, answer: str = "") -> Result:
    command = ["recall", *words, "--config", str(bench.root / "config.toml")]
    return RUNNER.invoke(app, command, input=answer, env={"COLUMNS": "300"})


def notes(bench: Bench, job_id: str) -> dict[tuple[str, str], DeliveryState]:
    return {(d.destination, d.encoding): d.state for d in bench.ledger.deliveries(job_id) if d.kind == REJECTION}


def test_every_result_of_a_version_is_listed_with_its_series_and_where_they_are(bench: Bench) -> None:
    bench.finished(version="2", accession="OLDER")
    job = bench.finished(version="3", accession="ACC3")
    bench.send()
    listed = json.loads(ask(bench, "--bundle", "phantom@3", "--json").stdout)
    assert [(one["accession"], one["study_uid"], one["job"]) for one in listed] == [("ACC3", "2.25.901", job.id)]
    rows = {(row["destination"], row["kind"], row["encoding"], row["state"]) for row in listed[0]["series"]}
    assert rows == {
        ("pacs", "pet", "sc", "SENT"),
        ("pacs", "mip", "sc", "SENT"),
        ("other", "pet", "pet", "SENT"),
        ("other", "mip", "sc", "SENT"),
    }
    uids = {row["series_uid"] for row in listed[0]["series"]}
    assert uids == {delivery.series_uid for delivery in bench.ledger.deliveries(job.id)}
    shown = ask(bench, "--bundle", "phantom").stdout
    assert "ACC3" in shown
    assert "OLDER" in shown


def test_the_csv_has_a_line_for_each_series_and_destination(bench: Bench) -> None:
    bench.finished(accession="ACC3")
    rows = list(csv.DictReader(io.StringIO(ask(bench, "--bundle", "phantom@3", "--csv").stdout)))
    assert len(rows) == 4
    assert {(row["accession"], row["bundle"], row["rejection"]) for row in rows} == {("ACC3", "phantom 3", "")}


def test_the_time_narrows_the_list(bench: Bench) -> None:
    bench.finished()
    assert json.loads(ask(bench, "--bundle", "phantom", "--until", "2025-12-31", "--json").stdout) == []
    assert len(json.loads(ask(bench, "--bundle", "phantom", "--since", "2025-12-31", "--json").stdout)) == 1


def test_a_list_changes_nothing(bench: Bench) -> None:
    job = bench.finished()
    bench.send()
    before = bench.ledger.events(job.id)
    ask(bench, "--bundle", "phantom")
    assert bench.ledger.events(job.id) == before
    assert "no result" in ask(bench, "--bundle", "nobody").stdout


def test_rejections_are_asked_for_and_a_no_sends_nothing(bench: Bench) -> None:
    job = bench.finished()
    bench.send()
    refused = ask(bench, "--bundle", "phantom", "--send-rejections", answer="n\n")
    assert refused.exit_code == 1
    assert notes(bench, job.id) == {}
    assert ask(bench, "--bundle", "phantom", "--send-rejections", answer="y\n").exit_code == 0
    assert len(notes(bench, job.id)) == 4


def test_every_series_is_rejected_where_it_went(bench: Bench) -> None:
    job = bench.finished()
    bench.send()
    done = ask(bench, "--bundle", "phantom@3", "--send-rejections", "--yes")
    assert done.exit_code == 0, done.output
    assert "1 results, 4 rejections" in done.output
    assert set(notes(bench, job.id)) == {
        ("pacs", "kos-quality-pet-sc"),
        ("pacs", "kos-quality-mip-sc"),
        ("other", "kos-quality-pet-pet"),
        ("other", "kos-quality-mip-sc"),
    }
    assert bench.send() == ["pacs rejection", "pacs rejection", "other rejection", "other rejection"]
    assert bench.ledger.get(job.id).state is JobState.DONE
    assert {
        row["rejection"] for row in json.loads(ask(bench, "--bundle", "phantom", "--json").stdout)[0]["series"]
    } == {"quality SENT"}


def test_a_second_recall_sends_nothing_twice(bench: Bench) -> None:
    job = bench.finished()
    bench.send()
    ask(bench, "--bundle", "phantom", "--send-rejections", "--yes")
    files = {p: p.read_bytes() for p in bench.spool.result_folder(job.id).glob("rejection-*/*")}
    again = ask(bench, "--bundle", "phantom", "--send-rejections", "--yes")
    assert "1 results, 0 rejections" in again.output
    bench.send()
    again = ask(bench, "--bundle", "phantom", "--send-rejections", "--yes")
    assert "1 results, 0 rejections" in again.output
    assert bench.ledger.claim_delivery("x", lease_s=60) is None
    assert {p: p.read_bytes() for p in bench.spool.result_folder(job.id).glob("rejection-*/*")} == files
    assert bench.codes(job.id).count("recalled") == 1


def test_patient_safety_is_another_note_with_its_own_title(bench: Bench) -> None:
    job = bench.finished()
    bench.send()
    ask(bench, "--bundle", "phantom", "--send-rejections", "--yes", "--why", "113037", "--destination", "pacs")
    assert set(notes(bench, job.id)) == {("pacs", "kos-safety-pet-sc"), ("pacs", "kos-safety-mip-sc")}
    note = dcmread(next(bench.spool.result_folder(job.id).glob("rejection-kos-safety-pet-sc/*")))
    assert note.ConceptNameCodeSequence[0].CodeValue == "113037"


def test_the_reasons_of_the_command_are_the_titles_of_the_notes() -> None:
    assert {why.name: why.value for why in Why} == {one.name: one.document_title.value for one in RejectionReason}


def test_what_waits_is_not_sent_any_more_and_what_is_held_is_cancelled(bench: Bench) -> None:
    waiting = bench.finished(series_uid="2.25.1")
    held = bench.finished(series_uid="2.25.2", held=("suv_range", "too hot"))
    assert ask(bench, "--bundle", "phantom", "--send-rejections", "--yes").exit_code == 0
    assert bench.send() == []
    assert notes(bench, waiting.id) == notes(bench, held.id) == {}
    assert bench.ledger.get(waiting.id).state is JobState.DONE
    assert (bench.ledger.get(held.id).state, bench.ledger.get(held.id).reason_code) == (JobState.CANCELLED, "recalled")
    assert {d.reason_code for d in bench.ledger.deliveries(waiting.id)} == {"recalled"}


def test_a_recall_at_one_destination_is_kept_there_also_without_a_note(bench: Bench) -> None:
    job = bench.finished()
    done = ask(bench, "--bundle", "phantom", "--send-rejections", "--yes", "--destination", "pacs")
    assert done.exit_code == 0, done.output
    assert notes(bench, job.id) == {}
    assert set(bench.send()) == {"other pet", "other mip"}
    bench.ledger.redeliver(job.id)
    assert set(bench.send()) == {"other pet", "other mip"}
    refused = RUNNER.invoke(
        app, ["jobs", "redeliver", job.id, "--destination", "pacs", "--config", str(bench.root / "config.toml")]
    )
    assert refused.exit_code == 1
    assert "recalled" in refused.output


def told(bench: Bench, job_id: str) -> list[str]:
    """What `why` and `jobs show` say of a recall; the same, in lines of their own."""
    config = ("--config", str(bench.root / "config.toml"))
    why = RUNNER.invoke(app, ["why", "ACC1", *config]).output.splitlines()
    said = [line.strip().removeprefix("recalled: ") for line in why if line.startswith("    recalled: ")]
    shown = RUNNER.invoke(app, ["jobs", "show", job_id, *config], env={"COLUMNS": "300"}).output
    assert all(line in shown for line in said)
    return said


def note_lines(bench: Bench, job_id: str) -> set[str]:
    found = [d for d in bench.ledger.deliveries(job_id) if d.kind == REJECTION]
    return {f"by note {d.series_uid} to {d.destination} (PENDING)" for d in found}


def test_a_recall_everywhere_is_told_with_its_time_and_its_notes(bench: Bench) -> None:
    job = bench.finished()
    bench.send()
    assert told(bench, job.id) == []
    ask(bench, "--bundle", "phantom", "--send-rejections", "--yes")
    when, *notes = told(bench, job.id)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d [\d:]+, 113001 Rejected for Quality Reasons: do not use its result", when)
    assert set(notes) == note_lines(bench, job.id)
    assert len(notes) == 4


def test_a_recall_at_one_destination_is_told_with_its_name(bench: Bench) -> None:
    job = bench.finished()
    ask(bench, "--bundle", "phantom", "--send-rejections", "--yes", "--destination", "other")
    bench.send()
    ask(bench, "--bundle", "phantom", "--send-rejections", "--yes", "--destination", "pacs")
    at_other, none, at_pacs, *notes = told(bench, job.id)
    assert (at_other[:10], none) == ("at other: ", "without a note: nothing of it had arrived")
    assert at_pacs.startswith("at pacs: ")
    assert at_pacs.endswith(", 113001 Rejected for Quality Reasons: do not use its result there")
    assert set(notes) == note_lines(bench, job.id)
    assert len(notes) == 2


def test_a_held_result_recalled_at_one_destination_stays_held_for_the_others(bench: Bench) -> None:
    job = bench.finished(held=("suv_range", "too hot"))
    again = ("--bundle", "phantom", "--send-rejections", "--yes", "--destination", "pacs")
    assert ask(bench, *again).exit_code == 0
    told = bench.ledger.get(job.id).details["recalled_at"]
    assert told["pacs"]["code"] == "113001"
    assert ask(bench, *again).exit_code == 0
    held = bench.ledger.get(job.id)
    assert (held.state, held.details["recalled_at"]) == (JobState.HELD, told)
    assert bench.codes(job.id).count("recalled") == 2  # what waited was stopped; the mark was left
    bench.ledger.release(job.id)
    assert set(bench.send()) == {"other pet", "other mip"}
    assert bench.ledger.get(job.id).state is JobState.DONE


def test_a_recalled_result_is_neither_retried_nor_computed_in_place(bench: Bench) -> None:
    job = bench.finished(held=("suv_range", "too hot"))
    ask(bench, "--bundle", "phantom", "--send-rejections", "--yes")
    bench.spool.discard_result(job.id)
    for words in (("retry", job.id), ("redeliver", job.id)):
        refused = RUNNER.invoke(app, ["jobs", *words, "--config", str(bench.root / "config.toml")])
        assert refused.exit_code == 1, words
    assert bench.ledger.get(job.id).state is JobState.CANCELLED
    assert bench.send() == []


def test_a_note_that_has_arrived_is_not_written_anew_when_its_file_is_gone(bench: Bench) -> None:
    job = bench.finished()
    bench.send()
    ask(bench, "--bundle", "phantom", "--send-rejections", "--yes")
    bench.send()
    bench.spool.discard_result(job.id)
    done = ask(bench, "--bundle", "phantom", "--send-rejections", "--yes")
    assert done.exit_code == 0, done.output
    assert not bench.spool.result_folder(job.id).exists()


def test_show_and_why_tell_that_a_result_was_recalled(bench: Bench) -> None:
    job = bench.finished()
    bench.send()
    ask(bench, "--bundle", "phantom", "--send-rejections", "--yes")
    for words in (("jobs", "show", job.id[:8]), ("why", "ACC1")):
        shown = RUNNER.invoke(app, [*words, "--config", str(bench.root / "config.toml")], env={"COLUMNS": "300"})
        assert "Rejected for Quality Reasons" in shown.stdout, words
        assert "113001" in shown.stdout


def test_a_result_that_cannot_be_named_any_more_is_told_and_the_others_are_rejected(bench: Bench) -> None:
    lost = bench.finished(accession="LOST", series_uid="2.25.1")
    kept = bench.finished(series_uid="2.25.2")
    bench.send()
    bench.spool.discard_result(lost.id)
    done = ask(bench, "--bundle", "phantom", "--send-rejections", "--yes")
    assert done.exit_code == 1
    assert "LOST" in done.output
    assert len(notes(bench, kept.id)) == 4
    assert notes(bench, lost.id) == {}


def test_asking_the_ledger_loads_no_library_of_images() -> None:
    """A list must come at once, also on a slow machine: torch and highdicom take seconds."""
    heavy = "{'torch', 'SimpleITK', 'highdicom'}"
    code = f"import sys, dicom_node.cli.app; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr


def test_an_unknown_destination_rejects_nothing(bench: Bench) -> None:
    job = bench.finished()
    bench.send()
    done = ask(bench, "--bundle", "phantom", "--send-rejections", "--yes", "--destination", "elsewhere")
    assert done.exit_code == 1
    assert "other, pacs" in done.output
    assert notes(bench, job.id) == {}


@pytest.mark.orthanc
def test_orthanc_stores_the_notes_beside_the_series_and_goes_on_showing_them(tmp_path: Path) -> None:
    """Orthanc keeps Key Objects and does not act on them: docs/recall.md tells the administrator so."""
    with running_orthanc(tmp_path / "orthanc", modalities={"node": ("SYNPET", free_port())}) as orthanc:
        bench = Bench(tmp_path, ports=(orthanc.dicom_port, orthanc.dicom_port), verify=True)
        config = bench.config
        peers = tuple(peer.model_copy(update={"ae_title": orthanc.ae_title}) for peer in config.peers)
        bench.config = config.model_copy(update={"peers": peers, "destinations": config.destinations[:1]})
        write_config(bench)
        job = bench.finished()
        deliver(bench, job.id)
        assert ask(bench, "--bundle", "phantom", "--send-rejections", "--yes").exit_code == 0
        assert bench.ledger.get(job.id).state is JobState.DELIVERING
        deliver(bench, job.id)
        assert set(notes(bench, job.id).values()) == {DeliveryState.SENT}
        stored, pets = orthanc.series("KO"), orthanc.series("PT")
        assert {len(one["Instances"]) for one in stored} == {1}
        assert {one["ParentStudy"] for one in stored} == {one["ParentStudy"] for one in pets}
        got = {
            str(dcmread(path).SOPInstanceUID)
            for number, one in enumerate(stored)
            for path in orthanc.instances(one, tmp_path / f"note{number}")
        }
        sent = {str(dcmread(p).SOPInstanceUID) for p in bench.spool.result_folder(job.id).glob("rejection-*/*")}
        assert got == sent
        assert len(pets[0]["Instances"]) == len(outbox_files(bench.spool.result_folder(job.id) / "pet-sc"))
        bench.ledger.close()


def deliver(bench: Bench, job_id: str) -> None:
    """Run the node's own delivery threads until the job is done."""
    deliveries = Deliveries(bench.config, bench.ledger, bench.spool, owner="node-test", poll_s=0.02, clock=bench.clock)
    deliveries.reclaim()
    deliveries.start()
    try:
        end = time.monotonic() + 240
        while bench.ledger.get(job_id).state is not JobState.DONE:
            assert time.monotonic() < end
            bench.clock()
            time.sleep(0.05)
    finally:
        deliveries.stop()
