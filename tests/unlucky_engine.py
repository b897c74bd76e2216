"""A real engine whose process meets a fault in the middle of a job: `Unlucky(fault)`, where `fault` gets its pid."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

from dicom_node.engine.local import LocalEngine
from pipeline.types import Progress, Stage


class Unlucky:
    """A real engine to which something happens at the first stage of each run, while there is something left."""

    def __init__(self, *faults: Any) -> None:
        self.engine = LocalEngine(job_timeout_s=120.0)
        self.faults = list(faults)

    def run(self, job_id: str, paths: Any, options: Any, folder: Path, created: datetime, **told: Any) -> None:
        fault = self.faults.pop(0) if self.faults else lambda pid: None
        forward = told["on_progress"]

        def on_progress(progress: Progress) -> None:
            nonlocal fault
            if progress.stage is Stage.READ and self.engine.pid is not None:
                fault(self.engine.pid)
                fault = lambda pid: None  # noqa: E731
            forward(progress)

        self.engine.run(job_id, paths, options, folder, created, **{**told, "on_progress": on_progress})

    def close(self) -> None:
        self.engine.close()
