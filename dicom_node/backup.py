"""The ledger's backup of every day: due when the last one is older than the configured time of day."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, time
from pathlib import Path

import structlog

from dicom_node.config import Config
from storage.backup import backup_time, backups, by_now, is_due, ledger_file, make_backup
from storage.errors import LedgerDamaged, LedgerError, NoSpace
from storage.ledger import Ledger, utc_now

log = structlog.get_logger()


def backup_folder(config: Config) -> Path:
    """`[storage].backup_folder`, else `backups` in the storage root."""
    chosen = config.storage.backup_folder
    return Path(chosen) if chosen else config.storage.root / "backups"


def newest_backup(config: Config) -> Path | None:
    """The newest backup of the ledger that is not of the future; None without one."""
    found = by_now(backups(backup_folder(config)), utc_now())
    return found[-1] if found else None


def lost_ledger(config: Config) -> str:
    """What became of the ledger that this storage root has had, and what to do; "" where it is, or never was.

    `node.id` is written when the ledger has been made: a root with it and without a ledger has lost one. An empty
    file is none either: SQLite would make a new ledger of it without a word.
    """
    root = config.storage.root
    if not config.has_ledger_file or not (root / "node.id").exists():
        return ""
    file = ledger_file(config.ledger_url)
    if file.is_file() and file.stat().st_size:
        return ""
    found = "is empty" if file.is_file() else "is not there"
    newest = newest_backup(config)
    restore = f"restore the newest backup: `dicom-node ledger restore {newest}`"
    if newest is None:
        restore = f"there is no backup in {backup_folder(config)}"
    anew = f"to begin a new ledger without what persons decided: remove {root / 'node.id'}, and start the node"
    return f"ledger {file}: {found}, and a node has run on [storage].root = {root}; {restore}; {anew}"


def check_not_lost(config: Config) -> None:
    """Raise `LedgerDamaged`, saying what to do, for a `lost_ledger`: nothing may be made in its place."""
    if lost := lost_ledger(config):
        raise LedgerDamaged(lost)


class Backups:
    """Looks whether a backup is due, and makes it. `tick` is called every few minutes by one thread."""

    def __init__(self, config: Config, ledger: Ledger, *, clock: Callable[[], datetime] = utc_now) -> None:
        storage = config.storage
        self._folder, self._keep = backup_folder(config), storage.keep_backups
        self._at = time.fromisoformat(storage.backup_at)
        self._ledger, self._clock = ledger, clock
        self._file = ledger_file(config.ledger_url) if storage.keep_backups and config.has_ledger_file else None
        self._told = ""

    def tick(self) -> None:
        """Make the backup that is due. A failure is told once for each reason, and tried again at the next tick."""
        if self._file is None:
            return
        now = self._clock()
        found = by_now(backups(self._folder), now)
        newest = backup_time(found[-1]) if found else None
        if not is_due(newest, now.astimezone(), self._at):
            return
        try:
            made = make_backup(self._file, self._folder, keep=self._keep, now=now)
        except (LedgerError, NoSpace, OSError) as error:
            reason = str(error) if not isinstance(error, OSError) else f"{self._folder}: {error.strerror}"
            log.error("ledger.backup_failed", reason=reason)
            if reason != self._told:
                self._told = reason
                self._ledger.note("", "backup_failed", reason)
            return
        self._told = ""
        log.info("ledger.backed_up", file=made.name, bytes=made.stat().st_size)
