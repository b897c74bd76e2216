"""Studies from an archive, asked for by number or missing here: found by C-FIND, fetched one at a time.

Fetched series go the way of any other: the receiver or the spool, the assembler, its rules and its choice. A study that
has a job is left alone unless it is asked for again; one whose fetching was cut short goes on where it stopped, which
the ledger knows (`pull_started` without a `pull_ended`).

Outcome codes: fetched, planned (a dry run), present, no_ct, not_found, incomplete, not_tried, and those of `query` and
`move`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from time import monotonic
from typing import Any, Literal

import structlog

from dicom_node.config import Config, PeerConfig
from dicom_node.net.associations import AssociationRegistry
from dicom_node.net.link import timeouts_of
from dicom_node.net.move import Progress, Retrieval, RetrieveOutcome
from dicom_node.net.query import Finder, SeriesFound, StudyFound
from dicom_node.net.store import Store
from storage.fetched import FetchedTokens
from storage.ledger import Ledger
from storage.records import Job, JobState
from storage.spool import Spool

log = structlog.get_logger(__name__)

Method = Literal["move", "get"]
# a job of the series was closed for want of instances: the archive may have them now
_UNFINISHED = frozenset({"missing_slices", "no_instances"})
# the archive's trouble, not the study's: the next study would meet it, too
ARCHIVE_TROUBLE = frozenset(
    {"connection_failed", "association_rejected", "association_aborted", "not_offered", "destination_unknown"}
)
FINE = frozenset({"fetched", "planned", "present"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """One study that somebody asks for, by one of the two."""

    study_uid: str = ""
    accession: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class PullOutcome:
    """What became of one study. `series` were fetched (or would be), `skipped` have jobs here already."""

    wanted: Wanted
    study_uid: str = ""
    code: str
    text: str = ""
    series: int = 0
    skipped: int = 0
    instances: int = 0
    failed: int = 0
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return self.code in FINE


@dataclass(frozen=True, kw_only=True, slots=True)
class PullOptions:
    """How to pull. `wants_series` says which CT series of a study are wanted at all."""

    method: Method = "move"
    again: bool = False
    dry_run: bool = False
    wants_series: Callable[[SeriesFound], bool] = lambda _series: True
    should_stop: Callable[[], bool] = lambda: False
    progress: Progress = lambda _done, _total: None


@dataclass(kw_only=True, slots=True)
class _Sum:
    series: int = 0
    instances: int = 0
    failed: int = 0
    seconds: float = 0.0
    trouble: RetrieveOutcome | None = None
    _began: float = field(default_factory=monotonic)

    def add(self, one: RetrieveOutcome) -> None:
        self.series += one.ok
        self.instances += one.completed
        self.failed += one.failed
        self.trouble = self.trouble if one.ok else one
        self.seconds = monotonic() - self._began


class Puller:
    """Pulls from one peer; one thread uses it. It writes what it does into the ledger."""

    def __init__(self, config: Config, peer: PeerConfig, ledger: Ledger, spool: Spool, options: PullOptions) -> None:
        self._config, self._peer, self._ledger, self._spool, self._options = config, peer, ledger, spool, options
        node, pull = config.node, config.pull
        quick = timeouts_of(node)
        slow_s = max(pull.answer_timeout_s, node.network_timeout_s)
        self.finder = Finder(
            peer,
            calling_ae=node.ae_title,
            timeouts=quick,
            max_pdu=node.max_pdu,
            should_stop=options.should_stop,
        )
        self._retrieval = Retrieval(
            peer=peer,
            calling_ae=node.ae_title,
            timeouts=replace(quick, dimse_s=pull.answer_timeout_s, network_s=slow_s),
            max_pdu=node.max_pdu,
            most_s=pull.series_timeout_s,
            should_stop=options.should_stop,
            progress=options.progress,
        )
        # a fetch of our own is no association that a peer opened: it has a book of its own
        self._registry = AssociationRegistry(limit=1, clock=monotonic)
        self._fetched = FetchedTokens(spool.root)

    def pull_all(self, wanted: Iterable[Wanted]) -> Iterator[PullOutcome]:
        """One study after the other; an accession number may have several. After a trouble of the archive itself, or
        a stop, the rest is `not_tried`."""
        gone = ""
        for one in wanted:
            if not gone and self._options.should_stop():
                gone = "stopped"
            if gone:
                yield PullOutcome(wanted=one, study_uid=one.study_uid, code="not_tried", text=gone)
                continue
            for outcome in self._pull_wanted(one):
                gone = gone or (outcome.text if outcome.code in ARCHIVE_TROUBLE else "")
                yield outcome

    def pull_study(self, study: StudyFound, wanted: Wanted) -> PullOutcome:
        """The CT series of one study that is there."""
        jobs = self._ledger.jobs_of_study(study.study_uid)
        blank = PullOutcome(wanted=wanted, study_uid=study.study_uid, code="present")
        if not self._options.again and self.is_here(study.study_uid):
            return replace(blank, text=f"{len(jobs)} jobs of it are here")
        found = self.finder.ct_series(study.study_uid)
        if not found.ok:
            return replace(blank, code=found.code, text=found.text, seconds=found.seconds)
        series = [one for one in found.series if self._options.wants_series(one)]
        if not series:
            return replace(blank, code="no_ct", text=f"the archive shows no CT series of it ({_seen(found.series)})")
        missing = [one for one in series if self._options.again or not has_job(jobs, one)]
        blank = replace(blank, skipped=len(series) - len(missing))
        if not missing:
            return replace(blank, text="every CT series of it has a job here")
        if self._options.dry_run:
            instances = sum(one.instances or 0 for one in missing)
            return replace(blank, code="planned", series=len(missing), instances=instances)
        return self._fetch(study, missing, blank)

    # ---- inside

    def _pull_wanted(self, wanted: Wanted) -> Iterator[PullOutcome]:
        if wanted.study_uid:
            found = self.finder.study(wanted.study_uid)
        else:
            found = self.finder.studies_of_accession(wanted.accession)
        if not found.ok:
            yield PullOutcome(wanted=wanted, study_uid=wanted.study_uid, code=found.code, text=found.text)
        elif not found.studies:
            text = f"{self._peer.ae_title} shows no such study"
            yield PullOutcome(wanted=wanted, study_uid=wanted.study_uid, code="not_found", text=text)
        for study in found.studies:
            yield self.pull_study(study, wanted)

    def is_here(self, study_uid: str) -> bool:
        """Whether a study needs no fetching: it has jobs, and no fetching of it was cut short."""
        return is_present(self._ledger.jobs_of_study(study_uid)) and not self._was_cut_short(study_uid)

    def _was_cut_short(self, study_uid: str) -> bool:
        codes = [event.code for event in self._ledger.events_of_study(study_uid)]
        return next((code for code in reversed(codes) if code.startswith("pull_")), "") in _CUT_SHORT

    def _fetch(self, study: StudyFound, missing: Sequence[SeriesFound], blank: PullOutcome) -> PullOutcome:
        self._note(study, "pull_started", f"{len(missing)} CT series are fetched from {self._peer.ae_title}", {})
        total = _Sum()
        for one in missing:
            outcome = self._retrieve(study.study_uid, one)
            total.add(outcome)
            if outcome.code in ARCHIVE_TROUBLE or self._options.should_stop():
                break
        counts: dict[str, Any] = {"series": total.series, "instances": total.instances, "failed": total.failed}
        done = replace(blank, code="fetched", seconds=total.seconds, **counts)
        details = {**counts, "method": self._options.method, "peer": self._peer.name}
        trouble = total.trouble
        if trouble is None and total.series < len(missing):
            trouble = RetrieveOutcome(code="interrupted", text="stopped before the rest")
        if trouble is None:
            text = f"{total.series} CT series, {total.instances} instances fetched from {self._peer.ae_title}"
            self._note(study, "pull_ended", text, details, total.seconds)
            return replace(done, text=text)
        text = f"{total.series} of {len(missing)} CT series fetched; {trouble.text}"
        self._note(study, "pull_failed", text, {**details, "reason": trouble.code}, total.seconds)
        return replace(done, code=trouble.code, text=text)

    def _retrieve(self, study_uid: str, series: SeriesFound) -> RetrieveOutcome:
        if self._options.method == "move":
            return self._retrieval.move(study_uid, series.series_uid)
        token = self._registry.open(calling_ae=self._peer.ae_title, address=self._peer.host, peer=self._peer.name)
        assert token is not None  # one at a time
        try:
            with self._fetched.open(token):
                store = Store(self._config, self._spool, self._ledger, self._registry)
                outcome = self._retrieval.get(study_uid, series.series_uid, store, token)
                if outcome.ok:
                    self._fetched.mark_whole(token)
        finally:
            self._spool.close_incoming(token)
            self._registry.close(token, aborted=False)
        return outcome

    def _note(
        self, study: StudyFound, code: str, text: str, details: dict[str, Any], seconds: float | None = None
    ) -> None:
        whose = {"study_uid": study.study_uid, "accession": study.accession, "peer": self._peer.name}
        self._ledger.note("", code, text, seconds=seconds, details={**details, **whose})
        log.info(code.replace("_", ".", 1), study_uid=study.study_uid, **{**details, "peer": self._peer.name})


_CUT_SHORT = frozenset({"pull_started", "pull_failed"})


def is_unfinished(job: Job) -> bool:
    """Whether a job ended for want of instances."""
    return job.state is JobState.REJECTED and job.reason_code in _UNFINISHED


def is_present(jobs: Sequence[Job]) -> bool:
    """Whether a study has jobs, and none ended for want of instances without a better one of its series."""
    finished = {job.info.series_uid for job in jobs if not is_unfinished(job)}
    return bool(jobs) and all(job.info.series_uid in finished for job in jobs)


def has_job(jobs: Sequence[Job], series: SeriesFound) -> bool:
    """Whether a series came: it has a job that was decided on, or that receives all that the archive has."""
    mine = [job for job in jobs if job.info.series_uid == series.series_uid and not is_unfinished(job)]
    receiving = [job for job in mine if job.state is JobState.RECEIVING]
    whole = any(series.instances is not None and job.instances >= series.instances for job in receiving)
    return whole or len(mine) > len(receiving)


def _seen(series: Sequence[SeriesFound]) -> str:
    return f"{len(series)} of other descriptions or stations" if series else "none at all"
