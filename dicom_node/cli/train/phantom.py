"""`dicom-node train phantom`: a cohort of computed patients in a published layout, or one patient as DICOM."""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from dicom_node.cli.common import ArmPose, console, console_err, fail, progress_bar, safe
from dicom_node.cli.train import app
from dicom_node.cli.train.common import refused

FIELD_OF_VIEW_MM = 500.0
PET_PIXEL_MM = 4.0
COHORT_SEED, PATIENT_SEED = 1000, 1
PATIENT_ONLY = ("pose", "slice_mm", "matrix", "low", "high")
COHORT_ONLY = ("layout", "ct_pixel_mm", "spacing_mm", "workers")


class LayoutChoice(StrEnum):
    """What `--layout` takes (training.cases.Layout)."""

    TCIA = "tcia"
    NIFTI = "nifti"
    NNUNET = "nnunet"


@app.command("phantom")
def phantom(
    context: typer.Context,
    folder: Annotated[
        Path | None, typer.Argument(metavar="[OUT]", help="A new folder (for one patient: CT/, PET/ and SEG/).")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="The same as OUT.")] = None,
    cases: Annotated[
        int | None, typer.Option(min=1, max=9999, help="Write a cohort of so many studies; without it, one patient.")
    ] = None,
    layout: Annotated[
        LayoutChoice,
        typer.Option(help="Cohort: DICOM as downloaded (tcia), its conversion (nifti), or the challenge's (nnunet)."),
    ] = LayoutChoice.NIFTI,
    seed: Annotated[
        int | None,
        typer.Option(min=0, help="The same seed gives the same persons; 1 for a patient, 1000 for a cohort."),
    ] = None,
    ct_pixel_mm: Annotated[float, typer.Option(min=0.5, max=10.0, help="Cohort: pixels of the CT.")] = 2.0,
    spacing_mm: Annotated[float, typer.Option(min=1.0, max=12.0, help="Cohort: voxels of the PET, and slices.")] = 4.0,
    workers: Annotated[int, typer.Option(min=1, help="Cohort: studies that are painted at the same time.")] = 2,
    pose: Annotated[ArmPose, typer.Option(help="One patient: the arms.")] = ArmPose.SIDES,
    slice_mm: Annotated[
        float, typer.Option(min=1.0, max=10.0, help="One patient: slice spacing of the CT in mm.")
    ] = 4.0,
    matrix: Annotated[int, typer.Option(min=64, max=1024, help="One patient: rows and columns of the CT.")] = 512,
    low: Annotated[
        float, typer.Option(min=0.0, max=0.9, help="One patient: foot end of the scan, as part of the height.")
    ] = 0.0,
    high: Annotated[
        float, typer.Option(min=0.1, max=1.0, help="One patient: head end of the scan, as part of the height.")
    ] = 1.0,
) -> None:
    """Write computed patients: with --cases a cohort with diagnoses, lesions and repeat studies, else one as DICOM.

    A cohort is laid out as the FDG-PET-CT-Lesions collection is published, so `train prepare` reads both alike. Half
    of its patients are negative, one in eight comes twice, and scans cover the body in part. Interrupted, the same
    command goes on. No person was scanned: what is measured on phantoms says nothing about patients.
    """
    target = folder or out
    if target is None or (folder and out):
        raise fail("name the new folder once, as OUT or with --out", code=2)
    given = [name for name in context.params if _given(context, name)]
    strange = [name for name in given if name in (COHORT_ONLY if cases is None else PATIENT_ONLY)]
    if strange:
        options = ", ".join("--" + name.replace("_", "-") for name in strange)
        text = f"{options}: only for a cohort (--cases)" if cases is None else f"{options}: only without --cases"
        raise fail(text, code=2)
    if cases is None:
        _one_patient(target, PATIENT_SEED if seed is None else seed, pose, slice_mm, matrix, low, high)
        return
    cohort_seed = COHORT_SEED if seed is None else seed
    with refused():
        _cohort(target, cases, layout, cohort_seed, spacing_mm, ct_pixel_mm, workers)


def _given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _cohort(
    out: Path, cases: int, layout: LayoutChoice, seed: int, spacing_mm: float, ct_pixel_mm: float, workers: int
) -> None:
    from training.errors import DataError
    from training.phantom.cohort import read_summary, write_cohort

    with progress_bar() as bar:
        task = bar.add_task("studies", total=cases)

        def on_progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        try:
            write_cohort(
                out,
                cases=cases,
                layout=layout.value,
                seed=seed,
                spacing_mm=(spacing_mm,) * 3,
                ct_pixel_mm=ct_pixel_mm,
                workers=workers,
                on_progress=on_progress,
            )
        except DataError as error:
            raise fail(str(error), code=2 if error.code in ("cohort_arguments", "cohort_other") else 1) from error
    held = read_summary(out)
    diagnoses = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in sorted(held.diagnoses.items()))
    console.print(safe(f"{held.studies} studies of {held.patients} patients ({diagnoses})"))
    console.print(safe(f"{held.size_bytes / 1e9:.2f} GB in {out}, layout {layout.value}"))


def _one_patient(out: Path, seed: int, pose: ArmPose, slice_mm: float, matrix: int, low: float, high: float) -> None:
    """CT, its true PET (BQML), and the districts (SEG)."""
    if out.exists() and any(out.iterdir()):
        raise fail(f"{out}: is not empty", code=2)
    if high - low < 0.05:
        raise fail("--low must be at least 0.05 under --high", code=2)
    from training.phantom import PhantomSpec, make_phantom
    from training.phantom.dicom import write_ct_series, write_pet_series
    from training.phantom.segments import write_seg

    pixel_mm = FIELD_OF_VIEW_MM / matrix
    spec = PhantomSpec(seed=seed, pose=pose.value, coverage=(low, high), spacing_mm=(slice_mm, pixel_mm, pixel_mm))
    with console_err.status("painting the CT"):
        ct = write_ct_series(make_phantom(spec), out / "CT", matrix=None)
    with console_err.status("painting the PET and the districts"):
        coarse = make_phantom(replace(spec, spacing_mm=(slice_mm, PET_PIXEL_MM, PET_PIXEL_MM)))
        pet = write_pet_series(coarse, out / "PET")
        write_seg(coarse, out / "SEG", ct)
    console.print(safe(f"{len(ct)} CT and {len(pet)} PET slices, and the districts as SEG, in {out}"))
