"""The node as SCU: C-STORE a series over one association, and C-ECHO.

What happened is a value, never an exception: a delivery must be told what was sent before the trouble. Permanent
is what only an operator can mend (PS3.8 9.3.4 rejections of an AE title, no presentation context, a data set that
is refused); the rest is worth another try.

SendOutcome codes: "" (every instance was stored), connection_failed, association_rejected, association_aborted,
no_presentation_context, no_response, interrupted, instance_unreadable, instances_refused, instances_deferred, no_space.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

from pydicom import Dataset, dcmread
from pydicom.errors import InvalidDicomError
from pydicom.filereader import read_file_meta_info
from pydicom.uid import UID, ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import AE, _config, build_context, evt
from pynetdicom.association import Association
from pynetdicom.presentation import PresentationContext
from pynetdicom.sop_class import Verification  # type: ignore[attr-defined]

from dicom_node.config import PeerConfig
from dicom_node.net.compression import COMPRESSED_CLASSES, EXPLICIT, TRANSFER_SYNTAXES, compressed_file
from dicom_node.net.scp import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME
from dicom_node.net.status import Outcome, classify, status_text
from storage.errors import NoSpace

# A path that is given to `send_c_store` goes out as the bytes that it holds: same UID, same bytes.
_config.STORE_SEND_CHUNKED_DATASET = True

TRANSIENT_REJECTION = 2  # PS3.8 table 9-21, field Result
PRESENTATION_SERVICE = 3  # the same table, field Source: congestion or a limit of associations, whatever the Result
NOT_SENT = "not_sent"
_JOIN_S = 10.0  # for pynetdicom's threads to see that their socket is closed
REJECTIONS = {  # PS3.8 table 9-21: (Source, Reason)
    (1, 1): "no reason given",
    (1, 2): "the application context name is not supported",
    (1, 3): "our AE title is not recognized",
    (1, 7): "its AE title is not recognized",
    (2, 1): "no reason given by its ACSE",
    (2, 2): "the protocol version is not supported",
    (3, 1): "temporary congestion",
    (3, 2): "its limit of associations is reached",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Timeouts:
    """Seconds: to connect and associate, for a DIMSE response or a stalled socket, and for an idle association."""

    acse_s: float = 30.0
    dimse_s: float = 60.0
    network_s: float = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class SendOutcome:
    """What became of a series. `statuses`: SOP Instance UID to "0x0000", or a word, for every instance to be sent.

    Words: not_sent, no_response, no_presentation_context.
    """

    statuses: Mapping[str, str] = field(default_factory=dict)
    code: str = ""
    text: str = ""
    permanent: bool = False
    seconds: float = 0.0
    note: str = ""  # what an administrator should know although it is no trouble

    @property
    def ok(self) -> bool:
        return not self.code

    @property
    def stored(self) -> int:
        """How many instances the peer has."""
        return sum(is_stored(status) for status in self.statuses.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class EchoOutcome:
    """Whether the peer answers C-ECHO, in which time, and why not."""

    ok: bool
    code: str = ""
    text: str = ""
    permanent: bool = False
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class _Part10:
    path: Path
    sop_class_uid: str
    sop_instance_uid: str
    transfer_syntax_uid: str


@dataclass(frozen=True, slots=True)
class _Trouble:
    code: str
    text: str
    permanent: bool


def is_stored(status: str) -> bool:
    """Whether an instance's status word says that the peer has it (success or a warning, PS3.4 B.2.3)."""
    return status.startswith("0x") and classify(int(status, 16)) is Outcome.OK


def send_series(
    files: Sequence[Path],
    peer: PeerConfig,
    *,
    calling_ae: str,
    timeouts: Timeouts | None = None,
    max_pdu: int = 262144,
    only: Collection[str] | None = None,
    transfer_syntax: str = EXPLICIT,
    on_sent: Callable[[int], None] = lambda _: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> SendOutcome:
    """C-STORE the files, in the order given, over one association; `only` names the SOP Instance UIDs still missing.

    The peer gets the bytes of the files; a peer that takes Implicit VR Little Endian only gets them transcoded.
    With a `transfer_syntax` of `compression.TRANSFER_SYNTAXES` images go out compressed where the peer accepts that,
    else as they are, and `note` says so.
    `on_sent(n)` is called after each response with the number of instances that the peer has. `should_stop` is
    asked before each instance; a stop is a transient outcome ("interrupted").
    """
    began = monotonic()
    try:
        everything = [_read_meta(path) for path in files]
    except (OSError, InvalidDicomError, AttributeError) as error:
        text = f"a result file cannot be read: {type(error).__name__}"
        return SendOutcome(code="instance_unreadable", text=text, permanent=True)
    parts = [part for part in everything if only is None or part.sop_instance_uid in only]
    nothing_yet = {part.sop_instance_uid: NOT_SENT for part in parts}
    with _Link(peer, _contexts(parts, transfer_syntax), calling_ae, timeouts or Timeouts(), max_pdu) as link:
        if link.trouble:
            return _outcome(nothing_yet, link.trouble, began)
        note = _declined(link.assoc, parts, peer, transfer_syntax)
        tried, trouble = _send_all(link.assoc, parts, transfer_syntax, on_sent, should_stop)
    statuses = {**nothing_yet, **tried}
    return _outcome(statuses, trouble or _refusal(statuses, peer), began, note)


def echo(peer: PeerConfig, *, calling_ae: str, timeouts: Timeouts | None = None) -> EchoOutcome:
    """C-ECHO (PS3.4 annex A): does the peer answer, and does it know us?"""
    began = monotonic()
    context = build_context(Verification, [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
    with _Link(peer, [context], calling_ae, timeouts or Timeouts(), 16382) as link:
        trouble = link.trouble
        if not trouble:
            status = _status(link.assoc.send_c_echo())
            if status is None:
                trouble = _Trouble("no_response", "no response to C-ECHO", False)
            elif status != 0:
                trouble = _Trouble("echo_refused", f"C-ECHO was answered with 0x{status:04X}", True)
    seconds = monotonic() - began
    if trouble:
        return EchoOutcome(ok=False, code=trouble.code, text=trouble.text, permanent=trouble.permanent, seconds=seconds)
    return EchoOutcome(ok=True, seconds=seconds)


def _read_meta(path: Path) -> _Part10:
    meta = read_file_meta_info(path)
    return _Part10(
        path=path,
        sop_class_uid=str(meta.MediaStorageSOPClassUID),
        sop_instance_uid=str(meta.MediaStorageSOPInstanceUID),
        transfer_syntax_uid=str(meta.TransferSyntaxUID),
    )


def _contexts(parts: Sequence[_Part10], transfer_syntax: str = EXPLICIT) -> list[PresentationContext]:
    """One context per class and syntax, so that the peer's answer tells all it takes and not only its favorite."""
    wanted: dict[tuple[str, str], None] = {}
    for part in parts:
        if _to_compress(part, transfer_syntax):
            wanted[part.sop_class_uid, str(TRANSFER_SYNTAXES[transfer_syntax])] = None
        wanted[part.sop_class_uid, part.transfer_syntax_uid] = None
        wanted[part.sop_class_uid, str(ImplicitVRLittleEndian)] = None
    return [build_context(sop_class, syntax) for sop_class, syntax in wanted]


def _to_compress(part: _Part10, transfer_syntax: str) -> bool:
    """Whether this instance is to go out in another syntax than its file's."""
    native = part.transfer_syntax_uid == ExplicitVRLittleEndian
    return transfer_syntax != EXPLICIT and native and part.sop_class_uid in COMPRESSED_CLASSES


def _accepted(assoc: Association, sop_class_uid: str) -> frozenset[str]:
    """The transfer syntaxes that the peer accepted for a class."""
    return frozenset(
        str(context.transfer_syntax[0])
        for context in assoc.accepted_contexts
        if context.abstract_syntax == sop_class_uid
    )


def _declined(assoc: Association, parts: Sequence[_Part10], peer: PeerConfig, transfer_syntax: str) -> str:
    """The note that images go out uncompressed because the peer does not take the configured syntax; "" if it does."""
    wanted = {part.sop_class_uid for part in parts if _to_compress(part, transfer_syntax)}
    accepted = {sop_class: _accepted(assoc, sop_class) for sop_class in wanted}
    if all(not syntaxes or TRANSFER_SYNTAXES[transfer_syntax] in syntaxes for syntaxes in accepted.values()):
        return ""
    return f"{_where(peer)} does not accept {TRANSFER_SYNTAXES[transfer_syntax].name}: sent uncompressed"


class _Requestor(AE):
    """An AE that remembers its socket: pynetdicom leaves it to the garbage collector when the peer was not there."""

    raw_socket: socket.socket | None = None

    def _create_socket(self, *args: Any, **kwargs: Any) -> Any:
        made = super()._create_socket(*args, **kwargs)
        self.raw_socket = made.socket
        return made


class _Link:
    """One association as a context manager: established, or `trouble` says why not. Released at the end."""

    assoc: Association

    def __init__(
        self,
        peer: PeerConfig,
        contexts: list[PresentationContext],
        calling_ae: str,
        timeouts: Timeouts,
        max_pdu: int,
    ) -> None:
        self._peer, self._contexts, self._timeouts, self._max_pdu = peer, contexts, timeouts, max_pdu
        self._ae = _Requestor(ae_title=calling_ae)
        self._ae.implementation_class_uid = UID(IMPLEMENTATION_CLASS_UID)
        self._ae.implementation_version_name = IMPLEMENTATION_VERSION_NAME
        self._ae.connection_timeout = timeouts.acse_s
        self._ae.acse_timeout = timeouts.acse_s
        self._ae.dimse_timeout = timeouts.dimse_s
        self._ae.network_timeout = timeouts.network_s
        self._connected = False
        self.trouble: _Trouble | None = None

    def __enter__(self) -> _Link:
        peer = self._peer
        try:
            self.assoc = self._ae.associate(
                peer.host,
                peer.port,
                contexts=self._contexts,
                ae_title=peer.ae_title,
                max_pdu=self._max_pdu,
                evt_handlers=[(evt.EVT_CONN_OPEN, self._tune)],
            )
        except OSError as error:  # the host name cannot be resolved
            self.trouble = _Trouble("connection_failed", f"{_where(peer)}: {error.strerror or error}", False)
            return self
        if not self.assoc.is_established:
            self.trouble = self._why_not()
        return self

    def __exit__(self, *_: object) -> None:
        if hasattr(self, "assoc"):
            if self.assoc.is_established:
                self.assoc.release()
            self._ae.shutdown()
            for thread in (self.assoc, self.assoc.dul):
                if thread.is_alive():
                    thread.join(_JOIN_S)
        if self._ae.raw_socket is not None:
            self._ae.raw_socket.close()

    def _tune(self, event: evt.Event) -> None:
        """No Nagle (45 ms an image), and no send that blocks for ever on a peer that stopped reading."""
        self._connected = True
        link = event.assoc.dul.socket
        if link is not None and link.socket is not None:
            link.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            link.socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            link.socket.settimeout(self._timeouts.dimse_s)

    def _why_not(self) -> _Trouble:
        answer = self.assoc.acceptor.primitive
        where = _where(self._peer)
        if not self._connected:
            return _Trouble("connection_failed", f"{where} cannot be reached", False)
        if self.assoc.is_rejected and answer is not None:
            return _rejection(where, answer.result, answer.result_source, answer.diagnostic)
        if answer is not None and answer.result == 0 and not self.assoc.accepted_contexts:
            classes = sorted({str(context.abstract_syntax) for context in self._contexts})
            text = f"{where} accepts none of the SOP classes {', '.join(classes)}"
            return _Trouble("no_presentation_context", text, True)
        return _Trouble("association_aborted", f"{where} did not answer the association request", False)


def _rejection(where: str, result: int | None, source: int | None, reason: int | None) -> _Trouble:
    said = REJECTIONS.get((source or 0, reason or 0), f"source {source}, reason {reason}")
    permanent = result != TRANSIENT_REJECTION and source != PRESENTATION_SERVICE
    return _Trouble("association_rejected", f"{where} rejected the association: {said}", permanent)


def _where(peer: PeerConfig) -> str:
    return f"{peer.ae_title} at {peer.host}:{peer.port}"


def _send_all(
    assoc: Association,
    parts: Sequence[_Part10],
    transfer_syntax: str,
    on_sent: Callable[[int], None],
    should_stop: Callable[[], bool],
) -> tuple[dict[str, str], _Trouble | None]:
    """Send until the end or until the association is gone; what was not tried has no status."""
    statuses: dict[str, str] = {}
    stored = 0
    for part, message_id in zip(parts, _message_ids(), strict=False):
        if should_stop():
            return statuses, _Trouble("interrupted", f"stopped after {stored} of {len(parts)} instances", False)
        if not assoc.is_established:
            return statuses, _Trouble("association_aborted", _cut_short(stored, parts), False)
        try:
            word = _store(assoc, part, transfer_syntax, message_id)
        except NoSpace as error:
            return statuses, _Trouble("no_space", f"no room for the compressed instances: {error}", False)
        statuses[part.sop_instance_uid] = word
        if word == "no_response":
            return statuses, _Trouble("no_response", _cut_short(stored, parts), False)
        stored += is_stored(word)
        on_sent(stored)
    return statuses, None


def _cut_short(stored: int, parts: Sequence[_Part10]) -> str:
    return f"the association ended after {stored} of {len(parts)} instances"


def _message_ids() -> Iterator[int]:
    """1..65535 over and over (PS3.7 9.1.1.1.1)."""
    while True:
        yield from range(1, 65536)


def _store(assoc: Association, part: _Part10, transfer_syntax: str, message_id: int) -> str:
    """One C-STORE: the status as "0x0000", "no_presentation_context" or "no_response"."""
    syntaxes = _accepted(assoc, part.sop_class_uid)
    if not syntaxes:
        return "no_presentation_context"
    compress = _to_compress(part, transfer_syntax) and TRANSFER_SYNTAXES[transfer_syntax] in syntaxes
    path = compressed_file(part.path, transfer_syntax) if compress else part.path
    try:
        if compress or part.transfer_syntax_uid in syntaxes:
            answer = assoc.send_c_store(path, msg_id=message_id)
        else:
            answer = assoc.send_c_store(dcmread(part.path), msg_id=message_id)
    except (ValueError, RuntimeError):  # no convertible context; the association ended between check and send
        return "no_response" if not assoc.is_established else "no_presentation_context"
    status = _status(answer)
    return "no_response" if status is None else f"0x{status:04X}"


def _status(answer: Dataset) -> int | None:
    """The DIMSE status, or None when the peer timed out, aborted or answered nonsense."""
    return int(answer.Status) if "Status" in answer else None


def _refusal(statuses: Mapping[str, str], peer: PeerConfig) -> _Trouble | None:
    """Why a series that went through to its last instance is not stored whole; None when it is."""
    bad = [status for status in statuses.values() if not is_stored(status)]
    if not bad:
        return None
    kinds = ", ".join(f"{bad.count(status)} x {_meaning(status)}" for status in sorted(set(bad)))
    text = f"{_where(peer)} refused {len(bad)} of {len(statuses)} instances: {kinds}"
    if "no_presentation_context" in bad:
        return _Trouble("no_presentation_context", text, True)
    if any(classify(int(status, 16)) is Outcome.PERMANENT for status in bad):
        return _Trouble("instances_refused", text, True)
    return _Trouble("instances_deferred", text, False)


def _meaning(status: str) -> str:
    """A status word for a person: a number with its name in the standard."""
    return status_text(int(status, 16)) if status.startswith("0x") else status


def _outcome(statuses: Mapping[str, str], trouble: _Trouble | None, began: float, note: str = "") -> SendOutcome:
    seconds = monotonic() - began
    if trouble is None:
        return SendOutcome(statuses=statuses, seconds=seconds, note=note)
    return SendOutcome(
        statuses=statuses, code=trouble.code, text=trouble.text, permanent=trouble.permanent, seconds=seconds, note=note
    )
