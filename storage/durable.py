"""Files that appear whole and stay: temp beside the target, write, fsync, rename, fsync of the folder.

A temp file begins with a dot and ends in `.tmp`; whoever lists a folder skips it, whoever starts removes it (but for
whole instances in `incoming`: storage.incoming_file).
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from storage.errors import NoSpace

TEMP_SUFFIX = ".tmp"
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})  # disk, quota, file-size limit


def is_temp(path: Path) -> bool:
    """True for what is being written or removed, or was when its process was killed."""
    return path.name.endswith(TEMP_SUFFIX)


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable: a rename is only then."""
    _fsync(folder, os.O_DIRECTORY)


def fsync_file(path: Path) -> None:
    """Make a file's bytes durable that another process may have written."""
    _fsync(path, 0)


def _fsync(path: Path, kind: int) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | kind)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(folder: Path) -> Path:
    """Make a folder and its parents, durably; fine when it is there."""
    if not folder.is_dir():
        make_folder(folder.parent)
        with full_disk_is_no_space(folder):
            folder.mkdir(mode=0o700, exist_ok=True)  # patients' data: nobody else's
        fsync_folder(folder.parent)
    return folder


def write_temp(target: Path, chunks: Iterable[bytes]) -> Path:
    """Write and fsync a temp file beside `target`; the caller renames it. Raises `NoSpace`, leaving nothing."""
    temp = temp_beside(target)
    with _removed_on_error(temp), full_disk_is_no_space(target), open(temp, "xb", opener=private) as file:
        for chunk in chunks:
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    return temp


def private(path: str, flags: int) -> int:
    """An `opener` for `open`: the file is its owner's alone, whatever the process's umask."""
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


def write_file(target: Path, chunks: Iterable[bytes]) -> None:
    """Write a whole file, replacing what was there. Raises `NoSpace`, leaving what was there."""
    move(write_temp(target, chunks), target)


def move(source: Path, target: Path) -> None:
    """Rename within the file system and make it durable in both folders."""
    with full_disk_is_no_space(target):
        source.rename(target)
    fsync_folder(target.parent)
    if source.parent != target.parent:
        with suppress(FileNotFoundError):  # it was the last one there, and the folder is removed
            fsync_folder(source.parent)


def link_file(source: Path, target: Path) -> None:
    """Give a file a second name, or a copy where the file system has no hard links. The caller fsyncs the folder."""
    try:
        with full_disk_is_no_space(target):
            target.hardlink_to(source)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EXDEV, errno.EMLINK):
            raise
        with source.open("rb") as file:
            temp = write_temp(target, iter(lambda: file.read(1 << 20), b""))
        temp.rename(target)


def remove_tree(folder: Path) -> None:
    """Remove a folder so that a kill leaves it whole or gone (as a temp name), never half."""
    if folder.is_dir():
        trash = temp_beside(folder)
        folder.rename(trash)
        fsync_folder(folder.parent)
        shutil.rmtree(trash)


@contextmanager
def full_disk_is_no_space(target: Path) -> Iterator[None]:
    """Turn the errors of a full disk into `NoSpace`; others pass."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise NoSpace(
            f"writing {target.name}: {os.strerror(error.errno or 0)} on the disk of {target.parent}"
        ) from error


@contextmanager
def _removed_on_error(temp: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:  # also an interrupt: whatever ends the write, no piece stays
        with suppress(FileNotFoundError):
            temp.unlink()
        raise


def temp_beside(target: Path) -> Path:
    """A fresh temp name in the same folder."""
    return target.with_name(f".{uuid4().hex}{TEMP_SUFFIX}")  # not the target's name: a UID and more may exceed NAME_MAX
