"""kill -9 at every stage: after a restart the PACS has the series, once, under one set of UIDs, and never twice."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from fake_pacs import FakePacs
from node_process import NodeProcess, write_ct
from tiny_bundle import write_tiny_bundle

from storage.records import DeliveryState, JobState


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


def check_delivered_once(pacs: FakePacs, node: NodeProcess, instances: int) -> None:
    """One job, DONE; one PET series of the right size and one picture; one content under every UID."""
    job = node.until_state(JobState.DONE, JobState.FAILED, JobState.REJECTED)
    assert (job.state, job.reason) == (JobState.DONE, "")
    assert len(node.jobs()) == 1
    assert all(len(digests) == 1 for digests in pacs.received.digests.values())
    sizes = sorted(len(uids) for uids in pacs.received.series.values())
    assert len(sizes) == 2
    assert sizes[0] == 1
    ledger = node.ledger()
    deliveries = ledger.deliveries(job.id)
    ledger.close()
    assert {d.state for d in deliveries} == {DeliveryState.SENT}
    assert {d.series_uid for d in deliveries} == set(pacs.received.series)
    assert sum(d.instances for d in deliveries) == len(pacs.instances)
    assert job.instances == instances


def test_killed_while_receiving_it_keeps_what_it_acknowledged(tmp_path: Path, bundle: Path) -> None:
    files = write_ct(tmp_path / "ct")
    with FakePacs() as pacs, NodeProcess(tmp_path, pacs, bundle) as node:
        node.start()
        assert node.send(files[:10]).ok
        node.kill()
        node.start()
        assert node.send(files[10:]).ok
        check_delivered_once(pacs, node, len(files))


def test_killed_while_queued_running_and_delivering_it_ends_the_job_once(tmp_path: Path, bundle: Path) -> None:
    files = write_ct(tmp_path / "ct")
    with FakePacs(delay_s=0.5) as pacs, NodeProcess(tmp_path, pacs, bundle) as node:
        node.start()
        assert node.send(files).ok
        node.until_state(JobState.QUEUED, JobState.RUNNING)
        node.kill()
        node.start()
        node.until_state(JobState.RUNNING)
        node.until(lambda: node.jobs()[0].stage != "")
        node.kill()
        node.start()
        node.until(lambda: bool(pacs.instances))
        node.kill()
        pacs.delay_s = 0.0
        assert node.jobs()[0].state is JobState.DELIVERING
        node.start()
        check_delivered_once(pacs, node, len(files))


def test_an_engine_that_is_killed_in_the_middle_is_replaced_and_the_node_goes_on(tmp_path: Path, bundle: Path) -> None:
    files = write_ct(tmp_path / "ct")
    with FakePacs() as pacs, NodeProcess(tmp_path, pacs, bundle) as node:
        node.start()
        assert node.send(files).ok
        node.until_state(JobState.RUNNING)
        engine = children(node.pid)
        for signal_number in (signal.SIGSTOP, signal.SIGKILL):  # held first: on a busy machine the job may end before
            for child in engine:
                os.kill(child, signal_number)
        check_delivered_once(pacs, node, len(files))
        ledger = node.ledger()
        codes = [event.code for event in ledger.events(node.jobs()[0].id)]
        ledger.close()
        assert codes.count("engine_crashed") == 1


def test_the_first_signal_drains_and_the_job_goes_on_after_the_next_start(tmp_path: Path, bundle: Path) -> None:
    files = write_ct(tmp_path / "ct")
    with FakePacs() as pacs, NodeProcess(tmp_path, pacs, bundle) as node:
        node.start()
        assert node.send(files).ok
        node.until_state(JobState.RUNNING)
        node.signal(signal.SIGTERM)
        assert node.wait() == 0
        assert node.jobs()[0].state is not JobState.RUNNING
        node.start()
        check_delivered_once(pacs, node, len(files))


def test_the_second_signal_ends_it_at_once(tmp_path: Path, bundle: Path) -> None:
    files = write_ct(tmp_path / "ct")
    with FakePacs() as pacs, NodeProcess(tmp_path, pacs, bundle) as node:
        node.start()
        assert node.send(files).ok
        node.until_state(JobState.RUNNING)
        engines = children(node.pid)
        for child in engines:
            os.kill(child, signal.SIGSTOP)  # a job that will never end
        node.signal(signal.SIGTERM)
        node.until(lambda: "node.signal" in node.log.read_text())
        node.signal(signal.SIGINT)
        assert node.wait() == 128 + signal.SIGINT
        node.until_gone(engines)
        node.start()
        check_delivered_once(pacs, node, len(files))


def test_two_nodes_never_share_a_storage_root(tmp_path: Path, bundle: Path) -> None:
    with FakePacs() as pacs, NodeProcess(tmp_path, pacs, bundle) as node:
        node.start()
        second = NodeProcess(tmp_path, pacs, bundle)
        with pytest.raises(AssertionError, match="ended with 1"):
            second.start()
        assert "another node is running on it" in node.log.read_text()


def children(pid: int) -> list[int]:
    """The engine's process: the child of the node that is no resource tracker."""
    found = Path(f"/proc/{pid}/task/{pid}/children")
    every = [int(child) for child in found.read_text().split()] if found.exists() else []
    return [child for child in every if b"resource_tracker" not in Path(f"/proc/{child}/cmdline").read_bytes()]
