"""A node's ledger and spool with finished results, as the worker leaves them: what recall and rejection start with."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from outputs_samples import PROVENANCE, Sample, sample_suv, source_of, write_sample_ct

from dicom_node.config import Config
from dicom_node.worker import new_deliveries, result_details
from pipeline.result import summarize, write_result
from pipeline.types import Provenance, ResultSet
from storage.ledger import Ledger, open_ledger
from storage.records import DeliveryState, Job, JobState, SeriesInfo
from storage.spool import Spool

OWNER = "node-test"
PEERS = [{"name": name, "ae_title": name.upper()} for name in ("pacs", "other")]


class Bench:
    """A ledger whose clock the test turns, a spool, and a configuration with the destinations "pacs" and "other"."""

    def __init__(self, root: Path, *, ports: tuple[int, int] = (104, 104), **destination: Any) -> None:
        self.now = datetime(2026, 1, 1, tzinfo=UTC)
        self.root = root
        self.config = Config.model_validate(
            {
                "storage": {"root": root / "spool"},
                "peers": [{**peer, "port": port} for peer, port in zip(PEERS, ports, strict=True)],
                "destinations": [
                    {"name": "pacs", "peer": "pacs", "verify": False, "first_retry_s": 0.05, **destination},
                    {"name": "other", "peer": "other", "verify": False, "encoding": "pet", "first_retry_s": 0.05},
                ],
            }
        )
        self.spool = Spool(root / "spool", min_free_bytes=0)
        self.ledger: Ledger = open_ledger(f"sqlite:///{root / 'spool' / 'ledger.sqlite'}", clock=self.clock)
        self._sample = Sample(source=source_of(write_sample_ct(root / "ct")), suv=sample_suv((3, 9, 11)))

    def clock(self) -> datetime:
        """A second later each time it is asked."""
        self.now += timedelta(seconds=1)
        return self.now

    def result(self, provenance: Provenance = PROVENANCE) -> ResultSet:
        """A real PET series in both encodings and a MIP; another provenance makes other UIDs."""
        sample = replace(self._sample, provenance=provenance)
        return ResultSet(
            series=(sample.pet("sc"), sample.pet("pet"), sample.mip()),
            stats=(),
            provenance=provenance,
            overview_png=b"png",
            stage_seconds={"read": 1.0},
        )

    def finished(
        self, *, supersedes: str = "", version: str = "3", held: tuple[str, str] | None = None, **info: str
    ) -> Job:
        """A job whose result lies in the outbox, with its deliveries open."""
        result = self.result(replace(PROVENANCE, bundle_version=version, bundle_sha256=version * 64))
        given = {"study_uid": "2.25.901", "series_uid": "2.25.902", "accession": "ACC1", **info}
        job = self.ledger.open_job(SeriesInfo(**given), supersedes=supersedes)
        self.ledger.move(job.id, JobState.QUEUED, code="chosen", text="")
        assert self.ledger.claim(OWNER, lease_s=60)
        write_result(result, self.spool.result_folder(job.id))
        summary = summarize(result)
        wanted = new_deliveries(summary.series, self.config.destinations)
        return self.ledger.complete_run(job.id, OWNER, deliveries=wanted, held=held, details=result_details(summary))

    def send(self, *, only: str = "") -> list[str]:
        """Say of every delivery that waits (to `only`) that all went well, in order; "destination kind" of each."""
        sent, others = [], []
        while (claimed := self.ledger.claim_delivery(OWNER, lease_s=60)) is not None:
            if only and claimed.destination != only:
                others.append(claimed)
                continue
            self.ledger.finish_delivery(
                claimed.id, OWNER, state=DeliveryState.SENT, sent=claimed.instances, statuses={}
            )
            sent.append(f"{claimed.destination} {claimed.kind}")
        for claimed in others:
            self.ledger.finish_delivery(
                claimed.id, OWNER, state=DeliveryState.PENDING, sent=0, statuses={}, counted=False
            )
        return sent

    def codes(self, job_id: str) -> list[str]:
        return [event.code for event in self.ledger.events(job_id)]


def write_config(bench: Bench) -> None:
    """The file that the command reads; the same destinations as the bench's."""
    text = '[storage]\nroot = "spool"\n'
    for peer in bench.config.peers:
        text += f'[[peers]]\nname = "{peer.name}"\nae_title = "{peer.ae_title}"\nport = {peer.port}\n'
    for one in bench.config.destinations:
        text += f'[[destinations]]\nname = "{one.name}"\npeer = "{one.peer}"\nencoding = "{one.encoding}"\n'
    (bench.root / "config.toml").write_text(text, encoding="utf-8")
