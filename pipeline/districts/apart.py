"""The process of one outside segmenter: `python -m pipeline.districts.apart FOLDER PARENT` (see `outside`).

It reads the voxels and the request from FOLDER, calls the function that the request names, and leaves the label maps
and `answer.json` there. It ends by itself, with whatever it started, and removes FOLDER when PARENT is gone.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.device import is_out_of_memory
from pipeline.districts.outside import ANSWER_FILE, HU_FILE, REQUEST_FILE
from pipeline.errors import SegmenterUnavailable
from pipeline.types import FloatVolume, Grid

Work = Callable[[FloatVolume, Grid, Mapping[str, Any]], tuple[Mapping[str, NDArray[Any]], Mapping[str, Any]]]

WATCH_S = 1.0
MOST_TEXT = 200  # characters of a library's message that are passed on


def main(folder: Path, parent: int) -> None:
    """Do the request of `folder`; the answer is whole once it is there."""
    threading.Thread(target=_end_with, args=(folder, parent), name="parent-watch", daemon=True).start()
    request = json.loads((folder / REQUEST_FILE).read_text(encoding="utf-8"))
    if request["threads"]:
        torch.set_num_threads(request["threads"])
    draft = folder / "answer.part"
    draft.write_text(json.dumps(_answer(folder, request)), encoding="utf-8")
    draft.replace(folder / ANSWER_FILE)


def _answer(folder: Path, request: Mapping[str, Any]) -> dict[str, Any]:
    """What is told to the parent: names of the maps beside it and facts, or a code and a sentence."""
    grid = _grid(request["grid"])
    try:
        maps, facts = _work(request["work"])(np.load(folder / HU_FILE), grid, request["settings"])
    except SegmenterUnavailable as reason:
        return {"code": reason.code, "text": reason.text}
    except Exception as error:  # the edge of this process: the parent hears of everything
        if is_out_of_memory(error):
            return {"code": "segmenter_out_of_memory", "text": "it ran out of memory"}
        return {"code": "segmenter_crashed", "text": f"{type(error).__name__}: {str(error)[:MOST_TEXT]}"}
    for name, labels in maps.items():
        np.save(folder / f"{name}.npy", labels)
    return {"maps": list(maps), "facts": dict(facts)}


def _grid(given: Mapping[str, Any]) -> Grid:
    """JSON has lists where a grid has tuples."""
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    return Grid(**values)


def _work(path: str) -> Work:
    module, _, name = path.partition(":")
    work: Work = getattr(importlib.import_module(module), name)
    return work


def _end_with(folder: Path, parent: int) -> None:
    """A node that was killed cannot end us, nor remove the voxels."""
    while os.getppid() == parent:
        time.sleep(WATCH_S)
    shutil.rmtree(folder, ignore_errors=True)
    os.killpg(os.getpgid(0), signal.SIGKILL)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
