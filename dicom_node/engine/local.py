"""The engine on this machine: one child process that lives as long as the node, and is replaced when it dies."""

from __future__ import annotations

import atexit
import multiprocessing
import signal
import threading
from collections.abc import Callable, Sequence
from datetime import datetime
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING

import pipeline.errors
from dicom_node.engine import EngineCrash, EngineStopped, child
from pipeline.errors import PipelineError
from pipeline.types import GeometryError, OnProgress, PipelineOptions, Progress, ignore_progress

if TYPE_CHECKING:
    from pipeline.result import ShadowSummary

POLL_S = 0.2  # how often `should_stop` is asked
START_TIMEOUT_S = 120.0  # a cold disk and a large torch
_KILL_WAIT_S = 10.0


class LocalEngine:
    """Runs one job at a time; `run` is for one caller at a time, `close` and `pid` are for any thread."""

    def __init__(
        self,
        *,
        job_timeout_s: float,
        start_timeout_s: float = START_TIMEOUT_S,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        """`clock` is monotonic seconds, for the job's time-out."""
        self._job_timeout_s = job_timeout_s
        self._start_timeout_s = start_timeout_s
        self._clock = clock
        self._lock = threading.RLock()  # guards the pair below
        self._process: SpawnProcess | None = None
        self._connection: Connection | None = None
        self._closed = False
        atexit.register(self.close)  # before multiprocessing's own exit, which would wait for the child

    @property
    def pid(self) -> int | None:
        """The child's process id while it lives."""
        process = self._process
        return process.pid if process is not None and process.is_alive() else None

    def warm_up(self, options: PipelineOptions) -> None:
        """Start the child and let it load torch and the bundle in the background."""
        self._child()[1].send(child.WarmUp(options=options))

    def run(
        self,
        job_id: str,
        paths: Sequence[Path],
        options: PipelineOptions,
        result_folder: Path,
        created: datetime,
        *,
        on_progress: OnProgress,
        should_stop: Callable[[], bool],
    ) -> None:
        """See `Engine.run`. A child that died between two jobs is replaced without a word."""
        start = child.Start(
            job_id=job_id, paths=tuple(paths), options=options, result_folder=result_folder, created=created
        )
        self._ask(start, on_progress, should_stop)

    def shadow(
        self, job_id: str, options: PipelineOptions, result_folder: Path, *, should_stop: Callable[[], bool]
    ) -> ShadowSummary:
        """See `Engine.shadow`."""
        request = child.Shadow(job_id=job_id, options=options, result_folder=result_folder)
        answer = self._ask(request, ignore_progress, should_stop)
        if not isinstance(answer, child.Compared):
            raise EngineCrash("engine_error", f"the engine answered a shadow with {type(answer).__name__}")
        return answer.summary

    def _ask(
        self, request: child.Start | child.Shadow, on_progress: OnProgress, should_stop: Callable[[], bool]
    ) -> child.Done | child.Compared:
        process, connection = self._child()
        try:
            connection.send(request)
            return self._follow(request, process, connection, on_progress, should_stop)
        except (BrokenPipeError, ConnectionResetError, EOFError) as error:
            raise self._crash(process) from error
        except PipelineError:
            raise  # the child is well; after an error that nobody expected (no memory left) it may not be
        except BaseException:
            self._kill()  # whatever it is doing, nobody waits for it any more
            raise

    def close(self) -> None:
        """Kill the child, if there is one, and start no other."""
        atexit.unregister(self.close)
        self._closed = True
        self._kill()

    def _follow(
        self,
        request: child.Start | child.Shadow,
        process: SpawnProcess,
        connection: Connection,
        on_progress: OnProgress,
        should_stop: Callable[[], bool],
    ) -> child.Done | child.Compared:
        deadline = self._clock() + self._job_timeout_s
        while True:
            wait([connection, process.sentinel], timeout=POLL_S)
            while connection.poll():
                if answer := self._ended(connection.recv(), request.job_id, on_progress):
                    return answer
            if not process.is_alive():
                raise self._crash(process)
            if should_stop():
                raise EngineStopped("stopped", "the engine was told to stop")
            if self._clock() > deadline:
                text = f"the job did not end within {self._job_timeout_s:.0f} s (engine.job_timeout_s)"
                raise EngineCrash("engine_timeout", text)

    @staticmethod
    def _ended(message: child.Message, job_id: str, on_progress: OnProgress) -> child.Done | child.Compared | None:
        """The job's good end, or None while it goes on; raises what the child reports."""
        match message:
            case Progress():
                on_progress(message)
            case child.Done(job_id=found) | child.Compared(job_id=found) if found == job_id:
                return message
            case child.Refused(job_id=found) if found == job_id:
                raise pipeline_error(message.error_class, message.code, message.text)
            case child.Broken(job_id=found) if found == job_id:
                raise _Broken("engine_error", message.text)
            case _:
                pass  # "ready", said again
        return None

    def _child(self) -> tuple[SpawnProcess, Connection]:
        """The living child; starts one when there is none."""
        with self._lock:
            if self._closed:
                raise EngineStopped("stopped", "the engine is closed")
            if self._process is not None and self._connection is not None and self._process.is_alive():
                return self._process, self._connection
            self._kill()
            context = multiprocessing.get_context("spawn")  # fork and CUDA, or fork and threads, do not agree
            ours, theirs = context.Pipe()
            process = context.Process(target=child.main, args=(theirs,), name="engine", daemon=True)
            process.start()
            theirs.close()
            self._process, self._connection = process, ours
        try:
            answers = ours.poll(self._start_timeout_s) and isinstance(ours.recv(), child.Ready)
        except (EOFError, OSError):
            answers = False
        if not answers:
            self._kill()
            raise EngineCrash("engine_start_failed", f"the engine's process did not start: {exit_text(process)}")
        return process, ours

    def _crash(self, process: SpawnProcess) -> EngineCrash:
        process.join(_KILL_WAIT_S)
        error = EngineCrash("engine_crashed", f"the engine's process died: {exit_text(process)}")
        self._kill()
        return error

    def _kill(self) -> None:
        with self._lock:
            process, connection = self._process, self._connection
            self._process = self._connection = None
        if process is not None:
            process.kill()
            process.join(_KILL_WAIT_S)
        if connection is not None:
            connection.close()


class _Broken(EngineCrash):
    """The job met an error nobody expected: the next one gets a child of its own."""


def exit_text(process: SpawnProcess) -> str:
    """`killed by SIGKILL (out of memory?)` or `exit code 1`."""
    code = process.exitcode
    if code is None:
        return "still running"
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name
    return f"killed by {name}{' (out of memory?)' if name == 'SIGKILL' else ''}"


def pipeline_error(class_name: str, code: str, text: str) -> PipelineError:
    """The pipeline's error again, in this process; an unknown class becomes a plain PipelineError."""
    if class_name == GeometryError.__name__:
        return GeometryError(text, code)
    found = getattr(pipeline.errors, class_name, PipelineError)
    known = isinstance(found, type) and issubclass(found, PipelineError)
    error_class: type[PipelineError] = found if known else PipelineError
    return error_class(code, text)
