"""Command sets as no library sends them: wrong lengths, doubled, missing, huge, UIDs that are paths or no text."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
from hostile_tools import CT, VERIFICATION, Siege, besieged, mutated
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from raw_sender import RELEASE_RQ, Message, RawSender, status_of, store_message

DATA = b"\x08\x00\x60\x00CS\x02\x00CT"
bounded = settings(max_examples=30, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
UIDS = (
    b"../../../../tmp/x",
    b"/etc/passwd",
    b"..",
    b".",
    b"",
    b"1.2.3\0/../x",
    b"\0\0\0\0",
    b"1.2." + b"3" * 61,
    b"1" * 4000,
    b"1.2.\xff\xfe\xe4",
    "1.2.٣".encode(),
    b"1.2.3\n",
    b"1.2.3\\4.5.6",
    b"CON",
    b"1..2",
    b"-1.2",
    b"%2e%2e%2f",
    b"$(id)",
)
FIELDS = (
    0x0001,
    0x8001,
    0x0020,
    0x0021,
    0x0010,
    0x0030,
    0x0100,
    0x0110,
    0x0120,
    0x0130,
    0x0140,
    0x0150,
    0x0FFF,
    0x1234,
)
KNOWN = (0x0002, 0x0003, 0x0100, 0x0110, 0x0120, 0x0700, 0x0800, 0x0900, 0x1000, 0x1001, 0x1002, 0x1005, 0x1030, 0x1031)


def element(number: int, raw: bytes, *, length: int | None = None, group: int = 0) -> bytes:
    return struct.pack("<HHL", group, number, len(raw) if length is None else length) + raw


def even(raw: bytes) -> bytes:
    return raw + b"\0" * (len(raw) % 2)


def store(instance: bytes, *extra: bytes, sop_class: bytes = CT.encode()) -> bytes:
    """A C-STORE request with these UIDs, in PDUs, with its data set."""
    parts = [
        element(0x0002, even(sop_class)),
        element(0x0100, b"\x01\x00"),
        element(0x0110, b"\x07\x00"),
        element(0x0700, b"\x00\x00"),
        element(0x0800, b"\x01\x00"),
        element(0x1000, even(instance)),
        *extra,
    ]
    body = b"".join(parts)
    return Message(3, element(0x0000, struct.pack("<L", len(body))) + body, DATA).in_pdus()


@pytest.fixture(scope="module", params=["stream", "plain"])
def siege(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Siege]:
    with besieged(tmp_path_factory.mktemp(request.param) / "node", reader=request.param) as made:
        yield made


@pytest.fixture(autouse=True)
def unharmed_after_the_batch(siege: Siege) -> Iterator[None]:
    yield
    siege.assert_unharmed()


def test_no_uid_becomes_a_path_and_each_is_answered(siege: Siege) -> None:
    with RawSender(siege.intake.port, [VERIFICATION, CT]) as sender:
        for instance in UIDS:
            sender.write(store(instance))
            assert status_of(sender.pdu()) == 0xC000, instance
        for sop_class in UIDS:
            sender.write(store(b"1.2.3", sop_class=sop_class))
            assert status_of(sender.pdu()) in (0xA900, 0xC000), sop_class
        sender.write(store_message(3, 8, CT, "1.2.3.4", DATA).in_pdus())
        assert status_of(sender.pdu()) == 0x0000
        sender.release()
    assert [path.name for path in siege.intake.spool.incoming()] == ["1.2.3.4.dcm"]


@bounded
@given(command=mutated(store(b"1.2.3.4")[12:-20]))
def test_a_mutated_command_set(siege: Siege, command: bytes) -> None:
    siege.send(Message(3, command, DATA).in_pdus(), RELEASE_RQ, associate=[VERIFICATION, CT])


@bounded
@given(
    elements=st.lists(
        st.builds(
            element,
            st.one_of(st.sampled_from(KNOWN), st.integers(0, 65535)),
            st.one_of(st.binary(max_size=70), st.sampled_from(UIDS)),
            length=st.sampled_from([None, None, None, None, 0, 1, 3, 65536, 2**32 - 1]),
            group=st.sampled_from([0, 0, 0, 0, 0, 8, 65535]),
        ),
        max_size=12,
    ),
    field=st.sampled_from(FIELDS),
    with_data=st.booleans(),
    context_id=st.sampled_from([1, 3, 3, 3, 5, 0, 255]),
)
def test_a_command_set_of_anything(
    siege: Siege, elements: list[bytes], field: int, with_data: bool, context_id: int
) -> None:
    body = b"".join([element(0x0100, struct.pack("<H", field)), *elements])
    message = Message(context_id, element(0x0000, struct.pack("<L", len(body))) + body, DATA if with_data else None)
    siege.send(message.in_pdus(), RELEASE_RQ, associate=[VERIFICATION, CT])


@pytest.mark.parametrize("repeats", [2, 100])
def test_an_element_that_comes_again_and_again(siege: Siege, repeats: int) -> None:
    siege.send(store(b"1.2.3", *[element(0x1000, b"1.2.99")] * repeats), RELEASE_RQ, associate=[VERIFICATION, CT])


def test_a_command_set_without_end(siege: Siege) -> None:
    piece = element(0x1000, b"1" * 60_000)
    fragment = struct.pack(">LBB", len(piece) + 2, 3, 1) + piece
    pdu = struct.pack(">BxL", 4, len(fragment)) + fragment
    siege.send(*[pdu] * 400, associate=[VERIFICATION, CT])


def test_a_data_set_without_end_is_bounded(siege: Siege) -> None:
    piece = bytes(200_000)
    fragment = struct.pack(">LBB", len(piece) + 2, 3, 0) + piece
    pdu = struct.pack(">BxL", 4, len(fragment)) + fragment
    begin = store(b"1.2.3.5")[: -len(DATA) - 12]
    siege.send(begin, *[pdu] * 100, associate=[VERIFICATION, CT])
