"""The acceptor: which presentation contexts we take, and a pynetdicom server set up for our use.

Contexts are chosen per association from what was proposed, so that any storage class, public, retired or private,
is taken: auto-routing must not stall on a series that we only drop, unless a site says otherwise
(`[intake].other_classes`). CT is taken in every transfer syntax that pydicom can decode here; the rest in whatever it
comes, because nobody will decode it.
"""

from __future__ import annotations

import errno
import gc
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from typing import Any

from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import (
    UID,
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    EnhancedCTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    LegacyConvertedEnhancedCTImageStorage,
    RLELossless,
)
from pynetdicom import AE, _config
from pynetdicom._globals import ALL_TRANSFER_SYNTAXES
from pynetdicom.events import EventHandlerType
from pynetdicom.pdu_primitives import SOPClassCommonExtendedNegotiation
from pynetdicom.presentation import AllStoragePresentationContexts, PresentationContext
from pynetdicom.service_class import StorageServiceClass
from pynetdicom.transport import ThreadedAssociationServer

from dicom_node.config import Config, NodeConfig, PeerConfig
from dicom_node.net.peers import calls_from_a_peer, plain_address
from dicom_node.net.security import SecurityError, ServerContext, shake_hands, why, wrap

IMPLEMENTATION_CLASS_UID = "2.25.178946538243586417430927114312346098701"  # ours, UUID-derived (PS3.5 annex B.2)
IMPLEMENTATION_VERSION_NAME = "SYNPET_NODE_1"

VERIFICATION = UID("1.2.840.10008.1.1")
STORAGE_COMMITMENT = UID("1.2.840.10008.1.20.1")
CT_CLASSES = frozenset({CTImageStorage, EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage})

# the order in which we choose where a context offers several: native first, lossless before lossy
_PREFERRED = (
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGLSLossless,
    JPEG2000Lossless,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    JPEGLosslessSV1,
    RLELossless,
)
_LAST = (DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian)  # asks most of the reader, retired

_PUBLIC_ROOT = "1.2.840.10008."
_STORAGE_ROOT = "1.2.840.10008.5.1.4.1.1."  # PS3.6 annex A: current and retired storage classes lie here
_STORAGE_SERVICE_CLASS = StorageServiceClass.uid

_POLLS_PER_COLLECTION = 300  # every 30 s at 10 turns a second
_BACKLOG = 128  # connections that the kernel holds for us; pynetdicom's 5 drops those of a busy router
_BIND_S, _BIND_AGAIN_S = 5.0, 0.05
_CONNECTIONS_PER_ASSOCIATION = 4  # sockets that may wait for their A-ASSOCIATE-RQ, per allowed association
_NO_DESCRIPTOR, _DESCRIPTOR_AGAIN_S = (errno.EMFILE, errno.ENFILE), 0.1
_ADDRESSES_REMEMBERED = 4096  # whether they are a peer's: asked of every open connection whenever one more comes


@cache
def ct_transfer_syntaxes() -> tuple[str, ...]:
    """The transfer syntaxes that CT is accepted in, in order of preference: what pydicom decodes on this machine."""
    known = dict.fromkeys((*_PREFERRED, *ALL_TRANSFER_SYNTAXES))
    decodable = [str(uid) for uid in known if uid not in _LAST and _can_decode(UID(uid))]
    return (*decodable, *map(str, _LAST))


def _can_decode(transfer_syntax: UID) -> bool:
    try:
        return get_decoder(transfer_syntax).is_available
    except NotImplementedError:
        return False


@cache
def _storage_classes() -> frozenset[str]:
    return frozenset(str(context.abstract_syntax) for context in AllStoragePresentationContexts)


def is_storage_class(abstract_syntax: str) -> bool:
    """True for current, retired and private storage classes.

    A private abstract syntax is taken for a storage class: a router proposes no other private service to us.
    """
    if abstract_syntax in _storage_classes() or abstract_syntax.startswith(_STORAGE_ROOT):
        return True
    return not abstract_syntax.startswith(_PUBLIC_ROOT)


def contexts_for(
    requested: Sequence[PresentationContext],
    *,
    may_store: bool,
    may_echo: bool,
    may_report: bool = False,
    may_commit: bool = False,
    storage: Collection[str] | None = None,
) -> list[PresentationContext]:
    """The contexts that an acceptor supports towards one requestor, one per proposed abstract syntax.

    CT: `ct_transfer_syntaxes`. Any other storage class of `storage` (None: any): native syntaxes first, then whatever
    was proposed.
    Storage Commitment: a requestor that reports is its SCP and we are the SCU (PS3.4 J.3.3.1.3), also where it
    proposes no role (`may_report`); one that asks us is the SCU (`may_commit`).
    """
    proposed: dict[str, list[str]] = {}
    for context in requested:
        syntaxes = proposed.setdefault(str(context.abstract_syntax), [])
        syntaxes.extend(str(uid) for uid in context.transfer_syntax)
    supported = []
    for abstract_syntax, syntaxes in proposed.items():
        if abstract_syntax == VERIFICATION:
            accepted: Iterable[str] = (ImplicitVRLittleEndian, ExplicitVRLittleEndian) if may_echo else ()
        elif abstract_syntax in CT_CLASSES:
            accepted = ct_transfer_syntaxes() if may_store else ()
        elif abstract_syntax == STORAGE_COMMITMENT:
            accepted = (ImplicitVRLittleEndian, ExplicitVRLittleEndian) if may_report or may_commit else ()
        elif is_storage_class(abstract_syntax) and (storage is None or abstract_syntax in storage):
            native = [uid for uid in (ExplicitVRLittleEndian, ImplicitVRLittleEndian) if uid in syntaxes]
            accepted = dict.fromkeys((*native, *syntaxes)) if may_store else ()
        else:
            accepted = ()
        if accepted:
            context = PresentationContext()
            context.abstract_syntax = UID(abstract_syntax)
            context.transfer_syntax = [UID(uid) for uid in accepted]
            if abstract_syntax == STORAGE_COMMITMENT:
                context.scu_role, context.scp_role = may_commit, may_report  # of the requestor
            supported.append(context)
    return supported


def storage_services_for(contexts: Iterable[PresentationContext]) -> dict[UID, SOPClassCommonExtendedNegotiation]:
    """Tell pynetdicom that classes it does not know belong to the Storage Service Class (nothing goes on the wire)."""
    items = {}
    for context in contexts:
        uid = UID(str(context.abstract_syntax))
        if uid not in _storage_classes() and is_storage_class(uid):
            item = SOPClassCommonExtendedNegotiation()
            item.sop_class_uid = uid
            item.service_class_uid = UID(_STORAGE_SERVICE_CLASS)
            items[uid] = item
    return items


@dataclass(frozen=True, slots=True)
class Listener:
    """A socket that listens, for DICOM or for DICOM in TLS."""

    socket: socket.socket
    tls: bool = False

    @property
    def port(self) -> int:
        return int(self.socket.getsockname()[1])


@dataclass(frozen=True, slots=True)
class Limits:
    """How many connections may be open in one process, in all and from one address; 0: any number.

    Those of addresses of peers (`is_peers`) and those of strangers are counted apart: neither can take the other's
    places.
    """

    in_all: int
    per_address: int
    is_peers: Callable[[str], bool] = lambda _address: True

    def exceeded(self, open_now: Sequence[str], address: str) -> str:
        """What to tell when one more from `address` is too many; empty when it is not."""
        known = self.is_peers(address)
        if self.in_all and sum(self.is_peers(one) == known for one in open_now) >= self.in_all:
            whose = "peers" if known else "strangers"
            return f"more than {self.in_all} connections of {whose} were open: new ones are closed unheard"
        if self.per_address and open_now.count(address) >= self.per_address:
            return f"more than {self.per_address} connections of {address} were open: new ones are closed unheard"
        return ""


class _Server(ThreadedAssociationServer):
    """pynetdicom's threaded server with TCP_NODELAY on every accepted socket and bounds on idle connections.

    It accepts from `listening`, which other processes may accept from as well. With `tls` the handshake is in the
    connection's own thread and has a deadline: whoever connects and says nothing keeps nobody else waiting.
    """

    daemon_threads = True
    limits = Limits(0, 0)
    tls: ServerContext | None = None
    handshake_s = 30.0
    on_limit: Callable[[str], None] = staticmethod(lambda _text: None)
    on_tls_failure: Callable[[str, str], None] = staticmethod(lambda _address, _reason: None)
    poll: Callable[[], None] = staticmethod(lambda: None)
    _polls = 0
    _starves = False  # no descriptor was left for the last connection

    def __init__(self, *args: Any, listening: socket.socket, **kwargs: Any) -> None:
        self._listening = listening
        self._arriving: dict[socket.socket, str] = {}  # accepted, and not an association yet -> address
        self._lock = threading.Lock()
        super().__init__(*args, **kwargs)

    def server_bind(self) -> None:
        """Take the given socket instead of the one that the base class made."""
        assert self.socket is not None
        self.socket.close()
        self.socket = self._listening
        self.server_address = self.socket.getsockname()

    def server_activate(self) -> None:
        """It listens already."""

    def service_actions(self) -> None:
        """Called at every turn of the listening loop; pynetdicom needs its dead threads collected by hand."""
        self.poll()
        self._polls += 1
        if self._polls % _POLLS_PER_COLLECTION == 0:
            gc.collect()

    def get_request(self) -> tuple[socket.socket, tuple[str, int]]:
        try:
            request, address = super().get_request()
        except OSError as error:
            if error.errno in _NO_DESCRIPTOR:
                self._wait_for_descriptor()
            raise
        self._starves = False
        # without it a response waits 45 ms for the peer's delayed ACK (Nagle)
        request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return request, address

    def _wait_for_descriptor(self) -> None:
        """The connection stays with the kernel; the listening loop, which would come back at once, waits a moment."""
        if not self._starves:
            self._starves = True
            self.on_limit("no file descriptor is left: new connections wait until one is (ulimit -n, LimitNOFILE)")
        time.sleep(_DESCRIPTOR_AGAIN_S)

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Connections that never ask for an association hold a thread each until the ACSE time-out."""
        address = plain_address(str(client_address[0]))
        with self._lock:
            open_now = [*self._arriving.values(), *(_address_of(one) for one in self.active_associations)]
            told = self.limits.exceeded(open_now, address)
            if not told:
                self._arriving[request] = address
        if told:
            self.on_limit(told)
        return not told

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """In the connection's own thread: the TLS handshake, then the association begins."""
        connection: socket.socket | None = request
        try:
            connection = request if self.tls is None else self._secured(request, self.tls)
            if connection is not None:
                super().process_request_thread(connection, client_address)
        finally:
            self._arrived(connection or request)

    def _secured(self, request: socket.socket, tls: ServerContext) -> ssl.SSLSocket | None:
        address, secured = self._arriving[request], request
        try:
            secured = wrap(request, tls.fresh())
            with self._lock:  # now it has the connection, and `request` has not
                self._arriving[secured] = self._arriving.pop(request)
            shake_hands(secured, within_s=self.handshake_s)
        except (OSError, SecurityError) as error:
            self._arrived(secured)
            secured.close()
            self.on_tls_failure(address, why(error) if isinstance(error, OSError) else str(error))
            return None
        return secured

    def _arrived(self, connection: socket.socket) -> None:
        with self._lock:
            self._arriving.pop(connection, None)

    def server_close(self) -> None:
        """Stop listening, and hang up on those in a handshake."""
        super().server_close()
        with self._lock:
            arriving = list(self._arriving)
        for request in arriving:
            with suppress(OSError):
                request.shutdown(socket.SHUT_RDWR)


def _address_of(assoc: Any) -> str:
    return plain_address(assoc.requestor.address)


def build_ae(node: NodeConfig, *, max_pdu: int) -> AE:
    """The application entity of `[node]`; `max_pdu` is what it announces.

    Admission and the association limit are ours (see `receive`).
    """
    quiet_pynetdicom()
    ae = AE(ae_title=node.ae_title)
    ae.implementation_class_uid = UID(IMPLEMENTATION_CLASS_UID)
    ae.implementation_version_name = IMPLEMENTATION_VERSION_NAME
    ae.maximum_pdu_size = max_pdu
    ae.acse_timeout = node.acse_timeout_s
    ae.dimse_timeout = node.dimse_timeout_s
    ae.network_timeout = node.network_timeout_s
    ae.maximum_associations = 1_000_000  # the registry counts, so that a rejection is logged
    ae.require_called_aet = False
    ae.add_supported_context(VERIFICATION)
    return ae


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens (port 0: any free one), for one process or several to accept from.

    The receivers of a node that was killed live some milliseconds longer than it: the address is tried again for
    `_BIND_S` seconds. Raises OSError when it is still taken, or is none of this machine's.
    """
    until = time.monotonic() + _BIND_S
    while True:
        sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((host, port))
            sock.listen(_BACKLOG)
        except OSError as error:
            sock.close()
            if error.errno != errno.EADDRINUSE or time.monotonic() > until:
                raise
            time.sleep(_BIND_AGAIN_S)
        else:
            sock.setblocking(False)  # another process may be quicker to accept
            return sock


def listen_all(config: Config, port: int | None = None) -> tuple[Listener, ...]:
    """The sockets of a node: of `[node].port` first, and of `[tls].port` where that is another one.

    `port` overrides `[node].port`; 0 takes any free one for both. Raises OSError as `listen`.
    """
    node, tls = config.node, config.tls
    first = Listener(listen(node.host, node.port if port is None else port), tls=config.tls_alone)
    if tls.cert_file is None or config.tls_alone:
        return (first,)
    try:
        return first, Listener(listen(node.host, 0 if port == 0 else tls.port), tls=True)
    except OSError:
        first.socket.close()
        raise


def _limits(node: NodeConfig, peers: Sequence[PeerConfig]) -> Limits:
    known = lru_cache(_ADDRESSES_REMEMBERED)(partial(calls_from_a_peer, node, peers))
    in_all = node.max_associations * (1 + _CONNECTIONS_PER_ASSOCIATION)
    return Limits(in_all, node.max_connections_per_address, known)


def make_server(
    ae: AE,
    node: NodeConfig,
    peers: Sequence[PeerConfig],
    handlers: list[EventHandlerType],
    *,
    listening: socket.socket,
    poll: Callable[[], None],
    on_limit: Callable[[str], None],
    tls: ServerContext | None = None,
    on_tls_failure: Callable[[str, str], None] = lambda _address, _reason: None,
) -> ThreadedAssociationServer:
    """A server on a socket that listens; the caller runs `serve_forever` in a thread of its own.

    `poll` is called at every turn of that loop, `on_limit` with a sentence when a connection is closed because too
    many are open, `on_tls_failure` with address and reason when one does not come out of the handshake.
    """
    address = listening.getsockname()
    made = partial(_Server, listening=listening)
    server = ae.make_server((node.host, address[1]), evt_handlers=handlers, server_class=made)  # type: ignore[arg-type]
    assert isinstance(server, _Server)
    server.poll = poll
    server.on_limit = on_limit
    server.limits = _limits(node, peers)
    server.tls = tls
    server.on_tls_failure = on_tls_failure
    server.handshake_s = node.acse_timeout_s
    ae._servers.append(server)  # as AE.start_server does: shutdown() removes it
    return server


def quiet_pynetdicom() -> None:
    """No line per PDU and message (29 % of the store handler's time), warnings through the standard library."""
    _config.LOG_HANDLER_LEVEL = "none"
    logger = logging.getLogger("pynetdicom")
    logger.setLevel(max(logger.level, logging.WARNING))  # `configure_logging` may have asked for still less
