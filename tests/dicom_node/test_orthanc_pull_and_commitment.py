"""A real Orthanc and a whole node: the node fetches at night what never came, and Orthanc asks whether it is held."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ct_factory import write_ct
from fake_pacs import free_port
from orthanc import Orthanc, running_orthanc
from pydicom import Dataset

from dicom_node import node as node_module
from dicom_node.config import Config
from dicom_node.node import Node
from storage.ledger import open_ledger
from storage.records import JobFilter

pytestmark = pytest.mark.orthanc
UNTIL_S = 240.0
SLICES = 3


def config_for(root: Path, orthanc: Orthanc, port: int) -> Config:
    peer = {"name": "orthanc", "ae_title": orthanc.ae_title, "port": orthanc.dicom_port}
    asked = {"may": ["store", "commit"], "we_may": ["find", "move"]}
    return Config.model_validate(
        {
            "node": {"host": "127.0.0.1", "port": port, "receiver_processes": 1},
            "peers": [{**peer, **asked}],
            "pulls": [{"name": "missed", "peer": "orthanc", "at": "00:00", "days_back": 2}],
            "intake": {"min_free_bytes": 0, "scan_interval_s": 0.2, "quiet_period_s": 600},
            "storage": {"root": str(root)},
        }
    )


def until(what: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + UNTIL_S
    while not (found := what()):
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.05)
    return found


def commitment(orthanc: Orthanc, series: str) -> dict[str, Any]:
    """Ask as Orthanc's users do; the node's report."""
    asked = orthanc.post("/modalities/synpet/storage-commitment", {"Resources": [series]})

    def report() -> dict[str, Any] | None:
        found: dict[str, Any] = orthanc.get(f"/storage-commitment/{asked['ID']}")
        return None if found["Status"] == "Pending" else found

    told: dict[str, Any] = until(report)
    return told


def yesterday(ds: Dataset, _slice: int) -> None:
    ds.StudyDate = f"{datetime.now() - timedelta(days=1):%Y%m%d}"


def test_orthanc_sends_what_never_came_and_is_told_what_is_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_module, "PULLS_EVERY_S", 0.2)
    root, port = tmp_path / "spool", free_port()
    root.mkdir()
    long_ago = datetime.now(UTC) - timedelta(days=3)  # the last run: the one of tonight was missed
    earlier = open_ledger(f"sqlite:///{root / 'ledger.sqlite'}", clock=lambda: long_ago)
    earlier.note("", "pull_run", "done", details={"pull": "missed"})
    earlier.close()
    with running_orthanc(tmp_path / "orthanc", modalities={"synpet": ("SYNPET", port)}) as orthanc:
        for path in write_ct(tmp_path / "ct", np.zeros((SLICES, 8, 8)), modify=yesterday):
            orthanc.post("/instances", path.read_bytes())
        [series] = orthanc.series("CT")
        node = Node(config_for(root, orthanc, port), drain_s=0)
        node.start()
        try:
            [run] = until(lambda: [e for e in node.ledger.search_events(code="pull_run") if e.time > long_ago])
            assert (run.details["fetched"], run.details["instances"]) == (1, SLICES)
            [job] = until(lambda: [job for job in node.ledger.find(JobFilter()) if job.instances == SLICES])
            first = commitment(orthanc, series["ID"])
            assert (first["Status"], len(first["Success"]), first["Failures"]) == ("Success", SLICES, [])
            [lost, *_] = node.spool.series_files(job.info.series_uid)
            node.spool.drop(lost)
            second = commitment(orthanc, series["ID"])
            assert (second["Status"], len(second["Success"])) == ("Failure", SLICES - 1)
            [failure] = second["Failures"]
            assert (failure["SOPInstanceUID"], failure["FailureReason"]) == (lost.stem, 0x0112)
        finally:
            node.stop()
