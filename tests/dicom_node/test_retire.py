"""Taking a test study back, with a real ledger and real results: what is retired, what is not, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from pydicom import dcmread
from recall_tools import Bench

from dicom_node.recall import recall, results_of
from dicom_node.retire import retire, retire_study
from dicom_node.steps import Step, StepFailed
from dicom_node.trial import announce
from pipeline.outputs.rejection_note import RejectionReason
from storage.records import REJECTION, DeliveryState, Job, JobState, SeriesInfo

ACCESSION = "TEST261122180500"


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def trial(bench: Bench) -> Job:
    announce(bench.ledger, "2.25.901", "pacs")
    return bench.finished(accession=ACCESSION)


def steps(bench: Bench, accession: str = ACCESSION) -> Sequence[Step]:
    return list(retire_study(bench.config, bench.ledger, accession, timeout_s=0))


def send_one(bench: Bench) -> str:
    """Store the delivery that is due first; its kind, encoding and destination."""
    one = bench.ledger.claim_delivery("node-test", lease_s=60)
    assert one is not None
    bench.ledger.finish_delivery(one.id, "node-test", state=DeliveryState.SENT, sent=one.instances, statuses={})
    return f"{one.kind} ({one.encoding}) at {one.destination}"


def test_what_arrived_is_retired_and_what_waits_is_not_sent_any_more(bench: Bench) -> None:
    job = trial(bench)
    arrived = send_one(bench)
    with pytest.raises(StepFailed) as failed:
        retire(bench.config, bench.ledger, job.id, timeout_s=0)
    assert str(failed.value).startswith(f"NOT retired: {arrived}: its note is PENDING; the node goes on trying; never ")
    assert len(bench.send()) == 1  # the note
    text = retire(bench.config, bench.ledger, job.id, timeout_s=0)
    assert text.startswith(f"retired: {arrived}; never arrived: ")
    assert [one.state for one in bench.ledger.deliveries(job.id)].count(DeliveryState.CANCELLED) == 3
    assert bench.ledger.get(job.id).details["recalled_at"].keys() == {"pacs", "other"}


def test_what_was_tried_and_perhaps_never_arrived_is_told_apart(bench: Bench) -> None:
    job = trial(bench)
    refuse_all(bench, code="instances_refused")
    assert not steps(bench)[-1].ok
    bench.send()
    text = retire(bench.config, bench.ledger, job.id, timeout_s=0)
    assert text.startswith("retired in case it arrived: pet (sc), mip (sc) at pacs, pet (pet), mip (")


def test_a_note_that_failed_is_told_and_tried_again_when_it_is_asked_for_again(bench: Bench) -> None:
    job = trial(bench)
    bench.send(only="pacs")
    assert not steps(bench)[-1].ok
    refuse_all(bench)
    told = steps(bench)[-1]
    assert (told.name, told.ok) == ("retire", False)
    assert f"dicom-node doctor --retire-study {ACCESSION}" in told.remedy
    notes = [one for one in bench.ledger.deliveries(job.id) if one.kind == REJECTION]
    assert {one.state for one in notes} == {DeliveryState.PENDING}
    bench.send()
    assert steps(bench)[-1].ok


def refuse_all(bench: Bench, code: str = "no_presentation_context") -> None:
    """The archive takes none of what is due."""
    while (claimed := bench.ledger.claim_delivery("node-test", lease_s=60)) is not None:
        bench.ledger.finish_delivery(
            claimed.id,
            "node-test",
            state=DeliveryState.FAILED,
            sent=0,
            statuses={},
            code=code,
            text="it does not take it",
        )


def test_a_result_that_never_left_leaves_nothing_to_retire(bench: Bench) -> None:
    job = trial(bench)
    text = retire(bench.config, bench.ledger, job.id, timeout_s=0)
    assert text.startswith("nothing to retire: never arrived: pet (sc), mip (sc) at pacs, ")
    assert bench.send() == []


def test_a_job_that_has_no_result_yet_is_not_said_to_be_retired(bench: Bench) -> None:
    announce(bench.ledger, "2.25.901", "pacs")
    job = bench.ledger.open_job(SeriesInfo(study_uid="2.25.901", series_uid="2.25.902", accession=ACCESSION))
    bench.ledger.move(job.id, JobState.QUEUED, code="chosen", text="")
    found, told = steps(bench)
    assert found.ok
    assert not told.ok
    assert "nothing is retired yet: the job is QUEUED" in told.text
    assert f"dicom-node jobs cancel {job.id[:8]}" in told.remedy


def test_the_study_of_a_patient_is_refused_in_words_and_left_alone(bench: Bench) -> None:
    job = bench.finished(accession="ACC1")
    bench.send()
    before = bench.ledger.deliveries(job.id)
    (refused,) = steps(bench, "ACC1")
    assert not refused.ok
    assert refused.text == (f"accession ACC1: job {job.id[:8]} is no test study of dicom-node doctor, nothing was done")
    assert "dicom-node recall" in refused.remedy
    assert bench.ledger.deliveries(job.id) == before


def test_a_patients_study_under_the_accession_number_of_a_test_keeps_both_from_being_retired(bench: Bench) -> None:
    job = trial(bench)
    bench.finished(accession=ACCESSION, study_uid="2.25.911", series_uid="2.25.912")
    bench.send()
    assert [step.ok for step in steps(bench)] == [False]
    assert REJECTION not in {one.kind for one in bench.ledger.deliveries(job.id)}


def test_a_study_that_nobody_knows_is_told(bench: Bench) -> None:
    (unknown,) = steps(bench, "TEST0")
    assert (unknown.ok, unknown.text) == (False, "no job of this ledger has the accession number 'TEST0'")


@pytest.mark.parametrize("test", [True, False])
def test_a_note_says_test_when_its_study_is_one_whoever_takes_it_back(bench: Bench, test: bool) -> None:
    job = trial(bench) if test else bench.finished()
    bench.send()
    (result,) = results_of(bench.ledger, "phantom")
    assert recall(bench.ledger, bench.spool, result, RejectionReason.SAFETY).notes
    notes = [dcmread(path) for path in bench.spool.result_folder(job.id).glob("rejection-*/*.dcm")]
    assert notes
    for ds in notes:
        assert ds.SeriesDescription.startswith("SYNTHETIC TEST ") == test
        assert ("PatientComments" in ds) == test
