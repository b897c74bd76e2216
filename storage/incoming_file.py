"""One instance on its way in, piece by piece: the one way by which anything comes into the inbox.

Success may be said after one commit of the disk, not two. The file is written under a name that was made durable
before, with others like it (a slot), and begins with a seal: what it holds and for which instance. Bytes and seal are
synced together; then the file gets its own name, which need not be durable. After a power cut a whole file lies under
the one name or the other, and `own_name_of` tells a whole file from a torn one.
"""

from __future__ import annotations

import os
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from xxhash import xxh3_64

from storage.durable import fsync_folder, full_disk_is_no_space, make_folder, temp_beside
from storage.errors import NoSpace

PREAMBLE_BYTES = 128  # of a DICOM file, for whoever writes it (PS3.10 section 7.1): the seal stands there
_SEAL = struct.Struct("<16sQ8s64s32x")  # magic, length of what follows the preamble, its XXH3, SOP Instance UID
_MAGIC = b"dicom-node seal1"
_MOST_SLOTS = 16  # made at once
_CHUNK = 1 << 20
_LOOK_EVERY = 16 << 20  # bytes of an instance after which the room on the disk is asked for again: others write, too


class IncomingFolder:
    """Where the instances of one association are written, one at a time. Its end may be told by another thread.

    `need_room` gets how many bytes come, returns how many may, and raises `NoSpace` when those are fewer. `sync` False
    leaves every sync out: for measuring only.
    """

    def __init__(
        self, folder: Path, *, need_room: Callable[[int], int] = lambda _bytes: sys.maxsize, sync: bool = True
    ) -> None:
        self._folder = folder
        self._need_room = need_room
        self._sync = sync
        self._lock = threading.Lock()
        self._slots: list[Path] = []
        self._made = 0
        self._is_over = False  # its last instance may still be on its way

    def open(self, sop_instance_uid: str) -> IncomingFile:
        """A file for an instance; the UID is checked. Raises `NoSpace`, keeping nothing."""
        target = self._folder / f"{sop_instance_uid}.dcm"
        room = self._need_room(0)
        with self._lock, full_disk_is_no_space(target):
            try:
                return self._opened(target, room)
            except FileNotFoundError:  # somebody emptied or removed the folder
                self._drop_slots()
                return self._opened(target, room)

    def close(self) -> None:
        """The association is over: remove what it did not use, and the folder when it is empty then. Never raises."""
        with self._lock:
            self._is_over = True
            self._drop_slots()
            with suppress(OSError):  # not empty, or gone
                self._folder.rmdir()

    def _opened(self, target: Path, room: int) -> IncomingFile:
        if not self._slots:
            self._make_slots()
        file = IncomingFile(target, self._slots[-1], room=room, need_room=self._need_room, sync=self._sync)
        self._slots.pop()
        return file

    def _drop_slots(self) -> None:
        slots, self._slots = self._slots, []
        for slot in slots:
            with suppress(OSError):  # gone; whatever else stays until the next start
                slot.unlink()

    def _make_slots(self) -> None:
        """Empty files whose names are durable: one at first, and more at once the more instances come."""
        make_folder(self._folder)
        self._made = 1 if self._is_over else min(2 * self._made or 1, _MOST_SLOTS)
        try:
            for _ in range(self._made):
                slot = temp_beside(self._folder / "slot")
                os.close(os.open(slot, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
                self._slots.append(slot)
            if self._sync:
                fsync_folder(self._folder)
        except OSError:
            self._drop_slots()
            raise


class IncomingFile:
    """A file that is being written in a slot; `commit` makes it durable and names it, `discard` leaves nothing.

    The order is write, seal, fsync, rename: a name that can be read after a power cut has all its bytes.
    """

    def __init__(self, target: Path, slot: Path, *, room: int, need_room: Callable[[int], int], sync: bool) -> None:
        """`room` bytes may come, as of now. Raises FileNotFoundError when the slot is gone."""
        self._target = target
        self._slot = slot
        self._room = room
        self._need_room = need_room
        self._look_at = min(room, _LOOK_EVERY)  # where the room is asked for before more is written
        self._sync = sync
        self._hash, self._length = xxh3_64(), 0
        self._handle = os.open(slot, os.O_WRONLY | os.O_CLOEXEC)
        self._is_there = True  # the slot
        os.lseek(self._handle, PREAMBLE_BYTES, os.SEEK_SET)

    def write(self, piece: bytes | memoryview) -> None:
        """Append what follows the preamble. Raises `NoSpace`; the caller then discards."""
        if self._length + len(piece) > self._look_at:
            self._look_for_room(len(piece))
        try:
            written = os.write(self._handle, piece)
            while written < len(piece):  # a signal or an almost full disk: go on with the rest
                written += os.write(self._handle, memoryview(piece)[written:])
        except OSError:
            with full_disk_is_no_space(self._target):  # entered only now: this is called for every piece of every image
                raise
        self._hash.update(piece)
        self._length += len(piece)

    def commit(self) -> Path:
        """Make it durable; where it is.

        The same UID again on the same association: identical bytes are stored once, other bytes beside the first as
        `<uid>~2.dcm`. Raises `NoSpace`, keeping nothing.
        """
        try:
            self._need_room(0)  # others came at the same time
            with full_disk_is_no_space(self._target):
                uid = self._target.stem.encode("ascii")
                os.pwrite(self._handle, _SEAL.pack(_MAGIC, self._length, self._hash.digest(), uid), 0)
                if self._sync:
                    os.fsync(self._handle)
            self._close()
            place = give_name(self._slot, self._target)
            self._is_there = False
            return place
        finally:
            self.discard()

    def discard(self) -> None:
        """Remove what was written, if it was not committed, and a folder that is empty then; fine when gone."""
        self._close()
        if self._is_there:
            self._is_there = False
            self._slot.unlink(missing_ok=True)
            with suppress(OSError):  # not empty, or gone
                self._slot.parent.rmdir()

    def _look_for_room(self, n_bytes: int) -> None:
        """For `n_bytes` more: in what there was at the beginning, and in what is left now.

        The first is how an instance of known size is judged. The second is for many at once, who were all told of the
        same room.
        """
        total = self._length + n_bytes
        if total > self._room:
            raise NoSpace(f"{self._target.name} is larger than the {self._room} bytes that its disk could take")
        self._need_room(n_bytes)
        self._look_at = min(self._room, total + _LOOK_EVERY)

    def _close(self) -> None:
        if self._handle >= 0:
            handle, self._handle = self._handle, -1
            os.close(handle)


def give_name(slot: Path, target: Path) -> Path:
    """Rename a whole file to `target` or, where other bytes have that name, to `<uid>~2.dcm`; where it is.

    Where the same bytes have one of these names it is removed. Raises `NoSpace`.
    """
    for place in places(target):
        if place.exists():
            with suppress(FileNotFoundError):  # the assembler takes it away at this moment
                if same_instance(slot, place):
                    slot.unlink()
                    return place
                continue
        with full_disk_is_no_space(target):
            slot.rename(place)
        return place
    raise AssertionError("places are endless")


def same_instance(one: Path, other: Path) -> bool:
    """Whether two files hold the same bytes but for the preamble, which earlier versions left empty."""
    if one.stat().st_size != other.stat().st_size:
        return False
    with one.open("rb") as mine, other.open("rb") as theirs:
        mine.seek(PREAMBLE_BYTES)
        theirs.seek(PREAMBLE_BYTES)
        while piece := mine.read(_CHUNK):
            if piece != theirs.read(_CHUNK):
                return False
    return True


def own_name_of(path: Path) -> str | None:
    """The name of the instance that a file in a slot holds, if it is whole: sealed, and its bytes are those."""
    with path.open("rb") as file:
        preamble = file.read(PREAMBLE_BYTES)
        if len(preamble) < _SEAL.size:
            return None
        magic, length, digest, uid = _SEAL.unpack(preamble)
        if magic != _MAGIC or path.stat().st_size != PREAMBLE_BYTES + length:
            return None
        found = xxh3_64()
        while piece := file.read(_CHUNK):
            found.update(piece)
    return uid.rstrip(b"\0").decode("ascii") + ".dcm" if found.digest() == digest else None


def places(target: Path) -> Iterator[Path]:
    """`a.dcm`, `a~2.dcm`, `a~3.dcm` ..."""
    yield target
    number = 2
    while True:
        yield target.with_name(f"{target.stem}~{number}{target.suffix}")
        number += 1
