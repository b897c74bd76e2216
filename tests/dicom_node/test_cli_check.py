"""`dicom-node check` finds what is wrong before the PACS does."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from fake_archive import FakeArchive
from fake_pacs import free_port
from fake_web import FakeWeb
from pydicom.uid import (
    ExplicitVRLittleEndian,
    JPEGLSLossless,
    PositronEmissionTomographyImageStorage,
    RLELossless,
)
from small_node import SmallEngine
from tls_tools import Authority
from typer.testing import CliRunner

from dicom_node.cli import app
from dicom_node.cli.check import check_callers
from dicom_node.config import load_config
from dicom_node.node import Node, lock_root
from dicom_node.started_with import digest

RUNNER = CliRunner()


def write_config(folder: Path, text: str = "") -> Path:
    path = folder / "config.toml"
    base = (
        f'[node]\nhost = "127.0.0.1"\nport = {free_port()}\n[intake]\nmin_free_bytes = 1\n[pipeline]\ndevice = "cpu"\n'
    )
    path.write_text(base + text, encoding="utf-8")
    return path


def findings(path: Path, *words: str) -> tuple[int, dict[str, tuple[str, str]]]:
    result = RUNNER.invoke(app, ["check", "--json", "--config", str(path), *words])
    return result.exit_code, {one["check"]: (one["verdict"], one["text"]) for one in json.loads(result.output)}


def peer(port: int) -> str:
    return (
        f'[[peers]]\nname = "pacs"\nae_title = "PACS"\nport = {port}\n[[destinations]]\nname = "pacs"\npeer = "pacs"\n'
    )


def test_a_sound_set_up_passes(tmp_path: Path) -> None:
    with FakeArchive() as one:
        code, found = findings(write_config(tmp_path, peer(one.port)))
    assert code == 0
    assert {name: verdict for name, (verdict, _) in found.items()} == dict.fromkeys(
        (
            "config",
            "disk",
            "ledger",
            "backups",
            "bundle",
            "device",
            "callers",
            "port",
            "peer pacs",
            "proof pacs",
        ),
        "ok",
    )
    assert "phantom" in found["bundle"][1]


def test_the_table_is_for_people(tmp_path: Path) -> None:
    result = RUNNER.invoke(app, ["check", "--config", str(write_config(tmp_path))], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert "GB free" in result.output


def test_an_open_door_and_an_open_spool_are_warned_of(tmp_path: Path) -> None:
    (tmp_path / "spool").mkdir(mode=0o755)
    path = write_config(tmp_path)
    path.write_text(path.read_text().replace("[node]\n", '[node]\nunknown_peers = "accept"\n'), encoding="utf-8")
    code, found = findings(path)
    assert code == 0
    assert found["callers"][0] == found["disk"][0] == "warn"
    assert "chmod 700" in found["disk"][1]


@pytest.mark.parametrize(
    ("keys", "verdict", "text"),
    [
        ('host = "10.1.2.3"', "ok", "from its host alone: ct (10.1.2.3)"),
        ('host = "10.1.2.3"\nallowed_addresses = ["10.1.0.0/16"]', "ok", "only [[peers]] may call"),
        ('host = "10.1.2.3"\nallowed_addresses = ["any"]', "ok", "from any address: ct"),
        ('host = "ct.invalid"', "warn", "from any address, as host is a name: ct: fill in allowed_addresses"),
        ('host = "ct.invalid"\nmay = []', "ok", "only [[peers]] may call"),
    ],
)
def test_who_may_call_from_where_is_told(tmp_path: Path, keys: str, verdict: str, text: str) -> None:
    path = write_config(tmp_path, f'[[peers]]\nname = "ct"\nae_title = "CT"\n{keys}\n')
    found = check_callers(load_config(path))
    assert (found.verdict, found.text.removeprefix("only [[peers]] may call; ")) == (verdict, text)


@pytest.mark.parametrize(
    ("days", "verdict", "text"), [(400, "ok", "is good until"), (5, "warn", "in 4 days"), (-2, "FAIL", "ended on")]
)
def test_the_end_of_a_certificate_is_told_before_it_comes(tmp_path: Path, days: int, verdict: str, text: str) -> None:
    made = Authority(tmp_path / "ca").certificate("node", ends=datetime.now(UTC) + timedelta(days=days))
    tls = f'[tls]\ncert_file = "{made}"\nclient_certificates = "none"\n'
    code, found = findings(write_config(tmp_path, tls))
    assert (code, found["tls"][0]) == (verdict == "FAIL", verdict)
    assert text in found["tls"][1]


def test_a_certificate_that_cannot_be_used_fails(tmp_path: Path) -> None:
    code, found = findings(write_config(tmp_path, '[tls]\ncert_file = "no.pem"\nclient_certificates = "none"\n'))
    assert (code, found["tls"][0]) == (1, "FAIL")
    assert "[tls].cert_file" in found["tls"][1]


def test_a_full_disk_fails(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    path.write_text(path.read_text().replace("min_free_bytes = 1\n", f"min_free_bytes = {10**18}\n"), encoding="utf-8")
    code, found = findings(path)
    assert code == 1
    assert found["disk"][0] == "FAIL"


def test_a_missing_bundle_fails(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    path.write_text(path.read_text().replace('device = "cpu"', 'device = "cpu"\nbundle = "nowhere"'), encoding="utf-8")
    code, found = findings(path)
    assert code == 1
    assert "nowhere" in found["bundle"][1]


def test_a_wrong_configuration_fails_alone(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text("[node]\nprot = 1\n", encoding="utf-8")
    code, found = findings(path)
    assert code == 2  # as of `serve`
    assert set(found) == {"config"}


def test_every_fault_of_a_configuration_is_a_line(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text("[node]\nprot = 1\nport = 0\n", encoding="utf-8")
    result = RUNNER.invoke(app, ["check", "--config", str(path)], env={"COLUMNS": "400"})
    assert result.exit_code == 2
    assert sum("FAIL" in line for line in result.output.splitlines()) == 2
    assert "\N{REPLACEMENT CHARACTER}" not in result.output


def test_a_node_that_can_do_nothing_is_warned_of(tmp_path: Path) -> None:
    code, found = findings(write_config(tmp_path))
    assert code == 0
    assert (found["way in"][0], found["way out"][0]) == ("warn", "warn")


def test_a_taken_port_fails_when_no_dicom_node_answers(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    port = int(path.read_text().split("port = ")[1].split()[0])
    with socket.socket() as squatter:
        squatter.bind(("127.0.0.1", port))
        code, found = findings(path)
    assert code == 1
    assert found["port"][0] == "FAIL"


def test_a_destination_that_is_down_fails_and_another_peer_only_where_it_is_asked(tmp_path: Path) -> None:
    port = free_port()
    others = "".join(
        f'[[peers]]\nname = "{name}"\nae_title = "OTHER"\nport = {port}\n{keys}\n'
        for name, keys in (
            ("sends", ""),
            ("commits", 'may = ["store", "commit"]'),
            ("asked", 'we_may = ["find"]'),
        )
    )
    code, found = findings(write_config(tmp_path, peer(free_port()) + others))
    assert code == 1
    verdicts = {name: found[f"peer {name}"][0] for name in ("pacs", "sends", "commits", "asked")}
    assert verdicts == {"pacs": "FAIL", "sends": "ok", "commits": "warn", "asked": "warn"}
    at = f"OTHER at 127.0.0.1:{port} cannot be reached"
    assert found["peer asked"][1] == at
    assert found["peer sends"][1] == f"{at}; it only sends to us, so it need not answer"


@pytest.mark.parametrize(
    ("archive", "verdict", "text"),
    [
        ({}, "ok", "offers Storage Commitment and C-FIND; its reports must reach SYNPET"),
        ({"commits": False}, "warn", "offers no Storage Commitment:"),
        ({"commits": False, "finds": False}, "warn", "offers no Storage Commitment and C-FIND:"),
        ({"known_callers": ["SOMEBODY"]}, "warn", "our AE title is not recognized"),
    ],
)
def test_what_an_archive_can_prove_is_told_before_anything_is_sent(
    tmp_path: Path, archive: dict[str, Any], verdict: str, text: str
) -> None:
    with FakeArchive(**archive) as one:
        _, found = findings(write_config(tmp_path, peer(one.port) + "commitment = true\n"))
    assert found["proof pacs"][0] == verdict
    assert text in found["proof pacs"][1]


@pytest.mark.parametrize(
    ("keys", "syntaxes", "verdict", "text"),
    [
        ("", [JPEGLSLossless], "ok", "accepts JPEG-LS Lossless Image Compression for Secondary Capture"),
        ('encoding = "pet"', [JPEGLSLossless], "ok", "for PET and Secondary Capture"),
        ('encoding = "pet"\nsend_mip = false', [JPEGLSLossless], "ok", "Compression for PET"),
        (
            "",
            [RLELossless],
            "warn",
            "does not accept JPEG-LS Lossless Image Compression for Secondary Capture: sent ",
        ),
        ('encoding = "pet"', [], "warn", "for PET and Secondary Capture: sent uncompressed"),
    ],
)
def test_whether_an_archive_takes_the_configured_compression_is_told(
    tmp_path: Path, keys: str, syntaxes: list[str], verdict: str, text: str
) -> None:
    with FakeArchive(syntaxes=[ExplicitVRLittleEndian, *syntaxes]) as one:
        path = write_config(tmp_path, f'{peer(one.port)}transfer_syntax = "jpeg-ls"\n{keys}\n')
        code, found = findings(path)
    assert code == 0
    assert found["compression pacs"][0] == verdict
    assert text in found["compression pacs"][1]


def test_a_class_that_is_not_taken_compressed_is_named(tmp_path: Path) -> None:
    with FakeArchive(classes=[PositronEmissionTomographyImageStorage], syntaxes=[RLELossless]) as one:
        path = write_config(tmp_path, f'{peer(one.port)}transfer_syntax = "rle"\nencoding = "pet"\n')
        _, found = findings(path)
    assert found["compression pacs"] == (
        "warn",
        "does not accept RLE Lossless for Secondary Capture: sent uncompressed",
    )


def test_an_archive_that_is_down_leaves_its_compression_unknown(tmp_path: Path) -> None:
    _, found = findings(write_config(tmp_path, f'{peer(free_port())}transfer_syntax = "rle"\n'))
    assert found["compression pacs"][0] == "warn"
    assert "cannot be reached" in found["compression pacs"][1]


def test_an_answering_peer_passes(tmp_path: Path) -> None:
    with FakeArchive() as one:
        code, found = findings(write_config(tmp_path, peer(one.port)))
    assert found["peer pacs"][0] == "ok"
    assert code == 0


# ---- whose port it is


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Path]:
    """The configuration of a node that runs."""
    path = write_config(tmp_path)
    node = Node(load_config(path), engine=SmallEngine(), drain_s=0)
    node.start()
    yield path
    node.stop()


@pytest.mark.parametrize("words", [[], ["--quick"]])
def test_the_running_node_answers(running: Path, words: list[str]) -> None:
    code, found = findings(running, *words)
    assert (code, found["node"]) == (0, ("ok", f"SYNPET answers on port {load_config(running).node.port}"))


@pytest.mark.parametrize("known_callers", [[], ["SOMEBODY"]], ids=["lets us in", "rejects us"])
@pytest.mark.parametrize(("words", "check"), [([], "port"), (["--quick"], "node")])
def test_another_application_on_the_port_is_not_the_node(
    tmp_path: Path, known_callers: list[str], words: list[str], check: str
) -> None:
    with FakeArchive(known_callers=known_callers) as other:
        code, found = findings(on_port(write_config(tmp_path), other.port), *words)
    assert (code, found[check][0]) == (1, "FAIL")
    assert "another DICOM application answers there" in found[check][1]


def test_another_application_on_the_port_is_not_the_node_that_runs_on_another_port(running: Path) -> None:
    with FakeArchive() as other:
        code, found = findings(on_port(running, other.port))
    assert (code, found["port"][0]) == (1, "FAIL")
    assert "another DICOM application answers there" in found["port"][1]


def test_a_node_of_another_spool_is_not_the_node(running: Path, tmp_path: Path) -> None:
    own = tmp_path / "other.toml"
    own.write_text(running.read_text() + f'[storage]\nroot = "{tmp_path / "other"}"\n', encoding="utf-8")
    code, found = findings(own)
    assert (code, found["port"][0]) == (1, "FAIL")
    assert "another node answers there: none runs on [storage].root = " in found["port"][1]


def test_a_node_that_runs_and_does_not_listen_is_no_free_port(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    config = load_config(path)
    config.storage.root.mkdir(mode=0o700)
    unlock = lock_root(config.storage.root, digest(config))
    code, found = findings(path)
    unlock()
    assert (code, found["port"][0]) == (1, "FAIL")
    assert "nothing listens on" in found["port"][1]
    assert findings(path)[1]["port"][0] == "ok"


def test_who_looks_whether_a_node_runs_keeps_none_from_starting(tmp_path: Path) -> None:
    lock = tmp_path / "node.lock"
    lock.touch()
    descriptor = os.open(lock, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_SH)  # as for the moment of a look
    threading.Timer(0.1, os.close, (descriptor,)).start()
    lock_root(tmp_path)()


def three_ports(folder: Path, more: str = "") -> Path:
    """A configuration with a TLS port and a metrics port."""
    ca = Authority(folder / "ca")
    tls = f'[tls]\nport = {free_port()}\ncert_file = "{ca.certificate("node")}"\nca_file = "{ca.file}"\n'
    return write_config(folder, f"{tls}[metrics]\nport = {free_port()}\n{more}")


def test_the_ports_of_tls_and_metrics_are_looked_at_before_the_node_starts(tmp_path: Path) -> None:
    path = three_ports(tmp_path)
    config = load_config(path)
    code, found = findings(path)
    assert (code, found["tls port"][0], found["metrics port"][0]) == (0, "ok", "ok")
    with socket.create_server(("127.0.0.1", config.tls.port)), socket.create_server(("127.0.0.1", config.metrics.port)):
        code, found = findings(path)
    assert (code, found["tls port"][0], found["metrics port"][0]) == (1, "FAIL", "FAIL")


def test_every_port_of_the_running_node_is_asked(tmp_path: Path) -> None:
    path = three_ports(tmp_path)
    node = Node(load_config(path), engine=SmallEngine(), drain_s=0)
    node.start()
    try:
        code, found = findings(path)
        path.write_text(path.read_text().replace(f"port = {node.config.metrics.port}", f"port = {free_port()}"))
        path.write_text(path.read_text().replace(f"port = {node.config.tls.port}", f"port = {free_port()}"))
        edited_code, edited = findings(path)
    finally:
        node.stop()
    assert (code, "restart" in found) == (0, False)
    assert {found[name][0] for name in ("node", "tls port", "metrics port")} == {"ok"}
    assert edited_code == 0  # the new ports count from the next start
    assert (edited["tls port"][0], edited["metrics port"][0]) == ("ok", "ok")
    assert "is free" in edited["tls port"][1]
    assert edited["restart"][0] == "warn"
    assert "started with another configuration" in edited["restart"][1]


def test_another_service_on_the_metrics_port_is_not_the_node(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    node = Node(load_config(path), engine=SmallEngine(), drain_s=0)
    node.start()
    try:
        with FakeWeb() as web:
            path.write_text(f"{path.read_text()}[metrics]\nport = {web.port}\n", encoding="utf-8")
            _, found = findings(path)
    finally:
        node.stop()
    assert found["metrics port"][0] == "FAIL"
    assert "another service answers there" in found["metrics port"][1]


@pytest.mark.parametrize("beside", ["", "/deeper"], ids=["it is a file", "it is in a file"])
def test_a_backup_folder_that_takes_no_file_fails(tmp_path: Path, beside: str) -> None:
    (tmp_path / "taken").write_text("a file")
    code, found = findings(write_config(tmp_path, f'[storage]\nbackup_folder = "taken{beside}"\n'))
    assert (code, found["backups"][0]) == (1, "FAIL")
    assert "taken" in found["backups"][1]


def test_a_backup_folder_that_can_be_made_passes_and_is_left_to_the_node(tmp_path: Path) -> None:
    code, found = findings(write_config(tmp_path, '[storage]\nbackup_folder = "safe/place"\n'))
    assert (code, found["backups"][0], (tmp_path / "safe").exists()) == (0, "ok", False)


def on_port(path: Path, port: int) -> Path:
    text = path.read_text()
    own = text.split("port = ")[1].split()[0]
    path.write_text(text.replace(f"port = {own}", f"port = {port}", 1), encoding="utf-8")
    return path
