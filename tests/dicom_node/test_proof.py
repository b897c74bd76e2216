"""PENDING, SENT, COMMITTED, VISIBLE: every way an archive can prove a delivery, or fail to."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from delivery_desk import COUNT, OWNER, PET, SC, Desk, config_for
from fake_archive import FakeArchive, Request
from hypothesis import given
from hypothesis import strategies as st
from pydicom import Dataset, dcmread
from pynetdicom import evt
from result_factory import sop_uids

from dicom_node.config import Config, DestinationConfig
from dicom_node.delivery import Deliveries
from dicom_node.net.associations import AssociationRegistry
from dicom_node.net.commitment import RequestOutcome
from dicom_node.net.query import CountOutcome
from dicom_node.net.receive import Receiver
from dicom_node.proof import goal_of, judge_ask, judge_count, weigh
from storage.records import Commitment, CommitmentState, Delivery, DeliveryState, JobState

SENT, COMMITTED, VISIBLE = DeliveryState.SENT, DeliveryState.COMMITTED, DeliveryState.VISIBLE
PENDING, FAILED = DeliveryState.PENDING, DeliveryState.FAILED


class ProofDesk(Desk):
    """A desk whose node also listens, as an archive needs that reports on associations of its own."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.receiver: Receiver | None = None

    def prove(self, archive: FakeArchive, *, listen: bool = True, wait_s: float = 60.0, **changes: Any) -> Deliveries:
        """Deliver to `archive`, which is asked to commit and to show; `changes` are of the destination."""
        config = config_for(self.root, archive, **{"commitment": True, **changes})
        if not self.job_id:
            self.finish_job(config)
        return self.run(archive, config, listen=listen, wait_s=wait_s)

    def run(self, archive: FakeArchive, config: Config, *, listen: bool = True, wait_s: float = 60.0) -> Deliveries:
        made = Deliveries(config, self.ledger, self.spool, owner=OWNER, poll_s=0.02, report_wait_s=wait_s)
        self._running = made
        if listen:
            registry = AssociationRegistry(limit=8, clock=lambda: 0.0)
            self.receiver = Receiver(config, self.spool, self.ledger, registry, take_report=made.prover.take)
            archive.node_port = self.receiver.start(port=0)
        made.reclaim()
        made.start()
        return made

    def events(self) -> list[str]:
        return [event.code for event in self.ledger.events(self.job_id)]

    def uids(self) -> list[str]:
        return sop_uids(self.files["pet"])

    def close(self) -> None:
        if self.receiver is not None:
            self.receiver.stop()
        super().close()


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[ProofDesk]:
    made = ProofDesk(tmp_path / "spool")
    yield made
    made.close()


@pytest.mark.parametrize("answer", ["early", "same", "new"])
def test_a_series_is_committed_and_visible_and_then_the_job_is_done(desk: ProofDesk, answer: Any) -> None:
    with FakeArchive(answer=answer) as archive:
        desk.prove(archive)
        desk.until(lambda: desk.state is JobState.DONE)
    done = desk.delivery()
    assert (done.state, done.goal, done.reason) == (VISIBLE, VISIBLE, "")
    times = [done.sent_at, done.committed_at, done.visible_at]
    assert None not in times
    assert times == sorted(times)
    [request] = archive.requests
    assert request.references == dict.fromkeys(desk.uids(), SC)
    assert archive.answers == [0x0000]
    assert (archive.levels, archive.received.attempts.total()) == (["SERIES"], COUNT)


def test_a_report_that_comes_later_on_an_association_of_the_archive_is_waited_for(desk: ProofDesk) -> None:
    with FakeArchive() as archive:
        desk.prove(archive, wait_s=0.0)
        desk.until(lambda: desk.delivery().reason_code == "commitment_awaited")
        assert (desk.state, desk.delivery().state) == (JobState.DELIVERING, SENT)
        assert archive.looks == 0
        assert archive.report(archive.requests[0]) == 0x0000
        desk.until(lambda: desk.state is JobState.DONE)
    assert desk.delivery().state is VISIBLE


def test_a_failed_item_of_a_commitment_is_sent_again_and_asked_for_under_a_fresh_transaction(desk: ProofDesk) -> None:
    def second_fails(request: Request, number: int) -> Mapping[str, int]:
        return {sorted(request.references)[1]: 0x0112} if number == 1 else {}

    with FakeArchive(answer="same", failing=second_fails) as archive:
        desk.prove(archive)
        desk.until(lambda: desk.state is JobState.DONE)
    again = sorted(desk.uids())[1]
    assert archive.received.attempts == {**dict.fromkeys(desk.uids(), 1), again: 2}
    first, second = archive.requests
    assert first.transaction_uid != second.transaction_uid
    assert set(second.references) == set(desk.uids())
    assert (desk.delivery().state, desk.delivery().attempts) == (VISIBLE, 2)
    told = [e for e in desk.ledger.events(desk.job_id) if e.code == "commitment_failed"]
    assert "1 of 4 instances were not committed: 0x0112" in told[0].text


def test_what_is_never_committed_fails_after_its_attempts_and_names_the_instances(desk: ProofDesk) -> None:
    def first_fails(request: Request, number: int) -> Mapping[str, int]:
        return {desk.uids()[0]: 0x0110}

    with FakeArchive(answer="same", failing=first_fails) as archive:
        desk.prove(archive, max_attempts=2)
        desk.until(lambda: desk.state is JobState.FAILED)
    failed = desk.delivery()
    assert (failed.state, failed.reason_code, failed.attempts) == (FAILED, "commitment_failed", 2)
    assert failed.statuses == {desk.uids()[0]: "not_committed_0x0110"}
    assert failed.sent == COUNT - 1


def test_an_instance_that_the_report_leaves_out_is_not_committed(desk: ProofDesk) -> None:
    with FakeArchive() as archive:
        desk.prove(archive, wait_s=0.0)
        desk.until(lambda: len(archive.requests) == 1)
        archive.report(archive.requests[0], omit=desk.uids()[:1])
        desk.until(lambda: len(archive.requests) == 2)
        assert archive.received.attempts[desk.uids()[0]] == 2
        archive.report(archive.requests[1])
        desk.until(lambda: desk.state is JobState.DONE)


def test_without_a_report_in_time_it_is_asked_again_and_the_late_report_counts(desk: ProofDesk) -> None:
    with FakeArchive() as archive:
        desk.prove(archive, wait_s=0.0, commitment_timeout_s=0.1, max_attempts=1000)
        desk.until(lambda: len(archive.requests) >= 2)
        assert archive.requests[0].transaction_uid != archive.requests[1].transaction_uid
        assert archive.report(archive.requests[0]) == 0x0000
        desk.until(lambda: desk.state is JobState.DONE)
    assert desk.delivery().state is VISIBLE
    assert archive.received.attempts.total() == COUNT  # nothing was sent twice


def test_a_report_that_waits_for_our_next_association_is_taken_there(desk: ProofDesk) -> None:
    with FakeArchive(answer="next") as archive:
        desk.prove(archive, listen=False, wait_s=2.0, commitment_timeout_s=0.1)
        desk.until(lambda: desk.state is JobState.DONE)
    assert (desk.delivery().state, len(archive.requests), archive.answers) == (VISIBLE, 2, [0x0000])
    first, second = desk.ledger.commitments(desk.delivery().id)
    assert (first.transaction_uid, first.state) == (archive.requests[0].transaction_uid, CommitmentState.COMMITTED)
    assert second.state is CommitmentState.ASKED


def test_an_archive_that_never_reports_fails_the_delivery_by_name(desk: ProofDesk) -> None:
    with FakeArchive() as archive:
        desk.prove(archive, wait_s=0.0, commitment_timeout_s=0.05, max_attempts=3)
        desk.until(lambda: desk.state is JobState.FAILED)
        assert (desk.delivery().state, desk.delivery().reason_code) == (FAILED, "commitment_timeout")
        assert "given up after 3 requests" in desk.delivery().reason
        assert len(archive.requests) == 3
        assert archive.report(archive.requests[0]) == 0x0000  # too late: it is only written down
    assert desk.events()[-1] == "commitment_late"
    assert desk.state is JobState.FAILED


def test_an_archive_that_refuses_the_request_is_asked_again_and_fails_at_last(desk: ProofDesk) -> None:
    with FakeArchive(action_status=0x0213) as archive:
        desk.prove(archive, max_attempts=3)
        desk.until(lambda: desk.state is JobState.FAILED)
    assert len(archive.requests) == 3
    assert desk.delivery().reason_code == "commitment_refused"
    assert "0x0213" in desk.delivery().reason


@pytest.mark.parametrize("wrong", [{"commits": False}, {"action_status": 0x0122}, {"action_status": 0x0211}])
def test_an_archive_without_storage_commitment_goes_on_to_be_verified(desk: ProofDesk, wrong: dict[str, Any]) -> None:
    with FakeArchive(**wrong) as archive:
        desk.prove(archive)
        desk.until(lambda: desk.state is JobState.DONE)
    done = desk.delivery()
    assert (done.state, done.reason_code, done.committed_at) == (VISIBLE, "commitment_not_offered", None)


def test_an_archive_that_offers_nothing_stops_at_sent_with_the_reason(desk: ProofDesk) -> None:
    with FakeArchive(commits=False, finds=False) as archive:
        desk.prove(archive)
        desk.until(lambda: desk.state is JobState.DONE)
    assert (desk.delivery().state, desk.delivery().goal) == (SENT, SENT)
    assert desk.delivery().reason_code == "verify_not_offered"
    assert "commitment_not_offered" in desk.events()


class Selective(FakeArchive):
    """Shows nothing of the series in `hidden`, and cannot look for the one in `refused`."""

    hidden = refused = ""

    def _on_find(self, event: evt.Event) -> Iterator[tuple[int, Dataset | None]]:
        if event.identifier.SeriesInstanceUID == self.refused:
            yield 0xC000, None  # Unable to Process
        elif event.identifier.SeriesInstanceUID != self.hidden:
            yield from super()._on_find(event)


def test_a_companion_that_the_archive_never_shows_does_not_fail_the_job(desk: ProofDesk) -> None:
    with Selective() as archive:
        config = config_for(desk.root, archive, max_attempts=2)
        desk.finish_job(config, {"pet": SC, "mip": SC})
        archive.hidden = str(dcmread(desk.files["mip"][0]).SeriesInstanceUID)
        desk.run(archive, config, listen=False)
        desk.until(lambda: desk.state is JobState.DONE)
    pet, mip = desk.delivery(0), desk.delivery(1)
    assert (pet.kind, pet.state, pet.reason_code) == ("pet", VISIBLE, "")
    assert (mip.kind, mip.state, mip.goal, mip.reason_code) == ("mip", SENT, SENT, "not_visible")
    assert "0 of 4 instances; given up after 2 looks; it is stored, and optional" in mip.reason


def test_a_companion_that_the_archive_cannot_look_for_does_not_fail_the_job(desk: ProofDesk) -> None:
    with Selective() as archive:
        config = config_for(desk.root, archive, max_attempts=2)
        desk.finish_job(config, {"pet": SC, "mip": SC})
        archive.refused = str(dcmread(desk.files["mip"][0]).SeriesInstanceUID)
        desk.run(archive, config, listen=False)
        desk.until(lambda: desk.state is JobState.DONE)
    pet, mip = desk.delivery(0), desk.delivery(1)
    assert (pet.kind, pet.state, pet.reason_code) == ("pet", VISIBLE, "")
    assert (mip.kind, mip.state, mip.goal, mip.reason_code) == ("mip", SENT, SENT, "find_refused")
    assert mip.reason.endswith("given up after 2 looks; it is stored, and optional")


def test_commitment_alone_ends_at_committed_or_where_it_is_not_offered_at_sent(desk: ProofDesk) -> None:
    with FakeArchive(answer="same") as archive:
        desk.prove(archive, verify=False)
        desk.until(lambda: desk.state is JobState.DONE)
    assert (desk.delivery().state, archive.looks) == (COMMITTED, 0)


def test_a_destination_that_asks_for_nothing_is_done_when_it_is_sent(desk: ProofDesk) -> None:
    with FakeArchive() as archive:
        desk.prove(archive, commitment=False, verify=False)
        desk.until(lambda: desk.state is JobState.DONE)
    assert desk.delivery().state is SENT
    assert (archive.requests, archive.looks, archive.received.associations) == ([], 0, 1)


def test_a_report_that_comes_twice_is_answered_with_success_and_changes_nothing(desk: ProofDesk) -> None:
    with FakeArchive() as archive:
        desk.prove(archive, wait_s=0.0)
        desk.until(lambda: len(archive.requests) == 1)
        assert archive.report(archive.requests[0]) == 0x0000
        desk.until(lambda: desk.state is JobState.DONE)
        refused = dict.fromkeys(desk.uids(), 0x0110)
        assert archive.report(archive.requests[0], failed=refused) == 0x0000
    assert (desk.state, desk.delivery().state) == (JobState.DONE, VISIBLE)
    assert desk.events()[-1] == "commitment_repeated"


def test_a_report_of_somebody_elses_transaction_is_refused_and_written_down(desk: ProofDesk) -> None:
    with FakeArchive() as archive:
        desk.prove(archive, wait_s=0.0)
        desk.until(lambda: len(archive.requests) == 1)
        [asked] = archive.requests
        assert archive.report(Request("2.25.42", asked.references)) == 0x0115
        assert archive.report(asked, event_type=3) == 0x0113
        assert desk.delivery().state is SENT
        [event] = desk.ledger.search_events(code="commitment_unknown")
        assert "'PACS'" in event.text
        assert archive.report(asked, propose_role=False) == 0x0000  # an archive that knows no role selection
        desk.until(lambda: desk.state is JobState.DONE)


def test_a_stranger_brings_no_report(desk: ProofDesk) -> None:
    with FakeArchive() as archive:
        desk.prove(archive, wait_s=0.0)
        desk.until(lambda: len(archive.requests) == 1)
        assert archive.report(archive.requests[0], calling_ae="STRANGER") is None
        assert desk.delivery().state is SENT


def test_no_commitment_report_is_negotiated_where_no_destination_asks_for_one(desk: ProofDesk) -> None:
    with FakeArchive() as archive:
        config = config_for(desk.root, archive)
        receiver = Receiver(config, desk.spool, desk.ledger, AssociationRegistry(limit=8, clock=lambda: 0.0))
        archive.node_port = receiver.start(port=0)
        assert archive.report(Request("2.25.42", {})) is None
        receiver.stop()


def test_a_report_that_cannot_be_written_is_refused_so_that_it_comes_again(
    desk: ProofDesk, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FakeArchive() as archive:
        desk.prove(archive, wait_s=0.0)
        desk.until(lambda: len(archive.requests) == 1)
        with monkeypatch.context() as patched:
            patched.setattr(desk.ledger, "take_report", lambda *_, **__: 1 / 0)
            assert archive.report(archive.requests[0]) == 0x0110
        assert archive.report(archive.requests[0]) == 0x0000
        desk.until(lambda: desk.state is JobState.DONE)


def test_a_series_that_becomes_visible_slowly_is_looked_for_again(desk: ProofDesk) -> None:
    with FakeArchive(shown=lambda stored, look: min(stored, 2 * look - 2)) as archive:
        desk.prove(archive, commitment=False)
        desk.until(lambda: desk.state is JobState.DONE)
    assert (desk.delivery().state, archive.looks) == (VISIBLE, 3)
    told = [e.text for e in desk.ledger.events(desk.job_id) if e.code == "not_visible"]
    assert [text[:13] for text in told] == ["it shows 0 of", "it shows 2 of"]


def test_a_series_that_stays_short_fails_with_the_count(desk: ProofDesk) -> None:
    with FakeArchive(shown=lambda stored, look: stored - 1) as archive:
        desk.prove(archive, commitment=False, max_attempts=2)
        desk.until(lambda: desk.state is JobState.FAILED)
    assert desk.delivery().reason_code == "not_visible"
    assert desk.delivery().reason == f"it shows {COUNT - 1} of {COUNT} instances; given up after 2 looks"
    assert desk.delivery().sent_at is not None


def test_an_archive_that_does_not_count_is_counted_instance_by_instance(desk: ProofDesk) -> None:
    with FakeArchive(counts=False) as archive:
        desk.prove(archive, commitment=False)
        desk.until(lambda: desk.state is JobState.DONE)
    assert desk.delivery().state is VISIBLE
    assert archive.levels == ["SERIES", "IMAGE"]


def test_an_archive_that_forbids_queries_stays_at_sent(desk: ProofDesk) -> None:
    with FakeArchive(find_status=0x0124) as archive:
        desk.prove(archive, commitment=False)
        desk.until(lambda: desk.state is JobState.DONE)
    assert (desk.delivery().state, desk.delivery().reason_code) == (SENT, "verify_not_offered")


def test_a_query_that_fails_is_tried_again(desk: ProofDesk) -> None:
    with FakeArchive(find_status=0xA700) as archive:
        desk.prove(archive, commitment=False, max_attempts=2)
        desk.until(lambda: desk.state is JobState.FAILED)
    assert (desk.delivery().reason_code, archive.looks) == ("find_refused", 2)


class Mute(FakeArchive):
    """Accepts the context for C-FIND and answers none: it hangs up, or says nothing."""

    def __init__(self, *, says_nothing: bool) -> None:
        super().__init__(answer="same")
        self._says_nothing = says_nothing
        self.stopped = threading.Event()

    def _on_find(self, event: evt.Event) -> Iterator[tuple[int, Dataset | None]]:
        self.looks += 1
        if self._says_nothing:
            self.stopped.wait(20)
        event.assoc.abort()
        yield from ()


@pytest.mark.parametrize("says_nothing", [True, False])
def test_an_archive_that_stores_and_commits_and_answers_no_query_is_no_outage(
    desk: ProofDesk, says_nothing: bool
) -> None:
    with Mute(says_nothing=says_nothing) as archive:
        config = config_for(desk.root, archive, commitment=True, max_attempts=2)
        config = config.model_copy(update={"node": config.node.model_copy(update={"dimse_timeout_s": 0.5})})
        desk.finish_job(config, {"pet": SC, "mip": SC})
        desk.run(archive, config)
        desk.until(lambda: desk.state is JobState.FAILED)
        archive.stopped.set()
    pet, mip = desk.ledger.deliveries(desk.job_id)
    assert (pet.state, pet.reason_code, pet.committed_at is not None) == (FAILED, "find_unanswered", True)
    assert "given up after 2 looks" in pet.reason
    assert (mip.state, mip.reason_code) == (COMMITTED, "find_unanswered")
    assert archive.looks == 4


def test_a_node_that_stops_while_a_report_is_due_takes_it_up_at_its_next_start(desk: ProofDesk) -> None:
    with FakeArchive() as archive:
        deliveries = desk.prove(archive, wait_s=0.0)
        desk.until(lambda: desk.delivery().reason_code == "commitment_awaited")
        deliveries.stop()
        assert desk.receiver is not None
        desk.receiver.stop()
        desk.prove(archive, wait_s=0.0)
        assert archive.report(archive.requests[0]) == 0x0000
        desk.until(lambda: desk.state is JobState.DONE)
    assert desk.delivery().state is VISIBLE
    assert len(archive.requests) == 1


def test_a_start_asks_again_for_what_an_earlier_life_was_asking(desk: ProofDesk) -> None:
    with FakeArchive(answer="same") as archive:
        config = config_for(desk.root, archive, commitment=True)
        desk.finish_job(config)
        row = desk.ledger.claim_delivery(OWNER, lease_s=3600)
        desk.ledger.finish_delivery(row.id, OWNER, state=SENT, sent=COUNT, statuses={}, goal=VISIBLE)
        assert desk.ledger.claim_proof(OWNER, lease_s=3600)  # and then the process was killed
        desk.ledger.open_commitment(row.id, OWNER, "2.25.7")
        desk.run(archive, config)
        desk.until(lambda: archive.looks > 0)
    assert [one.state for one in desk.ledger.commitments(row.id)] == [CommitmentState.LAPSED, CommitmentState.COMMITTED]


def test_a_job_that_is_cancelled_is_asked_about_no_more(desk: ProofDesk) -> None:
    with FakeArchive() as archive:
        desk.prove(archive, wait_s=0.0, commitment_timeout_s=0.2)
        desk.until(lambda: len(archive.requests) == 1)
        desk.ledger.cancel(desk.job_id)
        assert archive.report(archive.requests[0]) == 0x0000
    assert (desk.state, desk.delivery().state, archive.looks) == (JobState.CANCELLED, SENT, 0)
    assert desk.ledger.claim_proof(OWNER, lease_s=1) is None


def test_a_destination_that_left_the_configuration_keeps_what_it_was_sent(desk: ProofDesk) -> None:
    with FakeArchive() as archive:
        config = config_for(desk.root, archive)
        desk.finish_job(config)
        row = desk.ledger.claim_delivery(OWNER, lease_s=3600)
        desk.ledger.finish_delivery(row.id, OWNER, state=SENT, sent=COUNT, statuses={}, goal=VISIBLE)
        desk.run(archive, config.model_copy(update={"destinations": ()}), listen=False)
        desk.until(lambda: desk.state is JobState.DONE)
    assert (desk.delivery().state, desk.delivery().reason_code) == (SENT, "unknown_destination")


def test_coerced_instances_are_stored_and_their_warnings_are_kept(desk: ProofDesk) -> None:
    """A PACS that corrects patient names answers 0xB000: it has the instance (PS3.4 B.2.3)."""

    def coerce(uid: str, times: int) -> int:
        if uid == desk.uids()[2] and times == 1:
            return 0xA700
        return 0xB000 if uid == desk.uids()[0] else 0x0000

    with FakeArchive(answer="same", status_for=coerce) as archive:
        desk.prove(archive)
        desk.until(lambda: desk.state is JobState.DONE)
    done = desk.delivery()
    assert (done.state, done.sent, done.attempts) == (VISIBLE, COUNT, 2)
    assert done.statuses == {desk.uids()[0]: "0xB000"}
    assert archive.received.attempts[desk.uids()[0]] == 1


@pytest.mark.parametrize("refusal", ["by its class", "by a status"])
def test_a_refused_seg_does_not_keep_the_pet_from_being_proven(desk: ProofDesk, refusal: str) -> None:
    segs: set[str] = set()
    wrong: dict[str, Any] = {"classes": [PET]}
    if refusal == "by a status":
        wrong = {"classes": [PET, SC], "status_for": lambda uid, _: 0x0122 if uid in segs else 0x0000}
    with FakeArchive(answer="same", **wrong) as archive:
        config = config_for(desk.root, archive, commitment=True)
        desk.finish_job(config, {"pet": PET, "seg": SC})
        segs.update(sop_uids(desk.files["seg"]))
        desk.run(archive, config)
        desk.until(lambda: desk.state is JobState.DONE)
    pet, seg = desk.ledger.deliveries(desk.job_id)
    assert (pet.state, seg.state, seg.reason_code) == (VISIBLE, DeliveryState.CANCELLED, "optional_refused")
    assert len(archive.requests) == 1


# ---- the rules

UIDS = frozenset({"1.1", "1.2", "1.3"})
DESTINATION = DestinationConfig(
    name="d", peer="p", commitment=True, max_attempts=3, first_retry_s=10, max_retry_s=15, commitment_timeout_s=60
)


def delivery(**changes: Any) -> Delivery:
    values = {
        "id": 1, "job_id": "ab", "destination": "d", "kind": "pet", "encoding": "sc", "series_uid": "1.2",
        "instances": 3, "state": SENT, "sent": 3, "attempts": 1, "goal": VISIBLE,
    }  # fmt: skip
    return Delivery(**{**values, **changes})


def report(**changes: Any) -> Commitment:
    values = {
        "transaction_uid": "2.25.1", "delivery_id": 1, "attempt": 1, "state": CommitmentState.REPORTED,
        "asked": datetime(2026, 1, 1, tzinfo=UTC), "committed": tuple(UIDS),
    }  # fmt: skip
    return Commitment(**{**values, **changes})


@pytest.mark.parametrize(
    ("row", "reported", "state", "sent", "statuses"),
    [
        ({}, {}, COMMITTED, None, None),
        ({}, {"committed": (*UIDS, "9.9")}, COMMITTED, None, None),
        ({}, {"committed": ("1.1", "1.2")}, PENDING, 2, {"1.3": "not_committed"}),
        ({}, {"failed": {"1.3": "0x0112"}}, PENDING, 2, {"1.3": "not_committed_0x0112"}),  # in both: it failed
        ({}, {"failed": {"9.9": "0x0112"}}, COMMITTED, None, None),
        ({}, {"committed": ()}, PENDING, 0, dict.fromkeys(UIDS, "not_committed")),
        ({"attempts": 3}, {"committed": ("1.1", "1.2")}, FAILED, 2, {"1.3": "not_committed"}),
        ({}, {"committed": (), "failed": dict.fromkeys(UIDS, "0x0131")}, SENT, None, None),
        (
            {"statuses": {"*": "0xB000"}},
            {"committed": ("1.1", "1.2")},
            PENDING,
            2,
            {"1.1": "0xB000", "1.2": "0xB000", "1.3": "not_committed"},
        ),
    ],
)
def test_what_a_report_means(
    row: dict[str, Any], reported: dict[str, Any], state: DeliveryState, sent: int | None, statuses: Any
) -> None:
    step = weigh(delivery(**row), report(**reported), UIDS, DESTINATION)
    assert (step.state, step.sent, step.statuses) == (state, sent, statuses)
    assert set(step.settled) == {"2.25.1"}


SOME = st.frozensets(st.sampled_from(["1.1", "1.2", "1.3", "9.8", "9.9"]))


@given(SOME, SOME, st.integers(1, 4))
def test_whatever_a_report_says_only_all_instances_are_committed_and_only_the_others_are_sent_again(
    committed: frozenset[str], failed: frozenset[str], attempts: int
) -> None:
    said = report(committed=tuple(committed), failed=dict.fromkeys(failed, "0x0110"))
    step = weigh(delivery(attempts=attempts), said, UIDS, DESTINATION)
    kept = UIDS & committed - failed
    assert (step.state is COMMITTED) == (kept == UIDS)
    if step.state is not COMMITTED:
        assert step.statuses is not None
        assert set(step.statuses) == UIDS - kept
        assert step.sent == len(kept)
        assert step.state is (FAILED if attempts >= DESTINATION.max_attempts else PENDING)


@pytest.mark.parametrize(
    ("outcome", "state", "goal", "retry_in_s"),
    [
        ({}, SENT, VISIBLE, 60.0),
        ({"code": "connection_failed"}, SENT, VISIBLE, 10.0),
        ({"code": "no_presentation_context", "permanent": True}, SENT, VISIBLE, None),
        ({"code": "association_rejected", "permanent": True}, FAILED, VISIBLE, None),
    ],
)
def test_what_a_request_for_commitment_leads_to(
    outcome: dict[str, Any], state: DeliveryState, goal: DeliveryState, retry_in_s: float | None
) -> None:
    step = judge_ask(delivery(), "2.25.1", RequestOutcome(**outcome), DESTINATION)
    assert (step.state, step.goal, step.retry_in_s) == (state, goal, retry_in_s)


@pytest.mark.parametrize(
    ("row", "outcome", "state", "goal", "retry_in_s"),
    [
        ({}, {"count": 3}, VISIBLE, VISIBLE, None),
        ({}, {"count": 4}, SENT, VISIBLE, 10.0),  # more than we sent is not what we sent
        ({"state": COMMITTED, "checks": 1}, {"count": 0}, COMMITTED, VISIBLE, 15.0),
        ({"checks": 2}, {"count": 0}, FAILED, VISIBLE, None),
        ({"checks": 2}, {"code": "connection_failed"}, SENT, VISIBLE, 10.0),
        ({"checks": 2}, {"code": "no_response"}, SENT, VISIBLE, 10.0),  # of a DICOMweb service: it may be down
        ({"checks": 1}, {"code": "find_unanswered"}, SENT, VISIBLE, 15.0),
        ({"checks": 2}, {"code": "find_unanswered"}, FAILED, VISIBLE, None),
        ({"kind": "gsps", "checks": 2}, {"code": "find_unanswered"}, SENT, SENT, None),
        ({"state": COMMITTED}, {"code": "not_offered", "permanent": True}, COMMITTED, COMMITTED, None),
        ({}, {"code": "association_rejected", "permanent": True}, FAILED, VISIBLE, None),
        ({}, {"code": "interrupted"}, SENT, VISIBLE, 0.0),
        ({"kind": "gsps", "checks": 1}, {"count": 0}, SENT, VISIBLE, 15.0),
        ({"kind": "gsps", "checks": 2}, {"count": 0}, SENT, SENT, None),  # optional: the job goes on without
        ({"kind": "gsps", "state": COMMITTED, "checks": 2}, {"count": 0}, COMMITTED, COMMITTED, None),
        ({"kind": "gsps", "checks": 1}, {"code": "find_refused"}, SENT, VISIBLE, 15.0),
        ({"kind": "gsps", "checks": 2}, {"code": "find_refused"}, SENT, SENT, None),
        ({"kind": "seg"}, {"code": "find_refused", "permanent": True}, SENT, SENT, None),
        ({"kind": "rejection", "checks": 2}, {"code": "internal_error"}, FAILED, VISIBLE, None),
    ],
)
def test_what_a_count_means(
    row: dict[str, Any], outcome: dict[str, Any], state: DeliveryState, goal: DeliveryState, retry_in_s: float | None
) -> None:
    step = judge_count(delivery(**row), CountOutcome(**outcome), DESTINATION)
    assert (step.state, step.goal, step.retry_in_s) == (state, goal, retry_in_s)


@pytest.mark.parametrize(
    ("commitment", "verify", "goal"),
    [(False, False, SENT), (True, False, COMMITTED), (False, True, VISIBLE), (True, True, VISIBLE)],
)
def test_the_goal_is_the_last_state_that_is_asked_for(commitment: bool, verify: bool, goal: DeliveryState) -> None:
    assert goal_of(DestinationConfig(name="d", peer="p", commitment=commitment, verify=verify)) is goal
