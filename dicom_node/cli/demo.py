"""`dicom-node demo`: the whole way of one study on this machine, over real DICOM associations on loopback."""

from __future__ import annotations

import shutil
import time
from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer
from rich.progress import Progress as RichProgress

from dicom_node.cli.common import ArmPose, console, fail, opened_ledger, progress_bar, safe
from dicom_node.cli.demo_pacs import DemoPacs, PacsError, free_ports, running_pacs
from dicom_node.cli.jobs import print_job
from dicom_node.config import Config, load_config
from storage.records import FINAL_JOB_STATES, Job, JobFilter, JobState

if TYPE_CHECKING:
    from pipeline.types import FloatVolume
    from training.phantom import Phantom, PhantomSpec

NODE_AE = "SYNPET"
PACS_AE = "DEMOPACS"
FIELD_OF_VIEW_MM = 550.0  # room for arms at the sides
JOB_TIMEOUT_S = 1800.0
POLL_S = 0.25


class Coverage(StrEnum):
    """What `--coverage` takes."""

    WHOLE = "whole"
    THIGH = "thigh"


COVERAGES = {"whole": (0.0, 1.0), "thigh": (0.36, 1.0)}


def demo(
    out: Annotated[Path, typer.Option(help="Everything goes here; an earlier demo's folder is replaced.")] = Path(
        "demo-output"
    ),
    pose: Annotated[ArmPose, typer.Option(help="The phantom's arms.")] = ArmPose.SIDES,
    coverage: Annotated[Coverage, typer.Option(help="Head to feet, or head to mid-thigh.")] = Coverage.WHOLE,
    seed: Annotated[int, typer.Option(help="Another seed is another phantom patient.")] = 20_260,
    bundle: Annotated[str, typer.Option(help="A shipped bundle's name, or the folder of a bundle.")] = "phantom",
    matrix: Annotated[int, typer.Option(min=64, max=1024, help="Rows and columns of the CT.")] = 512,
    slice_mm: Annotated[float, typer.Option(min=1.0, max=10.0, help="Slice spacing of the CT in mm.")] = 4.0,
) -> None:
    """Start the node and an embedded PACS on loopback and follow one generated CT study through both.

    The CT goes into the PACS, the PACS routes it to the node by C-MOVE, the node sends the SYNTHETIC PET series back
    into the same study, and the demo reads it from the PACS again. Writes overview.png.
    """
    _fresh(out)
    from training.phantom import PhantomSpec

    spec = PhantomSpec(
        seed=seed,
        pose=pose.value,
        coverage=COVERAGES[coverage],
        spacing_mm=(slice_mm, FIELD_OF_VIEW_MM / matrix, FIELD_OF_VIEW_MM / matrix),
        fov_mm=FIELD_OF_VIEW_MM,
    )
    started = time.monotonic()
    with progress_bar() as bar, ExitStack() as running:
        paths, phantom = _paint(bar, spec, matrix, out)
        node_port, pacs_port = free_ports(2)
        config = _configure(out, node_port=node_port, pacs_port=pacs_port, bundle=bundle)
        pacs = running.enter_context(
            running_pacs(out / "pacs", ae_title=PACS_AE, port=pacs_port, routes={NODE_AE: node_port})
        )
        _start_node(running, config)
        study_uid = _into_pacs(bar, config, paths)
        routing = bar.add_task("PACS routes CT to node", total=len(paths))
        pacs.route(study_uid, NODE_AE, lambda done, total: bar.update(routing, completed=done, total=total))
        job = _follow(bar, config, study_uid)
        got = _read_back(bar, pacs, study_uid, out) if job.state is JobState.DONE else []
    print_job(job)
    if job.state is not JobState.DONE:
        raise fail(f"the job ended {job.state.value}: {job.reason_code}: {job.reason}")
    suv = _suv_from(got)
    console.print(
        f"read back from the PACS: {len(got)} instances, SUV max {float(suv.max()):.2f}, in the CT's own study"
    )
    _draw(paths, suv, phantom, out)
    console.print(safe(f"look at {out / 'overview.png'}   ({time.monotonic() - started:.0f} s in all)"))
    console.print(safe(f"ask the ledger: dicom-node jobs list --config {out / 'config.toml'}"))


def _fresh(out: Path) -> None:
    """An empty folder; only a folder that an earlier demo made is ever removed."""
    if out.exists():
        if any(out.iterdir()) and not (out / "config.toml").is_file():
            raise fail(f"{out}: is not empty and not an earlier demo's; name another folder with --out", code=2)
        shutil.rmtree(out)
    out.mkdir(parents=True)


def _paint(bar: RichProgress, spec: PhantomSpec, matrix: int, out: Path) -> tuple[list[Path], Phantom]:
    from training.phantom import make_phantom
    from training.phantom.dicom import write_ct_series

    task = bar.add_task("paint the phantom's CT", total=1)
    phantom = make_phantom(spec)
    paths = write_ct_series(phantom, out / "ct", matrix=matrix)
    bar.update(task, completed=1)
    return paths, phantom


def _configure(out: Path, *, node_port: int, pacs_port: int, bundle: str) -> Config:
    """Write the demo's config.toml, as an administrator would, and read it back."""
    path = out / "config.toml"
    text = f"""# Written by `dicom-node demo`: a node and a PACS on loopback.
[node]
ae_title = "{NODE_AE}"
host = "127.0.0.1"
port = {node_port}

[[peers]]
name = "pacs"
ae_title = "{PACS_AE}"
host = "127.0.0.1"
port = {pacs_port}

[intake]
quiet_period_s = 2.0
study_quiet_period_s = 3.0
min_free_bytes = 1_000_000_000

[pipeline]
bundle = {_toml_string(bundle)}

[[destinations]]
name = "pacs"
peer = "pacs"
encoding = "sc"

[storage]
root = "spool"

[log]
format = "json"
level = "warning"
"""
    path.write_text(text, encoding="utf-8")
    return load_config(path)


def _toml_string(value: str) -> str:
    """A folder's name is a TOML literal string: no escapes; a relative one is made absolute."""
    resolved = str(Path(value).resolve()) if Path(value).is_dir() else value
    if "'" in resolved or "\n" in resolved:
        raise fail(f"--bundle {value!r}: no apostrophe or line break", code=2)
    return f"'{resolved}'"


def _start_node(running: ExitStack, config: Config) -> None:
    from dicom_node.log import configure_logging
    from dicom_node.node import Node

    configure_logging(config.log)  # warnings only: the progress bars tell the rest
    node = Node(config)
    node.start()
    running.callback(node.stop)


def _into_pacs(bar: RichProgress, config: Config, paths: list[Path]) -> str:
    """C-STORE the CT into the PACS, as the scanner would. Returns the Study Instance UID."""
    from pydicom import dcmread

    from dicom_node.net.scu import send_series

    task = bar.add_task("scanner stores CT in PACS", total=len(paths))
    outcome = send_series(
        paths, config.peer("pacs"), calling_ae="SCANNER", on_sent=lambda sent: bar.update(task, completed=sent)
    )
    if outcome.code:
        raise PacsError(f"the PACS did not take the CT: {outcome.code}: {outcome.text}")
    return str(dcmread(paths[0], stop_before_pixels=True, specific_tags=["StudyInstanceUID"]).StudyInstanceUID)


def _follow(bar: RichProgress, config: Config, study_uid: str) -> Job:
    """Show the job's state and stage until it ends."""
    task = bar.add_task("node waits for quiet", total=None)
    until = time.monotonic() + JOB_TIMEOUT_S
    with opened_ledger(config) as ledger:
        while time.monotonic() < until:
            found = ledger.find(JobFilter(study_uid=study_uid))
            if found:
                job = found[0]
                bar.update(task, description=f"job {job.state.value.lower()} {job.stage}"[:28])
                if job.state in FINAL_JOB_STATES or job.state is JobState.HELD:
                    bar.update(task, completed=1, total=1)
                    return job
            time.sleep(POLL_S)
    raise fail(f"no end of the job within {JOB_TIMEOUT_S:.0f} s")


def _read_back(bar: RichProgress, pacs: DemoPacs, study_uid: str, out: Path) -> list[Path]:
    """Find the PET series in the PACS by C-FIND and get it by C-GET."""
    found = [one for one in pacs.series(study_uid) if one.Modality == "PT"]
    if len(found) != 1:
        raise PacsError(f"the PACS shows {len(found)} PET series in the study, 1 is expected")
    task = bar.add_task("read PET back from PACS", total=1)
    got = pacs.fetch(study_uid, str(found[0].SeriesInstanceUID), out / "from-pacs")
    bar.update(task, completed=1)
    return got


def _suv_from(paths: list[Path]) -> FloatVolume:
    """SUV [z, y, x] of the series that came back, as any reader computes it: stored value times slope."""
    from pydicom import dcmread

    slices = sorted((dcmread(path) for path in paths), key=lambda ds: float(ds.ImagePositionPatient[2]))
    volume: FloatVolume = np.stack(
        [ds.pixel_array.astype(np.float32) * float(ds.RescaleSlope) + float(ds.RescaleIntercept) for ds in slices]
    ).astype(np.float32)
    return volume


def _draw(paths: list[Path], suv: FloatVolume, phantom: Phantom, out: Path) -> None:
    """The picture: CT, districts, the PET that came back, fusion, and the phantom's true PET on the same grid."""
    from pipeline.bundle import bundle_path, load_bundle
    from pipeline.ct_reader import read_ct
    from pipeline.districts import find_districts
    from pipeline.geometry import resample, result_grid
    from pipeline.outputs.picture import overview_png
    from pipeline.types import DistrictOptions, SuvVolume

    config = load_config(out / "config.toml")
    ct = read_ct(paths)
    bundle = load_bundle(bundle_path(config.pipeline.bundle, config.pipeline.bundles))
    grid = result_grid(ct.grid, bundle.manifest.spacing_mm)
    districts = find_districts(ct, grid, options=DistrictOptions(chain=config.pipeline.districts))
    picture = overview_png(
        ct,
        districts,
        SuvVolume(suv=suv, grid=grid),
        true_suv=resample(phantom.suv, phantom.grid, grid, fill=0.0),
        title="dicom-node demo: a generated phantom, not a patient",
    )
    (out / "overview.png").write_bytes(picture)
