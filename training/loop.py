"""Training one network: the loop, its schedule, its checkpoints."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pipeline.bundle import NETWORK_KEYS
from training.cases import Case
from training.patches import PatchSampler, augment
from training.pix2pix import Pix2Pix
from training.recipe import Recipe

CHECKPOINT_EVERY = 250
REPORT_EVERY = 25


@dataclass(frozen=True, slots=True)
class TrainProgress:
    """Where one network's training is; losses are means since the last report."""

    network: str
    step: int
    steps: int
    l1: float
    loss_generator: float
    loss_discriminator: float
    steps_per_s: float


@dataclass(frozen=True, slots=True)
class TrainedNetwork:
    """A finished generator (averaged weights, eval mode, on the CPU) and what its training saw."""

    key: str
    network: nn.Module
    steps: int
    seconds: float
    final_l1: float


def learning_rate_factor(step: int, steps: int, decay_fraction: float) -> float:
    """1 until the decay begins, then linearly to 0 at the last step (the paper: over the last third)."""
    decay = decay_fraction * steps
    return 1.0 if decay <= 0 else min(1.0, (steps - step) / decay)


def train_network(
    key: str,
    cases: Sequence[Case],
    recipe: Recipe,
    *,
    steps: int,
    device: torch.device,
    seed: int,
    run_dir: Path | None = None,
    on_progress: Callable[[TrainProgress], None] = lambda _: None,
) -> TrainedNetwork:
    """Train the generator of `key` for `steps` steps, resuming from `run_dir` when its checkpoint fits.

    Step i draws its patches from (seed, network, i) alone, so a resumed run sees the same patches.

    Raises:
        ValueError: no case has the district.
    """
    number = NETWORK_KEYS.index(key)
    torch.manual_seed(seed * 1000 + number)
    model = Pix2Pix(recipe, device)
    sampler = PatchSampler(
        cases,
        key,
        window=recipe.model.generator.window,
        neighbor_weight=recipe.train.neighbor_weight,
        lesion_share=recipe.train.lesion_share,
        lesion_weight=recipe.train.lesion_weight,
        district_input=recipe.inference.input_mask == "district",
    )
    path = None if run_dir is None else run_dir / f"{key}.checkpoint.pt"
    identity = f"{recipe.training_digest}/{seed}/{steps}"
    done, seconds, l1 = _resume(path, model, identity)
    sums, since, began = np.zeros(3), done, time.monotonic()
    for step in range(done, steps):
        rng = np.random.default_rng([seed, number, step])
        batch = augment(sampler.draw(recipe.train.batch, rng), recipe.augment, rng)
        losses = model.step(batch, learning_rate_factor(step, steps, recipe.train.decay_fraction))
        sums += (losses.l1, losses.generator, losses.discriminator)
        done = step + 1
        if done % REPORT_EVERY == 0 or done == steps:
            l1, g, d = (float(v) for v in sums / (done - since))
            rate = (done - since) / max(time.monotonic() - began, 1e-9)
            seconds += time.monotonic() - began
            sums, since, began = np.zeros(3), done, time.monotonic()
            on_progress(TrainProgress(key, done, steps, l1, g, d, rate))
        if path is not None and (done % CHECKPOINT_EVERY == 0 or done == steps):
            _save(path, {"identity": identity, "step": done, "seconds": seconds, "l1": l1, "model": model.state()})
    network = model.averaged.to("cpu").eval()
    return TrainedNetwork(key, network, steps, seconds, l1)


def _resume(path: Path | None, model: Pix2Pix, identity: str) -> tuple[int, float, float]:
    if path is None or not path.is_file():
        return 0, 0.0, float("nan")
    saved: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    if saved["identity"] != identity:
        return 0, 0.0, float("nan")
    model.restore(saved["model"])
    return int(saved["step"]), float(saved["seconds"]), float(saved["l1"])


def _save(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.with_suffix(".tmp")
    with temp.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    temp.replace(path)
