"""`dicom-node recall`: which results a model made and where they are; and, on request, the notes that reject them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import StrEnum
from typing import Annotated, Any

import typer

from dicom_node.cli.common import (
    DEFAULT_CONFIG,
    AsJson,
    ConfigPath,
    console,
    console_err,
    fail,
    local_time,
    opened_ledger,
    parse_time,
    print_csv,
    print_error,
    print_json,
    progress_bar,
    safe,
    table,
)
from dicom_node.config import load_config
from dicom_node.lineage import RECALLED
from dicom_node.recall import Recalled, Result, places, recall, results_of
from storage.errors import StorageError
from storage.ledger import Ledger
from storage.records import Delivery
from storage.spool import Spool

CSV_COLUMNS = (
    "accession",
    "study_uid",
    "created",
    "bundle",
    "job",
    "job_state",
    "recalled",
    "kind",
    "encoding",
    "series_uid",
    "instances",
    "destination",
    "state",
    "sent",
    "updated",
    "rejection",
)


class Why(StrEnum):
    """What `--why` takes: the codes of the notes' titles (`RejectionReason.document_title`)."""

    QUALITY = "113001"
    SAFETY = "113037"


def recall_results(
    bundle: Annotated[str, typer.Option(help="The model bundle: NAME, or NAME@VERSION for one version.")],
    config: ConfigPath = DEFAULT_CONFIG,
    since: Annotated[str, typer.Option(help="Jobs created at or after: 2026-11-21, 2026-11-21T03:00, 6h, 2d.")] = "",
    until: Annotated[str, typer.Option(help="Jobs created before: the same forms.")] = "",
    destination: Annotated[str, typer.Option(help="Reject at this destination only; else wherever it went.")] = "",
    send_rejections: Annotated[
        bool, typer.Option("--send-rejections", help="Ask the archives to hide these results (Key Objects, IHE IOCM).")
    ] = False,
    why: Annotated[
        Why, typer.Option(help="113001: rejected for quality reasons; 113037: for patient safety reasons.")
    ] = Why.QUALITY,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before rejecting.")] = False,
    as_json: AsJson = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV: a line for each series and destination.")] = False,
) -> None:
    """List every result of a model version: studies, series, where they are; and reject them with --send-rejections."""
    loaded = load_config(config)
    name, _, version = bundle.partition("@")
    first, last = parse_time(since), parse_time(until)
    with opened_ledger(loaded) as ledger:
        found = results_of(ledger, name, version, since=first, until=last)
        done: list[Recalled] = []
        if send_rejections and found:
            if destination and destination not in places(found):
                raise fail(f"none of these results went to {destination!r}; they went to {', '.join(places(found))}")
            if not yes:
                _ask(found, destination)
            spool = Spool(loaded.storage.root, min_free_bytes=0)
            only = {destination} if destination else None
            done = list(_recalled(ledger, spool, found, why, only))
            found = results_of(ledger, name, version, since=first, until=last)
    if as_json:
        print_json([_result_dict(result) for result in found])
    elif as_csv:
        print_csv([row for result in found for row in _rows(result)], CSV_COLUMNS)
    elif not found:
        console.print(f"no result of {bundle} in the ledger")
    else:
        _print(found)
    if send_rejections:
        _summarize(done)


def _ask(found: Sequence[Result], destination: str) -> None:
    where = destination or ", ".join(places(found)) or "no destination"
    studies = len({result.job.info.study_uid for result in found})
    question = f"Reject {len(found)} results of {studies} studies at {where}? Archives that heed it hide them."
    if not typer.confirm(question, err=True):
        raise fail("nothing was rejected")


def _recalled(
    ledger: Ledger, spool: Spool, found: Sequence[Result], why: Why, destinations: set[str] | None
) -> Iterator[Recalled]:
    """One after the other, oldest first; what goes wrong with one is told and leaves the others alone."""
    from pipeline.outputs.rejection_note import RejectionReason

    reason = RejectionReason[why.name]
    with progress_bar() as bar:
        task = bar.add_task("rejecting", total=len(found))
        for result in reversed(found):
            try:
                yield recall(ledger, spool, result, reason, destinations=destinations)
            except (StorageError, OSError) as error:  # a full or failing disk, a job that somebody else moved
                yield Recalled(result=result, fault=str(error))
            bar.advance(task)


def _summarize(done: Sequence[Recalled]) -> None:
    """To stderr, so that `--json` stays JSON; exit 1 where something could not be rejected."""
    notes = sum(one.notes for one in done)
    console_err.print(
        f"{len(done)} results, {notes} rejections opened now; the node sends them and `recall` shows them"
    )
    faults = [one for one in done if one.fault]
    for one in faults:
        print_error(f"job {one.result.job.id[:8]}, accession {one.result.job.info.accession!r}: {one.fault}")
    if faults:
        raise typer.Exit(1)


def _print(found: Sequence[Result]) -> None:
    shown = table(
        f"{len(found)} results", "accession", "study", "job", "created", "bundle", "series", "went to", "rejected"
    )
    for result in found:
        job = result.job
        head = (safe(job.info.accession), safe(job.info.study_uid), job.id[:8], local_time(job.created), result.bundle)
        lines = [
            (f"{d.kind} ({d.encoding}) {d.series_uid}", f"{d.destination} {_state(d)}", _rejection(result, d))
            for d in result.series
        ] or [("", f"nowhere, the job is {job.state.value}", "")]
        for number, line in enumerate(lines):
            shown.add_row(*(head if number == 0 else [""] * len(head)), *(safe(cell) for cell in line))
    console.print(shown)


def _state(delivery: Delivery) -> str:
    return f"{delivery.state.value} {local_time(delivery.updated)}"


def _rejection(result: Result, delivery: Delivery) -> str:
    """The state of the note about this delivery; of several (other reasons) all."""
    notes = [
        note
        for note in result.notes
        if note.destination == delivery.destination and note.encoding.endswith(f"-{delivery.kind}-{delivery.encoding}")
    ]
    return ", ".join(
        f"{note.encoding.split('-')[1]} {note.state.value}" + (f" ({note.reason_code})" if note.reason_code else "")
        for note in notes
    )


def _rows(result: Result) -> Iterator[dict[str, Any]]:
    job = result.job
    base = {
        "accession": job.info.accession,
        "study_uid": job.info.study_uid,
        "created": job.created,
        "bundle": result.bundle,
        "job": job.id,
        "job_state": job.state.value,
        "recalled": (job.details.get(RECALLED) or {}).get("time", ""),
    }
    for delivery in result.series:
        yield {
            **base,
            "kind": delivery.kind,
            "encoding": delivery.encoding,
            "series_uid": delivery.series_uid,
            "instances": delivery.instances,
            "destination": delivery.destination,
            "state": delivery.state.value,
            "sent": delivery.sent,
            "updated": delivery.updated,
            "rejection": _rejection(result, delivery),
        }
    if not result.series:
        yield base


def _result_dict(result: Result) -> dict[str, Any]:
    job = result.job
    rows = [{key: row[key] for key in CSV_COLUMNS[7:]} for row in _rows(result) if "kind" in row]
    return {
        "accession": job.info.accession,
        "study_uid": job.info.study_uid,
        "created": job.created,
        "bundle": result.bundle,
        "provenance": job.details["provenance"],
        "job": job.id,
        "job_state": job.state.value,
        "recalled": job.details.get(RECALLED),
        "series": rows,
    }
