"""A peer asks whether we hold what it stored, and is told: on the same association, on another one, after a restart."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ct_factory import write_ct
from fake_pacs import free_port
from intake_tools import Intake, config, running_intake
from pydicom import Dataset
from pydicom.sequence import Sequence as DicomSequence
from pydicom.uid import CTImageStorage, MRImageStorage, generate_uid
from pynetdicom import AE, build_context, build_role, evt
from pynetdicom.dimse_messages import N_EVENT_REPORT_RSP
from pynetdicom.pdu import P_DATA_TF

from dicom_node.commitments import CommitmentReporter
from dicom_node.config import Config
from dicom_node.headers import read_header
from dicom_node.net import commitment_scp
from dicom_node.net.checkpoint import install
from dicom_node.net.commitment_scp import FAILURES, FailureReason, Verdict, judge, parse_request
from dicom_node.net.link import RequestOutcome
from dicom_node.net.part10 import read_part10
from dicom_node.net.receive import Receiver
from dicom_node.net.status import Status
from dicom_node.net.store import kept_classes
from dicom_node.schedule import Ticker
from storage import asked as asked_module
from storage.asked import Asked, AskedCommitments
from storage.errors import NoSpace, StaleState

COMMITMENT, INSTANCE = "1.2.840.10008.1.20.1", "1.2.840.10008.1.20.1.1"
NOW = datetime(2026, 11, 22, 3, 0, tzinfo=UTC)
WAIT_S = 60.0


class Modality:
    """A modality that stores, asks for commitment, and takes reports on either kind of association."""

    def __init__(self) -> None:
        self.port = free_port()
        self.reports: list[Dataset] = []
        self.kinds: list[int] = []
        self.ways: list[str] = []
        self.answer = 0x0000
        self._ae = AE("MODALITY")
        self._ae.add_supported_context(COMMITMENT, scu_role=False, scp_role=True)
        self._came = threading.Condition()
        self._server: Any = None
        self._answering = False
        self._answered = threading.Event()  # on the association of the request

    def listen(self) -> Modality:
        handlers = [(evt.EVT_N_EVENT_REPORT, self._on_report)]
        self._server = self._ae.start_server(("127.0.0.1", self.port), block=False, evt_handlers=handlers)
        return self

    def stop(self) -> None:
        self._ae.shutdown()

    def _on_report(self, event: evt.Event) -> tuple[int, None]:
        with self._came:
            self.reports.append(event.event_information)
            self.kinds.append(event.event_type or 0)
            self.ways.append("same" if event.assoc.is_requestor else "own")
            self._came.notify_all()
        return self.answer, None

    def _on_message(self, event: evt.Event) -> None:
        self._answering = self._answering or isinstance(event.message, N_EVENT_REPORT_RSP)

    def _on_pdu(self, event: evt.Event) -> None:
        if self._answering and isinstance(event.pdu, P_DATA_TF):
            self._answered.set()

    def wait(self, count: int = 1) -> Dataset:
        with self._came:
            assert self._came.wait_for(lambda: len(self.reports) >= count, WAIT_S), "no report came"
            return self.reports[-1]

    def ask(
        self,
        port: int,
        references: Sequence[tuple[str, str]],
        *,
        transaction_uid: str = "1.2.3.4",
        calling_ae: str = "MODALITY",
        wait: bool = False,
        action: int = 1,
        instance: str = INSTANCE,
        both_roles: bool = False,
        store: Sequence[Path] = (),
    ) -> int | None:
        """The status of the N-ACTION; None when the context was not accepted.

        `store` is stored before it, on the same association; `wait` stays until a report came.
        """
        ds = Dataset()
        ds.TransactionUID = transaction_uid
        ds.ReferencedSOPSequence = DicomSequence([reference(*one) for one in references])
        ae = AE(calling_ae)
        roles = [build_role(COMMITMENT, scu_role=True, scp_role=True)] if both_roles else []
        assoc = ae.associate(
            "127.0.0.1",
            port,
            contexts=[build_context(one) for one in (COMMITMENT, "1.2.840.10008.1.1", CTImageStorage)],
            ae_title="SYNPET",
            ext_neg=[*roles],
            evt_handlers=[
                (evt.EVT_N_EVENT_REPORT, self._on_report),
                (evt.EVT_DIMSE_SENT, self._on_message),
                (evt.EVT_PDU_SENT, self._on_pdu),
            ],
        )
        assert install(assoc).is_established
        try:
            if COMMITMENT not in {context.abstract_syntax for context in assoc.accepted_contexts}:
                return None
            for path in store:
                assert assoc.send_c_store(path).Status == 0x0000
            answer, _ = assoc.send_n_action(ds, action, COMMITMENT, instance)
            if wait:
                self.wait()
                assert self._answered.wait(WAIT_S), "our answer to the report was not sent"
            return int(answer.Status)
        finally:
            assoc.release()


def reference(sop_class: str, uid: str) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = sop_class, uid
    return item


def failures(report: Dataset) -> dict[str, int]:
    return {item.ReferencedSOPInstanceUID: item.FailureReason for item in report.get("FailedSOPSequence", ())}


def committed(report: Dataset) -> set[str]:
    return {item.ReferencedSOPInstanceUID for item in report.get("ReferencedSOPSequence", ())}


@dataclass
class Desk:
    intake: Intake
    modality: Modality
    paths: list[Path]

    @property
    def references(self) -> list[tuple[str, str]]:
        parts = [read_part10(path) for path in self.paths]
        return [(part.sop_class_uid, part.sop_instance_uid) for part in parts]

    @property
    def asked(self) -> AskedCommitments:
        return AskedCommitments(self.intake.spool.root)

    def reporter(self, **changes: Any) -> CommitmentReporter:
        return CommitmentReporter(self.intake.config, self.asked, self.intake.spool, self.intake.ledger, **changes)


def config_for(modality_port: int, **tables: Any) -> Config:
    peers = [
        {"name": "modality", "ae_title": "MODALITY", "port": modality_port, "may": ["store", "echo", "commit"]},
        {"name": "pacs", "ae_title": "PACS"},
    ]
    return config(peers=peers, **tables)


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    monkeypatch.setattr(commitment_scp, "SAME_ASSOCIATION_AFTER_S", 60.0)  # who goes is gone by then
    modality = Modality()
    paths = write_ct(tmp_path / "ct", np.zeros((4, 8, 8)))
    with running_intake(tmp_path / "node", config_for(modality.port)) as intake:
        yield Desk(intake, modality, paths)
    modality.stop()


@pytest.fixture
def sorting(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The assembler at work; who stays is told soon."""
    monkeypatch.setattr(commitment_scp, "SAME_ASSOCIATION_AFTER_S", 0.2)
    ticker = Ticker("assembler", desk.intake.assembler.tick, 0.05)
    ticker.start()
    yield
    ticker.stop()


# ---- over the network


def test_what_the_assembler_has_not_looked_at_is_not_reported_and_what_it_refuses_is_not_held(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commitment_scp, "SAME_ASSOCIATION_SORTED_S", 0.4)
    desk.intake.put(desk.paths[:2])
    broken = desk.references[1][1]
    desk.intake.spool.find_instances([broken])[broken].write_bytes(b"no DICOM at all")
    desk.modality.listen()
    assert desk.modality.ask(desk.intake.port, desk.references[:2]) == 0x0000
    desk.intake.wait(lambda: desk.asked.waiting()[0].due <= datetime.now(UTC))
    assert (desk.reporter().tick(), desk.modality.reports) == (0, [])
    assert len(desk.asked.waiting()) == 1
    desk.intake.assembler.tick()
    assert desk.reporter().tick() == 1
    report = desk.modality.wait()
    assert committed(report) == {desk.references[0][1]}
    assert failures(report) == {broken: FailureReason.NO_SUCH_INSTANCE}


def test_a_requestor_that_stays_is_told_on_the_same_association(desk: Desk, sorting: None) -> None:
    desk.intake.put(desk.paths)
    assert desk.modality.ask(desk.intake.port, desk.references, wait=True) == 0x0000
    report = desk.modality.reports[0]
    assert (report.TransactionUID, desk.modality.kinds, desk.modality.ways) == ("1.2.3.4", [1], ["same"])
    assert committed(report) == {uid for _, uid in desk.references}
    desk.intake.wait(lambda: not desk.asked.waiting())
    assert "commitment_reported" in desk.intake.event_codes()


def test_what_was_stored_a_moment_ago_on_the_same_association_is_held(desk: Desk, sorting: None) -> None:
    assert desk.modality.ask(desk.intake.port, desk.references, wait=True, store=desk.paths) == 0x0000
    assert committed(desk.modality.reports[0]) == {uid for _, uid in desk.references}
    assert desk.modality.ways == ["same"]


def test_a_requestor_that_goes_is_told_on_an_association_of_ours(desk: Desk) -> None:
    desk.intake.put(desk.paths[:3])
    desk.intake.assembler.tick()
    desk.modality.listen()
    assert desk.modality.ask(desk.intake.port, [*desk.references, (MRImageStorage, "1.2.9")]) == 0x0000
    desk.intake.wait(lambda: desk.asked.waiting()[0].due <= datetime.now(UTC))  # handed over
    assert desk.reporter().tick() == 1
    report = desk.modality.wait()
    assert (desk.modality.kinds, desk.modality.ways) == ([2], ["own"])
    assert committed(report) == {uid for _, uid in desk.references[:3]}
    assert failures(report) == {desk.references[3][1]: 0x0112, "1.2.9": 0x0122}
    assert desk.asked.waiting() == []


def test_a_request_outlives_a_restart_and_an_absent_requestor(desk: Desk) -> None:
    desk.intake.put(desk.paths)
    desk.intake.assembler.tick()
    assert desk.modality.ask(desk.intake.port, desk.references) == 0x0000
    desk.intake.wait(lambda: desk.asked.waiting()[0].due <= datetime.now(UTC))
    desk.intake.receiver.stop()  # all that is left is the spool
    assert desk.reporter().tick() == 0  # nobody listens there
    [waiting] = desk.asked.waiting()
    assert (waiting.attempts, waiting.references) == (1, tuple(desk.references))
    desk.modality.listen()
    later = waiting.due + timedelta(seconds=1)
    assert desk.reporter(clock=lambda: later).tick() == 1
    assert committed(desk.modality.wait()) == {uid for _, uid in desk.references}


def test_both_roles_may_be_proposed_at_once(desk: Desk, sorting: None) -> None:
    desk.intake.put(desk.paths)
    assert desk.modality.ask(desk.intake.port, desk.references, wait=True, both_roles=True) == 0x0000


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"action": 2}, 0x0123),
        ({"instance": "1.2.3"}, 0x0112),
        ({"transaction_uid": ""}, 0x0115),
        ({"calling_ae": "PACS"}, None),  # its peer lacks "commit": the class is not even accepted
    ],
)
def test_what_is_no_request_of_one_who_may_ask_is_refused(desk: Desk, changes: Any, status: int | None) -> None:
    assert desk.modality.ask(desk.intake.port, desk.references, **changes) == status
    assert desk.asked.waiting() == []


@pytest.mark.parametrize(
    ("calling_ae", "status"),
    [
        ("PACS", Status.NOT_AUTHORIZED),  # the class is accepted, for its reports
        ("CT_1", None),
    ],
)
def test_an_archive_that_only_reports_to_us_may_not_ask_and_who_does_not_has_no_context(
    desk: Desk, calling_ae: str, status: int | None
) -> None:
    intake = desk.intake
    table = config_for(
        desk.modality.port, destinations=[{"name": "archive", "peer": "pacs", "commitment": True}]
    ).model_dump()
    table["peers"] = [
        {"name": "pacs", "ae_title": "PACS", "host": "192.0.2.1", "allowed_addresses": ["any"]},
        {"name": "ct_1", "ae_title": "CT_1"},
        *(peer for peer in table["peers"] if peer["name"] == "modality"),
    ]
    cfg = Config.model_validate(table)
    receiver = Receiver(cfg, intake.spool, intake.ledger, intake.registry, take_report=lambda _: Status.SUCCESS)
    port = receiver.start(port=0)
    try:
        assert desk.modality.ask(port, desk.references, calling_ae=calling_ae) == status
    finally:
        receiver.stop()


def test_a_full_disk_takes_no_request(desk: Desk) -> None:
    desk.intake.receiver._commitments._spool.min_free_bytes = 1 << 60  # type: ignore[union-attr]
    assert desk.modality.ask(desk.intake.port, desk.references) == Status.RESOURCE_LIMITATION
    assert desk.asked.waiting() == []


# ---- what is held


def request_for(references: Sequence[tuple[str, str]], **changes: Any) -> Asked:
    known: dict[str, Any] = {
        "transaction_uid": "1.2.3.4",
        "calling_ae": "MODALITY",
        "peer": "modality",
        "references": tuple(references),
        "asked": NOW,
        "due": NOW,
    }
    return Asked(**{**known, **changes})


def reasons(desk: Desk, references: Sequence[tuple[str, str]]) -> list[int]:
    verdict = judge(request_for(references), desk.intake.spool, kept_classes(desk.intake.config))
    return [reason for _, _, reason in verdict.failed]


def test_an_instance_is_held_wherever_its_file_goes_until_it_is_removed(desk: Desk) -> None:
    desk.intake.put(desk.paths)
    assert reasons(desk, desk.references) == [FailureReason.PROCESSING_FAILURE] * 4  # it may yet go to quarantine
    desk.intake.assembler.tick()
    assert reasons(desk, desk.references) == []  # of a series
    job = desk.intake.job()
    desk.intake.spool.take_series(job.id, job.info.series_uid)
    assert reasons(desk, desk.references) == []  # of a job
    desk.intake.spool.quarantine(desk.intake.spool.ct_files(job.id)[0], "different_content")
    assert reasons(desk, desk.references) == [FailureReason.NO_SUCH_INSTANCE]
    desk.intake.spool.discard_work(job.id)
    assert reasons(desk, desk.references) == [FailureReason.NO_SUCH_INSTANCE] * 4


@pytest.mark.parametrize("missing", [0, 1])
def test_why_shows_what_the_peer_was_told_of_the_study(desk: Desk, missing: int) -> None:
    desk.intake.put(desk.paths[missing:])
    desk.intake.assembler.tick()
    desk.asked.add(request_for(desk.references))
    assert desk.reporter(send=Outbox(("", False)), clock=lambda: NOW + timedelta(seconds=1)).tick() == 1
    header = read_header(desk.paths[0])
    assert header.accession
    ledger = desk.intake.ledger
    for found in (ledger.events_of_accession(header.accession), ledger.events_of_study(header.study_uid)):
        (event,) = [event for event in found if event.code == "commitment_reported"]
        why = f"; 1 not (0x0112: {FAILURES[FailureReason.NO_SUCH_INSTANCE]})" if missing else ""
        assert event.text == f"'MODALITY' was told on an association of ours: {4 - missing} of 4 are held{why}"


def test_a_report_on_two_studies_is_of_neither(desk: Desk, tmp_path: Path) -> None:
    others = write_ct(tmp_path / "other", np.zeros((2, 8, 8)))
    desk.intake.put([*desk.paths, *others])
    desk.intake.assembler.tick()
    parts = [read_part10(path) for path in (*desk.paths, *others)]
    request = request_for([(part.sop_class_uid, part.sop_instance_uid) for part in parts])
    verdict = judge(request, desk.intake.spool, kept_classes(desk.intake.config))
    assert (len(verdict.held), verdict.study_uid, verdict.accession) == (6, "", "")


def test_what_is_never_sorted_is_reported_after_a_while_as_not_held(desk: Desk) -> None:
    desk.intake.put(desk.paths)
    desk.asked.add(request_for(desk.references))
    outbox = Outbox(("", False))
    for seconds, told in ((0, 0), (299, 0), (301, 1)):
        now = NOW + timedelta(seconds=seconds)
        assert desk.reporter(send=outbox, clock=lambda now=now: now).tick() == told
    [verdict] = outbox.verdicts
    assert {reason for _, _, reason in verdict.failed} == {FailureReason.PROCESSING_FAILURE}
    assert verdict.held == ()


def test_a_file_that_is_gone_when_it_is_read_is_looked_for_once_more(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.intake.put(desk.paths)
    desk.intake.assembler.tick()
    spool, job = desk.intake.spool, desk.intake.job()
    find, read = spool.find_instances, commitment_scp.read_part10

    def moves(path: Path) -> Any:
        monkeypatch.setattr(commitment_scp, "read_part10", read)
        spool.take_series(job.id, job.info.series_uid)
        return read(path)

    monkeypatch.setattr(commitment_scp, "read_part10", moves)
    assert reasons(desk, desk.references) == []
    assert set(find([uid for _, uid in desk.references]).values()) == set(spool.ct_files(job.id))

    def vanishes(path: Path) -> Any:
        monkeypatch.setattr(commitment_scp, "read_part10", read)
        spool.discard_work(job.id)
        return read(path)

    monkeypatch.setattr(commitment_scp, "read_part10", vanishes)
    assert reasons(desk, desk.references) == [FailureReason.NO_SUCH_INSTANCE] * 4


def test_what_is_being_removed_is_not_held(desk: Desk) -> None:
    trash = desk.intake.spool.root / "work" / ".half.tmp" / "ct"
    trash.mkdir(parents=True)
    (trash / f"{desk.references[0][1]}.dcm").write_bytes(desk.paths[0].read_bytes())
    assert reasons(desk, desk.references[:1]) == [FailureReason.NO_SUCH_INSTANCE]


def test_an_instance_of_another_class_is_a_conflict_and_a_broken_file_a_failure(desk: Desk) -> None:
    desk.intake.put(desk.paths)
    desk.intake.assembler.tick()
    (_, uid), (_, other) = desk.references[:2]
    desk.intake.spool.find_instances([other])[other].write_bytes(b"no longer DICOM")
    found = reasons(desk, [(MRImageStorage, uid), (CTImageStorage, other)])
    assert found == [FailureReason.CLASS_INSTANCE_CONFLICT, FailureReason.PROCESSING_FAILURE]


def test_an_instance_that_is_named_twice_is_reported_once() -> None:
    ds = Dataset()
    ds.TransactionUID = "1.2.3"
    ds.ReferencedSOPSequence = DicomSequence([reference(CTImageStorage, "1.2"), reference(CTImageStorage, "1.2")])
    assert parse_request(ds) == ("1.2.3", ((CTImageStorage, "1.2"),))


def test_more_instances_than_any_study_has_are_refused(monkeypatch: pytest.MonkeyPatch, desk: Desk) -> None:
    monkeypatch.setattr(commitment_scp, "MOST_REFERENCES", 3)
    assert desk.modality.ask(desk.intake.port, desk.references) == Status.RESOURCE_LIMITATION


# ---- the queue


def test_the_same_request_is_kept_once_and_another_under_its_uid_is_refused(tmp_path: Path) -> None:
    asked = AskedCommitments(tmp_path)
    first = asked.add(request_for([(CTImageStorage, "1.2")]))
    assert asked.add(request_for([(CTImageStorage, "1.2")], due=NOW + timedelta(hours=1))) == first
    with pytest.raises(StaleState, match="other instances"):
        asked.add(request_for([(CTImageStorage, "1.3")]))
    asked.add(request_for([(CTImageStorage, "1.3")], calling_ae="OTHER"))
    assert len(asked.waiting()) == 2


def test_a_full_queue_and_a_broken_file_stop_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = AskedCommitments(tmp_path)
    (tmp_path / "commitments" / f"{'0' * 64}.json").write_text("{")
    (tmp_path / "commitments" / ".left.tmp").write_text("{")
    asked.clean_temp()
    kept = asked.add(request_for([(CTImageStorage, "1.2")]))
    assert asked.waiting() == [kept]
    assert len(list((tmp_path / "commitments").iterdir())) == 2  # the broken one is put aside, the half one is gone
    monkeypatch.setattr(asked_module, "MOST_WAITING", 2)
    with pytest.raises(NoSpace):
        asked.add(request_for([(CTImageStorage, "1.2")], transaction_uid="9"))


class Outbox:
    """Answers each report with the next outcome; the last one again and again."""

    def __init__(self, *codes: tuple[str, bool]) -> None:
        self.codes = list(codes)
        self.verdicts: list[Verdict] = []

    def __call__(self, verdict: Verdict, _peer: Any) -> RequestOutcome:
        self.verdicts.append(verdict)
        code, permanent = self.codes.pop(0) if len(self.codes) > 1 else self.codes[0]
        return RequestOutcome(code=code, text=code and "it did not work", permanent=permanent)


def test_pauses_grow_and_at_last_the_report_is_given_up_with_an_event(desk: Desk) -> None:
    desk.asked.add(request_for(desk.references))
    outbox, now, pauses = Outbox(("connection_failed", False)), NOW, []
    for _ in range(12):
        desk.reporter(send=outbox, clock=lambda now=now: now).tick()
        pauses += [(one.due - now).total_seconds() for one in desk.asked.waiting()]
        assert desk.reporter(send=outbox, clock=lambda now=now: now).tick() == 0  # not due: not tried
        now = now + timedelta(hours=1)
    assert pauses[:4] == [30.0, 60.0, 120.0, 240.0]
    assert max(pauses) == 3600.0
    assert (len(outbox.verdicts), desk.asked.waiting()) == (12, [])
    [event] = desk.intake.ledger.search_events(code="commitment_report_failed")
    assert event.details["attempts"] == 12


def test_a_permanent_refusal_and_a_peer_that_is_gone_end_it_at_once(desk: Desk) -> None:
    desk.asked.add(request_for(desk.references))
    desk.asked.add(request_for(desk.references, transaction_uid=generate_uid(), peer="gone"))
    desk.reporter(send=Outbox(("report_refused", True)), clock=lambda: NOW).tick()
    assert desk.asked.waiting() == []
    found = {event.details["reason"] for event in desk.intake.ledger.search_events(code="commitment_report_failed")}
    assert found == {"report_refused", "peer_unknown"}


def test_a_peer_that_does_not_answer_is_tried_once_a_tick(desk: Desk) -> None:
    for number in range(3):
        desk.asked.add(request_for(desk.references, transaction_uid=f"1.{number}"))
    outbox = Outbox(("connection_failed", False))
    desk.reporter(send=outbox, clock=lambda: NOW).tick()
    assert len(outbox.verdicts) == 1


def test_a_stop_leaves_the_rest_for_the_next_life(desk: Desk) -> None:
    for number in range(3):
        desk.asked.add(request_for(desk.references, transaction_uid=f"1.{number}"))
    reporter = desk.reporter(send=lambda _verdict, _peer: stopped(), clock=lambda: NOW)

    def stopped() -> RequestOutcome:
        reporter.stop()
        return RequestOutcome()

    assert reporter.tick() == 1
    assert len(desk.asked.waiting()) == 2


@pytest.mark.parametrize(
    ("attempts", "back", "told"),
    [
        (0, timedelta(days=365), 1),
        (0, timedelta(minutes=30), 1),
        (1, timedelta(minutes=30), 1),  # the pause is half a minute
        (1, timedelta(seconds=30), 0),
        (9, timedelta(minutes=30), 0),  # of an hour: it may be meant
    ],
)
def test_a_clock_that_was_set_back_delays_no_report(desk: Desk, attempts: int, back: timedelta, told: int) -> None:
    desk.asked.add(request_for(desk.references, due=NOW, attempts=attempts))
    assert desk.reporter(send=Outbox(("", False)), clock=lambda: NOW - back).tick() == told
