"""Storage Commitment that peers asked of us and that is not reported yet: one file each, so that it outlives a restart.

    commitments/<sha256 of the asking AE title and the Transaction UID>.json

The process that receives writes a request before it is answered; whoever reports removes it. Nothing else is shared.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from storage.durable import is_temp, make_folder, write_file
from storage.errors import NoSpace, StaleState

MOST_WAITING = 10_000  # requests; more are refused: a peer that never takes its reports must not fill the disk


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """One request. `references` are (SOP Class UID, SOP Instance UID); `due`: when it is reported next, by the node."""

    transaction_uid: str
    calling_ae: str
    peer: str  # our name for it
    references: tuple[tuple[str, str], ...]
    asked: datetime
    due: datetime
    attempts: int = 0

    @property
    def key(self) -> str:
        """The name of its file: no text of a peer becomes a path."""
        return hashlib.sha256(f"{self.calling_ae}\n{self.transaction_uid}".encode()).hexdigest()


class AskedCommitments:
    """The requests under a storage root; safe for several processes, of which one at a time reports a request."""

    def __init__(self, root: Path) -> None:
        self._folder = make_folder(root / "commitments")

    def add(self, request: Asked) -> Asked:
        """Keep a request durably; the same one again is kept once, as it was.

        Raises `NoSpace` (the disk is full, or MOST_WAITING requests are here) and `StaleState` for another request
        under the same Transaction UID of the same AE title.
        """
        known = self.get(request.key)
        if known is not None:
            if set(known.references) != set(request.references):
                raise StaleState(f"transaction {request.transaction_uid} asks for other instances already")
            return known
        if sum(1 for _ in self._folder.iterdir()) >= MOST_WAITING:
            raise NoSpace(f"{MOST_WAITING} commitment requests wait for their reports")
        self._write(request)
        return request

    def get(self, key: str) -> Asked | None:
        """One request, or None when it is reported."""
        try:
            raw = self._path(key).read_bytes()
        except FileNotFoundError:
            return None
        return _parsed(raw)

    def waiting(self) -> list[Asked]:
        """All requests, the one that is due first at the front; a file that cannot be read is put aside (`.bad`)."""
        found = []
        for path in self._folder.glob("*.json"):
            try:
                request = self.get(path.stem)
            except (ValueError, KeyError, TypeError):
                path.rename(path.with_suffix(".bad"))
                continue
            found += [request] if request is not None else []
        return sorted(found, key=lambda request: request.due)

    def postpone(self, request: Asked, *, due: datetime, attempts: int) -> None:
        """It is reported again at `due`; fine when it is gone."""
        if self._path(request.key).exists():
            self._write(replace(request, due=due, attempts=attempts))

    def done(self, request: Asked) -> None:
        """It was reported, or given up; fine when it is gone."""
        self._path(request.key).unlink(missing_ok=True)

    def clean_temp(self) -> None:
        """Remove what a kill left half written; only at start, before anything writes."""
        for path in list(self._folder.iterdir()):
            if is_temp(path):
                path.unlink()

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}.json"

    def _write(self, request: Asked) -> None:
        plain = asdict(request) | {"asked": request.asked.isoformat(), "due": request.due.isoformat()}
        write_file(self._path(request.key), (json.dumps(plain).encode(),))


def _parsed(raw: bytes) -> Asked:
    plain: dict[str, Any] = json.loads(raw)
    references: Sequence[Sequence[str]] = plain["references"]
    return Asked(
        transaction_uid=plain["transaction_uid"],
        calling_ae=plain["calling_ae"],
        peer=plain["peer"],
        references=tuple((str(sop_class), str(uid)) for sop_class, uid in references),
        asked=datetime.fromisoformat(plain["asked"]),
        due=datetime.fromisoformat(plain["due"]),
        attempts=int(plain["attempts"]),
    )
