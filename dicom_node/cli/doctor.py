"""`dicom-node doctor`: prove the whole path, end to end, with a labelled test study."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import datetime
from functools import cache
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from dicom_node.cli.check import elsewhere, on_this_machine
from dicom_node.cli.check_node import check_answering, ourselves
from dicom_node.cli.common import (
    DEFAULT_CONFIG,
    AsJson,
    ConfigPath,
    check_user,
    console,
    fail,
    opened_ledger,
    print_json,
    safe,
)
from dicom_node.cli.findings import Finding, Verdict
from dicom_node.config import Config, DestinationConfig, load_config
from dicom_node.steps import Step
from dicom_node.trial import TEST_NAME

if TYPE_CHECKING:
    from dicom_node.doctor import TestStudy
    from training.phantom import Phantom

NAME_WIDTH = 18  # of a step, in the lines that are printed
MATRIX = 128
COVERAGE = (0.58, 0.74)  # of the body's height: pelvis to chest, which every gate knows
SPACING_MM = (5.0, 4.0, 4.0)
PURPOSE = "TEST - dicom-node doctor"
_WARNING = "warning: "  # what such a step's text begins with
_REMEDIES = {
    "disk": "make room, or correct [storage].root",
    "ledger": "the message above; docs/operation.md",
    "backups": "[storage].backup_folder: a folder that the node's user can write",
    "bundle": "dicom-node models verify; [pipeline].bundle",
    "shadow": "dicom-node models verify; [pipeline].shadow",
    "device": "[pipeline].device",
    "peer": "address, port and AE titles on both sides; the peer must know ours",
    "proof": "what the archive lacks ends earlier; commitment and verify of the destination",
    "destination": "docs/dicomweb.md has every message",
}


def doctor(
    config: ConfigPath = DEFAULT_CONFIG,
    destination: Annotated[
        str,
        typer.Option("--destination", "-d", help="The configured destination that gets the result. Without: none."),
    ] = "",
    retire: Annotated[
        bool,
        typer.Option(
            "--retire",
            help="At the end ask that destination to hide what it got of the test (rejection notes, IHE IOCM), also "
            "when a step before has failed.",
        ),
    ] = False,
    retire_study: Annotated[
        str,
        typer.Option(
            "--retire-study",
            metavar="ACCESSION",
            help="Send nothing: ask the archives to hide a test study of earlier, by the accession number that doctor "
            "told. Other studies are refused.",
        ),
    ] = "",
    timeout: Annotated[float, typer.Option(min=1.0, help="Seconds that a step may take.")] = 1800.0,
    as_json: AsJson = False,
) -> None:
    """Prove the whole path of the running node with a labelled TEST study, step by step. Exit code 1 when one fails.

    What `check` proves comes first. Then a small generated CT is sent to the node, and its result to one destination.
    What it got there stays, unless --retire or, later, --retire-study asks for it to be hidden.
    """
    loaded = load_config(config)
    check_user(loaded)
    if retire_study and (destination or retire):
        raise fail("--retire-study goes wherever that study went: leave --destination and --retire out", code=2)
    chosen = _destination(loaded, destination)
    if retire and chosen is None:
        raise fail("--retire takes back what was sent: name its --destination", code=2)
    began = monotonic()
    done: list[Step] = []
    with _told_what_is_on(as_json) as on_step:
        steps = (
            _retired(loaded, config, retire_study, timeout, on_step)
            if retire_study
            else _steps(loaded, config, chosen, retire=retire, timeout_s=timeout, on_step=on_step)
        )
        for step in steps:
            done.append(step)
            if not as_json:
                _print(step)
    if as_json:
        print_json([asdict(step) for step in done])
    else:
        console.print(safe(_summary(done, monotonic() - began)), soft_wrap=True)
    if not all(step.ok for step in done):
        raise typer.Exit(1)


def _destination(config: Config, name: str) -> DestinationConfig | None:
    if not name:
        return None
    found = next((one for one in config.destinations if one.name == name), None)
    if found is None:
        names = ", ".join(one.name for one in config.destinations) or "none"
        raise fail(f"no destination is named {name!r}; the configuration has: {names}", code=2)
    return found


@contextmanager
def _told_what_is_on(as_json: bool) -> Iterator[Callable[[str], None]]:
    """Whom to tell the step that begins: a terminal shows it, as some take minutes."""
    if as_json:
        yield lambda _: None
        return
    with console.status("checks ...") as status:
        yield lambda name: status.update(f"{name} ...")


def _print(step: Step) -> None:
    """A line for each step as soon as it has ended: whoever waits, or reads a log of it, sees how far it is."""
    (verdict, style), text = (("ok", "green") if step.ok else ("FAILED", "bold red")), step.text
    if step.ok and text.startswith(_WARNING):
        (verdict, style), text = ("warning", "yellow"), text.removeprefix(_WARNING)
    line = Text.assemble(f"{verdict:<8}", style=style)
    line.append_text(Text.assemble(safe(f"{step.name:<{NAME_WIDTH}}"), f"{step.seconds:8.1f} s  ", safe(text)))
    console.print(line, soft_wrap=True, highlight=False)
    if step.remedy and not step.ok:
        console.print(safe(f"{'':8}-> {step.remedy}"), soft_wrap=True, highlight=False)


def _summary(done: Sequence[Step], seconds: float) -> str:
    """How it went as a whole: the last line."""
    failed = [step.name for step in done if not step.ok]
    if not failed:
        return f"all {len(done)} steps succeeded, in {seconds:.1f} s"
    sent = any(step.name in ("send", "study") for step in done)
    text = f"FAILED: {', '.join(failed)}; {len(done) - len(failed)} of {len(done)} steps succeeded, in {seconds:.1f} s"
    return text if sent else f"{text}; no test study was sent"


def _steps(
    config: Config,
    path: Path,
    destination: DestinationConfig | None,
    *,
    retire: bool,
    timeout_s: float,
    on_step: Callable[[str], None],
) -> Iterator[Step]:
    """What `check` looks at, then the study; nothing is sent when this machine or the destination is not ready."""
    from dicom_node.doctor import Trip

    yield Step(name="config", ok=True, text=str(path))
    ready = True
    for step in _checks(config, path):
        yield step
        ready = ready and (step.ok or not _needed(step.name, destination))
    if not ready:
        return
    with tempfile.TemporaryDirectory(prefix="dicom-node-doctor-") as folder, opened_ledger(config) as ledger:
        on_step("test study")
        began = monotonic()
        study = make_test_study(Path(folder))
        text = f"{len(study.files)} slices of {MATRIX} x {MATRIX}: {TEST_NAME}, accession {study.accession}"
        if destination is not None and not retire:
            text += f"; dicom-node doctor --retire-study {study.accession} takes its result back"
        yield Step(name="test study", ok=True, text=text, seconds=monotonic() - began)
        node = ourselves(config)
        trip = Trip(config, ledger, study, node=node, destination=destination, timeout_s=timeout_s, on_step=on_step)
        yield from trip.steps(retire=retire)


def _retired(
    config: Config, path: Path, accession: str, timeout_s: float, on_step: Callable[[str], None]
) -> Iterator[Step]:
    """A test study of earlier taken back; the node has to run, as it is the one that sends."""
    from dicom_node.retire import retire_study

    yield Step(name="config", ok=True, text=str(path))
    node = _running(config, path)
    yield node
    if node.ok:
        on_step("retire")
        with opened_ledger(config) as ledger:
            yield from retire_study(config, ledger, accession, timeout_s=timeout_s)


def _running(config: Config, path: Path) -> Step:
    from dicom_node.started_with import node_runs_on

    if node_runs_on(config.storage.root):
        return Step(name="node", ok=True, text=f"runs on {config.storage.root}")
    text = f"no node runs on [storage].root = {config.storage.root}"
    remedy = f"start it: dicom-node serve --config {path} (or systemctl start dicom-node)"
    return Step(name="node", ok=False, text=text, remedy=remedy)


def _checks(config: Config, path: Path) -> Iterator[Step]:
    yield from _timed(on_this_machine(config))
    node = _running(config, path)
    if not node.ok:
        yield node
        return
    remedy = "the node runs and does not answer on its port: its log says why"
    for step in _timed(iter([check_answering(config)])):
        yield replace(step, remedy=remedy)
    yield from _timed(elsewhere(config))


def _timed(findings: Iterator[Finding]) -> Iterator[Step]:
    began = monotonic()
    for finding in findings:
        seconds = monotonic() - began
        ok = finding.verdict is not Verdict.FAIL
        warning = _WARNING if finding.verdict is Verdict.WARN else ""
        remedy = _REMEDIES.get(finding.check.partition(" ")[0], "")
        yield Step(name=finding.check, ok=ok, text=f"{warning}{finding.text}", seconds=seconds, remedy=remedy)
        began = monotonic()


def _needed(name: str, destination: DestinationConfig | None) -> bool:
    """Whether the study cannot go its way without what this check looked at."""
    what, _, who = name.partition(" ")
    if what not in ("peer", "proof", "compression", "destination"):
        return what not in ("shadow", "backups")
    return destination is not None and who in (destination.name, destination.peer)


def make_test_study(folder: Path) -> TestStudy:
    """A generated torso CT, labelled TEST in every text, with UIDs and an accession number of its own."""
    from dicom_node.doctor import TestStudy
    from training.phantom.dicom import StudyHeader, write_ct_series

    now = datetime.now()
    accession = f"TEST{now:%y%m%d%H%M%S}"
    header = StudyHeader(patient_id=accession, patient_name=TEST_NAME, scanned=now, description=PURPOSE)
    files = write_ct_series(_paint(), folder, matrix=MATRIX, header=header)
    study_uid = _label(files, accession)
    return TestStudy(files=files, study_uid=study_uid, accession=accession)


@cache
def _paint() -> Phantom:
    from training.phantom import PhantomSpec, make_phantom

    fov_mm = MATRIX * SPACING_MM[1]
    return make_phantom(PhantomSpec(seed=1, spacing_mm=SPACING_MM, fov_mm=fov_mm, pose="raised", coverage=COVERAGE))


def _label(files: Sequence[Path], accession: str) -> str:
    """Write TEST and fresh UIDs into the files: the study of another day is another study. Returns its UID."""
    from pydicom import dcmread
    from pydicom.uid import generate_uid

    from pipeline.outputs.attributes import TEST_PATIENT_COMMENTS

    study_uid, series_uid, frame_of_reference_uid = generate_uid(), generate_uid(), generate_uid()
    for path in files:
        ds = dcmread(path)
        ds.StudyInstanceUID, ds.SeriesInstanceUID = study_uid, series_uid
        ds.FrameOfReferenceUID = frame_of_reference_uid
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        ds.AccessionNumber = accession
        ds.SeriesDescription = "TEST - PHANTOM CT"
        ds.PatientComments = ds.ImageComments = TEST_PATIENT_COMMENTS
        ds.QualityControlImage = "YES"  # PS3.3 C.7.6.1: of a phantom
        ds.save_as(path)
    return str(study_uid)
