"""`dicom-node jobs …`: ask the ledger, and change what it says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from dicom_node.cli.common import (
    DEFAULT_CONFIG,
    AsJson,
    ConfigPath,
    console,
    fail,
    find_job,
    job_dict,
    ledger_at,
    local_time,
    opened_ledger,
    parse_time,
    print_csv,
    print_json,
    print_outcome,
    safe,
    table,
)
from dicom_node.cli.recalled import recalled_lines
from dicom_node.config import Config, load_config
from dicom_node.errors import RerunRefused
from dicom_node.lineage import OTHER_SERIES, RERUN
from dicom_node.net.status import status_text
from pipeline.errors import PipelineError
from storage.deliveries import taken_back_at
from storage.errors import StorageError
from storage.ledger import Ledger
from storage.records import ALL, PROOF_STATES, REJECTION, Delivery, DeliveryState, Job, JobFilter, JobState
from storage.spool import Spool

app = typer.Typer(help="List, show, retry, cancel and release jobs.", no_args_is_help=True)

JobId = Annotated[str, typer.Argument(help="The job's id, or as much of its start as is unique.")]
RETRIED_STATES = {JobState.FAILED, JobState.REJECTED, JobState.CANCELLED}
_STATUS_WORDS = {
    "not_sent": "the attempt ended before the destination was offered it",
    "no_response": "it was sent, and the destination did not say what became of it",
    "no_presentation_context": "the destination takes no object of this kind, or not in this encoding",
    "not_committed": "the archive's report of what it keeps leaves it out",
}
CSV_COLUMNS = (
    "id",
    "state",
    "created",
    "updated",
    "accession",
    "patient_id",
    "study_uid",
    "series_uid",
    "series_number",
    "series_description",
    "calling_ae",
    "instances",
    "attempts",
    "reason_code",
    "reason",
)


@app.command("list")
def list_jobs(
    config: ConfigPath = DEFAULT_CONFIG,
    state: Annotated[
        list[JobState] | None,
        typer.Option("--state", "-s", case_sensitive=False, help="Only jobs in this state; may be repeated."),
    ] = None,
    accession: Annotated[str, typer.Option(help="Only this accession number.")] = "",
    patient_id: Annotated[str, typer.Option(help="Only this patient ID.")] = "",
    study: Annotated[str, typer.Option(help="Only this Study Instance UID.")] = "",
    series: Annotated[str, typer.Option(help="Only this (CT) Series Instance UID.")] = "",
    peer: Annotated[str, typer.Option(help="Only jobs that this calling AE title sent.")] = "",
    since: Annotated[str, typer.Option(help="Created at or after: 2026-11-21, 2026-11-21T03:00, 6h, 2d.")] = "",
    until: Annotated[str, typer.Option(help="Created before: the same forms.")] = "",
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="At most this many, newest first.")] = 100,
    as_json: AsJson = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV for a spreadsheet.")] = False,
) -> None:
    """List jobs, newest first. A job is one CT series that arrived, used or not."""
    wanted = JobFilter(
        states=tuple(state or ()),
        accession=accession,
        patient_id=patient_id,
        study_uid=study,
        series_uid=series,
        peer=peer,
        since=parse_time(since),
        until=parse_time(until),
        limit=limit,
    )
    with ledger_at(config) as ledger:
        found = ledger.find(wanted)
        of_people = not as_json and not as_csv
        under_way = [job.id for job in found if of_people and job.state is JobState.DELIVERING]
        deliveries = {job_id: ledger.deliveries(job_id) for job_id in under_way}
    if as_json:
        print_json([job_dict(job) for job in found])
    elif as_csv:
        print_csv([job_dict(job) for job in found], CSV_COLUMNS)
    elif not found:
        console.print("no job matches")
    else:
        _print_jobs(found, deliveries)


def _print_jobs(found: Sequence[Job], deliveries: Mapping[str, Sequence[Delivery]]) -> None:
    shown = table(f"{len(found)} jobs", "id", "state", "created", "accession", "series", "slices", "from", "why")
    for job in found:
        shown.add_row(
            job.id[:8],
            job.state.value,
            local_time(job.created),
            safe(job.info.accession),
            safe(f"{job.info.series_number} {job.info.series_description}".strip()),
            str(job.instances),
            safe(job.info.calling_ae),
            safe(_why(job, deliveries.get(job.id, ()))),
        )
    console.print(shown)


def _why(job: Job, deliveries: Sequence[Delivery]) -> str:
    """What a job that goes on is at, else the code of its reason."""
    match job.state:
        case JobState.RUNNING:
            return job.stage
        case JobState.DELIVERING:
            return waiting_text(deliveries)
        case _:
            return job.reason_code


def waiting_text(deliveries: Sequence[Delivery]) -> str:
    """What each destination is waited for: `pacs: connection_failed, next 17:05:01`.

    One delivery stands for all of a destination: the first that has a reason, else the first that has not ended.
    """
    told: dict[str, str] = {}
    for delivery in sorted(deliveries, key=lambda one: not one.reason_code):  # stable: else in the order of sending
        if text := _waits_for(delivery):
            told.setdefault(delivery.destination, f"{delivery.destination}: {text}")
    return "; ".join(told.values())


def _waits_for(delivery: Delivery) -> str:
    """In a few words, "" for a delivery that is where it shall be."""
    if delivery.state is DeliveryState.CANCELLED or delivery.proven:
        return ""
    awaited = f"{delivery.goal.value} is awaited" if delivery.state in PROOF_STATES else delivery.state.value
    due = delivery.next_attempt
    when = f", next {due.astimezone():%H:%M:%S}" if due and delivery.state is not DeliveryState.SENDING else ""
    return f"{delivery.reason_code or awaited}{when}"


@app.command("show")
def show_job(job_id: JobId, config: ConfigPath = DEFAULT_CONFIG, as_json: AsJson = False) -> None:
    """Everything about one job: every event, stage times, SUV per district, deliveries, the reason."""
    with ledger_at(config) as ledger:
        job = find_job(ledger, job_id)
        deliveries, events = ledger.deliveries(job.id), ledger.events(job.id)
    if as_json:
        print_json(
            {
                **job_dict(job),
                "deliveries": [asdict(delivery) for delivery in deliveries],
                "events": [asdict(event) for event in events],
            }
        )
        return
    print_job(job, deliveries)
    if deliveries:
        sent = table("deliveries", "destination", "what", "state", "sent", "attempts", "proof", "next", "why")
        for delivery in deliveries:
            sent.add_row(
                delivery.destination,
                f"{delivery.kind} ({delivery.encoding})",
                delivery.state.value,
                f"{delivery.sent}/{delivery.instances}",
                str(delivery.attempts),
                proof_text(delivery),
                local_time(delivery.next_attempt),
                safe(f"{delivery.reason_code} {delivery.reason}".strip()),
            )
        console.print(sent)
        for line in (line for delivery in deliveries for line in status_lines(delivery)):
            console.print(safe(line))
    history = table("events", "time", "stage", "event", "seconds", "text")
    for event in events:
        seconds = f"{event.seconds:.2f}" if event.seconds is not None else ""
        history.add_row(local_time(event.time), event.stage, event.code, seconds, safe(event.text))
    console.print(history)


def status_lines(delivery: Delivery) -> list[str]:
    """A line for each instance that was not plainly stored, or one for all that have the same status."""
    what = f"  {delivery.destination}, {delivery.kind} ({delivery.encoding})"
    lines = []
    for uid, status in delivery.statuses.items():
        which = f"each of {delivery.instances} instances" if uid == ALL else uid
        lines.append(f"{what}: {which}: {_in_words(status)}")
    return lines


def _in_words(status: str) -> str:
    if status.startswith("0x"):
        return status_text(int(status, 16))
    meaning = _STATUS_WORDS.get(status)
    return f"{status} ({meaning})" if meaning else status


def proof_text(delivery: Delivery) -> str:
    """One line per state that was proven, with its time; then the states that its destination is still asked for."""
    reached = [(state, getattr(delivery, f"{state.value.lower()}_at")) for state in PROOF_STATES]
    lines = [f"{state.value} {local_time(moment)}" for state, moment in reached if moment is not None]
    if delivery.state in PROOF_STATES and not delivery.proven:
        lines.append(f"{delivery.goal.value} is awaited")
    return "\n".join(lines)


def print_job(job: Job, deliveries: Sequence[Delivery] = ()) -> None:
    """State, reason, stage times and SUV per district; also used by the demo."""
    head = table(f"job {job.id}", "what", "value")
    info = job.info
    for what, value in (
        ("state", job.state.value),
        ("reason", f"{job.reason_code}: {job.reason}" if job.reason_code else ""),
        ("accession", info.accession),
        ("study", info.study_uid),
        ("series", f"{info.series_uid} ({info.series_number} {info.series_description})"),
        ("slices", str(job.instances)),
        ("from", f"{info.calling_ae} at {info.peer_address}"),
        ("created", local_time(job.created)),
        ("updated", local_time(job.updated)),
        ("attempts", str(job.attempts)),
        ("supersedes", job.supersedes),
        ("computed again", "; ".join(job.details.get(RERUN) or ())),
        *(("recalled", line) for line in recalled_lines(job, deliveries)),
    ):
        if value:
            head.add_row(what, safe(value))
    console.print(head)
    found = job.details
    print_outcome(found.get("stage_seconds") or {}, found.get("stats") or [], found.get("notes") or [])
    if found.get("shadow"):
        _print_shadow(found["shadow"])


def _print_shadow(shadow: Mapping[str, Any]) -> None:
    """How the second bundle did on this job's CT, beside the result that was sent."""
    name = f"{shadow['bundle_name']} {shadow['bundle_version']}"
    shown = table(
        f"shadow {name}, {shadow['seconds']:.1f} s: compared, not sent (SUV, g/ml)",
        "region", "ml", "mean sent", "mean shadow", "bias", "MAE",
    )  # fmt: skip
    for row in shadow["regions"]:
        means = (f"{row['suv_mean']:.2f}", f"{row['shadow_suv_mean']:.2f}")
        shown.add_row(
            row["region"], f"{row['volume_ml']:.0f}", *means, f"{row['bias_suv']:+.3f}", f"{row['mae_suv']:.3f}"
        )
    console.print(shown)
    for note in shadow.get("notes") or []:
        console.print(safe(f"shadow: {note}"))


def _change(path: Path, job_id: str, change: Callable[[Ledger, Config, str], Job]) -> None:
    config = load_config(path)
    with opened_ledger(config) as ledger:
        job = find_job(ledger, job_id)
        try:
            now = change(ledger, config, job.id)
        except (StorageError, RerunRefused, PipelineError) as error:
            raise fail(f"job {job.id[:8]}: {error}") from error
        except OSError as error:  # of the spool's disk; the ledger is changed last, so that the command can be repeated
            why = error.strerror or type(error).__name__
            raise fail(
                f"job {job.id[:8]}: spool_failed: {why}; the job is unchanged: mend the disk, then again"
            ) from error
    if now.id != job.id:
        console.print(f"job {now.id[:8]}: {now.state.value}, supersedes job {job.id[:8]}")
        return
    console.print(f"job {now.id[:8]}: {job.state.value} -> {now.state.value}")


@app.command("retry")
def retry(
    job_id: JobId,
    rerun: Annotated[bool, typer.Option("--rerun", help="Compute the result again, also when it is there.")] = False,
    config: ConfigPath = DEFAULT_CONFIG,
) -> None:
    """Run a FAILED, REJECTED or CANCELLED job again; finished results are only sent again, with the same bytes.

    With --rerun also a DONE job, or one that was recalled, if what its result is made of has changed since (the
    bundle, a corrected SEG, the options): as a new job, whose series supersedes the old one. So too a FAILED or
    CANCELLED one of which something was sent.
    """

    from dicom_node import recover  # pydicom

    def again(ledger: Ledger, config: Config, job_id: str) -> Job:
        spool = Spool(config.storage.root, min_free_bytes=0)
        job = ledger.get(job_id)
        deliveries = ledger.deliveries(job_id)
        noted = any(delivery.kind == REJECTION for delivery in deliveries)
        taken_back = noted or bool(taken_back_at(job.details))
        if rerun and (job.state is JobState.DONE or taken_back):
            from dicom_node.rerun import changes  # reads the bundle: torch
            from dicom_node.rerun import rerun as run_again

            return run_again(ledger, spool, job, changes(job, config, spool))
        needed = not taken_back and (rerun or not spool.has_result(job_id))  # retention may have removed it
        if needed and job.state in RETRIED_STATES:
            if deliveries:
                from dicom_node.rejections import arrived, keep_references
                from dicom_node.rerun import changes
                from dicom_node.rerun import rerun as run_again

                keep_references(spool, job_id)
                if arrived(deliveries, ledger.events(job_id)):
                    why = changes(job, config, spool)
                    if job.reason_code == OTHER_SERIES:
                        why = why or ("its result is another series now",)
                    if why:  # in place, the series that is out would be forgotten
                        return run_again(ledger, spool, job, why)
            spool.discard_result(job_id)  # before the move: a running node may take the job up at once
        return recover.retry(ledger, spool, job_id, rerun=needed)

    _change(config, job_id, again)


@app.command("redeliver")
def redeliver(
    job_id: JobId,
    destination: Annotated[str, typer.Option(help="Only to this destination; else to all.")] = "",
    config: ConfigPath = DEFAULT_CONFIG,
) -> None:
    """Send the finished result of a DONE job again: the same bytes under the same UIDs."""
    _change(config, job_id, lambda ledger, _, job: ledger.redeliver(job, destination=destination))


@app.command("cancel")
def cancel(job_id: JobId, config: ConfigPath = DEFAULT_CONFIG) -> None:
    """End a job that has not ended. What was already sent stays where it is."""
    from dicom_node import recover

    def ended(ledger: Ledger, loaded: Config, job: str) -> Job:
        return recover.cancel(ledger, Spool(loaded.storage.root, min_free_bytes=0), job)

    _change(config, job_id, ended)


@app.command("release")
def release(job_id: JobId, config: ConfigPath = DEFAULT_CONFIG) -> None:
    """Let a HELD job go on: a held result is sent, a held series is run."""
    _change(config, job_id, lambda ledger, _, job: ledger.release(job))
