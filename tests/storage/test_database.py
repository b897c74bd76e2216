"""Opening and migrating the ledger, and what is said when that fails."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine, inspect

import storage.database as database
from storage.database import default_url, open_engine
from storage.errors import LedgerError
from storage.ledger import open_ledger
from storage.records import SeriesInfo
from storage.schema import Base

FIRST = "0001"


def test_an_empty_file_gets_the_tables_that_the_code_declares(tmp_path: Path) -> None:
    engine = open_engine(default_url(tmp_path))
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []
    assert set(inspect(engine).get_table_names()) == {"alembic_version", "jobs", "deliveries", "commitments", "events"}
    engine.dispose()


def test_a_ledger_of_the_first_revision_opens_and_keeps_its_rows(tmp_path: Path) -> None:
    engine = create_engine(default_url(tmp_path))
    database._prepare_sqlite(engine)
    database.upgrade(engine, FIRST)
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "INSERT INTO events (time, job_id, study_uid, accession, stage, code, text, details)"
            " VALUES ('2026-01-02 03:04:05.000000', '', '', '', '', 'old', 'from the first release', '{}')"
        )
    engine.dispose()
    ledger = open_ledger(default_url(tmp_path))
    [event] = ledger.search_events()
    assert (event.code, event.time.isoformat()) == ("old", "2026-01-02T03:04:05+00:00")
    ledger.close()


def test_opening_again_migrates_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_ledger(default_url(tmp_path)).close()
    monkeypatch.setattr("alembic.command.upgrade", lambda *_: pytest.fail("migrated twice"))
    open_ledger(default_url(tmp_path)).close()


def test_two_processes_may_create_the_ledger_together(tmp_path: Path) -> None:
    code = "import sys; from storage.ledger import open_ledger; open_ledger(sys.argv[1]).close()"
    children = [subprocess.Popen([sys.executable, "-c", code, default_url(tmp_path)]) for _ in range(3)]
    assert [child.wait(timeout=60) for child in children] == [0, 0, 0]


def test_a_ledger_from_a_newer_version_is_refused(tmp_path: Path) -> None:
    open_ledger(default_url(tmp_path)).close()
    with sqlite3.connect(tmp_path / "ledger.sqlite") as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.close()
    with pytest.raises(LedgerError, match=r"ledger\.sqlite: has schema revision '9999'.*newer version"):
        open_ledger(default_url(tmp_path))


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match=r"missing/ledger\.sqlite: the folder .*missing does not exist; create it"):
        open_ledger(default_url(tmp_path / "missing"))


def test_a_folder_is_not_a_ledger(tmp_path: Path) -> None:
    (tmp_path / "ledger.sqlite").mkdir()
    with pytest.raises(LedgerError, match="is a folder, expected a file"):
        open_ledger(default_url(tmp_path))


def test_a_file_that_is_no_database_is_named_and_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "ledger.sqlite"
    file.write_bytes(b"this is a text file, and a long one: " * 40)
    before = file.read_bytes()
    with pytest.raises(LedgerError, match=r"ledger\.sqlite: file is not a database; .*restore the backup"):
        open_ledger(default_url(tmp_path))
    assert file.read_bytes() == before


def test_a_read_only_database_is_refused_at_start(tmp_path: Path) -> None:
    open_ledger(default_url(tmp_path)).close()
    url = f"sqlite:///file:{tmp_path / 'ledger.sqlite'}?mode=ro&uri=true"
    with pytest.raises(LedgerError, match=r"ledger\.sqlite.*readonly database; .*write permission"):
        open_ledger(url)


READ_ONLY = """
import os, sys
from storage.errors import LedgerError
from storage.ledger import open_ledger
if os.geteuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
try:
    open_ledger(sys.argv[1])
except LedgerError as error:
    print(error)
"""


@pytest.mark.parametrize(("folder_mode", "file_mode"), [(0o555, 0o444), (0o777, 0o444), (0o555, 0o666)])
def test_a_file_or_folder_without_write_permission_is_refused_at_start(
    tmp_path: Path, folder_mode: int, file_mode: int
) -> None:
    folder = tmp_path / "state"
    folder.mkdir()
    open_ledger(default_url(folder)).close()
    (folder / "ledger.sqlite").chmod(file_mode)
    folder.chmod(folder_mode)
    closed = [path for path in tmp_path.parents if not path.stat().st_mode & 0o001] if os.geteuid() == 0 else []
    modes = {path: path.stat().st_mode for path in (tmp_path, *closed)}
    try:
        for path in modes:  # root ignores permissions: the child is another user, who must reach the folder
            path.chmod(path.stat().st_mode | 0o011)
        child = subprocess.run(
            [sys.executable, "-c", READ_ONLY, default_url(folder)], capture_output=True, text=True, timeout=60
        )
    finally:
        for path, mode in modes.items():
            path.chmod(mode)
        folder.chmod(0o755)
    assert f"ledger {folder / 'ledger.sqlite'}: " in child.stdout, child.stderr
    assert "permission" in child.stdout or "belongs to the node's user" in child.stdout


def test_a_ledger_locked_by_another_process_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "BUSY_TIMEOUT_S", 0.05)
    ledger = open_ledger(default_url(tmp_path))
    other = sqlite3.connect(tmp_path / "ledger.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(LedgerError, match=r"ledger\.sqlite: database is locked; another process"):
        ledger.open_job(SeriesInfo(study_uid="1", series_uid="1.1"))
    other.close()
    ledger.open_job(SeriesInfo(study_uid="1", series_uid="1.1"))
    ledger.close()


@pytest.mark.parametrize("url", ["", "spool/ledger.sqlite", "nosuchdb://x"])
def test_what_is_no_database_url_is_said_without_its_text(url: str) -> None:
    with pytest.raises(LedgerError, match="not a database URL; expected"):
        open_ledger(url)


def test_postgresql_is_asked_for_its_driver_and_shows_no_password() -> None:
    with pytest.raises(LedgerError) as caught:
        open_ledger("postgresql+psycopg://node:secret@127.0.0.1:1/ledger?connect_timeout=1")
    assert "secret" not in str(caught.value)
