"""A cohort of phantoms on disk, in one of the published layouts: what the loaders, and everything after, run on.

OUT/.cohort/arguments.json   what was asked for; another request is refused
OUT/.cohort/<study>.json     a study that is whole: written last, so an interrupted cohort goes on
OUT/dataset.json             "phantom": true; written last of all
"""

from __future__ import annotations

import csv
import errno
import io
import json
import multiprocessing
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from training.cases.types import Layout
from training.errors import DataError
from training.files import write_whole
from training.phantom.dicom import study_uid
from training.phantom.layouts import COLLECTION, WRITERS, Scanned, Series, paint_study, series_of
from training.phantom.plan import DESCRIPTION, PlannedStudy, plan_cohort
from training.phantom.tissues import FIRST_OUTSIDE_BODY, NAMES

STATE = ".cohort"
TABLE = "Clinical Metadata FDG PET_CT Lesions.csv"
# The columns of the collection's clinical table, in its order; what does not apply to a phantom stays empty.
COLUMNS = (
    "Series UID",
    "Collection",
    "3rd Party Analysis",
    "Data Description URI",
    "Subject ID",
    "Study UID",
    "Study Description",
    "Study Date",
    "Series Description",
    "Manufacturer",
    "Modality",
    "SOP Class Name",
    "SOP Class UID",
    "Number of Images",
    "File Size",
    "File Location",
    "Series Number",
    "License Name",
    "License URL",
    "Annotation Size",
    "diagnosis",
    "age",
    "sex",
)
README = """Computed phantoms, not patients
===============================

{cases} FDG-PET/CT studies, drawn and painted by `dicom-node train phantom --cases {cases} --layout {layout}
--seed {seed}` in the layout in which the collection FDG-PET-CT-Lesions is published, so that the same programs read
both. Anatomy, uptake, names, dates, ages and diagnoses are made up; no person was scanned. What is learned or measured
here says nothing about patients.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Arguments:
    """What makes a cohort what it is; how many processes wrote it does not."""

    cases: int
    layout: Layout
    seed: int
    spacing_mm: tuple[float, float, float]
    ct_pixel_mm: float


@dataclass(frozen=True, kw_only=True, slots=True)
class CohortSummary:
    """What a finished cohort holds."""

    studies: int
    patients: int
    diagnoses: dict[str, int]  # studies by diagnosis
    size_bytes: int


def write_cohort(
    out: Path,
    *,
    cases: int,
    layout: Layout,
    seed: int = 1000,
    spacing_mm: tuple[float, float, float] = (4.0, 4.0, 4.0),
    ct_pixel_mm: float = 2.0,
    workers: int = 2,
    on_progress: Callable[[int, int], None] = lambda *_: None,
) -> None:
    """Write `cases` studies of phantoms into `out`; called again, it goes on where it was interrupted.

    Args:
        out: a new folder, or the unfinished cohort of the same arguments.
        cases: studies; about one patient in eight has two.
        layout: tcia, nifti or nnunet.
        seed: the same seed gives the same bytes; other seeds give other persons.
        spacing_mm: of the PET (z, y, x); the CT has the same slices.
        ct_pixel_mm: of the CT in the plane (nnunet: before it is resampled to the PET).
        workers: processes; 1 stays in this one.
        on_progress: called with studies done and all studies, also for those that were there.

    Raises:
        DataError: cohort_arguments (values that cannot be), cohort_other (the folder holds something else),
            no_space, cannot_write.
    """
    arguments = Arguments(cases=cases, layout=layout, seed=seed, spacing_mm=spacing_mm, ct_pixel_mm=ct_pixel_mm)
    _check(arguments, workers)
    _claim(out, arguments)
    plans = plan_cohort(cases, seed, spacing_mm)
    waiting = [plan for plan in plans if not _is_whole(out, plan)]
    done = cases - len(waiting)
    on_progress(done, cases)
    try:
        for _ in _written(out, waiting, arguments, workers):
            done += 1
            on_progress(done, cases)
        _finish(out, plans, arguments)
    except OSError as error:
        code = "no_space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "cannot_write"
        text = f"{out}: a file cannot be written ({error.strerror}); the same command goes on where this one ended"
        raise DataError(code, text) from error


def read_summary(out: Path) -> CohortSummary:
    """Count what `write_cohort` left in `out`."""
    records = [json.loads(path.read_text()) for path in sorted((out / STATE).glob("study-*.json"))]
    return CohortSummary(
        studies=len(records),
        patients=len({record["subject"] for record in records}),
        diagnoses=dict(Counter(record["diagnosis"] for record in records)),
        size_bytes=sum(path.stat().st_size for path in out.rglob("*") if path.is_file()),
    )


def _check(arguments: Arguments, workers: int) -> None:
    if arguments.layout not in WRITERS:
        text = f"layout {arguments.layout!r} is not one of {', '.join(WRITERS)}"
    elif not 1 <= arguments.cases <= 9999:
        text = f"{arguments.cases} cases: 1 to 9999 are possible"
    elif arguments.seed < 0 or workers < 1:
        text = f"seed {arguments.seed} must not be negative and there must be a worker, not {workers}"
    elif min(*arguments.spacing_mm, arguments.ct_pixel_mm) <= 0:
        text = f"spacing {arguments.spacing_mm} mm and CT pixel {arguments.ct_pixel_mm} mm must be positive"
    else:
        return
    raise DataError("cohort_arguments", f"cohort of phantoms: {text}")


def _claim(out: Path, arguments: Arguments) -> None:
    """Take a new folder, or go on in one that was taken with the same arguments."""
    path = out / STATE / "arguments.json"
    wanted = json.loads(json.dumps(asdict(arguments)))
    if path.is_file():
        found = json.loads(path.read_text())
        if found != wanted:
            other = ", ".join(f"{k} {found.get(k)!r}" for k in wanted if found.get(k) != wanted[k])
            raise DataError("cohort_other", f"{out}: is a cohort of phantoms with other arguments ({other})")
        shutil.rmtree(out / STATE / "partial", ignore_errors=True)
        return
    if out.exists() and (not out.is_dir() or any(p.name != STATE for p in out.iterdir())):
        raise DataError("cohort_other", f"{out}: is not empty, and not an unfinished cohort of phantoms")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(wanted, indent=1).encode())


def _record_path(out: Path, plan: PlannedStudy) -> Path:
    return out / STATE / f"study-{plan.index:04d}.json"


def _is_whole(out: Path, plan: PlannedStudy) -> bool:
    path = _record_path(out, plan)
    return path.is_file() and all((out / place).exists() for place in json.loads(path.read_text())["places"])


def _written(out: Path, plans: Sequence[PlannedStudy], arguments: Arguments, workers: int) -> Iterator[None]:
    """Write the studies, one item for each that is done."""
    if workers == 1 or len(plans) < 2:
        for plan in plans:
            write_study(out, plan, arguments)
            yield
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(plans)), context, _leave_interrupts_to_the_parent) as pool:
        jobs = [pool.submit(write_study, out, plan, arguments) for plan in plans]
        try:
            for job in as_completed(jobs):
                job.result()
                yield
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _leave_interrupts_to_the_parent() -> None:
    """Ctrl-C reaches the whole group; the studies that are being written end whole, the others do not begin."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def write_study(out: Path, plan: PlannedStudy, arguments: Arguments) -> None:
    """Paint and write one study: into a temporary folder, then moved to its place, then its record."""
    scanned = paint_study(plan, arguments.ct_pixel_mm)
    partial = out / STATE / "partial" / f"{plan.index:04d}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    places = WRITERS[arguments.layout](scanned, partial, _manifest(arguments))
    for place in places:
        target = out / place
        if target.is_dir():  # moved there before an interruption, and its record was not written
            shutil.rmtree(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        (partial / place).replace(target)
    shutil.rmtree(partial)
    record = {
        "subject": plan.subject,
        "diagnosis": plan.diagnosis,
        "places": places,
        "rows": [_row(scanned, series) for series in series_of(scanned)],
    }
    write_whole(_record_path(out, plan), json.dumps(record, indent=1).encode())


def _manifest(arguments: Arguments) -> str:
    return f"manifest-{1_600_000_000_000 + arguments.seed}"


def _row(scanned: Scanned, series: Series) -> dict[str, Any]:
    plan = scanned.plan
    folder = f"{series.number}.000000-{series.description}-{series.uid[-5:]}"
    return {
        "Series UID": series.uid,
        "Collection": COLLECTION,
        "Subject ID": f"PETCT_{plan.subject}",
        "Study UID": study_uid(scanned.phantom),
        "Study Description": DESCRIPTION,
        "Study Date": f"{plan.scanned:%m-%d-%Y}",
        "Series Description": series.description,
        "Manufacturer": "PHANTOM",
        "Modality": series.modality,
        "Number of Images": series.images,
        "File Location": f"./{COLLECTION}/PETCT_{plan.subject}/{scanned.study}/{folder}",
        "Series Number": series.number,
        "diagnosis": plan.diagnosis.upper(),
        "age": f"{plan.age_years:03d}Y",
        "sex": plan.sex,
    }


def _finish(out: Path, plans: Sequence[PlannedStudy], arguments: Arguments) -> None:
    """The table, the read-me, names of organs, and dataset.json at the root."""
    rows = [row for plan in plans for row in json.loads(_record_path(out, plan).read_text())["rows"]]
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, COLUMNS, restval="")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(out / TABLE, table.getvalue().encode())
    write_whole(out / "README.txt", README.format(**asdict(arguments)).encode())
    if arguments.layout == "nifti":
        organs = {str(label): name for label, name in enumerate(NAMES[:FIRST_OUTSIDE_BODY]) if label}
        write_whole(out / "organs.json", json.dumps(organs, indent=1).encode())
    shutil.rmtree(out / STATE / "partial", ignore_errors=True)
    write_whole(out / "dataset.json", json.dumps(_dataset(arguments), indent=1).encode())


def _dataset(arguments: Arguments) -> dict[str, Any]:
    ours = {"phantom": True, "description": "Computed phantoms, not patients.", "seed": arguments.seed}
    if arguments.layout != "nnunet":
        return {"name": COLLECTION, **ours, "numTraining": arguments.cases}
    return {
        "name": COLLECTION,
        "channel_names": {"0": "CT", "1": "SUV"},
        "labels": {"background": 0, "tumor": 1},
        "numTraining": arguments.cases,
        "file_ending": ".nii.gz",
        **ours,
    }
