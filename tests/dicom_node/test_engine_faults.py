"""The engine has no memory left: its job ends FAILED with the reason, the node lives, the next job runs.

A killed and a hanging engine are in test_engine.py, what becomes of their jobs in test_worker.py. The slow test has two
lives of a real engine: each costs the seconds that torch takes to load.
"""

from __future__ import annotations

import resource
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom import dcmread
from small_node import FolderPacs, SmallNode
from tiny_bundle import write_tiny_bundle
from tiny_study import write_tiny_study

from dicom_node.engine.child import describe
from dicom_node.engine.local import LocalEngine
from pipeline.types import Progress, Stage
from storage.records import JobState


class Unlucky:
    """A real engine to which something happens at the first stage of each run, while there is something left."""

    def __init__(self, *faults: Any) -> None:
        self.engine = LocalEngine(job_timeout_s=120.0)
        self.faults = list(faults)

    def run(self, job_id: str, paths: Any, options: Any, folder: Path, created: datetime, **told: Any) -> None:
        fault = self.faults.pop(0) if self.faults else lambda pid: None
        forward = told["on_progress"]

        def on_progress(progress: Progress) -> None:
            nonlocal fault
            if progress.stage is Stage.READ and self.engine.pid is not None:
                fault(self.engine.pid)
                fault = lambda pid: None  # noqa: E731
            forward(progress)

        self.engine.run(job_id, paths, options, folder, created, **{**told, "on_progress": on_progress})


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
        # an exception, the end of the process, or a library that waits for threads which it could not start
        assert first.reason_code in ("engine_error", "engine_crashed", "engine_timeout")
        assert first.reason
        assert (second.state, second.reason) == (JobState.DONE, "")
    finally:
        engine.engine.close()
        node.close()


def test_what_has_no_memory_says_so_in_whatever_words_the_library_has() -> None:
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), np_error()):
        assert ": out of memory in " in describe(error)
    assert "out of memory" not in describe(ValueError("1.2.3"))


def np_error() -> Exception:
    try:
        np.empty((1 << 60,), dtype=np.uint8)
    except MemoryError as error:
        return error
    raise AssertionError("this machine has an exbibyte")
