"""Run directories: what training one network leaves behind.

RUNS/<model>/<network>/seed-<n>/run.json              the record below; written at the start and as training goes on
RUNS/<model>/<network>/seed-<n>/checkpoint.pt         to resume from
RUNS/<model>/<network>/seed-<n>/weights.safetensors   the finished generator (CT to PET, averaged weights)
RUNS/<model>/<network>/seed-<n>/tensorboard/          scalars and sample pictures
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.errors import listed
from training.errors import RunError
from training.files import sha256_of, write_whole
from training.recipe import ModelName, Recipe

RECORD = "run.json"
CHECKPOINT = "checkpoint.pt"
WEIGHTS = "weights.safetensors"


class RunRecord(BaseModel):
    """One network's training: what went in, how far it is, what came out."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    recipe: Recipe
    training_digest: str
    prepared_folder: str  # as given to the command; `train evaluate --data` may name another place
    prepared_digest: str
    split_digest: str
    model: ModelName
    network: str
    seed: int
    steps: int
    step: int = 0
    state: Literal["running", "done"] = "running"
    seconds: float = 0.0
    device: str = ""
    torch: str = ""
    losses: dict[str, float] = {}  # means since the last report
    validation: tuple[dict[str, Any], ...] = ()  # {"step": ..., "mae": ..., "psnr": ...}
    weights_sha256: str = ""

    @property
    def folder_name(self) -> Path:
        """Relative to RUNS."""
        return Path(self.model) / self.network / f"seed-{self.seed}"


def write_record(runs: Path, record: RunRecord) -> None:
    """Write run.json into the record's folder under `runs`."""
    folder = runs / record.folder_name
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / RECORD, (record.model_dump_json(indent=1) + "\n").encode())


def read_record(folder: Path) -> RunRecord:
    """Read one run directory's record.

    Raises:
        RunError: run_missing, run_invalid.
    """
    path = folder / RECORD
    try:
        return RunRecord.model_validate_json(path.read_bytes())
    except OSError as error:
        raise RunError("run_missing", f"{folder}: {RECORD} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        raise RunError("run_invalid", f"{path}: {listed(error, 3)}") from error


def find_runs(runs: Path) -> list[RunRecord]:
    """Every run under `runs`, by model, network and seed.

    Raises:
        RunError: none there (run_missing), one malformed (run_invalid).
    """
    records = [read_record(path.parent) for path in sorted(runs.glob(f"*/*/seed-*/{RECORD}"))]
    if not records:
        raise RunError("run_missing", f"{runs}: no run directory (<model>/<network>/seed-<n>/{RECORD}) in it")
    return records


def _same_method(record: RunRecord, other: RunRecord) -> bool:
    """Whether the recipe of `other` would train the network of `record` as it was trained, whatever its length."""
    train = other.recipe.train.model_copy(update={"steps": record.recipe.train.steps})
    recipe = other.recipe.model_copy(update={"train": train})
    return record.training_digest == recipe.training_digest(record.model, record.network)


def check_runs_fit(runs: Path, records: Iterable[RunRecord]) -> None:
    """Refuse runs that cannot be compared: other data, another recipe, unfinished, or with altered weights.

    Raises:
        RunError: run_unfinished, run_foreign, weights_altered.
    """
    first: RunRecord | None = None
    firsts: dict[ModelName, RunRecord] = {}
    for record in records:
        where = f"{runs / record.folder_name}"
        if record.state != "done":
            raise RunError("run_unfinished", f"{where}: at step {record.step} of {record.steps}; `train run` goes on")
        if record.training_digest != record.recipe.training_digest(record.model, record.network):
            raise RunError("run_foreign", f"{where}: its recipe is not the one that it was trained with")
        first = first or record
        if (record.prepared_digest, record.recipe.name) != (first.prepared_digest, first.recipe.name):
            text = f"{where}: recipe {record.recipe.name}, data {record.prepared_digest[:12]}; the runs beside it are"
            raise RunError("run_foreign", f"{text} of recipe {first.recipe.name}, data {first.prepared_digest[:12]}")
        if not _same_method(record, firsts.setdefault(record.model, record)):
            text = f"{where}: trained with other settings than {runs / firsts[record.model].folder_name}"
            raise RunError("run_foreign", f"{text}, though both recipes are called {record.recipe.name}")
        path = runs / record.folder_name / WEIGHTS
        if not path.is_file() or sha256_of(path) != record.weights_sha256:
            raise RunError("weights_altered", f"{path}: missing, or not the weights that this run ended with")
