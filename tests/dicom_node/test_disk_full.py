"""A disk that fills up under the inbox, the outbox or the ledger: said, waited for, and nothing lost."""

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
from small_node import FolderPacs, SmallNode

from storage.errors import LedgerError
from storage.records import JobState

MB = 1 << 20


class SmallDisk:
    """A tmpfs of its own; `fill` leaves so many bytes, `free` gives them back."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._filler = folder / "filler"

    def fill(self, left: int) -> None:
        usage = shutil.disk_usage(self.folder)
        with self._filler.open("ab") as file:
            file.write(bytes(max(0, usage.free - left)))

    def free(self) -> None:
        self._filler.unlink()


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
