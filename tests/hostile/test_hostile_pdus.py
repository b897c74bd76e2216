"""Whatever stands on the wire: random bytes, mutated PDUs, wrong lengths, PDUs in the wrong state."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
from hostile_tools import CT, MOST_GROWTH, VERIFICATION, Siege, besieged, mutated, peak_bytes
from hostile_words import ECHO, PDUS, REQUEST, STORE, TINY, next_to_nothing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from raw_sender import RELEASE_RQ, associate_request, p_data

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


@pytest.mark.parametrize("name", TINY)
def test_fragments_that_are_next_to_nothing(siege: Siege, name: str) -> None:
    siege.send(*next_to_nothing(*TINY[name]), associate=[VERIFICATION, CT, VERIFICATION])


def test_memory_that_was_needed_and_freed_is_seen(siege: Siege) -> None:
    b"\1" * (MOST_GROWTH + (16 << 20))
    assert peak_bytes() - siege.resident > MOST_GROWTH
    siege.watch_memory()
