"""Taking results back: notes are opened once, and what was rejected is not sent again."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from storage.errors import IllegalMove
from storage.ledger import Ledger
from storage.records import REJECTION, DeliveryState, JobFilter, JobState, NewDelivery, SeriesInfo

NOTE = NewDelivery(destination="a", kind=REJECTION, encoding="kos-quality-pet-sc", series_uid="2.25.9", instances=1)


def pet(destination: str) -> NewDelivery:
    return NewDelivery(destination=destination, kind="pet", encoding="sc", series_uid="2.25.1", instances=3)


def completed(
    ledger: Ledger, *destinations: str, supersedes: str = "", bundle: str = "tiny", version: str = "1"
) -> str:
    """A job in DELIVERING (DONE without destinations)."""
    job = ledger.open_job(SeriesInfo(study_uid="1.2", series_uid="1.2.3"), supersedes=supersedes)
    ledger.move(job.id, JobState.QUEUED, code="chosen", text="")
    assert ledger.claim("w", lease_s=60)
    details = {"provenance": {"bundle_name": bundle, "bundle_version": version}}
    ledger.complete_run(job.id, "w", deliveries=[pet(name) for name in destinations], details=details)
    return job.id


def send(ledger: Ledger, state: DeliveryState = DeliveryState.SENT) -> str:
    """End the next delivery; the name of its destination and kind."""
    claimed = ledger.claim_delivery("s", lease_s=60)
    assert claimed is not None
    sent = claimed.instances if state is DeliveryState.SENT else 0
    ledger.finish_delivery(claimed.id, "s", state=state, sent=sent, statuses={})
    return f"{claimed.destination} {claimed.kind}"


def reject(ledger: Ledger, job_id: str, *notes: NewDelivery, **changes: object) -> int:
    return ledger.reject_result(job_id, notes, **{"code": "recalled", "text": "recalled", **changes})


def states(ledger: Ledger, job_id: str) -> dict[str, DeliveryState]:
    return {f"{d.destination} {d.kind}": d.state for d in ledger.deliveries(job_id)}


def test_a_note_of_a_delivered_result_is_sent_and_the_job_is_done_again(ledger: Ledger) -> None:
    job_id = completed(ledger, "a")
    send(ledger)
    assert ledger.get(job_id).state is JobState.DONE
    assert reject(ledger, job_id, NOTE, details={"recalled": {"why": "113001"}}) == 1
    assert ledger.get(job_id).state is JobState.DELIVERING
    assert send(ledger) == "a rejection"
    assert ledger.get(job_id).state is JobState.DONE
    assert ledger.get(job_id).details["recalled"] == {"why": "113001"}


def test_a_second_rejection_opens_nothing_and_writes_no_event(ledger: Ledger) -> None:
    job_id = completed(ledger, "a")
    send(ledger)
    told = {"recalled": {"why": "113001"}}
    reject(ledger, job_id, NOTE, details=told)
    before = len(ledger.events(job_id))
    assert reject(ledger, job_id, NOTE, details=told) == 0
    send(ledger)
    assert reject(ledger, job_id, NOTE, details=told) == 0
    assert len(ledger.events(job_id)) == before + 2  # the note was sent, the job is done
    assert ledger.claim_delivery("s", lease_s=60) is None


def test_a_note_that_failed_is_opened_again(ledger: Ledger) -> None:
    job_id = completed(ledger, "a")
    send(ledger)
    reject(ledger, job_id, NOTE)
    send(ledger, DeliveryState.FAILED)
    assert ledger.get(job_id).state is JobState.FAILED
    assert reject(ledger, job_id, NOTE) == 1
    send(ledger)
    assert ledger.get(job_id).state is JobState.DONE


def test_a_rejected_result_that_still_waits_is_not_sent(ledger: Ledger) -> None:
    job_id = completed(ledger, "a", "b")
    send(ledger)  # to a; b waits
    reject(ledger, job_id, NOTE)
    assert states(ledger, job_id) == {
        "a pet": DeliveryState.SENT,
        "b pet": DeliveryState.CANCELLED,
        "a rejection": DeliveryState.PENDING,
    }
    assert send(ledger) == "a rejection"
    assert ledger.get(job_id).state is JobState.DONE


def test_a_rejection_at_one_destination_leaves_the_others_alone(ledger: Ledger) -> None:
    job_id = completed(ledger, "a", "b")
    send(ledger)
    reject(ledger, job_id, NOTE, destinations={"a"})
    assert states(ledger, job_id)["b pet"] is DeliveryState.PENDING
    assert {send(ledger), send(ledger)} == {"b pet", "a rejection"}


def test_a_sender_in_the_middle_loses_its_lease(ledger: Ledger) -> None:
    job_id = completed(ledger, "a")
    claimed = ledger.claim_delivery("s", lease_s=60)
    assert claimed is not None
    reject(ledger, job_id, NOTE)
    assert not ledger.renew_delivery(claimed.id, "s", lease_s=60)


def test_nobody_asks_for_the_proof_of_what_is_rejected(ledger: Ledger) -> None:
    job_id = completed(ledger, "a")
    claimed = ledger.claim_delivery("s", lease_s=60)
    assert claimed is not None
    ledger.finish_delivery(claimed.id, "s", state=DeliveryState.SENT, sent=3, statuses={}, goal=DeliveryState.VISIBLE)
    assert ledger.get(job_id).state is JobState.DELIVERING
    reject(ledger, job_id, NOTE)
    assert ledger.claim_proof("s", lease_s=60) is None
    send(ledger)
    assert ledger.get(job_id).state is JobState.DONE


def test_redeliver_and_retry_send_a_note_again_and_never_what_it_rejects(ledger: Ledger) -> None:
    job_id = completed(ledger, "a", "b")
    send(ledger)
    send(ledger)
    reject(ledger, job_id, NOTE, details={"recalled": {}})
    send(ledger)
    ledger.redeliver(job_id)
    assert send(ledger, DeliveryState.FAILED) == "a rejection"
    assert ledger.claim_delivery("s", lease_s=60) is None
    ledger.retry(job_id)
    assert send(ledger) == "a rejection"
    assert ledger.claim_delivery("s", lease_s=60) is None
    with pytest.raises(IllegalMove, match="was recalled"):
        ledger.redeliver(job_id, destination="b")


def test_a_job_without_a_sent_result_cannot_be_rejected(ledger: Ledger) -> None:
    job = ledger.open_job(SeriesInfo(study_uid="1.2", series_uid="1.2.3"))
    with pytest.raises(IllegalMove):
        reject(ledger, job.id, NOTE)
    assert ledger.deliveries(job.id) == []


def test_results_are_found_by_bundle_and_version(ledger: Ledger) -> None:
    first, second = completed(ledger), completed(ledger, version="2")
    completed(ledger, bundle="other")
    ledger.open_job(SeriesInfo(study_uid="1.2", series_uid="1.2.4"))  # no result

    def found(**wanted: str) -> list[str]:
        return [job.id for job in ledger.find(JobFilter(**wanted))]

    assert found(bundle="tiny") == [second, first]
    assert found(bundle="tiny", bundle_version="1") == [first]
    assert found(bundle="tiny'; --") == []


def test_superseding_jobs_are_those_with_a_result_that_move_or_moved_lately(ledger: Ledger) -> None:
    first = completed(ledger, "a")
    send(ledger)
    second = completed(ledger, "a", supersedes=first)
    past, future = datetime(2000, 1, 1, tzinfo=UTC), datetime.now(UTC) + timedelta(days=365)
    assert [job.id for job in ledger.superseding(since=future)] == [second]  # being delivered, however long
    send(ledger)
    assert [job.id for job in ledger.superseding(since=past)] == [second]
    assert ledger.superseding(since=future) == []


@pytest.mark.parametrize("told", [{"superseded_at": {"a": "0" * 32}}, {"recalled_at": {"a": {"code": "113001"}}}])
def test_a_destination_that_was_told_without_a_note_gets_the_result_never_again(
    ledger: Ledger, told: dict[str, object]
) -> None:
    job_id = completed(ledger, "a", "b")
    reject(ledger, job_id, destinations={"a"}, details=told)  # never tried there: no note
    assert send(ledger) == "b pet"
    assert ledger.get(job_id).state is JobState.DONE
    with pytest.raises(IllegalMove, match="recalled or replaced there"):
        ledger.redeliver(job_id, destination="a")
    ledger.redeliver(job_id)
    assert send(ledger) == "b pet"
    assert states(ledger, job_id) == {"a pet": DeliveryState.CANCELLED, "b pet": DeliveryState.SENT}


def test_a_held_job_stays_held_and_sends_nothing_where_it_was_rejected(ledger: Ledger) -> None:
    job = ledger.open_job(SeriesInfo(study_uid="1.2", series_uid="1.2.3"))
    ledger.move(job.id, JobState.QUEUED, code="chosen", text="")
    assert ledger.claim("w", lease_s=60)
    ledger.complete_run(job.id, "w", deliveries=[pet("a"), pet("b")], held=("suv_range", "too hot"))
    assert reject(ledger, job.id, NOTE, destinations={"a"}) == 1
    assert ledger.get(job.id).state is JobState.HELD
    assert ledger.claim_delivery("s", lease_s=60) is None
    ledger.release(job.id)
    assert {send(ledger), send(ledger)} == {"a rejection", "b pet"}
    assert ledger.claim_delivery("s", lease_s=60) is None
