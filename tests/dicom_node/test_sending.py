"""The streaming sender beside pynetdicom's, byte for byte, and in front of peers that answer badly or not at all."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ct_factory import write_ct
from delivery_desk import Desk, config_for
from fake_pacs import FakePacs
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import dcmread
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
)
from pynetdicom.dimse import DIMSEServiceProvider
from raw_scp import ABORT, RELEASE_RQ, RawPeer, RawScp, pdu, response
from result_factory import sop_uids, write_instances

from dicom_node.net.part10 import read_part10
from dicom_node.net.scu import SendOutcome, Timeouts, send_series
from dicom_node.net.sending import StreamSender, Way

PATIENT = Timeouts(acse_s=60.0, dimse_s=60.0, network_s=60.0)
IMPATIENT = Timeouts(acse_s=60.0, dimse_s=0.4, network_s=60.0)
COUNT = 3


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    return write_instances(tmp_path / "out", COUNT)


def send(files: list[Path], scp: RawScp, *, timeouts: Timeouts = PATIENT, sender: Way = "stream") -> SendOutcome:
    return send_series(files, scp.peer(), calling_ae="SYNPET", timeouts=timeouts, sender=sender)


def data_set_of(path: Path) -> bytes:
    return path.read_bytes()[read_part10(path).data_set_at :]


@pytest.mark.parametrize("max_pdu", [0, 131072, 65535, 16384, 4096, 128])
def test_the_peer_gets_the_file_and_the_command_set_that_pynetdicom_sends(tmp_path: Path, max_pdu: int) -> None:
    files = write_ct(tmp_path / "ct", np.arange(2 * 150 * 150, dtype=np.int16).reshape(2, 150, 150) % 2000)
    got = {}
    for sender in ("stream", "plain"):
        with RawScp(max_pdu=max_pdu) as scp:
            assert send(files, scp, sender=sender).ok
        got[sender] = scp
    ours, theirs = got["stream"].messages, got["plain"].messages
    assert [message.data_set for message in ours] == [data_set_of(path) for path in files]
    assert [(m.context_id, m.command, m.data_set) for m in ours] == [
        (m.context_id, m.command, m.data_set) for m in theirs
    ]
    longest = max(length for message in ours for length in message.pdu_lengths)
    most = max_pdu or 1 << 20
    assert min(most, len(ours[0].data_set)) - 8 <= longest <= most  # as much in each as the peer takes


@settings(max_examples=60, deadline=None)
@given(data_set=st.binary(max_size=6000), max_pdu=st.integers(min_value=1, max_value=400))
def test_fragments_of_any_size_join_to_the_data_set(tmp_path_factory: Any, data_set: bytes, max_pdu: int) -> None:
    path = tmp_path_factory.mktemp("part") / "1.dcm"
    path.write_bytes(data_set)
    assoc: Any = SimpleNamespace(dul=None, acceptor=SimpleNamespace(maximum_length=max_pdu, ae_title="PACS"))
    sender = StreamSender(assoc, 60.0)
    near, far = socket.socketpair()
    with near, far, path.open("rb") as file:
        sender._socket = near
        reader = RawPeer(far)
        got: list[Any] = []
        thread = threading.Thread(target=lambda: got.append(reader.message()))
        thread.start()
        sender._send(5, b"c" * 150, file.fileno(), 0)
        thread.join(60)
    (message,) = got
    assert (message.context_id, message.command, message.data_set) == (5, b"c" * 150, data_set)
    assert max(message.pdu_lengths) <= max(max_pdu, 8)


@pytest.mark.parametrize(
    ("written", "accepted"),
    [
        (ExplicitVRLittleEndian, ImplicitVRLittleEndian),
        (DeflatedExplicitVRLittleEndian, ImplicitVRLittleEndian),
    ],
)
def test_a_data_set_is_converted_as_pynetdicom_does(tmp_path: Path, written: str, accepted: str) -> None:
    files = write_ct(tmp_path / "ct", np.zeros((2, 8, 8), dtype=np.int16), transfer_syntax=written)
    got = {}
    for sender in ("stream", "plain"):
        with RawScp(syntaxes=[accepted]) as scp:
            assert send(files, scp, sender=sender).ok
        got[sender] = [(m.context_id, m.command, m.data_set) for m in scp.messages]
    assert got["stream"] == got["plain"]
    assert len(got["stream"]) == 2


@pytest.mark.parametrize("sender", ["stream", "plain"])
@pytest.mark.parametrize("written", [RLELossless, ExplicitVRBigEndian])
def test_what_cannot_be_converted_is_not_sent(tmp_path: Path, written: str, sender: Way) -> None:
    files = write_ct(tmp_path / "ct", np.zeros((2, 8, 8), dtype=np.int16), transfer_syntax=written)
    with RawScp(syntaxes=[ImplicitVRLittleEndian]) as scp:
        outcome = send(files, scp, sender=sender)
    assert (outcome.code, outcome.permanent, scp.messages) == ("no_presentation_context", True, [])
    assert scp.seen.saw_release


def test_the_association_is_released_and_no_thread_stays(files: list[Path]) -> None:
    before = set(threading.enumerate())
    with RawScp() as scp:
        assert send(files, scp).ok
        assert {t for t in threading.enumerate() if t.name != "raw-scp"} <= before
    assert scp.seen.saw_release
    assert not scp.seen.saw_abort


def test_no_other_thread_looks_for_the_responses(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    real = DIMSEServiceProvider.get_msg

    def get_msg(self: DIMSEServiceProvider, block: bool = False) -> Any:
        if not block:  # pynetdicom's association thread, in each of its rounds
            looked.append(len(sent))
        return real(self, block)

    def on_sent(count: int) -> None:
        sent.append(count)
        time.sleep(0.02)  # some rounds

    sent: list[int] = []
    monkeypatch.setattr(DIMSEServiceProvider, "get_msg", get_msg)
    with RawScp() as scp:
        outcome = send_series(files, scp.peer(), calling_ae="SYNPET", timeouts=PATIENT, on_sent=on_sent)
    assert outcome.ok
    assert not {1, 2} & set(looked)


def in_pieces(peer: RawPeer) -> None:
    """The response in several PDVs, the PDVs in several PDUs, the PDUs in single bytes."""
    message = peer.message()
    body, context = response(message), message.context_id
    raw = pdu([(context, 1, body[:5]), (context, 1, body[5:9])]) + pdu([(context, 1, b""), (context, 3, body[9:])])
    for byte in raw:
        peer.socket.sendall(bytes([byte]))


def in_time(peer: RawPeer) -> None:
    message = peer.message()
    time.sleep(0.3)
    peer.answer(message)


@pytest.mark.parametrize("script", [in_pieces, in_time])
def test_a_response_that_comes_in_pieces_or_late_is_a_response(
    files: list[Path], script: Callable[[RawPeer], None]
) -> None:
    with RawScp(script) as scp:
        outcome = send(files, scp)
    assert (outcome.ok, outcome.stored) == (True, COUNT)
    assert [message.sop_instance_uid for message in scp.messages] == sop_uids(files)


def refuse_the_first(peer: RawPeer) -> None:
    peer.answer(peer.message(), status=0xC123)


def test_a_failure_is_told_and_the_rest_goes_on(files: list[Path]) -> None:
    with RawScp(refuse_the_first) as scp:
        outcome = send(files, scp)
    assert list(outcome.statuses.values()) == ["0xC123", "0x0000", "0x0000"]
    assert (outcome.code, outcome.permanent) == ("instances_refused", True)


def wrong_message_id(peer: RawPeer) -> None:
    peer.answer(peer.message(), message_id=999)


def another_message(peer: RawPeer) -> None:
    message = peer.message()
    peer.socket.sendall(pdu([(message.context_id, 3, message.command)]))


def no_command_set(peer: RawPeer) -> None:
    peer.socket.sendall(pdu([(peer.message().context_id, 3, b"no command set")]))


def a_data_set(peer: RawPeer) -> None:
    peer.socket.sendall(pdu([(peer.message().context_id, 2, b"")]))


def a_broken_pdv(peer: RawPeer) -> None:
    peer.message()
    peer.socket.sendall(b"\x04\x00\x00\x00\x00\x08" + b"\x00\x00\x00\xff" + b"\x01\x03ab")


def a_huge_pdu(peer: RawPeer) -> None:
    peer.message()
    peer.socket.sendall(b"\x04\x00\xff\xff\xff\xff")


def an_unknown_pdu(peer: RawPeer) -> None:
    peer.message()
    peer.socket.sendall(b"\x2a\x00\x00\x00\x00\x02ab")


def silence(peer: RawPeer) -> None:
    peer.message()
    peer.message()  # nothing comes but the abort


def dripping(peer: RawPeer) -> None:
    message = peer.message()
    for byte in pdu([(message.context_id, 3, response(message))]):
        peer.socket.sendall(bytes([byte]))
        time.sleep(0.02)


@pytest.mark.parametrize(
    "script",
    [
        wrong_message_id,
        another_message,
        no_command_set,
        a_data_set,
        a_broken_pdv,
        a_huge_pdu,
        an_unknown_pdu,
        silence,
        dripping,
    ],
)
def test_what_is_no_response_is_not_taken_for_one(files: list[Path], script: Callable[[RawPeer], None]) -> None:
    with RawScp(script) as scp:
        outcome = send(files, scp, timeouts=IMPATIENT)
    assert (outcome.code, outcome.permanent, outcome.stored) == ("no_response", False, 0)
    assert list(outcome.statuses.values()) == ["no_response", "not_sent", "not_sent"]
    assert scp.seen.saw_abort or script is dripping  # that one was busy writing


def abort_at_once(peer: RawPeer) -> None:
    peer.answer(peer.message())
    peer.socket.sendall(ABORT)
    peer.socket.close()


def abort_instead_of_an_answer(peer: RawPeer) -> None:
    peer.answer(peer.message())
    peer.message()
    peer.socket.sendall(ABORT)


def release_instead_of_an_answer(peer: RawPeer) -> None:
    peer.answer(peer.message())
    peer.message()
    peer.socket.sendall(RELEASE_RQ)
    peer.pdu()


def close_in_the_middle(peer: RawPeer) -> None:
    peer.answer(peer.message())
    peer.exactly(100)
    peer.socket.close()


def close_in_the_response(peer: RawPeer) -> None:
    peer.answer(peer.message())
    message = peer.message()
    peer.socket.sendall(pdu([(message.context_id, 3, response(message))])[:20])
    peer.socket.close()


@pytest.mark.parametrize(
    "script",
    [
        abort_at_once,
        abort_instead_of_an_answer,
        release_instead_of_an_answer,
        close_in_the_middle,
        close_in_the_response,
    ],
)
def test_an_association_that_the_peer_ends_is_transient_and_tells_what_it_has(
    files: list[Path], script: Callable[[RawPeer], None]
) -> None:
    before = set(threading.enumerate())
    with RawScp(script) as scp:
        outcome = send(files, scp)
        assert {t for t in threading.enumerate() if t.name != "raw-scp"} <= before
    assert outcome.code in {"no_response", "association_aborted"}
    assert (outcome.permanent, outcome.stored) == (False, 1)
    assert next(iter(outcome.statuses.values())) == "0x0000"


def test_a_peer_that_stops_reading_is_given_up(tmp_path: Path) -> None:
    (path,) = write_instances(tmp_path / "out", 1)
    ds = dcmread(path)
    ds.PixelData = bytes(20_000_000)  # more than the buffers between the two hold
    ds.save_as(path)
    stopped = threading.Event()
    with RawScp(lambda peer: (stopped.wait(60), peer.socket.close())[1]) as scp:
        outcome = send([path], scp, timeouts=IMPATIENT)
        stopped.set()
    assert (outcome.code, outcome.permanent, outcome.stored) == ("no_response", False, 0)


def test_a_file_that_becomes_shorter_while_it_is_sent_is_not_stored(files: list[Path]) -> None:
    def on_sent(_: int) -> None:
        files[1].write_bytes(files[1].read_bytes()[:200])

    with RawScp() as scp:
        outcome = send_series(files, scp.peer(), calling_ae="SYNPET", timeouts=PATIENT, on_sent=on_sent)
    assert outcome.stored == 1
    assert outcome.code == "no_response"
    assert len(scp.messages) == 1


@pytest.mark.parametrize("sender", ["stream", "plain"])
def test_the_configuration_says_who_writes_the_requests(tmp_path: Path, sender: Way) -> None:
    asked: list[Any] = []

    def send(files: list[Path], **keys: Any) -> SendOutcome:
        asked.append(keys["sender"])
        return SendOutcome(statuses=dict.fromkeys(sop_uids(files), "0x0000"))

    desk, pacs = Desk(tmp_path / "spool"), FakePacs(port=1)
    try:
        config = config_for(desk.root, pacs)
        config = config.model_copy(update={"node": config.node.model_copy(update={"sender": sender})})
        desk.finish_job(config)
        desk.deliver(config, send=send)
        desk.until(lambda: bool(asked))
    finally:
        desk.close()
    assert set(asked) == {sender}
