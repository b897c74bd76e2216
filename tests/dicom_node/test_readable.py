"""Associations whose descriptors lie beyond the 1,024 that `select` knows."""

from __future__ import annotations

import os
import resource
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from intake_tools import config, running_intake, small_ct
from pydicom.uid import CTImageStorage
from raw_sender import RawSender, echo_message, status_of, store_message
from tls_tools import Authority
from wire_tools import CONTEXTS, CT, ECHO, READERS

from dicom_node.config import PeerConfig
from dicom_node.net import readable
from dicom_node.net.scu import send_series

DATA = b"\x08\x00\x60\x00CS\x02\x00CT"
MANY = 1100


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    """What is opened in the test has a number beyond `MANY`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2 * MANY:
        pytest.skip(f"this user may have {hard} descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2 * MANY), hard))
    opened = [os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC) for _ in range(MANY)]
    try:
        yield
    finally:
        for descriptor in opened:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("reader", READERS)
def test_associations_beyond_1024_descriptors_are_answered(tmp_path: Path, reader: str, many_descriptors: None) -> None:
    with running_intake(tmp_path, config(intake={"reader": reader})) as intake:
        with RawSender(intake.port, CONTEXTS) as sender:
            assert sender.socket.fileno() > 1024
            for number in (1, 2):
                sender.write(store_message(CT, number, CTImageStorage, f"1.2.{number}", DATA).in_pdus())
                assert status_of(sender.pdu()) == 0
            sender.write(echo_message(ECHO, 3).in_pdus())
            assert status_of(sender.pdu()) == 0
            sender.release()
        intake.wait(lambda: not intake.registry.open_tokens())


@pytest.mark.parametrize("reader", READERS)
def test_so_are_those_in_tls(tmp_path: Path, reader: str, many_descriptors: None) -> None:
    authority = Authority(tmp_path / "ca")
    certificate, key = authority.split("node")
    tls = {"port": 11112, "cert_file": str(certificate), "key_file": str(key), "client_certificates": "none"}
    client = ssl.create_default_context(cafile=str(authority.file))
    with (
        running_intake(tmp_path, config(tls=tls, intake={"reader": reader})) as intake,
        RawSender(intake.port, CONTEXTS, tls=client) as sender,
    ):
        sender.write(store_message(CT, 1, CTImageStorage, "1.2.3", DATA * 10_000).in_pdus(16384))
        assert status_of(sender.pdu()) == 0
        sender.release()


def test_what_we_send_goes_out_beyond_1024_descriptors(tmp_path: Path, many_descriptors: None) -> None:
    with running_intake(tmp_path) as intake:
        peer = PeerConfig(name="node", ae_title="SYNPET", port=intake.port)
        outcome = send_series(small_ct(tmp_path / "ct", 4), peer, calling_ae="PACS")
        assert outcome.ok, outcome.text


def test_a_socket_is_readable_when_something_came_or_the_end() -> None:
    one, other = socket.socketpair()
    with one, other:
        assert not readable.within(one, 0)
        other.send(b"x")
        assert readable.within(one, 0)
        one.recv(1)
        assert not readable.within(one, 0.001)
        other.close()
        assert readable.within(one, 0)


def test_a_closed_socket_is_an_error() -> None:
    one, other = socket.socketpair()
    one.close()
    other.close()
    with pytest.raises((OSError, ValueError)):
        readable.within(one, 0)


def test_a_node_without_a_descriptor_left_says_so_once_and_takes_the_connection_when_there_is_one(
    tmp_path: Path,
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with structlog.testing.capture_logs() as logs, running_intake(tmp_path) as intake:
        with socket.socket() as caller, socket.socket() as spare:
            lowest_free = os.dup(spare.fileno())
            os.close(lowest_free)
            resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
            try:
                caller.connect(("127.0.0.1", intake.port))
                (server,) = intake.receiver._servers
                before = server._polls
                intake.wait(lambda: server._polls > before + 3)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            intake.wait(lambda: len(server.active_associations) == 1)
        with RawSender(intake.port, CONTEXTS) as sender:
            sender.release()
    told = [line["reason"] for line in logs if line["event"] == "association.rejected"]
    assert told == ["no file descriptor is left: new connections wait until one is (ulimit -n, LimitNOFILE)"]
