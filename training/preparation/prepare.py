"""From a folder of FDG-PET/CT studies to volumes that training reads: `dicom-node train prepare`.

What `training.prepared` describes is written study by study, the manifest last. Killed anywhere, the same call goes
on: a study that was made of the same files in the same way, and whose arrays are whole, is not made again.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.districts import SEGMENTERS
from pipeline.errors import PipelineError
from training.cases.metadata import TABLE
from training.cases.types import Cohort, Study, StudyVolumes
from training.errors import DataError, StudyError
from training.preparation.engines import Engine, Run, check_engine, started
from training.preparation.outputs import (
    StudyFile,
    WriteFailed,
    check_not_foreign,
    check_space,
    input_digest,
    locked,
    read_finished,
    read_manifest,
    remove_study,
    write_arrays,
    write_bytes,
)
from training.preparation.review import PAGE, PICTURES, review_page, write_picture
from training.preparation.split import split_studies
from training.preparation.statistics import pooled_statistics
from training.preparation.study import GIVEN, Prepared, Triple, prepare_volumes, same_spacing
from training.prepared import MANIFEST, STUDY, PreparedManifest, RefusedStudy, StudyRecord
from training.recipe import Recipe

REASONS_SHOWN = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareProgress:
    """So many of all studies are done (or, in the stage "find", files looked at).

    `study` is the last one, `refused` says why it was, `kept` that it had been prepared before.
    """

    stage: Literal["find", "prepare"] = "prepare"
    done: int
    total: int
    study: str = ""
    refused: str = ""
    kept: bool = False


OnPrepareProgress = Callable[[PrepareProgress], None]
ReadStudy = Callable[[Study], StudyVolumes]


def prepare(
    data: Path,
    out: Path,
    recipe: Recipe,
    *,
    workers: int = 2,
    engine: Engine = "processes",
    on_progress: OnPrepareProgress = lambda _: None,
) -> PreparedManifest:
    """Prepare every study of a cohort that can be used.

    Args:
        data: the cohort, in one of the published layouts (`training.cases`).
        out: a new folder, or the one of an earlier call with a recipe that prepares in the same way.
        recipe: its `normalization`, `prepare` and `split` are read.
        workers: studies at a time, each with one thread.
        engine: "processes", or "ray": on Ray's cluster (RAY_ADDRESS) or its local processes.
        on_progress: told after every study.

    Raises:
        DataError: data_missing, data_unknown, data_unusable (not one study can be used), prepared_foreign,
            prepared_busy, no_space, cannot_write, engine_missing, worker_died, split_leaks, unknown_segmenter.
    """
    from training.cases import find_studies, read_study

    check_before(recipe, engine)
    cohort = find_studies(data, lambda done, total: on_progress(PrepareProgress(stage="find", done=done, total=total)))
    return prepare_cohort(cohort, out, recipe, read=read_study, workers=workers, engine=engine, on_progress=on_progress)


def check_before(recipe: Recipe, engine: Engine) -> None:
    """What can be refused before a file is read."""
    check_engine(engine)
    split_studies([], recipe.split, recipe.profile)
    if unknown := [name for name in recipe.prepare.districts if name not in (GIVEN, *SEGMENTERS)]:
        text = f"prepare.districts of recipe {recipe.name}: no segmenter {unknown[0]!r}"
        raise DataError("unknown_segmenter", f"{text}, there are {[GIVEN, *sorted(SEGMENTERS)]}")


def prepare_cohort(
    cohort: Cohort,
    out: Path,
    recipe: Recipe,
    *,
    read: ReadStudy,
    workers: int = 2,
    engine: Engine = "processes",
    on_progress: OnPrepareProgress = lambda _: None,
) -> PreparedManifest:
    """`prepare` for a cohort that was found already; `read` must be a function of a module, to be sent to workers."""
    check_before(recipe, engine)
    with locked(out):
        check_not_foreign(out, recipe)
        check_space(out, cohort, recipe)
        outcomes = _prepare_all(cohort, out, recipe, read, workers, engine, on_progress)
        files, refused = _sorted_out(outcomes, cohort, out, recipe)
        if not files:
            raise DataError("data_unusable", _all_refused(refused))
        try:
            return _finish(files, refused, cohort, out, recipe)
        except WriteFailed as error:
            raise _stopped(out, error.code, error.reason) from error


# --- one study, in a worker ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What a worker needs for one study. `spacing_mm`: what the PET must have, None for anything."""

    study: Study
    out: Path
    recipe: Recipe
    read: ReadStudy
    spacing_mm: Triple | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What became of a study: a file, a refusal, or an end to all work (code and reason)."""

    study: str
    file: StudyFile | None = None
    refused: RefusedStudy | None = None
    stopped: tuple[str, str] | None = None
    kept: bool = False


def do(task: Task) -> Outcome:
    """Prepare one study unless it is there; errors come back as outcomes, so that one study never ends the others."""
    name = task.study.id
    try:
        return _do(task)
    except WriteFailed as error:
        if not (task.out / "studies" / name / STUDY).is_file():
            remove_study(task.out, name)
        return Outcome(study=name, stopped=(error.code, error.reason))
    except (StudyError, PipelineError) as error:
        refused = RefusedStudy(study=name, code=error.code, text=error.text)
    except Exception as error:  # the worker's edge: a study that a reader did not foresee must not end the others
        # the error's own text is left out, it may quote a header
        where = sys.exc_info()[2]
        while where is not None and where.tb_next is not None:
            where = where.tb_next
        place = f"{Path(where.tb_frame.f_code.co_filename).name}:{where.tb_lineno}" if where else "?"
        text = f"{type(error).__name__} at {place}: a fault of this program or a file that it did not foresee"
        refused = RefusedStudy(study=name, code="unexpected", text=text)
    remove_study(task.out, name)
    return Outcome(study=name, refused=refused)


def _do(task: Task) -> Outcome:
    study, folder = task.study, task.out / "studies" / task.study.id
    picture = task.out / PICTURES / f"{study.id}.png"
    try:
        inputs = input_digest(study)
    except OSError as error:
        raise StudyError("files_missing", f"a file of the study cannot be read: {error.strerror}") from error
    found = read_finished(folder, prepare_digest=task.recipe.prepare_digest, inputs=inputs)
    if found is not None:
        _check_spacing(found.record, task)
        current = found.model_copy(update={"record": found.record.model_copy(update=_of_patient(study, found.record))})
        if current != found:
            write_bytes(folder / STUDY, current.model_dump_json(indent=1).encode())
        if not picture.is_file():
            write_picture(folder, current.record, picture)
        return Outcome(study=study.id, file=current, kept=True)
    volumes = task.read(study)
    prepared = prepare_volumes(volumes, task.recipe, spacing_mm=task.spacing_mm)
    files = write_arrays(folder, prepared.arrays)
    record = _record(study, volumes, prepared, files)
    write_picture(folder, record, picture)
    made = StudyFile(
        prepare_digest=task.recipe.prepare_digest,
        input_digest=inputs,
        record=record,
        statistics=prepared.statistics,
    )
    write_bytes(folder / STUDY, made.model_dump_json(indent=1).encode())
    return Outcome(study=study.id, file=made)


def _check_spacing(record: StudyRecord, task: Task) -> None:
    """A study of an earlier call, when the first study is another one now."""
    if task.spacing_mm is not None and not same_spacing(record.spacing_mm, task.spacing_mm):
        text = f"voxels of {record.spacing_mm} mm, the first study's are {task.spacing_mm}"
        raise StudyError("spacing_differs", f"{text}; set prepare.spacing_mm in the recipe to resample both")


def _of_patient(study: Study, record: StudyRecord) -> dict[str, object]:
    """What the metadata table says; it may be mended without preparing again, and its complaints go with it."""
    notes = tuple(dict.fromkeys((*study.notes, *(note for note in record.notes if TABLE not in note))))
    return {"patient": study.patient, "diagnosis": study.diagnosis, "age": study.age, "sex": study.sex, "notes": notes}


def _record(study: Study, volumes: StudyVolumes, prepared: Prepared, files: Mapping[str, str]) -> StudyRecord:
    grid = prepared.grid
    return StudyRecord(
        id=study.id,
        patient=study.patient,
        diagnosis=study.diagnosis,
        age=study.age,
        sex=study.sex,
        shape=grid.shape,
        spacing_mm=grid.spacing_mm,
        origin_mm=grid.origin_mm,
        files=dict(files),
        segmenter=prepared.segmenter,
        registration=prepared.registration,
        suv=dict(volumes.suv_details),
        notes=tuple(dict.fromkeys((*study.notes, *prepared.notes))),
    )


# --- all of them --------------------------------------------------------------------------------------------------


def _prepare_all(
    cohort: Cohort,
    out: Path,
    recipe: Recipe,
    read: ReadStudy,
    workers: int,
    engine: Engine,
    on_progress: OnPrepareProgress,
) -> list[Outcome]:
    """Every study's outcome. Without a spacing in the recipe the first usable study goes ahead: it sets everyone's."""
    outcomes: list[Outcome] = []
    todo = sorted(cohort.studies, key=lambda study: study.id)
    spacing = recipe.prepare.spacing_mm

    def listen(run: Run, studies: Sequence[Study]) -> None:
        tasks = [Task(study=s, out=out, recipe=recipe, read=read, spacing_mm=spacing) for s in studies]
        for outcome in run(do, tasks):
            if outcome.stopped is not None:
                raise _stopped(out, *outcome.stopped)
            outcomes.append(outcome)
            reason = outcome.refused.text if outcome.refused else ""
            on_progress(
                PrepareProgress(
                    done=len(outcomes),
                    total=len(cohort.studies),
                    study=outcome.study,
                    refused=reason,
                    kept=outcome.kept,
                )
            )

    on_progress(PrepareProgress(done=0, total=len(cohort.studies)))
    with started(engine, min(workers, len(todo))) as run:
        while spacing is None and todo:
            listen(run, [todo.pop(0)])
            if outcomes[-1].file is not None:
                spacing = outcomes[-1].file.record.spacing_mm
        listen(run, todo)
    return outcomes


def _stopped(out: Path, code: str, reason: str) -> DataError:
    """What ends the work: no file can be written any more."""
    what = "the disk is full" if code == "no_space" else "a file cannot be written"
    advice = "free some space" if code == "no_space" else "see to the folder"
    return DataError(code, f"{out}: {what} ({reason}); {advice}, and the same command goes on where this one ended")


def _sorted_out(
    outcomes: Sequence[Outcome], cohort: Cohort, out: Path, recipe: Recipe
) -> tuple[list[StudyFile], tuple[RefusedStudy, ...]]:
    """Files with their side of the split, and all refusals, both by id."""
    files = sorted((o.file for o in outcomes if o.file), key=lambda file: file.record.id)
    refused = [*cohort.refused, *(o.refused for o in outcomes if o.refused)]
    split = split_studies([file.record for file in files], recipe.split, recipe.profile)
    sided = [f.model_copy(update={"record": f.record.model_copy(update={"split": split[f.record.id]})}) for f in files]
    for study in refused:
        (out / PICTURES / f"{Path(study.study).name}.png").unlink(missing_ok=True)
    return sided, tuple(sorted(refused, key=lambda study: study.study))


def _all_refused(refused: Sequence[RefusedStudy]) -> str:
    lines = [f"{study.study}: {study.text}" for study in refused[:REASONS_SHOWN]]
    more = f"; and {len(refused) - len(lines)} more" if len(refused) > len(lines) else ""
    return f"not one of {len(refused)} studies can be used: {'; '.join(lines)}{more}"


def _finish(
    files: Sequence[StudyFile], refused: tuple[RefusedStudy, ...], cohort: Cohort, out: Path, recipe: Recipe
) -> PreparedManifest:
    """The page of pictures, then the manifest: whoever sees it may read everything else."""
    earlier = read_manifest(out)
    manifest = PreparedManifest(
        # another recipe that prepares in the same way must not change the digest that runs were made with
        recipe=earlier.recipe if earlier else recipe.name,
        prepare_digest=recipe.prepare_digest,
        layout=cohort.layout,
        phantom=cohort.phantom,
        spacing_mm=files[0].record.spacing_mm,
        organ_names=cohort.organ_names,
        studies=tuple(file.record for file in files),
        refused=refused,
        statistics=pooled_statistics(file.statistics for file in files if file.record.split == "train"),
    )
    write_bytes(out / PAGE, review_page(manifest).encode())
    write_bytes(out / MANIFEST, (manifest.model_dump_json(indent=1) + "\n").encode())
    return manifest
