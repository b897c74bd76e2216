"""The moment in which `dicom-node doctor` sends its test study: only then may the node's own AE title store anything.

The doctor holds a lock on a file of the storage root, and the kernel lets go of it however the doctor ends. So a
receiver, which has no ledger to look for an announcement in, can tell.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_LOCK = "doctor.lock"


def is_locked(file: Path) -> bool:
    """Whether another process holds the lock of this file; False where there is no such file."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


@contextmanager
def sending_a_test(root: Path) -> Iterator[None]:
    """A test study is sent to the node of this storage root; waits for another one that is. Raises OSError."""
    descriptor = os.open(root / _LOCK, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def a_test_is_sent(root: Path) -> bool:
    """Whether a doctor is sending a test study just now. Raises OSError for a file that cannot be opened."""
    return is_locked(root / _LOCK)
