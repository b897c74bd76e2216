"""A real Orthanc stores to a receiver process, asks for commitment, and is told on an association of ours."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ct_factory import write_ct
from fake_pacs import free_port
from intake_tools import config
from orthanc import Orthanc, running_orthanc

from dicom_node.commitments import CommitmentReporter
from dicom_node.net.associations import AssociationRegistry
from dicom_node.net.receivers import ReceiverPool
from storage.asked import AskedCommitments
from storage.ledger import open_ledger
from storage.spool import Spool

pytestmark = pytest.mark.orthanc
UNTIL_S = 60.0


def commitment(orthanc: Orthanc, resources: list[str], reporter: CommitmentReporter) -> dict[str, Any]:
    """Ask as Orthanc's users do, and wait for the node's report."""
    asked = orthanc.post("/modalities/synpet/storage-commitment", {"Resources": resources})
    until = time.monotonic() + UNTIL_S
    while time.monotonic() < until:
        reporter.tick()
        report: dict[str, Any] = orthanc.get(f"/storage-commitment/{asked['ID']}")
        if report["Status"] != "Pending":
            return report
        time.sleep(0.05)
    raise AssertionError("no report came")


def test_orthanc_is_told_what_is_held_and_what_is_not(tmp_path: Path) -> None:
    port = free_port()
    with running_orthanc(tmp_path / "orthanc", modalities={"synpet": ("SYNPET", port)}) as orthanc:
        peer = {"name": "orthanc", "ae_title": orthanc.ae_title, "port": orthanc.dicom_port}
        cfg = config(
            node={"port": port, "receiver_processes": 1},
            peers=[{**peer, "may": ["store", "echo", "commit"]}],
            storage={"root": str(tmp_path / "spool")},
        )
        (tmp_path / "spool").mkdir()
        spool = Spool(tmp_path / "spool", min_free_bytes=0)
        ledger = open_ledger(f"sqlite:///{tmp_path / 'ledger.sqlite'}")
        pool = ReceiverPool(cfg, ledger, AssociationRegistry(limit=8, clock=time.monotonic))
        pool.start()
        try:
            reporter = CommitmentReporter(cfg, AskedCommitments(spool.root), spool, ledger)
            for path in write_ct(tmp_path / "ct", np.zeros((3, 8, 8))):
                orthanc.post("/instances", path.read_bytes())
            [series] = orthanc.series("CT")
            orthanc.post("/modalities/synpet/store", series["ID"])
            first = commitment(orthanc, [series["ID"]], reporter)
            assert (first["Status"], len(first["Success"]), first["Failures"]) == ("Success", 3, [])
            lost = spool.incoming()[0]
            spool.drop(lost)
            second = commitment(orthanc, [series["ID"]], reporter)
            assert (second["Status"], len(second["Success"])) == ("Failure", 2)
            [failure] = second["Failures"]
            assert (failure["SOPInstanceUID"], failure["FailureReason"]) == (lost.stem, 0x0112)
        finally:
            pool.stop()
            ledger.close()
