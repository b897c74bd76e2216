"""A series from an archive, as SCU (PS3.4 annex C): C-MOVE, by which it sends to our receiver, or C-GET.

RetrieveOutcome codes: "" (every instance came), incomplete (some did not), destination_unknown (A801: the archive
does not know our AE title), retrieve_refused, no_response, interrupted, too_long, not_offered, and those of `link`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import monotonic
from typing import Any

from pydicom import Dataset
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import build_context, build_role, evt
from pynetdicom.presentation import PresentationContext

from dicom_node.config import PeerConfig
from dicom_node.net.link import Link, RequestOutcome, Timeouts, Trouble, aborted_when, dimse_status, of_service, where
from dicom_node.net.query import NOT_OFFERED_STATUSES
from dicom_node.net.scp import CT_CLASSES, ct_transfer_syntaxes
from dicom_node.net.status import status_text
from dicom_node.net.store import Store, answer_store, fault_of

STUDY_ROOT_MOVE = "1.2.840.10008.5.1.4.1.2.2.2"
STUDY_ROOT_GET = "1.2.840.10008.5.1.4.1.2.2.3"
PENDING = 0xFF00
SUCCESS, SOME_FAILED = 0x0000, 0xB000  # PS3.4 tables C.4-2 and C.4-3
DESTINATION_UNKNOWN = 0xA801
MOST_PENDING = 1_000_000  # answers to one request: one for each instance is usual

Progress = Callable[[int, int | None], object]  # (instances so far, of how many where it is known)


@dataclass(frozen=True, kw_only=True, slots=True)
class RetrieveOutcome(RequestOutcome):
    """What came of it, by the archive's own count; a warning of a sub-operation counts as come."""

    completed: int = 0
    failed: int = 0
    failed_uids: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Retrieval:
    """How to ask one archive. `most_s`: for a whole series; between two answers `timeouts.dimse_s` may pass."""

    peer: PeerConfig
    calling_ae: str
    timeouts: Timeouts
    max_pdu: int = 262144
    most_s: float = 3600.0
    should_stop: Callable[[], bool] = lambda: False
    progress: Progress = lambda _done, _total: None

    def move(self, study_uid: str, series_uid: str) -> RetrieveOutcome:
        """C-MOVE of a series to our own AE title: the archive must know it, and our receiver must run."""
        with Link(self.peer, [move_context()], self.calling_ae, self.timeouts, self.max_pdu) as link:

            def answers() -> Iterator[tuple[Dataset, Dataset | None]]:
                query = series_query(study_uid, series_uid)
                return link.assoc.send_c_move(query, self.calling_ae, STUDY_ROOT_MOVE, msg_id=_MESSAGE_ID)

            return self._listen(link, answers, STUDY_ROOT_MOVE)

    def get(self, study_uid: str, series_uid: str, store: Store, token: str) -> RetrieveOutcome:
        """C-GET of a series: each instance goes the way of one that was sent to us, as of association `token`."""

        def on_store(event: evt.Event) -> int | Dataset:
            return _kept(event, store, token)

        roles = [build_role(sop_class, scp_role=True) for sop_class in sorted(CT_CLASSES)]
        handlers: list[evt.EventHandlerType] = [(evt.EVT_C_STORE, on_store)]
        link_to = Link(self.peer, get_contexts(), self.calling_ae, self.timeouts, self.max_pdu, handlers, roles=roles)
        with link_to as link:

            def answers() -> Iterator[tuple[Dataset, Dataset | None]]:
                query = series_query(study_uid, series_uid)
                return link.assoc.send_c_get(query, STUDY_ROOT_GET, msg_id=_MESSAGE_ID)

            return self._listen(link, answers, STUDY_ROOT_GET)

    def _listen(
        self, link: Link, answers: Callable[[], Iterator[tuple[Dataset, Dataset | None]]], model: str
    ) -> RetrieveOutcome:
        began = monotonic()
        if link.trouble is not None:
            return _outcome(link.trouble, monotonic() - began)
        if model not in {str(context.abstract_syntax) for context in link.assoc.accepted_contexts}:
            what = "C-MOVE" if model == STUDY_ROOT_MOVE else "C-GET"
            return _outcome(Trouble("not_offered", f"{where(self.peer)} offers no {what}", True), monotonic() - began)
        counted = _Counts()
        try:
            with aborted_when(link, self.should_stop):
                trouble = self._follow(link, answers(), counted, began + self.most_s, model)
        except (ValueError, RuntimeError):  # the association ended in between
            trouble = Trouble("no_response", f"{where(self.peer)} ended the association meanwhile", False)
        if trouble is not None and trouble.code == "no_response" and self.should_stop():
            trouble = _INTERRUPTED
        return _outcome(trouble, monotonic() - began, counted)

    def _follow(
        self,
        link: Link,
        answers: Iterator[tuple[Dataset, Dataset | None]],
        counted: _Counts,
        until: float,
        model: str,
    ) -> Trouble | None:
        """The answers to their end; None when the last one is a success."""
        for number, (answer, identifier) in enumerate(answers, 1):
            status = dimse_status(answer)
            if status is None:
                text = f"{where(self.peer)} said nothing for {self.timeouts.dimse_s:g} s, or ended the association"
                return Trouble("no_response", text, False)
            counted.read(answer)
            if status != PENDING:
                counted.read_failed(identifier)
                return _judged(status, counted, self)
            self.progress(counted.completed, counted.total)
            trouble = self._enough(number, until)
            if trouble is not None:
                link.assoc.send_c_cancel(_MESSAGE_ID, query_model=model)
                link.assoc.abort()  # the archive may go on: what it still sends is taken, or refused with a reason
                return trouble
        return Trouble("no_response", f"{where(self.peer)} ended its answers without a last one", False)

    def _enough(self, number: int, until: float) -> Trouble | None:
        if self.should_stop():
            return _INTERRUPTED
        if monotonic() > until:
            return Trouble("too_long", f"{where(self.peer)} was not done after {self.most_s:g} s", False)
        if number > MOST_PENDING:
            return Trouble("too_long", f"{where(self.peer)} answered more than {MOST_PENDING} times", False)
        return None


_MESSAGE_ID = 1
_INTERRUPTED = Trouble("interrupted", "stopped while fetching", False)


class _Counts:
    """The sub-operations, as the archive counts them (PS3.7 9.1.4.1); a count that it leaves out stays."""

    def __init__(self) -> None:
        self.completed = self.failed = 0
        self.told = False  # the archive counts at all
        self.total: int | None = None
        self.failed_uids: tuple[str, ...] = ()

    def read(self, answer: Dataset) -> None:
        done = _count(answer, "NumberOfCompletedSuboperations")
        warned = _count(answer, "NumberOfWarningSuboperations")
        failed = _count(answer, "NumberOfFailedSuboperations")
        left = _count(answer, "NumberOfRemainingSuboperations")
        if done is not None or warned is not None:
            self.completed, self.told = (done or 0) + (warned or 0), True
        self.failed = self.failed if failed is None else failed
        if left is not None:
            self.total = self.completed + self.failed + left

    def read_failed(self, identifier: Dataset | None) -> None:
        found: Any = identifier.get("FailedSOPInstanceUIDList") if identifier is not None else None
        uids = [found] if isinstance(found, str) else list(found or ())
        self.failed_uids = tuple(str(uid) for uid in uids)


def _count(answer: Dataset, keyword: str) -> int | None:
    value = answer.get(keyword)
    return int(value) if isinstance(value, int) else None


def _judged(status: int, counted: _Counts, how: Retrieval) -> Trouble | None:
    """What the last answer means: by its counts, where it counts. A warning that counts no failure is a success."""
    at = where(how.peer)
    if status == DESTINATION_UNKNOWN:
        text = f"{at} does not know {how.calling_ae} as a destination: add it there, with this node's address and port"
        return Trouble("destination_unknown", text, True)
    if status in NOT_OFFERED_STATUSES:
        return Trouble("not_offered", f"{at} refused to send: {status_text(status)}", True)
    if status not in (SUCCESS, SOME_FAILED):
        return Trouble("retrieve_refused", f"{at} did not send: {_said(status)}", False)
    failed = max(counted.failed, len(counted.failed_uids))
    if failed or (status == SOME_FAILED and not counted.told):
        of = f"{failed or 'some'} of {counted.completed + failed or 'its'} instances"
        return Trouble("incomplete", f"{at} could not send {of}", False)
    if counted.told and not counted.completed:
        return Trouble("incomplete", f"{at} says that it is done, and sent nothing", False)
    return None


def _said(status: int) -> str:
    return _STATUSES.get(status) or status_text(status)


_STATUSES = {  # PS3.4 table C.4-2: their meaning here is another than for C-STORE
    0xA701: "0xA701 out of resources: unable to calculate the number of matches",
    0xA702: "0xA702 out of resources: it could not send any instance; does it reach this node, and is there room here?",
    0xA900: "0xA900 the identifier does not match the SOP class",
    0xFE00: "0xFE00 it was cancelled there",
}


def _outcome(trouble: Trouble | None, seconds: float, counted: _Counts | None = None) -> RetrieveOutcome:
    counted = counted or _Counts()
    counts: dict[str, Any] = {
        "completed": counted.completed,
        "failed": counted.failed,
        "failed_uids": counted.failed_uids,
        "seconds": seconds,
    }
    return RetrieveOutcome.of(of_service(trouble), **counts)


def series_query(study_uid: str, series_uid: str) -> Dataset:
    """The identifier of a retrieval at SERIES level (PS3.4 C.4.2.1.4)."""
    ds = Dataset()
    ds.QueryRetrieveLevel = "SERIES"
    ds.StudyInstanceUID, ds.SeriesInstanceUID = study_uid, series_uid
    return ds


def move_context() -> PresentationContext:
    """What we propose for C-MOVE."""
    return build_context(STUDY_ROOT_MOVE, [ExplicitVRLittleEndian, ImplicitVRLittleEndian])


def get_contexts() -> list[PresentationContext]:
    """What we propose for C-GET: CT in one context for each syntax, so that it comes as the archive has it."""
    ct = [build_context(sop_class, syntax) for sop_class in sorted(CT_CLASSES) for syntax in ct_transfer_syntaxes()]
    return [build_context(STUDY_ROOT_GET, [ExplicitVRLittleEndian, ImplicitVRLittleEndian]), *ct]


def _kept(event: evt.Event, store: Store, token: str) -> int | Dataset:
    """Answer one C-STORE of a C-GET."""
    request: Any = event.request  # pynetdicom types it as any DIMSE primitive
    fault = fault_of(
        sop_class_uid=str(request.AffectedSOPClassUID),
        sop_instance_uid=str(request.AffectedSOPInstanceUID),
        context_class=str(event.context.abstract_syntax),
    )
    return answer_store(event, store, token, str(event.assoc.acceptor.ae_title), fault)
