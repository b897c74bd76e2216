"""Functions that stand for an outside segmenter's work in a process of its own, well and badly behaved."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import SegmenterUnavailable
from pipeline.types import FloatVolume, Grid

Given = tuple[dict[str, np.ndarray], dict[str, Any]]


def label_by_hu(hu: FloatVolume, grid: Grid, settings: Mapping[str, Any]) -> Given:
    facts = {"spacing_mm": grid.spacing_mm, "frame": grid.frame_of_reference_uid, "process": os.getpid()}
    return {"labels": (hu > settings["above"]).astype(np.uint8)}, facts


def refuse(hu: FloatVolume, grid: Grid, settings: Mapping[str, Any]) -> Given:
    raise SegmenterUnavailable("segmenter_bad_model", "made for mice")


def crash(hu: FloatVolume, grid: Grid, settings: Mapping[str, Any]) -> Given:
    raise ValueError("a library's own words")


def run_out_of_memory(hu: FloatVolume, grid: Grid, settings: Mapping[str, Any]) -> Given:
    raise MemoryError


def die(hu: FloatVolume, grid: Grid, settings: Mapping[str, Any]) -> Given:
    os.kill(os.getpid(), settings["signal"])
    return {}, {}


def leave(hu: FloatVolume, grid: Grid, settings: Mapping[str, Any]) -> Given:
    print("last words")
    sys.stdout.flush()
    os._exit(7)


def hang(hu: FloatVolume, grid: Grid, settings: Mapping[str, Any]) -> Given:
    """Starts a process, notes both and the folder with the voxels, and never ends."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    note = Path(settings["note"])
    note.with_suffix(".part").write_text(f"{os.getpid()} {child.pid} {Path.cwd()}", encoding="utf-8")
    note.with_suffix(".part").rename(note)
    time.sleep(600)
    return {}, {}
