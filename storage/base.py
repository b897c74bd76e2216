"""What the ledger's parts share: sessions, the clock, rows by id, and the one way to write an event.

Locks of rows, where the database has them (PostgreSQL; SQLite has one writer), are taken in one order, so that two
transactions never wait for each other: the job, then its deliveries, then their commitment transactions. Who changes
a delivery holds its job, with two exceptions: `renew_delivery` takes one row and waits for no other, and what looks
for work (`claim…`, `sweep`) waits for nobody: it skips what is locked (SKIP LOCKED) and finds it next time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Engine, select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from storage.database import WRITE, explain, plain
from storage.errors import NotFound
from storage.moves import check_move
from storage.records import JobState
from storage.schema import EventRow, JobRow

MAX_TEXT = 2000  # characters of a reason; the whole story is in the log

_DONE = "done"  # in the session's info: the jobs that its transaction made DONE

# a state that says why by itself needs no reason beside it
_SELF_EVIDENT = frozenset({JobState.RUNNING, JobState.DELIVERING, JobState.DONE})


def utc_now() -> datetime:
    """The default clock."""
    return datetime.now(UTC)


def clean(text: str) -> str:
    """One printable line, whatever a peer put into a tag: no control characters, no lone surrogates."""
    whole = text.encode("utf-8", "replace").decode("utf-8")
    return "".join(c if c.isprintable() else " " for c in whole)[:MAX_TEXT]


class LedgerBase:
    """Sessions and events; one per process, used by any number of threads."""

    def __init__(self, engine: Engine, clock: Callable[[], datetime] = utc_now) -> None:
        self._engine = engine
        self._writer = engine.execution_options(**WRITE)
        self._clock = clock
        self.on_done: Callable[[str], None] = lambda _job_id: None  # called with each job that has become DONE

    def close(self) -> None:
        """Close every connection; the ledger must not be used afterwards."""
        self._engine.dispose()

    @contextmanager
    def _read(self) -> Iterator[Session]:
        with self._session(self._engine) as session:
            yield session

    @contextmanager
    def _write(self) -> Iterator[Session]:
        """One short transaction that holds the write lock from its first statement; an exception undoes it."""
        with self._session(self._writer) as session, session.begin():
            yield session
        for job_id in session.info.get(_DONE, ()):
            self.on_done(job_id)

    @contextmanager
    def _session(self, engine: Engine) -> Iterator[Session]:
        try:
            with Session(engine, expire_on_commit=False) as session:
                yield session
        except DBAPIError as error:
            raise explain(self._engine, error) from error

    def _job(self, session: Session, job_id: str, *, lock: bool = True) -> JobRow:
        query = select(JobRow).where(JobRow.id == job_id)
        row = session.scalar(query.with_for_update() if lock else query)
        if row is None:
            raise NotFound(f"no job {clean(job_id)!r} in the ledger")
        return row

    def _move(
        self,
        session: Session,
        row: JobRow,
        to: JobState,
        *,
        code: str,
        text: str,
        not_before: datetime | None = None,
        seconds: float | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        """The only place where a job's state changes. The lease ends with every move; `claim` sets a new one."""
        was = JobState(row.state)
        check_move(row.id, was, to)
        now = self._clock()
        row.state = to.value
        row.updated = now
        if to is JobState.DONE:
            session.info.setdefault(_DONE, []).append(row.id)
        row.lease_owner, row.lease_until = "", None
        row.not_before = not_before if to is JobState.QUEUED else None
        row.reason_code, row.reason = ("", "") if to in _SELF_EVIDENT else (clean(code), clean(text))
        self._event(
            session,
            row.id,
            code,
            text,
            stage=row.stage,
            seconds=seconds,
            details={**(details or {}), "from": was.value, "to": to.value},
        )

    def _event(
        self,
        session: Session,
        job_id: str,
        code: str,
        text: str,
        *,
        stage: str = "",
        seconds: float | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        kept = plain(details or {})
        session.add(
            EventRow(
                time=self._clock(),
                job_id=job_id,
                study_uid=clean(str(kept.get("study_uid") or "")),
                accession=clean(str(kept.get("accession") or "")),
                stage=clean(stage),
                code=clean(code),
                text=clean(text),
                seconds=seconds,
                details=kept,
            )
        )
