"""Kills a node at its n-th system call, for every n, and counts what is there after the next start.

    python crash_at.py FOLDER CT_FOLDER [EVERY [FIRST]] [--power]

It begins with the `FIRST` call (1) and takes each `EVERY`th (1) from there on.

Prints one line of JSON: how many calls there are, how many were tried, and what was wrong after which.
`os._exit` in the middle is what kill -9 is: nothing is flushed, no `finally` runs. With `--power` it is a power cut at
its worst: names that were given or changed and not synced since are what they were before, bytes that were not synced
are gone. (What was removed stays removed. The ledger's file is SQLite's own: what it committed it synced.)
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from small_node import FolderPacs, SmallNode
from sqlalchemy.engine.default import DefaultDialect

from storage.records import JobState

COUNTED = ("open", "write", "pwrite", "fsync", "rename", "replace", "unlink", "mkdir", "rmdir", "link")
KILLED = 9
RESULTS = 3  # instances of one result: two planes and a picture


class Disk:
    """What a power cut would take below `root`: names and bytes that were not synced."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._made: set[Path] = set()
        self._renamed: list[tuple[Path, Path]] = []
        self._written: set[Path] = set()
        self._rename, self._truncate = os.rename, os.truncate

    def did(self, name: str, args: tuple[Any, ...]) -> None:
        """A call that worked."""
        if name == "mkdir" or (name == "open" and len(args) > 1 and args[1] & os.O_CREAT):
            if (made := Path(args[0])).is_relative_to(self._root):
                self._made.add(made)
        elif name in ("rename", "replace"):
            source, target = Path(args[0]), Path(args[1])
            if target.is_relative_to(self._root):
                self._renamed.append((source, target))
            self._written = {target / p.relative_to(source) if p.is_relative_to(source) else p for p in self._written}
        elif name in ("write", "pwrite", "fsync"):
            path = Path(f"/proc/self/fd/{args[0]}").readlink()
            if name == "fsync":
                self._written.discard(path)
                self._made = {made for made in self._made if made.parent != path}
                self._renamed = [(a, b) for a, b in self._renamed if path not in (a.parent, b.parent)]
            elif path.is_relative_to(self._root):
                self._written.add(path)

    def cut(self) -> None:
        """Now."""
        made = {path for path in self._made if not path.name.startswith("ledger.")}
        for path in self._written:
            if path.is_file():
                self._truncate(path, 0)
        for source, target in reversed(self._renamed):
            if target.exists() and not source.exists():
                source.parent.mkdir(parents=True, exist_ok=True)  # that it was removed is not on the disk either
                self._rename(target, source)
        for path in made:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def arm(at: int, disk: Disk | None) -> None:
    """From now on the `at`-th of the counted calls does not happen; nor does anything after it."""
    left = [at]

    def counted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if not left[0]:
                if disk is not None:
                    disk.cut()
                os._exit(KILLED)
            result = real(*args, **kwargs)
            if disk is not None:
                disk.did(name, args)
            return result

        return call

    for name in COUNTED:
        setattr(os, name, counted(name, getattr(os, name)))
    DefaultDialect.do_commit = counted("commit", DefaultDialect.do_commit)  # type: ignore[method-assign]


def first_life(folder: Path, files: list[Path], at: int, *, power: bool) -> None:
    acknowledged = (folder / "acknowledged").open("a", buffering=1)  # line by line: a kill loses none
    arm(at, Disk(folder / "spool") if power else None)
    node = SmallNode(folder / "spool", FolderPacs(folder / "pacs"))
    node.receive(files, lambda uid: print(uid, file=acknowledged))
    node.run_to_end()


def second_life(folder: Path, files: list[Path], *, all_again: bool) -> None:
    """The sender sends what was not acknowledged, or everything; at the end there is one result, once."""
    pacs = FolderPacs(folder / "pacs")
    node = SmallNode(folder / "spool", pacs)
    known = set((folder / "acknowledged").read_text().split())
    rest = files if all_again else [path for path in files if path.stem not in known]
    if rest:
        node.receive(rest)
    node.run_to_end()
    done = node.jobs(JobState.DONE)
    others = {(job.state.value, job.reason_code) for job in node.jobs()} - {("DONE", "")}
    assert len(done) == 1, [(job.state.value, job.reason_code) for job in node.jobs()]
    assert others <= {("REJECTED", "duplicate_series")}, others
    assert done[0].instances == len(files), done[0].instances
    assert {path.stem for path in node.spool.ct_files(done[0].id)} == {path.stem for path in files}
    assert len(pacs.contents()) == RESULTS, pacs.contents()
    assert set(pacs.contents().values()) == {1}, pacs.contents()
    left = [path for path in (folder / "spool").rglob("*") if path.name.endswith((".tmp", ".old"))]
    assert not left, left
    node.close()


def in_a_child(work: Callable[[], None]) -> tuple[int, str]:
    """The exit code of `work` in a process of its own, and its traceback if it raised."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException:
            os.write(writing, traceback.format_exc()[-2000:].encode())
            os._exit(1)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        text = pipe.read().decode()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), text


def main(folder: Path, ct: Path, every: int, first: int, *, power: bool) -> None:
    files = sorted(ct.glob("*.dcm"))
    wrong, at, tried = [], first, 0
    while True:
        life = folder / f"at{at}"
        life.mkdir()
        code, text = in_a_child(lambda life=life, at=at: first_life(life, files, at, power=power))  # type: ignore[misc]
        if code == 0:
            break
        tried += 1
        if code != KILLED:
            wrong.append([at, text])
        else:
            again = tried % 2 == 0
            code, text = in_a_child(lambda life=life, again=again: second_life(life, files, all_again=again))  # type: ignore[misc]
            if code:
                wrong.append([at, text])
        shutil.rmtree(life, ignore_errors=True)
        at += every
    print(json.dumps({"calls": at - 1, "tried": tried, "wrong": wrong}))


if __name__ == "__main__":
    asked = [argument for argument in sys.argv[1:] if argument != "--power"]
    every, first = (int(asked[place]) if len(asked) > place else 1 for place in (2, 3))
    main(Path(asked[0]), Path(asked[1]), every, first, power="--power" in sys.argv)
