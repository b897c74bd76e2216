"""The ledger's tables: jobs, deliveries, commitment transactions, and append-only events. No row per instance.

Rows never leave the package: `job_of`, `delivery_of`, `commitment_of` and `event_of` make the frozen records of
`storage.records`.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import JSON, DateTime, Dialect, ForeignKey, Index, MetaData, Text, TypeDecorator, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from storage.records import (
    ALL,
    Commitment,
    CommitmentState,
    Delivery,
    DeliveryState,
    Event,
    Job,
    JobState,
    SeriesInfo,
)


class UtcTime(TypeDecorator[datetime]):
    """An aware time, stored in UTC; a naive one is a fault of the caller.

    SQLite has no time type: SQLAlchemy stores text with six digits of microseconds, so that text order is time
    order. PostgreSQL stores `timestamp with time zone`.
    """

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"{value.isoformat()} has no time zone: the ledger takes aware times only")
        value = value.astimezone(UTC)
        return value.replace(tzinfo=None) if dialect.name == "sqlite" else value

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Base(DeclarativeBase):
    """Text without lengths: what a peer sends is as long as it is. Constraints have names for later migrations."""

    type_annotation_map = {  # noqa: RUF012 -- SQLAlchemy reads this class attribute
        str: Text,
        datetime: UtcTime,
        dict[str, Any]: JSON,
    }
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


class JobRow(Base):
    """One received CT series. `seq` gives the order of arrival; `id` is what the rest of the world calls the job."""

    __tablename__ = "jobs"
    __table_args__ = (Index(None, "state", "seq"), {"sqlite_autoincrement": True})

    seq: Mapped[int] = mapped_column(primary_key=True)
    id: Mapped[str] = mapped_column(unique=True)
    state: Mapped[str]
    study_uid: Mapped[str] = mapped_column(index=True)
    series_uid: Mapped[str] = mapped_column(index=True)
    accession: Mapped[str] = mapped_column(index=True)
    patient_id: Mapped[str] = mapped_column(index=True)
    modality: Mapped[str]
    sop_class_uid: Mapped[str]
    series_number: Mapped[str]
    series_description: Mapped[str]
    study_date: Mapped[str]
    calling_ae: Mapped[str]
    peer_address: Mapped[str]
    created: Mapped[datetime] = mapped_column(index=True)
    updated: Mapped[datetime]
    instances: Mapped[int]
    attempts: Mapped[int]
    reason_code: Mapped[str]
    reason: Mapped[str]
    stage: Mapped[str]
    supersedes: Mapped[str]
    source_digest: Mapped[str]
    lease_owner: Mapped[str]
    lease_until: Mapped[datetime | None]
    not_before: Mapped[datetime | None]
    has_result: Mapped[bool]  # the run was completed once: its series lie in the outbox
    details: Mapped[dict[str, Any]]


class DeliveryRow(Base):
    """One result series to one destination; at most one row each, whatever is started again."""

    __tablename__ = "deliveries"
    __table_args__ = (
        UniqueConstraint("job_id", "destination", "kind", "encoding"),
        Index(None, "state", "next_attempt"),
        {"sqlite_autoincrement": True},
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    destination: Mapped[str]
    kind: Mapped[str]
    encoding: Mapped[str]
    series_uid: Mapped[str]
    instances: Mapped[int]
    state: Mapped[str]
    sent: Mapped[int]
    attempts: Mapped[int]
    next_attempt: Mapped[datetime | None]
    reason_code: Mapped[str]
    reason: Mapped[str]
    updated: Mapped[datetime]
    lease_owner: Mapped[str]
    lease_until: Mapped[datetime | None]
    statuses: Mapped[dict[str, Any]]  # see `compact`: only what failed, grouped by status
    goal: Mapped[str]
    checks: Mapped[int]
    sent_at: Mapped[datetime | None]
    committed_at: Mapped[datetime | None]
    visible_at: Mapped[datetime | None]
    failing_since: Mapped[datetime | None]
    outages: Mapped[int]


class CommitmentRow(Base):
    """One Storage Commitment transaction of a delivery; a delivery has as many as were asked."""

    __tablename__ = "commitments"

    transaction_uid: Mapped[str] = mapped_column(primary_key=True)
    delivery_id: Mapped[int] = mapped_column(ForeignKey("deliveries.id"), index=True)
    attempt: Mapped[int]
    state: Mapped[str]
    asked: Mapped[datetime]
    reported: Mapped[datetime | None]
    report: Mapped[dict[str, Any]]  # the report's UIDs, only until they were compared with what was sent


class EventRow(Base):
    """One line of history. `job_id` is empty, and so no foreign key, for what belongs to no job."""

    __tablename__ = "events"
    __table_args__ = ({"sqlite_autoincrement": True},)

    id: Mapped[int] = mapped_column(primary_key=True)
    time: Mapped[datetime] = mapped_column(index=True)
    job_id: Mapped[str] = mapped_column(index=True)
    study_uid: Mapped[str] = mapped_column(index=True)  # copies of details["study_uid"] and details["accession"],
    accession: Mapped[str] = mapped_column(index=True)  # so that `why` finds a series that became no job
    stage: Mapped[str]
    code: Mapped[str] = mapped_column(index=True)
    text: Mapped[str]
    seconds: Mapped[float | None]
    details: Mapped[dict[str, Any]]


def job_of(row: JobRow) -> Job:
    """The frozen record of a row."""
    info = SeriesInfo(
        study_uid=row.study_uid,
        series_uid=row.series_uid,
        accession=row.accession,
        patient_id=row.patient_id,
        modality=row.modality,
        sop_class_uid=row.sop_class_uid,
        series_number=row.series_number,
        series_description=row.series_description,
        study_date=row.study_date,
        calling_ae=row.calling_ae,
        peer_address=row.peer_address,
    )
    return Job(
        id=row.id,
        state=JobState(row.state),
        info=info,
        created=row.created,
        updated=row.updated,
        instances=row.instances,
        attempts=row.attempts,
        reason_code=row.reason_code,
        reason=row.reason,
        stage=row.stage,
        supersedes=row.supersedes,
        source_digest=row.source_digest,
        lease_owner=row.lease_owner,
        lease_until=row.lease_until,
        not_before=row.not_before,
        details=dict(row.details),
    )


def delivery_of(row: DeliveryRow) -> Delivery:
    """The frozen record of a row."""
    return Delivery(
        id=row.id,
        job_id=row.job_id,
        destination=row.destination,
        kind=row.kind,
        encoding=row.encoding,
        series_uid=row.series_uid,
        instances=row.instances,
        state=DeliveryState(row.state),
        sent=row.sent,
        attempts=row.attempts,
        next_attempt=row.next_attempt,
        reason_code=row.reason_code,
        reason=row.reason,
        updated=row.updated,
        statuses=spread(row.statuses),
        goal=DeliveryState(row.goal),
        checks=row.checks,
        sent_at=row.sent_at,
        committed_at=row.committed_at,
        visible_at=row.visible_at,
        failing_since=row.failing_since,
        outages=row.outages,
    )


def commitment_of(row: CommitmentRow) -> Commitment:
    """The frozen record of a row."""
    return Commitment(
        transaction_uid=row.transaction_uid,
        delivery_id=row.delivery_id,
        attempt=row.attempt,
        state=CommitmentState(row.state),
        asked=row.asked,
        reported=row.reported,
        committed=tuple(row.report.get("committed", ())),
        failed=dict(row.report.get("failed", {})),
    )


def event_of(row: EventRow) -> Event:
    """The frozen record of a row."""
    return Event(
        id=row.id,
        time=row.time,
        job_id=row.job_id,
        stage=row.stage,
        code=row.code,
        text=row.text,
        seconds=row.seconds,
        details=dict(row.details),
    )


SUCCESS = "0x0000"  # PS3.7 annex C


def compact(statuses: Mapping[str, str], instances: int) -> dict[str, Any]:
    """SOP Instance UID -> status, as it is stored: {status: [UIDs]} of what did not succeed.

    3,000 good instances take `{}`; 3,000 that failed alike take `{"0xa700": "*"}`.
    """
    groups: dict[str, Any] = {}
    for uid, status in sorted(statuses.items()):
        if status != SUCCESS:
            groups.setdefault(status, []).append(uid)
    if len(groups) == 1:
        (status, uids) = next(iter(groups.items()))
        if len(uids) == instances and instances > 1:
            return {status: ALL}
    return groups


def spread(stored: Mapping[str, Any]) -> dict[str, str]:
    """The inverse of `compact`, without the successes; the UID is "*" where one status holds for all instances."""
    return {uid: status for status, uids in stored.items() for uid in ([ALL] if uids == ALL else uids)}
