"""The demo's embedded PACS: pynetdicom's `qrscp` application in a process of its own, and what we ask of it.

It stores, answers C-FIND, and moves a study to the node by C-MOVE, as an archive's auto-routing would. It listens
on loopback only. For a real archive see docs/orthanc.md.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from random import SystemRandom

from pydicom import Dataset
from pydicom.uid import PositronEmissionTomographyImageStorage, SecondaryCaptureImageStorage
from pynetdicom import AE, build_role, evt
from pynetdicom.association import Association

from dicom_node.errors import NodeError

# PS3.4 annex C.6.2: pynetdicom makes these names at run time, which a type checker cannot see
STUDY_ROOT_FIND = "1.2.840.10008.5.1.4.1.2.2.1"
STUDY_ROOT_MOVE = "1.2.840.10008.5.1.4.1.2.2.2"
STUDY_ROOT_GET = "1.2.840.10008.5.1.4.1.2.2.3"
PENDING = (0xFF00, 0xFF01)
START_TIMEOUT_S = 60.0
_PORTS = range(12_000, 32_000)


class PacsError(NodeError):
    """The demo's PACS did not start or refused a request."""


def free_ports(count: int) -> list[int]:
    """Ports on loopback that nobody has now, of those that the kernel gives to nobody who asks for any port."""
    found: list[int] = []
    for port in SystemRandom().sample(_PORTS, len(_PORTS)):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            return found
    raise PacsError("no port of loopback is free")


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoPacs:
    """Where the running PACS is, and the requests of the demo."""

    ae_title: str
    port: int
    calling_ae: str

    def series(self, study_uid: str) -> list[Dataset]:
        """C-FIND at series level: UID, modality, description. `qrscp` answers once per instance: one is kept."""
        query = Dataset()
        query.QueryRetrieveLevel = "SERIES"
        query.StudyInstanceUID = study_uid
        for keyword in ("SeriesInstanceUID", "Modality", "SeriesNumber", "SeriesDescription"):
            setattr(query, keyword, "")
        with self._associated(STUDY_ROOT_FIND) as assoc:
            answers = assoc.send_c_find(query, STUDY_ROOT_FIND)
            found = [one for status, one in answers if status and status.Status in PENDING and one]
        return list({str(one.SeriesInstanceUID): one for one in found}.values())

    def route(self, study_uid: str, to_ae: str, on_moved: Callable[[int, int], None]) -> int:
        """C-MOVE a study to `to_ae`, as auto-routing does. Returns how many instances went; raises PacsError."""
        query = Dataset()
        query.QueryRetrieveLevel = "STUDY"
        query.StudyInstanceUID = study_uid
        done = 0
        with self._associated(STUDY_ROOT_MOVE) as assoc:
            for status, _ in assoc.send_c_move(query, to_ae, STUDY_ROOT_MOVE):
                if not status:
                    raise PacsError("the PACS did not answer the C-MOVE")
                done = int(status.get("NumberOfCompletedSuboperations") or done)
                on_moved(done, done + int(status.get("NumberOfRemainingSuboperations") or 0))
                if status.Status not in (*PENDING, 0x0000):
                    raise PacsError(f"C-MOVE to {to_ae} ended with status 0x{status.Status:04X}")
        return done

    def fetch(self, study_uid: str, series_uid: str, folder: Path) -> list[Path]:
        """C-GET one series into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        query = Dataset()
        query.QueryRetrieveLevel = "SERIES"
        query.StudyInstanceUID, query.SeriesInstanceUID = study_uid, series_uid
        got: list[Path] = []

        def keep(event: evt.Event) -> int:
            path = folder / f"{len(got) + 1:04d}.dcm"
            path.write_bytes(event.encoded_dataset())
            got.append(path)
            return 0x0000

        ae = AE(self.calling_ae)
        classes = (SecondaryCaptureImageStorage, PositronEmissionTomographyImageStorage)
        ae.add_requested_context(STUDY_ROOT_GET)
        for sop_class in classes:
            ae.add_requested_context(sop_class)
        roles = [build_role(sop_class, scp_role=True) for sop_class in classes]
        assoc = ae.associate(
            "127.0.0.1",
            self.port,
            ae_title=self.ae_title,
            ext_neg=[*roles],
            evt_handlers=[(evt.EVT_C_STORE, keep)],
        )
        if not assoc.is_established:
            raise PacsError("the PACS refused the C-GET association")
        try:
            for status, _ in assoc.send_c_get(query, STUDY_ROOT_GET):
                if not status or status.Status not in (*PENDING, 0x0000):
                    raise PacsError(f"C-GET ended with {status.Status if status else 'no answer'}")
        finally:
            assoc.release()
        return got

    @contextmanager
    def _associated(self, sop_class: str) -> Iterator[Association]:
        ae = AE(self.calling_ae)
        ae.add_requested_context(sop_class)
        assoc = ae.associate("127.0.0.1", self.port, ae_title=self.ae_title)
        if not assoc.is_established:
            raise PacsError(f"the PACS refused an association for {sop_class}")
        try:
            yield assoc
        finally:
            assoc.release()


@contextmanager
def running_pacs(folder: Path, *, ae_title: str, port: int, routes: dict[str, int]) -> Iterator[DemoPacs]:
    """Start qrscp with its files in `folder`; `routes` are move destinations, AE title to loopback port."""
    (folder / "instances").mkdir(parents=True, exist_ok=True)
    settings = folder / "qrscp.ini"
    settings.write_text(_settings(folder, ae_title, port, routes), encoding="utf-8")
    command = [sys.executable, "-W", "ignore", "-m", "pynetdicom", "qrscp", "-q", "-c", str(settings)]
    with (folder / "qrscp.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)  # noqa: S603  # our own interpreter and file
        try:
            _wait_for_port(process, port)
            yield DemoPacs(ae_title=ae_title, port=port, calling_ae="DEMO")
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _settings(folder: Path, ae_title: str, port: int, routes: dict[str, int]) -> str:
    lines = [
        "[DEFAULT]",
        f"ae_title: {ae_title}",
        f"port: {port}",
        "max_pdu: 0",
        "acse_timeout: 30",
        "dimse_timeout: 60",
        "network_timeout: 60",
        "bind_address: 127.0.0.1",
        f"instance_location: {folder.resolve() / 'instances'}",
        f"database_location: {folder.resolve() / 'instances.sqlite'}",
        "log_identifier: False",
    ]
    for route, route_port in routes.items():
        lines += [f"[{route}]", "address: 127.0.0.1", f"port: {route_port}"]
    return "\n".join(lines) + "\n"


def _wait_for_port(process: subprocess.Popen[bytes], port: int) -> None:
    until = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < until:
        if process.poll() is not None:
            raise PacsError(f"the PACS ended at once (exit code {process.returncode}): see qrscp.log")
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise PacsError(f"the PACS did not listen on port {port} within {START_TIMEOUT_S:.0f} s")
