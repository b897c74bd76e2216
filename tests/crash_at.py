"""Kills a node at its n-th system call, for every n, and counts what is there after the next start.

    python crash_at.py FOLDER CT_FOLDER [EVERY]

Prints one line of JSON: how many calls there are, how many were tried, and what was wrong after which.
`os._exit` in the middle is what kill -9 is: nothing is flushed, no `finally` runs.
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

COUNTED = ("open", "write", "fsync", "rename", "replace", "unlink", "mkdir", "rmdir", "link")
KILLED = 9
RESULTS = 3  # instances of one result: two planes and a picture


def arm(at: int) -> None:
    """From now on the `at`-th of the counted calls does not happen; nor does anything after it."""
    left = [at]

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if not left[0]:
                os._exit(KILLED)
            return real(*args, **kwargs)

        return call

    for name in COUNTED:
        setattr(os, name, counted(getattr(os, name)))
    DefaultDialect.do_commit = counted(DefaultDialect.do_commit)  # type: ignore[method-assign]


def first_life(folder: Path, files: list[Path], at: int) -> None:
    acknowledged = (folder / "acknowledged").open("a", buffering=1)  # line by line: a kill loses none
    arm(at)
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


def main(folder: Path, ct: Path, every: int) -> None:
    files = sorted(ct.glob("*.dcm"))
    wrong, at, tried = [], 1, 0
    while True:
        life = folder / f"at{at}"
        life.mkdir()
        code, text = in_a_child(lambda life=life, at=at: first_life(life, files, at))  # type: ignore[misc]
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
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 1)
