"""What a person watches while a network is trained: scalars and sample pictures for TensorBoard."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from training.patches.sampler import Batch

FOLDER = "tensorboard"
PICTURE_SUV_MAX = 7.0  # the usual window of an FDG PET; most tissue is below 3
FLUSH_S = 30


class RunLog:
    """Scalars and pictures of one run. Without the package `tensorboard` every call does nothing.

    After a resume from `step`, what an earlier process wrote beyond it is dropped (purge_step): no step shows twice.
    """

    def __init__(self, run_dir: Path, step: int, *, wanted: bool = True) -> None:
        self._writer: Any = _writer(run_dir / FOLDER, step) if wanted else None
        self.missing = wanted and self._writer is None

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._write("close")

    def scalars(self, group: str, values: Mapping[str, float], step: int) -> None:
        """Write each as `group/name`."""
        for name, value in values.items():
            self._write("add_scalar", f"{group}/{name}", value, step)

    def picture(self, name: str, rows: NDArray[np.float32], suv_max: float, step: int) -> None:
        """Rows of CT, true PET and synthetic PET: `rows` is [n, 3, height, width] in [0, 1]; PET dark on light."""
        shown = np.nan_to_num(rows)
        shown[:, 1:] = 1 - np.clip(shown[:, 1:] * suv_max / PICTURE_SUV_MAX, 0, 1)
        lines = [np.concatenate(list(row), axis=1) for row in shown]
        image = (255 * np.clip(np.concatenate(lines, axis=0), 0, 1)).astype(np.uint8)
        self._write("add_image", name, image, step, dataformats="HW")

    def _write(self, method: str, *args: Any, **options: Any) -> None:
        if self._writer is None:
            return
        try:
            getattr(self._writer, method)(*args, **options)
        except OSError:  # a full disk: curves are not worth the run, and the next checkpoint says it
            self._writer = None


def middle_slices(network: nn.Module, batch: Batch) -> NDArray[np.float32]:
    """CT, true PET and synthetic PET in the middle transverse slice of every sample, [n, 3, y, x] in [0, 1]."""
    with torch.inference_mode():
        fake = network.eval()(batch.input).float()
    inside = batch.weight > 0
    rows = torch.cat([batch.input[:, :1], batch.pet * inside, fake * inside], dim=1)
    middle: NDArray[np.float32] = rows[:, :, rows.shape[2] // 2].cpu().numpy()
    return middle


def _writer(folder: Path, step: int) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # tensorboard's own generated protocol files
            from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=step + 1, flush_secs=FLUSH_S)
