"""Taking results back: writes rejection notes into the outbox and opens their deliveries.

A note is written once, before the ledger hears of it; a kill between the two is mended by doing it again. Where a
result's files are gone by retention, what was kept of them names its instances.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import structlog

from dicom_node.config import Config
from dicom_node.delivery import outbox_files
from dicom_node.lineage import result_uids, superseded_by
from dicom_node.trial import is_test
from pipeline.errors import OutputError
from pipeline.outputs.rejection_note import (
    RejectedSeries,
    RejectionReason,
    encode_rejection_note,
    read_rejected_series,
    series_from_json,
    series_to_json,
)
from pipeline.result import read_summary
from storage.deliveries import seen_there, taken_back_at
from storage.durable import fsync_folder, link_file, make_folder, write_temp
from storage.errors import IllegalMove, NoSpace, StorageError
from storage.ledger import Ledger, utc_now
from storage.records import PROOF_STATES, REJECTION, Delivery, Event, Job, NewDelivery
from storage.rejections import OPEN_AGAIN, REJECTABLE, STOPPABLE
from storage.spool import Spool

log = structlog.get_logger()

NOTE_FILE = "0001.dcm"
LOOK_BACK = timedelta(days=90)  # an older job has had its rejections, however long it was held or the node was off
REFUSED_CODES = frozenset({"no_presentation_context", "optional_refused"})  # nothing of the series is there


@dataclass(frozen=True, kw_only=True, slots=True)
class Rejected:
    """What `reject` did for one job: notes opened, and a sentence for each series that no note could be written for."""

    opened: int = 0
    unnamed: tuple[str, ...] = ()


def reject(
    ledger: Ledger,
    spool: Spool,
    job: Job,
    *,
    reason: RejectionReason,
    description: str,
    code: str,
    text: str,
    destinations: Collection[str] | None = None,
    details: Mapping[str, Any] | None = None,
    clock: Callable[[], datetime] = utc_now,
) -> Rejected:
    """Reject what `job` may have brought to `destinations` (None: to all), and send them nothing more of it.

    Args:
        reason: the notes' document title.
        description: for a person who reads the note.
        code, text: of the ledger's event.
        details: merged into the job's details.

    Raises:
        IllegalMove: nothing of the job can have been sent.
        OSError, NoSpace: a note cannot be written now; what was sent stays without notes until it is done again.
    """
    if job.state not in STOPPABLE:
        raise IllegalMove(f"job {job.id}: is {job.state}, nothing of it was sent that could be rejected")
    # first, so that nothing sets out after we have looked at what may be there
    ledger.reject_result(job.id, (), destinations=destinations, code=code, text=text)
    deliveries = ledger.deliveries(job.id)
    known = {(d.destination, d.encoding) for d in deliveries if d.kind == REJECTION and d.state not in OPEN_AGAIN}
    test = is_test(ledger, job)
    notes, unnamed = [], []
    for delivery in arrived(deliveries, ledger.events(job.id), destinations):
        encoding = note_encoding(delivery, reason)
        if (delivery.destination, encoding) in known:
            continue
        try:
            series_uid = _note(spool, job, delivery, reason, description, clock, test=test)
        except OutputError as error:
            unnamed.append(f"no note about {delivery.kind} ({delivery.encoding}): {error.text}")
            continue
        notes.append(
            NewDelivery(
                destination=delivery.destination,
                kind=REJECTION,
                encoding=encoding,
                series_uid=series_uid,
                instances=1,
            )
        )
    opened = ledger.reject_result(job.id, notes, destinations=destinations, code=code, text=text, details=details)
    return Rejected(opened=opened, unnamed=tuple(dict.fromkeys(unnamed)))


def note_encoding(delivery: Delivery, reason: RejectionReason) -> str:
    """What the ledger calls the note about this delivery's series, beside the kind "rejection"."""
    return f"kos-{reason}-{delivery.kind}-{delivery.encoding}"


def arrived(
    deliveries: Sequence[Delivery], events: Sequence[Event], destinations: Collection[str] | None = None
) -> list[Delivery]:
    """The deliveries of which something may be with its destination; a doubt counts as yes.

    A note about what is not there does no harm; one that is missing leaves a result that nobody knows of.
    """
    tried = {
        tuple(event.details.get(key) for key in ("destination", "kind", "encoding"))
        for event in events
        if event.stage == "delivery"
    }
    there = seen_there(event.details for event in events if event.stage == "delivery")
    return [
        delivery
        for delivery in deliveries
        if delivery.kind != REJECTION
        and (destinations is None or delivery.destination in destinations)
        and (
            delivery.sent
            or delivery.state in PROOF_STATES
            or _key(delivery) in there
            or (delivery.reason_code not in REFUSED_CODES and (delivery.attempts > 0 or _key(delivery) in tried))
        )
    ]


def _key(delivery: Delivery) -> tuple[str, str, str]:
    return delivery.destination, delivery.kind, delivery.encoding


def _note(
    spool: Spool,
    job: Job,
    delivery: Delivery,
    reason: RejectionReason,
    description: str,
    clock: Callable[[], datetime],
    *,
    test: bool,
) -> str:
    """The series UID of the note, which lies in the outbox when this returns. Raises OutputError."""
    encoding = note_encoding(delivery, reason)
    path = spool.result_folder(job.id) / f"{REJECTION}-{encoding}" / NOTE_FILE
    if path.is_file():  # written once: its bytes may be on their way
        return read_rejected_series([path]).series_uid
    rejected = _series(spool, job.id, f"{delivery.kind}-{delivery.encoding}")
    if rejected.series_uid != delivery.series_uid:  # files or names of another run of the job
        text = f"what is kept is series {rejected.series_uid}, the ledger says that {delivery.series_uid} was sent"
        raise OutputError("result_unreadable", text)
    note = encode_rejection_note(
        rejected, reason=reason, description=description, created=clock(), encoding=encoding, test=test
    )
    make_folder(path.parent)
    temp = write_temp(path, (note.instances[0].data,))
    try:
        link_file(temp, path)
        fsync_folder(path.parent)
    except FileExistsError:  # another process rejects at the same time: its note is the one
        return read_rejected_series([path]).series_uid
    finally:
        temp.unlink()
    return note.series_uid


def _series(spool: Spool, job_id: str, name: str) -> RejectedSeries:
    files = outbox_files(spool.result_folder(job_id) / name)
    if files:
        return read_rejected_series(files)
    kept = _kept(spool, job_id).get(name)
    if kept is None:
        raise OutputError(
            "result_unreadable", f"series {name} of job {job_id}: neither its files nor its names are there"
        )
    return series_from_json(kept)


def _kept(spool: Spool, job_id: str) -> dict[str, str]:
    """`Spool.references`; raises OutputError where they are damaged."""
    try:
        return spool.references(job_id)
    except ValueError as error:
        raise OutputError("result_unreadable", f"what was kept of the result of job {job_id} is damaged") from error


def keep_references(spool: Spool, job_id: str) -> None:
    """Before a result is removed: keep what names its series, so that it can be rejected for a year.

    A damaged series is left out, and the others are kept: it must not fill the disk for ever.

    Raises:
        OSError, NoSpace: not now; the result must stay.
    """
    folder = spool.result_folder(job_id)
    if not spool.has_result(job_id) or spool.has_references(job_id):
        return
    texts = {}
    try:
        for name in _series_folders(folder, job_id):
            try:
                texts[name] = series_to_json(read_rejected_series(outbox_files(folder / name)))
            except OutputError as error:
                log.warning("rejection.no_references", job_id=job_id, series=name, reason=error.text)
        if texts:
            spool.keep_references(job_id, texts)
    except (OSError, NoSpace) as error:
        log.warning("rejection.references_later", job_id=job_id, reason=type(error).__name__)
        raise


def _series_folders(folder: Path, job_id: str) -> list[str]:
    """The folders of a result's series; none where its summary is damaged. Raises OSError when it cannot be read."""
    try:
        return [series.folder for series in read_summary(folder).series]
    except OutputError as error:
        if isinstance(error.__cause__, OSError):
            raise error.__cause__ from error
        log.warning("rejection.no_references", job_id=job_id, reason=error.text)
        return []


# ---- results that a later one replaces


def reject_superseded(config: Config, ledger: Ledger, spool: Spool, *, clock: Callable[[], datetime] = utc_now) -> int:
    """Reject what a later result of the same CT replaces, at every destination that wants it and has the later one.

    Called every few seconds; it does each rejection once. Returns how many notes were opened.
    """
    wanted = {destination.name for destination in config.destinations if destination.reject_superseded}
    if not wanted:
        return 0
    opened = 0
    for job in ledger.superseding(since=clock() - LOOK_BACK):
        pets = {d.destination: d for d in ledger.deliveries(job.id) if d.kind == "pet"}
        there = {name for name, delivery in pets.items() if name in wanted and delivery.proven}
        there = _not_taken_back(job, there)  # itself rejected, it is not there to replace anything
        for old in _replaced(ledger, job) if there else ():
            try:
                opened += _replace(ledger, spool, job, old, there, clock)
            except (OSError, StorageError) as error:  # the next call tries it again, and the other jobs go on
                log.warning("rejection.later", job_id=old.id, reason=type(error).__name__)
    return opened


def _replace(
    ledger: Ledger, spool: Spool, job: Job, old: Job, there: Collection[str], clock: Callable[[], datetime]
) -> int:
    told = dict(old.details.get("superseded_at") or {})
    due = _not_taken_back(old, {d.destination for d in ledger.deliveries(old.id) if d.destination in there})
    if not due:
        return 0
    done = reject(
        ledger,
        spool,
        old,
        reason=RejectionReason.QUALITY,
        description="Replaced by a later synthetic PET series of the same CT series",
        code="superseded_rejected",
        text=f"job {job.id} replaces it at {', '.join(sorted(due))}: rejected there",
        destinations=due,
        details={"superseded_at": {**told, **dict.fromkeys(due, job.id)}},
        clock=clock,
    )
    log.info("rejection.opened", job_id=old.id, successor=job.id, notes=done.opened, destinations=sorted(due))
    for text in done.unnamed:
        log.warning("rejection.not_written", job_id=old.id, reason=text)
    return done.opened


def _not_taken_back(job: Job, destinations: Collection[str]) -> set[str]:
    """Of the destinations those where the job's result was neither recalled nor replaced."""
    gone = taken_back_at(job.details)
    return set() if "" in gone else set(destinations) - gone


def _replaced(ledger: Ledger, job: Job) -> list[Job]:
    """The jobs that this one supersedes, directly or not, and whose series are not its own."""
    own = result_uids(job)
    return [old for old in superseded_by(ledger, job) if old.state in REJECTABLE and not (result_uids(old) & own)]
