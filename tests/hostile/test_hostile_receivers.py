"""The siege against receiver processes, as the node has them: none of them ends, and all go on receiving."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from hostile_tools import BAD_NEWS, CT, VERIFICATION, Siege, besieged_processes, mutated
from hostile_words import DATA, ECHO, PDUS, REQUEST, STORE, TINY, next_to_nothing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from raw_sender import RELEASE_RQ, RawSender, status_of, store_message

BATCH = st.one_of(
    st.tuples(st.just(False), st.lists(st.binary(max_size=400), min_size=1, max_size=1)),
    st.tuples(st.just(False), st.lists(mutated(REQUEST), min_size=1, max_size=1)),
    st.tuples(st.just(True), st.lists(mutated(STORE + ECHO), min_size=1, max_size=1)),
    st.tuples(st.booleans(), st.lists(st.sampled_from(PDUS), max_size=6)),
)


def _one_on_each(siege: Siege, stack: ExitStack) -> Iterator[RawSender]:
    """A sender for each receiver; the kernel chooses, so more are opened as needed."""
    assert siege.pool is not None
    served: set[int] = set()
    while len(served) < len(siege.pool._seats):
        sender = stack.enter_context(RawSender(siege.intake.port, [VERIFICATION, CT]))
        (number,) = [seat.number for seat in siege.pool._seats if seat.tokens and seat.number not in served] or [-1]
        if number >= 0:
            served.add(number)
            yield sender


def test_the_same_receivers_live_after_the_batch_and_take_the_next_good_study(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with besieged_processes(tmp_path / "node") as siege:
        assert siege.pool is not None
        before = siege.pool.pids

        @settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
        @given(said=BATCH)
        def batch(said: tuple[bool, list[bytes]]) -> None:
            associated, words = said
            siege.send(*words, RELEASE_RQ, associate=[VERIFICATION, CT] if associated else [])

        batch()
        for tiny in TINY.values():
            siege.send(*next_to_nothing(*tiny), associate=[VERIFICATION, CT, VERIFICATION])
        siege.assert_unharmed()
        with ExitStack() as stack:
            for number, sender in enumerate(_one_on_each(siege, stack)):
                sender.write(store_message(3, 1, CT, f"1.2.{number}", DATA).in_pdus())
                assert status_of(sender.pdu()) == 0
                sender.release()
        assert (siege.pool.pids, siege.pool.deaths) == (before, 0)
        assert len(before) == 2
    logged = capfd.readouterr().err
    assert "association.malformed_pdu" in logged
    assert [word for word in (*BAD_NEWS, "Traceback", "receiver.died") if word in logged] == []
