"""The frozen values that leave the storage package. Nobody outside sees a row or a session."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any


class JobState(StrEnum):
    """Where a job stands; one job is one received CT series (or one late-slice successor of it)."""

    RECEIVING = "RECEIVING"
    QUEUED = "QUEUED"
    RUNNING = "RUNNING"
    DELIVERING = "DELIVERING"
    DONE = "DONE"
    REJECTED = "REJECTED"
    HELD = "HELD"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"


class DeliveryState(StrEnum):
    """Where one result series stands on its way to one destination."""

    PENDING = "PENDING"
    SENDING = "SENDING"
    SENT = "SENT"
    COMMITTED = "COMMITTED"
    VISIBLE = "VISIBLE"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"


class CommitmentState(StrEnum):
    """Where one Storage Commitment transaction stands (PS3.4 annex J)."""

    ASKED = "ASKED"  # the archive owes a report
    REPORTED = "REPORTED"  # it came, and waits to be compared with what was sent
    COMMITTED = "COMMITTED"
    FAILED = "FAILED"  # not for every instance
    LAPSED = "LAPSED"  # refused, or no report in time: asked again under another Transaction UID
    NOT_OFFERED = "NOT_OFFERED"


FINAL_JOB_STATES = frozenset({JobState.DONE, JobState.REJECTED, JobState.FAILED, JobState.CANCELLED})

ALL = "*"  # in a delivery's statuses: each of its instances
REJECTION = "rejection"  # the kind of a delivery that rejects a series which was delivered before

WAITING_STATES = (DeliveryState.PENDING, DeliveryState.SENT, DeliveryState.COMMITTED)  # something is still to be done
PROOF_STATES = (DeliveryState.SENT, DeliveryState.COMMITTED, DeliveryState.VISIBLE)


@dataclass(frozen=True, kw_only=True, slots=True)
class SeriesInfo:
    """What the assembler knows of a series from its headers; opens a job. Patient ID is stored for look-up only."""

    study_uid: str
    series_uid: str
    accession: str = ""
    patient_id: str = ""
    modality: str = ""
    sop_class_uid: str = ""
    series_number: str = ""
    series_description: str = ""
    study_date: str = ""
    calling_ae: str = ""
    peer_address: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One row of the ledger."""

    id: str  # a UUID in hex
    state: JobState
    info: SeriesInfo
    created: datetime
    updated: datetime
    instances: int = 0
    attempts: int = 0
    reason_code: str = ""
    reason: str = ""
    stage: str = ""
    supersedes: str = ""  # the job whose series got late slices
    source_digest: str = ""  # sha256 of the sorted SOP Instance UIDs it runs on
    lease_owner: str = ""
    lease_until: datetime | None = None
    not_before: datetime | None = None  # back-off of a retried job
    details: Mapping[str, Any] = field(default_factory=dict)  # stage_seconds, stats, provenance, coverage: JSON


@dataclass(frozen=True, kw_only=True, slots=True)
class Delivery:
    """One result series (`kind`, `encoding`) to one destination."""

    id: int
    job_id: str
    destination: str
    kind: str
    encoding: str
    series_uid: str
    instances: int
    state: DeliveryState
    sent: int = 0
    attempts: int = 0
    next_attempt: datetime | None = None
    reason_code: str = ""
    reason: str = ""
    updated: datetime | None = None
    statuses: Mapping[str, str] = field(default_factory=dict)  # SOP Instance UID, or ALL -> what is no success
    goal: DeliveryState = DeliveryState.SENT  # the last state that its destination asks for, or offers
    checks: int = 0  # requests for proof in the present state that brought none
    sent_at: datetime | None = None
    committed_at: datetime | None = None
    visible_at: datetime | None = None
    failing_since: datetime | None = None  # of the trouble that goes on: its first attempt; None: none
    outages: int = 0  # of the attempts: those that found the destination down, and count for nothing

    @property
    def proven(self) -> bool:
        """Whether it has reached its goal."""
        return PROOF_STATES.index(self.state) >= PROOF_STATES.index(self.goal) if self.state in PROOF_STATES else False


@dataclass(frozen=True, kw_only=True, slots=True)
class Commitment:
    """One Storage Commitment transaction: the question, and the report once it is here."""

    transaction_uid: str
    delivery_id: int
    attempt: int  # the delivery's `attempts` when it was asked: a report about an earlier sending proves nothing
    state: CommitmentState
    asked: datetime
    reported: datetime | None = None
    committed: tuple[str, ...] = ()  # SOP Instance UIDs; empty again when the report was dealt with
    failed: Mapping[str, str] = field(default_factory=dict)  # SOP Instance UID -> Failure Reason as "0x0112"


@dataclass(frozen=True, kw_only=True, slots=True)
class NewDelivery:
    """What opens a delivery."""

    destination: str
    kind: str
    encoding: str
    series_uid: str
    instances: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """One line of the append-only history. `job_id` is empty for what belongs to no job (a dropped instance)."""

    id: int
    time: datetime
    job_id: str
    stage: str
    code: str
    text: str
    seconds: float | None = None
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class JobFilter:
    """`jobs list`: every field that is set narrows the answer; texts match exactly."""

    states: tuple[JobState, ...] = ()
    accession: str = ""
    patient_id: str = ""
    study_uid: str = ""
    series_uid: str = ""
    peer: str = ""
    bundle: str = ""  # of the result: the name of the model bundle, and its version
    bundle_version: str = ""
    since: datetime | None = None
    until: datetime | None = None
    limit: int = 100
