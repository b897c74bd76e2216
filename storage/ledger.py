"""The ledger: what happened to every series, told by one table of moves. Each move and its event are one transaction.

Threads and processes share it: a job or a delivery is claimed with a lease by whoever finds it first, and only the
holder of the lease may end it. A method raises `NotFound` for an unknown job, `IllegalMove` where the table forbids
the move, `StaleState` where somebody else was quicker, and `LedgerError` where the database fails.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any
from uuid import uuid4

from sqlalchemy import Select, delete, or_, select, update
from sqlalchemy.orm import Session

from storage.base import clean, utc_now
from storage.clock import ClockLedger
from storage.database import open_engine, plain
from storage.errors import IllegalMove, StaleState
from storage.figures import FigureLedger
from storage.moves import MOVES
from storage.proofs import ProofLedger
from storage.records import FINAL_JOB_STATES, DeliveryState, Event, Job, JobFilter, JobState, NewDelivery, SeriesInfo
from storage.rejections import RejectionLedger
from storage.schema import CommitmentRow, DeliveryRow, EventRow, JobRow, event_of, job_of

__all__ = ["MOVES", "Ledger", "open_ledger", "utc_now"]

_TEST_WRITE = "check"  # what earlier versions of `dicom-node check` wrote: it happened to nobody's study
_AT_ONCE = 500  # SQLite takes some 32 000 values in one statement
_SENT_STATES = (DeliveryState.SENT, DeliveryState.COMMITTED, DeliveryState.VISIBLE)
_UNSENT_STATES = (DeliveryState.FAILED, DeliveryState.CANCELLED)


def open_ledger(url: str, *, clock: Callable[[], datetime] = utc_now) -> Ledger:
    """Open the ledger, made or migrated where needed. Raises `LedgerError` that names the file and the remedy."""
    return Ledger(open_engine(url), clock)


class Ledger(ProofLedger, RejectionLedger, FigureLedger, ClockLedger):
    """Jobs and events; deliveries are in `storage.deliveries`, their proof in `proofs`, notes in `rejections`,
    counts in `figures`.
    """

    # ---- reading

    def get(self, job_id: str) -> Job:
        """One job."""
        with self._read() as session:
            return job_of(self._job(session, job_id, lock=False))

    def find(self, wanted: JobFilter) -> list[Job]:
        """The jobs that fit, newest first, at most `wanted.limit`."""
        return self._jobs(_filtered(wanted).order_by(JobRow.seq.desc()).limit(wanted.limit))

    def find_by_prefix(self, start: str, *, limit: int = 20) -> list[Job]:
        """The jobs whose id begins with `start` (an operator types eight characters of it), newest first."""
        query = select(JobRow).where(JobRow.id.startswith(start, autoescape=True))
        return self._jobs(query.order_by(JobRow.seq.desc()).limit(limit))

    def receiving(self) -> list[Job]:
        """The jobs in RECEIVING, oldest first."""
        return self._jobs(select(JobRow).where(JobRow.state == JobState.RECEIVING.value).order_by(JobRow.seq))

    def jobs_of_series(self, series_uid: str) -> list[Job]:
        """All jobs of a series, newest first."""
        return self._jobs(select(JobRow).where(JobRow.series_uid == clean(series_uid)).order_by(JobRow.seq.desc()))

    def jobs_of_study(self, study_uid: str) -> list[Job]:
        """All jobs of a study, newest first."""
        return self._jobs(select(JobRow).where(JobRow.study_uid == clean(study_uid)).order_by(JobRow.seq.desc()))

    def events(self, job_id: str) -> list[Event]:
        """A job's history, oldest first."""
        return self._events(select(EventRow).where(EventRow.job_id == job_id).order_by(EventRow.id))

    def events_of_study(self, study_uid: str) -> list[Event]:
        """Every event whose details name this study (also those of no job), oldest first."""
        return self._events(select(EventRow).where(EventRow.study_uid == clean(study_uid)).order_by(EventRow.id))

    def events_of_accession(self, accession: str) -> list[Event]:
        """Every event whose details name this accession number (also those of no job), oldest first."""
        return self._events(select(EventRow).where(EventRow.accession == clean(accession)).order_by(EventRow.id))

    def events_of_no_study(
        self, *, since: datetime | None = None, until: datetime | None = None, limit: int = 100
    ) -> list[Event]:
        """The latest events that name no job, study or accession number, oldest first; within a time, when given."""
        query = select(EventRow).where(EventRow.job_id == "", EventRow.study_uid == "", EventRow.accession == "")
        query = query.where(EventRow.code != _TEST_WRITE)
        if since is not None:
            query = query.where(EventRow.time >= since)
        if until is not None:
            query = query.where(EventRow.time <= until)
        return self._events(query.order_by(EventRow.id.desc()).limit(limit))[::-1]

    def search_events(self, *, code: str = "", since: datetime | None = None, limit: int = 1000) -> list[Event]:
        """The latest events, newest first; of one code, or since a time, when given."""
        query = select(EventRow).order_by(EventRow.id.desc()).limit(limit)
        if code:
            query = query.where(EventRow.code == code)
        if since is not None:
            query = query.where(EventRow.time >= since)
        return self._events(query)

    # ---- opening and changing

    def open_job(self, info: SeriesInfo, *, supersedes: str = "") -> Job:
        """A new job in RECEIVING; `supersedes` names the job of the same series that it takes the place of."""
        with self._write() as session:
            return job_of(self._opened(session, uuid4().hex, info, supersedes))

    def unknown(self, job_ids: Collection[str]) -> set[str]:
        """Which of these ids no job of the ledger has."""
        wanted, known = sorted(job_ids), set[str]()
        with self._read() as session:
            for start in range(0, len(wanted), _AT_ONCE):
                known |= set(session.scalars(select(JobRow.id).where(JobRow.id.in_(wanted[start : start + _AT_ONCE]))))
        return set(wanted) - known

    def adopt_job(
        self,
        job_id: str,
        info: SeriesInfo,
        to: JobState,
        *,
        code: str,
        text: str,
        created: datetime | None = None,
        supersedes: str = "",
        source_digest: str = "",
        instances: int = 0,
        details: Mapping[str, Any] | None = None,
    ) -> Job:
        """A job that the spool knows and the ledger does not, under the id that its folders have.

        `to`: RECEIVING (it is decided upon anew), QUEUED (it was chosen), HELD, or CANCELLED.
        """
        with self._write() as session:
            row = self._opened(session, job_id, info, supersedes)
            row.created = created or row.created
            row.source_digest, row.instances = clean(source_digest), instances
            _merge(row, details)
            if to is JobState.RECEIVING:
                self._event(session, job_id, code, text)
            else:
                self._move(session, row, to, code=code, text=text)
            return job_of(row)

    def open_successor(
        self,
        job_id: str,
        earlier_id: str,
        *,
        known: Collection[str],
        instances: int,
        details: Mapping[str, Any],
        code: str,
        text: str,
    ) -> Job:
        """A QUEUED job that computes the series of job `earlier_id` again; one transaction, so that no kill halves it.

        `job_id` is the caller's (a UUID in hex): the input lies in the spool already. `known` are the ids of the jobs
        of this series that the caller decided upon; raises `StaleState` when there is another one now.
        """
        with self._write() as session:
            earlier = self._job(session, earlier_id)
            jobs = session.scalars(select(JobRow.id).where(JobRow.series_uid == earlier.series_uid))
            unknown = sorted(set(jobs) - set(known))
            if unknown:
                raise StaleState(f"job {earlier_id}: job {unknown[0]} of its series was opened meanwhile")
            row = self._opened(session, job_id, job_of(earlier).info, earlier_id)
            row.instances, row.source_digest = instances, earlier.source_digest
            _merge(row, details)
            told = f"computed again as job {job_id}: {text}"
            self._event(session, earlier_id, "superseded", told, details={"successor": job_id})
            self._move(session, row, JobState.QUEUED, code=code, text=f"job {earlier_id} computed again: {text}")
            return job_of(row)

    def update(
        self,
        job_id: str,
        *,
        instances: int | None = None,
        stage: str | None = None,
        source_digest: str | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> Job:
        """Write what is given beside the state; `details` are merged, key by key."""
        with self._write() as session:
            row = self._job(session, job_id)
            if instances is not None:
                row.instances = instances
            if stage is not None:
                row.stage = clean(stage)
            if source_digest is not None:
                row.source_digest = clean(source_digest)
            _merge(row, details)
            row.updated = self._clock()
            return job_of(row)

    def move(
        self,
        job_id: str,
        to: JobState,
        *,
        code: str,
        text: str,
        expected: Collection[JobState] | None = None,
        not_before: datetime | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> Job:
        """Change the state; `code` and `text` say why, in the event and, for a state that needs it, in the job.

        `expected`: raise `StaleState` unless the job is in one of these states now. `details` are merged into the
        job's and kept with the event. `not_before` counts for QUEUED only.
        """
        with self._write() as session:
            row = self._job(session, job_id)
            if expected is not None and row.state not in {state.value for state in expected}:
                wanted = " or ".join(sorted(expected))
                raise StaleState(f"job {job_id}: is {row.state}, expected {wanted}; not moved to {to}")
            self._move(session, row, to, code=code, text=text, not_before=not_before, details=details)
            _merge(row, details)
            if to is JobState.CANCELLED:
                self._cancel_deliveries(session, job_id)
            return job_of(row)

    def note(
        self,
        job_id: str,
        code: str,
        text: str,
        *,
        stage: str = "",
        seconds: float | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        """An event that moves nothing; `job_id` "" for what belongs to no job.

        `details["study_uid"]` and `details["accession"]` make it findable by study and accession number.
        """
        with self._write() as session:
            self._event(session, job_id, code, text, stage=stage, seconds=seconds, details=details)

    # ---- running

    def claim(self, owner: str, *, lease_s: float) -> Job | None:
        """Take the oldest job that may run: QUEUED becomes RUNNING, leased for `lease_s` seconds, attempts + 1."""
        with self._write() as session:
            now = self._clock()
            row = session.scalar(
                select(JobRow)
                .where(
                    JobRow.state == JobState.QUEUED.value,
                    or_(JobRow.not_before.is_(None), JobRow.not_before <= now),
                )
                .order_by(JobRow.seq)
                .limit(1)
                .with_for_update(skip_locked=True)
            )
            if row is None:
                return None
            row.attempts += 1
            row.stage = ""
            text = f"attempt {row.attempts}"
            self._move(session, row, JobState.RUNNING, code="started", text=text, details={"owner": owner})
            row.lease_owner, row.lease_until = owner, now + timedelta(seconds=lease_s)
            return job_of(row)

    def renew(self, job_id: str, owner: str, *, lease_s: float) -> bool:
        """Prolong the lease; False when it is lost or the job was cancelled: stop the work."""
        with self._write() as session:
            found = session.execute(
                update(JobRow)
                .where(JobRow.id == job_id, JobRow.state == JobState.RUNNING.value, JobRow.lease_owner == owner)
                .values(lease_until=self._clock() + timedelta(seconds=lease_s))
                .execution_options(synchronize_session=False)
            )
            return found.rowcount == 1  # type: ignore[attr-defined]

    def complete_run(
        self,
        job_id: str,
        owner: str,
        *,
        deliveries: Sequence[NewDelivery],
        held: tuple[str, str] | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> Job:
        """The result is whole in the outbox: open its deliveries and go on.

        RUNNING becomes DELIVERING, or DONE where nothing is to be delivered, or HELD with `held` = (code, text):
        then the deliveries wait. Calling it again, by whomever, changes nothing: a job and a destination have one
        delivery per kind and encoding, and one that was sent stays sent. Raises `OtherSeries` if its series UID is
        another now: the ledger would forget what it sent.
        """
        with self._write() as session:
            row = self._job(session, job_id)
            if row.has_result and row.state in _COMPLETED and _same_deliveries(session, job_id, deliveries):
                return job_of(row)
            self._check_owner(row, owner)
            self._open_deliveries(session, row, deliveries)
            row.has_result = True
            _merge(row, details)
            if held is not None:
                self._move(session, row, JobState.HELD, code=held[0], text=held[1])
            elif deliveries:
                text = f"result complete, {len(deliveries)} deliveries"
                self._move(session, row, JobState.DELIVERING, code="completed", text=text)
                self._settle(session, row)
            else:
                self._move(session, row, JobState.DONE, code="completed", text="result complete, no destination")
            return job_of(row)

    def fail_run(
        self,
        job_id: str,
        owner: str,
        *,
        code: str,
        text: str,
        permanent: bool,
        rejected: bool = False,
        counted: bool = True,
        retry_at: datetime | None = None,
        max_attempts: int,
    ) -> Job:
        """A run had no result: REJECTED, FAILED (permanent, or the last attempt), else QUEUED until `retry_at`.

        An attempt that is not `counted` (it only found no room) is none of the `max_attempts`.
        """
        with self._write() as session:
            row = self._job(session, job_id)
            self._check_owner(row, owner)
            row.attempts -= 0 if counted else 1
            if rejected:
                self._move(session, row, JobState.REJECTED, code=code, text=text)
            elif permanent or (counted and row.attempts >= max_attempts):
                self._move(session, row, JobState.FAILED, code=code, text=text)
            else:
                self._move(session, row, JobState.QUEUED, code=code, text=text, not_before=retry_at)
            return job_of(row)

    # ---- the operator's moves

    def release(self, job_id: str) -> Job:
        """Let a HELD job go on: to DELIVERING when its result is complete, else to QUEUED."""
        with self._write() as session:
            row = self._job(session, job_id)
            if row.state != JobState.HELD.value:
                raise IllegalMove(f"job {job_id}: is {row.state}, only a HELD job can be released")
            to = JobState.DELIVERING if row.has_result else JobState.QUEUED
            self._move(session, row, to, code="released", text="released by an operator")
            self._settle(session, row)
            return job_of(row)

    def retry(self, job_id: str, *, rerun: bool = False) -> Job:
        """Try a FAILED, REJECTED or CANCELLED job again, with all its attempts back.

        With a complete result only what was not sent is sent; `rerun` computes it again (for a result that
        retention has removed).
        """
        with self._write() as session:
            row = self._job(session, job_id)
            if row.state not in {s.value for s in (JobState.FAILED, JobState.REJECTED, JobState.CANCELLED)}:
                raise IllegalMove(f"job {job_id}: is {row.state}, only a FAILED, REJECTED or CANCELLED job is retried")
            deliver = row.has_result and not rerun and row.state != JobState.REJECTED.value
            row.attempts = 0
            if deliver:
                again = self._restart_deliveries(session, job_id, _UNSENT_STATES)
                if not again and self._retired(session, job_id):
                    raise IllegalMove(
                        f"job {job_id}: was recalled or replaced, and no rejection note of it waits to be sent again"
                    )
                text = f"retried by an operator: {again} deliveries"
                self._move(session, row, JobState.DELIVERING, code="retried", text=text)
                self._settle(session, row)
            else:
                row.has_result = False
                self._move(session, row, JobState.QUEUED, code="retried", text="retried by an operator")
            return job_of(row)

    def redeliver(self, job_id: str, *, destination: str = "") -> Job:
        """Send a DONE job's result again, the same bytes: to one destination or to all."""
        with self._write() as session:
            row = self._job(session, job_id)
            if row.state != JobState.DONE.value:
                raise IllegalMove(f"job {job_id}: is {row.state}, only a DONE job is delivered again")
            states = (*_SENT_STATES, *_UNSENT_STATES)
            again = self._restart_deliveries(session, job_id, states, destination=destination)
            if not again:
                retired = self._retired(session, job_id)
                if retired & {"", destination} or (retired and not destination):
                    raise IllegalMove(
                        f"job {job_id}: was recalled or replaced there, and has no rejection note to send again"
                    )
                raise IllegalMove(f"job {job_id}: has no delivery to {clean(destination) or 'any destination'}")
            text = f"{again} deliveries asked for again by an operator"
            self._move(session, row, JobState.DELIVERING, code="redelivered", text=text)
            return job_of(row)

    def cancel(self, job_id: str) -> Job:
        """Stop a job and what it has not delivered yet; whoever runs or sends it learns it when renewing the lease."""
        return self.move(job_id, JobState.CANCELLED, code="cancelled", text="cancelled by an operator")

    # ---- upkeep

    def sweep(self, *, max_attempts: int, retry_s: float) -> list[str]:
        """Take back what a dead worker or sender held. Returns the ids of the jobs concerned.

        A job with an expired lease becomes QUEUED after `retry_s` seconds, or FAILED when it had `max_attempts`.
        """
        with self._write() as session:
            now = self._clock()
            rows = session.scalars(
                select(JobRow)
                .where(
                    JobRow.state == JobState.RUNNING.value,
                    or_(JobRow.lease_until.is_(None), JobRow.lease_until < now),
                )
                .with_for_update(skip_locked=True)
            ).all()
            for row in rows:
                self._take_back(session, row, last=row.attempts >= max_attempts, again=now + timedelta(seconds=retry_s))
            ids = [row.id for row in rows] + self._sweep_deliveries(session)
            return list(dict.fromkeys(ids))

    def forget_before(self, when: datetime) -> int:
        """Delete the events older than `when`, except those of jobs that are not at their end. Returns how many.

        Storage Commitment transactions of such jobs and of that age go with them: no archive reports so late.
        """
        living = select(JobRow.id).where(JobRow.state.not_in([state.value for state in FINAL_JOB_STATES]))
        open_deliveries = select(DeliveryRow.id).where(DeliveryRow.job_id.in_(living))
        with self._write() as session:
            old = select(CommitmentRow.transaction_uid).where(
                CommitmentRow.asked < when, CommitmentRow.delivery_id.not_in(open_deliveries)
            )
            session.execute(
                delete(CommitmentRow)
                .where(CommitmentRow.transaction_uid.in_(old.with_for_update(skip_locked=True)))
                .execution_options(synchronize_session=False)
            )
            found = session.execute(
                delete(EventRow)
                .where(EventRow.time < when, EventRow.job_id.not_in(living))
                .execution_options(synchronize_session=False)
            )
            return found.rowcount  # type: ignore[attr-defined]

    # ---- inside

    def _opened(self, session: Session, job_id: str, info: SeriesInfo, supersedes: str) -> JobRow:
        """The row of a new job in RECEIVING, with its first event."""
        now = self._clock()
        row = JobRow(
            id=job_id,
            state=JobState.RECEIVING.value,
            study_uid=clean(info.study_uid),
            series_uid=clean(info.series_uid),
            accession=clean(info.accession),
            patient_id=clean(info.patient_id),
            modality=clean(info.modality),
            sop_class_uid=clean(info.sop_class_uid),
            series_number=clean(info.series_number),
            series_description=clean(info.series_description),
            study_date=clean(info.study_date),
            calling_ae=clean(info.calling_ae),
            peer_address=clean(info.peer_address),
            created=now,
            updated=now,
            instances=0,
            attempts=0,
            reason_code="",
            reason="",
            stage="",
            supersedes=supersedes,
            source_digest="",
            lease_owner="",
            has_result=False,
            details={},
        )
        session.add(row)
        session.flush()
        who = f"from {row.calling_ae} at {row.peer_address}"
        late = f", supersedes job {supersedes}" if supersedes else ""
        self._event(session, row.id, "opened", f"series {row.series_uid} {who}{late}", details={"to": row.state})
        return row

    def _take_back(self, session: Session, row: JobRow, *, last: bool, again: datetime) -> None:
        text = f"{row.lease_owner or 'the worker'} stopped in stage {row.stage or 'start'}, attempt {row.attempts}"
        to = JobState.FAILED if last else JobState.QUEUED
        self._move(session, row, to, code="lease_expired", text=text, not_before=again)

    def _check_owner(self, row: JobRow, owner: str) -> None:
        if row.state != JobState.RUNNING.value or row.lease_owner != owner:
            raise StaleState(f"job {row.id}: is {row.state}, not run by {clean(owner)!r}")

    def _jobs(self, query: Select[Any]) -> list[Job]:
        with self._read() as session:
            return [job_of(row) for row in session.scalars(query)]

    def _events(self, query: Select[Any]) -> list[Event]:
        with self._read() as session:
            return [event_of(row) for row in session.scalars(query)]


_COMPLETED = frozenset({JobState.DELIVERING.value, JobState.DONE.value, JobState.HELD.value})


def _same_deliveries(session: Session, job_id: str, wanted: Sequence[NewDelivery]) -> bool:
    rows = session.scalars(select(DeliveryRow).where(DeliveryRow.job_id == job_id))
    there = {(r.destination, r.kind, r.encoding, r.series_uid, r.instances) for r in rows}
    return {(n.destination, n.kind, n.encoding, n.series_uid, n.instances) for n in wanted} <= there


def _merge(row: JobRow, details: Mapping[str, Any] | None) -> None:
    if details:
        row.details = {**row.details, **plain(details)}  # a new dict: SQLAlchemy sees assignments, not changes inside


def _filtered(wanted: JobFilter) -> Select[Any]:
    query = select(JobRow)
    if wanted.states:
        query = query.where(JobRow.state.in_([state.value for state in wanted.states]))
    for column, value in (
        (JobRow.accession, wanted.accession),
        (JobRow.patient_id, wanted.patient_id),
        (JobRow.study_uid, wanted.study_uid),
        (JobRow.series_uid, wanted.series_uid),
    ):
        if value:
            query = query.where(column == clean(value))
    for key, value in (("bundle_name", wanted.bundle), ("bundle_version", wanted.bundle_version)):
        if value:
            query = query.where(JobRow.details[("provenance", key)].as_string() == clean(value))
    if wanted.peer:
        query = query.where(or_(JobRow.calling_ae == clean(wanted.peer), JobRow.peer_address == clean(wanted.peer)))
    if wanted.since is not None:
        query = query.where(JobRow.created >= wanted.since)
    if wanted.until is not None:
        query = query.where(JobRow.created <= wanted.until)
    return query
