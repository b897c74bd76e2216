"""PDUs of two gigabytes, to a node that announces a maximum length and to one that announces none."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
from hostile_tools import CT, VERIFICATION, Siege, besieged
from hostile_words import STORE_BEGUN
from raw_sender import RELEASE_RQ, p_data

GIGABYTES = 1_900_000_000
SENT = (bytes(1 << 20),) * 100
READERS = ("stream", "plain")


@pytest.fixture(scope="module", params=[(reader, max_pdu) for reader in READERS for max_pdu in (262144, 0)], ids=str)
def siege(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Siege]:
    reader, max_pdu = request.param
    folder = tmp_path_factory.mktemp("siege") / "node"
    with besieged(folder, reader=reader, max_pdu=max_pdu, max_instance_bytes=2_000_000_000) as made:
        yield made


@pytest.fixture(autouse=True)
def unharmed_after_the_batch(siege: Siege) -> Iterator[None]:
    yield
    siege.assert_unharmed()


@pytest.mark.parametrize("kind", range(1, 8))
def test_a_huge_pdu_of_a_stranger_without_an_association(siege: Siege, kind: int) -> None:
    siege.intake.clock.now += 61  # the events of the others are not this one
    before = siege.intake.event_codes().count("malformed_pdu")
    siege.send(struct.pack(">BxL", kind, GIGABYTES), *SENT)
    siege.intake.wait(lambda: siege.intake.event_codes().count("malformed_pdu") > before)


def test_a_huge_pdu_in_an_association(siege: Siege) -> None:
    fragment = struct.pack(">LBB", GIGABYTES - 4, 3, 0)
    begun = (STORE_BEGUN, struct.pack(">BxL", 4, GIGABYTES) + fragment)
    siege.send(*begun, *SENT, associate=[VERIFICATION, CT])


def test_a_huge_pdu_of_a_message_that_is_no_store(siege: Siege) -> None:
    command = struct.pack(">LBB", GIGABYTES - 4, 1, 1)
    siege.send(struct.pack(">BxL", 4, GIGABYTES) + command, *SENT, associate=[VERIFICATION, CT])


@pytest.mark.parametrize("kind", [1, 2, 3, 5, 6, 7])
def test_a_huge_pdu_of_another_type_in_an_association(siege: Siege, kind: int) -> None:
    siege.send(struct.pack(">BxL", kind, GIGABYTES), *SENT, associate=[VERIFICATION, CT])


def test_a_huge_pdu_after_the_release(siege: Siege) -> None:
    siege.send(RELEASE_RQ, struct.pack(">BxL", 4, GIGABYTES), *SENT, associate=[VERIFICATION, CT])


def test_many_pdus_of_a_megabyte_without_an_association(siege: Siege) -> None:
    pdu = p_data(struct.pack(">LBB", 1_000_002, 1, 0) + bytes(1_000_000))
    siege.send(*[pdu] * 100)
