"""Whether a node runs, and with which configuration it was started: a digest of it lies in the file that it locks."""

from __future__ import annotations

import hashlib
from pathlib import Path

from dicom_node.config import Config
from dicom_node.net.trial_lock import is_locked

LOCK = "node.lock"


def node_runs_on(root: Path) -> bool:
    """Whether a node runs on this storage root; also where its lock cannot be looked at by this user."""
    try:
        return is_locked(root / LOCK)
    except PermissionError:
        return True  # nobody but a node makes the lock
    except OSError:  # the root is no folder
        return False


def digest(config: Config) -> str:
    """Another one for every key that has another value; layout and comments of the file do not count."""
    return hashlib.sha256(config.model_dump_json().encode()).hexdigest()


def started_with(root: Path) -> str:
    """The digest that the node on this storage root was started with; "" where nobody can tell."""
    try:
        return (root / LOCK).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""
