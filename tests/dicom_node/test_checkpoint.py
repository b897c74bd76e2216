"""pynetdicom's association thread stands still while a request of ours waits for its answer."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any, cast

import pytest
from fake_pacs import FakePacs
from pynetdicom.association import Association

from dicom_node.config import PeerConfig
from dicom_node.net.checkpoint import Checkpoint
from dicom_node.net.link import Link, Timeouts
from dicom_node.net.scu import echo_context

ROUNDS = 300


class Rounds(threading.Thread):
    """What pynetdicom's association thread does: pass the checkpoint, work for a while, again."""

    def __init__(self, work_s: float) -> None:
        super().__init__(daemon=True)
        self.checkpoint = Checkpoint(cast(Association, self))
        self.works = False
        self.passed = 0
        self.ended = False
        self._work_s = work_s

    def run(self) -> None:
        while not self.ended:
            self.checkpoint.wait()
            self.works = True
            time.sleep(self._work_s)
            self.passed += 1
            self.works = False


@pytest.fixture(params=[0.0, 0.002])
def rounds(request: pytest.FixtureRequest) -> Iterator[Rounds]:
    thread = Rounds(request.param)
    thread.start()
    yield thread
    thread.ended = True
    thread.checkpoint.set()
    thread.join(20)
    assert not thread.is_alive()


def test_after_clear_the_thread_stands_still_however_often(rounds: Rounds) -> None:
    for _ in range(ROUNDS):
        rounds.checkpoint.clear()
        passed = rounds.passed
        assert not rounds.works
        time.sleep(0.0005)
        assert rounds.passed == passed
        rounds.checkpoint.set()


def test_clear_does_not_wait_for_a_thread_that_has_ended(rounds: Rounds) -> None:
    rounds.ended = True
    rounds.join(20)
    rounds.checkpoint.clear()
    assert not rounds.checkpoint.is_set()


def test_the_thread_itself_may_clear(rounds: Rounds) -> None:
    """As a handler that sends on its own association does."""
    cleared = threading.Event()

    def clear_here() -> None:
        other = Rounds(0.0)
        other.run = lambda: (other.checkpoint.clear(), other.checkpoint.set(), cleared.set())  # type: ignore[method-assign, assignment, return-value]
        other.start()
        other.join(20)

    clear_here()
    assert cleared.is_set()


def test_others_may_wait_for_the_thread_to_go_on(rounds: Rounds) -> None:
    rounds.checkpoint.clear()
    assert not rounds.checkpoint.wait(0.01)
    rounds.checkpoint.set()
    assert rounds.checkpoint.wait(20)


def test_an_answer_is_never_taken_away_by_the_association_s_own_thread() -> None:
    """The thread is slow after each time that it was let go: with pynetdicom's event it takes answers away."""
    with FakePacs() as pacs:
        peer = PeerConfig(name="pacs", ae_title="PACS", port=pacs.port)
        with Link(peer, [echo_context()], "SYNPET", Timeouts(dimse_s=5.0), 16382) as link:
            assoc: Any = link.assoc
            real = assoc.dimse.get_msg

            def slow(block: bool = False) -> Any:
                if threading.current_thread() is assoc:
                    time.sleep(0.005)
                return real(block=block)

            assoc.dimse.get_msg = slow
            for _ in range(50):
                assert assoc.send_c_echo().Status == 0
