"""A running node whose ledger somebody else locks or damages: it says why and what to do, and loses nothing."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest
from fake_pacs import FakePacs
from node_process import ROOT, NodeProcess, write_ct
from pydicom import dcmread
from small_node import LONG_S, FolderPacs, SmallNode
from tiny_bundle import write_tiny_bundle

from storage import database
from storage.backup import backups
from storage.errors import LedgerError
from storage.records import Job, JobState

RESULT_SERIES = 2  # the PET series and the picture
DAMAGED = 3  # the exit code


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


def ledger_file(node: NodeProcess) -> Path:
    return node.folder / "spool" / "ledger.sqlite"


@contextmanager
def write_locked(file: Path) -> Iterator[None]:
    """As an `sqlite3` shell that somebody has left in a transaction."""
    with closing(sqlite3.connect(file, isolation_level=None, timeout=60.0)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield


def lines_of(node: NodeProcess, event: str) -> list[str]:
    return [line for line in node.log.read_text().splitlines() if event in line]


def all_done(node: NodeProcess, number: int) -> bool:
    return [job.state for job in node.jobs()] == [JobState.DONE] * number


def test_a_ledger_that_is_locked_is_told_with_the_remedy_and_a_study_sent_meanwhile_becomes_one_job(
    tmp_path: Path, bundle: Path
) -> None:
    files = write_ct(tmp_path / "ct")
    with FakePacs() as pacs, NodeProcess(tmp_path, pacs, bundle, busy_timeout_s=0.5) as node:
        node.start()
        with write_locked(ledger_file(node)):
            assert node.send(files).ok
            node.until(lambda: bool(lines_of(node, "worker.loop_failed")))
        [first, *_] = lines_of(node, "worker.loop_failed")
        assert "LedgerOutage" in first
        assert "database is locked; another process keeps it locked" in first
        assert str(ledger_file(node)) in first
        node.until(lambda: all_done(node, 1))
        assert len(node.jobs()) == 1
        assert len(pacs.received.series) == RESULT_SERIES
        assert all(len(digests) == 1 for digests in pacs.received.digests.values())


@pytest.mark.parametrize("pause_s", [1.0, LONG_S], ids=["before the next attempt", "at the next attempt"])
def test_a_ledger_that_is_locked_for_longer_than_a_series_is_waited_for_costs_no_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pause_s: float
) -> None:
    monkeypatch.setattr(database, "BUSY_TIMEOUT_S", 0.05)
    pacs = FolderPacs(tmp_path / "pacs")
    pacs.folder.mkdir()
    node = SmallNode(tmp_path / "spool", pacs)
    node.receive(named_by_uid(write_ct(tmp_path / "ct")))
    node.assembler.tick()
    assert [job.state for job in node.jobs()] == [JobState.RECEIVING]
    with write_locked(tmp_path / "spool" / "ledger.sqlite"):
        for _ in range(3):
            node.now_s += LONG_S  # more than incomplete_after_s
            with suppress(LedgerError):
                node.assembler.tick()
    node.now_s += pause_s
    node.run_to_end()
    assert [job.state for job in node.jobs()] == [JobState.DONE]
    node.close()


def named_by_uid(files: list[Path]) -> list[Path]:
    return [path.rename(path.with_name(f"{dcmread(path).SOPInstanceUID}.dcm")) for path in files]


def command(node: NodeProcess, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dicom_node", *words, "--config", str(node.config)],
        cwd=node.folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def overwrite_pages(file: Path) -> None:
    """In the middle of the file, under the node that has it open; its log of changes is in the file before."""
    with closing(sqlite3.connect(file, timeout=60.0)) as other:
        other.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        page_bytes, pages = (other.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_size", "page_count"))
    with file.open("r+b") as damaged:
        damaged.seek(page_bytes)  # the first page says that it is a database
        damaged.write(b"\xa5" * (page_bytes * (pages - 1)))


def known(jobs: list[Job]) -> dict[str, JobState]:
    return {job.info.series_uid: job.state for job in jobs}


def test_a_ledger_that_is_damaged_under_the_node_is_told_and_restored_with_every_study_of_the_spool(
    tmp_path: Path, bundle: Path
) -> None:
    before, after = write_ct(tmp_path / "before"), write_ct(tmp_path / "after")
    with FakePacs() as pacs, NodeProcess(tmp_path, pacs, bundle) as node:
        # what came before a restart may be cut off: so long it waits for more
        node.config.write_text(node.config.read_text().replace("[intake]", "[intake]\nincomplete_after_s = 3.0"))
        node.start()
        assert node.send(before).ok
        node.until(lambda: all_done(node, 1))
        assert command(node, "ledger", "backup").returncode == 0
        backup = backups(tmp_path / "spool" / "backups")[-1]
        first = known(node.jobs())

        overwrite_pages(ledger_file(node))
        assert node.send(after).ok  # into the spool, which needs no ledger
        node.until(lambda: bool(lines_of(node, "LedgerDamaged")))
        assert all("ledger restore FILE" in line for line in lines_of(node, "LedgerDamaged"))
        node.signal(signal.SIGTERM)
        assert node.wait() == 0
        assert command(node, "serve").returncode == DAMAGED  # and no start on it

        restored = command(node, "ledger", "restore", str(backup))
        assert restored.returncode == 0, restored.stderr
        node.start()
        node.until(lambda: all_done(node, 2))
        jobs = node.jobs()
        assert first.items() <= known(jobs).items()
        assert sorted(job.instances for job in jobs) == [len(before), len(after)]
        assert len(pacs.received.series) == 2 * RESULT_SERIES
        assert all(len(digests) == 1 for digests in pacs.received.digests.values())
