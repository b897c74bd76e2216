"""Storage Commitment Push Model as SCU (PS3.4 annex J, IHE RAD-10): ask an archive to take charge of what it stored.

The request (N-ACTION) goes over an association of ours. The report (N-EVENT-REPORT) comes when the archive knows: on
the same association, on a later one of ours, or on one that the archive opens to us; `answer_report` serves all.

RequestOutcome codes: "" (the archive took the request), not_offered, commitment_refused, no_response, interrupted, and
those of `link`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

import structlog
from pydicom import Dataset
from pydicom.sequence import Sequence as DicomSequence
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import build_context, evt
from pynetdicom.dimse_messages import N_EVENT_REPORT_RSP
from pynetdicom.pdu import P_DATA_TF
from pynetdicom.presentation import PresentationContext

from dicom_node.config import PeerConfig
from dicom_node.net.link import Link, RequestOutcome, Timeouts, Trouble, dimse_status, where
from dicom_node.net.part10 import Part10
from dicom_node.net.scp import STORAGE_COMMITMENT
from dicom_node.net.status import Outcome, Status, classify, status_text

log = structlog.get_logger()

PUSH_MODEL: str = STORAGE_COMMITMENT
PUSH_MODEL_INSTANCE = "1.2.840.10008.1.20.1.1"  # well-known
REQUEST_COMMITMENT = 1  # Action Type ID
EVENT_TYPES = (1, 2)  # all committed; failures exist
# a status that says what an unaccepted presentation context says: this service is not there
NOT_OFFERED_STATUSES = frozenset({0x0118, 0x0122, 0x0123, 0x0211})
NOT_AUTHORIZED = 0x0124
_SLICE_S = 0.05
_SENT_S = 5.0  # for our response to leave before the association is released


@dataclass(frozen=True, kw_only=True, slots=True)
class CommitmentReport:
    """An N-EVENT-REPORT. `failed`: SOP Instance UID to Failure Reason as "0x0112" (PS3.3 C.14.1.1)."""

    transaction_uid: str
    committed: frozenset[str] = frozenset()
    failed: Mapping[str, str] = field(default_factory=dict)


Take = Callable[[CommitmentReport], Status]  # keeps a report durably, then says how to answer it


class ReportError(ValueError):
    """A report that breaks the rules; `status` is the answer to it."""

    def __init__(self, status: Status, text: str) -> None:
        super().__init__(text)
        self.status = status


def request_commitment(
    parts: Sequence[Part10],
    peer: PeerConfig,
    *,
    transaction_uid: str,
    calling_ae: str,
    take: Take,
    reported: threading.Event,
    wait_s: float,
    timeouts: Timeouts | None = None,
    max_pdu: int = 262144,
    should_stop: Callable[[], bool] = lambda: False,
) -> RequestOutcome:
    """N-ACTION for these instances, then stay `wait_s` seconds for a report on the same association.

    `take` gets every report that comes meanwhile, also of earlier transactions; `reported` is set from outside and
    ends the waiting, wherever the report came in.
    """
    began = monotonic()
    served = _Served(take)
    with Link(peer, [commitment_context()], calling_ae, timeouts or Timeouts(), max_pdu, served.handlers) as link:
        trouble = link.trouble or _ask(link, parts, transaction_uid, peer)
        if trouble is None:
            until = monotonic() + wait_s
            while link.assoc.is_established and monotonic() < until and not should_stop():
                if reported.wait(_SLICE_S):
                    break
            served.wait_until_answered()
    seconds = monotonic() - began
    return RequestOutcome.of(trouble, seconds=seconds)


def commitment_context() -> PresentationContext:
    """What we propose; the role of SCU is the requestor's by default (PS3.7 D.3.3.4)."""
    return build_context(PUSH_MODEL, [ExplicitVRLittleEndian, ImplicitVRLittleEndian])


def action_information(parts: Sequence[Part10], transaction_uid: str) -> Dataset:
    """Table J.3-1: the Transaction UID and one reference for each instance."""
    ds = Dataset()
    ds.TransactionUID = transaction_uid
    ds.ReferencedSOPSequence = DicomSequence([_reference(part) for part in parts])
    return ds


def _reference(part: Part10) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = part.sop_class_uid, part.sop_instance_uid
    return item


def _ask(link: Link, parts: Sequence[Part10], transaction_uid: str, peer: PeerConfig) -> Trouble | None:
    try:
        answer, _ = link.assoc.send_n_action(
            action_information(parts, transaction_uid), REQUEST_COMMITMENT, PUSH_MODEL, PUSH_MODEL_INSTANCE
        )
    except (ValueError, RuntimeError):  # the association ended in between
        answer = Dataset()
    status = dimse_status(answer)
    if status is None:
        return Trouble("no_response", f"{where(peer)} did not answer the commitment request", False)
    if classify(status) is Outcome.OK:
        return None
    text = f"{where(peer)} refused the commitment request: {status_text(status)}"
    if status in NOT_OFFERED_STATUSES:
        return Trouble("not_offered", text, True)
    return Trouble("commitment_refused", text, status == NOT_AUTHORIZED)


class _Served:
    """The reports that come on an association of ours; waits for the responses before it is released."""

    def __init__(self, take: Take) -> None:
        self._take = take
        self._lock = threading.Lock()
        self._open = 0  # reports that are being answered
        self._queued = False
        self._answered = threading.Event()
        self._answered.set()

    @property
    def handlers(self) -> list[evt.EventHandlerType]:
        return [
            (evt.EVT_N_EVENT_REPORT, self._on_report),
            (evt.EVT_DIMSE_SENT, self._on_message),
            (evt.EVT_PDU_SENT, self._on_pdu),
        ]

    def wait_until_answered(self) -> None:
        self._answered.wait(_SENT_S)

    def _on_report(self, event: evt.Event) -> tuple[int, None]:
        self._answered.clear()
        return answer_report(event, self._take), None

    def _on_message(self, event: evt.Event) -> None:
        if isinstance(event.message, N_EVENT_REPORT_RSP):
            self._queued = True

    def _on_pdu(self, event: evt.Event) -> None:
        if self._queued and isinstance(event.pdu, P_DATA_TF):
            self._queued = False
            self._answered.set()


def answer_report(event: evt.Event, take: Take) -> int:
    """The status for one N-EVENT-REPORT: Success only after `take` has made it durable.

    No Such Event Type (0113) and Invalid Argument Value (0115) for what is no report; Processing Failure (0110)
    when it could not be kept, so that the archive reports again.
    """
    try:
        return int(take(read_report(event)))
    except ReportError as error:
        log.warning("commitment.bad_report", reason=str(error))
        return int(error.status)
    except Exception:  # an edge: without a status the archive would never report again
        log.exception("commitment.report_failed")
        return int(Status.PROCESSING_FAILURE)


def read_report(event: evt.Event) -> CommitmentReport:
    """The report of an N-EVENT-REPORT request (table J.3-2). Raises `ReportError`."""
    request: Any = event.request  # pynetdicom types it as any DIMSE primitive
    if request.EventTypeID not in EVENT_TYPES:
        raise ReportError(Status.NO_SUCH_EVENT_TYPE, "its Event Type is neither 1 nor 2")
    try:
        return parse_report(event.event_information)
    except ReportError:
        raise
    except Exception as error:  # pydicom raises whatever it meets in a broken data set
        raise ReportError(Status.INVALID_ARGUMENT, f"cannot be read: {type(error).__name__}") from error


def parse_report(ds: Dataset) -> CommitmentReport:
    """Event Information: who is in both sequences has failed. Raises `ReportError` without a Transaction UID."""
    transaction_uid = str(ds.get("TransactionUID") or "")
    if not transaction_uid:
        raise ReportError(Status.INVALID_ARGUMENT, "it has no Transaction UID")
    failed = {
        str(item.ReferencedSOPInstanceUID): f"0x{int(item.get('FailureReason') or 0x0110):04X}"
        for item in ds.get("FailedSOPSequence") or ()
    }
    stored = {str(item.ReferencedSOPInstanceUID) for item in ds.get("ReferencedSOPSequence") or ()}
    return CommitmentReport(transaction_uid=transaction_uid, committed=frozenset(stored - set(failed)), failed=failed)
