"""The engine's process: loads torch and the bundle once, then does one job after the other.

It talks over a pipe. In: `Start`, `Shadow` and `WarmUp`. Out: `Progress` values, then one end for each `Start` and
`Shadow`: `Done` or `Compared`, `Refused` (a PipelineError) or `Broken` (anything else, without its message: a
library's message may quote a header). It ends by itself when the pipe closes or its parent dies, so that no orphan
holds the GPU.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import PipelineError
from pipeline.types import PipelineOptions, Progress

if TYPE_CHECKING:
    from pipeline.bundle import ModelBundle
    from pipeline.result import ShadowSummary
    from pipeline.types import JobVolumes

ORPHANED = 3  # exit code
# in what torch, the C++ libraries and the system say
_OUT_OF_MEMORY = ("can't allocate memory", "cannot allocate memory", "out of memory", "bad_alloc")
_NICE = 10  # a sender waits for its answer, a job can wait: receiving has the processors first


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """One job. `options.bundle` is a folder or the name of a shipped bundle."""

    job_id: str
    paths: tuple[Path, ...]
    options: PipelineOptions
    result_folder: Path
    created: datetime


@dataclass(frozen=True, kw_only=True, slots=True)
class Shadow:
    """Compare the job that was done last with `options.shadow`; the figures go into `result_folder`'s summary."""

    job_id: str
    options: PipelineOptions
    result_folder: Path


@dataclass(frozen=True, kw_only=True, slots=True)
class WarmUp:
    """Load the bundle before the first job asks for it. Has no answer: the job will tell what is wrong."""

    options: PipelineOptions


@dataclass(frozen=True, kw_only=True, slots=True)
class Ready:
    """Sent once, when the process can take jobs."""

    pid: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Done:
    """The result folder is complete."""

    job_id: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """The shadow was run and its figures are stored."""

    job_id: str
    summary: ShadowSummary


@dataclass(frozen=True, kw_only=True, slots=True)
class Refused:
    """A PipelineError: its class by name, so that both ends need not pickle exceptions."""

    job_id: str
    error_class: str
    code: str
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Broken:
    """An error that nobody expected: its type and place."""

    job_id: str
    text: str


Message = Ready | Progress | Done | Compared | Refused | Broken


def main(connection: Connection) -> None:
    """The process' entry: serve jobs until the pipe closes."""
    os.nice(_NICE)
    _leave_signals_to_the_parent()
    _end_with_the_parent()
    _keep_headers_out_of_the_log()
    library = Library()
    connection.send(Ready(pid=os.getpid()))
    while True:
        try:
            request = connection.recv()
        except (EOFError, OSError):
            return
        if isinstance(request, WarmUp):
            _warm_up(library, request.options)
        elif isinstance(request, Shadow):
            connection.send(do_shadow(request, library))
        else:
            connection.send(do_job(request, library, connection.send))


class Library:
    """The bundles that this process has loaded; a bundle whose manifest changed on the disk is loaded anew.

    `volumes` are those of the job that was done last, with its id, while a shadow may still ask for them.
    """

    def __init__(self) -> None:
        self._loaded: dict[str, tuple[tuple[Path, int], ModelBundle]] = {}
        self.volumes: tuple[str, JobVolumes] | None = None

    def bundle(self, options: PipelineOptions, role: str = "bundle") -> ModelBundle:
        """The bundle of one role, "bundle" or "shadow". Raises BundleError."""
        from pipeline.bundle import MANIFEST, bundle_path, load_bundle

        wanted = options.shadow if role == "shadow" else options.bundle
        folder = bundle_path(str(wanted or ""), *options.bundles)
        key = (folder, (folder / MANIFEST).stat().st_mtime_ns)
        if role not in self._loaded or self._loaded[role][0] != key:
            self._loaded.pop(role, None)  # one for each role: networks are large
            self._loaded[role] = (key, load_bundle(folder))
        return self._loaded[role][1]


def do_job(start: Start, library: Library, send: Callable[[Message], None]) -> Done | Refused | Broken:
    """Run one job and say how it ended; sends progress on the way."""
    from pipeline.run import synthesize_series, write_result

    kept: list[JobVolumes] = []
    library.volumes = None
    try:
        result = synthesize_series(
            start.paths,
            library.bundle(start.options),
            start.options,
            created=start.created,
            on_progress=send,
            keep=kept.append if start.options.shadow is not None else None,
        )
        write_result(result, start.result_folder)
    except PipelineError as error:
        return Refused(job_id=start.job_id, error_class=type(error).__name__, code=error.code, text=error.text)
    except Exception as error:
        return Broken(job_id=start.job_id, text=describe(error))
    library.volumes = (start.job_id, kept[0]) if kept else None
    return Done(job_id=start.job_id)


def do_shadow(request: Shadow, library: Library) -> Compared | Refused | Broken:
    """Run the second bundle on the volumes of the job that was done last; they are let go in any case."""
    from pipeline.device import choose_compute, set_threads
    from pipeline.result import add_shadow
    from pipeline.shadow import compare_shadow

    options, kept, library.volumes = request.options, library.volumes, None
    try:
        if kept is None or kept[0] != request.job_id:
            raise PipelineError("volumes_gone", "the engine was started again since the job was run")
        bundle = library.bundle(options, "shadow")
        set_threads(options.threads)
        compute = choose_compute(options.device, options.precision, options.batch)
        summary = compare_shadow(kept[1], bundle, options, compute=compute)
        add_shadow(request.result_folder, summary)
    except PipelineError as error:
        return Refused(job_id=request.job_id, error_class=type(error).__name__, code=error.code, text=error.text)
    except Exception as error:
        return Broken(job_id=request.job_id, text=describe(error))
    return Compared(job_id=request.job_id, summary=summary)


def describe(error: BaseException) -> str:
    """`ValueError in run.py:120 (synthesize_series) < ...`, and the reason where the system gives one."""
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    places = " < ".join(f"{Path(frame.filename).name}:{frame.lineno} ({frame.name})" for frame in reversed(frames))
    reason = f": {error.strerror}" if isinstance(error, OSError) and error.strerror else ""
    if isinstance(error, MemoryError) or any(words in str(error).lower() for words in _OUT_OF_MEMORY):
        reason = ": out of memory"
    return f"{type(error).__name__}{reason} in {places}"


def _warm_up(library: Library, options: PipelineOptions) -> None:
    import pipeline.run  # noqa: F401  # seconds of imports that the first job need not wait for

    try:
        library.bundle(options)
    except PipelineError:
        return  # the job that needs it will say so, into the ledger


def _leave_signals_to_the_parent() -> None:
    """Ctrl-C and systemd's SIGTERM reach the whole group: a drain must let the running job end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _end_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(ORPHANED)

    threading.Thread(target=watch, name="engine-orphan-watch", daemon=True).start()


def _keep_headers_out_of_the_log() -> None:
    """Warnings and log lines of the DICOM libraries quote values of the data set."""
    warnings.simplefilter("ignore")
    for name in ("pydicom", "pynetdicom", "highdicom"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
