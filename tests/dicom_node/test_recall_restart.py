"""A recall while the node is off, and kill -9 while it sends the notes: they arrive all the same, once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from fake_pacs import FakePacs
from node_process import NodeProcess, write_ct
from pydicom.uid import KeyObjectSelectionDocumentStorage, SecondaryCaptureImageStorage
from tiny_bundle import write_tiny_bundle
from typer.testing import CliRunner

from dicom_node.cli import app
from storage.records import REJECTION, Delivery, DeliveryState, JobState

pytestmark = pytest.mark.slow

CLASSES = (SecondaryCaptureImageStorage, KeyObjectSelectionDocumentStorage)


def notes_of(node: NodeProcess, job_id: str) -> Sequence[Delivery]:
    ledger = node.ledger()
    try:
        return [delivery for delivery in ledger.deliveries(job_id) if delivery.kind == REJECTION]
    finally:
        ledger.close()


def test_notes_that_were_opened_while_the_node_was_off_arrive_once_also_after_a_kill(tmp_path: Path) -> None:
    files = write_ct(tmp_path / "ct")
    with (
        FakePacs(classes=CLASSES, delay_s=0.05) as pacs,
        NodeProcess(tmp_path, pacs, write_tiny_bundle(tmp_path / "bundle")) as node,
    ):
        node.start()
        assert node.send(files).ok
        job = node.until_state(JobState.DONE, JobState.FAILED, JobState.REJECTED)
        node.kill()
        images = pacs.instances
        command = ["recall", "--bundle", "tiny@1", "--send-rejections", "--yes", "--config", str(node.config)]
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, done.output
        assert {note.state for note in notes_of(node, job.id)} == {DeliveryState.PENDING}
        assert pacs.instances == images
        node.start()
        node.until(lambda: bool(pacs.instances - images))
        node.kill()
        node.start()
        node.until(lambda: {note.state for note in notes_of(node, job.id)} == {DeliveryState.SENT})
        assert node.until_state(JobState.DONE).details["recalled"]["code"] == "113001"
        assert len(pacs.instances - images) == len(notes_of(node, job.id)) == 2
        assert {note.series_uid for note in notes_of(node, job.id)} <= set(pacs.received.series)
        assert all(len(digests) == 1 for digests in pacs.received.digests.values())
        assert all(pacs.received.attempts[uid] == 1 for uid in images)  # what was recalled was not sent again
