"""From files in the inbox to jobs: which instances make a series, when it is complete, and whether it is used.

`tick` is called again and again by one thread. Whatever it remembers is rebuilt from the spool and the ledger at
start, and each of its steps can be repeated: kill -9 between any two of them loses nothing and doubles nothing.

    incoming file --adopt--> series folder --open_job--> RECEIVING --quiet, complete, chosen--> QUEUED
                 \\--> quarantine (unreadable, hostile)                       \\--> REJECTED or HELD, with the reason
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path

import structlog
from pydicom.uid import SegmentationStorage

from dicom_node.config import Config
from dicom_node.headers import BadInstance, InstanceHeader, read_header
from dicom_node.incoming import CHOSEN, IncomingSeries, gaps_text, source_digest, stands
from dicom_node.net.associations import AssociationRegistry, sender_of
from dicom_node.selection import Decision, EarlierChoice, SeriesSummary, choose, matches, summarize, unfit
from dicom_node.trial import LABELED, UNANNOUNCED, unannounced
from storage.errors import IllegalMove, LedgerOutage, NoSpace, NotFound, StaleState
from storage.fetched import FetchedTokens
from storage.ledger import Ledger
from storage.records import Job, JobState
from storage.spool import Adopted, Spool

log = structlog.get_logger(__name__)

MAX_SEGMENTATIONS = 100  # of one study: more is no radiologist's work
_RETRY_S = 60.0  # after an unexpected error with one study: the others go on meanwhile
_STATE_OF = {
    "synthesize": JobState.QUEUED,
    "hold": JobState.HELD,
    "reject": JobState.REJECTED,
    "cancel": JobState.CANCELLED,
}
_ORDER = {"reject": 0, "hold": 1, "synthesize": 2}  # the chosen series last: after a kill it is chosen again

# sentences, by association's token, reason code, and Study Instance UID and accession as far as they could be read
_Faults = dict[tuple[str, str, str, str], list[str]]


class Assembler:
    """Sorts the inbox into series and decides on complete studies. One thread calls `tick`."""

    def __init__(
        self,
        config: Config,
        spool: Spool,
        ledger: Ledger,
        registry: AssociationRegistry,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Rebuild what was being received. `clock` is monotonic seconds, the same as the registry's."""
        self._config = config
        self._spool = spool
        self._ledger = ledger
        self._registry = registry
        self._fetched = FetchedTokens(spool.root)
        self._clock = clock
        self._series: dict[str, IncomingSeries] = {}
        self._blocked: dict[str, float] = {}  # study UID or file name -> not before
        self._failing: dict[str, float] = {}  # the same keys -> since when each attempt failed
        self._cancelled: dict[str, set[str]] = {}  # series UID -> tokens of the associations that fed it
        self._folders: set[Path] = set()
        self._faults: _Faults = {}  # quarantined, and not yet noted
        self._rebuild()

    def tick(self) -> None:
        """Index what came, keep the ledger's counts, decide on what is complete."""
        self._index()
        self._follow_ledger()
        for series in list(self._series.values()):
            self._keep_job(series)
        self._finish_known()
        for study_uid in {s.study_uid for s in self._series.values()}:
            self._fenced(study_uid, partial(self._consider, study_uid))
            self._give_up(study_uid)

    @property
    def receiving(self) -> int:
        """How many series are on their way in."""
        return len(self._series)

    # -- what came ---------------------------------------------------------------------------------------------------

    def _index(self) -> None:
        for path in self._spool.incoming():
            self._folders.add(path.parent)
            self._fenced(path.name, partial(self._index_one, path))
        for (token, code, study_uid, accession), found in list(self._faults.items()):
            self._note_quarantined(token, code, found, {"study_uid": study_uid, "accession": accession})
            del self._faults[token, code, study_uid, accession]  # told: a ledger that is out raises before
        self._remove_empty_folders()

    def _fault(self, token: str, code: str, whose: InstanceHeader | BadInstance, text: str) -> None:
        """Have a file that was put into quarantine told at the end of the tick."""
        self._faults.setdefault((token, code, whose.study_uid, whose.accession), []).append(text)

    def _note_quarantined(self, token: str, code: str, found: list[str], whose: dict[str, str]) -> None:
        """One event for all files of an association and a study with the same fault in one tick."""
        calling_ae, address = sender_of(token)
        details = {"reason": code, "instances": len(found), "calling_ae": calling_ae, "address": address, **whose}
        text = f"{len(found)} instances were put into quarantine ({code}); the first: {found[0]}"
        self._ledger.note("", "quarantined", text, details=details)
        log.warning("instances.quarantined", code=code, instances=len(found), first=found[0])

    def _index_one(self, path: Path) -> None:
        token = self._spool.association_of(path)
        header = None
        try:
            header = read_header(path)
            if header.sop_instance_uid != _uid_of(path):
                raise BadInstance("uid_mismatch", f"holds instance {header.sop_instance_uid}, sent as {_uid_of(path)}")
            if header.sop_class_uid == SegmentationStorage:
                self._keep_segmentation(path, token, header)
                return
            series = self._series_of(header)
            if series.study_uid != header.study_uid:
                text = f"series {series.series_uid} is of study {series.study_uid}, this instance of {header.study_uid}"
                raise BadInstance("mixed_study", text)
        except FileNotFoundError:  # an operator took it away
            return
        except BadInstance as fault:
            self._spool.quarantine(path, fault.code)
            self._fault(token, fault.code, header or fault, f"{_uid_of(path)}: {fault}")
            return
        self._series[series.series_uid] = series
        self._add(series, path, token, header)

    def _keep_segmentation(self, path: Path, token: str, header: InstanceHeader) -> None:
        """A SEG waits beside its study's CT: the worker looks for it when a job begins. Raises BadInstance."""
        uid, study_uid = header.sop_instance_uid, header.study_uid
        known = {_uid_of(other) for other in self._spool.segmentations(study_uid)}
        if len(known - {uid}) >= MAX_SEGMENTATIONS:
            raise BadInstance("too_many_segmentations", f"study {study_uid} has {len(known)} SEG objects already")
        calling_ae, address = sender_of(token)
        adopted = self._spool.keep_segmentation(path, study_uid)
        if adopted is Adopted.DIFFERENT:
            self._fault(token, "different_content", header, f"{uid}: came before with other content")
        if adopted is not Adopted.NEW:
            return
        for series in self._series.values():  # the study's quiet period is the one of all that comes of it
            if series.study_uid == study_uid:
                series.last_seen = self._clock()
        log.info("segmentation.kept", study_uid=study_uid, sop_instance_uid=uid)
        details = {"study_uid": study_uid, "accession": header.accession, "sop_instance_uid": uid}
        details |= {"calling_ae": calling_ae, "address": address}
        self._ledger.note("", "segmentation_kept", f"SEG {uid} waits for the study's jobs", details=details)

    def _add(self, series: IncomingSeries, path: Path, token: str, header: InstanceHeader) -> None:
        series.last_seen = self._clock()
        series.latest = header
        series.tokens.add(token)
        series.last_token = token
        series.after_cancel |= token in self._cancelled.get(series.series_uid, ())
        series.calling_ae, series.address = sender_of(token)
        uid = header.sop_instance_uid
        if uid not in series.headers and self._too_many(series):
            self._spool.quarantine(path, "too_many_instances")  # it was acknowledged: nothing that was is thrown away
            self._fault(token, "too_many_instances", header, f"{uid}: its series has {series.count} instances already")
            return
        known = [job.id for job in (series.job, series.succeeds) if job is not None]
        adopted = self._spool.adopt(path, series.series_uid, known=known)
        if adopted is Adopted.NEW:
            series.headers[uid] = header
            self._keep_sender(series)
        elif adopted is Adopted.SAME:
            series.duplicates += 1
        else:
            self._fault(token, "different_content", header, f"{uid}: came before with other content")

    def _keep_sender(self, series: IncomingSeries) -> None:
        """Without room for it the series goes on: it matters only to a ledger that is restored meanwhile."""
        sender = series.calling_ae, series.address
        if sender != series.kept_sender:
            with suppress(NoSpace):
                self._spool.keep_sender(series.series_uid, *sender)
                series.kept_sender = sender

    def _too_many(self, series: IncomingSeries) -> bool:
        """One more than allowed is kept, so that a restart, too, knows that the series is too large."""
        return series.count > self._config.intake.max_instances_per_series

    def _series_of(self, header: InstanceHeader) -> IncomingSeries:
        known = self._series.get(header.series_uid)
        return known or self._load(header.series_uid, header.study_uid, job=None)

    def _remove_empty_folders(self) -> None:
        for folder in list(self._folders):
            if not self._registry.is_open(folder.name, idle_limit_s=math.inf):
                self._folders.discard(folder)
                with suppress(OSError):  # not empty: the next tick takes the rest
                    folder.rmdir()

    # -- what is known -----------------------------------------------------------------------------------------------

    def _rebuild(self) -> None:
        for job in self._ledger.receiving():
            if job.info.series_uid in self._series:
                other = self._series[job.info.series_uid].job
                text = f"series is being received as job {other.id if other else ''} already"
                self._ledger.move(job.id, JobState.REJECTED, code="duplicate_series", text=text)
                continue
            self._series[job.info.series_uid] = self._load(job.info.series_uid, job.info.study_uid, job=job)
        for series_uid in self._spool.series_uids():
            if series_uid not in self._series:
                self._adopt_leftover(series_uid)

    def _adopt_leftover(self, series_uid: str) -> None:
        """A folder without a receiving job: killed before the job was opened, or slices that came a moment late."""
        series = self._load(series_uid, "", job=None)
        first = next(iter(series.headers.values()), None)
        if first is not None:
            series.study_uid = first.study_uid
            series.latest = first
            series.calling_ae, series.address = self._spool.sender_of_series(series_uid)
            self._series[series_uid] = series

    def _load(self, series_uid: str, study_uid: str, *, job: Job | None) -> IncomingSeries:
        earlier = next(
            (
                other
                for other in self._ledger.jobs_of_series(series_uid)
                if other.state is not JobState.RECEIVING and other.reason_code != "duplicate_series"
            ),
            None,
        )
        series = IncomingSeries(
            study_uid=study_uid, series_uid=series_uid, last_seen=self._clock(), job=job, earlier=earlier
        )
        if job is not None:
            series.calling_ae, series.address = job.info.calling_ae, job.info.peer_address
            series.headers.update(self._headers(self._spool.ct_files(job.id)))
        series.headers.update(self._headers(self._spool.series_files(series_uid)))
        if earlier is not None:
            series.inherited.update(self._headers(self._spool.ct_files(earlier.id)))
        if job is not None and not series.headers and series.succeeds is not None:
            series.duplicates = len(series.inherited)  # killed between opening and rejecting a duplicate
        return series

    def _headers(self, paths: Iterable[Path]) -> dict[str, InstanceHeader]:
        headers = {}
        for path in paths:
            try:
                headers[_uid_of(path)] = read_header(path)
            except BadInstance as fault:  # it was readable when it was adopted: the disk, or somebody's hand
                log.error("instance.unreadable", sop_instance_uid=_uid_of(path), code=fault.code)
                self._spool.quarantine(path, fault.code)
        return headers

    def _follow_ledger(self) -> None:
        """Let go of what an operator cancelled; its files stay with the job, for retention or a retry."""
        receiving = {job.id for job in self._ledger.receiving()}
        for series in list(self._series.values()):
            if series.job is not None and series.job.id not in receiving:
                self._cancelled[series.series_uid] = series.tokens
                self._take(series.job, series.series_uid)
                self._forget(series)

    def _keep_job(self, series: IncomingSeries) -> None:
        """Every series with an instance of its own has a RECEIVING job with the right count."""
        if series.job is None:
            if not series.headers:
                return
            earlier = series.succeeds
            series.job = self._ledger.open_job(series.info(), supersedes=earlier.id if earlier else "")
            log.info("series.receiving", job_id=series.job.id, series_uid=series.series_uid)
            if earlier is not None:
                text = f"slices came after the job began: job {series.job.id} takes them in"
                self._ledger.note(earlier.id, "late_slices", text, details={"successor": series.job.id})
        count = series.count
        if series.job.instances != count:
            with suppress(NotFound):
                series.job = self._ledger.update(series.job.id, instances=count)

    # -- what is complete --------------------------------------------------------------------------------------------

    def _quiet(self, members: Iterable[IncomingSeries], period_s: float) -> bool:
        """Nothing came for `period_s`, and no open association carried any of it.

        An association that stays open without bringing more counts for `incomplete_after_s` at most.
        """
        members = list(members)
        limit_s = self._config.intake.incomplete_after_s
        silent_s = self._clock() - max(s.last_seen for s in members)
        if silent_s < period_s:
            return False
        tokens = set().union(*(s.tokens for s in members))
        return silent_s > limit_s or not any(self._registry.is_open(t, idle_limit_s=limit_s) for t in tokens)

    def _finish_known(self) -> None:
        """The same series again after its job: say so, and keep nothing."""
        for series in [s for s in self._series.values() if not s.headers]:
            if not self._quiet([series], self._config.intake.quiet_period_s):
                continue
            if series.only_duplicates and series.earlier is not None:
                series.job = series.job or self._ledger.open_job(series.info())
                text = f"all {series.duplicates} instances are those of job {series.earlier.id}"
                decision = Decision(series_uid=series.series_uid, action="reject", code="duplicate_series", text=text)
                self._finish(series, decision)
            elif series.job is None and not series.duplicates:  # all of it had other content, and is in quarantine
                self._forget(series)

    def _consider(self, study_uid: str) -> None:
        """Decide on the series of a study once all of it is quiet and whole."""
        intake = self._config.intake
        members = [
            s for s in self._series.values() if s.study_uid == study_uid and s.job is not None and not s.only_duplicates
        ]
        for series in members:
            if series.earlier is not None:
                series.earlier = self._ledger.get(series.earlier.id)  # it may have ended meanwhile
        for series in [s for s in members if s.succeeds is not None and s.succeeds.state in CHOSEN]:
            members.remove(series)
            if self._quiet([series], intake.quiet_period_s) and not self._awaits_slices(series):
                self._finish_successor(series)
        if not members or not self._quiet(members, max(intake.quiet_period_s, intake.study_quiet_period_s)):
            return
        if any(self._awaits_slices(series) for series in members):
            return
        whole = []
        for series in [s for s in members if s.after_cancel]:
            members.remove(series)
            text = f"a person cancelled job {series.earlier.id if series.earlier else ''} while the series arrived"
            self._finish(series, Decision(series_uid=series.series_uid, action="cancel", code="cancelled", text=text))
        for series in members:
            refusal = self._incomplete(series)
            if refusal is None:
                whole.append(series)
            else:
                self._finish(series, refusal)
        decisions = choose(
            [self._summary(series) for series in whole],
            self._config.rules,
            self._config.selection,
            earlier=self._earlier_choices(study_uid),
        )
        for decision in sorted(decisions, key=lambda d: _ORDER[d.action]):
            self._finish(self._series[decision.series_uid], decision)

    def _summary(self, series: IncomingSeries) -> SeriesSummary:
        return summarize(series.instances, calling_ae=series.calling_ae, geometry=series.geometry)

    def _has_gaps(self, series: IncomingSeries) -> bool:
        """Slices are missing, and the series would be used if they were not."""
        if not series.headers or not (series.geometry.gaps_mm or series.missing_parts[0]):
            return False
        summary = self._summary(series)
        rule = next((rule for rule in self._config.rules if matches(rule, summary)), None)
        return rule.action != "ignore" if rule is not None else unfit(summary, self._config.selection) is None

    def _awaits_slices(self, series: IncomingSeries) -> bool:
        """More may come: nothing is there yet, slices are missing, or the sender was cut off and will send again.

        A series that was cut off may look whole: senders often go from one end to the other.
        """
        if self._clock() - series.last_seen >= self._config.intake.incomplete_after_s:
            return False
        token = series.last_token
        cut_off = not (self._registry.ended_well(token) or self._fetched.is_whole(token))
        return cut_off or not series.headers or series.geometry.uneven or self._has_gaps(series)

    def _incomplete(self, series: IncomingSeries) -> Decision | None:
        """Why a series that was waited for long enough cannot be used, or None."""
        code, text = "", ""
        refused = unannounced(
            self._ledger,
            series.study_uid,
            calling_ae=series.calling_ae,
            labeled=series.labeled_test,
            ae_title=self._config.node.ae_title,
        )
        if not series.headers:
            code, text = "no_instances", "the files of the series are gone from the spool"
        elif refused:
            code, text = UNANNOUNCED, refused
        elif self._too_many(series):
            limit = self._config.intake.max_instances_per_series
            code, text = "too_large", f"more than {limit} instances; the rest is in quarantine"
        elif self._has_gaps(series):
            waited = f"waited {self._config.intake.incomplete_after_s:.0f} s for them"
            code, text = "missing_slices", f"{gaps_text(series.geometry, series.missing_parts)}; {waited}"
        return Decision(series_uid=series.series_uid, action="reject", code=code, text=text) if code else None

    def _earlier_choices(self, study_uid: str) -> list[EarlierChoice]:
        jobs = [job for job in self._ledger.jobs_of_study(study_uid) if stands(job)]
        superseded = {job.supersedes for job in jobs}
        return [
            EarlierChoice(
                series_uid=job.info.series_uid,
                job_id=job.id,
                coverage_mm=float(job.details.get("coverage_mm") or 0.0),
            )
            for job in jobs
            if job.id not in superseded and job.info.series_uid not in self._series
        ]

    # -- what becomes of it ------------------------------------------------------------------------------------------

    def _finish_successor(self, series: IncomingSeries) -> None:
        earlier = series.earlier
        assert earlier is not None
        refusal = self._incomplete(series)
        if refusal is not None:
            self._finish(series, refusal)
            return
        if source_digest(header.sop_instance_uid for header in series.instances) == earlier.source_digest:
            text = f"all {series.count} instances are those of job {earlier.id}, whose input was removed since"
            self._finish(
                series, Decision(series_uid=series.series_uid, action="reject", code="duplicate_series", text=text)
            )
            return
        new = len(series.headers.keys() - series.inherited.keys())
        text = f"{new} late slices join the {len(series.inherited)} of job {earlier.id}"
        decision = Decision(series_uid=series.series_uid, action="synthesize", code="late_slices", text=text)
        self._finish(series, decision)

    def _finish(self, series: IncomingSeries, decision: Decision) -> None:
        """Files first, then facts, then the move: each step may be repeated after a kill."""
        job = series.job
        assert job is not None
        self._take(job, series.series_uid)
        if series.earlier is not None and series.headers:
            self._spool.link_previous(job.id, series.earlier.id)
        uids = [_uid_of(path) for path in self._spool.ct_files(job.id)]
        details = {
            "slices": series.slices or len(uids),
            "coverage_mm": round(series.geometry.coverage_mm, 1),
            "spacing_mm": round(series.geometry.spacing_mm, 3),
            "score": decision.score,
            "duplicates": series.duplicates,
        }
        if series.labeled_test:
            details[LABELED] = True
        try:
            self._ledger.update(job.id, instances=len(uids), source_digest=source_digest(uids), details=details)
            if decision.action == "synthesize" and series.succeeds is not None:
                self._supersede(series.succeeds, job)
            to = _STATE_OF[decision.action]
            self._ledger.move(
                job.id, to, code=decision.code, text=decision.text, expected={JobState.RECEIVING}, details=details
            )
            log.info("series.decided", job_id=job.id, state=to.value, code=decision.code, slices=details["slices"])
        except (IllegalMove, StaleState) as error:  # an operator was quicker
            log.warning("series.moved_by_another", job_id=job.id, reason=str(error))
        self._forget(series)

    def _supersede(self, earlier: Job, successor: Job) -> None:
        """An earlier job that has not begun is not begun any more; one that has goes on, and both say so."""
        text = f"superseded by job {successor.id}, which has the late slices"
        try:
            self._ledger.move(earlier.id, JobState.CANCELLED, code="superseded", text=text, expected={JobState.QUEUED})
        except (IllegalMove, StaleState):
            self._ledger.note(earlier.id, "superseded", text, details={"successor": successor.id})

    def _give_up(self, study_uid: str) -> None:
        """A study whose decision fails again and again ends too: no series waits for ever."""
        since = self._failing.get(study_uid)
        if since is None or self._clock() - since < self._config.intake.incomplete_after_s:
            return
        for series in [s for s in self._series.values() if s.study_uid == study_uid and s.job is not None]:
            assert series.job is not None
            self._take(series.job, series.series_uid)
            text = "the decision on this study failed again and again: see the log"
            with suppress(IllegalMove, StaleState):
                self._ledger.move(series.job.id, JobState.REJECTED, code="internal_error", text=text)
            self._series.pop(series.series_uid, None)
        self._failing.pop(study_uid, None)

    def _take(self, job: Job, series_uid: str) -> None:
        with suppress(NotFound):  # nothing but duplicates came, or an operator removed the files
            self._spool.take_series(job.id, series_uid)

    def _forget(self, series: IncomingSeries) -> None:
        self._series.pop(series.series_uid, None)
        if self._spool.series_files(series.series_uid):
            self._adopt_leftover(series.series_uid)

    def _fenced(self, what: str, step: Callable[[], None]) -> None:
        """Keep one file's or study's unexpected error from stopping the others; it is tried again later."""
        now = self._clock()
        if self._blocked.get(what, now) > now:
            return
        self._blocked.pop(what, None)
        try:
            step()
            self._failing.pop(what, None)
        except Exception as error:
            self._blocked[what] = now + _RETRY_S
            if not isinstance(error, LedgerOutage | NoSpace):  # of the machine: it says nothing against a study
                self._failing.setdefault(what, now)
            log.exception("assembler.step_failed", what=what, retry_s=_RETRY_S)


def _uid_of(path: Path) -> str:
    """The SOP Instance UID of a spool file; `<uid>~2.dcm` is another content under the same UID."""
    return path.name.removesuffix(".dcm").partition("~")[0]
