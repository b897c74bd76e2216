"""A running node tells Prometheus what it received, refused, computed and sent; nothing of a patient or a stranger."""

from __future__ import annotations

import re
import time
import urllib.request
from collections.abc import MutableMapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import structlog
from fake_pacs import FakePacs, free_port
from prometheus_client.parser import text_string_to_metric_families
from pydicom.uid import MRImageStorage, generate_uid
from pynetdicom import AE
from result_factory import write_instances
from tiny_bundle import write_tiny_bundle
from tiny_study import write_tiny_study

from dicom_node.config import Config
from dicom_node.errors import NodeError
from dicom_node.metrics import Metrics, Sources, association_metrics
from dicom_node.net.associations import AssociationRegistry
from dicom_node.net.scu import send_series
from dicom_node.node import Node
from storage.errors import LedgerError
from storage.ledger import Ledger, open_ledger
from storage.records import JobFilter, JobState
from storage.spool import Spool

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"
Key = tuple[str, tuple[tuple[str, str], ...]]


def key(name: str, **labels: str) -> Key:
    return name, tuple(sorted(labels.items()))


def scrape(port: int) -> tuple[str, dict[Key, float]]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return text, {key(sample.name, **sample.labels): sample.value for sample in samples}


@dataclass
class Scraped:
    """What one node said after a study, a refused caller and instances that it does not use."""

    text: str
    figures: dict[Key, float]
    slices: int
    sent_bytes: int
    job_ids: list[str]
    done: list[MutableMapping[str, Any]]  # the lines job.done of its log


@pytest.fixture(scope="module")
def scraped(tmp_path_factory: pytest.TempPathFactory) -> Scraped:
    folder = tmp_path_factory.mktemp("metrics")
    slices = write_tiny_study(folder / "ct", study_uid=generate_uid(), series_uid=generate_uid())
    with FakePacs() as pacs, ExitStack() as lines:
        config = Config.model_validate(
            {
                "node": {"host": "127.0.0.1", "port": free_port(), "receiver_processes": 1},
                "peers": [pacs.peer("pacs").model_dump(), {"name": "ward", "ae_title": "WARD", "may": ["echo"]}],
                "intake": {
                    "quiet_period_s": 0.5,
                    "study_quiet_period_s": 0.5,
                    "scan_interval_s": 0.1,
                    "min_free_bytes": 1,
                },
                "pipeline": {"bundle": str(write_tiny_bundle(folder / "bundle")), "device": "cpu", "threads": 1},
                "destinations": [{"name": "archive", "peer": "pacs", "verify": False}],
                "storage": {"root": folder / "spool"},
                "metrics": {"port": free_port()},
            }
        )
        node = Node(config, drain_s=0)
        node.start()
        try:
            logs = lines.enter_context(structlog.testing.capture_logs())
            us = config.peers[0].model_copy(update={"ae_title": "SYNPET", "port": config.node.port})
            calling = config.peers[0].ae_title
            others = write_instances(folder / "mr", 3, sop_class_uid=MRImageStorage)
            assert send_series(others, us, calling_ae=calling).ok
            assert send_series(slices, us, calling_ae=calling).ok
            assert send_series(slices[:1], us, calling_ae="MEIER^HANS").code == "association_rejected"
            aborting = AE(ae_title=calling)
            aborting.add_requested_context("1.2.840.10008.1.1")
            aborting.associate("127.0.0.1", config.node.port, ae_title="SYNPET").abort()
            until_done(node.ledger)
            text, figures = scrape_all(config.metrics.port)
            job_ids = [job.id for job in node.ledger.find(JobFilter())]
        finally:
            node.stop()
    data = sum(len(path.read_bytes()) for path in slices)
    done = [line for line in logs if line["event"] == "job.done"]
    return Scraped(text=text, figures=figures, slices=len(slices), sent_bytes=data, job_ids=job_ids, done=done)


def scrape_all(port: int) -> tuple[str, dict[Key, float]]:
    """What the receiver's process counts comes through a pipe: wait for what came last, the refusal and the abort."""
    rejected = key("dicom_node_associations_rejected_total", reason="calling_ae_unknown")
    aborted = key("dicom_node_associations_closed_total", peer="pacs", how="aborted")
    until = time.monotonic() + 120
    while True:
        text, figures = scrape(port)
        whole = figures.get(rejected) and figures.get(aborted) and not figures[key("dicom_node_associations_open")]
        if whole or time.monotonic() > until:
            return text, figures
        time.sleep(0.05)


def until_done(ledger: Ledger) -> None:
    until = time.monotonic() + 120
    while not (jobs := ledger.find(JobFilter())) or jobs[0].state is not JobState.DONE:
        assert time.monotonic() < until, jobs
        time.sleep(0.05)


def test_what_came_and_what_became_of_it_is_counted_by_peer(scraped: Scraped) -> None:
    figures = scraped.figures
    total = "dicom_node_instances_total"
    assert figures[key(total, peer="pacs", outcome="stored", status="0x0000")] == scraped.slices
    assert figures[key(total, peer="pacs", outcome="dropped", status="0x0000")] == 3
    assert figures[key(total, peer="ward", outcome="stored", status="0x0000")] == 0
    received = figures[key("dicom_node_received_bytes_total", peer="pacs")]
    assert 0.8 * scraped.sent_bytes < received < scraped.sent_bytes  # without each file's header


def test_a_job_that_is_done_is_one_line_of_the_log(scraped: Scraped) -> None:
    (line,) = scraped.done
    assert line["seconds_since_received"] > 0
    assert (line["destinations"], [line["job_id"]]) == (["archive"], scraped.job_ids)


def test_associations_are_counted_by_their_end_and_rejections_by_reason(scraped: Scraped) -> None:
    figures = scraped.figures
    assert figures[key("dicom_node_associations_opened_total", peer="pacs")] == 3
    assert figures[key("dicom_node_associations_closed_total", peer="pacs", how="released")] == 2
    assert figures[key("dicom_node_associations_closed_total", peer="pacs", how="aborted")] == 1
    assert figures[key("dicom_node_associations_rejected_total", reason="calling_ae_unknown")] == 1
    assert figures[key("dicom_node_associations_open")] == 0


def test_jobs_deliveries_and_stages_are_there_and_nothing_waits(scraped: Scraped) -> None:
    figures = scraped.figures
    assert figures[key("dicom_node_jobs", state="DONE")] == 1
    assert figures[key("dicom_node_jobs", state="FAILED")] == 0
    assert figures[key("dicom_node_deliveries", destination="archive", state="SENT")] == 2  # the PET and its MIP
    assert figures[key("dicom_node_stage_seconds_count", stage="synthesis")] == 1
    assert figures[key("dicom_node_oldest_queued_seconds")] == 0
    assert figures[key("dicom_node_oldest_delivery_seconds")] == 0


def test_the_state_of_the_node_is_there(scraped: Scraped) -> None:
    figures = scraped.figures
    assert figures[key("dicom_node_healthy")] == 1
    assert figures[key("dicom_node_ledger_ok")] == 1
    assert figures[key("dicom_node_receivers")] == figures[key("dicom_node_receivers_configured")] == 1
    assert figures[key("dicom_node_receiver_deaths_total")] == 0
    assert figures[key("dicom_node_free_bytes")] > figures[key("dicom_node_reserved_bytes")] == 1
    assert figures[key("dicom_node_spool_bytes", folder="outbox")] > 0
    assert figures[key("process_resident_memory_bytes")] > 0
    (build,) = [labels for name, labels in figures if name == "dicom_node_build_info"]
    assert dict(build)["bundle"] == "tiny"


def test_no_stranger_and_no_patient_is_in_the_page(scraped: Scraped) -> None:
    assert "MEIER" not in scraped.text
    assert "HANS" not in scraped.text


def test_the_document_names_every_figure_and_no_other(scraped: Scraped) -> None:
    shown = set(re.findall(r"^# TYPE (dicom_node_\w+)", scraped.text, flags=re.MULTILINE))
    shown -= {name for name in shown if name.endswith("_created")}
    told = set(re.findall(r"^\| `(dicom_node_\w+)`", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert told == shown


def test_refused_instances_are_counted_by_status_also_when_another_process_tells() -> None:
    registry = AssociationRegistry(limit=5, clock=lambda: 0.0)
    token = registry.open(calling_ae="PACS", address="127.0.0.1", peer="pacs")
    assert token is not None
    for refused in ({0xA700: 1}, {0xA700: 3, 0xC000: 1}):  # so far, each time
        registry.carried(token, stored=2, stored_bytes=10, dropped={"1.2.3": 4}, refused=refused)
    registry.close(token)
    found = {
        (sample.name, *sample.labels.values()): sample.value
        for metric in association_metrics(registry.totals(), 0, ["pacs"])
        for sample in metric.samples
    }
    assert found["dicom_node_instances_total", "pacs", "refused", "0xA700"] == 3
    assert found["dicom_node_instances_total", "pacs", "refused", "0xC000"] == 1
    assert found["dicom_node_instances_total", "pacs", "dropped", "0x0000"] == 4
    assert found["dicom_node_received_bytes_total", "pacs"] == 10


def test_a_ledger_that_does_not_answer_costs_its_own_figures_only(tmp_path: Path) -> None:
    ledger = open_ledger(f"sqlite:///{tmp_path / 'ledger.sqlite'}")
    metrics = Metrics()
    metrics.watch(
        Sources(
            config=Config(),
            registry=AssociationRegistry(limit=5, clock=lambda: 0.0),
            ledger=ledger,
            spool=Spool(tmp_path / "spool", min_free_bytes=0),
            receivers=lambda: (2, 0),
            healthy=lambda: True,
        )
    )
    ledger.close()
    for path in tmp_path.glob("ledger.sqlite*"):
        path.unlink()
    (tmp_path / "ledger.sqlite").write_bytes(b"this is no database file at all" * 100)
    with pytest.raises(LedgerError):
        ledger.figures()
    port = metrics.serve("127.0.0.1", 0)
    try:
        _, figures = scrape(port)
    finally:
        metrics.stop()
        ledger.close()
    assert figures[key("dicom_node_ledger_ok")] == 0
    assert key("dicom_node_jobs", state="DONE") not in figures
    assert figures[key("dicom_node_receivers")] == 2


def test_a_port_of_the_metrics_that_is_taken_is_named(tmp_path: Path) -> None:
    with FakePacs() as pacs:
        config = Config.model_validate(
            {
                "node": {"host": "127.0.0.1", "port": free_port(), "receiver_processes": 0},
                "storage": {"root": tmp_path / "spool"},
                "metrics": {"port": pacs.port},
            }
        )
        with pytest.raises(NodeError, match=rf"\[metrics\].port = {pacs.port}: cannot listen"):
            Node(config, drain_s=0).start()
