"""The ledger's backup of every day: due when the last one is older than the configured time of day."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, time
from pathlib import Path

import structlog

from dicom_node.config import Config
from storage.backup import backup_time, backups, by_now, is_due, ledger_file, make_backup
from storage.errors import LedgerError, NoSpace
from storage.ledger import Ledger, utc_now

log = structlog.get_logger()


def backup_folder(config: Config) -> Path:
    """`[storage].backup_folder`, else `backups` in the storage root."""
    chosen = config.storage.backup_folder
    return Path(chosen) if chosen else config.storage.root / "backups"


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
