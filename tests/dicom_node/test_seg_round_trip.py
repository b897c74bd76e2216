"""A whole node: CT and SEG in over the network, the PET and the districts' SEG out to a PACS."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from fake_pacs import FakePacs, free_port
from pydicom import dcmread
from pydicom.uid import SecondaryCaptureImageStorage, SegmentationStorage
from seg_factory import write_seg
from tiny_bundle import write_tiny_bundle
from tiny_study import tiny_phantom, write_tiny_study

from dicom_node.config import Config, PeerConfig
from dicom_node.net.scu import send_series
from dicom_node.node import Node
from pipeline.types import District
from storage.records import Job, JobFilter, JobState

ENDED = {JobState.DONE, JobState.FAILED, JobState.REJECTED, JobState.HELD, JobState.CANCELLED}


def wait_for_end(node: Node) -> Job:
    """The limit is only there for a test that fails."""
    for _ in range(5000):
        ended = [job for job in node.ledger.find(JobFilter()) if job.state in ENDED]
        if ended:
            return ended[0]
        time.sleep(0.05)
    pytest.fail("the job did not end")


def test_a_seg_sent_with_the_ct_decides_and_the_districts_come_back_as_a_seg(tmp_path: Path) -> None:
    paths = write_tiny_study(tmp_path / "ct")
    labels = tiny_phantom().districts
    masks = {d.key: labels == d for d in District if (labels == d).any()}
    seg = write_seg(tmp_path / "seg.dcm", paths, masks)
    with FakePacs(classes=[SecondaryCaptureImageStorage, SegmentationStorage]) as pacs:
        peer = pacs.peer("pacs")
        config = Config.model_validate(
            {
                "node": {"host": "127.0.0.1", "port": free_port()},
                "peers": [peer.model_dump()],
                "intake": {"quiet_period_s": 0.5, "study_quiet_period_s": 0.5, "scan_interval_s": 0.1}
                | {"min_free_bytes": 0},
                "selection": {"min_slices": 3, "min_coverage_mm": 10},
                "pipeline": {"bundle": str(write_tiny_bundle(tmp_path / "bundle")), "device": "cpu", "threads": 1}
                | {"districts": ["dicom_seg", "builtin"]},
                "gate": {"min_coverage_mm": 30},
                "output": {"seg": True},
                "destinations": [{"name": "pacs", "peer": "pacs"}],
                "storage": {"root": str(tmp_path / "spool")},
            }
        )
        node = Node(config, drain_s=0)
        port = node.start()
        try:
            us = PeerConfig(name="node", ae_title="SYNPET", port=port)
            assert send_series([*paths, seg], us, calling_ae=peer.ae_title).ok
            job = wait_for_end(node)
            if job.state is JobState.HELD:  # random weights give random PET: the gate may hold it, a person lets go
                node.ledger.release(job.id)
                for _ in range(2000):
                    if node.ledger.get(job.id).state is JobState.DONE:
                        break
                    time.sleep(0.05)
            deliveries = node.ledger.deliveries(job.id)
            written = dcmread(next(node.spool.result_folder(job.id).glob("seg-sc/*.dcm")))
            assert node.ledger.get(job.id).state is JobState.DONE
        finally:
            node.stop()
    assert [d.kind for d in deliveries] == ["pet", "mip", "seg"]
    assert job.details["provenance"]["segmenter"] == "dicom_seg"
    assert written.SegmentSequence[0].SegmentAlgorithmName == "dicom_seg"
    assert [item.SegmentLabel for item in written.SegmentSequence] == list(masks)
    assert written.SOPInstanceUID in pacs.received.order
