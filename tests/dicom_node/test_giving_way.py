"""A job leaves a processor to the receivers while images come, and takes it back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from tiny_bundle import write_tiny_bundle
from tiny_study import write_tiny_study

from dicom_node.engine.giving_way import GivingWay, threads_of
from dicom_node.engine.local import LocalEngine
from dicom_node.net.associations import AssociationRegistry
from pipeline.types import PipelineOptions, Progress

ALL = os.sched_getaffinity(0)
pytestmark = pytest.mark.skipif(len(ALL) < 2, reason="has one processor: there is none to leave to anybody")

FAMILY = """
import subprocess, sys, threading
threading.Thread(target=threading.Event().wait, daemon=True).start()
child = subprocess.Popen([sys.executable, "-c", "print(1, flush=True); input()"], stdin=subprocess.PIPE)
input()
child.communicate()
"""


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def family() -> Iterator[int]:
    """A process with two threads and a child; its id."""
    with subprocess.Popen([sys.executable, "-c", FAMILY], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()  # the child runs
        yield process.pid
        process.communicate()


def processors(pid: int) -> list[set[int]]:
    return [os.sched_getaffinity(thread) for thread in threads_of(pid)]


def test_every_thread_and_child_leaves_the_same_processor_and_gets_it_back(family: int) -> None:
    coming = True
    with GivingWay(family, lambda: coming, most_s=60.0) as way:
        assert processors(family) == [ALL] * 3
        way.look()
        assert processors(family) == [ALL - {min(ALL)}] * 3
        coming = False
        way.look()
        assert processors(family) == [ALL] * 3


def test_the_end_of_the_job_gives_the_processor_back(family: int) -> None:
    with GivingWay(family, lambda: True, most_s=60.0) as way:
        way.look()
    assert processors(family) == [ALL] * 3


def test_a_stream_without_end_holds_a_job_up_for_its_share_of_time_only(family: int) -> None:
    clock, coming = Clock(), True
    with GivingWay(family, lambda: coming, most_s=60.0, clock=clock) as way:
        way.look()
        clock.now, coming = 40.0, False  # 40 s are used
        way.look()
        clock.now, coming = 100.0, True
        way.look()
        clock.now = 119.0
        way.look()
        assert processors(family) == [ALL - {min(ALL)}] * 3
        clock.now = 121.0
        way.look()
        assert processors(family) == [ALL] * 3
        clock.now = 10_000.0
        way.look()
        assert processors(family) == [ALL] * 3


@pytest.mark.parametrize("most_s", [0.0, 60.0])
def test_nothing_is_given_without_images_or_without_time_for_it(family: int, most_s: float) -> None:
    with GivingWay(family, lambda: most_s == 0.0, most_s=most_s) as way:
        way.look()
        assert processors(family) == [ALL] * 3


def test_a_process_that_is_gone_is_no_error() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    with GivingWay(process.pid, lambda: True, most_s=60.0) as way:
        way.look()


def test_the_engine_gives_way_while_it_computes_and_not_after_the_job(tmp_path: Path) -> None:
    bundle, paths = write_tiny_bundle(tmp_path / "bundle"), write_tiny_study(tmp_path / "ct")
    engine = LocalEngine(job_timeout_s=120, images_come=lambda: True, give_way_s=60.0)
    seen: list[set[int]] = []
    held: list[int] = []

    def hold(_progress: Progress) -> None:
        if not held and engine.pid is not None:
            os.kill(engine.pid, signal.SIGSTOP)  # so that it cannot end before it is looked at
            held.append(engine.pid)

    def look() -> bool:
        assert engine.pid is not None
        seen.append(os.sched_getaffinity(engine.pid))
        os.kill(engine.pid, signal.SIGCONT)
        return False

    try:
        options = PipelineOptions(bundle=bundle, device="cpu", threads=1)
        created = datetime(2026, 1, 2, tzinfo=UTC)
        engine.run("abc", paths, options, tmp_path / "result", created, on_progress=hold, should_stop=look)
        assert ALL - {min(ALL)} in seen
        assert engine.pid is not None
        assert set(map(frozenset, processors(engine.pid))) == {frozenset(ALL)}
    finally:
        engine.close()


def test_images_come_while_an_association_brings_some() -> None:
    clock = Clock()
    registry = AssociationRegistry(limit=2, clock=clock)
    token = registry.open(calling_ae="CT1", address="127.0.0.1", peer="ct")
    assert token is not None
    assert not registry.images_come()  # it may be an echo
    registry.stored(token, 500_000)
    assert registry.images_come()
    clock.now = 10.0
    assert not registry.images_come()  # it idles
    registry.stored(token, 500_000)
    assert registry.images_come()
    registry.close(token)
    assert not registry.images_come()
