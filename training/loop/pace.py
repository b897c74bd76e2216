"""How far a training is and how fast it goes: what it reports, means of its losses, the time that is left."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from training.recipe import ModelName

MARKS = 60  # reports over which the rate is taken: the last minute


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainProgress:
    """Where one network's training is. `losses` are means over the last steps; `notice` is for people, mostly empty."""

    model: ModelName
    network: str
    seed: int
    step: int
    steps: int
    losses: Mapping[str, float] = field(default_factory=dict)
    steps_per_s: float = math.nan
    seconds_left: float | None = None
    stage: str = "train"  # or "validate"
    notice: str = ""

    @property
    def text(self) -> str:
        """One line for people."""
        name = f"{self.model} {self.network} seed {self.seed}"
        if self.notice:
            return f"{name}: {self.notice}"
        losses = ", ".join(f"{name} {value:.5f}" for name, value in self.losses.items())
        return f"{name}: step {self.step} of {self.steps}, {self.steps_per_s:.2f} steps/s, {losses}"


OnProgress = Callable[[TrainProgress], None]


class Means:
    """Means of losses since they were last taken; the sums stay on the device until someone asks."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def add(self, losses: Mapping[str, Tensor]) -> None:
        """One step's losses, detached scalars."""
        for name, value in losses.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._count += 1

    def now(self) -> dict[str, float]:
        """The means so far; empty when there is nothing."""
        if not self._count:
            return {}
        values = torch.stack([value.float() for value in self._sums.values()]).tolist()  # one transfer
        return {name: value / self._count for name, value in zip(self._sums, values, strict=True)}

    def take(self) -> dict[str, float]:
        """The means so far, and start again."""
        means = self.now()
        self._sums, self._count = {}, 0
        return means


class Pace:
    """The clock of one training. Validation does not count as training, and is part of the time left."""

    def __init__(self, steps: int, validate_every: int) -> None:
        self._steps, self._every = steps, validate_every
        now = time.monotonic()
        self._due: dict[str, float] = {}
        self._lap = now
        self._paused = 0.0
        self._pauses = 0
        self._marks: deque[tuple[float, int]] = deque(maxlen=MARKS)

    def start(self, step: int) -> None:
        """Training begins after so many steps."""
        self._lap = time.monotonic()
        self._marks = deque([(self._busy(), step)], maxlen=MARKS)

    def mark(self, step: int) -> None:
        """One point that the rate is taken from."""
        self._marks.append((self._busy(), step))

    def due(self, name: str, every_s: float) -> bool:
        """Whether so many seconds went by since this was last True."""
        now = time.monotonic()
        if now - self._due.setdefault(name, now) < every_s:
            return False
        self._due[name] = now
        return True

    def lap(self) -> float:
        """Seconds since this was last asked."""
        now = time.monotonic()
        passed, self._lap = now - self._lap, now
        return passed

    def rate(self, step: int) -> float:
        """Steps per second over the last minute of training; NaN before the first step."""
        if not self._marks or step <= self._marks[0][1]:
            return math.nan
        then, first = self._marks[0]
        return (step - first) / max(self._busy() - then, 1e-9)

    def left(self, step: int) -> float | None:
        """Seconds to the last step, validations included; None before the first step."""
        rate = self.rate(step)
        if math.isnan(rate):
            return None
        checks = self._steps // self._every - step // self._every if self._every else 0
        return (self._steps - step) / rate + checks * self._paused / max(self._pauses, 1)

    @contextmanager
    def validating(self) -> Iterator[None]:
        """Time spent in here is not training."""
        began = time.monotonic()
        yield
        self._paused += time.monotonic() - began
        self._pauses += 1

    def _busy(self) -> float:
        return time.monotonic() - self._paused
