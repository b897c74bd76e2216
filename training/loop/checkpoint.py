"""Checkpoints: a whole file or none, and the one before it, so that a torn newest one costs a minute, not a run."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pipeline.durable import sync_folder
from training.errors import RunError
from training.runs import CHECKPOINT

PREVIOUS = "checkpoint.previous.pt"
# what torch.load raises for a file that is cut off, overwritten or empty
TORN = (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile)


def save_checkpoint(folder: Path, content: Mapping[str, Any]) -> None:
    """Write tensors and plain values; the checkpoint before it stays as `checkpoint.previous.pt`.

    Raises:
        RunError: checkpoint_unwritten, most often a full disk; what was there before is whole.
    """
    path, temp = folder / CHECKPOINT, folder / f"{CHECKPOINT}.tmp"
    try:
        with temp.open("wb") as file:
            torch.save(dict(content), file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # torch's zip writer turns the first into the second
        temp.unlink(missing_ok=True)
        text = f"{path}: could not be written ({error}); make room"
        raise RunError("checkpoint_unwritten", f"{text}, then the same command goes on") from error
    if path.is_file():
        path.replace(folder / PREVIOUS)
    temp.replace(path)
    sync_folder(folder)


def load_checkpoint(folder: Path) -> tuple[dict[str, Any], str] | None:
    """The newest readable checkpoint on the CPU, with a sentence when it is not the newest; None when there is none.

    Raises:
        RunError: checkpoint_torn, when there are checkpoints and none can be read.
    """
    torn: list[str] = []
    for name in (CHECKPOINT, PREVIOUS):
        path = folder / name
        if not path.is_file():
            continue
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            step = content["step"]
        except TORN:
            torn.append(name)
            continue
        return content, f"{folder / torn[0]} is torn: going on from the one before it, step {step}" if torn else ""
    if torn:
        text = (
            f"{folder}: {' and '.join(torn)} cannot be read; remove {'them' if len(torn) > 1 else 'it'} to start over"
        )
        raise RunError("checkpoint_torn", text)
    return None


def drop_previous(folder: Path) -> None:
    """A finished run needs no second checkpoint."""
    (folder / PREVIOUS).unlink(missing_ok=True)
