"""The ledger's file: is it whole, a copy of it every day, and the way back from such a copy.

SQLite's own backup API makes the copy, while the node goes on reading and writing. A PostgreSQL ledger has its own
tools: `pg_dump` and `pg_restore` (https://www.postgresql.org/docs/current/backup.html).
"""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, time, timedelta
from pathlib import Path

from sqlalchemy.engine import make_url

from storage.database import BUSY_TIMEOUT_S
from storage.durable import fsync_folder, full_disk_is_no_space, make_folder, temp_beside
from storage.errors import BackupDamaged, LedgerDamaged, LedgerError, NoSpace

_BACKUP = re.compile(r"ledger-(\d{8}T\d{6}Z)\.sqlite")
_STAMP = "%Y%m%dT%H%M%SZ"
_SHOWN_PROBLEMS = 5
_AHEAD = timedelta(hours=1)  # a backup of later than this is of a clock that was wrong
_IN_USE_MS = 1000  # so long somebody may still have a ledger open that is to be replaced
_SIDE_FILES = ("-wal", "-shm")


def ledger_file(url: str) -> Path:
    """The file of a SQLite ledger. Raises `LedgerError` for any other database."""
    parsed = make_url(url)
    if parsed.get_backend_name() != "sqlite" or not parsed.database or parsed.database.startswith((":", "file:")):
        raise LedgerError(
            "the ledger is no SQLite file: back it up and restore it with the database's own tools (PostgreSQL: "
            "pg_dump and pg_restore)"
        )
    return Path(parsed.database)


def check_file(file: Path, *, full: bool = False) -> None:
    """Raise `LedgerDamaged`, naming what SQLite found, unless the file is whole and a ledger.

    Quick: every page is read and in its place (0.3 s of CPU for 130 MB, and the reading). `full`: also each index
    against its table, that no row points to one which is not there, and that it is a ledger at all.
    """
    _check(file, full=full, damaged=_damaged_ledger)


def check_backup(file: Path) -> None:
    """`check_file` in full, for a backup. Raises `BackupDamaged`: the remedy is another one."""
    _check(file, full=True, damaged=_damaged_backup)


def newest_whole(found: Sequence[Path]) -> Path | None:
    """The newest of `backups` (oldest first) that is whole."""
    for backup in reversed(found):
        with suppress(LedgerError, NoSpace):
            check_backup(backup)
            return backup
    return None


def _damaged_ledger(file: Path, found: str) -> LedgerError:
    return LedgerDamaged(f"ledger {file}: {found}; restore a backup: `dicom-node ledger restore FILE`")


def _damaged_backup(file: Path, found: str) -> LedgerError:
    return BackupDamaged(f"backup {file}: {found}")


def _check(file: Path, *, full: bool, damaged: Callable[[Path, str], LedgerError]) -> None:
    pragmas = ("integrity_check", "foreign_key_check") if full else ("quick_check",)
    with _opened(file, "ro", damaged) as connection:
        found = [row for pragma in pragmas for row in connection.execute(f"PRAGMA {pragma}") if row != ("ok",)]
        problems = [" ".join(str(part) for part in row).splitlines()[0] for row in found]
        if (
            full
            and not problems
            and not connection.execute("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'jobs'").fetchone()
        ):
            problems = ["it has no table of jobs: it is no ledger"]
    if problems:
        more = f", and {len(problems) - _SHOWN_PROBLEMS} more" if len(problems) > _SHOWN_PROBLEMS else ""
        raise damaged(file, f"is damaged: {'; '.join(problems[:_SHOWN_PROBLEMS])}{more}")


def backups(folder: Path) -> list[Path]:
    """The backups in a folder, oldest first."""
    return sorted(path for path in folder.glob("ledger-*.sqlite") if _BACKUP.fullmatch(path.name))


def backup_time(backup: Path) -> datetime:
    """When a backup of `backups` was made, by its name."""
    found = _BACKUP.fullmatch(backup.name)
    if found is None:
        raise ValueError(f"{backup.name}: is not the name of a backup")
    return datetime.strptime(found[1], _STAMP).replace(tzinfo=UTC)


def by_now(found: Sequence[Path], now: datetime) -> list[Path]:
    """Those of `backups` that are not of the future: a clock that was wrong made the others."""
    return [backup for backup in found if backup_time(backup) <= now + _AHEAD]


def worth_keeping(found: Sequence[Path], keep: int) -> set[Path]:
    """Of `backups` (oldest first) the `keep` newest, and the newest of each of the `keep` newest days that have one.

    Days are those of this machine's zone, as the time of day that backups are planned for.
    """
    newest_of_day = {backup_time(backup).astimezone().date(): backup for backup in found}
    return {*found[-keep:], *list(newest_of_day.values())[-keep:]}


def is_due(newest: datetime | None, now: datetime, at: time) -> bool:
    """Whether a day's backup is missing. `now` is aware and in the zone of `at`, the time of day.

    One that is of the future is of a clock that was wrong: it counts for nothing.
    """
    planned = datetime.combine(now.date(), at, now.tzinfo)
    if planned > now:
        planned -= timedelta(days=1)
    return newest is None or newest < planned or newest > now + _AHEAD


def make_backup(file: Path, folder: Path, *, keep: int, now: datetime) -> Path:
    """Copy the ledger into `folder`, check the copy, remove what is not `worth_keeping`; where it is.

    Those of the future are counted by themselves: whichever clock was wrong, then or now, the backups of the right one
    stay. Raises `LedgerDamaged` (the ledger, or the copy: then nothing is removed), `NoSpace`,
    `LedgerError`.
    """
    try:
        make_folder(folder)
    except OSError as error:
        raise LedgerError(f"backup folder {folder}: {error.strerror}") from error
    target = folder / f"ledger-{now.astimezone(UTC).strftime(_STAMP)}.sqlite"
    _copy(file, target)
    found = backups(folder)
    past = by_now(found, now)
    kept = worth_keeping(past, max(keep, 1)) | worth_keeping(found[len(past) :], max(keep, 1))
    for backup in found:
        if backup not in kept:
            backup.unlink(missing_ok=True)
    return target


def restore(backup: Path, file: Path, *, now: datetime) -> Path | None:
    """Put a backup in the ledger's place; nobody may have it open. Where the former ledger is now, None without one.

    The ledger is the former one or the backup at any instant, also when this is killed; a former one that is damaged
    may lose its log of changes to the name it gets. Raises `BackupDamaged` for a backup that is none and `LedgerError`
    for a ledger that somebody has open, before anything is changed, and `NoSpace`.
    """
    check_backup(backup)
    fresh = temp_beside(file)
    try:
        _copy(backup, fresh)
        aside = _put_aside(file, now)
        fresh.rename(file)
        fsync_folder(file.parent)
    finally:
        fresh.unlink(missing_ok=True)
    return aside


def _put_aside(file: Path, now: datetime) -> Path | None:
    """A second name for the former ledger; its log of changes must be gone before another file has its name.

    Also the log of one that is lost: SQLite would write what is in it into the file that comes.
    """
    was_there = file.exists()
    if was_there:
        try:
            _take_in_log(file)
        except LedgerError as error:
            if getattr(error.__cause__, "sqlite_errorname", "").startswith("SQLITE_BUSY"):
                raise
            # damaged, or its disk is: what its log has cannot be taken in, and goes aside with it
    aside = file.with_name(f"{file.name}.before-{now.astimezone(UTC).strftime(_STAMP)}")
    if was_there:
        aside.unlink(missing_ok=True)
        aside.hardlink_to(file)
    for ending in _SIDE_FILES:
        with suppress(FileNotFoundError):
            file.with_name(file.name + ending).rename(aside.with_name(aside.name + ending))
    fsync_folder(file.parent)
    return aside if was_there else None


def _take_in_log(file: Path) -> None:
    """Bring what the log has into the ledger itself and remove the log: SQLite does it only when nobody else is in."""
    with _opened(file, "rw") as connection:
        connection.execute(f"PRAGMA busy_timeout = {_IN_USE_MS}")
        connection.execute("PRAGMA journal_mode = DELETE")


def _copy(source: Path, target: Path) -> None:
    """A whole, synced, checked copy under `target`, for the owner's eyes only; or nothing."""
    size = source.stat().st_size if source.exists() else 0
    if shutil.disk_usage(target.parent).free < size:
        raise NoSpace(f"a copy of the ledger needs {size} bytes in {target.parent}")
    temp = temp_beside(target)
    try:
        temp.touch(mode=0o600)
        with _opened(source, "ro") as ours, _opened(temp, "rw") as theirs:
            ours.backup(theirs)
            theirs.execute("PRAGMA journal_mode = DELETE")  # one file, without a log beside it
        check_file(temp)
        with full_disk_is_no_space(target):
            handle = os.open(temp, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
            temp.rename(target)
            fsync_folder(target.parent)
    finally:
        for path in (temp, *(temp.with_name(temp.name + ending) for ending in (*_SIDE_FILES, "-journal"))):
            path.unlink(missing_ok=True)


@contextmanager
def _opened(
    file: Path, mode: str, damaged: Callable[[Path, str], LedgerError] = _damaged_ledger
) -> Iterator[sqlite3.Connection]:
    """A connection of our own, whose errors name the file and the remedy."""
    connection = None
    try:
        connection = sqlite3.connect(f"{file.absolute().as_uri()}?mode={mode}", uri=True, timeout=BUSY_TIMEOUT_S)
        yield connection
    except sqlite3.OperationalError as error:  # of the system: no such file, locked, full
        text = f"ledger {file}: {error}"
        raise NoSpace(text) if "full" in str(error) else LedgerError(text) from error
    except sqlite3.DatabaseError as error:  # of the file
        raise damaged(file, str(error)) from error
    finally:
        if connection is not None:
            connection.close()
