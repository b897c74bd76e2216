"""One instance on its way in: what stays of it, and what does not."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from storage.errors import NoSpace
from storage.incoming_file import PREAMBLE_BYTES, IncomingFolder, own_name_of
from storage.spool import Adopted, Spool

TOKEN = "ab12"


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(tmp_path, min_free_bytes=0)


def content(path: Path) -> bytes:
    return path.read_bytes()[PREAMBLE_BYTES:]


def inbox(spool: Spool) -> list[str]:
    return sorted(path.name for path in (spool.root / "inbox" / "incoming").rglob("*"))


def test_an_instance_that_is_given_up_leaves_no_folder_of_its_association(spool: Spool) -> None:
    file = spool.open_incoming(TOKEN, "1.2.3")
    file.write(b"half")
    file.discard()
    file.discard()
    spool.close_incoming(TOKEN)
    spool.close_incoming(TOKEN)
    assert inbox(spool) == []


def test_one_that_is_given_up_leaves_the_others_of_its_association(spool: Spool) -> None:
    spool.store_incoming(TOKEN, "1.2.3", (b"whole",))
    spool.open_incoming(TOKEN, "1.2.4").discard()
    spool.close_incoming(TOKEN)
    assert inbox(spool) == ["1.2.3.dcm", TOKEN]


def test_the_next_instance_makes_the_folder_again(spool: Spool) -> None:
    spool.open_incoming(TOKEN, "1.2.3").discard()
    assert inbox(spool) == []
    spool.store_incoming(TOKEN, "1.2.3", (b"whole",))
    shutil.rmtree(spool.root / "inbox" / "incoming" / TOKEN)
    assert content(spool.store_incoming(TOKEN, "1.2.4", (b"whole",))) == b"whole"


def test_what_the_assembler_takes_at_that_moment_is_stored_again(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    first = spool.store_incoming(TOKEN, "1.2.3", (b"whole",))

    def taken_away(_one: Path, other: Path) -> bool:
        other.unlink()
        raise FileNotFoundError

    monkeypatch.setattr("storage.incoming_file.same_instance", taken_away)
    assert spool.store_incoming(TOKEN, "1.2.3", (b"whole",)) == first
    assert content(first) == b"whole"


def test_the_halves_of_a_killed_process_go_and_what_is_whole_stays(spool: Spool) -> None:
    whole = spool.store_incoming(TOKEN, "1.2.3", (b"whole",))
    killed = spool.open_incoming(TOKEN, "1.2.4")
    killed.write(b"half")
    alone = spool.open_incoming("cd34", "1.2.5")
    for token in (TOKEN, "cd34", "ef56"):
        spool.drop_halves(token)
    assert inbox(spool) == [whole.name, TOKEN]
    for file in (killed, alone):
        file.discard()


def test_pieces_of_any_size_come_together(tmp_path: Path) -> None:
    file = IncomingFolder(tmp_path, sync=False).open("1.2")
    for piece in (b"a", memoryview(b"bc"), b"", b"d" * 100_000):
        file.write(piece)
    assert content(file.commit()) == b"abc" + b"d" * 100_000


# -- room on the disk

MIB = 1 << 20


def test_the_room_is_asked_for_at_the_beginning_every_16_mib_and_before_the_commit(tmp_path: Path) -> None:
    asked: list[int] = []

    def need_room(n_bytes: int) -> int:
        asked.append(n_bytes)
        return 10**12

    file = IncomingFolder(tmp_path, need_room=need_room, sync=False).open("1.2")
    for _ in range(40):
        file.write(bytes(MIB))
    file.commit()
    assert asked == [0, MIB, MIB, 0]


def test_an_instance_of_an_ordinary_size_asks_twice(tmp_path: Path) -> None:
    asked: list[int] = []

    def need_room(n_bytes: int) -> int:
        asked.append(n_bytes)
        return 10**12

    folder = IncomingFolder(tmp_path, need_room=need_room, sync=False)
    for number in range(3):
        file = folder.open(f"1.{number}")
        for _ in range(9):
            file.write(bytes(60_000))
        file.commit()
    assert asked == [0, 0] * 3


@pytest.mark.parametrize("step", [1, 7, 1000, 5000])
def test_an_instance_has_the_room_that_there_was_when_it_began_however_it_is_cut(tmp_path: Path, step: int) -> None:
    folder = IncomingFolder(tmp_path, need_room=lambda _bytes: 1000, sync=False)

    def write(length: int) -> None:
        file = folder.open(f"1.{length}")
        try:
            for at in range(0, length, step):
                file.write(bytes(min(step, length - at)))
            file.commit()
        finally:
            file.discard()

    write(1000)
    with pytest.raises(NoSpace, match="larger than the 1000 bytes"):
        write(1001)


def test_room_that_others_took_meanwhile_ends_an_instance_in_the_middle(tmp_path: Path) -> None:
    rooms = iter([10**9, MIB - 1])

    def need_room(n_bytes: int) -> int:
        room = next(rooms)
        if room < n_bytes:
            raise NoSpace("taken")
        return room

    file = IncomingFolder(tmp_path, need_room=need_room, sync=False).open("1.2")
    for _ in range(16):
        file.write(bytes(MIB))
    with pytest.raises(NoSpace, match="taken"):
        file.write(bytes(MIB))


# -- one commit of the disk for each instance, and what a power cut leaves


def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is made durable from now on, in this order: "file" or "folder"."""
    done: list[str] = []
    fsync = os.fsync

    def spy(handle: int) -> None:
        done.append("folder" if Path(f"/proc/self/fd/{handle}").readlink().is_dir() else "file")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", spy)
    return done


def test_the_names_of_many_instances_are_made_durable_together(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    done = synced(monkeypatch)
    for number in range(100):
        spool.store_incoming(TOKEN, f"1.2.{number}", (b"whole",))
    assert done.count("file") == 100
    assert done.count("folder") == 1 + 5 + 5  # the association's folder; 1, 2, 4, 8, 16 names; the rest by 16
    assert done[:3] == ["folder", "folder", "file"]


def power_cut(path: Path, torn: Callable[[bytes], bytes] = lambda raw: raw) -> Path:
    """The renaming of an instance was not on the disk yet: it has the name again that was made durable before."""
    slot = path.with_name(".5107.tmp")
    slot.write_bytes(torn(path.read_bytes()))
    path.unlink()
    return slot


def test_an_instance_whose_own_name_was_lost_is_named_again(spool: Spool) -> None:
    path = spool.store_incoming(TOKEN, "1.2.3", (b"who", b"le"))
    power_cut(path)
    assert spool.incoming() == []
    again = Spool(spool.root, min_free_bytes=0)
    assert again.clean_temp() == 0
    assert again.incoming() == [path]
    assert content(path) == b"whole"


def test_a_duplicate_whose_own_name_was_lost_is_no_second_file(spool: Spool) -> None:
    path = spool.store_incoming(TOKEN, "1.2.3", (b"whole",))
    whole = path.read_bytes()
    power_cut(path)
    path.write_bytes(whole)
    assert spool.clean_temp() == 0
    assert inbox(spool) == ["1.2.3.dcm", TOKEN]


TORN: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "cut in its preamble": lambda raw: raw[:100],
    "cut short": lambda raw: raw[:-1],
    "too long": lambda raw: raw + b"\0",
    "a page that was not written": lambda raw: raw[:5000] + bytes(4096) + raw[9096:],
    "no seal": lambda raw: bytes(PREAMBLE_BYTES) + raw[PREAMBLE_BYTES:],
    "half a seal": lambda raw: raw[:20] + bytes(PREAMBLE_BYTES - 20) + raw[PREAMBLE_BYTES:],
}


@pytest.mark.parametrize("how", TORN)
def test_a_torn_file_is_no_instance(spool: Spool, how: str) -> None:
    slot = power_cut(spool.store_incoming(TOKEN, "1.2.3", (os.urandom(20_000),)), TORN[how])
    assert own_name_of(slot) is None
    assert spool.clean_temp() == 1
    assert inbox(spool) == []


def test_what_is_taken_up_is_synced_before_it_has_its_name(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill may have come between the seal and the end of its sync: the bytes are in the cache alone."""
    power_cut(spool.store_incoming(TOKEN, "1.2.3", (b"whole",)))
    done = synced(monkeypatch)
    assert spool.clean_temp() == 0
    assert done == ["file"]


def test_a_slot_that_cannot_be_read_stays_and_the_others_are_taken_up(
    spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [spool.store_incoming(TOKEN, f"1.2.{number}", (b"whole",)) for number in range(3)]
    spool.close_incoming(TOKEN)
    broken = paths[1].rename(paths[1].with_name(".0broken.tmp"))
    power_cut(paths[2])

    def own_name(slot: Path) -> str | None:
        if slot == broken:
            raise OSError(errno.EIO, "Input/output error")
        return own_name_of(slot)

    monkeypatch.setattr("storage.spool.own_name_of", own_name)
    spool.clean_temp()
    assert inbox(spool) == [broken.name, "1.2.0.dcm", "1.2.2.dcm", TOKEN]


def test_a_slot_that_is_named_meanwhile_by_another_process_ends_no_start(
    spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    slot = power_cut(spool.store_incoming(TOKEN, "1.2.3", (b"whole",)))

    def own_name(_slot: Path) -> str | None:
        slot.rename(slot.with_name("1.2.3.dcm"))
        return own_name_of(slot)

    spool.close_incoming(TOKEN)
    monkeypatch.setattr("storage.spool.own_name_of", own_name)
    spool.clean_temp()
    assert inbox(spool) == ["1.2.3.dcm", TOKEN]


def test_an_instance_of_an_earlier_version_without_a_seal_is_the_same(spool: Spool) -> None:
    path = spool.store_incoming(TOKEN, "1.2.3", (b"whole",))
    path.write_bytes(bytes(PREAMBLE_BYTES) + content(path))
    assert spool.store_incoming(TOKEN, "1.2.3", (b"whole",)) == path
    assert spool.adopt(path, "1.2") is Adopted.NEW
    assert spool.adopt(spool.store_incoming("cd34", "1.2.3", (b"whole",)), "1.2") is Adopted.SAME
    assert spool.adopt(spool.store_incoming("cd34", "1.2.3", (b"other",)), "1.2") is Adopted.DIFFERENT


def test_too_many_open_files_leave_no_slot_behind(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    spool.store_incoming(TOKEN, "1.2.3", (b"whole",))
    real = os.open

    def full(path: Any, flags: int, *mode: int) -> int:
        if not flags & os.O_CREAT and str(path).endswith(".tmp"):
            raise OSError(errno.EMFILE, "Too many open files")
        return real(path, flags, *mode)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", full)
        for _ in range(3):
            with pytest.raises(OSError, match="Too many"):
                spool.open_incoming(TOKEN, "1.2.4")
    spool.close_incoming(TOKEN)
    assert inbox(spool) == ["1.2.3.dcm", TOKEN]


def test_an_instance_that_begins_as_its_association_ends_leaves_no_slot(tmp_path: Path) -> None:
    folder = IncomingFolder(tmp_path / TOKEN)
    for number in range(3):
        folder.open(f"1.2.{number}").commit()
    folder.close()
    folder.open("1.2.9").commit()
    assert sorted(path.name for path in (tmp_path / TOKEN).iterdir()) == [
        "1.2.0.dcm",
        "1.2.1.dcm",
        "1.2.2.dcm",
        "1.2.9.dcm",
    ]


def test_the_seal_says_nothing_of_the_sender(spool: Spool) -> None:
    one, other = (spool.store_incoming(token, "1.2.3", (b"whole",)) for token in (TOKEN, "cd34"))
    assert one.read_bytes() == other.read_bytes()
