"""A desk for tests of delivery: a real ledger and spool with a finished job, and the deliveries under test."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_pacs import FakePacs
from result_factory import write_instances

from dicom_node.config import Config, DestinationConfig, NodeConfig, StorageConfig
from dicom_node.delivery import Deliveries
from storage.ledger import Ledger, open_ledger
from storage.records import Delivery, JobState, NewDelivery, SeriesInfo
from storage.spool import Spool

OWNER = "node-test"
COUNT = 4
UNTIL_S = 120.0  # only a test that fails waits so long
SC, PET = "1.2.840.10008.5.1.4.1.1.7", "1.2.840.10008.5.1.4.1.1.128"


def config_for(root: Path, *pacs: FakePacs, **changes: Any) -> Config:
    """One destination for each PACS, called pacs0, pacs1, ...; quick retries."""
    peers = tuple(one.peer(f"pacs{i}") for i, one in enumerate(pacs))
    return Config(
        node=NodeConfig(acse_timeout_s=60, dimse_timeout_s=60, network_timeout_s=60),
        storage=StorageConfig(root=root),
        peers=peers,
        destinations=tuple(
            DestinationConfig(name=peer.name, peer=peer.name, first_retry_s=0.05, max_retry_s=0.1, **changes)
            for peer in peers
        ),
    )


class Desk:
    """A ledger and a spool with a finished job, and the deliveries under test."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.spool = Spool(root, min_free_bytes=0)
        self.ledger: Ledger = open_ledger(f"sqlite:///{root / 'ledger.sqlite'}")
        self.job_id = ""
        self.files: dict[str, list[Path]] = {}
        self._running: Deliveries | None = None

    def finish_job(self, config: Config, kinds: dict[str, str] | None = None) -> None:
        """A job whose result of `COUNT` instances per kind waits in the outbox for every destination."""
        job = self.ledger.open_job(SeriesInfo(study_uid="1.2", series_uid="1.2.3"))
        self.ledger.move(job.id, JobState.QUEUED, code="chosen", text="")
        assert self.ledger.claim(OWNER, lease_s=60)
        folder = self.spool.result_folder(job.id)
        kinds = kinds or {"pet": SC}
        self.files = {k: write_instances(folder / f"{k}-sc", COUNT, sop_class_uid=c) for k, c in kinds.items()}
        (folder / "result.json").write_text(json.dumps({}))
        self.ledger.complete_run(
            job.id,
            OWNER,
            deliveries=[
                NewDelivery(destination=d.name, kind=kind, encoding="sc", series_uid=f"1.{i}", instances=COUNT)
                for d in config.destinations
                for i, kind in enumerate(kinds)
            ],
        )
        self.job_id = job.id

    def deliver(self, config: Config, **changes: Any) -> Deliveries:
        self._running = Deliveries(config, self.ledger, self.spool, owner=OWNER, poll_s=0.02, **changes)
        self._running.start()
        return self._running

    @property
    def state(self) -> JobState:
        return self.ledger.get(self.job_id).state

    def delivery(self, index: int = 0) -> Delivery:
        return self.ledger.deliveries(self.job_id)[index]

    def until(self, what: Callable[[], bool]) -> None:
        """Wait for something that must come; the limit is only there for a test that fails."""
        end = time.monotonic() + UNTIL_S
        while not what():
            if time.monotonic() > end:
                pytest.fail(f"it did not come: job {self.state}, deliveries {self.ledger.deliveries(self.job_id)}")
            time.sleep(0.01)

    def close(self) -> None:
        if self._running:
            self._running.stop()
        self.ledger.close()
