"""Deliveries from the outbox: every way a destination can be wrong, with a real ledger, spool and SCP."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from delivery_desk import COUNT, OWNER, PET, SC, Desk, config_for
from fake_pacs import FakePacs, free_port
from result_factory import sop_uids

from dicom_node.config import Config, DestinationConfig, PeerConfig, StorageConfig
from dicom_node.delivery import Deliveries
from dicom_node.net.scu import SendOutcome
from dicom_node.settle import Verdict, missing, settle
from storage.records import Delivery, DeliveryState, JobState


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    made = Desk(tmp_path / "spool")
    yield made
    made.close()


def test_a_result_is_delivered_and_the_job_is_done(desk: Desk) -> None:
    with FakePacs() as pacs:
        config = config_for(desk.root, pacs)
        desk.finish_job(config)
        desk.deliver(config)
        desk.until(lambda: desk.state is JobState.DONE)
    assert pacs.received.order == sop_uids(desk.files["pet"])
    assert pacs.received.associations == 2  # one for the series, one to find that it offers no C-FIND
    assert (desk.delivery().state, desk.delivery().sent) == (DeliveryState.SENT, COUNT)


def test_a_destination_that_is_down_gets_it_when_it_is_back(desk: Desk) -> None:
    pacs = FakePacs(port=free_port())
    config = config_for(desk.root, pacs)
    desk.finish_job(config)
    desk.deliver(config)
    desk.until(lambda: desk.delivery().attempts >= 2)
    assert desk.delivery().reason_code == "connection_failed"
    assert desk.state is JobState.DELIVERING
    with pacs:
        desk.until(lambda: desk.state is JobState.DONE)
    assert pacs.instances == set(sop_uids(desk.files["pet"]))


@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        ({"known_callers": ["SOMEBODY"]}, "association_rejected"),
        ({"classes": [PET]}, "no_presentation_context"),
        ({"status_for": lambda uid, times: 0xC000}, "instances_refused"),
        ({"status_for": lambda uid, times: 0xA900}, "instances_refused"),
    ],
)
def test_a_permanent_refusal_fails_at_the_first_attempt(desk: Desk, wrong: dict[str, Any], code: str) -> None:
    with FakePacs(**wrong) as pacs:
        config = config_for(desk.root, pacs)
        desk.finish_job(config)
        desk.deliver(config)
        desk.until(lambda: desk.state is JobState.FAILED)
    assert (desk.delivery().attempts, desk.delivery().reason_code) == (1, code)
    assert "PACS at 127.0.0.1" in desk.delivery().reason


def test_out_of_resources_is_tried_again_with_the_missing_instances_only(desk: Desk) -> None:
    seen: list[str] = []

    def half(uid: str, times: int) -> int:
        seen.append(uid)
        return 0xA700 if len(seen) % 2 == 0 and times == 1 else 0x0000

    with FakePacs(status_for=half) as pacs:
        config = config_for(desk.root, pacs)
        desk.finish_job(config)
        desk.deliver(config)
        desk.until(lambda: desk.state is JobState.DONE)
    uids = sop_uids(desk.files["pet"])
    assert pacs.received.order == uids + uids[1::2]
    assert (desk.delivery().sent, desk.delivery().attempts) == (COUNT, 2)


def test_an_aborted_association_is_taken_up_where_it_broke(desk: Desk) -> None:
    with FakePacs(abort_after=[2]) as pacs:
        config = config_for(desk.root, pacs)
        desk.finish_job(config)
        desk.deliver(config)
        desk.until(lambda: desk.state is JobState.DONE)
    uids = sop_uids(desk.files["pet"])
    assert pacs.instances == set(uids)
    assert [pacs.received.attempts[uid] for uid in uids] == [1, 1, 2, 1]


def test_a_dead_destination_does_not_delay_another(desk: Desk) -> None:
    with FakePacs() as alive:
        dead = FakePacs(port=free_port())
        config = config_for(desk.root, dead, alive)
        desk.finish_job(config)
        desk.deliver(config)
        desk.until(lambda: desk.delivery(1).state is DeliveryState.SENT)
        assert desk.state is JobState.DELIVERING
        with dead:
            desk.until(lambda: desk.state is JobState.DONE)
    assert dead.instances == alive.instances


def test_a_slow_destination_is_sending_while_another_is_served(desk: Desk) -> None:
    served = threading.Event()

    def after_the_other(_uid: str, _times: int) -> int:
        served.wait(60)
        return 0x0000

    with FakePacs(status_for=after_the_other) as slow, FakePacs() as quick:
        config = config_for(desk.root, slow, quick)
        desk.finish_job(config)
        desk.deliver(config)
        desk.until(lambda: desk.delivery(1).state is DeliveryState.SENT)
        assert desk.delivery(0).state is DeliveryState.SENDING
        served.set()
        desk.until(lambda: desk.state is JobState.DONE)


def test_a_refused_mip_is_skipped_and_the_job_is_done(desk: Desk) -> None:
    with FakePacs(classes=[PET]) as pacs:
        config = config_for(desk.root, pacs)
        desk.finish_job(config, {"pet": PET, "mip": SC})
        desk.deliver(config)
        desk.until(lambda: desk.state is JobState.DONE)
    assert [d.state for d in desk.ledger.deliveries(desk.job_id)] == [DeliveryState.SENT, DeliveryState.CANCELLED]
    assert desk.delivery(1).reason_code == "optional_refused"


def test_a_result_that_is_gone_from_the_outbox_fails_by_name(desk: Desk) -> None:
    with FakePacs() as pacs:
        config = config_for(desk.root, pacs)
        desk.finish_job(config)
        desk.files["pet"][0].unlink()
        desk.deliver(config)
        desk.until(lambda: desk.state is JobState.FAILED)
    assert desk.delivery().reason_code == "result_missing"
    assert pacs.received.order == []


def test_a_destination_that_left_the_configuration_fails_by_name(desk: Desk) -> None:
    with FakePacs() as pacs:
        desk.finish_job(config_for(desk.root, pacs))
        desk.deliver(Config(storage=StorageConfig(root=desk.root)))
        desk.until(lambda: desk.state is JobState.FAILED)
    assert desk.delivery().reason_code == "unknown_destination"


def test_cancelling_stops_the_sending(desk: Desk) -> None:
    told = threading.Event()

    def hold_the_second(_uid: str, _times: int) -> int:
        if len(pacs.received.order) == 2:
            told.wait(60)
        return 0x0000

    with FakePacs(status_for=hold_the_second) as pacs:
        config = config_for(desk.root, pacs)
        config = config.model_copy(update={"engine": config.engine.model_copy(update={"lease_s": 0.3})})
        desk.finish_job(config)
        deliveries = desk.deliver(config)
        assert pacs.got_one.wait(60)
        desk.ledger.cancel(desk.job_id)
        desk.until(lambda: all(one.stop.is_set() for one in list(deliveries._in_hand.values())))
        told.set()
        desk.until(lambda: deliveries.in_hand == 0)
    assert desk.state is JobState.CANCELLED
    assert len(pacs.instances) < COUNT


def test_stopping_gives_the_rest_back_and_the_next_start_sends_it(desk: Desk) -> None:
    first_life: list[Any] = []

    def hold_the_second(_uid: str, _times: int) -> int:
        if len(pacs.received.order) == 1:
            first_life.append(desk._running)
        elif len(pacs.received.order) == 2:
            first_life[0]._stopping.wait(60)
        return 0x0000

    with FakePacs(status_for=hold_the_second) as pacs:
        config = config_for(desk.root, pacs)
        desk.finish_job(config)
        first = desk.deliver(config)
        assert pacs.got_one.wait(60)
        first.stop()
        stopped = desk.delivery()
        assert (stopped.state, stopped.reason_code) == (DeliveryState.PENDING, "interrupted")
        assert 1 <= stopped.sent < COUNT
        desk.deliver(config)
        desk.until(lambda: desk.state is JobState.DONE)
    assert all(times == 1 for times in pacs.received.attempts.values())


def test_a_start_sends_again_what_an_earlier_life_was_sending(desk: Desk) -> None:
    with FakePacs() as pacs:
        config = config_for(desk.root, pacs)
        desk.finish_job(config)
        assert desk.ledger.claim_delivery(OWNER, lease_s=3600)  # and then the process was killed
        deliveries = Deliveries(config, desk.ledger, desk.spool, owner=OWNER, poll_s=0.02)
        deliveries.reclaim()
        assert desk.delivery().state is DeliveryState.PENDING
        desk.deliver(config)
        desk.until(lambda: desk.state is JobState.DONE)
    assert len(pacs.instances) == COUNT


def test_a_lease_of_another_owner_is_left_alone(desk: Desk) -> None:
    config = config_for(desk.root, FakePacs(port=free_port()))
    desk.finish_job(config)
    assert desk.ledger.claim_delivery("node-other", lease_s=3600)
    Deliveries(config, desk.ledger, desk.spool, owner=OWNER).reclaim()
    assert desk.delivery().state is DeliveryState.SENDING


def _delivery(**changes: Any) -> Delivery:
    values = {
        "id": 1,
        "job_id": "ab",
        "destination": "pacs",
        "kind": "pet",
        "encoding": "sc",
        "series_uid": "1.2",
        "instances": 10,
        "state": DeliveryState.SENDING,
        "attempts": 1,
        "next_attempt": datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=1),
    }
    return Delivery(**{**values, **changes})


DESTINATION = DestinationConfig(name="pacs", peer="pacs", max_attempts=3, first_retry_s=10, max_retry_s=15)
SENT, PENDING = DeliveryState.SENT, DeliveryState.PENDING
FAILED, CANCELLED = DeliveryState.FAILED, DeliveryState.CANCELLED


@pytest.mark.parametrize(
    ("delivery", "outcome", "stored", "state", "code", "retry_in_s"),
    [
        ({}, {}, 10, SENT, "", None),
        ({}, {}, 9, FAILED, "result_incomplete", None),
        ({}, {"code": "connection_failed"}, 0, PENDING, "connection_failed", 10.0),
        ({"attempts": 2}, {"code": "internal_error"}, 0, PENDING, "internal_error", 15.0),
        ({"attempts": 3}, {"code": "internal_error"}, 0, FAILED, "internal_error", None),
        ({"attempts": 9}, {"code": "connection_failed"}, 0, PENDING, "connection_failed", 10.0),  # none of its three
        ({"attempts": 9, "outages": 7}, {"code": "internal_error"}, 0, PENDING, "internal_error", 15.0),
        ({"attempts": 3}, {"code": "interrupted"}, 5, PENDING, "interrupted", 0.0),
        ({}, {"code": "association_rejected", "permanent": True}, 0, FAILED, "association_rejected", None),
        ({}, {"code": "association_rejected"}, 0, PENDING, "association_rejected", 10.0),
        ({}, {"code": "no_presentation_context", "permanent": True}, 0, FAILED, "no_presentation_context", None),
        (
            {"kind": "mip"},
            {"code": "no_presentation_context", "permanent": True},
            0,
            CANCELLED,
            "optional_refused",
            None,
        ),
        ({"kind": "mip"}, {"code": "instances_refused", "permanent": True}, 0, FAILED, "instances_refused", None),
        ({}, {"code": "instances_deferred"}, 5, PENDING, "instances_deferred", 10.0),
    ],
)
def test_what_becomes_of_a_delivery(
    delivery: dict[str, Any],
    outcome: dict[str, Any],
    stored: int,
    state: DeliveryState,
    code: str,
    retry_in_s: float | None,
) -> None:
    verdict = settle(_delivery(**delivery), SendOutcome(**outcome), stored, DESTINATION)
    assert (verdict.state, verdict.code, verdict.retry_in_s) == (state, code, retry_in_s)
    assert isinstance(verdict, Verdict)


@pytest.mark.parametrize(
    ("sent", "statuses", "expected"),
    [
        (0, {}, None),
        (0, {"*": "not_sent"}, None),
        (9, {"1.1": "0xa700"}, frozenset({"1.1"})),
        (8, {"1.1": "0xA700"}, None),  # one is not accounted for: all again
        (8, {"1.1": "0xA700", "1.2": "not_sent"}, frozenset({"1.1", "1.2"})),
    ],
)
def test_only_what_is_surely_missing_is_sent_alone(
    sent: int, statuses: dict[str, str], expected: frozenset[str] | None
) -> None:
    assert missing(_delivery(sent=sent, statuses=statuses)) == expected


def test_a_peer_is_what_a_destination_names() -> None:
    peer = PeerConfig(name="archive", ae_title="ARCHIVE")
    config = Config(peers=(peer,), destinations=(DestinationConfig(name="night", peer="archive"),))
    assert config.peer(config.destinations[0].peer) is peer
