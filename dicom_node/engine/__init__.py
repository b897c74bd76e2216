"""The engine turns one job's CT files into a result folder, away from the node's own process.

EngineError            transient: another attempt may help
├── EngineCrash        the engine's process died, could not start, overran its time, or met an error of its own
└── EngineStopped      it was told to stop: the lease was lost, the job cancelled, or the node is shutting down
What the pipeline itself has to say comes as its own PipelineError.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from pipeline.types import OnProgress, PipelineOptions

if TYPE_CHECKING:
    from pipeline.result import ShadowSummary


class EngineError(Exception):
    """The engine did not finish; `code` is stable, `text` holds no header values."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(f"{code}: {text}")
        self.code = code
        self.text = text


class EngineCrash(EngineError):
    """The engine died under the job. Codes: engine_crashed, engine_start_failed, engine_timeout, engine_error."""


class EngineStopped(EngineError):
    """`should_stop` said so; the result folder does not exist."""


class Engine(Protocol):
    """The seam between the worker and whatever runs jobs (a local process now, several machines later)."""

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
        """Make the result folder, whole, or raise.

        `on_progress` and `should_stop` are called in the caller's thread, `should_stop` several times a second.

        Raises:
            PipelineError: what the pipeline found; EngineCrash; EngineStopped.
        """
        ...

    def shadow(
        self, job_id: str, options: PipelineOptions, result_folder: Path, *, should_stop: Callable[[], bool]
    ) -> ShadowSummary:
        """Compare the job that was run last with `options.shadow`, and put the figures into its result's summary.

        Raises:
            PipelineError: the second bundle cannot be run, or the job's volumes are gone; EngineCrash; EngineStopped.
        """
        ...

    def warm_up(self, options: PipelineOptions) -> None:
        """Begin to load what every job needs, without waiting for it."""
        ...

    def close(self) -> None:
        """End at once; nothing that runs is waited for."""
        ...
