"""The engine has no memory left: its job ends FAILED with the reason, the node lives, the next job runs.

A killed and a stopped engine are in test_engine.py, what becomes of their jobs in test_worker.py. The slow test has two
lives of a real engine: each costs the seconds that torch takes to load.
"""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread
from small_node import FolderPacs, SmallNode
from tiny_bundle import write_tiny_bundle
from tiny_study import write_tiny_study
from unlucky_engine import Unlucky

from dicom_node.engine.child import describe
from storage.records import JobState


def without_memory(pid: int) -> None:
    """It keeps what it has and gets nothing more."""
    has = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
    resource.prlimit(pid, resource.RLIMIT_AS, (has, has))


@pytest.mark.slow
def test_a_job_that_needs_more_memory_than_there_is_fails_with_the_reason_and_the_next_one_runs(
    tmp_path: Path,
) -> None:
    pacs = FolderPacs(tmp_path / "pacs")
    engine = Unlucky(without_memory)
    node = SmallNode(
        tmp_path / "spool",
        pacs,
        engine=engine,
        pipeline={"bundle": str(write_tiny_bundle(tmp_path / "tiny")), "device": "cpu", "threads": 1},
        destinations=[],
    )
    once = node.config.model_copy(update={"engine": node.config.engine.model_copy(update={"max_attempts": 1})})
    node.worker._config = once
    try:
        for number in (1, 2):
            study = f"1.2.840.99.{number}"
            files = write_tiny_study(tmp_path / f"ct{number}", study_uid=study, series_uid=f"{study}.1")
            named = [path.rename(path.with_name(f"{dcmread(path).SOPInstanceUID}.dcm")) for path in files]
            node.receive(named)
            node.run_to_end()
        second, first = node.jobs()
        assert first.state is JobState.FAILED
        assert first.reason_code in ("engine_error", "engine_crashed")  # an exception, or the end of the process
        assert "out of memory" in first.reason or "killed by SIG" in first.reason
        assert (second.state, second.reason) == (JobState.DONE, "")
    finally:
        engine.close()
        node.close()


def test_what_has_no_memory_says_so_in_whatever_words_the_library_has() -> None:
    torchs = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")
    systems = OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
    for error in (MemoryError(), torchs, systems, np_error()):
        assert ": out of memory in " in describe(error)
    assert "out of memory" not in describe(ValueError("1.2.3"))


def np_error() -> Exception:
    try:
        np.empty((1 << 60,), dtype=np.uint8)
    except MemoryError as error:
        return error
    raise AssertionError("this machine has an exbibyte")
