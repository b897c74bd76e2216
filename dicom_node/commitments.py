"""Storage Commitment that was asked of us, reported on an association of ours: again after pauses, for hours.

A request waits in the spool (`storage.asked`), so that a restart loses none. What the report says is found out anew
for each attempt.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta

import structlog

from dicom_node.config import Config, PeerConfig
from dicom_node.net.commitment_scp import (
    HANDED_OVER_S,
    SORTED_WITHIN_S,
    Verdict,
    is_coming,
    judge,
    note_reported,
    send_report,
)
from dicom_node.net.link import RequestOutcome, timeouts_of
from dicom_node.net.peers import shown
from dicom_node.net.store import Notes, kept_classes
from dicom_node.retry import retry_delay_s
from storage.asked import Asked, AskedCommitments
from storage.ledger import utc_now
from storage.spool import Spool

log = structlog.get_logger(__name__)

Send = Callable[[Verdict, PeerConfig], RequestOutcome]


class CommitmentReporter:
    """One thread calls `tick`; it reports what is due, one at a time."""

    def __init__(
        self,
        config: Config,
        asked: AskedCommitments,
        spool: Spool,
        notes: Notes,
        *,
        clock: Callable[[], datetime] = utc_now,
        send: Send | None = None,
    ) -> None:
        self._config, self._asked, self._spool, self._notes, self._clock = config, asked, spool, notes, clock
        self._kept = kept_classes(config)
        self._send = send or self._over_the_network
        self._stopping = False

    def stop(self) -> None:
        """A tick that runs ends after the report that it is sending."""
        self._stopping = True

    def tick(self) -> int:
        """Report what is due; how many reports were taken. A peer that cannot be reached is tried once a tick."""
        taken, unreachable = 0, set()
        for request in self._asked.waiting():
            if self._stopping:
                break
            if request.peer in unreachable or not self._is_due(request) or self._waits(request):
                continue
            outcome = self._report(request)
            taken += outcome.ok
            if outcome.code in ("connection_failed", "association_aborted", "no_response"):
                unreachable.add(request.peer)
        return taken

    def _is_due(self, request: Asked) -> bool:
        """A time that no pause explains comes of a clock that was set back: due now."""
        wait = request.due - self._clock()
        return not timedelta() < wait <= timedelta(seconds=self._pause_s(request.attempts))

    def _pause_s(self, attempts: int) -> float:
        """After so many attempts; before the first one its own association has a while for the report."""
        rules = self._config.commitment
        if not attempts:
            return HANDED_OVER_S
        return retry_delay_s(attempts, first_s=rules.first_retry_s, longest_s=rules.max_retry_s)

    def _waits(self, request: Asked) -> bool:
        """For the assembler, within bounds: what it has not looked at may yet go to quarantine."""
        within = timedelta() <= self._clock() - request.asked < timedelta(seconds=SORTED_WITHIN_S)
        return within and is_coming(request, self._spool)

    def _report(self, request: Asked) -> RequestOutcome:
        peer = next((one for one in self._config.peers if one.name == request.peer), None)
        verdict = judge(request, self._spool, self._kept)
        if peer is None:
            gone = RequestOutcome(code="peer_unknown", text=f"no peer is named {request.peer!r} now", permanent=True)
            self._give_up(request, gone, verdict)
            return gone
        outcome = self._send(verdict, peer)
        if outcome.ok:
            note_reported(self._notes, request, verdict, "an association of ours")
            self._asked.done(request)
        elif outcome.permanent or request.attempts + 1 >= self._config.commitment.max_attempts:
            self._give_up(request, outcome, verdict)
        else:
            self._later(request, outcome)
        return outcome

    def _later(self, request: Asked, outcome: RequestOutcome) -> None:
        attempts = request.attempts + 1
        pause = self._pause_s(attempts)
        self._asked.postpone(request, due=self._clock() + timedelta(seconds=pause), attempts=attempts)
        log.warning("commitment.report_postponed", code=outcome.code, reason=outcome.text, retry_s=pause)

    def _give_up(self, request: Asked, outcome: RequestOutcome, verdict: Verdict) -> None:
        attempts = request.attempts + 1
        text = f"{shown(request.calling_ae)} was not told whether {len(request.references)} instances are held"
        details = {
            "transaction_uid": request.transaction_uid,
            "peer": request.peer,
            "reason": outcome.code,
            "attempts": attempts,
            "study_uid": verdict.study_uid,
        }
        log.error("commitment.report_given_up", **details)
        note = f"{text}: {outcome.text}; given up after {attempts} attempts"
        whose = {"calling_ae": request.calling_ae, "accession": verdict.accession}
        self._notes.note("", "commitment_report_failed", note, details={**details, **whose})
        self._asked.done(request)

    def _over_the_network(self, verdict: Verdict, peer: PeerConfig) -> RequestOutcome:
        node = self._config.node
        return send_report(verdict, peer, calling_ae=node.ae_title, timeouts=timeouts_of(node), max_pdu=node.max_pdu)
