"""Storage Commitment Push Model as SCP (PS3.4 annex J): a peer asks whether we hold what it stored.

The answer to its N-ACTION says only that the request is kept, durably. The report (N-EVENT-REPORT) goes over the same
association where that stays open and quiet, which `CommitmentScp` sees to in the process that received the request;
else over one of ours (`send_report`), which is the node's matter (`dicom_node.commitments`).

Held means: durable in the spool at the moment of the report, and sorted into its series: what the assembler has not
looked at may yet go to quarantine, so that a report waits for it (`is_coming`). Retention removes it later, as it does
any input.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import IntEnum
from pathlib import Path
from queue import SimpleQueue
from typing import Any
from weakref import WeakKeyDictionary

import structlog
from pydicom import Dataset
from pydicom.sequence import Sequence as DicomSequence
from pynetdicom import build_role, evt
from pynetdicom.association import Association
from pynetdicom.dimse_messages import N_ACTION_RSP

from dicom_node.config import Config, PeerConfig
from dicom_node.headers import BadInstance, read_header
from dicom_node.net.commitment import PUSH_MODEL, PUSH_MODEL_INSTANCE, REQUEST_COMMITMENT, commitment_context
from dicom_node.net.link import Link, RequestOutcome, Timeouts, Trouble, dimse_status, where
from dicom_node.net.part10 import read_part10
from dicom_node.net.peers import peer_that_may, plain_address, shown
from dicom_node.net.status import Outcome, Status, classify, status_text
from dicom_node.net.store import Notes, kept_classes
from storage.asked import Asked, AskedCommitments
from storage.errors import BadUid, NoSpace, StaleState
from storage.ledger import utc_now
from storage.spool import Spool, check_uid

log = structlog.get_logger(__name__)

MOST_REFERENCES = 100_000  # in one request: far above any study
SAME_ASSOCIATION_AFTER_S = 1.0  # of quiet: who releases the association at once is told on another one
SAME_ASSOCIATION_ANSWER_S = 10.0  # for the requestor's answer to a report there
SAME_ASSOCIATION_SORTED_S = 5.0  # for the assembler to look at what was asked for; then the node waits
SORTED_WITHIN_S = 300.0  # of the request; what still waits then is reported as not held
HANDED_OVER_S = 60.0  # then the node reports, whatever became of the association
_JOIN_S = 15.0
_SLICE_S = 0.05
_LOOK_EVERY_S = 0.2
_EVENT_ALL_HELD, _EVENT_FAILURES = 1, 2  # Event Type IDs (table J.3-2)


class FailureReason(IntEnum):
    """Why an instance is not held (PS3.3 C.14.1.1)."""

    PROCESSING_FAILURE = 0x0110
    NO_SUCH_INSTANCE = 0x0112
    CLASS_INSTANCE_CONFLICT = 0x0119
    CLASS_NOT_SUPPORTED = 0x0122


FAILURES: Mapping[FailureReason, str] = {
    FailureReason.PROCESSING_FAILURE: "the file is there, and cannot be read or was not sorted in time",
    FailureReason.NO_SUCH_INSTANCE: "it is not here: never received, in quarantine, or removed by retention",
    FailureReason.CLASS_INSTANCE_CONFLICT: "it is here with another SOP class",
    FailureReason.CLASS_NOT_SUPPORTED: "instances of this SOP class are not kept",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What a report says. `held` and `failed` are of the references of the request, in its order.

    `study_uid` and `accession` are those of what is here, where that is of one study.
    """

    transaction_uid: str
    held: tuple[tuple[str, str], ...] = ()
    failed: tuple[tuple[str, str, FailureReason], ...] = ()
    study_uid: str = ""
    accession: str = ""

    @property
    def details(self) -> dict[str, Any]:
        """For the ledger and the log."""
        return {
            "transaction_uid": self.transaction_uid,
            "held": len(self.held),
            "failed": len(self.failed),
            "reasons": {f"0x{reason:04X}": count for reason, count in self._reasons.items()},
            "study_uid": self.study_uid,
        }

    @property
    def text(self) -> str:
        """How many are held, and why the others are not."""
        why = "".join(f"; {count} not (0x{reason:04X}: {FAILURES[reason]})" for reason, count in self._reasons.items())
        return f"{len(self.held)} of {len(self.held) + len(self.failed)} are held{why}"

    @property
    def _reasons(self) -> Counter[FailureReason]:
        return Counter(reason for _, _, reason in self.failed)


class RequestRefused(ValueError):
    """An N-ACTION that is no request for commitment that we take; `status` is the answer to it."""

    def __init__(self, status: Status, text: str) -> None:
        super().__init__(text)
        self.status = status


# ---- what we hold


def is_coming(request: Asked, spool: Spool) -> bool:
    """Whether something of a request waits for the assembler, which has it held or put into quarantine."""
    return bool(spool.find_incoming({uid for _, uid in request.references}))


def judge(request: Asked, spool: Spool, kept: frozenset[Any]) -> Verdict:
    """Look for every instance of a request in the spool, now. What waits for the assembler is not held."""
    there = spool.find_instances(uid for _, uid in request.references)
    held, failed = [], []
    for sop_class, uid in request.references:
        reason = _fault(sop_class, uid, there.get(uid), spool, kept)
        if reason is None:
            held.append((sop_class, uid))
        else:
            failed.append((sop_class, uid, reason))
    study_uid, accession = _study_of(there.values(), spool)
    return Verdict(
        transaction_uid=request.transaction_uid,
        held=tuple(held),
        failed=tuple(failed),
        study_uid=study_uid,
        accession=accession,
    )


def _study_of(paths: Iterable[Path], spool: Spool) -> tuple[str, str]:
    """(Study Instance UID, accession number) of files that are sorted; empty where they are of several studies.

    One file of each folder is looked into: that of a series or a job holds one study.
    """
    found = set()
    for path in {path.parent: path for path in paths if not spool.is_incoming(path)}.values():
        with suppress(BadInstance, OSError):  # a report is worth more than what is noted of it
            header = read_header(path)
            found.add((header.study_uid, header.accession))
    return found.pop() if len(found) == 1 else ("", "")


def _fault(
    sop_class: str, uid: str, path: Path | None, spool: Spool, kept: frozenset[Any], *, again: bool = True
) -> FailureReason | None:
    if path is None:
        return FailureReason.NO_SUCH_INSTANCE if sop_class in kept else FailureReason.CLASS_NOT_SUPPORTED
    if spool.is_incoming(path):
        return FailureReason.PROCESSING_FAILURE
    try:
        actual = read_part10(path).sop_class_uid
    except FileNotFoundError:  # it went on to its job since, by a rename, or it was removed
        now = spool.find_instances([uid]).get(uid) if again else None
        return _fault(sop_class, uid, now, spool, kept, again=False)
    except Exception:  # the disk, or a file that somebody changed
        log.exception("commitment.unreadable", sop_instance_uid=uid)
        return FailureReason.PROCESSING_FAILURE
    return None if actual == sop_class else FailureReason.CLASS_INSTANCE_CONFLICT


# ---- the request


def read_request(event: evt.Event) -> tuple[str, tuple[tuple[str, str], ...]]:
    """(Transaction UID, references) of an N-ACTION (table J.3-1). Raises `RequestRefused`."""
    request: Any = event.request  # pynetdicom types it as any DIMSE primitive
    if str(request.RequestedSOPInstanceUID) != PUSH_MODEL_INSTANCE:
        raise RequestRefused(Status.NO_SUCH_INSTANCE, "it is not for the well-known instance of the Push Model")
    if request.ActionTypeID != REQUEST_COMMITMENT:
        raise RequestRefused(Status.NO_SUCH_ACTION, "its Action Type is not 1")
    try:
        return parse_request(event.action_information)
    except (RequestRefused, BadUid):
        raise
    except Exception as error:  # pydicom raises whatever it meets in a broken data set
        raise RequestRefused(Status.INVALID_ARGUMENT, f"it cannot be read: {type(error).__name__}") from error


def parse_request(ds: Dataset) -> tuple[str, tuple[tuple[str, str], ...]]:
    """The Action Information; an instance that is named twice counts once. Raises `RequestRefused`, `BadUid`."""
    transaction_uid = check_uid(str(ds.get("TransactionUID") or ""))
    items = ds.get("ReferencedSOPSequence") or ()
    if not items:
        raise RequestRefused(Status.INVALID_ARGUMENT, "it refers to no instance")
    if len(items) > MOST_REFERENCES:
        raise RequestRefused(Status.RESOURCE_LIMITATION, f"it refers to more than {MOST_REFERENCES} instances")
    pairs = ((str(item.ReferencedSOPClassUID), str(item.ReferencedSOPInstanceUID)) for item in items)
    return transaction_uid, tuple(dict.fromkeys((check_uid(sop_class), check_uid(uid)) for sop_class, uid in pairs))


class CommitmentScp:
    """Takes requests in the process that receives, and reports on their own association where that can be.

    One thread of its own does the reporting, so that no association waits for another.
    """

    def __init__(
        self,
        config: Config,
        spool: Spool,
        notes: Notes,
        *,
        clock: Callable[[], datetime] = utc_now,
    ) -> None:
        self._config, self._spool, self._notes, self._clock = config, spool, notes, clock
        self._kept = kept_classes(config)
        self._asked = AskedCommitments(spool.root)
        self._answered = WeakKeyDictionary[Association, Asked]()  # the answer is on its way
        self._due: SimpleQueue[tuple[Association, Asked, float] | None] = SimpleQueue()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="commitment-reports", daemon=True)

    @property
    def handlers(self) -> list[evt.EventHandlerType]:
        return [(evt.EVT_N_ACTION, self._on_action), (evt.EVT_DIMSE_SENT, self._on_sent)]

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """What is not reported yet stays in the spool, for the node or its next life."""
        self._stopping.set()
        self._due.put(None)
        if self._thread.is_alive():
            self._thread.join(_JOIN_S)

    def _on_action(self, event: evt.Event) -> tuple[int, None]:
        caller = str(event.assoc.requestor.ae_title).strip()
        try:
            self._answered[event.assoc] = self._take(event)
        except BadUid as error:
            log.warning("commitment.request_refused", calling_ae=caller, reason=str(error))
            return Status.INVALID_ARGUMENT, None
        except RequestRefused as error:
            log.warning("commitment.request_refused", calling_ae=caller, reason=str(error))
            return error.status, None
        except StaleState as error:
            log.warning("commitment.request_refused", calling_ae=caller, reason=str(error))
            return Status.PROCESSING_FAILURE, None
        except NoSpace as error:
            log.warning("commitment.request_refused", calling_ae=caller, reason=str(error))
            return Status.RESOURCE_LIMITATION, None
        except Exception:  # an edge: nothing may leave the peer without a status
            log.exception("commitment.request_failed")
            return Status.PROCESSING_FAILURE, None
        return Status.SUCCESS, None

    def _take(self, event: evt.Event) -> Asked:
        calling_ae = str(event.assoc.requestor.ae_title).strip()
        address = plain_address(event.assoc.requestor.address)
        peer = peer_that_may(self._config.peers, "commit", calling_ae=calling_ae, address=address)
        if peer is None:
            raise RequestRefused(Status.NOT_AUTHORIZED, "its peer may not ask for commitment")
        transaction_uid, references = read_request(event)
        if not self._spool.room_for(0):
            raise NoSpace("the disk has less than [intake].min_free_bytes free")
        now = self._clock()
        request = Asked(
            transaction_uid=transaction_uid,
            calling_ae=calling_ae,
            peer=peer.name,
            references=references,
            asked=now,
            due=now + timedelta(seconds=HANDED_OVER_S),
        )
        kept = self._asked.add(request)
        log.info("commitment.asked", peer=peer.name, transaction_uid=transaction_uid, instances=len(references))
        return kept

    def _on_sent(self, event: evt.Event) -> None:
        if isinstance(event.message, N_ACTION_RSP) and event.assoc in self._answered:
            self._due.put((event.assoc, self._answered.pop(event.assoc), time.monotonic()))

    # ---- the thread

    def _run(self) -> None:
        while (one := self._due.get()) is not None:
            assoc, request, sent = one
            while assoc.is_established and time.monotonic() < sent + SAME_ASSOCIATION_AFTER_S:
                if self._stopping.wait(_SLICE_S):
                    break
            if self._stopping.is_set():
                return
            try:
                self._report(assoc, request, sent)
            except Exception:
                log.exception("commitment.report_failed", transaction_uid=request.transaction_uid)

    def _is_sorted(self, assoc: Any, request: Asked, sent: float) -> bool:
        """Whether the assembler has looked at all that was asked for, soon enough for this association."""
        while is_coming(request, self._spool):
            late = time.monotonic() >= sent + SAME_ASSOCIATION_SORTED_S
            if late or not assoc.is_established or self._stopping.wait(_LOOK_EVERY_S):
                return False
        return True

    def _report(self, assoc: Any, request: Asked, sent: float) -> None:
        now = self._clock()
        if self._asked.get(request.key) is None or request.due - now < timedelta(seconds=SAME_ASSOCIATION_ANSWER_S):
            return  # reported already, or the node is about to
        if self._is_sorted(assoc, request, sent) and assoc.is_established and assoc.pdu_reader.heard_at <= sent:
            verdict = judge(request, self._spool, self._kept)
            assoc.dimse_timeout = min(assoc.dimse_timeout or SAME_ASSOCIATION_ANSWER_S, SAME_ASSOCIATION_ANSWER_S)
            trouble = report_on(assoc, verdict, "the requestor")
            if trouble is None:
                note_reported(self._notes, request, verdict, "the same association")
                self._asked.done(request)
                return
            log.info("commitment.not_on_same_association", reason=trouble.text)
        self._asked.postpone(request, due=self._clock(), attempts=request.attempts)


# ---- the report


def event_information(verdict: Verdict) -> Dataset:
    """Table J.3-2."""
    ds = Dataset()
    ds.TransactionUID = verdict.transaction_uid
    if verdict.held:
        ds.ReferencedSOPSequence = DicomSequence([_item(sop_class, uid) for sop_class, uid in verdict.held])
    if verdict.failed:
        ds.FailedSOPSequence = DicomSequence([_item(*one) for one in verdict.failed])
    return ds


def _item(sop_class: str, uid: str, reason: int | None = None) -> Dataset:
    ds = Dataset()
    ds.ReferencedSOPClassUID, ds.ReferencedSOPInstanceUID = sop_class, uid
    if reason is not None:
        ds.FailureReason = int(reason)
    return ds


def report_on(assoc: Association, verdict: Verdict, whom: str) -> Trouble | None:
    """N-EVENT-REPORT on an association that is there; None when the peer took it."""
    kind = _EVENT_FAILURES if verdict.failed else _EVENT_ALL_HELD
    try:
        answer, _ = assoc.send_n_event_report(event_information(verdict), kind, PUSH_MODEL, PUSH_MODEL_INSTANCE)
    except (ValueError, RuntimeError):  # the association ended in between
        answer = Dataset()
    status = dimse_status(answer)
    if status is None:
        return Trouble("no_response", f"{whom} did not answer the commitment report", False)
    outcome = classify(status)
    if outcome is Outcome.OK:
        return None
    text = f"{whom} refused the commitment report: {status_text(status)}"
    return Trouble("report_refused", text, outcome is Outcome.PERMANENT)


def send_report(
    verdict: Verdict, peer: PeerConfig, *, calling_ae: str, timeouts: Timeouts, max_pdu: int
) -> RequestOutcome:
    """N-EVENT-REPORT on an association of ours, in which we are the SCP by role selection (PS3.4 J.3.3.1.3)."""
    began = time.monotonic()
    roles = [build_role(PUSH_MODEL, scp_role=True)]
    with Link(peer, [commitment_context()], calling_ae, timeouts, max_pdu, roles=roles) as link:
        trouble = link.trouble or report_on(link.assoc, verdict, where(peer))
    seconds = time.monotonic() - began
    return RequestOutcome.of(trouble, seconds=seconds)


def note_reported(notes: Notes, request: Asked, verdict: Verdict, way: str) -> None:
    """One ledger event and one line of the log for a report that its requestor took."""
    details = {**verdict.details, "peer": request.peer, "calling_ae": request.calling_ae}
    log.info("commitment.reported_to", way=way, **details)
    text = f"{shown(request.calling_ae)} was told on {way}: {verdict.text}"
    try:
        notes.note("", "commitment_reported", text, details={**details, "accession": verdict.accession})
    except Exception:  # the peer was told: that it is not written down must not tell it again
        log.exception("ledger.note_failed", code="commitment_reported")


def describe(reasons: Sequence[FailureReason] = tuple(FailureReason)) -> list[tuple[str, str]]:
    """Failure Reasons and when they are given, for the conformance statement."""
    return [(f"{reason:04X}", FAILURES[reason]) for reason in reasons]
