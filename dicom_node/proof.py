"""What happens after SENT: the archive's own word that it keeps the series (COMMITTED) and shows it (VISIBLE).

A destination says what it is asked for. What it does not offer is left out, and the ledger says so; what it offers
and does not prove is asked again with pauses, sent again where it names the instances, and at last FAILED.
`weigh` and `judge_count` are the rules; `Prover.step` makes one request and writes what came of it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path

import structlog
from pydicom import dcmread
from pydicom.uid import generate_uid

from dicom_node.config import Config, DestinationConfig
from dicom_node.net import qido
from dicom_node.net.commitment import CommitmentReport, request_commitment
from dicom_node.net.link import RequestOutcome, Timeouts
from dicom_node.net.part10 import read_part10
from dicom_node.net.query import CountOutcome, count_series_instances
from dicom_node.net.status import Status
from dicom_node.retry import OUTAGE_CODES, outage_delay_s, retry_delay_s, seconds_since
from dicom_node.settle import LOUD_AFTER_S, OPTIONAL_KINDS, outage_s, outage_text, over
from storage.errors import StaleState
from storage.ledger import Ledger, utc_now
from storage.proofs import Report
from storage.records import REJECTION, Commitment, CommitmentState, Delivery, DeliveryState

log = structlog.get_logger()

SAME_ASSOCIATION_S = 2.0  # how long the association of a request stays open for the report
DUPLICATE_TRANSACTION = "0x0131"  # a Failure Reason about the request, not about the instance (PS3.3 C.14.1.1)
Count = Callable[[Config, DestinationConfig, str, str, Timeouts, Callable[[], bool]], CountOutcome]


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """What becomes of a delivery after one request for proof. `retry_in_s`: when it is looked at again."""

    state: DeliveryState
    goal: DeliveryState
    code: str = ""
    text: str = ""
    retry_in_s: float | None = None
    counted: bool = False
    failing: bool = False  # it could not be asked: the destination is down
    sent: int | None = None
    statuses: Mapping[str, str] | None = None
    settled: Mapping[str, CommitmentState] = field(default_factory=dict)


def goal_of(destination: DestinationConfig) -> DeliveryState:
    """The last state that a destination asks for."""
    if destination.verify:
        return DeliveryState.VISIBLE
    return DeliveryState.COMMITTED if destination.commitment else DeliveryState.SENT


def asked_of(destination: DestinationConfig, kind: str) -> DestinationConfig:
    """What a destination is asked to prove: an archive that heeds a rejection note may hide the note as well."""
    return destination.model_copy(update={"verify": False}) if kind == REJECTION else destination


def spread_statuses(statuses: Mapping[str, str], uids: Collection[str]) -> dict[str, str]:
    """The ledger's statuses with "*" (all instances) written out."""
    return {uid: status for key, status in statuses.items() for uid in (uids if key == "*" else (key,))}


def weigh(delivery: Delivery, report: Commitment, uids: frozenset[str], destination: DestinationConfig) -> Step:
    """COMMITTED when the report says so of every instance; else what it does not commit is sent again, or FAILED.

    An instance that the report does not mention is not committed; one that we do not know changes nothing. A
    duplicate Transaction UID is asked again: nothing is wrong with the instances.
    """
    goal = goal_of(destination)
    failed = {uid: reason for uid, reason in report.failed.items() if uid in uids}
    silent = uids - set(report.committed) - set(failed)
    statuses = {uid: f"not_committed_{reason}" for uid, reason in failed.items()} | dict.fromkeys(
        silent, "not_committed"
    )
    if not statuses:
        settled = {report.transaction_uid: CommitmentState.COMMITTED}
        return Step(state=DeliveryState.COMMITTED, goal=goal, settled=settled)
    settled = {report.transaction_uid: CommitmentState.FAILED}
    reasons = ", ".join(sorted(set(failed.values()))) or "not mentioned"
    text = f"{len(statuses)} of {delivery.instances} instances were not committed: {reasons}"
    if set(statuses.values()) == {f"not_committed_{DUPLICATE_TRANSACTION}"}:
        pause = _pause(delivery.checks + 1, destination)
        return Step(
            state=delivery.state,
            goal=goal,
            code="commitment_failed",
            text=text,
            retry_in_s=pause,
            counted=True,
            settled=settled,
        )
    kept = {**spread_statuses(delivery.statuses, uids), **statuses}
    sent = delivery.instances - len(statuses)
    if delivery.attempts - delivery.outages >= destination.max_attempts:
        return Step(
            state=DeliveryState.FAILED,
            goal=goal,
            code="commitment_failed",
            text=f"{text}; given up after sending {delivery.attempts} times",
            sent=sent,
            statuses=kept,
            settled=settled,
        )
    return Step(
        state=DeliveryState.PENDING,
        goal=goal,
        code="commitment_failed",
        text=f"{text}; they are sent again",
        retry_in_s=_pause(delivery.attempts - delivery.outages, destination),
        sent=sent,
        statuses=kept,
        settled=settled,
    )


def judge_ask(
    delivery: Delivery, uid: str, outcome: RequestOutcome, destination: DestinationConfig, *, failing_s: float = 0.0
) -> Step:
    """After a request for commitment: wait for the report, go on without, or try again after a growing pause."""
    goal = goal_of(destination)
    if outcome.ok:
        wait = destination.commitment_timeout_s
        return Step(state=delivery.state, goal=goal, code="commitment_awaited", retry_in_s=wait, counted=True)
    if outcome.code in ("no_presentation_context", "not_offered"):
        text = f"it offers no Storage Commitment: {outcome.text}"
        left = goal if goal is DeliveryState.VISIBLE else delivery.state
        settled = {uid: CommitmentState.NOT_OFFERED}
        return Step(state=delivery.state, goal=left, code="commitment_not_offered", text=text, settled=settled)
    if outcome.permanent:
        return Step(state=DeliveryState.FAILED, goal=goal, code=outcome.code, text=outcome.text)
    if outcome.code in OUTAGE_CODES:
        return _down(delivery, outcome.code, outcome.text, destination, failing_s)
    return Step(
        state=delivery.state,
        goal=goal,
        code=outcome.code,
        text=outcome.text,
        retry_in_s=_pause(delivery.checks + 1, destination),
        counted=True,
    )


def judge_count(
    delivery: Delivery, outcome: CountOutcome, destination: DestinationConfig, *, failing_s: float = 0.0
) -> Step:
    """VISIBLE when exactly the instances that we sent are shown; what cannot be asked stays where it is.

    So does an optional companion that is stored and never shown, or about which the archive does not answer: some
    list no presentation states, and the PET series has a proof of its own. An archive that lets us in and leaves the
    question unanswered (`find_unanswered`) is not down: that is a look, as any other error is.
    """
    goal = goal_of(destination)
    if outcome.ok and outcome.count == delivery.instances:
        return Step(state=DeliveryState.VISIBLE, goal=DeliveryState.VISIBLE)
    if outcome.code == "not_offered":
        text = f"its content cannot be queried: {outcome.text}"
        return Step(state=delivery.state, goal=delivery.state, code="verify_not_offered", text=text)
    code = outcome.code or "not_visible"
    text = outcome.text or f"it shows {outcome.count} of {delivery.instances} instances"
    checks = delivery.checks + 1
    if code == "interrupted":
        return Step(state=delivery.state, goal=goal, retry_in_s=0.0)
    if code in OUTAGE_CODES and not outcome.permanent:
        return _down(delivery, code, text, destination, failing_s)
    if outcome.permanent or checks >= destination.max_attempts:
        text += "" if outcome.permanent else f"; given up after {checks} looks"
        if delivery.kind in OPTIONAL_KINDS - {REJECTION}:  # of a note nothing is counted: its trouble is another
            text = f"{text}; it is stored, and optional"
            return Step(state=delivery.state, goal=delivery.state, code=code, text=text)
        return Step(state=DeliveryState.FAILED, goal=goal, code=code, text=text)
    pause = _pause(checks, destination)
    return Step(state=delivery.state, goal=goal, code=code, text=text, retry_in_s=pause, counted=True)


def _down(delivery: Delivery, code: str, text: str, destination: DestinationConfig, failing_s: float) -> Step:
    """It could not be asked: no check is used up, and after days a person has to look."""
    goal = goal_of(destination)
    if gave_up := over(failing_s, destination):
        if delivery.kind in OPTIONAL_KINDS - {REJECTION}:
            text = f"{text}; {gave_up}; it is stored, and optional"
            return Step(state=delivery.state, goal=delivery.state, code=code, text=text)
        return Step(state=DeliveryState.FAILED, goal=goal, code=code, text=f"{text}; {gave_up}")
    text = outage_text(text, failing_s, destination)
    pause = outage_delay_s(failing_s, first_s=destination.first_retry_s, longest_s=destination.max_retry_s)
    return Step(state=delivery.state, goal=goal, code=code, text=text, retry_in_s=pause, failing=True)


def count_instances(
    config: Config,
    destination: DestinationConfig,
    study_uid: str,
    series_uid: str,
    timeouts: Timeouts,
    should_stop: Callable[[], bool],
) -> CountOutcome:
    """What a destination shows of a series, asked in its own protocol."""
    if destination.url:
        return qido.count_series_instances(destination, study_uid, series_uid, should_stop=should_stop)
    return count_series_instances(
        config.peer(destination.peer),
        study_uid,
        series_uid,
        calling_ae=config.node.ae_title,
        timeouts=timeouts,
        max_pdu=config.node.max_pdu,
        should_stop=should_stop,
    )


class Prover:
    """Asks for proof, one delivery at a time per destination's thread; takes the reports of every association.

    `wake` is called when a report was kept: its delivery is due. `trusted`: whether the clock is.
    """

    def __init__(
        self,
        config: Config,
        ledger: Ledger,
        result_files: Callable[[Delivery], Sequence[Path]],
        *,
        owner: str,
        timeouts: Timeouts,
        wake: Callable[[], None] = lambda: None,
        clock: Callable[[], datetime] = utc_now,
        wait_s: float = SAME_ASSOCIATION_S,
        count: Count = count_instances,
        trusted: Callable[[], bool] = lambda: True,
    ) -> None:
        self._config, self._ledger, self._files = config, ledger, result_files
        self._owner, self._timeouts, self._wake, self._clock = owner, timeouts, wake, clock
        self._wait_s, self._count, self._trusted = wait_s, count, trusted
        self._lock = threading.Lock()
        self._awaited: dict[str, threading.Event] = {}  # by Transaction UID: set when its report was kept

    def take(self, report: CommitmentReport) -> Status:
        """Keep a report, whoever brought it; Success when it is durable, or was before."""
        found = self._ledger.take_report(report.transaction_uid, committed=report.committed, failed=report.failed)
        bound = log.bind(transaction_uid=report.transaction_uid, committed=len(report.committed))
        if found is Report.UNKNOWN:
            bound.warning("commitment.unknown", failed=len(report.failed))
            return Status.INVALID_ARGUMENT
        bound.info("commitment.reported", failed=len(report.failed), taken=found.value)
        with self._lock:
            awaited = self._awaited.get(report.transaction_uid)
        if awaited is not None:
            awaited.set()
        self._wake()
        return Status.SUCCESS

    def step(self, delivery: Delivery, destination: DestinationConfig, should_stop: Callable[[], bool]) -> None:
        """One request for proof of a claimed delivery, and its end in the ledger."""
        destination = asked_of(destination, delivery.kind)
        if should_stop():
            step = Step(state=delivery.state, goal=goal_of(destination), retry_in_s=0.0)
        else:
            step = self._next(delivery, destination, should_stop)
        self.finish(delivery, step)

    def finish(self, delivery: Delivery, step: Step) -> None:
        """Write what came of a request; a delivery that is not ours any more is left alone."""
        due = None if step.retry_in_s is None else self._clock() + timedelta(seconds=step.retry_in_s)
        bound = log.bind(
            job_id=delivery.job_id,
            destination=delivery.destination,
            kind=delivery.kind,
            series_uid=delivery.series_uid,
            instances=delivery.instances,
        )
        try:
            now = self._ledger.finish_proof(
                delivery.id,
                self._owner,
                state=step.state,
                goal=step.goal,
                due=due,
                counted=step.counted,
                failing=step.failing,
                code=step.code,
                text=step.text,
                sent=step.sent,
                statuses=step.statuses,
                settled=step.settled,
            )
        except StaleState:
            bound.info("delivery.discarded", reason="cancelled, or taken over after the lease ran out")
            return
        if step.failing and self._failing_s(delivery) >= LOUD_AFTER_S:
            bound.error("destination.down", code=step.code, reason=step.text)
        elif step.text:
            bound.warning("delivery.unproven", state=now.state.value, code=step.code, reason=step.text)
        elif step.state is not delivery.state:
            bound.info(f"delivery.{step.state.value.lower()}")

    def _next(self, delivery: Delivery, destination: DestinationConfig, should_stop: Callable[[], bool]) -> Step:
        files = self._files(delivery)
        if len(files) != delivery.instances:
            text = f"the outbox holds {len(files)} of {delivery.instances} instances: run the job again"
            goal = goal_of(destination)
            return Step(state=DeliveryState.FAILED, goal=goal, code="result_missing", text=text)
        declined = False
        if delivery.state is DeliveryState.SENT and destination.commitment:
            mine = [one for one in self._ledger.commitments(delivery.id) if one.attempt == delivery.attempts]
            for one in mine:
                if one.state is CommitmentState.REPORTED:
                    uids = frozenset(read_part10(path).sop_instance_uid for path in files)
                    return weigh(delivery, one, uids, destination)
            if not any(one.state is CommitmentState.NOT_OFFERED for one in mine):
                return self._ask(delivery, destination, files, should_stop)
            declined = True
        if not destination.verify:  # the configuration asks for less than when it was sent
            return Step(state=delivery.state, goal=delivery.state)
        head = dcmread(files[0], stop_before_pixels=True, specific_tags=["StudyInstanceUID", "SeriesInstanceUID"])
        study_uid, series_uid = str(head.StudyInstanceUID), str(head.SeriesInstanceUID)
        outcome = self._count(self._config, destination, study_uid, series_uid, self._timeouts, should_stop)
        step = judge_count(delivery, outcome, destination, failing_s=self._outage_s(delivery, destination))
        if step.state is DeliveryState.VISIBLE and declined:
            text = "it shows the series, but offers no Storage Commitment"
            return replace(step, code="commitment_not_offered", text=text)
        return step

    def _ask(
        self,
        delivery: Delivery,
        destination: DestinationConfig,
        files: Sequence[Path],
        should_stop: Callable[[], bool],
    ) -> Step:
        if delivery.checks >= destination.max_attempts:
            silent = delivery.reason_code == "commitment_awaited"
            code = "commitment_timeout" if silent else delivery.reason_code
            why = f"no report within {destination.commitment_timeout_s:g} s" if silent else delivery.reason
            text = f"{why}; given up after {delivery.checks} requests for commitment"
            return Step(state=DeliveryState.FAILED, goal=goal_of(destination), code=code, text=text)
        uid = str(generate_uid(prefix=None))  # never a second time: an archive refuses a known one (0131)
        self._ledger.open_commitment(delivery.id, self._owner, uid)
        reported = threading.Event()
        with self._lock:
            self._awaited[uid] = reported
        try:
            outcome = request_commitment(
                [read_part10(path) for path in files],
                self._config.peer(destination.peer),
                transaction_uid=uid,
                calling_ae=self._config.node.ae_title,
                take=self.take,
                reported=reported,
                wait_s=self._wait_s,
                timeouts=self._timeouts,
                max_pdu=self._config.node.max_pdu,
                should_stop=should_stop,
            )
        finally:
            with self._lock:
                del self._awaited[uid]
        return judge_ask(delivery, uid, outcome, destination, failing_s=self._outage_s(delivery, destination))

    def _outage_s(self, delivery: Delivery, destination: DestinationConfig) -> float:
        lasted_s = self._failing_s(delivery)  # before the clock is asked for: a jump in between must not be missed
        return outage_s(lasted_s, destination, trusted=self._trusted())

    def _failing_s(self, delivery: Delivery) -> float:
        return seconds_since(delivery.failing_since, self._clock())


def _pause(attempt: int, destination: DestinationConfig) -> float:
    return retry_delay_s(max(attempt, 1), first_s=destination.first_retry_s, longest_s=destination.max_retry_s)
