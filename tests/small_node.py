"""The node's parts in one thread, without a network: real spool, ledger, assembler, worker and deliveries.

The engine makes results of a few bytes, which name the time that they were told; the PACS is a folder that keeps
every content under every UID. What is left to others: associations (tests/node_process.py) and networks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from dicom_node.assembler import Assembler
from dicom_node.config import Config
from dicom_node.delivery import Deliveries
from dicom_node.net.associations import AssociationRegistry
from dicom_node.net.scu import SendOutcome
from dicom_node.recover import adopt_unknown, cancel_again
from dicom_node.worker import Worker
from pipeline.result import write_result
from pipeline.types import EncodedInstance, EncodedSeries, Progress, Provenance, ResultSet, Stage
from storage.incoming_file import PREAMBLE_BYTES
from storage.ledger import Ledger, open_ledger, utc_now
from storage.records import FINAL_JOB_STATES, Job, JobFilter, JobState
from storage.spool import Spool

OWNER = "node-small"
SC = "1.2.840.10008.5.1.4.1.1.7"
Clock = Callable[[], datetime]
LONG_S = 1000.0  # longer than every period that the assembler waits


def small_config(root: Path, **tables: Any) -> Config:
    """One peer, one destination, retries without pauses worth a wait."""
    return Config.model_validate(
        {
            "peers": [{"name": "pacs", "ae_title": "PACS"}],
            "destinations": [
                {"name": "pacs", "peer": "pacs", "verify": False, "first_retry_s": 0.001, "max_retry_s": 0.001}
            ],
            "intake": {"min_free_bytes": 0, "incomplete_after_s": 300},
            "selection": {"min_slices": 3, "min_coverage_mm": 2},
            "engine": {"retry_s": 0.001},
            "storage": {"root": str(root)},
            **tables,
        }
    )


class SmallEngine:
    """A result whose UIDs are a function of the instances, and whose bytes hold the time that it was told."""

    def run(
        self, _job_id: str, paths: Sequence[Path], _options: Any, folder: Path, created: datetime, **told: Any
    ) -> None:
        told["on_progress"](Progress(stage=Stage.READ, done=0, total=1))
        names = "".join(path.name for path in paths)
        write_result(_result(names, created), folder)

    def warm_up(self, options: Any) -> None:
        pass

    def close(self) -> None:
        pass


def _result(names: str, created: datetime) -> ResultSet:
    def series(kind: str, count: int) -> EncodedSeries:
        uid = f"2.25.{int(hashlib.sha256(f'{kind}{names}'.encode()).hexdigest()[:30], 16)}"
        instances = tuple(
            EncodedInstance(
                sop_class_uid=SC,
                sop_instance_uid=f"{uid}.{i}",
                transfer_syntax_uid="1.2.840.10008.1.2.1",
                file_name=f"{i:04d}.dcm",
                data=f"{uid}.{i} written {created.isoformat()}".encode(),
            )
            for i in range(1, count + 1)
        )
        return EncodedSeries(kind=kind, encoding="sc", series_uid=uid, instances=instances)

    return ResultSet(
        series=(series("pet", 2), series("mip", 1)),
        stats=(),
        provenance=Provenance(
            software_version="1", bundle_name="tiny", bundle_version="1", bundle_sha256="0" * 64, models=(),
            segmenter="builtin", segmenter_version="1", device="cpu",
        ),
        overview_png=b"png",
        stage_seconds={},
    )  # fmt: skip


class FolderPacs:
    """Keeps `<uid>/<digest>`: two files in a folder are two contents under one UID."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.up = True

    def send(self, files: Sequence[Path], **_: Any) -> SendOutcome:
        if not self.up:
            return SendOutcome(code="connection_failed", text="PACS cannot be reached")
        statuses = {}
        for path in files:
            data = path.read_bytes()
            uid = data.decode().split()[0]
            place = self.folder / uid
            place.mkdir(parents=True, exist_ok=True)
            (place / hashlib.sha256(data).hexdigest()).write_bytes(data)
            statuses[uid] = "0x0000"
        return SendOutcome(statuses=statuses)

    def contents(self) -> dict[str, int]:
        """How many contents it has under each UID."""
        return {place.name: len(list(place.iterdir())) for place in self.folder.iterdir()}


class SmallNode:
    """One life of the node, from its start."""

    def __init__(
        self,
        root: Path,
        pacs: FolderPacs,
        *,
        engine: Any = None,
        clock: Clock = utc_now,
        trusted: Callable[[], bool] = lambda: True,
        **tables: Any,
    ) -> None:
        self.config = small_config(root, **tables)
        self.now_s = 1000.0
        self.spool = Spool(root, min_free_bytes=self.config.intake.min_free_bytes)
        self.spool.clean_temp()
        self.ledger: Ledger = open_ledger(self.config.ledger_url, clock=clock)
        self.registry = AssociationRegistry(limit=9, clock=lambda: self.now_s)
        self.deliveries = Deliveries(
            self.config, self.ledger, self.spool, owner=OWNER, send=pacs.send, clock=clock, trusted=trusted
        )
        self.worker = Worker(self.config, self.ledger, self.spool, engine or SmallEngine(), owner=OWNER, clock=clock)
        self.adopted = adopt_unknown(self.ledger, self.spool)
        cancel_again(self.ledger, self.spool)
        self.worker.reclaim()
        self.deliveries.reclaim()
        self.ledger.sweep(max_attempts=self.config.engine.max_attempts, retry_s=0)
        self.assembler = Assembler(self.config, self.spool, self.ledger, self.registry, clock=lambda: self.now_s)

    def receive(self, files: Sequence[Path], on_stored: Callable[[str], None] = lambda _: None) -> None:
        """One association that brings these files; `on_stored` is told each one that was acknowledged."""
        token = self.registry.open(calling_ae="PACS", address="127.0.0.1", peer="pacs")
        assert token is not None
        for path in files:
            self.spool.store_incoming(token, path.stem, [path.read_bytes()[PREAMBLE_BYTES:]])
            on_stored(path.stem)
        self.spool.close_incoming(token)
        self.registry.close(token)

    def run_to_end(self, rounds: int = 20) -> None:
        """Until every job has ended and nothing is on its way in."""
        for _ in range(rounds):
            self.step()
            if self.jobs() and not self.spool.incoming() and all(j.state in FINAL_JOB_STATES for j in self.jobs()):
                return
        raise AssertionError(f"jobs that do not end: {[(j.state.value, j.reason_code) for j in self.jobs()]}")

    def step(self) -> None:
        """Every part once."""
        self.step_to_queued()
        while self.worker.work_one():
            pass
        self.deliver()

    def step_to_queued(self) -> None:
        """What came is quiet, and decided upon."""
        self.assembler.tick()
        self.now_s += LONG_S
        self.assembler.tick()

    def deliver(self) -> None:
        """What is due now, in this thread."""
        if not self.config.destinations:
            return
        lane = self.deliveries._lanes["pacs"]
        for _ in range(9):  # a PACS that is down is never done
            if not self.deliveries._claim_one():
                return
            claimed = lane.get()
            assert claimed is not None
            self.deliveries._attempt(claimed, self.config.destinations[0])
            self.deliveries._in_hand.pop(claimed.delivery.id, None)

    def jobs(self, *states: JobState) -> list[Job]:
        return self.ledger.find(JobFilter(states=states))

    def close(self) -> None:
        self.ledger.close()
