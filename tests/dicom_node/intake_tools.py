"""A node's intake for tests: real spool, ledger, receiver on loopback, and a clock that the test moves."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ct_factory import write_ct
from pydicom import dcmread
from pydicom.uid import CTImageStorage
from pynetdicom import AE
from pynetdicom.association import Association

from dicom_node.assembler import Assembler
from dicom_node.config import Config
from dicom_node.net.associations import AssociationRegistry
from dicom_node.net.checkpoint import install
from dicom_node.net.receive import Receiver
from storage.incoming_file import PREAMBLE_BYTES
from storage.ledger import Ledger, open_ledger
from storage.records import Job, JobState
from storage.spool import Spool

WAIT_S = 60.0


class Clock:
    """Monotonic seconds under the test's control."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def config(**tables: object) -> Config:
    """A configuration with one known peer, small limits and quick periods."""
    base: dict[str, object] = {
        "node": {"ae_title": "SYNPET", "host": "127.0.0.1", "acse_timeout_s": 30, "network_timeout_s": 60},
        "peers": [{"name": "pacs", "ae_title": "PACS"}],
        "intake": {
            "quiet_period_s": 10,
            "study_quiet_period_s": 30,
            "incomplete_after_s": 300,
            "min_free_bytes": 0,
        },
        "selection": {"min_slices": 3, "min_coverage_mm": 10},
    }
    for name, values in tables.items():
        known = base.get(name)
        base[name] = {**known, **values} if isinstance(known, dict) and isinstance(values, dict) else values
    return Config.model_validate(base)


def open_registry(cfg: Config, clock: Clock) -> AssociationRegistry:
    """The book of associations as the node makes it."""
    return AssociationRegistry(limit=cfg.node.max_associations, for_peers=cfg.places_for_peers, clock=clock)


@dataclass
class Intake:
    """Everything between the wire and a QUEUED job."""

    config: Config
    spool: Spool
    ledger: Ledger
    registry: AssociationRegistry
    receiver: Receiver
    assembler: Assembler
    clock: Clock
    port: int = 0

    def restart(self) -> None:
        """What a kill -9 leaves: only the spool and the ledger."""
        self.registry = open_registry(self.config, self.clock)
        self.assembler = Assembler(self.config, self.spool, self.ledger, self.registry, clock=self.clock)

    def put(self, paths: Sequence[Path], token: str = "", *, aborted: bool = False) -> None:
        """Place files as the receiver would, without a network; without `token` on an association of their own."""
        used = token or self.registry.open(calling_ae="PACS", address="127.0.0.1", peer="pacs")
        assert used is not None
        for path in paths:
            uid = dcmread(path, stop_before_pixels=True, specific_tags=["SOPInstanceUID"]).SOPInstanceUID
            self.spool.store_incoming(used, uid, (path.read_bytes()[PREAMBLE_BYTES:],))
        if not token:
            self.spool.close_incoming(used)
            self.registry.close(used, aborted=aborted)

    def pass_time(self, seconds: float) -> None:
        self.assembler.tick()
        self.clock.now += seconds
        self.assembler.tick()

    def jobs(self, series_uid: str = "") -> list[Job]:
        from storage.records import JobFilter

        return self.ledger.find(JobFilter(series_uid=series_uid))

    def job(self, series_uid: str = "") -> Job:
        (job,) = self.jobs(series_uid)
        return job

    def codes(self, job_id: str) -> list[str]:
        return [event.code for event in self.ledger.events(job_id)]

    def event_codes(self) -> list[str]:
        return [event.code for event in self.ledger.search_events()]

    @contextlib.contextmanager
    def association(
        self, contexts: Sequence[tuple[str, Sequence[str]]] = ((CTImageStorage, ()),), *, calling_ae: str = "PACS"
    ) -> Iterator[Association]:
        before = set(self.registry.open_tokens())
        assoc = self.associate(contexts, calling_ae=calling_ae)
        assert assoc.is_established
        try:
            yield assoc
        finally:
            if assoc.is_established:
                assoc.release()
            self.wait(lambda: set(self.registry.open_tokens()) <= before)  # the node's side ends a moment later

    def associate(
        self,
        contexts: Sequence[tuple[str, Sequence[str]]] = ((CTImageStorage, ()),),
        *,
        calling_ae: str = "PACS",
        called_ae: str = "SYNPET",
    ) -> Association:
        ae = AE(ae_title=calling_ae)
        ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = 60
        for abstract_syntax, syntaxes in contexts:
            if syntaxes:
                ae.add_requested_context(abstract_syntax, list(syntaxes))
            else:
                ae.add_requested_context(abstract_syntax)
        return install(ae.associate("127.0.0.1", self.port, ae_title=called_ae))

    def wait(self, holds: Callable[[], bool]) -> None:
        """Until the other thread has done it; the limit only ends a broken test."""
        end = time.monotonic() + WAIT_S
        while not holds():
            if time.monotonic() > end:
                raise AssertionError("what was waited for did not come")
            time.sleep(0.01)


@contextlib.contextmanager
def running_intake(folder: Path, cfg: Config | None = None, *, listen: bool = True) -> Iterator[Intake]:
    cfg = cfg or config()
    clock = Clock()
    spool = Spool(folder / "spool", min_free_bytes=cfg.intake.min_free_bytes)
    ledger = open_ledger(f"sqlite:///{folder / 'ledger.sqlite'}")
    registry = open_registry(cfg, clock)
    receiver = Receiver(cfg, spool, ledger, registry, clock=clock)
    assembler = Assembler(cfg, spool, ledger, registry, clock=clock)
    intake = Intake(cfg, spool, ledger, registry, receiver, assembler, clock)
    try:
        if listen:
            intake.port = receiver.start(port=0)
        yield intake
    finally:
        receiver.stop()
        ledger.close()


def small_ct(folder: Path, slices: int = 6, **kwargs: object) -> list[Path]:
    """A CT of 8x8 pixels, 5 mm between slices."""
    hu = np.zeros((slices, 8, 8), np.int16)
    hu += np.arange(slices, dtype=np.int16)[:, None, None]
    return write_ct(folder, hu, **{"spacing_mm": (5.0, 2.0, 2.0), **kwargs})  # type: ignore[arg-type]


QUEUED, REJECTED, RECEIVING, HELD = JobState.QUEUED, JobState.REJECTED, JobState.RECEIVING, JobState.HELD
