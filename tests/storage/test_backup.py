"""The ledger's file: what is wrong with it is said, its copies are whole, and a copy becomes the ledger again."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from datetime import UTC, datetime, time, timedelta, timezone
from pathlib import Path

import pytest
from conftest import Clock, queued

from storage.backup import backup_time, backups, check_file, is_due, ledger_file, make_backup, restore
from storage.database import default_url
from storage.errors import BackupDamaged, LedgerDamaged, LedgerError, NoSpace
from storage.ledger import Ledger, open_ledger
from storage.records import JobFilter

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)


def fill(ledger: Ledger, count: int = 20) -> None:
    for n in range(count):
        queued(ledger, f"1.2.{n}")


@pytest.fixture
def file(ledger: Ledger, tmp_path: Path) -> Path:
    """A ledger of some pages, closed: nothing of it is in a log beside the file."""
    fill(ledger)
    ledger.close()
    return tmp_path / "ledger.sqlite"


def test_a_whole_ledger_passes_both_checks_while_it_is_written(ledger: Ledger, tmp_path: Path) -> None:
    fill(ledger)
    check_file(tmp_path / "ledger.sqlite")
    check_file(tmp_path / "ledger.sqlite", full=True)


def test_random_bytes_in_its_pages_are_found(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[4096 * 3 : 4096 * 5] = os.urandom(8192)
    file.write_bytes(data)
    with pytest.raises(LedgerDamaged, match=r"ledger\.sqlite: .*restore a backup: `dicom-node ledger restore FILE`"):
        check_file(file)


def test_a_file_that_was_cut_off_is_found(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(LedgerDamaged):
        check_file(file)


def test_an_index_that_lost_a_row_is_found_by_the_full_check(file: Path) -> None:
    with sqlite3.connect(file) as connection:
        connection.execute("PRAGMA writable_schema = ON")
        connection.execute(
            "UPDATE sqlite_master SET sql = replace(sql, 'study_uid', 'series_uid') WHERE name = 'ix_jobs_study_uid'"
        )
    connection.close()
    with pytest.raises(LedgerDamaged, match="ix_jobs_study_uid"):
        check_file(file, full=True)


def test_another_database_is_no_ledger(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "other.sqlite") as connection:
        connection.execute("CREATE TABLE songs (title)")
    connection.close()
    with pytest.raises(LedgerDamaged, match="no table of jobs"):
        check_file(tmp_path / "other.sqlite", full=True)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match=r"none\.sqlite: unable to open"):
        check_file(tmp_path / "none.sqlite")


def test_a_backup_is_one_whole_file_for_its_owner_alone_and_holds_what_was_written_last(
    ledger: Ledger, tmp_path: Path
) -> None:
    fill(ledger, 3)
    made = make_backup(tmp_path / "ledger.sqlite", tmp_path / "safe" / "place", keep=3, now=NOW)
    assert [path.name for path in made.parent.iterdir()] == ["ledger-20260301T120000Z.sqlite"]
    assert made.stat().st_mode & 0o777 == 0o600
    copy = open_ledger(f"sqlite:///{made}")
    assert copy.find(JobFilter()) == ledger.find(JobFilter())
    copy.close()
    assert backup_time(made) == NOW


def test_the_oldest_backups_go_and_other_files_stay(file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "backups"
    folder.mkdir()
    (folder / "ledger-by-hand.sqlite").touch()
    for day in range(5):
        make_backup(file, folder, keep=3, now=NOW + timedelta(days=day))
    assert [backup_time(path).day for path in backups(folder)] == [3, 4, 5]
    assert (folder / "ledger-by-hand.sqlite").exists()


def test_ten_backups_of_one_day_push_out_no_other_day(file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "backups"
    for day in range(5):
        make_backup(file, folder, keep=3, now=NOW + timedelta(days=day))
    today = [NOW + timedelta(days=4, minutes=n) for n in range(1, 11)]
    for now in today:
        make_backup(file, folder, keep=3, now=now)
    others = [NOW + timedelta(days=2), NOW + timedelta(days=3)]
    assert [backup_time(path) for path in backups(folder)] == [*others, *today[-3:]]
    make_backup(file, folder, keep=3, now=NOW + timedelta(days=5))
    assert {backup_time(path).date() for path in backups(folder)} == {
        (NOW + timedelta(days=day)).date() for day in (3, 4, 5)
    }


def test_a_backup_before_some_work_outlives_the_one_after_it_on_the_same_day(file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "backups"
    before_work, after_work = NOW, NOW + timedelta(hours=1)
    for now in (NOW - timedelta(days=1), before_work, after_work):
        make_backup(file, folder, keep=2, now=now)
    assert [backup_time(path) for path in backups(folder)] == [NOW - timedelta(days=1), before_work, after_work]


def test_a_damaged_ledger_pushes_no_backup_out(file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "backups"
    make_backup(file, folder, keep=1, now=NOW)
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(LedgerDamaged):
        make_backup(file, folder, keep=1, now=NOW + timedelta(days=1))
    assert [backup_time(path) for path in backups(folder)] == [NOW]
    assert len(list(folder.iterdir())) == 1


def test_a_disk_without_room_for_a_copy_gets_none(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.backup.shutil.disk_usage", lambda _: type("usage", (), {"free": 10}))
    with pytest.raises(NoSpace, match=r"a copy of the ledger needs \d+ bytes"):
        make_backup(file, tmp_path / "backups", keep=1, now=NOW)


AT = time(2, 30)
BERLIN = timezone(timedelta(hours=1))


@pytest.mark.parametrize(
    ("newest", "now", "due"),
    [
        (None, NOW, True),
        (NOW - timedelta(hours=1), NOW, False),
        (NOW - timedelta(hours=9), NOW, False),  # 3:00: after today's time
        (NOW - timedelta(hours=10), NOW, True),  # 2:00: before it, and it has passed
        (NOW - timedelta(hours=14), NOW.replace(hour=2), False),  # yesterday noon; today's is not due yet
        (NOW - timedelta(days=30), NOW.replace(hour=2), True),
        (NOW + timedelta(days=300), NOW, True),  # a clock that was wrong
        (datetime(2026, 3, 1, 1, 29, tzinfo=UTC), datetime(2026, 3, 1, 2, 31, tzinfo=BERLIN), True),  # local time
    ],
)
def test_a_backup_is_due_once_a_day(newest: datetime | None, now: datetime, due: bool) -> None:
    assert is_due(newest, now, AT) is due


def test_a_restored_ledger_is_as_of_the_backup_and_the_former_one_is_kept(
    ledger: Ledger, clock: Clock, tmp_path: Path
) -> None:
    file = tmp_path / "ledger.sqlite"
    first = queued(ledger, "1.2.1")
    backup = make_backup(file, tmp_path / "backups", keep=3, now=NOW)
    second = queued(ledger, "1.2.2")
    ledger.close()
    aside = restore(backup, file, now=NOW + timedelta(hours=1))
    assert aside is not None
    again = open_ledger(default_url(tmp_path), clock=clock)
    assert [job.id for job in again.find(JobFilter())] == [first.id]
    queued(again, "1.2.3")
    again.close()
    former = open_ledger(f"sqlite:///{aside}")
    assert {job.id for job in former.find(JobFilter())} == {first.id, second.id}
    former.close()


LOG_LEFT = """
import os, sys
from storage.ledger import open_ledger
from storage.records import SeriesInfo
ledger = open_ledger(sys.argv[1])
for n in range(30):
    ledger.open_job(SeriesInfo(study_uid="1.2", series_uid=f"1.9.{n}"))
os._exit(9)
"""


def kill_after_writing(url: str) -> None:
    assert subprocess.run([sys.executable, "-c", LOG_LEFT, url], timeout=60).returncode == 9


def test_the_log_of_a_killed_node_is_never_applied_to_the_restored_ledger(ledger: Ledger, tmp_path: Path) -> None:
    file = tmp_path / "ledger.sqlite"
    job = queued(ledger)
    backup = make_backup(file, tmp_path / "backups", keep=3, now=NOW)
    ledger.close()
    kill_after_writing(default_url(tmp_path))
    assert file.with_name("ledger.sqlite-wal").stat().st_size > 0
    aside = restore(backup, file, now=NOW)
    assert aside is not None
    check_file(file, full=True)
    again = open_ledger(default_url(tmp_path))
    assert [one.id for one in again.find(JobFilter())] == [job.id]
    again.close()
    former = open_ledger(f"sqlite:///{aside}")
    assert len(former.find(JobFilter())) == 31
    former.close()


def test_a_restore_that_is_killed_at_the_last_step_leaves_the_former_ledger_with_all_that_was_written(
    ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "ledger.sqlite"
    queued(ledger)
    backup = make_backup(file, tmp_path / "backups", keep=3, now=NOW)
    ledger.close()
    kill_after_writing(default_url(tmp_path))
    real = Path.rename

    def killed(path: Path, target: Path) -> Path:
        if target == file:
            raise KeyboardInterrupt
        return real(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            restore(backup, file, now=NOW)
    again = open_ledger(default_url(tmp_path))
    assert len(again.find(JobFilter())) == 31
    again.close()


def test_nothing_is_restored_over_a_ledger_that_somebody_has_open(ledger: Ledger, tmp_path: Path) -> None:
    file = tmp_path / "ledger.sqlite"
    queued(ledger)
    backup = make_backup(file, tmp_path / "backups", keep=3, now=NOW)
    queued(ledger, "1.2.9")
    with pytest.raises(LedgerError, match="locked"):
        restore(backup, file, now=NOW)
    assert len(ledger.find(JobFilter())) == 2


def test_a_damaged_ledger_with_a_log_is_put_aside_with_it(ledger: Ledger, tmp_path: Path) -> None:
    file = tmp_path / "ledger.sqlite"
    job = queued(ledger)
    backup = make_backup(file, tmp_path / "backups", keep=3, now=NOW)
    ledger.close()
    kill_after_writing(default_url(tmp_path))
    with file.open("r+b") as damaged:
        damaged.write(b"no database at all")
    file.with_name("ledger.sqlite-wal").write_bytes(b"nor a log of one")
    restore(backup, file, now=NOW)
    again = open_ledger(default_url(tmp_path))
    assert [one.id for one in again.find(JobFilter())] == [job.id]
    again.close()


def test_a_ledger_whose_log_was_removed_is_whole_and_lacks_only_what_was_in_it(ledger: Ledger, tmp_path: Path) -> None:
    job = queued(ledger)
    ledger.close()
    kill_after_writing(default_url(tmp_path))
    for ending in ("-wal", "-shm"):
        (tmp_path / f"ledger.sqlite{ending}").unlink()
    check_file(tmp_path / "ledger.sqlite", full=True)
    again = open_ledger(default_url(tmp_path))
    assert [one.id for one in again.find(JobFilter())] == [job.id]
    again.close()


def test_a_backup_that_is_damaged_changes_nothing(file: Path, tmp_path: Path) -> None:
    backup = make_backup(file, tmp_path / "backups", keep=3, now=NOW)
    os.truncate(backup, backup.stat().st_size // 2)
    before = file.read_bytes()
    with pytest.raises(BackupDamaged, match=f"^backup {backup}: ") as caught:
        restore(backup, file, now=NOW)
    assert "restore a backup" not in str(caught.value)  # that is what was tried
    assert file.read_bytes() == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(("ledger.sqlite.before", "."))]


def test_a_ledger_in_postgresql_is_backed_up_by_its_own_tools() -> None:
    with pytest.raises(LedgerError, match="pg_dump"):
        ledger_file("postgresql+psycopg://node@db/ledger")
