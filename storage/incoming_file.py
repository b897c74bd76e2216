"""One instance on its way in, piece by piece: the one way by which anything comes into the inbox."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from storage.durable import fsync_folder, full_disk_is_no_space, same_bytes, temp_beside


class IncomingFile:
    """A temp file beside its place, which `commit` makes durable and gives its name; `discard` leaves nothing.

    The order is write, fsync, rename, fsync of the folder: a name that can be read after a power cut has all its
    bytes, and what `commit` returned has its name. `sync` False leaves both fsyncs out: for measuring only.
    """

    def __init__(self, target: Path, *, sync: bool = True) -> None:
        """Open the temp file; the folder is there. Raises `NoSpace`."""
        self._target = target
        self._sync = sync
        self._temp = temp_beside(target)
        with full_disk_is_no_space(target):
            self._handle = os.open(self._temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._is_there = True  # the temp file

    def write(self, piece: bytes | memoryview) -> None:
        """Append. Raises `NoSpace`; the caller then discards."""
        try:
            written = os.write(self._handle, piece)
            while written < len(piece):  # a signal or an almost full disk: go on with the rest
                written += os.write(self._handle, memoryview(piece)[written:])
        except OSError:
            with full_disk_is_no_space(self._target):  # entered only now: this is called for every piece of every image
                raise

    def commit(self) -> Path:
        """Make it durable; where it is.

        The same UID again on the same association: identical bytes are stored once, other bytes beside the first as
        `<uid>~2.dcm`. Raises `NoSpace`, keeping nothing.
        """
        try:
            if self._sync:
                with full_disk_is_no_space(self._target):
                    os.fsync(self._handle)
            self._close()
            for place in places(self._target):
                if place.exists():
                    with suppress(FileNotFoundError):  # the assembler takes it away at this moment
                        if same_bytes(self._temp, place):
                            return place
                        continue
                with full_disk_is_no_space(self._target):
                    self._temp.rename(place)
                    self._is_there = False
                    if self._sync:
                        fsync_folder(place.parent)
                return place
        finally:
            self.discard()
        raise AssertionError("places are endless")

    def discard(self) -> None:
        """Remove what was written, if it was not committed, and a folder that is empty then; fine when gone."""
        self._close()
        if self._is_there:
            self._is_there = False
            with suppress(FileNotFoundError):
                self._temp.unlink()
            with suppress(OSError):  # not empty, or gone
                self._temp.parent.rmdir()

    def _close(self) -> None:
        if self._handle >= 0:
            handle, self._handle = self._handle, -1
            os.close(handle)


def places(target: Path) -> Iterator[Path]:
    """`a.dcm`, `a~2.dcm`, `a~3.dcm` ..."""
    yield target
    number = 2
    while True:
        yield target.with_name(f"{target.stem}~{number}{target.suffix}")
        number += 1
