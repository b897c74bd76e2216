"""A real Orthanc commits what it was sent, on an association of its own, and shows it; or has lost some of it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
from delivery_desk import COUNT, OWNER, Desk
from fake_pacs import free_port
from orthanc import Orthanc, running_orthanc

from dicom_node.config import Config, DestinationConfig, NodeConfig, PeerConfig, StorageConfig
from dicom_node.delivery import Deliveries
from dicom_node.net.associations import AssociationRegistry
from dicom_node.net.receive import Receiver
from storage.records import CommitmentState, DeliveryState, JobState

pytestmark = pytest.mark.orthanc


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    made = Desk(tmp_path / "spool")
    yield made
    made.close()


def config_for(root: Path, orthanc: Orthanc, node_port: int) -> Config:
    return Config(
        node=NodeConfig(host="127.0.0.1", port=node_port),
        storage=StorageConfig(root=root),
        peers=(PeerConfig(name="orthanc", ae_title=orthanc.ae_title, port=orthanc.dicom_port),),
        destinations=(
            DestinationConfig(name="orthanc", peer="orthanc", commitment=True, first_retry_s=0.2, max_retry_s=0.2),
        ),
    )


@pytest.fixture
def orthanc_and_config(tmp_path: Path, desk: Desk) -> Iterator[tuple[Orthanc, Config]]:
    port = free_port()
    with running_orthanc(tmp_path / "orthanc", modalities={"synpet": ("SYNPET", port)}) as orthanc:
        yield orthanc, config_for(desk.root, orthanc, port)


def run(desk: Desk, config: Config) -> Receiver:
    """The deliveries, and the receiver that Orthanc reports to."""
    desk._running = Deliveries(config, desk.ledger, desk.spool, owner=OWNER, poll_s=0.02)
    registry = AssociationRegistry(limit=8, clock=time.monotonic)
    receiver = Receiver(config, desk.spool, desk.ledger, registry, take_report=desk._running.prover.take)
    receiver.start()
    desk._running.start()
    return receiver


def test_orthanc_commits_and_shows_the_series(desk: Desk, orthanc_and_config: tuple[Orthanc, Config]) -> None:
    orthanc, config = orthanc_and_config
    desk.finish_job(config)
    receiver = run(desk, config)
    desk.until(lambda: desk.state is JobState.DONE)
    receiver.stop()
    done = desk.delivery()
    assert (done.state, done.reason) == (DeliveryState.VISIBLE, "")
    assert done.committed_at is not None
    [commitment] = desk.ledger.commitments(done.id)
    assert commitment.state is CommitmentState.COMMITTED
    assert len(orthanc.get("/instances")) == COUNT


def test_what_orthanc_has_lost_is_sent_again_before_it_commits(
    desk: Desk, orthanc_and_config: tuple[Orthanc, Config]
) -> None:
    orthanc, config = orthanc_and_config
    desk.finish_job(config)
    row = desk.ledger.claim_delivery(OWNER, lease_s=60)
    assert row is not None
    deliveries = Deliveries(config, desk.ledger, desk.spool, owner=OWNER)
    sent = deliveries._send(desk.files["pet"], config.peers[0], calling_ae="SYNPET")
    desk.ledger.finish_delivery(
        row.id,
        OWNER,
        state=DeliveryState.SENT,
        sent=sent.stored,
        statuses=sent.statuses,
        goal=DeliveryState.VISIBLE,
    )
    lost = orthanc.get("/instances")[0]
    url = f"http://127.0.0.1:{orthanc.http_port}/instances/{lost}"
    with urlopen(Request(url, method="DELETE"), timeout=30):
        pass
    receiver = run(desk, config)
    desk.until(lambda: desk.state is JobState.DONE)
    receiver.stop()
    assert desk.delivery().state is DeliveryState.VISIBLE
    assert desk.delivery().attempts == 2
    first, second = desk.ledger.commitments(row.id)
    assert (first.state, second.state) == (CommitmentState.FAILED, CommitmentState.COMMITTED)
    assert len(orthanc.get("/instances")) == COUNT
