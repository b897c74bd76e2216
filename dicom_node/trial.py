"""Test studies of `dicom-node doctor`: which jobs are one, and where alone their results may go.

A test study is announced in the ledger before it is sent, with its one destination. It is sent under the node's own AE
title, which nobody but this machine may use, and says in its data what it is. What has the title or the labels and was
not announced is refused: it may be a patient's, or a test whose announcement a restored ledger does not know.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dicom_node.config import DestinationConfig
from storage.ledger import Ledger
from storage.records import Event, Job

ANNOUNCED = "test_announced"  # the event's code
UNANNOUNCED = "unannounced_test"  # reason code of a series that is refused
LABELED = "labeled_test"  # detail of a job whose instances say that they are a test
TEST_NAME = "TEST^DICOM-NODE DOCTOR"  # Patient's Name of each test study, beside Quality Control Image YES


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """A test study. `destination` is the one it may go to; empty: none."""

    destination: str = ""


def announce(ledger: Ledger, study_uid: str, destination: str) -> None:
    """Say before it is sent that a study is a test, and where alone its result may go ("": nowhere)."""
    text = f"a test study of `dicom-node doctor`, for {destination or 'no destination'}"
    ledger.note("", ANNOUNCED, text, details={"study_uid": study_uid, "destination": destination})


def trial_of(ledger: Ledger, job: Job, ae_title: str) -> Trial | None:
    """Of which test study a job is, or None. `ae_title` is the node's own."""
    announced = _announcements(ledger, job.info.study_uid)
    if announced:
        return Trial(destination=str(announced[-1].details.get("destination") or ""))
    return Trial() if job.info.calling_ae == ae_title or LABELED in job.details else None


def is_test(ledger: Ledger, job: Job) -> bool:
    """Whether a job is of a test study of ours: announced here, or, in a restored ledger, labeled in its instances."""
    return bool(_announcements(ledger, job.info.study_uid)) or LABELED in job.details


def _announcements(ledger: Ledger, study_uid: str) -> list[Event]:
    return [event for event in ledger.events_of_study(study_uid) if event.code == ANNOUNCED]


def unannounced(ledger: Ledger, study_uid: str, *, calling_ae: str, labeled: bool, ae_title: str) -> str:
    """Why a series is refused that has a test's sender or labels and was not announced; "" for any other."""
    if calling_ae != ae_title and not labeled:
        return ""
    if _announcements(ledger, study_uid):
        return ""
    if labeled:
        return "a test study of `dicom-node doctor` that this ledger knows no announcement of: it goes nowhere"
    return f"sent under our own AE title {ae_title!r}, which is for announced tests: send it under the sender's own"


def only_for(trial: Trial | None, destinations: Sequence[DestinationConfig]) -> list[DestinationConfig]:
    """The destinations that a job's result may go to."""
    return [one for one in destinations if trial is None or one.name == trial.destination]
