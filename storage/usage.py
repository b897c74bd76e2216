"""How many bytes the spool's folders hold."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

FOLDERS = ("inbox", "work", "outbox", "references", "jobs", "commitments", "quarantine", "backups")


def bytes_by_folder(root: Path) -> dict[str, int]:
    """Bytes of the files in each of the spool's top folders; a file with several names counts once in each."""
    return {name: folder_bytes(root / name) for name in FOLDERS}


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below; what is removed meanwhile, or closed to us, does not count. 0 without the folder."""
    seen: set[int] = set()
    total = 0
    for status in _files(folder):
        if status.st_nlink > 1:
            if status.st_ino in seen:
                continue
            seen.add(status.st_ino)
        total += status.st_size
    return total


def _files(folder: Path | str) -> Iterator[os.stat_result]:
    with suppress(FileNotFoundError, PermissionError), os.scandir(folder) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):
                if entry.is_dir(follow_symlinks=False):
                    yield from _files(entry.path)
                elif entry.is_file(follow_symlinks=False):
                    yield entry.stat(follow_symlinks=False)
