"""A scripted PACS on loopback: a real pynetdicom SCP that does what a test needs a PACS to do wrong.

    with FakePacs(status_for=half_fail) as pacs:
        send_series(files, pacs.peer(), calling_ae="SYNPET")
    assert pacs.instances == {...}

It keeps the bytes of each data set that it answered with Success or a warning, and counts everything else.
"""

from __future__ import annotations

import hashlib
import socket
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ports import free_port as free_port
from pydicom import Dataset
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import AE, evt
from pynetdicom.sop_class import (  # type: ignore[attr-defined]
    PositronEmissionTomographyImageStorage,
    SecondaryCaptureImageStorage,
    Verification,
)

from dicom_node.config import PeerConfig

RESULT_CLASSES = (SecondaryCaptureImageStorage, PositronEmissionTomographyImageStorage)
StatusFor = Callable[[str, int], int]  # (SOP Instance UID, how many times this one was sent: 1, 2, ...) -> status


def always_stored(_sop_instance_uid: str, _times: int) -> int:
    return 0x0000


@dataclass
class Received:
    """What the PACS got. `digests`: SOP Instance UID -> the digests of the data sets that it stored under it."""

    digests: dict[str, set[str]] = field(default_factory=dict)
    series: dict[str, set[str]] = field(default_factory=dict)  # SeriesInstanceUID -> SOP Instance UIDs
    order: list[str] = field(default_factory=list)  # SOP Instance UIDs in order of arrival, also refused ones
    attempts: Counter[str] = field(default_factory=Counter)
    syntaxes: Counter[str] = field(default_factory=Counter)
    associations: int = 0
    echoes: int = 0


class FakePacs:
    """The SCP. Every argument is one thing that can be wrong with a PACS.

    `ae_title` with `require_called` refuses who calls it otherwise; `known_callers` refuses unknown calling AE
    titles; `classes` are the storage SOP classes it takes, `syntaxes` the transfer syntaxes; `status_for` answers
    each instance; `abort_after` aborts an association after so many instances (once for each number in it).
    `delay_s` holds each response, so that a test can strike in the middle.
    """

    def __init__(
        self,
        *,
        ae_title: str = "PACS",
        port: int = 0,
        require_called: bool = False,
        known_callers: Sequence[str] = (),
        classes: Sequence[str] = RESULT_CLASSES,
        syntaxes: Sequence[str] = (ExplicitVRLittleEndian, ImplicitVRLittleEndian),
        status_for: StatusFor = always_stored,
        abort_after: Sequence[int] = (),
        delay_s: float = 0.0,
        max_associations: int = 10,
    ) -> None:
        self.ae_title, self.port = ae_title, port
        self.received = Received()
        self.got_one = threading.Event()  # set at the first instance
        self._status_for, self._abort_after = status_for, list(abort_after)
        self.delay_s = delay_s  # may be changed while it runs
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._here = 0  # instances on the running association
        self._ae = AE(ae_title=ae_title)
        self._ae.require_called_aet = require_called
        self._ae.require_calling_aet = list(known_callers)
        self._ae.maximum_associations = max_associations
        self._ae.add_supported_context(Verification)
        for sop_class in classes:
            self._ae.add_supported_context(sop_class, list(syntaxes))
        self._server: Any = None

    def __enter__(self) -> FakePacs:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def handlers(self) -> list[Any]:
        return [
            (evt.EVT_ACCEPTED, self._on_accepted),
            (evt.EVT_CONN_OPEN, self._on_open),
            (evt.EVT_C_STORE, self._on_store),
            (evt.EVT_C_ECHO, self._on_echo),
        ]

    def start(self) -> None:
        self._stopped.clear()
        self._server = self._ae.make_server(("127.0.0.1", self.port), evt_handlers=self.handlers())
        self._ae._servers.append(self._server)  # as AE.start_server does: shutdown() removes it
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), name="fake-pacs")
        self._thread.start()

    def stop(self) -> None:
        """Go away, as a PACS that is switched off; `start` comes back on the same port with everything it had."""
        self._stopped.set()
        if self._server is not None:
            self._ae.shutdown()
            self._thread.join()
            self._server = None

    def peer(self, name: str = "pacs", **changes: Any) -> PeerConfig:
        """The configuration of this PACS as a peer."""
        return PeerConfig(**{"name": name, "ae_title": self.ae_title, "port": self.port, **changes})

    @property
    def instances(self) -> set[str]:
        """The SOP Instance UIDs that it stored."""
        with self._lock:
            return set(self.received.digests)

    def _on_open(self, event: evt.Event) -> None:
        event.assoc.dul.socket.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def _on_accepted(self, _event: evt.Event) -> None:
        with self._lock:
            self.received.associations += 1
            self._here = 0

    def _on_echo(self, _event: evt.Event) -> int:
        self.received.echoes += 1
        return 0x0000

    def _on_store(self, event: evt.Event) -> int:
        self._stopped.wait(self.delay_s)
        uid = str(event.request.AffectedSOPInstanceUID)
        raw = event.request.DataSet.getvalue()
        with self._lock:
            got = self.received
            got.order.append(uid)
            got.attempts[uid] += 1
            got.syntaxes[str(event.context.transfer_syntax)] += 1
            self._here += 1
            if self._abort_after and self._here > self._abort_after[0]:
                self._abort_after.pop(0)
                event.assoc.abort()
                return 0xA700
            status = self._status_for(uid, got.attempts[uid])
            if status == 0 or 0xB000 <= status <= 0xBFFF:
                got.digests.setdefault(uid, set()).add(hashlib.sha256(raw).hexdigest())
                got.series.setdefault(_series_uid(event.dataset), set()).add(uid)
        self.got_one.set()
        return status


def _series_uid(ds: Dataset) -> str:
    return str(ds.SeriesInstanceUID)
