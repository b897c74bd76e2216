"""A scripted archive that is asked for studies: C-FIND at STUDY and SERIES level, C-MOVE and C-GET of real files.

    with FakeRetrieve(paths, node_port=port) as archive:
        archive.peer()

`script` says what it does wrong in a retrieval: see `Script`. Everything it was asked is in `asked`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

from pydicom import Dataset, dcmread
from pydicom.uid import CTImageStorage
from pynetdicom import AE, evt
from pynetdicom.sop_class import Verification  # type: ignore[attr-defined]

from dicom_node.config import PeerConfig

FIND, MOVE, GET = (f"1.2.840.10008.5.1.4.1.2.2.{number}" for number in (1, 2, 3))
WAIT_S = 60.0


class Script(StrEnum):
    """What the archive does when it is asked for a series."""

    SENDS = "sends"
    UNKNOWN_DESTINATION = "unknown destination"
    REFUSES = "refuses"
    SILENT = "silent"  # answers nothing until it is stopped
    ENDLESS = "endless"  # sends the first instance again and again
    HALF = "half"  # sends half, and says that the other half failed
    NOTHING = "nothing"  # says Success and sends nothing
    ABORTS = "aborts"


class FakeRetrieve:
    """`find_status` answers every C-FIND but with Success; `shows_all` ignores every matching key but the level.

    `classes` are the services it offers. `counts` False leaves NumberOfSeriesRelatedInstances empty.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        *,
        node_port: int = 0,
        node_ae: str = "SYNPET",
        script: Script = Script.SENDS,
        find_status: int = 0x0000,
        shows_all: bool = False,
        counts: bool = True,
        classes: Sequence[str] = (FIND, MOVE, GET),
        modality: str = "CT",
    ) -> None:
        self.instances = [dcmread(path) for path in paths]
        self.script, self.find_status, self.shows_all, self.counts = script, find_status, shows_all, counts
        self.node_port, self.node_ae, self.modality = node_port, node_ae, modality
        self.asked: list[tuple[str, str]] = []  # (FIND, MOVE or GET with the level, the UID or number)
        self.queries: list[Dataset] = []
        self.stopped = threading.Event()
        self._ae = AE("ARCHIVE")
        self._ae.add_supported_context(Verification)
        for sop_class in classes:
            self._ae.add_supported_context(sop_class)
        self._ae.add_supported_context(CTImageStorage, scu_role=True, scp_role=True)
        self._ae.add_requested_context(CTImageStorage)
        self._server: Any = None

    def __enter__(self) -> FakeRetrieve:
        handlers = [
            (evt.EVT_C_ECHO, lambda _event: 0x0000),
            (evt.EVT_C_FIND, self._on_find),
            (evt.EVT_C_MOVE, self._on_move),
            (evt.EVT_C_GET, self._on_get),
        ]
        self._server = self._ae.start_server(("127.0.0.1", 0), block=False, evt_handlers=handlers)
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self._ae.shutdown()

    def peer(self, **changes: Any) -> PeerConfig:
        """The archive as a peer that may be asked for everything, and may store."""
        port = self._server.server_address[1]
        known = {"name": "archive", "ae_title": "ARCHIVE", "port": port, "we_may": ("find", "move", "get")}
        return PeerConfig(**{**known, **changes})

    @property
    def moves(self) -> list[str]:
        """The Series Instance UIDs that were asked for, by C-MOVE or C-GET."""
        return [what for how, what in self.asked if how in ("MOVE", "GET")]

    def _on_find(self, event: evt.Event) -> Iterator[tuple[int, Dataset | None]]:
        query = event.identifier
        level = str(query.QueryRetrieveLevel)
        self.queries.append(query)
        self.asked.append((f"FIND {level}", str(query.get("AccessionNumber") or query.get("StudyInstanceUID") or "")))
        if self.find_status:
            yield self.find_status, None
            return
        keyword = "StudyInstanceUID" if level == "STUDY" else "SeriesInstanceUID"
        seen: dict[str, Dataset] = {}
        for ds in self.instances:
            if self.shows_all or self._matches(ds, query):
                seen.setdefault(str(ds[keyword].value), ds)
        for ds in seen.values():
            yield 0xFF00, self._answer(ds, query, level)

    def _matches(self, ds: Dataset, query: Dataset) -> bool:
        for keyword in ("AccessionNumber", "StudyInstanceUID"):
            wanted = str(query.get(keyword) or "")
            if wanted and wanted != str(ds.get(keyword) or ""):
                return False
        first, _, last = str(query.get("StudyDate") or "").partition("-")
        return not first or first <= str(ds.StudyDate) <= (last or first)

    def _answer(self, ds: Dataset, query: Dataset, level: str) -> Dataset:
        answer = Dataset()
        answer.QueryRetrieveLevel = level
        answer.StudyInstanceUID = ds.StudyInstanceUID
        if level == "STUDY":
            answer.AccessionNumber, answer.StudyDate = ds.AccessionNumber, ds.StudyDate
            answer.StudyDescription = ds.get("StudyDescription", "")
            answer.ModalitiesInStudy = [self.modality, "SR"]
        else:
            mine = [one for one in self.instances if one.SeriesInstanceUID == ds.SeriesInstanceUID]
            answer.SeriesInstanceUID, answer.Modality = ds.SeriesInstanceUID, self.modality
            answer.SeriesDescription = ds.SeriesDescription
            answer.StationName = ds.get("StationName", "")
            if "NumberOfSeriesRelatedInstances" in query:
                answer.NumberOfSeriesRelatedInstances = len(mine) if self.counts else None
        return answer

    def _on_move(self, event: evt.Event) -> Iterator[Any]:
        self.asked.append(("MOVE", str(event.identifier.SeriesInstanceUID)))
        known = event.move_destination == self.node_ae and self.script is not Script.UNKNOWN_DESTINATION
        yield ("127.0.0.1", self.node_port) if known else (None, None)
        yield from self._send(event)

    def _on_get(self, event: evt.Event) -> Iterator[Any]:
        self.asked.append(("GET", str(event.identifier.SeriesInstanceUID)))
        yield from self._send(event)

    def _send(self, event: evt.Event) -> Iterator[Any]:
        series_uid = event.identifier.SeriesInstanceUID
        found = [ds for ds in self.instances if ds.SeriesInstanceUID == series_uid]
        if self.script is Script.SILENT:
            self.stopped.wait(WAIT_S)
        if self.script is Script.ABORTS:
            event.assoc.abort()
        yield 0 if self.script is Script.NOTHING else len(found) if self.script is not Script.ENDLESS else 60_000
        if self.script is Script.REFUSES:
            yield 0xA702, None
            return
        if self.script is Script.ENDLESS:
            while not event.is_cancelled and not self.stopped.is_set() and event.assoc.is_established:
                yield 0xFF00, found[0]
            yield 0xFE00, None
            return
        if self.script is Script.NOTHING:
            return
        for number, ds in enumerate(found):
            broken = self.script is Script.HALF and number % 2 == 1
            yield 0xFF00, _unsendable(ds) if broken else ds


def _unsendable(ds: Dataset) -> Dataset:
    """The same instance, of a class that nobody agreed on: pynetdicom counts it as failed."""
    other = Dataset()
    other.SOPClassUID, other.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.4", ds.SOPInstanceUID
    return other
