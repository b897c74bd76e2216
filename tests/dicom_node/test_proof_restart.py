"""kill -9 between SENT, COMMITTED and VISIBLE: the next life goes on with the proof, and sends nothing twice."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from fake_archive import FakeArchive
from fake_pacs import RESULT_CLASSES
from node_process import NodeProcess, write_ct
from tiny_bundle import write_tiny_bundle

from storage.records import Delivery, DeliveryState, JobState


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


def deliveries(node: NodeProcess) -> list[Delivery]:
    ledger = node.ledger()
    try:
        return [delivery for job in node.jobs() for delivery in ledger.deliveries(job.id)]
    finally:
        ledger.close()


def states(node: NodeProcess) -> set[DeliveryState]:
    return {delivery.state for delivery in deliveries(node)}


def test_killed_while_it_waits_for_proof_it_waits_on_and_sends_nothing_twice(tmp_path: Path, bundle: Path) -> None:
    indexed = threading.Event()  # the archive shows what it has

    def shown(stored: int, _look: int) -> int:
        return stored if indexed.is_set() else 0

    with (
        FakeArchive(shown=shown, classes=RESULT_CLASSES) as archive,
        NodeProcess(tmp_path, archive, bundle, destination="commitment = true\nmax_attempts = 1000") as node,
    ):
        archive.node_port = node.peer.port
        node.start()
        assert node.send(write_ct(tmp_path / "ct")).ok
        node.until(lambda: bool(archive.requests) and states(node) == {DeliveryState.SENT})
        node.kill()
        node.start()
        node.until(lambda: {uid for r in archive.requests for uid in r.references} == archive.instances)
        for request in archive.requests:
            assert archive.report(request) == 0x0000
        node.until(lambda: archive.looks > 0 and states(node) == {DeliveryState.COMMITTED})
        node.kill()
        indexed.set()
        node.start()
        assert node.until_state(JobState.DONE, JobState.FAILED).state is JobState.DONE
        assert states(node) == {DeliveryState.VISIBLE}
    assert set(archive.received.attempts.values()) == {1}
