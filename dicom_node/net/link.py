"""One association as SCU: opened with our timeouts, explained when it does not come to be, released at the end.

What happened is a value (`Trouble`), never an exception. Permanent is what only an operator can mend (PS3.8 9.3.4
rejections of an AE title, no presentation context); the rest is worth another try.

Trouble codes: connection_failed, tls_failed, association_rejected, association_aborted, no_presentation_context.
"""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Self

from pydicom import Dataset
from pydicom.uid import UID, ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import AE, build_context, evt
from pynetdicom.association import Association
from pynetdicom.events import EventHandlerType
from pynetdicom.pdu_primitives import SCP_SCU_RoleSelectionNegotiation
from pynetdicom.presentation import PresentationContext

from dicom_node.config import NodeConfig, PeerConfig
from dicom_node.net import checkpoint, readable
from dicom_node.net.scp import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME
from dicom_node.net.security import SecurityError, client_context, tell_failure, why

TRANSIENT_REJECTION = 2  # PS3.8 table 9-21, field Result
PRESENTATION_SERVICE = 3  # the same table, field Source: congestion or a limit of associations, whatever the Result
UNCOMPRESSED = (ExplicitVRLittleEndian, ImplicitVRLittleEndian)
_WATCH_S = 0.2
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


def timeouts_of(node: NodeConfig) -> Timeouts:
    """Those of `[node]`."""
    return Timeouts(acse_s=node.acse_timeout_s, dimse_s=node.dimse_timeout_s, network_s=node.network_timeout_s)


@dataclass(frozen=True, slots=True)
class Trouble:
    """Why something did not come to be: a stable code, a sentence, and whether only an operator can mend it."""

    code: str
    text: str
    permanent: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestOutcome:
    """What came of asking a peer or a service: no code is success, else why not, as in `Trouble`."""

    code: str = ""
    text: str = ""
    permanent: bool = False
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return not self.code

    @classmethod
    def of(cls, trouble: Trouble | None, **rest: Any) -> Self:
        """Success without a trouble, else why not; `rest` are the other fields."""
        if trouble is None:
            return cls(**rest)
        return cls(code=trouble.code, text=trouble.text, permanent=trouble.permanent, **rest)


class _Requestor(AE):
    """An AE that remembers its socket: pynetdicom leaves it to the garbage collector when the peer was not there."""

    raw_socket: socket.socket | None = None

    def _create_socket(self, *args: Any, **kwargs: Any) -> Any:
        made = super()._create_socket(*args, **kwargs)
        self.raw_socket = made.socket
        readable.install(made)
        return made


class Link:
    """One association as a context manager: established, or `trouble` says why not. Released at the end."""

    assoc: Association

    def __init__(
        self,
        peer: PeerConfig,
        contexts: list[PresentationContext],
        calling_ae: str,
        timeouts: Timeouts,
        max_pdu: int,
        handlers: Sequence[EventHandlerType] = (),
        *,
        roles: Sequence[SCP_SCU_RoleSelectionNegotiation] = (),
    ) -> None:
        self._peer, self._contexts, self._timeouts, self._max_pdu = peer, contexts, timeouts, max_pdu
        self._ae = _Requestor(ae_title=calling_ae)
        self._ae.implementation_class_uid = UID(IMPLEMENTATION_CLASS_UID)
        self._ae.implementation_version_name = IMPLEMENTATION_VERSION_NAME
        self._ae.connection_timeout = timeouts.acse_s
        self._ae.acse_timeout = timeouts.acse_s
        self._ae.dimse_timeout = timeouts.dimse_s
        self._ae.network_timeout = timeouts.network_s
        self._handlers = handlers
        self._roles = roles
        self._connected = False
        self._tls_sockets: list[socket.socket] = []
        self._tls_error: ssl.SSLError | None = None
        self.trouble: Trouble | None = None

    def __enter__(self) -> Link:
        peer = self._peer
        try:
            self.assoc = self._ae.associate(
                peer.host,
                peer.port,
                contexts=self._contexts,
                ae_title=peer.ae_title,
                max_pdu=self._max_pdu,
                ext_neg=list(self._roles),
                evt_handlers=[(evt.EVT_CONN_OPEN, self._tune), *self._handlers],
                tls_args=(self._tls(), peer.host) if peer.tls else None,
            )
        except SecurityError as error:
            self.trouble = Trouble("tls_failed", f"{where(peer)}: {error}", True)
            return self
        except OSError as error:  # the host name cannot be resolved
            self.trouble = Trouble("connection_failed", f"{where(peer)}: {error.strerror or error}", False)
            return self
        if self.assoc.is_established:
            checkpoint.install(self.assoc)
        else:
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
        for sock in self._tls_sockets:  # which took over the one above
            sock.close()

    def _tune(self, event: evt.Event) -> None:
        """No Nagle (45 ms an image), and no send that blocks for ever on a peer that stopped reading."""
        self._connected = True
        link = event.assoc.dul.socket
        if link is not None and link.socket is not None:
            link.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            link.socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            link.socket.settimeout(self._timeouts.dimse_s)

    def _tls(self) -> ssl.SSLContext:
        context = client_context(self._peer)
        tell_failure(context, self._on_tls_failure, self._tls_sockets)
        return context

    def _on_tls_failure(self, error: OSError) -> None:
        if isinstance(error, ssl.SSLError):  # another one is of the network: nobody listens there
            self._tls_error = error

    def _why_not(self) -> Trouble:
        answer = self.assoc.acceptor.primitive
        at = where(self._peer)
        if self._tls_error is not None:
            hung_up = isinstance(self._tls_error, ssl.SSLEOFError)  # as a proxy does whose PACS is down
            return Trouble("tls_failed", f"{at}: no TLS connection: {why(self._tls_error)}", not hung_up)
        if not self._connected:
            return Trouble("connection_failed", f"{at} cannot be reached", False)
        if self.assoc.is_rejected and answer is not None:
            return _rejection(at, answer.result, answer.result_source, answer.diagnostic)
        if answer is not None and answer.result == 0 and not self.assoc.accepted_contexts:
            classes = sorted({str(context.abstract_syntax) for context in self._contexts})
            text = f"{at} accepts none of the SOP classes {', '.join(classes)}"
            return Trouble("no_presentation_context", text, True)
        text = f"{at} did not answer the association request"
        if self._peer.tls:  # with TLS 1.3 it refuses our certificate only after the handshake
            text += "; it may want another client_cert_file"
        return Trouble("association_aborted", text, False)


def _rejection(at: str, result: int | None, source: int | None, reason: int | None) -> Trouble:
    said = REJECTIONS.get((source or 0, reason or 0), f"source {source}, reason {reason}")
    permanent = result != TRANSIENT_REJECTION and source != PRESENTATION_SERVICE
    return Trouble("association_rejected", f"{at} rejected the association: {said}", permanent)


@contextmanager
def aborted_when(link: Link, should_stop: Callable[[], bool]) -> Iterator[None]:
    """While we wait for a peer's answer: abort the association as soon as `should_stop`, however silent the peer."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(_WATCH_S):
            if should_stop():
                # what pynetdicom puts there when the connection breaks: whoever waits for an answer aborts
                link.assoc.dimse.msg_queue.put((None, None))
                return

    watcher = threading.Thread(target=watch, name="link-watch", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def of_service(trouble: Trouble | None) -> Trouble | None:
    """The same, where one service is asked for: no presentation context for it says that it is not offered."""
    if trouble is not None and trouble.code == "no_presentation_context":
        return replace(trouble, code="not_offered")
    return trouble


def where(peer: PeerConfig) -> str:
    """The peer in a sentence for a person."""
    return f"{peer.ae_title} at {peer.host}:{peer.port}"


def dimse_status(answer: Dataset) -> int | None:
    """The DIMSE status, or None when the peer timed out, aborted or answered nonsense."""
    return int(answer.Status) if "Status" in answer else None


def offered(
    peer: PeerConfig,
    classes: Sequence[str],
    *,
    calling_ae: str,
    syntaxes: Sequence[str] = UNCOMPRESSED,
    timeouts: Timeouts | None = None,
) -> frozenset[str] | Trouble:
    """Which of these SOP classes a peer accepts in one of the transfer syntaxes; a `Trouble` when none is known."""
    contexts = [build_context(sop_class, list(syntaxes)) for sop_class in classes]
    with Link(peer, contexts, calling_ae, timeouts or Timeouts(), 16382) as link:
        if link.trouble is None:
            return frozenset(str(context.abstract_syntax) for context in link.assoc.accepted_contexts)
        return frozenset() if link.trouble.code == "no_presentation_context" else link.trouble
