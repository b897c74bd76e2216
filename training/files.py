"""Writing files so that they are whole or absent."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from pipeline.durable import sync_folder


def write_whole(path: Path, data: bytes) -> None:
    """Temp file beside the target, fsync, rename, fsync of the folder."""
    temp = path.with_name(path.name + ".tmp")
    with temp.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temp.replace(path)
    sync_folder(path.parent)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
