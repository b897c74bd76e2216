"""What the node keeps is of patients: nobody but its own user may read it, whatever the umask."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from intake_tools import running_intake, small_ct

from dicom_node.node import _close_to_others
from storage.durable import write_file


@pytest.fixture(autouse=True)
def careless_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def open_to_others(root: Path) -> list[str]:
    return [str(path.relative_to(root)) for path in sorted(root.rglob("*")) if path.stat().st_mode & 0o077]


def test_spool_and_ledger_are_for_nobody_else(tmp_path: Path) -> None:
    with running_intake(tmp_path, listen=False) as intake:
        intake.put(small_ct(tmp_path / "ct"))
        intake.pass_time(31)
        write_file(intake.spool.work_folder(intake.job().id) / "x.json", (b"{}",))
        spool = tmp_path / "spool"
        assert list(spool.rglob("*.dcm"))
        assert open_to_others(spool) == []
        assert [path.name for path in tmp_path.glob("ledger*") if path.stat().st_mode & 0o077] == []
        assert len(list(tmp_path.glob("ledger*"))) == 3  # with its -wal and -shm


def test_a_spool_of_an_earlier_version_is_closed_to_others_and_told(tmp_path: Path) -> None:
    root = tmp_path / "spool"
    root.mkdir(mode=0o755)
    with structlog.testing.capture_logs() as logs:
        _close_to_others(root)
        _close_to_others(root)
    assert stat.S_IMODE(root.stat().st_mode) == 0o700
    assert [(line["event"], line["was"]) for line in logs] == [("node.spool_closed_to_others", "0755")]
