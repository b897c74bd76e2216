"""The composition root and its clockwork, without a killed process: see test_node_restart for those."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest
from fake_pacs import free_port

from dicom_node.config import Config, NodeConfig, PeerConfig, PipelineConfig, StorageConfig
from dicom_node.errors import NodeError
from dicom_node.net.scu import echo
from dicom_node.node import Node
from dicom_node.schedule import Schedule, Ticker
from storage.errors import LedgerError


def config_for(root: Path, port: int) -> Config:
    return Config(
        node=NodeConfig(host="127.0.0.1", port=port),
        storage=StorageConfig(root=root),
        peers=(PeerConfig(name="pacs", ae_title="PACS"),),
    )


def test_a_node_starts_answers_and_stops_and_can_start_again(tmp_path: Path) -> None:
    config = config_for(tmp_path / "spool", free_port())
    for _ in range(2):
        node = Node(config, drain_s=0)
        port = node.start()
        assert port == config.node.port
        assert node.healthy
        peer = PeerConfig(name="node", ae_title="SYNPET", port=port)
        assert echo(peer, calling_ae="PACS").ok
        node.stop()
        assert not node.healthy
        assert echo(peer, calling_ae="PACS").code == "connection_failed"
    running = {thread.name for thread in threading.enumerate()}
    assert not running & {"worker", "delivery-dispatch", "assembler"}


def test_a_port_that_is_taken_is_named_and_leaves_nothing_running(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(NodeError, match=rf"\[node\].port = {port}"):
            Node(config_for(tmp_path / "spool", port), drain_s=0).start()
    node = Node(config_for(tmp_path / "spool", port), drain_s=0)  # the lock was let go
    node.start()
    node.stop()


def test_a_storage_root_in_use_is_refused(tmp_path: Path) -> None:
    first = Node(config_for(tmp_path / "spool", free_port()), drain_s=0)
    first.start()
    try:
        with pytest.raises(NodeError, match="another node is running on it"):
            Node(config_for(tmp_path / "spool", free_port())).start()
    finally:
        first.stop()


def test_a_ledger_that_is_no_database_stops_the_start(tmp_path: Path) -> None:
    root = tmp_path / "spool"
    root.mkdir()
    (root / "ledger.sqlite").write_bytes(b"this is no database file at all" * 100)
    with pytest.raises(LedgerError):
        Node(config_for(root, free_port())).start()


@pytest.mark.parametrize("key", ["bundle", "shadow"])
def test_a_bundle_that_is_not_there_stops_the_start_in_words(tmp_path: Path, key: str) -> None:
    wrong = PipelineConfig.model_validate({key: "phantm"})
    config = config_for(tmp_path / "spool", free_port()).model_copy(update={"pipeline": wrong})
    with pytest.raises(NodeError, match=rf"\[pipeline\].{key} = 'phantm'.* is neither a known one .*phantom"):
        Node(config, drain_s=0).start()
    assert not config.storage.root.exists()


def test_the_clockwork_goes_on_after_an_error() -> None:
    calls: list[int] = []
    third = threading.Event()

    def fail() -> None:
        calls.append(1)
        if len(calls) >= 3:
            third.set()
        raise ValueError("broken")

    schedule = Schedule()
    schedule.every(0.02, "fail", fail)
    schedule.start()
    assert third.wait(30)
    schedule.stop()


def test_a_ticker_goes_on_after_an_error_and_stops() -> None:
    calls: list[int] = []
    third = threading.Event()

    def fail() -> None:
        calls.append(1)
        if len(calls) >= 3:
            third.set()
        raise ValueError("broken")

    ticker = Ticker("test", fail, 0.01)
    ticker.start()
    assert third.wait(30)
    assert ticker.alive
    ticker.stop()
    assert not ticker.alive
