"""Whatever stands on the wire: random bytes, mutated PDUs, wrong lengths, PDUs in the wrong state."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
from hostile_tools import CT, MOST_GROWTH, VERIFICATION, Siege, besieged, mutated, peak_bytes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from raw_sender import (
    ABORT,
    RELEASE_RP,
    RELEASE_RQ,
    Message,
    associate_request,
    command,
    echo_message,
    p_data,
    store_message,
    us,
)

DATA = b"\x08\x00\x60\x00CS\x02\x00CT" + b"\x10\x00\x10\x00PN\x04\x00TEST"
REQUEST = associate_request([VERIFICATION, CT])
STORE = store_message(3, 1, CT, "1.2.3.4", DATA).in_pdus()
ECHO = echo_message(1, 2).in_pdus()
STORE_BEGUN = p_data(store_message(3, 1, CT, "1.2.3.4", DATA).pdvs()[0])
REPORT_BEGUN = Message(5, command(field=(0x0100, us(0x0100)), message=(0x0110, us(1)), data=(0x0800, us(1)))).in_pdus()
ACCEPT = b"\x02" + REQUEST[1:]
REJECT = b"\x03\x00\x00\x00\x00\x04\x00\x01\x01\x01"
PDUS = (REQUEST, ACCEPT, REJECT, STORE, ECHO, RELEASE_RQ, RELEASE_RP, ABORT)
bounded = settings(max_examples=30, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


@pytest.fixture(scope="module", params=["stream", "plain"])
def siege(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Siege]:
    with besieged(tmp_path_factory.mktemp(request.param) / "node", reader=request.param) as made:
        yield made


@pytest.fixture(autouse=True)
def unharmed_after_the_batch(siege: Siege) -> Iterator[None]:
    yield
    siege.assert_unharmed()


@bounded
@given(words=st.binary(max_size=400))
def test_random_bytes_instead_of_a_request(siege: Siege, words: bytes) -> None:
    siege.send(words)


@bounded
@given(request_pdu=mutated(REQUEST))
def test_a_mutated_association_request(siege: Siege, request_pdu: bytes) -> None:
    siege.send(request_pdu, STORE, RELEASE_RQ)


@bounded
@given(words=mutated(STORE + ECHO))
def test_mutated_messages(siege: Siege, words: bytes) -> None:
    siege.send(words, RELEASE_RQ, associate=[VERIFICATION, CT])


@bounded
@given(words=st.binary(max_size=400))
def test_random_bytes_in_an_association(siege: Siege, words: bytes) -> None:
    siege.send(words, associate=[VERIFICATION, CT])


@bounded
@given(order=st.lists(st.sampled_from(PDUS), max_size=6), associated=st.booleans())
def test_good_pdus_in_the_wrong_state(siege: Siege, order: list[bytes], associated: bool) -> None:
    siege.send(*order, associate=[VERIFICATION, CT] if associated else [])


@bounded
@given(
    kind=st.integers(0, 255),
    claimed=st.sampled_from([0, 1, 3, 4, 5, 10, 68, 2**16, 2**24, 2**31, 2**32 - 1]),
    body=st.binary(max_size=80),
    associated=st.booleans(),
)
def test_a_length_that_is_a_lie(siege: Siege, kind: int, claimed: int, body: bytes, associated: bool) -> None:
    siege.send(struct.pack(">BxL", kind, claimed) + body, associate=[CT] if associated else [])


@bounded
@given(
    length=st.sampled_from([0, 1, 2, 3, 100, 2**31, 2**32 - 1]),
    context_id=st.integers(0, 255),
    control=st.integers(0, 255),
    body=st.binary(max_size=80),
)
def test_a_fragment_that_is_a_lie(siege: Siege, length: int, context_id: int, control: int, body: bytes) -> None:
    siege.send(p_data(struct.pack(">LBB", length, context_id, control) + body), STORE, associate=[VERIFICATION, CT])


def test_items_that_nest_and_repeat_in_a_request(siege: Siege) -> None:
    many = associate_request([CT] * 127)
    siege.send(many, RELEASE_RQ)
    fixed, items = REQUEST[6:74], REQUEST[74:]
    for body in (fixed + items * 500, fixed, fixed + struct.pack(">BxH", 0x50, 65535) + b"\x51" * 65535):
        siege.send(struct.pack(">BxL", 1, len(body)) + body, RELEASE_RQ)


TINY = {
    "empty fragments of a command": (1, 3, 0),
    "fragments of a byte of a command": (1, 3, 1),
    "empty fragments of a data set": (0, 3, 0),
    "fragments of a byte of a data set": (0, 3, 1),
    "empty fragments of a data set that is no instance": (0, 5, 0),
    "fragments of a byte of a data set that is no instance": (0, 5, 1),
}


@pytest.mark.parametrize("name", TINY)
def test_fragments_that_are_next_to_nothing(siege: Siege, name: str) -> None:
    kind, context_id, length = TINY[name]
    fragment = struct.pack(">LBB", length + 2, context_id, kind) + bytes(length)
    begin = b"" if kind else STORE_BEGUN if context_id == 3 else REPORT_BEGUN
    siege.send(begin, p_data(fragment * 40_000), associate=[VERIFICATION, CT, VERIFICATION])


def test_memory_that_was_needed_and_freed_is_seen(siege: Siege) -> None:
    b"\1" * (MOST_GROWTH + (16 << 20))
    assert peak_bytes() - siege.resident > MOST_GROWTH
    siege.watch_memory()
