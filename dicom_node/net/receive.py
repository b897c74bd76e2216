"""The receiver: Success to a sender means that the bytes are durable.

The store handler writes raw bytes and nothing else: it never decodes a data set. Everything a peer says (AE titles,
UIDs) is checked before it is used and quoted before it is logged.
"""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import structlog
from pydicom import Dataset
from pydicom.tag import Tag
from pydicom.uid import UID
from pynetdicom import evt
from pynetdicom.association import Association as PynetAssociation
from pynetdicom.events import Event, EventHandlerType
from pynetdicom.fsm import InvalidEventError
from pynetdicom.pdu_primitives import UserIdentityNegotiation

from dicom_node.config import Config
from dicom_node.net.associations import Association, sender
from dicom_node.net.commitment import Take, answer_report
from dicom_node.net.commitment_scp import CommitmentScp
from dicom_node.net.peers import Admission, admit, is_asked, peer_that_may, plain_address, shown
from dicom_node.net.scp import (
    STORAGE_COMMITMENT,
    Listener,
    build_ae,
    contexts_for,
    is_storage_class,
    listen_all,
    make_server,
    storage_services_for,
)
from dicom_node.net.security import NO_TLS, ServerContext
from dicom_node.net.status import (
    CALLING_AE_NOT_RECOGNIZED,
    LOCAL_LIMIT_EXCEEDED,
    NO_REASON_TRANSIENT,
    Rejection,
    Status,
    rejection,
)
from dicom_node.net.store import (
    PLACEHOLDER_UID,
    Book,
    Notes,
    Store,
    accepted_classes,
    answer_store,
    fault_of,
    names_instance,
)
from dicom_node.net.stream import PduReader, announced_pdu
from dicom_node.net.thinning import Names, without_numbers
from dicom_node.net.trial_lock import a_test_is_sent
from dicom_node.net.wrong_port import plain_port
from storage.spool import Spool

log = structlog.get_logger(__name__)

_NAMED_USERS = (1, 2)  # user identity types: name, name and passcode (PS3.7 table D.3-14)
_C_STORE_RQ = 0x0001
_COMMAND_FIELD = Tag(0x0000, 0x0100)
_AFFECTED_CLASS = Tag(0x0000, 0x0002)
_AFFECTED_INSTANCE = Tag(0x0000, 0x1000)
_MESSAGE_ID = Tag(0x0000, 0x0110)
_MOVE_ORIGINATOR_AE = Tag(0x0000, 0x1030)
_AWAITS_REQUEST = "Sta2"  # PS3.8 table 9-6: connected, waiting for the A-ASSOCIATE-RQ
_CLASSES_TOLD = 10  # of those that one request proposes and that are refused
_JOIN_S = 10.0
_POLL_S = 0.1  # how soon the listening thread sees that it shall stop


class Receiver:
    """Owns the listening socket and its threads.

    `clock` is monotonic seconds (only for thinning out repeated refusals). `take_report` gets the Storage Commitment
    reports that archives send on associations of their own; without it that service is not offered.
    """

    def __init__(
        self,
        config: Config,
        spool: Spool,
        notes: Notes,
        book: Book,
        *,
        clock: Callable[[], float] = time.monotonic,
        take_report: Take | None = None,
    ) -> None:
        self._config = config
        self._take_report = take_report
        self._book = book
        self._store = Store(config, spool, notes, book, clock=clock)
        self._names = Names(clock)
        self._commitments = CommitmentScp(config, spool, notes) if config.gives_commitment else None
        self._ae = build_ae(config.node, max_pdu=announced_pdu(config))
        self._servers: list[Any] = []
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._tokens: dict[PynetAssociation, str] = {}
        self._bad_uids: dict[tuple[str, int], str] = {}  # (token, message ID) -> what is wrong with the request

    def start(self, *, port: int | None = None, listening: Sequence[Listener] = ()) -> int:
        """Listen; returns the bound port. `port` overrides the configuration (0: any free one).

        With `listening`, sockets that listen already, connections are accepted from those.
        Raises OSError when an address is taken. A certificate that cannot be used fails each handshake, with a reason.
        """
        node = self._config.node
        tls = ServerContext(self._config.tls) if self._config.tls.cert_file else None
        listening = listening or listen_all(self._config, port)
        for listener in listening:
            server = make_server(
                self._ae,
                node,
                self._config.peers,
                self._handlers(),
                listening=listener.socket,
                poll=self._reap,
                on_limit=self._too_many,
                tls=tls if listener.tls else None,
                on_tls_failure=self._on_tls_failure,
            )
            self._servers.append(server)
            name = "dicom-tls-acceptor" if listener.tls else "dicom-acceptor"
            self._threads.append(threading.Thread(target=server.serve_forever, args=(_POLL_S,), name=name, daemon=True))
            self._threads[-1].start()
            log.info("receiver.started", ae_title=node.ae_title, host=node.host, port=listener.port, tls=listener.tls)
        if self._commitments is not None:
            self._commitments.start()
        return listening[0].port

    @property
    def ports(self) -> list[int]:
        """The ports that are listened on: of `[node]`, and of `[tls]` where that is another one."""
        return [int(server.server_address[1]) for server in self._servers]

    @property
    def alive(self) -> bool:
        """Whether the listening threads run: the kernel would go on taking connections without them."""
        return bool(self._threads) and all(thread.is_alive() for thread in self._threads)

    def stop(self) -> None:
        """Abort what is open, stop listening, join. Instances that were answered with Success are on disk."""
        if not self._servers:
            return
        self._hang_up()
        self._ae.shutdown()
        if self._commitments is not None:
            self._commitments.stop()
        for thread in self._threads:
            thread.join(_JOIN_S)
        with self._lock:
            left = list(self._tokens)
        for assoc in left:
            self._closed(assoc)
        self._servers, self._threads = [], []
        log.info("receiver.stopped")

    def _hang_up(self) -> None:
        """End what is open, and close connections that never asked for an association."""
        found: list[Any] = [assoc for server in self._servers for assoc in server.active_associations]
        for assoc in found:
            if assoc.dul.state_machine.current_state == _AWAITS_REQUEST:  # pynetdicom cannot abort what has not begun
                assoc.dul.socket.close()
            else:
                assoc.pdu_reader.stop()
            if not assoc.is_established:
                assoc.dul.to_user_queue.put(None)  # its thread waits for a request, as long as the ACSE time-out
        until = time.monotonic() + _JOIN_S
        while any(assoc.is_alive() for assoc in found) and time.monotonic() < until:
            time.sleep(_POLL_S)

    def _handlers(self) -> list[EventHandlerType]:
        return [
            (evt.EVT_CONN_OPEN, self._on_connection),
            (evt.EVT_REQUESTED, self._on_requested),
            (evt.EVT_SOP_COMMON, self._on_sop_common),
            (evt.EVT_ASYNC_OPS, self._on_async_ops),
            (evt.EVT_USER_ID, self._on_user_identity),
            (evt.EVT_C_ECHO, self._on_echo),
            (evt.EVT_DIMSE_RECV, self._on_message),
            (evt.EVT_C_STORE, self._on_store),
            (evt.EVT_N_EVENT_REPORT, self._on_report),
            *(self._commitments.handlers if self._commitments else ()),
            (evt.EVT_RELEASED, lambda event: self._closed(event.assoc)),
            (evt.EVT_ABORTED, lambda event: self._closed(event.assoc)),
            (evt.EVT_CONN_CLOSE, lambda event: self._closed(event.assoc)),
        ]

    # -- association ---------------------------------------------------------------------------------------------

    def _on_connection(self, event: Event) -> None:
        """Read this connection's PDUs ourselves: with limits, and each C-STORE straight into its file."""
        assoc: Any = event.assoc
        assoc.pdu_reader = PduReader(assoc, self._store, self._token_of, self._config)  # lives as long as it
        assoc.pdu_reader.take_over()
        machine = assoc.dul.state_machine
        machine.do_action = partial(self._act, assoc, machine.do_action)

    def _act(self, assoc: Any, do_action: Callable[[str], None], event: str) -> None:
        """One step of the state machine. A PDU that its state does not know would else end only half of the threads.

        The peer hears nothing more of us: the connection is closed, and `_reap` gives the place back.
        """
        try:
            do_action(event)
        except Exception as error:
            state = assoc.dul.state_machine.current_state
            reason = str(error) if isinstance(error, InvalidEventError) else type(error).__name__
            log.warning("association.protocol_error", state=state, pdu_event=event, reason=reason)
            assoc.dul.socket.close()
            assoc.is_aborted, assoc.is_established = True, False
            assoc._kill = assoc.dul._kill_thread = True

    def _token_of(self, assoc: PynetAssociation) -> str:
        with self._lock:
            return self._tokens.get(assoc, "")

    def _on_requested(self, event: Event) -> None:
        """Admit or reject; whatever goes wrong here must not let a stranger in."""
        assoc = event.assoc
        try:
            decision = self._admit(assoc)
        except Exception:
            log.exception("association.admission_failed")
            decision = rejection("internal_error", NO_REASON_TRANSIENT, "the admission check failed: see the log")
        if isinstance(decision, Rejection):
            self._reject(assoc, decision)

    def _admit(self, assoc: PynetAssociation) -> Admission | Rejection:
        request: Any = assoc.requestor.primitive
        calling_ae, called_ae = str(request.calling_ae_title), str(request.called_ae_title)
        address = plain_address(assoc.requestor.address)
        decision = admit(
            self._config.node,
            self._config.peers,
            calling_ae=calling_ae,
            called_ae=called_ae,
            address=address,
            by_tls=isinstance(assoc.dul.socket.socket, ssl.SSLSocket),  # type: ignore[union-attr]
        )
        if isinstance(decision, Rejection):
            return decision
        if decision.own and _would_store(assoc) and not a_test_is_sent(self._config.storage.root):
            text = (
                f"{shown(calling_ae)} at {shown(address)}: our own AE title stores only while `dicom-node doctor` "
                "sends a test: send under the sender's own AE title"
            )
            return rejection("own_title_without_test", CALLING_AE_NOT_RECOGNIZED, text)
        token = self._book.open(
            calling_ae=calling_ae.strip(), address=address, peer=decision.peer, peer_limit=decision.max_associations
        )
        if token is None:
            own = f"the peer's {decision.max_associations}" if decision.max_associations else ""
            own = own if decision.peer else "the share of callers that are no peer"
            either = f", or {own}," if own else ""
            text = f"{shown(calling_ae)} at {shown(address)}: {self._book.limit} associations{either} are open already"
            return rejection("association_limit", LOCAL_LIMIT_EXCEEDED, text)
        with self._lock:
            self._tokens[assoc] = token
        assoc.acceptor.supported_contexts = contexts_for(
            assoc.requestor.requested_contexts,
            may_store=decision.may_store,
            may_echo=decision.may_echo,
            may_report=self._may_report(assoc, calling_ae, address),
            may_commit=peer_that_may(self._config.peers, "commit", calling_ae=calling_ae, address=address) is not None,
            storage=accepted_classes(self._config),
        )
        log.info("association.opened", association=token[:8], calling_ae=calling_ae.strip(), address=address)
        if decision.may_store:
            self._note_refused_classes(assoc, token, calling_ae.strip(), decision.peer or address)
        return decision

    def _note_refused_classes(self, assoc: PynetAssociation, token: str, calling_ae: str, sender: str) -> None:
        """Tell of the storage classes that get no presentation context: one event a minute for a sender."""
        accepted = accepted_classes(self._config)
        refused = [] if accepted is None else sorted(_storage_classes_of(assoc).difference(accepted))
        if not refused:
            return
        self._book.count_rejection("storage_class_refused")
        if (thinned := self._store.thinned("storage_class_refused", sender)) is not None:
            names = ", ".join(_class_name(uid) for uid in refused[:_CLASSES_TOLD])
            names += f" and {len(refused) - _CLASSES_TOLD} more" if len(refused) > _CLASSES_TOLD else ""
            log.info(
                "association.storage_class_refused",
                association=token[:8],
                calling_ae=calling_ae,
                classes=names,
                **thinned,
            )
            text = f'{shown(calling_ae)} got no presentation context for {names}: [intake].other_classes = "refuse"'
            self._store.note("storage_class_refused", text, {"classes": len(refused), **thinned})

    def _may_report(self, assoc: PynetAssociation, calling_ae: str, address: str) -> bool:
        """Whether a proposed context for Storage Commitment is taken for reports on what we asked.

        From any AE title in the role of SCP: only the archive knows the Transaction UID. Without role selection, from
        an archive that we ask: anybody else would ask us, and that is `commit` in its `may`.
        """
        if self._take_report is None:
            return False
        role = assoc.requestor.role_selection.get(STORAGE_COMMITMENT)
        return bool(role.scp_role) if role is not None else is_asked(self._config, calling_ae, address)

    def _reject(self, assoc: PynetAssociation, decision: Rejection) -> None:
        self._closed(assoc)
        assoc.acse.send_reject(decision.result, decision.source, decision.diagnostic)
        count = self._book.count_rejection(decision.code)
        request: Any = assoc.requestor.primitive
        address, title = plain_address(assoc.requestor.address), shown(str(request.calling_ae_title))
        named = self._names.known(address, f"{decision.code} {title}")  # else nothing that the caller chooses
        key = f"{decision.code} {address} {title if named else ''}"
        thinned = self._store.thinned("association_rejected", key)
        if thinned is not None:
            log.warning("association.rejected", code=decision.code, reason=decision.text, count=count, **thinned)
            details: dict[str, Any] = {"reason": decision.code, **thinned}
            if decision.config_lines:
                details["config_lines"] = list(decision.config_lines)
            self._store.note("association_rejected", decision.text, details)
            for line in () if named and thinned["repeated"] else decision.config_lines:
                log.warning("association.to_let_it_in", add_to_config=line)
        assoc.kill()  # waits until the rejection is sent and the peer closed (or the ARTIM timer ran out)

    def _too_many(self, text: str) -> None:
        """A connection was closed before it could ask for an association: somebody opens and says nothing."""
        self._turned_away("connection_limit", text, text)

    def _on_tls_failure(self, address: str, reason: str) -> None:
        if reason == NO_TLS:
            reason = f"{reason}; {plain_port(self._config)}"
        self._turned_away("tls_failed", f"{shown(address)}: {reason}", f"{address} {without_numbers(reason)}")

    def _turned_away(self, code: str, text: str, key: str) -> None:
        """Nobody asked for an association yet: who it was is not known."""
        self._book.count_rejection(code)
        thinned = self._store.thinned("association_rejected", f"{code} {key}")
        if thinned is not None:
            log.warning("association.rejected", code=code, reason=text, **thinned)
            self._store.note("association_rejected", text, {"reason": code, **thinned})

    def _reap(self) -> None:
        """Give back the places of associations whose thread ended without an event (pynetdicom after a bad PDU)."""
        with self._lock:
            dead = [assoc for assoc in self._tokens if not assoc.is_alive()]
        for assoc in dead:
            self._closed(assoc)

    def _closed(self, assoc: Any) -> None:
        """It ended, well or not; the first who says so is heard."""
        with self._lock:
            token = self._tokens.pop(assoc, None)
            if token is not None:
                for key in [key for key in self._bad_uids if key[0] == token]:
                    del self._bad_uids[key]
        if token is None:
            return
        self._store.spool.close_incoming(token)
        # the peer's closing of the connection may be seen before pynetdicom tells of the release that came first, and
        # it tells of a release in the middle of a message as of any other
        association = self._book.close(token, aborted=not assoc.pdu_reader.released)
        if association is None:
            return
        log.info(
            "association.closed",
            association=association.token[:8],
            calling_ae=association.calling_ae,
            stored=association.stored,
            dropped=association.dropped.total(),
            refused=association.refused.total(),
            aborted=association.aborted,
        )
        self._note_dropped(association)

    def _note_dropped(self, association: Association) -> None:
        """One event a minute for a sender and class: some open an association for each image."""
        for sop_class_uid, count in sorted(association.dropped.items()):
            key = " ".join((*sender(association), sop_class_uid))
            thinned = self._store.thinned("dropped_sop_class", key, count)
            if thinned is None:
                continue
            count += thinned.pop("repeated")
            name = _class_name(sop_class_uid)
            self._store.note(
                "dropped_sop_class",
                f"{count} instances of {name} from {shown(association.calling_ae)} were accepted and dropped: not CT",
                {"sop_class_uid": sop_class_uid, "instances": count, "calling_ae": association.calling_ae, **thinned},
            )

    def _on_sop_common(self, event: Event) -> dict[UID, Any]:
        """What a peer says of its classes' services is not believed: it would have another service answer a C-STORE."""
        return {**storage_services_for(event.assoc.acceptor.supported_contexts)}

    def _on_async_ops(self, event: Event) -> tuple[int, int]:  # noqa: ARG002
        """One operation at a time, said aloud (PS3.7 annex D.3.3.3)."""
        return 1, 1

    def _on_user_identity(self, event: Event) -> tuple[bool, None]:
        """Whoever a peer says that its user is: it is not checked, and a name gets the positive response it asks for.

        A ticket, an assertion or a token would be answered with one of ours, which we have not (PS3.7 table D.3-15):
        these get none, which says that they were not looked at.
        """
        requested: Any = event.assoc.requestor.user_identity
        if requested.user_identity_type in _NAMED_USERS and requested.positive_response_requested:
            response = UserIdentityNegotiation()
            response.server_response = b""
            event.assoc.acceptor.add_negotiation_item(response)
        return True, None

    # -- messages ------------------------------------------------------------------------------------------------

    def _on_echo(self, event: Event) -> int:  # noqa: ARG002
        return Status.SUCCESS

    def _on_report(self, event: Event) -> tuple[int, None]:
        """A commitment report: whoever was let in may bring it, for only the archive knows the Transaction UID."""
        if self._take_report is None:
            return Status.PROCESSING_FAILURE, None
        status = answer_report(event, self._take_report)
        if status == Status.INVALID_ARGUMENT:
            caller = shown(self._calling_ae(event))
            thinned = self._store.thinned("commitment_unknown", plain_address(event.assoc.requestor.address))
            if thinned is not None:
                text = f"a commitment report of {caller} names no transaction that was asked for here"
                self._store.note("commitment_unknown", text, thinned)
        return status, None

    def _on_message(self, event: Event) -> None:
        """Look at a C-STORE request's UIDs before pynetdicom does.

        pynetdicom aborts the association for a UID of 65 characters and never answers a request without one; a
        router would stall on that instance for ever. A placeholder lets the request through to the store handler,
        which answers it with a failure and goes on with the next instance.
        """
        command = event.message.command_set
        if command[_COMMAND_FIELD].value != _C_STORE_RQ:
            return
        command.pop(_MOVE_ORIGINATOR_AE, None)  # of no use here, and one more text of a stranger
        instance = _raw_text(command, _AFFECTED_INSTANCE)
        sop_class = _raw_text(command, _AFFECTED_CLASS)
        context = next((c for c in event.assoc.accepted_contexts if c.context_id == event.message.context_id), None)
        if context is None:
            return  # pynetdicom aborts
        fault = fault_of(sop_class_uid=sop_class, sop_instance_uid=instance, context_class=str(context.abstract_syntax))
        if fault:
            command.add_new(_AFFECTED_INSTANCE, "UI", PLACEHOLDER_UID if names_instance(fault) else instance)
            command.add_new(_AFFECTED_CLASS, "UI", str(context.abstract_syntax))
            with self._lock:
                token = self._tokens.get(event.assoc, "")
                self._bad_uids[token, int(command[_MESSAGE_ID].value)] = fault

    def _on_store(self, event: Event) -> int | Dataset:
        """Answer one C-STORE that pynetdicom read."""
        request: Any = event.request  # pynetdicom types it as any DIMSE primitive
        with self._lock:
            token = self._tokens.get(event.assoc, "")
            fault = self._bad_uids.pop((token, int(request.MessageID or 0)), "")
        if not token:  # the association ended while this request waited: nobody hears the answer
            return Status.UNABLE_TO_PROCESS
        return answer_store(event, self._store, token, self._calling_ae(event), fault)

    def _calling_ae(self, event: Event) -> str:
        return str(event.assoc.requestor.ae_title)


def _class_name(sop_class_uid: str) -> str:
    """The standard's name of a class, or a private one's UID."""
    return UID(sop_class_uid).name if UID(sop_class_uid).is_valid else shown(sop_class_uid)


def _would_store(assoc: PynetAssociation) -> bool:
    """Whether the requestor proposes a storage class."""
    return bool(_storage_classes_of(assoc))


def _storage_classes_of(assoc: PynetAssociation) -> set[str]:
    """The storage classes that the requestor proposes."""
    proposed = {str(context.abstract_syntax) for context in assoc.requestor.requested_contexts}
    return {uid for uid in proposed if is_storage_class(uid)}


def _raw_text(command: Dataset, tag: Any) -> str:
    """The element's bytes as text, before pydicom validates or warns about them."""
    if tag not in command:
        return ""
    value = command.get_item(tag).value
    if isinstance(value, bytes):
        return value.decode("latin-1").rstrip("\0 ")
    return str(value or "")
