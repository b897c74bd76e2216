"""The streaming reader against pynetdicom's own: the same files, responses, counts and events, byte for byte."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import structlog
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from intake_tools import config, running_intake
from pydicom.uid import CTImageStorage, SecondaryCaptureImageStorage
from pynetdicom.pdu import P_DATA_TF
from raw_sender import (
    ABORT,
    RELEASE_RQ,
    Message,
    RawSender,
    associate_request,
    command,
    echo_message,
    p_data,
    status_of,
    store_message,
    uid,
    us,
)
from tls_tools import Authority
from wire_tools import CAPTURE, CONTEXTS, CT, ECHO, READERS, VERIFICATION, Outcome, Wire, wire

from dicom_node.net.pace import Pace, TooSlow
from storage.spool import Spool

DATA = b"\x08\x00\x60\x00CS\x02\x00CT"
MEGABYTE = 1_000_000


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Wire]:
    with wire(tmp_path_factory.mktemp("plain"), "plain", intake={"max_instance_bytes": MEGABYTE}) as running:
        yield running


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Wire]:
    with wire(tmp_path_factory.mktemp("stream"), "stream", intake={"max_instance_bytes": MEGABYTE}) as running:
        yield running


@pytest.fixture(params=READERS)
def either(request: pytest.FixtureRequest) -> Wire:
    running: Wire = request.getfixturevalue(request.param)
    return running


def ct(message_id: int = 1, instance: str = "1.2.3", data: bytes | None = DATA) -> Message:
    return store_message(CT, message_id, CTImageStorage, instance, data)


# -- every fragmentation


def _message(kind: str, number: int, data: bytes) -> Message:
    match kind:
        case "ct":
            return ct(number, f"1.2.{number}", data)
        case "again":
            return ct(number, "1.2.3", data)
        case "bad uid":
            return ct(number, "../1.2.3", data)
        case "other class":
            return store_message(CT, number, SecondaryCaptureImageStorage, "1.2.3", data)
        case "capture":
            return store_message(CAPTURE, number, SecondaryCaptureImageStorage, "1.2.3", data)
        case _:
            return echo_message(ECHO, number)


KINDS = ("ct", "again", "bad uid", "other class", "capture", "echo")


@st.composite
def conversations(draw: st.DrawFn) -> list[Message]:
    kinds = draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=4))
    return [
        _message(kind, index + 1, draw(st.binary(min_size=1, max_size=60)) * draw(st.sampled_from([1, 3, 5000])))
        for index, kind in enumerate(kinds)
    ]


@st.composite
def fragments(draw: st.DrawFn, message: Message) -> list[bytes]:
    """A message's PDVs, cut anywhere, empty ones among them."""
    cuts = draw(st.lists(st.integers(0, len(message.command)), max_size=3))
    data_cuts = draw(st.lists(st.integers(0, len(message.data or b"")), max_size=4))
    return message.pdvs(cuts, data_cuts)


@st.composite
def packed(draw: st.DrawFn, pdvs: list[bytes]) -> bytes:
    """PDVs in PDUs, one or several in each."""
    raw, rest = b"", pdvs
    while rest:
        count = draw(st.integers(1, len(rest)))
        raw, rest = raw + p_data(*rest[:count]), rest[count:]
    return raw


BOUNDED = settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])


@BOUNDED
@given(data=st.data())
def test_whatever_the_fragmentation_both_readers_leave_the_same(plain: Wire, stream: Wire, data: st.DataObject) -> None:
    messages = data.draw(conversations())
    pdvs = [pdv for message in messages for pdv in data.draw(fragments(message))]
    raw = data.draw(packed(pdvs))  # also the end of a message and the beginning of the next in one PDU
    places = data.draw(st.lists(st.integers(0, len(raw)), max_size=5))
    assert stream.at_once(raw, len(messages), places) == plain.in_turn(messages)


@settings(BOUNDED, max_examples=15)
@given(data=st.data())
def test_the_plain_reader_takes_every_fragmentation_of_a_message(plain: Wire, data: st.DataObject) -> None:
    messages = data.draw(conversations())

    raw = iter([data.draw(packed(data.draw(fragments(message)))) for message in messages])
    assert plain.in_turn(messages, lambda _: next(raw)) == plain.in_turn(messages)


def test_command_and_data_sets_of_several_instances_may_share_one_pdu(stream: Wire) -> None:
    messages = [ct(1, "1.2.3"), ct(2, "1.2.4"), echo_message(ECHO, 3), ct(4, "1.2.5")]
    outcome = stream.at_once(p_data(*(pdv for message in messages for pdv in message.pdvs())), 4)
    assert set(outcome.files) == {"1.2.3.dcm", "1.2.4.dcm", "1.2.5.dcm"}
    assert [status_of(response) for response in outcome.responses] == [0, 0, 0, 0]


def test_the_same_instance_again_is_kept_once_and_another_content_beside_it(either: Wire) -> None:
    outcome = either.in_turn([ct(1), ct(2), ct(3, data=DATA + b"\0\0")])
    assert set(outcome.files) == {"1.2.3.dcm", "1.2.3~2.dcm"}
    assert outcome.stored == 3


@pytest.mark.parametrize("max_pdu", [4096, 65535, 0])
@pytest.mark.parametrize("reader", READERS)
def test_every_pdu_size_brings_the_same_bytes(tmp_path: Path, reader: str, max_pdu: int) -> None:
    data = bytes(range(256)) * 3000
    with wire(tmp_path, reader, node={"max_pdu": max_pdu}) as running, running.talk(max_pdu=max_pdu) as talk:
        sender, outcome = talk
        (offered,) = struct.unpack_from(">L", sender.answer, sender.answer.index(b"\x51\x00\x00\x04") + 4)
        assert offered == (16_777_216 if (reader, max_pdu) == ("plain", 0) else max_pdu)  # it collects each PDU
        sender.write(ct(data=data).in_pdus(max_pdu))
        assert status_of(sender.pdu()) == 0
    assert outcome.files["1.2.3.dcm"].endswith(data)


@pytest.mark.parametrize("reader", READERS)
def test_an_instance_of_many_pieces_comes_whole(tmp_path: Path, reader: str) -> None:
    data = bytes(range(256)) * 150_000
    with wire(tmp_path, reader) as running:
        outcome = running.in_turn([ct(data=data)], lambda message: message.in_pdus(262144))
    assert status_of(outcome.responses[0]) == 0
    assert outcome.files["1.2.3.dcm"].endswith(data)
    assert outcome.stored_bytes == len(data)


# -- refusals and what is dropped


@pytest.mark.parametrize("instance", ["", "1..2", "1." + "2" * 64, "../../etc/passwd", "\xff\xfe", "1.2\n3"])
def test_a_bad_uid_gets_the_same_answer_from_both(plain: Wire, stream: Wire, instance: str) -> None:
    messages = [ct(1, instance), ct(2)]
    outcome = stream.in_turn(messages)
    assert outcome == plain.in_turn(messages)
    assert [status_of(response) for response in outcome.responses] == [0xC000, 0]


def test_what_is_dropped_is_answered_and_counted_the_same(plain: Wire, stream: Wire) -> None:
    messages = [store_message(CAPTURE, n, SecondaryCaptureImageStorage, "1.2.3", DATA * n) for n in (1, 2)]
    outcome = stream.in_turn(messages)
    assert outcome == plain.in_turn(messages)
    assert outcome.dropped == {SecondaryCaptureImageStorage: 2}
    assert outcome.files == {}


def test_an_instance_that_is_too_large_is_refused_and_the_next_one_taken(plain: Wire, stream: Wire) -> None:
    messages = [ct(1, data=bytes(MEGABYTE + 1)), ct(2, data=bytes(MEGABYTE))]
    outcome = stream.in_turn(messages, lambda message: message.in_pdus(65536))
    assert outcome == plain.in_turn(messages, lambda message: message.in_pdus(65536))
    assert [status_of(response) for response in outcome.responses] == [0xC000, 0]
    assert outcome.stored == 1


def test_no_room_is_answered_the_same(tmp_path: Path) -> None:
    outcomes = []
    for reader in READERS:
        with wire(tmp_path / reader, reader, intake={"min_free_bytes": 10**18}) as running:
            outcomes.append(running.in_turn([ct(1), echo_message(ECHO, 2)]))
            assert "store_refused" in running.intake.event_codes()
    assert outcomes[0] == outcomes[1]
    assert status_of(outcomes[0].responses[0]) == 0xA700


@pytest.mark.parametrize("more", [1000, 5_000_000 - 1, 5_000_000])  # bytes that the watermark still lets come
def test_a_near_watermark_is_answered_the_same(tmp_path: Path, more: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Spool, "free_bytes", lambda _: 10**9 + more)
    messages = [ct(1, data=bytes(5_000_000)), ct(2, "1.2.4", bytes(500)), echo_message(ECHO, 3)]
    outcomes = []
    for reader in READERS:
        with wire(tmp_path / reader, reader, intake={"min_free_bytes": 10**9}) as running:
            outcomes.append(running.in_turn(messages, lambda message: message.in_pdus(65536)))
            assert "store_refused" in running.intake.event_codes()
    assert outcomes[0] == outcomes[1]
    assert [status_of(response) for response in outcomes[0].responses] == [0xA700, 0, 0]
    assert list(outcomes[0].files) == ["1.2.4.dcm"]


def test_an_empty_data_set_is_refused_the_same(plain: Wire, stream: Wire) -> None:
    messages = [ct(1, data=b""), ct(2)]
    outcome = stream.in_turn(messages)
    assert outcome == plain.in_turn(messages)
    assert [status_of(response) for response in outcome.responses] == [0xC000, 0]


def test_a_store_without_a_data_set_does_not_stop_the_association(either: Wire) -> None:
    with either.talk() as (sender, outcome):
        sender.write(ct(1, data=None).in_pdus())
        assert status_of(sender.pdu()) == 0xC000
        sender.write(ct(2).in_pdus())
        assert status_of(sender.pdu()) == 0
    assert list(outcome.files) == ["1.2.3.dcm"]


def test_a_store_in_a_context_that_was_not_accepted_ends_the_association(either: Wire) -> None:
    with either.talk() as (sender, outcome):
        sender.write(store_message(99, 1, CTImageStorage, "1.2.3", DATA).in_pdus())
        assert sender.pdu()[:1] in (b"\x07", b"")
        sender.close()
    assert (outcome.aborted, outcome.files) == (True, {})


# -- broken off


SMALL = ct(data=b"\x08\x00\x60\x00CS\x00\x00")


@pytest.mark.parametrize(("reader", "step"), [("stream", 1), ("plain", 11)])
def test_a_connection_cut_at_any_byte_leaves_nothing(tmp_path: Path, reader: str, step: int) -> None:
    raw = SMALL.in_pdus()
    with wire(tmp_path, reader) as running:
        for first in range(0, len(raw), step * 16):
            running.closed.clear()
            senders = [RawSender(running.intake.port, CONTEXTS) for _ in range(16)]
            for index, sender in enumerate(senders):
                sender.write(raw[: min(first + step * index, len(raw) - 1)])
                sender.close()
            running.intake.wait(lambda: len(running.closed) == 16)
            assert all(one.aborted and not one.stored for one in running.closed)
        assert leftovers(running) == []


@pytest.mark.parametrize("words", [ABORT, RELEASE_RQ, b"\x99" * 10], ids=["abort", "release", "nonsense"])
@pytest.mark.parametrize("reader", READERS)
def test_an_end_between_any_two_fragments_leaves_nothing(tmp_path: Path, reader: str, words: bytes) -> None:
    pdus = [p_data(pdv) for pdv in SMALL.pdvs(range(12, len(SMALL.command), 12), range(2, 8, 2))]
    with wire(tmp_path, reader) as running:
        for count in range(1, len(pdus)):
            with running.talk() as (sender, outcome):
                sender.write(b"".join(pdus[:count]) + words)
                while sender.pdu():
                    pass  # until the other side closes
                sender.close()
            assert outcome == Outcome(aborted=True), count
        assert leftovers(running) == []


def leftovers(running: Wire) -> list[str]:
    return [str(path) for path in (running.intake.spool.root / "inbox").rglob("*") if path.is_file()]


def test_a_release_between_two_messages_is_no_abort(either: Wire) -> None:
    assert not either.in_turn([ct(1)]).aborted
    assert not either.at_once(b"", 0).aborted


def test_what_follows_an_error_never_reaches_a_file(stream: Wire) -> None:
    with stream.talk() as (sender, outcome):
        broken = p_data(struct.pack(">LBB", 1, CT, 3)) + SMALL.in_pdus() * 50
        with contextlib.suppress(ConnectionError):
            sender.write(broken)
        assert sender.pdu()[:1] in (b"\x07", b"")
        sender.close()
    assert outcome == Outcome(aborted=True)


MALFORMED: dict[str, bytes] = {
    "a PDU of 4 GB": b"\x04\x00\xff\xff\xff\xff" + struct.pack(">LBB", 0xFFFFFFF0, CT, 0),
    "a negotiation of 4 GB": b"\x01\x00\xff\xff\xff\xff",
    "an unknown PDU type": b"\x09\x00\x00\x00\x00\x04\x00\x00\x00\x00",
    "a PDV longer than its PDU": b"\x04\x00\x00\x00\x00\x08" + struct.pack(">LBB", 1000, CT, 3) + b"\0\0",
    "a PDV without a header": b"\x04\x00\x00\x00\x00\x03\x00\x00\x00",
    "a command set without an end": p_data(struct.pack(">LBB", 60_002, CT, 1) + bytes(60_000)) * 20,
    "a command set of noise": p_data(struct.pack(">LBB", 42, CT, 3) + b"\xff" * 40),
    "an empty command set": p_data(struct.pack(">LBB", 2, CT, 3)),
    "an unknown command": Message(CT, command(field=(0x0100, us(0x7777)), data=(0x0800, us(0x0101)))).in_pdus(),
    "a command set of empty fragments": p_data(*[struct.pack(">LBB", 2, CT, 1)] * 1001),
    "a data set of empty fragments": p_data(ct().pdvs()[0], *[struct.pack(">LBB", 2, CT, 0)] * 1001),
    "a data set of fragments of a byte": p_data(ct().pdvs()[0], *[struct.pack(">LBB", 3, CT, 0) + b"\0"] * 1001),
    "a data set for an echo": Message(
        ECHO, command(field=(0x0100, us(0x0030)), message=(0x0110, us(1)), data=(0x0800, us(1))), DATA
    ).in_pdus(),
    "a command without a data set type": Message(CT, command(field=(0x0100, us(0x0030)))).in_pdus(),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_what_is_no_message_ends_the_association_with_a_named_event(either: Wire, name: str) -> None:
    either.intake.clock.now += 61  # the events of the others are not this one
    with structlog.testing.capture_logs() as logs, either.talk() as (sender, outcome):
        with contextlib.suppress(ConnectionError):
            sender.write(MALFORMED[name])
        while sender.pdu():
            pass
        sender.close()
    assert outcome == Outcome(aborted=True)
    (line,) = [line for line in logs if line["event"] == "association.malformed_pdu"]
    assert line["reason"]
    assert "malformed_pdu" in either.intake.event_codes()


def _report(data: bytes) -> Message:
    """An N-EVENT-REPORT request, which has a data set, in a context that has no such service."""
    packed = command(
        sop_class=(0x0002, uid("1.2.840.10008.1.20.1")),
        field=(0x0100, us(0x0100)),
        message=(0x0110, us(1)),
        data=(0x0800, us(1)),
        instance=(0x1000, uid("1.2.840.10008.1.20.1.1")),
        kind=(0x1002, us(1)),
    )
    return Message(ECHO, packed, data)


def test_pynetdicom_gets_one_fragment_for_each_set(either: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    fragments: list[int] = []
    decode = P_DATA_TF.decode

    def noted(pdu: P_DATA_TF, raw: bytearray) -> None:
        decode(pdu, raw)
        fragments.append(len(pdu.presentation_data_value_items))

    monkeypatch.setattr(P_DATA_TF, "decode", noted)
    report = _report(bytes(500))
    with either.talk() as (sender, _):
        sender.write(p_data(*report.pdvs(range(4, len(report.command), 4), range(1, 500))))
        sender.pdu()
        sender.close()
    assert fragments == [2]


def test_a_store_in_a_context_for_echo_is_not_answered_with_success(either: Wire) -> None:
    with either.talk() as (sender, outcome):
        sender.write(store_message(ECHO, 1, VERIFICATION, "1.2.3", DATA).in_pdus())
        assert sender.pdu()[:1] in (b"\x07", b"")
        sender.close()
    assert outcome == Outcome(aborted=True)


def test_a_message_that_is_no_store_is_bounded(stream: Wire) -> None:
    report = Message(ECHO, command(field=(0x0100, us(0x0100)), message=(0x0110, us(1)), data=(0x0800, us(1))))
    endless = p_data(struct.pack(">LBB", 200_002, ECHO, 0) + bytes(200_000))
    stream.intake.clock.now += 61
    with stream.talk() as (sender, outcome):
        sender.write(report.in_pdus())
        with contextlib.suppress(ConnectionError):
            for _ in range(200):
                sender.write(endless)
        sender.close()
    assert outcome.aborted
    assert any("no C-STORE" in event.text for event in stream.intake.ledger.search_events(code="malformed_pdu"))


def test_the_plain_reader_collects_no_endless_data_set(plain: Wire) -> None:
    endless = p_data(struct.pack(">LBB", 200_002, CT, 0) + bytes(200_000))
    plain.intake.clock.now += 61
    with plain.talk() as (sender, outcome):
        sender.write(p_data(ct(1).pdvs()[0]))
        with contextlib.suppress(ConnectionError):
            for _ in range(200):
                sender.write(endless)
        sender.close()
    assert (outcome.aborted, outcome.files) == (True, {})
    assert any("a data set of more" in event.text for event in plain.intake.ledger.search_events(code="malformed_pdu"))


@pytest.mark.parametrize("words", [b"", b"GET / HTTP/1.1\r\n\r\n", associate_request(CONTEXTS)[:50]])
def test_who_connects_and_leaves_without_a_request_holds_no_thread(tmp_path: Path, words: bytes) -> None:
    with wire(tmp_path, "stream", node={"acse_timeout_s": 600, "network_timeout_s": 600}) as running:
        for _ in range(5):  # as the health check of a load balancer
            with socket.create_connection(("127.0.0.1", running.intake.port), timeout=20) as caller:
                caller.sendall(words)
        (server,) = running.intake.receiver._servers
        running.intake.wait(lambda: server._polls > 2 and not server.active_associations)


# -- slow, silent, fast


@pytest.fixture(params=READERS)
def impatient(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Wire]:
    node = {"network_timeout_s": 2.0, "acse_timeout_s": 2.0}  # longer than a busy machine sleeps
    with wire(tmp_path, request.param, node=node, intake={"min_bytes_per_s": 200}) as running:
        yield running


def test_a_sender_that_falls_silent_in_a_message_is_hung_up_on(impatient: Wire) -> None:
    with impatient.talk() as (sender, outcome):
        sender.write(ct().in_pdus()[:-3])
        assert sender.pdu() == b"\x07\x00\x00\x00\x00\x04\x00\x00\x02\x00"
        sender.close()
    assert outcome == Outcome(aborted=True)
    (event,) = impatient.intake.ledger.search_events(code="slow_sender")
    assert event.text == "'PACS' at '127.0.0.1': a sender that fell silent in a message: aborted"


def test_a_sender_of_a_byte_now_and_then_is_hung_up_on(impatient: Wire) -> None:
    raw = ct(data=bytes(5000)).in_pdus()
    with impatient.talk() as (sender, outcome):
        sender.socket.settimeout(0.05)
        for at in range(400):
            with contextlib.suppress(TimeoutError):
                sender.socket.sendall(raw[at : at + 1])
                if sender.socket.recv(1):
                    break
        sender.close()
    assert outcome == Outcome(aborted=True)
    (event,) = impatient.intake.ledger.search_events(code="slow_sender")
    assert event.text == "'PACS' at '127.0.0.1': a sender that is too slow: aborted"


@pytest.mark.parametrize("reader", READERS)
def test_a_long_instance_outlives_the_time_out_as_long_as_it_comes(tmp_path: Path, reader: str) -> None:
    raw = ct(data=bytes(5000)).in_pdus()
    node, intake = {"network_timeout_s": 4.0}, {"min_bytes_per_s": 50}  # a busy machine sleeps for seconds
    with wire(tmp_path, reader, node=node, intake=intake) as running, running.talk() as (sender, outcome):
        sender.socket.settimeout(1.0)
        for at in range(0, len(raw), 1024):
            with contextlib.suppress(TimeoutError):
                sender.write(raw[at : at + 1024])
                if at + 1024 < len(raw):
                    sender.socket.recv(1)  # nothing comes: a pause of a second
        sender.socket.settimeout(60)
        assert status_of(sender.pdu()) == 0
    assert outcome.stored == 1


@pytest.mark.parametrize("words", [b"", associate_request(CONTEXTS)[:50]], ids=["nothing", "half a request"])
def test_who_connects_and_says_no_more_is_hung_up_on(impatient: Wire, words: bytes) -> None:
    with socket.create_connection(("127.0.0.1", impatient.intake.port), timeout=20) as silent:
        silent.sendall(words)
        with contextlib.suppress(ConnectionError):
            while silent.recv(100):
                pass
    assert impatient.intake.registry.counts()["accepted"] == 0
    if words:
        impatient.intake.wait(lambda: impatient.intake.event_codes() == ["slow_sender"])
        assert impatient.intake.registry.totals().hung_up == {"slow_sender": 1}


def test_only_the_time_that_we_waited_counts_against_a_sender() -> None:
    pace = Pace(silence_s=10, min_bytes_per_s=100)
    pace.waited(9.9, 0)
    pace.waited(9.9, 5000)
    for _ in range(10):
        pace.waited(1.0, 90)
    with pytest.raises(TooSlow, match="too slow"):
        pace.waited(1.0, 90)
    pace.begin()
    pace.waited(9.0, 0)
    with pytest.raises(TooSlow, match="silent"):
        pace.waited(2.0, 0)


def test_a_burst_does_not_pay_for_a_trickle_that_follows() -> None:
    pace = Pace(silence_s=10, min_bytes_per_s=100)
    pace.waited(10.1, 10**9)
    for _ in range(10):
        pace.waited(1.0, 1)
    with pytest.raises(TooSlow):
        pace.waited(1.0, 1)


def test_a_sender_above_its_rate_is_paused_until_it_keeps_it() -> None:
    pace, now, paused = Pace(silence_s=10, min_bytes_per_s=0), 100.0, 0.0
    for _ in range(100):
        pause = pace.pause_s(1000, 10_000, now)
        now, paused = now + pause, paused + pause
    assert paused == pytest.approx(9.0)  # 100 kB at 10 kB/s, less the second that may be caught up


@pytest.mark.parametrize("reader", READERS)
def test_the_associations_of_a_peer_share_its_rate(
    tmp_path: Path, reader: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    paused: list[float] = []
    monkeypatch.setattr("dicom_node.net.stream.sleep_unless", lambda _ended, seconds, *_: paused.append(seconds))
    data = bytes(100_000)
    with wire(tmp_path, reader, intake={"max_bytes_per_s": 10**9}) as running:
        monkeypatch.setattr(Pace, "pause_s", lambda _self, n, rate, _now: n / rate)
        alone = _paused(running, paused, data)
        with RawSender(running.intake.port, CONTEXTS):
            assert _paused(running, paused, data) == pytest.approx(2 * alone, rel=0.02)
            running.closed.clear()


def _paused(running: Wire, paused: list[float], data: bytes) -> float:
    others = len(running.intake.registry.open_tokens())
    with RawSender(running.intake.port, CONTEXTS) as sender:
        paused.clear()
        sender.write(ct(data=data).in_pdus(16384))
        assert status_of(sender.pdu()) == 0
        seconds = sum(paused)
        sender.release()
    running.intake.wait(lambda: len(running.intake.registry.open_tokens()) == others)
    return seconds


# -- TLS


@pytest.mark.parametrize("reader", READERS)
def test_in_tls_both_readers_do_the_same(tmp_path: Path, reader: str) -> None:
    authority = Authority(tmp_path / "ca")
    certificate, key = authority.split("node")
    tls = {"port": 11112, "cert_file": str(certificate), "key_file": str(key), "client_certificates": "none"}
    cfg = config(tls=tls, intake={"reader": reader}, node={"network_timeout_s": 3.0})
    client = ssl.create_default_context(cafile=str(authority.file))
    data = bytes(range(256)) * 4000
    with running_intake(tmp_path, cfg) as intake:
        with RawSender(intake.port, CONTEXTS, tls=client) as sender:
            for number in (1, 2):
                sender.write(ct(number, f"1.2.{number}", data).in_pdus(16384))
                assert status_of(sender.pdu()) == 0
            sender.write(echo_message(ECHO, 3).in_pdus())
            assert status_of(sender.pdu()) == 0
            sender.release()
        with RawSender(intake.port, CONTEXTS, tls=client) as sender:
            sender.write(ct().in_pdus()[:-3])
            assert sender.pdu()[:1] == b"\x07"
        intake.wait(lambda: "slow_sender" in intake.event_codes())
        kept = intake.spool.incoming()
        assert [path.read_bytes().endswith(data) for path in kept] == [True, True]
        assert [p for p in (intake.spool.root / "inbox").rglob("*") if p.is_file()] == kept


# -- durable before Success


@pytest.mark.parametrize("reader", READERS)
def test_the_bytes_and_their_seal_are_synced_before_success_is_said(
    tmp_path: Path, reader: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    with wire(tmp_path, reader) as running, running.talk() as (sender, _):
        for number in (1, 2):  # the association's folder is made here, and the next names
            sender.write(ct(number, f"1.2.{number}").in_pdus())
            sender.pdu()
        _trace(monkeypatch, calls, running.intake.port)
        sender.write(ct(3, "1.2.3", bytes(600_000)).in_pdus(65536))
        sender.pdu()
        monkeypatch.undo()
    order = [call for index, call in enumerate(calls) if index == 0 or call != calls[index - 1]]
    assert order == ["write .tmp", "seal .tmp", "fsync .tmp", "rename .tmp .dcm", "response"]


def _trace(monkeypatch: pytest.MonkeyPatch, calls: list[str], port: int) -> None:
    """Note the calls that matter, in their order, as they return."""

    def kind(descriptor: int) -> str:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        return "folder" if path.is_dir() else path.suffix

    def noted(function: Callable[..., object], name: Callable[..., str]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            told = name(*args)
            result = function(*args, **kwargs)
            if told:
                calls.append(told)
            return result

        return call

    def of_ours(wire: socket.socket, *_: object) -> str:
        return "response" if wire.getsockname()[1] == port else ""

    def incoming(verb: str) -> Callable[..., str]:
        return lambda fd, *_: f"{verb} {found}" if (found := kind(fd)) in (".tmp", "folder") else ""

    monkeypatch.setattr(os, "write", noted(os.write, incoming("write")))
    monkeypatch.setattr(os, "pwrite", noted(os.pwrite, incoming("seal")))
    monkeypatch.setattr(os, "fsync", noted(os.fsync, incoming("fsync")))
    monkeypatch.setattr(os, "rename", noted(os.rename, lambda a, b: f"rename {Path(a).suffix} {Path(b).suffix}"))
    for name in ("send", "sendall"):
        monkeypatch.setattr(socket.socket, name, noted(getattr(socket.socket, name), of_ours), raising=False)
