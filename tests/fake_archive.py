"""A scripted archive: a `FakePacs` that also commits and answers C-FIND, in every way that an archive can get wrong.

with FakeArchive(answer="same") as archive: ...
archive.report(archive.requests[0], to=node_port)   # on an association of its own, as late as the test likes
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Literal

from fake_pacs import FakePacs
from pydicom import Dataset
from pydicom.sequence import Sequence as DicomSequence
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import AE, build_role, evt
from pynetdicom.dimse_messages import N_ACTION_RSP
from pynetdicom.dimse_primitives import N_EVENT_REPORT
from pynetdicom.dsutils import encode

COMMITMENT, COMMITMENT_INSTANCE = "1.2.840.10008.1.20.1", "1.2.840.10008.1.20.1.1"
FIND = "1.2.840.10008.5.1.4.1.2.2.1"
SYNTAXES = [ImplicitVRLittleEndian, ExplicitVRLittleEndian]
WAIT_S = 60.0


@dataclass(frozen=True)
class Request:
    """One N-ACTION: its Transaction UID and the references in it, SOP Instance UID to SOP Class UID."""

    transaction_uid: str
    references: Mapping[str, str]


Failing = Callable[[Request, int], Mapping[str, int]]  # (request, its number: 1, 2, ...) -> UID to Failure Reason


def none_fails(_request: Request, _number: int) -> Mapping[str, int]:
    return {}


class FakeArchive(FakePacs):
    """`answer`: "early" reports on the requestor's association and waits for the answer before it answers the request
    itself, "same" reports there afterwards, "new" on one of its own to `node_port`, "next" on that
    of the next request, "none" leaves it to the test. `action_status` answers the N-ACTION. `shown` is how many of
    the stored instances C-FIND tells of at a look (its number: 1, 2, ...); without `counts` the key (0020,1209) stays
    empty.
    """

    def __init__(
        self,
        *,
        commits: bool = True,
        finds: bool = True,
        answer: Literal["early", "same", "new", "next", "none"] = "none",
        failing: Failing = none_fails,
        action_status: int = 0x0000,
        shown: Callable[[int, int], int] = lambda stored, _look: stored,
        counts: bool = True,
        find_status: int = 0x0000,
        node_port: int = 0,
        node_ae: str = "SYNPET",
        **pacs: Any,
    ) -> None:
        super().__init__(**pacs)
        self.requests: list[Request] = []
        self.answers: list[int | None] = []  # what the node answered to each report
        self.levels: list[str] = []  # of the C-FINDs
        self.looks = 0
        self.node_port = node_port
        self._answer, self._failing, self._action_status = answer, failing, action_status
        self._shown, self._counts, self._find_status, self._node_ae = shown, counts, find_status, node_ae
        self._action_answered = threading.Event()
        self._reporters: list[threading.Thread] = []
        if commits:
            self._ae.add_supported_context(COMMITMENT, SYNTAXES)
        if finds:
            self._ae.add_supported_context(FIND, SYNTAXES)

    def handlers(self) -> list[Any]:
        return [
            *super().handlers(),
            (evt.EVT_N_ACTION, self._on_action),
            (evt.EVT_DIMSE_SENT, self._on_sent),
            (evt.EVT_C_FIND, self._on_find),
        ]

    def stop(self) -> None:
        for reporter in self._reporters:
            reporter.join(WAIT_S)
        super().stop()

    def report(
        self,
        request: Request,
        *,
        failed: Mapping[str, int] | None = None,
        omit: Sequence[str] = (),
        event_type: int | None = None,
        calling_ae: str = "",
        propose_role: bool = True,
    ) -> int | None:
        """N-EVENT-REPORT on an association of the archive's own; the node's answer, None without one."""
        ae = AE(calling_ae or self.ae_title)
        ae.add_requested_context(COMMITMENT, SYNTAXES)
        roles = [build_role(COMMITMENT, scp_role=True)] if propose_role else []
        assoc = ae.associate("127.0.0.1", self.node_port, ae_title=self._node_ae, ext_neg=[*roles])
        if not assoc.is_established:
            return None
        try:
            return self._send_report(assoc, request, failed or {}, omit, event_type)
        finally:
            assoc.release()
            ae.shutdown()

    def _on_action(self, event: evt.Event) -> tuple[int, Dataset | None]:
        ds = event.action_information
        references = {str(i.ReferencedSOPInstanceUID): str(i.ReferencedSOPClassUID) for i in ds.ReferencedSOPSequence}
        request = Request(str(ds.TransactionUID), references)
        with self._lock:
            self.requests.append(request)
            number = len(self.requests)
        if self._answer == "next":
            number -= 1
            request = self.requests[number - 1]
        if self._answer == "early":
            self._report_first(event, request)
        elif number and self._action_status == 0 and self._answer != "none":
            self._action_answered.clear()
            reporter = threading.Thread(target=self._report_later, args=(event.assoc, request, number))
            self._reporters.append(reporter)
            reporter.start()
        return self._action_status, None

    def _report_first(self, event: evt.Event, request: Request) -> None:
        """By the messages themselves: the association's own thread is here, which `send_n_event_report` waits for."""
        message = N_EVENT_REPORT()
        message.MessageID, message.EventTypeID = 7, 1
        message.AffectedSOPClassUID, message.AffectedSOPInstanceUID = COMMITMENT, COMMITMENT_INSTANCE
        ds = Dataset()
        ds.TransactionUID = request.transaction_uid
        ds.ReferencedSOPSequence = DicomSequence([_item(request, uid) for uid in request.references])
        syntax = event.context.transfer_syntax
        message.EventInformation = BytesIO(encode(ds, syntax == ImplicitVRLittleEndian, True) or b"")
        event.assoc.dimse.send_msg(message, event.context.context_id)
        _, answer = event.assoc.dimse.get_msg(block=True)
        self.answers.append(None if answer is None else int(answer.Status))

    def _on_sent(self, event: evt.Event) -> None:
        if isinstance(event.message, N_ACTION_RSP):
            self._action_answered.set()

    def _report_later(self, assoc: Any, request: Request, number: int) -> None:
        self._action_answered.wait(WAIT_S)
        failed = self._failing(request, number)
        if self._answer in ("same", "next"):
            self._send_report(assoc, request, failed, (), None)
        else:
            self.report(request, failed=failed)

    def _send_report(
        self,
        assoc: Any,
        request: Request,
        failed: Mapping[str, int],
        omit: Sequence[str],
        event_type: int | None,
    ) -> int | None:
        ds = Dataset()
        ds.TransactionUID = request.transaction_uid
        stored = [uid for uid in request.references if uid not in failed and uid not in omit]
        if stored:
            ds.ReferencedSOPSequence = DicomSequence([_item(request, uid) for uid in stored])
        if failed:
            ds.FailedSOPSequence = DicomSequence([_item(request, uid, reason) for uid, reason in failed.items()])
        kind = event_type if event_type is not None else (2 if failed else 1)
        answer, _ = assoc.send_n_event_report(ds, kind, COMMITMENT, COMMITMENT_INSTANCE)
        status = int(answer.Status) if "Status" in answer else None
        self.answers.append(status)
        return status

    def _on_find(self, event: evt.Event) -> Iterator[tuple[int, Dataset | None]]:
        query = event.identifier
        level = str(query.QueryRetrieveLevel)
        with self._lock:
            self.levels.append(level)
            self.looks += level == "SERIES"
            stored = sorted(self.received.series.get(str(query.SeriesInstanceUID), ()))
        if self._find_status:
            yield self._find_status, None
            return
        shown = stored[: self._shown(len(stored), self.looks)]
        answers = [Dataset()] if level == "SERIES" and shown else [Dataset() for _ in shown if level == "IMAGE"]
        for ds, uid in zip(answers, shown, strict=False):
            ds.QueryRetrieveLevel = level
            ds.StudyInstanceUID, ds.SeriesInstanceUID = query.StudyInstanceUID, query.SeriesInstanceUID
            if level == "IMAGE":
                ds.SOPInstanceUID = uid
            else:
                ds.NumberOfSeriesRelatedInstances = len(shown) if self._counts else None
            yield 0xFF00, ds


def _item(request: Request, uid: str, reason: int | None = None) -> Dataset:
    ds = Dataset()
    ds.ReferencedSOPClassUID, ds.ReferencedSOPInstanceUID = request.references[uid], uid
    if reason is not None:
        ds.FailureReason = reason
    return ds
