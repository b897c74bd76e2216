"""From the outbox to the destinations: one association per series, every attempt written to the ledger.

One dispatcher thread claims what is due and keeps the leases; each destination has a thread of its own, so that a
dead one delays no other. A later attempt sends only the instances that are still missing; after a kill everything
of that delivery is sent again, which is the same bytes under the same UIDs. `settle.settle` is the one place that
decides what becomes of a delivery. What a destination proves after SENT is in `proof`; the same threads ask for it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from time import monotonic

import structlog

from dicom_node.config import Config, DestinationConfig
from dicom_node.net.link import timeouts_of
from dicom_node.net.query import CountOutcome
from dicom_node.net.scu import SendOutcome, send_series
from dicom_node.net.stow import send_series_web
from dicom_node.proof import SAME_ASSOCIATION_S, Count, Prover, Step, asked_of, count_instances, goal_of, judge_count
from dicom_node.retry import UNREACHABLE_CODES, seconds_since
from dicom_node.settle import LOUD_AFTER_S, Verdict, missing, outage_s, settle, stored_before
from storage.errors import StaleState
from storage.ledger import Ledger, utc_now
from storage.records import Delivery, DeliveryState, JobFilter, JobState
from storage.spool import Spool

log = structlog.get_logger()

POLL_S = 1.0
RENEW_EVERY_S = 5.0
MANY = 1_000_000  # all of them
Send = Callable[..., SendOutcome]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Claimed:
    """A delivery in our hands. `stop` is set when the lease was lost, the job cancelled, or the node is stopping."""

    delivery: Delivery
    stop: threading.Event = field(default_factory=threading.Event)


def outbox_files(folder: Path) -> list[Path]:
    """The instances of one result series in sending order: the writer numbers them by InstanceNumber."""
    return sorted(folder.glob("*.dcm"), key=lambda path: (len(path.name), path.name))


class Deliveries:
    """The threads that deliver. `send` (to a peer) and `send_web` (to a url) are other senders in a test."""

    def __init__(
        self,
        config: Config,
        ledger: Ledger,
        spool: Spool,
        *,
        owner: str,
        send: Send = send_series,
        send_web: Send = send_series_web,
        clock: Callable[[], datetime] = utc_now,
        poll_s: float = POLL_S,
        count: Count = count_instances,
        report_wait_s: float = SAME_ASSOCIATION_S,
        trusted: Callable[[], bool] = lambda: True,
        steady: Callable[[], float] = monotonic,
    ) -> None:
        """`trusted` says whether the clock is: no outage is given up by a clock that jumped. `steady`: seconds."""
        self._config, self._ledger, self._spool = config, ledger, spool
        self._owner, self._send, self._send_web = owner, send, send_web
        self._clock, self._poll_s = clock, poll_s
        self._trusted, self._steady = trusted, steady
        self._timeouts = timeouts_of(config.node)
        self._destinations: Mapping[str, DestinationConfig] = {d.name: d for d in config.destinations}
        self._lanes: dict[str, SimpleQueue[_Claimed | None]] = {name: SimpleQueue() for name in self._destinations}
        self._lock = threading.Lock()
        self._in_hand: dict[int, _Claimed] = {}
        self._arrived: dict[str, float] = {}  # when something last came to a destination, by the steady clock
        self._stopping = threading.Event()
        self._wake = threading.Event()
        self._threads: list[threading.Thread] = []
        self.prover = Prover(
            config,
            ledger,
            self._files,
            owner=owner,
            timeouts=self._timeouts,
            wake=self.wake,
            clock=clock,
            wait_s=report_wait_s,
            count=count,
            trusted=trusted,
        )

    def start(self) -> None:
        self._threads = [threading.Thread(target=self._dispatch, name="delivery-dispatch", daemon=True)]
        for name in self._lanes:
            self._threads.append(
                threading.Thread(target=self._drive, args=(name,), name=f"delivery-{name}", daemon=True)
            )
        for thread in self._threads:
            thread.start()

    def reclaim(self) -> None:
        """At start: what an earlier life of this owner was sending is due again, from its first instance.

        What it was asking proof for is asked again; a report that it still waited for is waited for.
        """
        self._ledger.reclaim_proofs(self._owner)
        for job in self._ledger.find(JobFilter(states=(JobState.DELIVERING,), limit=MANY)):
            for delivery in self._ledger.deliveries(job.id):
                if delivery.state is DeliveryState.SENDING:
                    again = Verdict(
                        state=DeliveryState.PENDING,
                        code="restarted",
                        text="the node ended while sending; everything is sent again",
                        retry_in_s=0.0,
                    )
                    self._finish(delivery, again, 0, {})

    def wake(self) -> None:
        """Something was put into the outbox: look now."""
        self._wake.set()

    @property
    def in_hand(self) -> int:
        """How many deliveries are claimed and not ended."""
        with self._lock:
            return len(self._in_hand)

    @property
    def alive(self) -> bool:
        """Whether every thread still runs."""
        return bool(self._threads) and all(thread.is_alive() for thread in self._threads)

    def stop(self) -> None:
        """Let the instance on the wire end, give the rest back to the ledger, and join."""
        self._stopping.set()
        self._wake.set()
        with self._lock:
            for claimed in self._in_hand.values():
                claimed.stop.set()
        for lane in self._lanes.values():
            lane.put(None)
        for thread in self._threads:
            thread.join()

    # ---- the dispatcher

    def _dispatch(self) -> None:
        renewed = monotonic()
        while not self._stopping.is_set():
            try:
                while not self._stopping.is_set() and self._claim_one():
                    pass
                if monotonic() - renewed > min(RENEW_EVERY_S, self._config.engine.lease_s / 3):
                    self._renew_all()
                    renewed = monotonic()
            except Exception:  # the ledger's disk may come back: deliver then
                log.exception("delivery.dispatch_failed")
            self._wake.wait(self._poll_s)
            self._wake.clear()

    def _claim_one(self) -> bool:
        lease_s = self._config.engine.lease_s
        delivery = self._ledger.claim_delivery(self._owner, lease_s=lease_s)
        if delivery is None:
            delivery = self._ledger.claim_proof(self._owner, lease_s=lease_s)
        if delivery is None:
            return False
        lane = self._lanes.get(delivery.destination)
        if lane is None:
            text = f"the configuration has no destination {delivery.destination!r} any more"
            if delivery.state is not DeliveryState.SENDING:  # it has the instances: nobody is left to ask for proof
                step = Step(state=delivery.state, goal=delivery.state, code="unknown_destination", text=text)
                self.prover.finish(delivery, step)
                return True
            verdict = Verdict(state=DeliveryState.FAILED, code="unknown_destination", text=text)
            self._finish(delivery, verdict, delivery.sent, {})
            return True
        claimed = _Claimed(delivery=delivery)
        with self._lock:
            self._in_hand[delivery.id] = claimed
        lane.put(claimed)
        return True

    def _renew_all(self) -> None:
        with self._lock:
            waiting = list(self._in_hand.values())
        for claimed in waiting:
            if not self._ledger.renew_delivery(claimed.delivery.id, self._owner, lease_s=self._config.engine.lease_s):
                claimed.stop.set()

    # ---- one thread per destination

    def _drive(self, name: str) -> None:
        destination = self._destinations[name]
        while (claimed := self._lanes[name].get()) is not None:
            try:
                if claimed.delivery.state is DeliveryState.SENDING:
                    self._attempt(claimed, destination)
                else:
                    self.prover.step(claimed.delivery, destination, partial(self._shall_stop, claimed))
            except Exception as error:  # the edge
                log.exception("delivery.broken", job_id=claimed.delivery.job_id, destination=name)
                self._broken(claimed.delivery, destination, error)
            finally:
                with self._lock:
                    if self._in_hand.get(claimed.delivery.id) is claimed:  # its proof may be in hand already
                        del self._in_hand[claimed.delivery.id]
                self._wake.set()  # what was sent can be proven at once

    def _shall_stop(self, claimed: _Claimed) -> bool:
        return claimed.stop.is_set() or self._stopping.is_set()

    def _files(self, delivery: Delivery) -> list[Path]:
        return outbox_files(self._spool.result_folder(delivery.job_id) / f"{delivery.kind}-{delivery.encoding}")

    def _broken(self, delivery: Delivery, destination: DestinationConfig, error: Exception) -> None:
        """What nobody expected is tried again, as often as any other trouble; only the kind of error is told."""
        doing = "sending" if delivery.state is DeliveryState.SENDING else "asking for proof"
        outcome = SendOutcome(code="internal_error", text=f"{type(error).__name__} while {doing}: see the log")
        try:
            if delivery.state is not DeliveryState.SENDING:
                unknown = CountOutcome(code=outcome.code, text=outcome.text)
                self.prover.finish(delivery, judge_count(delivery, unknown, asked_of(destination, delivery.kind)))
                return
            self._finish(delivery, self._verdict(delivery, outcome, delivery.sent), delivery.sent, {})
        except Exception:  # the ledger itself: the lease runs out, and the sweep makes it PENDING again
            log.exception("delivery.not_settled", job_id=delivery.job_id, destination=delivery.destination)

    def _attempt(self, claimed: _Claimed, destination: DestinationConfig) -> None:
        delivery = claimed.delivery
        if self._shall_stop(claimed):  # a silent peer would hold the node's end up
            outcome = SendOutcome(code="interrupted", text="the node is stopping, or the job was cancelled")
            verdict = self._verdict(delivery, outcome, delivery.sent)
            self._finish(delivery, verdict, delivery.sent, delivery.statuses)
            return
        files = self._files(delivery)
        if len(files) != delivery.instances:
            text = f"the outbox holds {len(files)} of {delivery.instances} instances: run the job again"
            self._finish(
                delivery, Verdict(state=DeliveryState.FAILED, code="result_missing", text=text), delivery.sent, {}
            )
            return
        outcome, stored = self._send_missing(claimed, files, destination)
        statuses = {**stored_before(delivery), **outcome.statuses}
        self._finish(delivery, self._verdict(delivery, outcome, stored), stored, statuses, outcome)

    def _verdict(self, delivery: Delivery, outcome: SendOutcome, stored: int) -> Verdict:
        destination = self._destinations[delivery.destination]
        lasted_s = seconds_since(delivery.failing_since, self._clock())
        # asked after the time was read: a jump in between must not be missed
        failing_s = outage_s(0.0 if stored > delivery.sent else lasted_s, destination, trusted=self._trusted())
        arrived = self._arrived.get(destination.name)
        others_arrive = arrived is not None and self._steady() - arrived < lasted_s
        return settle(delivery, outcome, stored, destination, failing_s=failing_s, others_arrive=others_arrive)

    def _send_missing(
        self, claimed: _Claimed, files: Sequence[Path], destination: DestinationConfig
    ) -> tuple[SendOutcome, int]:
        """The outcome, and how many instances the destination has now over all attempts."""
        left = missing(claimed.delivery)
        before = claimed.delivery.sent if left is not None else 0
        send = self._sender(destination)
        outcome = send(files, only=left, should_stop=partial(self._shall_stop, claimed))
        return outcome, before + outcome.stored

    def _sender(self, destination: DestinationConfig) -> Send:
        """By STOW-RS to a url, else by C-STORE to a peer."""
        if destination.url:
            return partial(self._send_web, service=destination)
        return partial(
            self._send,
            peer=self._config.peer(destination.peer),
            transfer_syntax=destination.transfer_syntax,
            calling_ae=self._config.node.ae_title,
            timeouts=self._timeouts,
            max_pdu=self._config.node.max_pdu,
            sender=self._config.node.sender,
        )

    def _goal(self, delivery: Delivery) -> DeliveryState:
        return goal_of(asked_of(self._destinations[delivery.destination], delivery.kind))

    def _finish(
        self,
        delivery: Delivery,
        verdict: Verdict,
        stored: int,
        statuses: Mapping[str, str],
        outcome: SendOutcome | None = None,
    ) -> None:
        again = None
        if verdict.retry_in_s is not None:
            again = self._clock() + timedelta(seconds=verdict.retry_in_s)
        bound = log.bind(
            job_id=delivery.job_id,
            destination=delivery.destination,
            kind=delivery.kind,
            series_uid=delivery.series_uid,
            instances=delivery.instances,
            stored=stored,
            attempt=delivery.attempts,
            seconds=round(outcome.seconds, 3) if outcome else 0.0,
        )
        try:
            self._ledger.finish_delivery(
                delivery.id,
                self._owner,
                state=verdict.state,
                sent=stored,
                statuses=statuses,
                code=verdict.code,
                text=verdict.text,
                next_attempt=again,
                counted=verdict.code != "interrupted",
                outage=verdict.outage,
                goal=self._goal(delivery) if verdict.state is _SENT else _SENT,
            )
        except StaleState:
            bound.info("delivery.discarded", reason="cancelled, or taken over after the lease ran out")
            return
        event = _EVENTS[verdict.state]
        if verdict.state is DeliveryState.SENT:
            bound.info(event)
            self._is_back(delivery.destination)
        elif verdict.outage and seconds_since(delivery.failing_since, self._clock()) >= LOUD_AFTER_S:
            bound.error("destination.down", code=verdict.code, reason=verdict.text, retry_in_s=verdict.retry_in_s)
        else:
            bound.warning(event, code=verdict.code, reason=verdict.text, retry_in_s=verdict.retry_in_s)

    def _is_back(self, destination: str) -> None:
        """What waits out the pauses of an outage is due now: a night's results need not wait another hour."""
        self._arrived[destination] = self._steady()
        # not what was left unanswered: it may be what the destination stumbles over, each time anew
        if due := self._ledger.end_outage(destination, UNREACHABLE_CODES):
            log.info("destination.back", destination=destination, due=due)
            self.wake()


_SENT = DeliveryState.SENT
_EVENTS = {
    DeliveryState.SENT: "delivery.sent",
    DeliveryState.PENDING: "delivery.deferred",
    DeliveryState.FAILED: "delivery.failed",
    DeliveryState.CANCELLED: "delivery.skipped",
}
