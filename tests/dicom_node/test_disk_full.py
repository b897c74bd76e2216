"""A disk that fills up under the inbox, work, the outbox or the ledger: said, waited for, and nothing lost."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from ct_factory import write_ct
from intake_tools import config, running_intake
from pydicom import dcmread
from small_node import LONG_S, FolderPacs, SmallNode
from tiny_bundle import write_tiny_bundle
from tiny_study import write_tiny_study
from unlucky_engine import Unlucky

from storage.errors import LedgerError
from storage.records import JobState

MB = 1 << 20


class SmallDisk:
    """A tmpfs of its own; `fill` leaves so many bytes, `free` gives them back. `take_names` leaves no file to make."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._filler = folder / "filler"

    def fill(self, left: int) -> None:
        usage = shutil.disk_usage(self.folder)
        with self._filler.open("ab") as file:
            file.write(bytes(max(0, usage.free - left)))

    def free(self) -> None:
        self._filler.unlink()

    def take_names(self) -> None:
        known = os.statvfs(self.folder)
        self._remount(known.f_files - known.f_ffree)

    def free_names(self) -> None:
        self._remount(100_000)

    def _remount(self, names: int) -> None:
        subprocess.run(["mount", "-o", f"remount,nr_inodes={names}", self.folder], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if os.geteuid() != 0 or mount is None:
        pytest.skip("mounting a small tmpfs needs root")
    made = subprocess.run([mount, "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True, text=True)
    if made.returncode != 0:
        pytest.skip(f"a tmpfs cannot be mounted here: {made.stderr.strip()}")
    yield SmallDisk(folder)
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture
def ct(tmp_path: Path) -> list[Path]:
    """Six slices of 32 KB, each file named by its UID."""
    folder = tmp_path / "ct"
    files = write_ct(folder, np.zeros((6, 128, 128), dtype=np.int16), spacing_mm=(3.0, 2.0, 2.0))
    return [path.rename(folder / f"{dcmread(path).SOPInstanceUID}.dcm") for path in files]


@pytest.mark.parametrize("reader", ["stream", "plain"])
def test_an_inbox_without_room_refuses_with_a700_and_takes_the_rest_when_there_is_room(
    disk: SmallDisk, ct: list[Path], reader: str
) -> None:
    with running_intake(disk.folder, config(intake={"reader": reader})) as intake:
        with intake.association() as assoc:
            stored = [assoc.send_c_store(dcmread(path)).Status for path in ct[:2]]
            disk.fill(left=0)
            refused = [assoc.send_c_store(dcmread(path)).Status for path in ct[2:]]
            disk.free()
            again = [assoc.send_c_store(dcmread(path)).Status for path in ct[2:]]
        assert (stored, set(refused), set(again)) == ([0, 0], {0xA700}, {0})
        assert sorted(path.name for path in intake.spool.incoming()) == sorted(path.name for path in ct)
        intake.pass_time(1000)
        assert intake.job().state is JobState.QUEUED


@pytest.fixture
def pacs(tmp_path: Path) -> FolderPacs:
    made = FolderPacs(tmp_path / "pacs")
    made.folder.mkdir()
    return made


class Time:
    now = datetime(2026, 3, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now


def test_a_job_without_room_for_its_result_waits_with_the_reason_and_goes_on_when_there_is(
    disk: SmallDisk, ct: list[Path], pacs: FolderPacs, tmp_path: Path
) -> None:
    time, root = Time(), disk.folder / "spool"
    url = f"sqlite:///{tmp_path / 'ledger.sqlite'}"
    node = SmallNode(root, pacs, clock=time, storage={"root": str(root), "database_url": url})
    node.receive(ct)
    disk.fill(left=100_000)
    for _ in range(9):  # more often than a job may fail
        node.step()
        time.now += timedelta(minutes=10)
    [job] = node.jobs()
    assert (job.state, job.reason_code, job.attempts) == (JobState.QUEUED, "no_space", 0)
    assert "no room for a result" in job.reason
    disk.free()
    node.run_to_end()
    assert [one.state for one in node.jobs()] == [JobState.DONE]
    assert len(pacs.contents()) == 3
    node.close()


def test_a_series_that_finds_no_room_in_work_stays_in_the_inbox_and_is_taken_when_there_is(
    disk: SmallDisk, ct: list[Path], pacs: FolderPacs, tmp_path: Path
) -> None:
    root = disk.folder / "spool"
    url = f"sqlite:///{tmp_path / 'ledger.sqlite'}"
    node = SmallNode(root, pacs, storage={"root": str(root), "database_url": url})
    node.receive(ct)
    node.assembler.tick()
    disk.take_names()  # a rename needs no room but for the job's folder
    for _ in range(9):  # longer than a study may fail
        node.now_s += LONG_S
        node.assembler.tick()
    assert [job.state for job in node.jobs()] == [JobState.RECEIVING]
    assert not list((root / "work").iterdir())
    assert len(list((root / "inbox").rglob("*.dcm"))) == len(ct)
    disk.free_names()
    node.run_to_end()
    assert [job.state for job in node.jobs()] == [JobState.DONE]
    assert len(pacs.contents()) == 3
    node.close()


@pytest.mark.slow
def test_a_disk_that_fills_up_while_the_engine_works_leaves_its_input_whole_and_costs_no_attempt(
    disk: SmallDisk, pacs: FolderPacs, tmp_path: Path
) -> None:
    files = write_tiny_study(tmp_path / "ct")
    named = [path.rename(path.with_name(f"{dcmread(path).SOPInstanceUID}.dcm")) for path in files]
    time, root = Time(), disk.folder / "spool"
    engine = Unlucky(lambda _pid: disk.fill(left=0))
    node = SmallNode(
        root,
        pacs,
        clock=time,
        engine=engine,
        pipeline={"bundle": str(write_tiny_bundle(tmp_path / "tiny")), "device": "cpu", "threads": 1},
        destinations=[],
        storage={"root": str(root), "database_url": f"sqlite:///{tmp_path / 'ledger.sqlite'}"},
    )
    try:
        node.receive(named)
        node.step()
        [job] = node.jobs()
        assert (job.state, job.reason_code, job.attempts) == (JobState.QUEUED, "not_written", 0)
        assert "No space left on device" in job.reason
        assert not list((root / "outbox").iterdir())
        assert {path.name for path in node.spool.ct_files(job.id)} == {path.name for path in named}
        disk.free()
        time.now += timedelta(hours=1)
        node.run_to_end()
        assert [(one.id, one.state) for one in node.jobs()] == [(job.id, JobState.DONE)]
    finally:
        engine.close()
        node.close()


def test_a_disk_that_fills_up_while_the_result_is_written_leaves_no_half_and_costs_no_attempt(
    disk: SmallDisk, ct: list[Path], pacs: FolderPacs, monkeypatch: pytest.MonkeyPatch
) -> None:
    time = Time()
    monkeypatch.setattr("dicom_node.worker.RESULT_TO_INPUT", 0)  # it looked like enough
    node = SmallNode(disk.folder / "spool", pacs, clock=time)
    node.receive(ct)
    node.step_to_queued()
    real = node.spool.keep_job
    monkeypatch.setattr(node.spool, "keep_job", lambda *a: (real(*a), disk.fill(left=0)))
    monkeypatch.setattr(node.ledger, "update", lambda *a, **k: None)  # the ledger has a disk of its own, as it were
    monkeypatch.setattr(node.ledger, "note", lambda *a, **k: None)
    with pytest.raises(LedgerError, match="disk"):  # it is told to the log; the lease ends by itself
        node.worker.work_one()
    assert not list((disk.folder / "spool" / "outbox").iterdir())
    monkeypatch.undo()
    disk.free()
    time.now += timedelta(hours=1)
    node.ledger.sweep(max_attempts=3, retry_s=0)
    node.run_to_end()
    assert [one.state for one in node.jobs()] == [JobState.DONE]
    node.close()


def test_a_ledger_without_room_stops_no_sender_and_goes_on_when_there_is(
    disk: SmallDisk, ct: list[Path], pacs: FolderPacs, tmp_path: Path
) -> None:
    root = tmp_path / "spool"
    url = f"sqlite:///{disk.folder / 'ledger.sqlite'}"
    node = SmallNode(root, pacs, storage={"root": str(root), "database_url": url})
    disk.fill(left=0)
    node.receive(ct)
    with pytest.raises(LedgerError, match=r"ledger\.sqlite: .*full; the disk is full: make room"):
        node.run_to_end()
    assert len(list(root.rglob("*.dcm"))) == len(ct)
    disk.free()
    node.run_to_end()
    assert [one.state for one in node.jobs()] == [JobState.DONE]
    assert len(pacs.contents()) == 3
    node.close()
