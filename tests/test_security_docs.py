"""What docs/security.md says can be done as it stands there."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

from dicom_node.config import Config, load_config
from dicom_node.net.peers import lines_to_admit
from dicom_node.net.security import client_context, first_end, server_context

TEXT = (Path(__file__).parent.parent / "docs" / "security.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)


def test_the_commands_make_certificates_that_the_configuration_beside_them_can_use(tmp_path: Path) -> None:
    (tmp_path / "tls").mkdir()
    commands = blocks("bash")[0]
    subprocess.run(["bash", "-euc", commands], cwd=tmp_path / "tls", check=True, capture_output=True)
    _, listener, peer = blocks("toml")
    path = tmp_path / "config.toml"
    path.write_text(listener + peer, encoding="utf-8")
    config = load_config(path)
    server_context(config.tls)
    client_context(config.peers[0])
    assert first_end(tmp_path / "tls" / "node-cert.pem") is not None


def test_the_lines_for_a_stranger_are_those_that_the_node_prints() -> None:
    stranger = blocks("toml")[0]
    assert stranger.splitlines() == list(lines_to_admit("CT_99", "10.1.2.3", ()))
    Config.model_validate(tomllib.loads(stranger))
