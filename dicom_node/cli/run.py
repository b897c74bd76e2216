"""`dicom-node run CT_FOLDER OUT_FOLDER`: the node's own pipeline, offline."""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from dicom_node.cli.common import (
    DEFAULT_CONFIG,
    ConfigPath,
    bundle_folders,
    console,
    fail,
    node_config,
    print_outcome,
    progress_bar,
    safe,
)
from pipeline.types import DistrictOptions, GateOptions, OutputOptions, PipelineOptions, Progress, Stage


class Encodings(StrEnum):
    """What `--encoding` takes."""

    SC = "sc"
    PET = "pet"
    BOTH = "both"


class Blending(StrEnum):
    """What `--blending` takes."""

    BUNDLE = "bundle"
    MEAN = "mean"
    GAUSSIAN = "gaussian"


class Stitching(StrEnum):
    """What `--stitching` takes."""

    BUNDLE = "bundle"
    HARD = "hard"
    FEATHERED = "feathered"


def run(
    ct_folder: Annotated[
        Path, typer.Argument(help="A folder with a CT series; of several series the one with the largest coverage.")
    ],
    out_folder: Annotated[Path, typer.Argument(help="Where the result goes; must not exist, or be empty.")],
    bundle: Annotated[str, typer.Option(help="A shipped or installed bundle's name, or a folder.")] = "phantom",
    encoding: Annotated[Encodings, typer.Option(help="Secondary capture, PET Image Storage, or both.")] = Encodings.SC,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1")] = "auto",
    blending: Annotated[Blending, typer.Option(help="How windows overlap; bundle: as trained.")] = Blending.BUNDLE,
    stitching: Annotated[Stitching, typer.Option(help="How districts meet; bundle: as trained.")] = Stitching.BUNDLE,
    min_coverage_mm: Annotated[
        float, typer.Option(min=0.0, help="Refuse a shorter scan; the node's own limit is \\[gate] min_coverage_mm.")
    ] = 30.0,
    districts: Annotated[
        list[str] | None,
        typer.Option(help="A segmenter of head, trunk, arms and legs; several are tried in order. Default: builtin."),
    ] = None,
    mip: Annotated[bool, typer.Option("--mip/--no-mip", help="Also write the MIP picture as DICOM.")] = True,
    seg: Annotated[bool, typer.Option("--seg/--no-seg", help="Also write the districts as a DICOM SEG.")] = False,
    uncertainty: Annotated[
        bool, typer.Option("--uncertainty/--no-uncertainty", help="Also write how far the SUV changes under flips.")
    ] = False,
    sr: Annotated[bool, typer.Option("--sr/--no-sr", help="Also write a measurement report (TID 1500 SR).")] = False,
    presentation_states: Annotated[
        bool,
        typer.Option("--presentation-states/--no-presentation-states", help="Also write inverse gray and hot iron."),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier result in OUT_FOLDER.")] = False,
    config: ConfigPath = DEFAULT_CONFIG,
) -> None:
    r"""Make a SYNTHETIC PET series from a folder of CT, without a network and without a ledger.

    Of the configuration it is read where installed bundles are, the settings of the segmenters, and `\[gate]`.
    `--districts dicom_seg` takes the districts from a SEG in CT_FOLDER that refers to the CT.
    Writes pet-sc/ and/or pet-pet/ (DICOM), mip-sc/, uncertainty-sc/, seg-*/, sr-*/, gsps-*/ and pcps-*/ (one for each
    encoding of the PET), overview.png and result.json into OUT_FOLDER.
    """
    from pipeline.bundle import bundle_path, load_bundle
    from pipeline.ct_reader import choose_ct
    from pipeline.run import synthesize_series, write_result

    if not ct_folder.is_dir():
        raise fail(f"{ct_folder}: no such folder", code=2)
    _refuse_occupied(out_folder, force)
    folder = bundle_path(bundle, *bundle_folders(config))
    options = PipelineOptions(
        bundle=folder,
        device=device,
        blending=blending.value,
        stitching=stitching.value,
        gate=_gate_options(config, min_coverage_mm),
        districts=_district_options(config, tuple(districts or ("builtin",)), ct_folder, device),
        output=OutputOptions(
            encodings=("sc", "pet") if encoding is Encodings.BOTH else (encoding.value,),
            mip=mip,
            seg=seg,
            uncertainty=uncertainty,
            sr=sr,
            presentation_states=presentation_states,
        ),
    )
    paths = choose_ct(ct_folder)
    console.print(safe(f"{len(paths)} CT slices"))
    with progress_bar() as bar:
        result = synthesize_series(
            paths, load_bundle(folder), options, created=datetime.now(UTC), on_progress=StageBars(bar)
        )
    if out_folder.exists():
        shutil.rmtree(out_folder)
    write_result(result, out_folder)
    stats = [{**asdict(row), "district": row.district.key} for row in result.stats]
    print_outcome(result.stage_seconds, stats, result.notes)
    console.print(safe(f"written: {out_folder} (look at {out_folder / 'overview.png'})"))
    if result.held:
        raise fail(f"a gate would hold this result: {result.held.code}: {result.held.text}")


def _gate_options(config: Path, min_coverage_mm: float) -> GateOptions:
    """The node's own gates, but for the coverage."""
    from dicom_node.worker import pipeline_options

    return replace(pipeline_options(node_config(config)).gate, min_coverage_mm=min_coverage_mm)


def _district_options(config: Path, chain: tuple[str, ...], ct_folder: Path, device: str) -> DistrictOptions:
    """The node's own settings of the segmenters, for the chain that was asked for."""
    from dicom_node.worker import pipeline_options
    from pipeline.districts import SEGMENTERS
    from pipeline.districts.seg_object import find_segmentations

    unknown = [name for name in chain if name not in SEGMENTERS]
    if unknown:
        raise fail(f"--districts {unknown[0]}: there are {', '.join(SEGMENTERS)}", code=2)
    return replace(
        pipeline_options(node_config(config)).districts,
        chain=chain,
        device=device,
        segmentations=find_segmentations(ct_folder) if "dicom_seg" in chain else (),
    )


def _refuse_occupied(folder: Path, force: bool) -> None:
    """Only an empty folder, or with --force one that holds a result of ours, is ever replaced."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise fail(f"{folder}: is not a folder", code=2)
    if any(folder.iterdir()) and not (force and (folder / "result.json").is_file()):
        raise fail(f"{folder}: is not empty; name another folder, or --force to replace an earlier result", code=2)


class StageBars:
    """Turns the pipeline's progress into one bar per stage."""

    def __init__(self, bar: object) -> None:
        from rich.progress import Progress as RichProgress

        assert isinstance(bar, RichProgress)
        self._bar = bar
        self._tasks: dict[Stage, int] = {}

    def __call__(self, progress: Progress) -> None:
        if progress.stage not in self._tasks:
            self._tasks[progress.stage] = self._bar.add_task(progress.stage.value, total=None)
        task = self._bar.tasks[self._tasks[progress.stage]].id
        name = f"{progress.stage.value} {progress.text}".strip()
        self._bar.update(task, description=name[:40], completed=progress.done, total=max(progress.total, 1))
