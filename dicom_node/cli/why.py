"""`dicom-node why ACCESSION`: what became of a study, in sentences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Annotated

import typer

from dicom_node.cli.common import (
    DEFAULT_CONFIG,
    AsJson,
    ConfigPath,
    console,
    fail,
    job_dict,
    ledger_at,
    local_time,
    print_json,
    safe,
)
from dicom_node.cli.recalled import recalled_lines
from dicom_node.lineage import RERUN, SAME_AS
from storage.ledger import Ledger
from storage.records import PROOF_STATES, Delivery, DeliveryState, Event, Job, JobFilter, JobState

MEANING = {
    JobState.RECEIVING: "is still arriving",
    JobState.QUEUED: "waits for its turn",
    JobState.RUNNING: "is being synthesized",
    JobState.DELIVERING: "is finished and being sent",
    JobState.DONE: "became a synthetic PET series",
    JobState.REJECTED: "was not used",
    JobState.HELD: "is held for a person",
    JobState.FAILED: "failed",
    JobState.CANCELLED: "was cancelled",
}
NEXT = {
    JobState.HELD: "dicom-node jobs release {id}   (or: jobs cancel {id})",
    JobState.FAILED: "dicom-node jobs retry {id}",
}
BUNDLE_CODES = frozenset(  # of pipeline.bundle: a retry finds the same files until a person has been there
    {
        "bundle_missing",
        "manifest_invalid",
        "manifest_altered",
        "weights_missing",
        "weights_altered",
        "weights_unfit",
        "file_missing",
        "file_altered",
    }
)
MEND_BUNDLE = "correct [pipeline].bundle (dicom-node models verify NAME proves it), restart the node, then: "

STRAYS = 20  # enough to see what is wrong
LOOKED_THROUGH = 2000  # a PACS can repeat a fault for hours, which must not hide another one
NEAR = timedelta(minutes=10)  # a study arrives within minutes


@dataclass(frozen=True, kw_only=True, slots=True)
class Stray:
    """Events of no study that say the same: the latest one, how often it came, and since when."""

    event: Event
    times: int
    first: datetime


def why(
    accession: Annotated[str, typer.Argument(help="An accession number, or a Study or Series Instance UID.")],
    config: ConfigPath = DEFAULT_CONFIG,
    as_json: AsJson = False,
) -> None:
    """Say what happened to every series of a study, also to those that did not become a job, and why."""
    with ledger_at(config) as ledger:
        found = _jobs(ledger, accession)
        studies = {job.info.study_uid for job in found} or {accession}
        by_id = {event.id: event for study in studies for event in ledger.events_of_study(study)}
        by_id.update({event.id: event for event in ledger.events_of_accession(accession)})
        events = [by_id[number] for number in sorted(by_id)]
        strays = _strays(ledger, found, events)
        deliveries = {job.id: ledger.deliveries(job.id) for job in found}
    if as_json:
        print_json(
            {
                "jobs": [{**job_dict(job), "deliveries": [asdict(one) for one in deliveries[job.id]]} for job in found],
                "events": [asdict(event) for event in events],
                "unassigned": [{**asdict(one.event), "times": one.times, "first": one.first} for one in strays],
            }
        )
        return
    if not found and not events:
        _print_strays(strays)
        raise fail(
            f"nothing in the ledger about {accession!r}: it never arrived here, or it was forgotten "
            "(storage.keep_events_days).\nAsk the PACS whether it was sent; `dicom-node check` proves that the node "
            "can be reached."
        )
    for job in found:
        _explain(job, deliveries[job.id])
        if _seg_came_later(job, found, events):
            _say(f"    what to do: a SEG came after it; to use that: dicom-node jobs retry --rerun {job.id[:8]}")
    for event in events:
        _print_event(event)
    _print_strays(strays)


def _strays(ledger: Ledger, found: list[Job], events: list[Event]) -> list[Stray]:
    """The latest events that name no study: a refused association, an unreadable or a dropped instance.

    Nobody can say whose they are, so they may be what is looked for. Where something is known of the study, only
    those of the same minutes, and not of another sender.
    """
    times = [*(job.created for job in found), *(event.time for event in events if not event.job_id)]
    if not times:
        return without_repeats(ledger.events_of_no_study(limit=LOOKED_THROUGH))[-STRAYS:]
    senders = {"", *(job.info.calling_ae for job in found), *(e.details.get("calling_ae", "") for e in events)}
    near = ledger.events_of_no_study(since=min(times) - NEAR, until=max(times) + NEAR, limit=LOOKED_THROUGH)
    return without_repeats([one for one in near if one.details.get("calling_ae", "") in senders])[-STRAYS:]


def without_repeats(events: Sequence[Event]) -> list[Stray]:
    """Each thing that was said once, in the order of when it was said last. `events`: oldest first."""
    found: dict[tuple[str, str], Stray] = {}
    for event in events:
        before = found.pop((event.code, event.text), None)
        first = before.first if before else event.time
        found[event.code, event.text] = Stray(event=event, times=before.times + 1 if before else 1, first=first)
    return list(found.values())


def _seg_came_later(job: Job, found: list[Job], events: list[Event]) -> bool:
    """Whether a DONE job that nothing supersedes had not got a SEG of its study that is here now."""
    known = job.details.get("segmentations")
    if job.state is not JobState.DONE or known is None or any(one.supersedes == job.id for one in found):
        return False
    came = {event.details.get("sop_instance_uid") for event in events if event.code == "segmentation_kept"}
    return bool(came - {None, *known})


def _jobs(ledger: Ledger, wanted: str) -> list[Job]:
    """By accession number, else as a study, else as a series."""
    for one in (JobFilter(accession=wanted), JobFilter(study_uid=wanted), JobFilter(series_uid=wanted)):
        found = ledger.find(one)
        if found:
            return found
    return []


def _print_strays(strays: list[Stray]) -> None:
    if not strays:
        return
    _say("Not assigned to any study, and so perhaps part of this one:")
    for one in strays:
        _print_event(one.event, f" ({one.times} times since {local_time(one.first)})" if one.times > 1 else "")


def _explain(job: Job, deliveries: list[Delivery]) -> None:
    info = job.info
    name = f"series {info.series_number} {info.series_description!r}, {job.instances} slices, job {job.id[:8]}"
    _say(f"{local_time(job.created)}  {name} {MEANING[job.state]}.")
    if job.reason_code:
        _say(f"    why: {job.reason_code}: {job.reason}")
    if job.supersedes:
        why = "; ".join(job.details.get(RERUN) or ())
        what = f"computed again ({why}) after" if why else "with slices that came after"
        _say(f"    {what} job {job.supersedes[:8]}{'' if why else ' began'}: use this result, not that one")
    if same := job.details.get(SAME_AS):
        _say(f"    its series are those of job {same[:8]}, which sent them or was recalled: nothing was sent twice")
    for line in recalled_lines(job, deliveries):
        _say(f"    recalled: {line}")
    for destination, successor in sorted((job.details.get("superseded_at") or {}).items()):
        _say(f"    {destination}: asked to hide it when job {successor[:8]} had arrived")
    for delivery in deliveries:
        line = (
            f"    {delivery.destination}: {delivery.kind} {delivery.state.value} {delivery.sent}/{delivery.instances}"
        )
        if delivery.reason_code:
            line += f" ({delivery.reason_code}: {delivery.reason})"
        if delivery.next_attempt and delivery.state is DeliveryState.PENDING:
            line += f", next attempt {local_time(delivery.next_attempt)}"
        if delivery.state in PROOF_STATES and not delivery.proven:
            line += f", {delivery.goal.value} is awaited"
        _say(line)
    if job.state is JobState.HELD and "provenance" in job.details:  # held by a gate: there is a result to look at
        _say(f"    picture: outbox/{job.id}/overview.png in the spool")
    if job.state in NEXT:
        first = MEND_BUNDLE if job.reason_code in BUNDLE_CODES else ""
        _say("    what to do: " + first + NEXT[job.state].format(id=job.id[:8]))


def _print_event(event: Event, repeated: str = "") -> None:
    _say(f"{local_time(event.time)}  {event.code}: {event.text}{repeated}")
    lines = event.details.get("config_lines") or ()
    if lines:
        _say("    what to do, if it may send here: add to config.toml, and restart the node")
    for line in lines:
        _say(line)


def _say(text: str) -> None:
    """One sentence, one line: the terminal wraps it, and a pipe gets it whole."""
    console.print(safe(text), soft_wrap=True)
