"""Taking a test study back: notes about what of it may have arrived (`dicom_node.rejections`), waited for and told.

For `dicom-node doctor --retire`, right after its own study, and `--retire-study`, for one of earlier.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from dicom_node.config import Config
from dicom_node.lineage import RECALLED_AT
from dicom_node.rejections import note_encoding, reject
from dicom_node.steps import Step, StepFailed, taken, waited, was_tried
from dicom_node.trial import is_test
from pipeline.outputs.rejection_note import RejectionReason
from storage.ledger import Ledger, utc_now
from storage.moves import WAITING_DELIVERIES
from storage.records import PROOF_STATES, REJECTION, Delivery, Job, JobFilter, JobState
from storage.rejections import STOPPABLE
from storage.spool import Spool

REASON = RejectionReason.QUALITY


@dataclass(frozen=True, kw_only=True, slots=True)
class Told:
    """What became of a test's series: of each its name ("pet (sc)") and what there is to say of it (" at near")."""

    retired: tuple[tuple[str, str], ...] = ()
    in_doubt: tuple[tuple[str, str], ...] = ()  # retired, and perhaps never there
    left: tuple[tuple[str, str], ...] = ()
    never_there: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        parts = {
            "retired": self.retired,
            "retired in case it arrived": self.in_doubt,
            "NOT retired": self.left,
            "never arrived": self.never_there,
        }
        return "; ".join(f"{what}: {_listed(series)}" for what, series in parts.items() if series)


def _listed(series: Sequence[tuple[str, str]]) -> str:
    """Those of which the same is said, together."""
    said = dict.fromkeys(text for _, text in series)
    return ", ".join(", ".join(name for name, text in series if text == one) + one for one in said)


def retire_study(config: Config, ledger: Ledger, accession: str, *, timeout_s: float) -> Iterator[Step]:
    """Retire a test study of earlier, wherever it may have arrived; any other study is refused.

    Doing it again opens nothing twice, tries again what failed and tells how it stands.
    """
    jobs = ledger.find(JobFilter(accession=accession))
    found = taken("study", lambda: _named(ledger, jobs, accession))
    yield found
    for job in jobs if found.ok else ():
        yield taken("retire", partial(retire, config, ledger, job.id, timeout_s=timeout_s))


def _named(ledger: Ledger, jobs: Sequence[Job], accession: str) -> str:
    """Which jobs it is. Raises StepFailed unless all of them are tests of ours."""
    if not jobs:
        text = f"no job of this ledger has the accession number {accession!r}"
        raise StepFailed(text, "`doctor` told it in its line `test study`; dicom-node jobs list")
    for job in jobs:
        if not is_test(ledger, job):
            text = f"accession {accession}: job {job.id[:8]} is no test study of dicom-node doctor, nothing was done"
            raise StepFailed(text, "dicom-node recall takes back the results of patients")
    return "; ".join(f"job {job.id[:8]}, a test study of ours: {job.state.value}" for job in jobs)


def retire(config: Config, ledger: Ledger, job_id: str, *, timeout_s: float) -> str:
    """Retire what may have arrived of a test's result and send nothing more of it. What became of it, in words.

    Raises:
        StepFailed: something is not retired, or the job has no result yet.
        StorageError, OSError: not now; doing it again does it.
    """
    job = ledger.get(job_id)
    _check_ended(job)
    places = sorted({one.destination for one in ledger.deliveries(job_id)})
    if not places:
        return f"nothing to retire: the job is {job.state.value}, and nothing of it was sent anywhere"
    unnamed = _reject(config, ledger, job, places)

    def all_tried() -> bool:
        return all(was_tried(one) for one in ledger.deliveries(job_id) if one.kind == REJECTION)

    job = ledger.get(job_id)
    if job.state is not JobState.HELD:  # else they wait for a person, not for a time
        waited(all_tried, timeout_s)
    found = told_of(ledger.deliveries(job_id), unnamed)
    if found.left:
        released = f"dicom-node jobs release {job_id[:8]}; " if job.state is JobState.HELD else ""
        again = f"dicom-node doctor --retire-study {job.info.accession}"
        raise StepFailed(str(found), f"{released}does the archive take Key Object Selections? then again: {again}")
    if not (found.retired or found.in_doubt):
        return f"nothing to retire: {found}"
    return f"{found}. {REASON.document_title.meaning}: an archive that heeds IHE IOCM hides what is retired"


def _check_ended(job: Job) -> None:
    """Raises StepFailed for a job that still goes on to have a result."""
    if job.state not in STOPPABLE | {JobState.REJECTED}:
        text = f"nothing is retired yet: the job is {job.state.value}, and its result will be sent when it is there"
        again = f"once it is sent: dicom-node doctor --retire-study {job.info.accession}"
        raise StepFailed(text, f"dicom-node jobs cancel {job.id[:8]}; or, {again}")


def _reject(config: Config, ledger: Ledger, job: Job, places: Sequence[str]) -> tuple[str, ...]:
    """Open the notes; a sentence for each series that none could be written for."""
    title = REASON.document_title
    told = {"code": title.value, "meaning": title.meaning, "time": utc_now().isoformat()}
    done = reject(
        ledger,
        Spool(config.storage.root, min_free_bytes=0),
        job,
        reason=REASON,
        description="TEST of the node on a generated phantom: retired",
        code="test_retired",
        text=f"the test study is retired at {', '.join(places)}",
        destinations=places,
        details={RECALLED_AT: {**dict.fromkeys(places, told), **(job.details.get(RECALLED_AT) or {})}},
    )
    return done.unnamed


def told_of(deliveries: Sequence[Delivery], unnamed: Sequence[str] = ()) -> Told:
    """What the ledger says of each series of a test; `unnamed` are sentences about those that have no note."""
    notes = {(one.destination, one.encoding): one for one in deliveries if one.kind == REJECTION}
    retired: list[tuple[str, str]] = []
    in_doubt: list[tuple[str, str]] = []
    never_there: list[tuple[str, str]] = []
    left = [(text, "") for text in unnamed]
    for one in deliveries:
        if one.kind == REJECTION:
            continue
        name, place = f"{one.kind} ({one.encoding})", f" at {one.destination}"
        note = notes.get((one.destination, note_encoding(one, REASON)))
        if note is not None and note.state in PROOF_STATES:
            (retired if one.sent or one.state in PROOF_STATES else in_doubt).append((name, place))
        elif note is not None:
            left.append((name, f"{place}: {_why(note)}"))
        elif not any(name in text for text in unnamed):
            never_there.append((name, place))
    return Told(retired=tuple(retired), in_doubt=tuple(in_doubt), left=tuple(left), never_there=tuple(never_there))


def _why(note: Delivery) -> str:
    """Why a note has not arrived."""
    waits = note.state in WAITING_DELIVERIES
    reason = f"{note.reason_code}: {note.reason}" if note.reason_code else f"its note is {note.state.value}"
    return f"{reason}; the node goes on trying" if waits else reason
