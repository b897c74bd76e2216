"""The worker: one job at a time from the ledger through the engine into the outbox.

This is one of the two edges where an error becomes *retry*, *held*, *rejected* or *failed* (the other one is
`settle.settle`). The rules are in `judge`, one table that a test walks.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from time import monotonic
from typing import Any

import structlog

from dicom_node.config import Config, DestinationConfig
from dicom_node.engine import Engine, EngineError, EngineStopped
from dicom_node.lineage import (
    OTHER_SERIES,
    RECALLED,
    RERUN,
    SAME_AS,
    WRITTEN,
    asked_for,
    result_uids,
    series_out,
    written_at,
)
from dicom_node.recover import facts_of
from dicom_node.retry import retry_delay_s
from dicom_node.settle import OPTIONAL_KINDS
from dicom_node.trial import Trial, only_for, trial_of
from pipeline.errors import DistrictError, GateRefusal, PipelineError, UnsupportedSeries
from pipeline.result import ResultSummary, SeriesSummary, read_summary
from pipeline.types import DistrictOptions, GateOptions, OutputOptions, PipelineOptions, Progress, Stage
from storage.errors import LedgerError, NoSpace, NotFound, OtherSeries, StaleState
from storage.ledger import Ledger, utc_now
from storage.records import Job, JobFilter, JobState, NewDelivery
from storage.spool import Spool

log = structlog.get_logger()

POLL_S = 1.0
RENEW_EVERY_S = 5.0  # also how late a cancellation is noticed
PROGRESS_EVERY_S = 2.0  # a person watches; the ledger is not a progress bar
LONGEST_RETRY_S = 3600.0
MANY = 1_000_000  # all of them
REJECTING = (UnsupportedSeries, DistrictError, GateRefusal)  # the series is at fault: nobody can mend it here
OPERATORS_CODES = frozenset({"no_segmenter", "unknown_segmenter"})  # the series is not at fault for these
LATER_CODES = frozenset({"not_written"})  # a PipelineError that a disk with room again would not meet
WAIT_FOR_ROOM_S = 300.0  # nobody frees a disk in less; an attempt that finds no room costs nothing
RESULT_TO_INPUT = 2  # a result is at most so many times as large as its CT, with all its companions


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """How a run that gave no result ends: `rejected`, else failed when `permanent`, else tried again."""

    code: str
    text: str
    permanent: bool = False
    rejected: bool = False
    waits: bool = False  # nothing is wrong with the job: it is tried again however long it takes


def judge(error: Exception) -> Verdict:
    """Tell permanent from transient by class; an error nobody expected is worth another attempt.

    Only our own errors' texts are kept: another's message may quote a header.
    """
    match error:
        case PipelineError():
            rejected = isinstance(error, REJECTING) and error.code not in OPERATORS_CODES
            permanent = error.permanent and error.code not in LATER_CODES
            waits = error.code in LATER_CODES
            return Verdict(code=error.code, text=error.text, permanent=permanent, rejected=rejected, waits=waits)
        case EngineError():
            return Verdict(code=error.code, text=error.text)
        case NotFound():
            return Verdict(code="input_gone", text="the series is not in the spool any more", permanent=True)
        case NoSpace():
            return Verdict(code="no_space", text=f"{error}; it goes on when there is room", waits=True)
        case OtherSeries():
            return Verdict(code=OTHER_SERIES, text=str(error), permanent=True)
        case _:
            return Verdict(code="internal_error", text=f"{type(error).__name__} in the worker: see the log")


def pipeline_options(config: Config) -> PipelineOptions:
    """What the engine needs to know: one encoding for each that a destination asks for, "sc" without destinations."""
    wanted = {destination.encoding for destination in config.destinations} or {"sc"}
    pipeline, output = config.pipeline, config.output
    return PipelineOptions(
        bundle=Path(pipeline.bundle),
        bundles=(pipeline.bundles,),
        shadow=Path(pipeline.shadow) if pipeline.shadow else None,
        device=pipeline.device,
        precision=pipeline.precision,
        batch=pipeline.batch,
        blending=pipeline.blending,
        stitching=pipeline.stitching,
        districts=DistrictOptions(
            chain=pipeline.districts,
            nnunet_folder=Path(pipeline.nnunet_folder) if pipeline.nnunet_folder else None,
            totalsegmentator_weights=(
                Path(pipeline.totalsegmentator_weights) if pipeline.totalsegmentator_weights else None
            ),
            timeout_s=pipeline.segmenter_timeout_s,
            device=pipeline.device,
            threads=pipeline.threads,
        ),
        min_confidence=pipeline.min_confidence,
        low_confidence=pipeline.low_confidence,
        threads=pipeline.threads,
        gate=GateOptions(**config.gate.model_dump()),
        output=OutputOptions(
            encodings=tuple(encoding for encoding in ("sc", "pet") if encoding in wanted),
            mip=output.mip,
            seg=output.seg,
            uncertainty=output.uncertainty,
            sr=output.sr,
            presentation_states=output.presentation_states,
            series_number=output.series_number,
            uncertainty_series_number=output.uncertainty_series_number,
            seg_series_number=output.seg_series_number,
            mip_series_number=output.mip_series_number,
            sr_series_number=output.sr_series_number,
            gsps_series_number=output.gsps_series_number,
            pcps_series_number=output.pcps_series_number,
            series_description=output.series_description,
            institution_name=output.institution_name,
            emit_patient_position=output.emit_patient_position,
            emit_sc_markers=output.emit_sc_markers,
            omit_patient_size=output.omit_patient_size,
        ),
    )


REFERRING_KINDS = frozenset(
    {"seg", "sr", "gsps", "pcps"}
)  # to the planes of one PET series, which another encoding lacks


def new_deliveries(series: Sequence[SeriesSummary], destinations: Sequence[DestinationConfig]) -> list[NewDelivery]:
    """The PET series of each destination's encoding first, then the companions that it wants."""
    return [
        NewDelivery(
            destination=destination.name,
            kind=one.kind,
            encoding=one.encoding,
            series_uid=one.series_uid,
            instances=one.instances,
        )
        for destination in destinations
        for kind in _kinds(destination)
        for one in _of_kind(series, kind, destination.encoding)
    ]


def _of_kind(series: Sequence[SeriesSummary], kind: str, encoding: str) -> list[SeriesSummary]:
    """The series of a kind in an encoding; a companion of no PET series in particular will do in another one too."""
    found = [one for one in series if one.kind == kind]
    exact = [one for one in found if one.encoding == encoding]
    return exact or (found[:1] if kind in OPTIONAL_KINDS - REFERRING_KINDS else [])


def _kinds(destination: DestinationConfig) -> tuple[str, ...]:
    wanted = {
        "mip": destination.send_mip,
        "seg": destination.send_seg,
        "uncertainty": destination.send_uncertainty,
        "sr": destination.send_sr,
        "gsps": destination.send_presentation_states,
        "pcps": destination.send_presentation_states,
    }
    return "pet", *(kind for kind, sent in wanted.items() if sent)


class Worker:
    """One thread that runs jobs. `on_result` is called when deliveries were opened, `on_stage` when a stage ends."""

    def __init__(
        self,
        config: Config,
        ledger: Ledger,
        spool: Spool,
        engine: Engine,
        *,
        owner: str,
        on_result: Callable[[], None] = lambda: None,
        on_stage: Callable[[str, float], None] = lambda _stage, _seconds: None,
        clock: Callable[[], datetime] = utc_now,
        poll_s: float = POLL_S,
    ) -> None:
        self._config, self._ledger, self._spool, self._engine = config, ledger, spool, engine
        self._owner, self._on_result, self._clock, self._poll_s = owner, on_result, clock, poll_s
        self._options = pipeline_options(config)
        self._on_stage = on_stage
        self._stop_at: float | None = None  # monotonic; set: claim nothing more, and stop the job then
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._loop, name="worker", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Something was queued: look now."""
        self._wake.set()

    @property
    def alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def stop(self, *, grace_s: float) -> None:
        """Claim nothing more; let the running job end within `grace_s`, or give it back to the queue; join."""
        self._stop_at = monotonic() + grace_s
        self._wake.set()
        if self._thread is not None:
            self._thread.join()

    def reclaim(self) -> None:
        """At start: what an earlier life of this owner was running goes back to the queue, and counts as an attempt."""
        for job in self._ledger.find(JobFilter(states=(JobState.RUNNING,), limit=MANY)):
            if job.lease_owner == self._owner:
                ended = self._ledger.fail_run(
                    job.id,
                    self._owner,
                    code="restarted",
                    text=f"the node ended in stage {job.stage or 'start'}, attempt {job.attempts}",
                    permanent=False,
                    retry_at=self._clock(),
                    max_attempts=self._config.engine.max_attempts,
                )
                log.warning(
                    "job.reclaimed",
                    job_id=job.id,
                    attempt=job.attempts,
                    stage=job.stage,
                    state=ended.state.value,
                    reason="its worker is gone: the node was killed, or ended before the job could be given back",
                )

    def work_one(self) -> bool:
        """Claim and run one job; False when none waits."""
        job = self._ledger.claim(self._owner, lease_s=self._config.engine.lease_s)
        if job is None:
            return False
        with structlog.contextvars.bound_contextvars(job_id=job.id):
            self._work(job)
        return True

    def _loop(self) -> None:
        while self._stop_at is None:
            try:
                if self.work_one():
                    continue
            except Exception:  # the ledger's disk may come back; a job that was claimed has a lease that ends
                log.exception("worker.loop_failed")
            self._wake.wait(self._poll_s)
            self._wake.clear()

    # ---- one job

    def _work(self, job: Job) -> None:
        log.info("job.started", series_uid=job.info.series_uid, attempt=job.attempts)
        began = monotonic()
        try:
            if not self._spool.has_result(job.id):
                self._run(job, self._first_created(job))
            if (written := self._written_elsewhere(job.id)) is not None:
                self._spool.discard_result(job.id)
                self._run(job, written)
            done = self._complete(job)
        except StaleState:
            self._discard(job)
        except EngineStopped as error:
            self._given_back(job, error)
        except Exception as error:  # the edge
            if not isinstance(error, PipelineError | EngineError | OtherSeries | NoSpace):
                log.exception("job.error")
            if isinstance(error, OtherSeries):  # the outbox must not pass for what was sent
                self._spool.discard_result(job.id)
            self._failed(job, judge(error))
        else:
            log.info("job.completed", state=done.state.value, seconds=round(monotonic() - began, 3))
            self._on_result()
            if self._options.shadow is not None and self._trial(job) is None:
                self._shadow(job)

    def _run(self, job: Job, created: datetime) -> None:
        paths = self._spool.ct_files(job.id)
        if not paths:
            raise NotFound(f"job {job.id}: no CT files")
        needed = RESULT_TO_INPUT * sum(path.stat().st_size for path in paths)
        if self._spool.free_bytes() < needed:  # minutes of computing would end with the same
            raise NoSpace(f"the disk of the spool has no room for a result of {needed / 1e6:.0f} MB")
        folder = self._spool.result_folder(job.id)
        shutil.rmtree(folder.with_name(folder.name + ".tmp"), ignore_errors=True)  # left by a killed run
        watch = _Watch(
            self._ledger, job.id, self._owner, self._config.engine.lease_s, lambda: self._stop_at, self._on_stage
        )
        options = self._options_for(job)
        made_of = {**_made_of(options), WRITTEN: created.isoformat()}
        self._spool.keep_job(job.id, facts_of(job, **made_of))
        self._ledger.update(job.id, details=made_of)
        self._engine.run(
            job.id,
            paths,
            options,
            folder,
            created,
            on_progress=watch.on_progress,
            should_stop=watch.should_stop,
        )
        watch.end()

    def _options_for(self, job: Job) -> PipelineOptions:
        """With the SEG objects that came with the job's study, where the configuration uses them.

        A viewer in which somebody corrected the districts on our PET names that series, and not the CT.
        """
        output = replace(self._options.output, test=self._trial(job) is not None)
        options = replace(self._options, output=output)
        if not self._config.pipeline.uses_segmentations:
            return options
        found = tuple(self._spool.segmentations(job.info.study_uid))
        jobs = self._ledger.jobs_of_series(job.info.series_uid)
        made = tuple(sorted(set().union(*(result_uids(one) for one in jobs))))
        districts = replace(options.districts, segmentations=found, result_series=made)
        return replace(options, districts=districts)

    def _trial(self, job: Job) -> Trial | None:
        return trial_of(self._ledger, job, self._config.node.ae_title)

    def _first_created(self, job: Job) -> datetime:
        """When these instances first became a job: a repeated run writes the same bytes under the same UIDs.

        A result that is made of something else, or in the place of one that was taken back, has a time of its own.
        """
        if (written := written_at(job)) is not None:
            return written
        if RERUN in job.details:
            return job.created
        same = [one for one in self._ledger.jobs_of_series(job.info.series_uid) if _same_source(one, job)]
        same = [one for one in same if RECALLED not in one.details]
        latest = next((written for one in same if (written := written_at(one)) is not None), None)
        return latest or min((one.created for one in same), default=job.created)

    def _written_elsewhere(self, job_id: str) -> datetime | None:
        """The time in another job's result, where that is the same series with another time in its instances.

        What a result is made of decides its UIDs, and is known when it is there: then it is written again with that
        time, as one UID never has two contents. What must not be sent from here anyway is left out.
        """
        job = self._ledger.get(job_id)
        uids = {one.series_uid for one in read_summary(self._spool.result_folder(job_id)).series}
        uids -= series_out(self._ledger, job).keys()
        first = next(
            (
                one
                for one in reversed(self._ledger.jobs_of_series(job.info.series_uid))
                if one.id != job_id and result_uids(one) & uids
            ),
            None,
        )
        written = self._first_created(first) if first is not None else None
        return written if written != self._first_created(job) else None

    def _complete(self, job: Job) -> Job:
        summary = read_summary(self._spool.result_folder(job.id))
        held = (summary.held.code, summary.held.text) if summary.held else None
        fresh, details = self._not_out_yet(job, summary)
        return self._ledger.complete_run(
            job.id,
            self._owner,
            deliveries=new_deliveries(fresh, only_for(self._trial(job), self._config.destinations)),
            held=held,
            details={**result_details(summary), **details},
        )

    def _not_out_yet(self, job: Job, summary: ResultSummary) -> tuple[list[SeriesSummary], Mapping[str, Any]]:
        """The series that may be sent: one that another job sent, or that was recalled, keeps the bytes of then."""
        out = series_out(self._ledger, job)
        known = [one for one in summary.series if one.series_uid in out]
        for one in known:
            text = f"its {one.kind} ({one.encoding}) is the series of job {out[one.series_uid]}: not sent from here"
            self._ledger.note(job.id, "same_series", text, details={"series_uid": one.series_uid})
        fresh = [one for one in summary.series if one.series_uid not in out]
        return fresh, {SAME_AS: out[known[0].series_uid]} if known else {}

    def _shadow(self, job: Job) -> None:
        """Compare with the second bundle while the result is on its way; whatever happens, the job is as it was."""
        name = self._config.pipeline.shadow
        try:
            summary = self._engine.shadow(
                job.id, self._options, self._spool.result_folder(job.id), should_stop=self._is_stopping
            )
            body = next((one for one in summary.regions if one.region == "body"), None)
            text = f"shadow {summary.bundle_name} {summary.bundle_version}"
            if body is not None:
                text += f": body MAE {body.mae_suv:.3f}, bias {body.bias_suv:+.3f} g/ml"
            details = {"shadow": summary.model_dump(mode="json")}
            self._ledger.update(job.id, details=details)
            self._ledger.note(job.id, "shadow_compared", text, seconds=summary.seconds)
        except Exception as error:  # an edge: nobody waits for a shadow, and it must not end the worker
            if not isinstance(error, PipelineError | EngineError | LedgerError):
                log.exception("job.shadow_error")
            verdict = judge(error)
            log.warning("job.shadow_failed", code=verdict.code, reason=verdict.text)
            with _not_worth_a_job():
                text = f"shadow {Path(name).name}: {verdict.code}: {verdict.text}"
                self._ledger.note(job.id, "shadow_failed", text, details={"code": verdict.code})
        else:
            log.info("job.shadow", bundle=summary.bundle_name, seconds=summary.seconds)

    def _is_stopping(self) -> bool:
        """A node that ends waits for its job, but not for a shadow."""
        return self._stop_at is not None

    # ---- ends without a result

    def _failed(self, job: Job, verdict: Verdict) -> None:
        pause = retry_delay_s(max(job.attempts, 1), first_s=self._config.engine.retry_s, longest_s=LONGEST_RETRY_S)
        if verdict.waits:
            pause = WAIT_FOR_ROOM_S
        try:
            ended = self._ledger.fail_run(
                job.id,
                self._owner,
                code=verdict.code,
                text=verdict.text,
                permanent=verdict.permanent,
                rejected=verdict.rejected,
                counted=not verdict.waits,
                retry_at=self._clock() + timedelta(seconds=pause),
                max_attempts=self._config.engine.max_attempts,
            )
        except StaleState:
            self._discard(job)
            return
        again = {"retry_in_s": pause} if ended.state is JobState.QUEUED else {}
        log.warning("job.ended", state=ended.state.value, code=verdict.code, reason=verdict.text, **again)

    def _given_back(self, job: Job, error: EngineStopped) -> None:
        """The node is stopping: back to the queue, whatever the number of attempts. Or the lease is gone."""
        if self._stop_at is None:
            self._discard(job)
            return
        try:
            self._ledger.fail_run(
                job.id,
                self._owner,
                code="interrupted",
                text="the node was stopped: the job goes on when it is back",
                permanent=False,
                retry_at=self._clock(),
                max_attempts=job.attempts + 1,
            )
        except StaleState:
            self._discard(job)
            return
        log.info("job.given_back", reason=error.text)

    def _discard(self, job: Job) -> None:
        """Cancelled, or in other hands: the ledger keeps what is true there; a cancelled job's result goes."""
        state = self._ledger.get(job.id).state
        if state is JobState.CANCELLED:
            self._spool.discard_result(job.id)
        log.info("job.discarded", state=state.value)


class _Watch:
    """Follows one run: keeps the lease, writes a stage event when a stage ends, and says when to stop."""

    def __init__(
        self,
        ledger: Ledger,
        job_id: str,
        owner: str,
        lease_s: float,
        stop_at: Callable[[], float | None],
        on_stage: Callable[[str, float], None] = lambda _stage, _seconds: None,
    ) -> None:
        self._on_stage = on_stage
        self._ledger, self._job_id, self._owner, self._lease_s, self._stop_at = ledger, job_id, owner, lease_s, stop_at
        self._renewed = self._told = monotonic()
        self._stage: Stage | None = None
        self._stage_began = monotonic()

    def should_stop(self) -> bool:
        """True when the node's grace is over, or the lease is lost. A database that is busy is asked again."""
        now = monotonic()
        stop_at = self._stop_at()
        if stop_at is not None and now >= stop_at:
            return True
        if now - self._renewed < min(RENEW_EVERY_S, self._lease_s / 3):
            return False
        try:
            kept = self._ledger.renew(self._job_id, self._owner, lease_s=self._lease_s)
        except LedgerError:
            return now - self._renewed > self._lease_s
        self._renewed = now
        return not kept

    def on_progress(self, progress: Progress) -> None:
        """A new stage ends the one before."""
        now = monotonic()
        if progress.stage is not self._stage:
            self.end()
            self._stage, self._stage_began = progress.stage, now
            self._tell(progress, now)
        elif now - self._told >= PROGRESS_EVERY_S:
            self._tell(progress, now)

    def end(self) -> None:
        """Write the event of the stage that is over."""
        if self._stage is None:
            return
        seconds = monotonic() - self._stage_began
        stage = self._stage.value
        log.info("job.stage", stage=stage, seconds=round(seconds, 3))
        self._on_stage(stage, seconds)
        self._stage = None
        with _not_worth_a_job():
            self._ledger.note(self._job_id, "stage_done", f"{stage} took {seconds:.1f} s", stage=stage, seconds=seconds)

    def _tell(self, progress: Progress, now: float) -> None:
        self._told = now
        shown = {"stage": progress.stage.value, "done": progress.done, "total": progress.total}
        with _not_worth_a_job():
            self._ledger.update(self._job_id, stage=progress.stage.value, details={"progress": shown})


@contextmanager
def _not_worth_a_job() -> Iterator[None]:
    """A ledger that is busy or full loses a line of progress, not the minutes of work behind it."""
    try:
        yield
    except LedgerError as error:
        log.warning("job.progress_lost", reason=str(error))


def _made_of(options: PipelineOptions) -> Mapping[str, Any]:
    """What a later `jobs retry --rerun` compares with."""
    uids = [path.name.removesuffix(".dcm") for path in options.districts.segmentations]
    return {"asked_for": asked_for(options), "segmentations": uids}


def _same_source(one: Job, other: Job) -> bool:
    return bool(one.source_digest) and one.source_digest == other.source_digest


def result_details(summary: ResultSummary) -> Mapping[str, Any]:
    """What the ledger keeps of a result: stage times, SUV per district, lineage, notes."""
    plain = summary.model_dump(mode="json")
    kept = {key: plain[key] for key in ("stage_seconds", "stats", "provenance", "notes")}
    return {**kept, "result_series": plain["series"]}
