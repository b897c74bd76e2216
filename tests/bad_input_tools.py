"""A node that runs in this process, a sender that may misbehave, and `dicom-node why` as a person calls it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import structlog
from fake_pacs import FakePacs
from pydicom import dcmread
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid
from pynetdicom import AE, build_context, evt
from pynetdicom.association import Association
from pynetdicom.dimse_messages import C_STORE_RQ
from pynetdicom.dimse_primitives import C_STORE
from pynetdicom.dsutils import encode
from pynetdicom.events import EventHandlerType
from tiny_study import write_tiny_study
from typer.testing import CliRunner

from dicom_node.cli import app
from dicom_node.config import LogConfig, load_config
from dicom_node.log import QUIET_LIBRARIES, configure_logging
from dicom_node.net.checkpoint import install
from dicom_node.node import Node
from storage.records import FINAL_JOB_STATES, Job, JobFilter, JobState

UNTIL_S = 240.0  # only a test that fails waits so long
ENDED = FINAL_JOB_STATES | {JobState.HELD}

CONFIG = """
[node]
ae_title = "SYNPET"
host = "127.0.0.1"

[intake]
quiet_period_s = 0.3
study_quiet_period_s = 0.5
incomplete_after_s = 6.0
scan_interval_s = 0.1
min_free_bytes = {min_free_bytes}

[storage]
root = "{root}"

[pipeline]
bundle = "{bundle}"
device = "cpu"
threads = 1

[engine]
retry_s = 0.2
"""
DESTINATION = """
[[peers]]
name = "{name}"
ae_title = "{ae_title}"
host = "127.0.0.1"
port = {port}

[[destinations]]
name = "{name}"
peer = "{name}"
first_retry_s = 0.2
max_retry_s = 0.5
max_attempts = 3
give_up_after_days = 0.00002
"""


@dataclass(kw_only=True)
class Sent:
    """One series that was written, and the statuses that its instances were answered with."""

    accession: str
    paths: list[Path]
    study_uid: str
    series_uid: str
    statuses: list[int] = field(default_factory=list)

    @property
    def sop_instance_uids(self) -> list[str]:
        return [sop_instance_uid_of(path) for path in self.paths]


@dataclass
class Ward:
    """One running node, what was sent to it, and what it answered."""

    node: Node
    config: Path
    folder: Path
    port: int
    cases: dict[str, Sent] = field(default_factory=dict)
    acknowledged: set[str] = field(default_factory=set)  # SOP Instance UIDs of CT images

    @property
    def root(self) -> Path:
        return self.node.config.storage.root

    # ---- sending

    def ct(self, accession: str, **changes: Any) -> Sent:
        """Write a CT series for a study of its own."""
        uids: dict[str, Any] = {"study_uid": generate_uid(), "series_uid": generate_uid()}
        paths = write_tiny_study(self.folder / accession, accession=accession, **{**uids, **changes})
        self.cases[accession] = Sent(accession=accession, paths=paths, **uids)
        return self.cases[accession]

    def associate(
        self,
        *,
        calling_ae: str = "PACS",
        called_ae: str = "SYNPET",
        sop_class_uid: str = CTImageStorage,
        transfer_syntax: str = ExplicitVRLittleEndian,
    ) -> Association:
        ae = AE(ae_title=calling_ae)
        ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = 60
        context = build_context(sop_class_uid, transfer_syntax)
        handlers: list[EventHandlerType] = [(evt.EVT_CONN_OPEN, _send_at_once)]
        made = ae.associate("127.0.0.1", self.port, contexts=[context], ae_title=called_ae, evt_handlers=handlers)
        return install(made)

    @contextlib.contextmanager
    def association(self, **changes: str) -> Iterator[Association]:
        assoc = self.associate(**changes)
        assert assoc.is_established
        try:
            yield assoc
        finally:
            if assoc.is_established:
                assoc.release()

    def store(self, assoc: Association, path: Path) -> int:
        """The file's bytes as they are, and the status."""
        status = int(assoc.send_c_store(path).Status)
        if status == 0:
            self.acknowledged.add(sop_instance_uid_of(path))
        return status

    def send(self, sent: Sent, paths: Sequence[Path] | None = None, **changes: str) -> Sent:
        """A series, or some files of it, over one association."""
        with self.association(**changes) as assoc:
            sent.statuses += [self.store(assoc, path) for path in (sent.paths if paths is None else paths)]
        return sent

    # ---- asking

    def why(self, wanted: str) -> str:
        """What `dicom-node why` prints, on one line."""
        result = CliRunner().invoke(app, ["why", wanted, "--config", str(self.config)], env={"COLUMNS": "200"})
        assert result.exception is None or isinstance(result.exception, SystemExit)
        return " ".join(result.output.split())

    def jobs(self, accession: str = "") -> list[Job]:
        """Newest first."""
        return self.node.ledger.find(JobFilter(accession=accession))

    def state(self, accession: str) -> JobState | None:
        """Of the newest job."""
        found = self.jobs(accession)
        return found[0].state if found else None

    def settled(self) -> bool:
        """Everything that was acknowledged has been looked at, and every job has ended."""
        incoming = self.node.spool.incoming() or self.node.spool.series_uids()
        return not incoming and all(job.state in ENDED for job in self.jobs())

    def until_settled(self) -> None:
        until(self.settled, lambda: [(job.info.accession, job.state, job.stage) for job in self.jobs()])

    def results(self, accession: str) -> list[Path]:
        """The instances of the PET series of the newest job."""
        folder = self.node.spool.result_folder(self.jobs(accession)[0].id)
        return sorted((folder / "pet-sc").glob("*.dcm"))

    def lost(self) -> set[str]:
        """The SOP Instance UIDs that were answered with Success and are nowhere in the spool."""
        missing = set(self.acknowledged)
        for _ in range(100):  # the node goes on: what it moves, or a folder that it removes, may be missed at one look
            names = (name for _, _, files in os.walk(self.root) for name in files if name.endswith(".dcm"))
            missing -= {name.removesuffix(".dcm").partition("~")[0] for name in names}
            if not missing:
                break
            time.sleep(0.02)
        return missing


def _send_at_once(event: evt.Event) -> None:
    """As every PACS does: without it each instance waits 40 ms for an acknowledgement (Nagle)."""
    transport: Any = event.assoc.dul.socket
    transport.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def write_config(
    folder: Path, bundle: Path, pacs: Sequence[FakePacs], *, root: Path | None = None, min_free_bytes: int = 0
) -> Path:
    """A configuration with a destination for each PACS: `pacs0`, `pacs1` ..."""
    text = CONFIG.format(bundle=bundle, root=root or folder / "spool", min_free_bytes=min_free_bytes)
    for number, one in enumerate(pacs):
        text += DESTINATION.format(name=f"pacs{number}", ae_title=one.ae_title, port=one.port)
    path = folder / "config.toml"
    path.write_text(text, encoding="utf-8")
    return path


@contextlib.contextmanager
def running_ward(folder: Path, config: Path) -> Iterator[Ward]:
    node = Node(load_config(config), drain_s=0)
    port = node.start(port=0)
    try:
        yield Ward(node=node, config=config, folder=folder, port=port)
    finally:
        node.stop()


@contextlib.contextmanager
def log_file(path: Path) -> Iterator[Path]:
    """Everything that this process logs, one JSON object a line, as `serve` would write it."""
    before, root = structlog.get_config(), logging.getLogger()
    handlers, level = list(root.handlers), root.level
    levels = {name: logging.getLogger(name).level for name in QUIET_LIBRARIES}
    with path.open("w", encoding="utf-8", buffering=1) as stream:
        configure_logging(LogConfig(level="debug", format="json"), stream=stream)
        try:
            yield path
        finally:
            structlog.configure(**before)
            root.handlers = handlers
            root.setLevel(level)
            for name, was in levels.items():
                logging.getLogger(name).setLevel(was)


def log_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def until(what: Callable[[], bool], told: Callable[[], object] = lambda: "") -> None:
    """Wait for what must come; `told` says what there is instead."""
    deadline = time.monotonic() + UNTIL_S
    while not what():
        if time.monotonic() > deadline:
            raise AssertionError(f"it did not come: {told()}")
        time.sleep(0.05)


def sop_instance_uid_of(path: Path) -> str:
    return str(dcmread(path, specific_tags=["SOPInstanceUID"], stop_before_pixels=True).SOPInstanceUID)


def rejection(assoc: Association) -> tuple[int, int, int]:
    """(result, source, diagnostic) of PS3.8 table 9-21."""
    primitive: Any = assoc.acceptor.primitive
    return primitive.result, primitive.result_source, primitive.diagnostic


def store_raw(assoc: Association, *, sop_instance_uid: str, data: bytes) -> int:
    """A C-STORE request as no decent library sends it: any instance UID, any bytes."""
    request = C_STORE()
    request.MessageID = 7
    request.AffectedSOPClassUID = CTImageStorage
    request.AffectedSOPInstanceUID = "1.2.3"
    request.Priority = 2
    request.DataSet = BytesIO(data)
    message = C_STORE_RQ()
    message.primitive_to_message(request)
    # VR UT: pydicom does not validate it, and in the implicit VR of a command set no VR is on the wire
    message.command_set.add_new(0x00001000, "UT", sop_instance_uid)
    del message.command_set[0x0000, 0x0000]
    message.command_set.CommandGroupLength = len(encode(message.command_set, True, True) or b"")
    assoc._reactor_checkpoint.clear()
    context_id = int(assoc.accepted_contexts[0].context_id or 1)
    for pdata in message.encode_msg(context_id, 16382):
        assoc.dul.send_pdu(pdata)
    _, response = assoc.dimse.get_msg(block=True)
    assoc._reactor_checkpoint.set()
    assert isinstance(response, C_STORE)
    return int(response.Status or 0)
