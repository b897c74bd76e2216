"""With which configuration the running node was started: a digest of it lies in the file that the node locks."""

from __future__ import annotations

import hashlib
from pathlib import Path

from dicom_node.config import Config

LOCK = "node.lock"


def digest(config: Config) -> str:
    """Another one for every key that has another value; layout and comments of the file do not count."""
    return hashlib.sha256(config.model_dump_json().encode()).hexdigest()


def started_with(root: Path) -> str:
    """The digest that the node on this storage root was started with; "" where nobody can tell."""
    try:
        return (root / LOCK).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""
