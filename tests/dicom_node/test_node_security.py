"""What a node says of who can come in, before anybody can."""

from __future__ import annotations

from pathlib import Path

import pytest
import structlog
from intake_tools import config
from typer.testing import CliRunner

from dicom_node.cli import app
from dicom_node.errors import NodeError
from dicom_node.net.peers import lines_to_admit
from dicom_node.node import Node
from storage.ledger import open_ledger


def test_a_certificate_that_cannot_be_used_stops_the_start_with_its_key(tmp_path: Path) -> None:
    tls = {"cert_file": str(tmp_path / "no.pem"), "client_certificates": "none"}
    with pytest.raises(NodeError, match=r"\[tls\]\.cert_file and key_file: .*no\.pem cannot be used: No such file"):
        Node(config(tls=tls, storage={"root": str(tmp_path / "spool")})).start(port=0)
    assert not (tmp_path / "spool").exists()


@pytest.mark.parametrize(("unknown", "warnings"), [("accept", 1), ("reject", 0)])
def test_an_open_door_is_warned_of_at_every_start(tmp_path: Path, unknown: str, warnings: int) -> None:
    node = Node(config(node={"unknown_peers": unknown}, storage={"root": str(tmp_path)}))
    with structlog.testing.capture_logs() as logs:
        node._check_security()
    assert [line["event"] for line in logs].count("node.open_to_strangers") == warnings


def test_why_prints_the_lines_that_make_a_stranger_a_peer(tmp_path: Path) -> None:
    (tmp_path / "spool").mkdir()
    ledger = open_ledger(f"sqlite:///{tmp_path / 'spool' / 'ledger.sqlite'}")
    lines = lines_to_admit("CT_99", "10.1.2.3", ())
    ledger.note("", "association_rejected", "'CT_99': no peer", details={"config_lines": list(lines)})
    ledger.close()
    path = tmp_path / "config.toml"
    path.write_text("", encoding="utf-8")
    shown = CliRunner().invoke(app, ["why", "ACC1", "--config", str(path)]).output
    assert "\n".join(lines) in shown
