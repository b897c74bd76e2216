"""DICOM TLS with real certificates: who gets in, who does not, and that nobody keeps the others waiting."""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
import subprocess
import threading
import time
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import structlog
from fake_pacs import free_port
from intake_tools import WAIT_S, Intake, config, running_intake, small_ct
from pydicom import dcmread
from raw_sender import RawSender, associate_request
from tls_tools import LONG_AGO, Authority

from dicom_node.config import ConfigError, PeerConfig, TlsConfig, load_config
from dicom_node.net.associations import AssociationRegistry
from dicom_node.net.link import RequestOutcome
from dicom_node.net.receivers import ReceiverPool
from dicom_node.net.scu import echo, send_series
from dicom_node.net.security import (
    SecurityError,
    ServerContext,
    certificates,
    first_end,
    server_context,
    warn_of_ends,
)
from storage.ledger import open_ledger

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def other_ca(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("other"))


@contextlib.contextmanager
def node(folder: Path, ca: Authority, *, asks: str = "required", acse_s: float = 60, **tls: object) -> Iterator[Intake]:
    """A receiver with TLS; `asks` is client_certificates, within `acse_s` seconds a handshake must be over."""
    table = {"cert_file": str(ca.certificate("node")), "ca_file": str(ca.file), "client_certificates": asks, **tls}
    with running_intake(folder, config(tls=table, node={"acse_timeout_s": acse_s})) as intake:
        yield intake


def peer(intake: Intake, ca: Authority | None, cert: Path | None = None, **more: object) -> PeerConfig:
    """The node as a peer sees it on its TLS port."""
    table = {"ca_file": str(ca.file) if ca else "", "client_cert_file": str(cert or "")}
    return PeerConfig.model_validate(
        {"name": "node", "ae_title": "SYNPET", "port": intake.receiver.ports[1], "tls": True, **table, **more}
    )


def ask(intake: Intake, ca: Authority | None, cert: Path | None = None, **more: object) -> RequestOutcome:
    return echo(peer(intake, ca, cert, **more), calling_ae="PACS")


def told(intake: Intake) -> str:
    """The one refusal in the ledger, when it is there."""
    intake.wait(lambda: "association_rejected" in intake.event_codes())
    (event,) = intake.ledger.search_events()
    assert event.details["reason"] == "tls_failed"
    return event.text


def test_a_series_comes_in_over_tls_byte_for_byte(tmp_path: Path, ca: Authority) -> None:
    paths = small_ct(tmp_path / "ct")
    with node(tmp_path, ca) as intake:
        outcome = send_series(paths, peer(intake, ca, ca.certificate("pacs")), calling_ae="PACS")
        assert outcome.ok, outcome.text
        kept = {path.stem: path for path in intake.spool.incoming()}
        for path in paths:
            sent = dcmread(path)
            assert dcmread(kept[sent.SOPInstanceUID]) == sent
        assert echo(PeerConfig(name="node", ae_title="SYNPET", port=intake.port), calling_ae="PACS").ok


def test_a_peer_that_must_call_by_tls_is_rejected_on_the_plain_port(tmp_path: Path, ca: Authority) -> None:
    table = {"cert_file": str(ca.certificate("node")), "ca_file": str(ca.file)}
    peers = [{"name": "pacs", "ae_title": "PACS", "must_call_by_tls": True}]
    with running_intake(tmp_path, config(tls=table, peers=peers)) as intake:
        assert ask(intake, ca, ca.certificate("pacs")).ok
        refused = echo(PeerConfig(name="node", ae_title="SYNPET", port=intake.port), calling_ae="PACS")
        assert refused.code == "association_rejected"
        intake.wait(lambda: intake.registry.counts().get("rejected_tls_required") == 1)


def test_one_port_for_both_has_no_plain_dicom(tmp_path: Path, ca: Authority) -> None:
    with node(tmp_path, ca, port=11112) as intake:
        assert len(intake.receiver.ports) == 1
        alone = PeerConfig(name="node", ae_title="SYNPET", port=intake.port)
        assert not echo(alone, calling_ae="PACS").ok
        keys = {"tls": True, "ca_file": ca.file, "client_cert_file": ca.certificate("pacs")}
        assert echo(alone.model_copy(update=keys), calling_ae="PACS").ok


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_both_versions_of_tls_are_spoken(tmp_path: Path, ca: Authority, version: ssl.TLSVersion) -> None:
    with node(tmp_path, ca, asks="none") as intake:
        context = ssl.create_default_context(cafile=str(ca.file))
        context.minimum_version = context.maximum_version = version
        address = ("127.0.0.1", intake.receiver.ports[1])
        with (
            socket.create_connection(address) as raw,
            context.wrap_socket(raw, server_hostname="127.0.0.1") as spoken,
        ):
            name, _, _ = spoken.cipher() or ("", "", 0)
        assert "GCM" in name or "CHACHA" in name


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_no_session_is_resumed(tmp_path: Path, ca: Authority, version: ssl.TLSVersion) -> None:
    context = ssl.create_default_context(cafile=str(ca.file))
    context.minimum_version = context.maximum_version = version
    context.load_cert_chain(ca.certificate("pacs"))
    session: ssl.SSLSession | None = None
    reused = []
    with node(tmp_path, ca) as intake:
        own = intake.config.tls.cert_file
        assert own is not None
        for number in range(6):
            if number == 4:
                own.write_text("half a file")  # what was there goes on, for one connection each, too
            with (
                socket.create_connection(("127.0.0.1", intake.receiver.ports[1])) as raw,
                context.wrap_socket(raw, server_hostname="127.0.0.1", session=session) as spoken,
            ):
                reused.append(spoken.session_reused)
                session = spoken.session
    assert reused == [False] * 6


def test_a_client_without_a_certificate_is_refused_where_one_is_required(tmp_path: Path, ca: Authority) -> None:
    with node(tmp_path, ca) as intake:
        outcome = ask(intake, ca)
        assert not outcome.ok
        assert "client_cert_file" in outcome.text
        assert "it showed no certificate" in told(intake)


def test_a_client_without_a_certificate_is_served_where_it_is_optional(tmp_path: Path, ca: Authority) -> None:
    with node(tmp_path, ca, asks="optional") as intake:
        assert ask(intake, ca).ok


@pytest.mark.parametrize("asks", ["optional", "required"])
def test_a_certificate_of_another_ca_is_refused(tmp_path: Path, ca: Authority, other_ca: Authority, asks: str) -> None:
    with node(tmp_path, ca, asks=asks) as intake:
        assert not ask(intake, ca, other_ca.certificate("stranger")).ok
        assert "its certificate is not accepted: unable to get local issuer" in told(intake)


def test_an_expired_certificate_is_refused(tmp_path: Path, ca: Authority) -> None:
    with node(tmp_path, ca) as intake:
        assert not ask(intake, ca, ca.certificate("old", ends=LONG_AGO)).ok
        assert "certificate has expired" in told(intake)


def test_a_known_certificate_opens_no_door_to_an_unknown_ae_title(tmp_path: Path, ca: Authority) -> None:
    with node(tmp_path, ca) as intake:
        outcome = echo(peer(intake, ca, ca.certificate("pacs")), calling_ae="STRANGER")
        assert outcome.code == "association_rejected"


def test_we_do_not_send_to_a_peer_whose_ca_we_do_not_trust(tmp_path: Path, ca: Authority, other_ca: Authority) -> None:
    with node(tmp_path, ca, asks="none") as intake:
        for trusted in (other_ca, None):
            outcome = ask(intake, trusted)
            assert (outcome.code, outcome.permanent) == ("tls_failed", True)
            assert "certificate is not accepted" in outcome.text


def test_we_do_not_send_to_a_peer_with_another_name(tmp_path: Path, ca: Authority) -> None:
    table = {"cert_file": str(ca.certificate("elsewhere", host="pacs.example")), "client_certificates": "none"}
    with running_intake(tmp_path, config(tls=table)) as intake:
        outcome = ask(intake, ca)
        assert "IP address mismatch" in outcome.text
        assert ask(intake, ca, check_host_name=False).ok


def test_the_very_certificate_of_a_peer_may_be_trusted_instead_of_its_ca(tmp_path: Path, ca: Authority) -> None:
    with node(tmp_path, ca, asks="none") as intake:
        only = peer(intake, None, ca_file=str(intake.config.tls.cert_file))
        assert echo(only, calling_ae="PACS").ok


def test_a_tls_1_1_client_is_refused(tmp_path: Path, ca: Authority) -> None:
    with node(tmp_path, ca, asks="none") as intake:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(ca.file)
        context.set_ciphers("ALL:@SECLEVEL=0")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # that is what the test is about
            context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
        with socket.create_connection(("127.0.0.1", intake.receiver.ports[1])) as raw, pytest.raises(ssl.SSLError):
            context.wrap_socket(raw, server_hostname="127.0.0.1")
        assert "no version of TLS that is allowed" in told(intake)


def test_a_plain_client_on_the_tls_port_is_hung_up_on_and_told(tmp_path: Path, ca: Authority) -> None:
    with node(tmp_path, ca) as intake:
        outcome = echo(PeerConfig(name="node", ae_title="SYNPET", port=intake.receiver.ports[1]), calling_ae="PACS")
        assert outcome.code == "association_aborted"
        assert told(intake) == "'127.0.0.1': what it sent is no TLS; plain DICOM is on 11112"


def test_a_tls_client_on_the_plain_port_is_told_where_tls_is(tmp_path: Path, ca: Authority) -> None:
    with node(tmp_path, ca) as intake:
        assert not ask(intake, ca, ca.certificate("pacs"), port=intake.port).ok
        intake.wait(lambda: "malformed_pdu" in intake.event_codes())
        (event,) = intake.ledger.search_events()
        assert event.text == "'127.0.0.1': began TLS on the plain port; DICOM TLS is on 2762: aborted"
        assert intake.registry.totals().hung_up == {"malformed_pdu": 1}


def test_a_tls_client_is_told_where_there_is_no_tls(tmp_path: Path, ca: Authority) -> None:
    with running_intake(tmp_path) as intake:
        keys = {"tls": True, "ca_file": ca.file}
        alone = PeerConfig(name="node", ae_title="SYNPET", port=intake.port).model_copy(update=keys)
        assert not echo(alone, calling_ae="PACS").ok
        intake.wait(lambda: "malformed_pdu" in intake.event_codes())
        (event,) = intake.ledger.search_events()
        assert event.text == "'127.0.0.1': began TLS on the plain port; TLS is not configured: [tls]: aborted"


def test_half_a_handshake_keeps_nobody_waiting_and_ends(tmp_path: Path, ca: Authority) -> None:
    with node(tmp_path, ca, acse_s=4) as intake:  # a whole one takes milliseconds, and on a busy machine a second
        address = ("127.0.0.1", intake.receiver.ports[1])
        silent = [socket.create_connection(address) for _ in range(5)]
        for sock, word in zip(
            silent, (b"", b"\x16", b"\x16\x03\x01", b"\x16\x03\x01\x02\x00", b"\x16" * 3), strict=True
        ):
            sock.sendall(word)
        assert ask(intake, ca, ca.certificate("pacs")).ok
        for sock in silent:
            sock.settimeout(60)
            with contextlib.suppress(ConnectionResetError):
                while sock.recv(1000):  # an alert, perhaps, and then the end
                    pass
            sock.close()
        intake.wait(lambda: intake.registry.counts().get("rejected_tls_failed") == 5)


def test_a_receiver_that_stops_does_not_wait_for_a_handshake(tmp_path: Path, ca: Authority) -> None:
    table = {"cert_file": str(ca.certificate("node")), "client_certificates": "none"}
    with running_intake(tmp_path, config(tls=table, node={"acse_timeout_s": 600})) as intake:
        silent = socket.create_connection(("127.0.0.1", intake.receiver.ports[1]))
        server = intake.receiver._servers[1]
        intake.wait(lambda: bool(server._arriving))
        intake.receiver.stop()
        intake.wait(lambda: not server._arriving)
        silent.close()


def test_connections_in_a_handshake_count_for_the_limit_of_an_address(tmp_path: Path, ca: Authority) -> None:
    table = {"cert_file": str(ca.certificate("node")), "client_certificates": "none"}
    limits = {"max_connections_per_address": 2, "acse_timeout_s": 600}
    with running_intake(tmp_path, config(tls=table, node=limits)) as intake:
        address = ("127.0.0.1", intake.receiver.ports[1])
        silent = [socket.create_connection(address) for _ in range(2)]
        intake.wait(lambda: len(intake.receiver._servers[1]._arriving) == 2)
        assert not ask(intake, ca).ok
        intake.wait(lambda: intake.registry.counts().get("rejected_connection_limit") == 1)
        for sock in silent:
            sock.close()


@pytest.mark.parametrize(
    ("asks", "options"), [("none", ["+tla"]), ("required", ["+tls"]), ("required", ["+py", "+tls"])]
)
def test_dcmtk_sends_over_tls(tmp_path: Path, ca: Authority, asks: str, options: list[str]) -> None:
    paths = small_ct(tmp_path / "ct")
    certificate, key = ca.split("dcmtk")
    if options[-1] == "+tls":
        options = [*options, str(key), str(certificate)]
    with node(tmp_path, ca, asks=asks) as intake:
        to = ["127.0.0.1", str(intake.receiver.ports[1])]
        command = ["storescu", *options, "+cf", str(ca.file), "-aet", "PACS", "-aec", "SYNPET", *to, *map(str, paths)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        assert len(intake.spool.incoming()) == len(paths)


def test_the_commands_of_the_document_make_certificates_that_dcmtk_sends_with(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "security.md").read_text(encoding="utf-8").partition("### Certificates")[2]
    for_node, for_caller, send = re.findall(r"^```bash\n(.+?)^```", page, flags=re.DOTALL | re.MULTILINE)
    shell = ["bash", "-euc"]
    for commands in (for_node, for_caller):
        subprocess.run([*shell, commands], cwd=tmp_path, capture_output=True, timeout=60, check=True)
    small_ct(tmp_path / "ct")[0].rename(tmp_path / "image.dcm")
    names = {"cert_file": "node-cert.pem", "key_file": "node-key.pem", "ca_file": "ca-cert.pem"}
    tls = {"client_certificates": "required", **{key: str(tmp_path / name) for key, name in names.items()}}
    peers = [one.model_dump() for one in load_config(ROOT / "config.toml").peers]
    with running_intake(tmp_path / "node", config(tls=tls, peers=peers)) as intake:
        here = send.replace(" 2762 ", f" {intake.receiver.ports[1]} ")
        done = subprocess.run([*shell, here], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        assert len(intake.spool.incoming()) == 1


def test_dcmtk_receives_from_us_over_tls_and_refuses_us_without_a_certificate(tmp_path: Path, ca: Authority) -> None:
    paths = small_ct(tmp_path / "ct")
    certificate, key = ca.split("pacs")
    into = tmp_path / "into"
    into.mkdir()
    port = free_port()
    command = ["storescp", "+tls", str(key), str(certificate), "+cf", str(ca.file), "-od", str(into), str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as scp:
        try:
            keys = {"name": "pacs", "ae_title": "PACS", "port": port, "tls": True, "ca_file": str(ca.file)}
            ours = PeerConfig.model_validate({**keys, "client_cert_file": str(ca.certificate("node"))})
            for _ in range(1200):
                outcome = echo(ours, calling_ae="SYNPET")
                if outcome.code != "connection_failed":
                    break
                threading.Event().wait(0.05)
            assert send_series(paths, ours, calling_ae="SYNPET").ok
            assert len(list(into.iterdir())) == len(paths)
            assert not echo(PeerConfig.model_validate(keys), calling_ae="SYNPET").ok
        finally:
            scp.terminate()


def test_receiver_processes_speak_tls_too_and_count_together(tmp_path: Path, ca: Authority) -> None:
    table = {"cert_file": str(ca.certificate("node")), "client_certificates": "none"}
    peers = [{"name": "pacs", "ae_title": "PACS", "max_associations": 1}]
    cfg = config(tls=table, node={"receiver_processes": 2}, peers=peers, storage={"root": str(tmp_path / "spool")})
    ledger = open_ledger(f"sqlite:///{tmp_path / 'ledger.sqlite'}")
    registry = AssociationRegistry(limit=32, clock=time.monotonic)
    pool = ReceiverPool(cfg, ledger, registry)
    pool.start(port=0)
    try:
        plain, secured = pool.ports
        context = ssl.create_default_context(cafile=str(ca.file))
        verification = ["1.2.840.10008.1.1"]
        with RawSender(secured, verification, tls=context):
            for _ in range(4):  # whichever process accepts
                with socket.create_connection(("127.0.0.1", plain), timeout=60) as second:
                    second.sendall(associate_request(verification))
                    assert second.recv(10)[:1] == b"\x03"  # A-ASSOCIATE-RJ
        end = time.monotonic() + WAIT_S  # the peer has its answer before the parent hears of it through the pipe
        while registry.counts()["rejected_association_limit"] < 4 and time.monotonic() < end:
            time.sleep(0.01)
        assert registry.counts()["rejected_association_limit"] == 4
    finally:
        pool.stop()
        ledger.close()


# -- the files


def test_a_certificate_that_is_replaced_is_used_without_a_restart(
    tmp_path: Path, ca: Authority, other_ca: Authority
) -> None:
    with node(tmp_path, ca, asks="none") as intake:
        assert ask(intake, ca).ok
        used = intake.config.tls.cert_file
        assert used is not None
        used.write_bytes(other_ca.certificate("node").read_bytes())
        assert ask(intake, other_ca).ok
        used.write_text("half a file")
        with structlog.testing.capture_logs() as logs:
            assert ask(intake, other_ca).ok
            assert ask(intake, other_ca).ok
        assert [line["event"] for line in logs].count("tls.certificate_not_loaded") == 1


def test_a_key_with_a_pass_phrase_is_refused_and_asks_nobody(tmp_path: Path, ca: Authority) -> None:
    certificate, key = ca.split("locked")
    locked = tmp_path / "locked.pem"
    command = ["openssl", "pkey", "-in", str(key), "-aes256", "-passout", "pass:secret", "-out", str(locked)]
    subprocess.run(command, check=True, capture_output=True)
    with pytest.raises(SecurityError, match="has a pass phrase"):
        server_context(TlsConfig(cert_file=certificate, key_file=locked, client_certificates="none"))


@pytest.mark.parametrize(
    ("text", "why"), [("", "cannot be used"), ("no certificate", "cannot be used"), (None, "No such")]
)
def test_a_certificate_that_is_none_is_named(tmp_path: Path, text: str | None, why: str) -> None:
    path = tmp_path / "node.pem"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SecurityError, match=f"cert_file.*node.pem.*{why}"):
        server_context(TlsConfig(cert_file=path, client_certificates="none"))
    with pytest.raises(SecurityError):
        ServerContext(TlsConfig(cert_file=path, client_certificates="none")).fresh()


def test_the_end_of_a_certificate_is_read_and_told_in_time(tmp_path: Path, ca: Authority) -> None:
    now = datetime.now(UTC)
    soon = (now + timedelta(days=5)).replace(microsecond=0)
    files = {"soon": ca.certificate("soon", ends=soon), "old": ca.certificate("old", ends=LONG_AGO), "ca": ca.file}
    assert first_end(files["soon"]) == soon
    assert first_end(tmp_path / "none.pem") is None
    peers = [{"name": "a", "ae_title": "A", "tls": True, "client_cert_file": str(files["old"])}]
    cfg = config(tls={"cert_file": str(files["soon"]), "ca_file": str(files["ca"])}, peers=peers)
    assert [one.key for one in certificates(cfg)] == ["[tls].cert_file", "[tls].ca_file", "[peers.a].client_cert_file"]
    with structlog.testing.capture_logs() as logs:
        warn_of_ends(cfg, now)
    first, second = (line["reason"] for line in logs)
    assert "[tls].cert_file" in first
    assert "in 4 days" in first
    assert "[peers.a].client_cert_file" in second
    assert "ended on" in second


@pytest.mark.parametrize("der", [b"", b"\x30", b"\x30\x84\xff\xff\xff\xff", b"\x30\x03\x30\x01\x00", b"\x00" * 40])
def test_what_is_no_certificate_has_no_end(tmp_path: Path, der: bytes) -> None:
    path = tmp_path / "x.pem"
    path.write_text(ssl.DER_cert_to_PEM_cert(der))
    assert first_end(path) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[tls]\ncert_file = "a.pem"', "needs the ca_file that signed them"),
        ('[tls]\nkey_file = "a.pem"', "for a cert_file, without which there is no TLS"),
        ('[[peers]]\nname = "a"\nae_title = "A"\nca_file = "ca.pem"', "are for tls = true"),
        (
            '[[peers]]\nname = "a"\nae_title = "A"\ntls = true\nclient_key_file = "k.pem"',
            "is the key of a client_cert_file",
        ),
        ('[tls]\nmin_version = "1.1"', "[tls].min_version = '1.1'"),
        ("[node]\nrequire_known_peer = false", 'write unknown_peers = "accept"'),
        ("[node]\nrequire_known_peer = true", 'write unknown_peers = "reject"'),
    ],
)
def test_keys_that_do_not_fit_together_are_refused(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "config.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert expected in str(caught.value)


def test_files_are_taken_from_the_configurations_folder(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(
        '[tls]\ncert_file = "tls/node.pem"\nclient_certificates = "none"\n'
        '[[peers]]\nname = "a"\nae_title = "A"\ntls = true\nca_file = "tls/ca.pem"'
    )
    loaded = load_config(path)
    assert loaded.tls.cert_file == tmp_path / "tls/node.pem"
    assert loaded.peers[0].ca_file == tmp_path / "tls/ca.pem"
