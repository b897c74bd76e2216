"""What tells the assembler about instances that were fetched (C-GET), maybe by a command beside the running node.

    inbox/fetched/<token>     everything of this association's series came: nobody waits for the rest

An association that a peer opens is in the registry of the node's process; a fetch of another process is not.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from storage.durable import make_folder, write_file
from storage.spool import TOKEN, check_token

_KEEP_S = 31 * 86400.0  # longer than any series waits for its rest


class FetchedTokens:
    """The fetches under a storage root; safe for several processes."""

    def __init__(self, root: Path) -> None:
        self._incoming = root / "inbox" / "incoming"
        self._folder = make_folder(root / "inbox" / "fetched")

    @contextmanager
    def open(self, token: str) -> Iterator[None]:
        """While instances come: the folder of the token stays, though the assembler removes empty ones."""
        folder = make_folder(self._incoming / check_token(token))
        held = folder / ".fetching.tmp"
        held.touch()
        try:
            yield
        finally:
            held.unlink(missing_ok=True)

    def mark_whole(self, token: str) -> None:
        """Everything came: durably, after the last instance. Old marks go."""
        oldest = time.time() - _KEEP_S
        for path in list(self._folder.iterdir()):
            if path.stat().st_mtime < oldest:
                path.unlink(missing_ok=True)
        write_file(self._folder / check_token(token), (b"",))

    def is_whole(self, token: str) -> bool:
        """Whether `mark_whole` was called for it; False for what is no token."""
        return bool(TOKEN.fullmatch(token)) and (self._folder / token).is_file()
