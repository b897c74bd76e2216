"""What the tests of both models' steps share: tiny batches and plain formulas in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tiny_prepared import tiny_recipe
from torch import Tensor, nn

from training.patches.sampler import Batch
from training.recipe import Recipe

CPU = torch.device("cpu")
FREE = {"clip_norm": 1e9}  # gradients as they are


def recipe_for(channels: int = 1, *, cycle: dict[str, Any] | None = None, **train: Any) -> Recipe:
    """Width 2, window 16, with one input channel or two (the CT and its mask)."""
    spec = {"in_channels": channels}
    cyclegan = spec | {"depth": 1, "blocks": 2}
    return tiny_recipe(
        model={"pix2pix": spec, "cyclegan": cyclegan},
        inference={"input_mask": {1: "body", 2: "channel"}[channels]},
        train=train,
        cycle=cycle or {},
    )


def batch_of(samples: int = 2, channels: int = 1, seed: int = 0) -> Batch:
    """Smooth blobs; a part of every window is air (weight 0), and the samples' bodies are of different sizes."""
    rng = torch.Generator().manual_seed(seed)
    coarse = torch.rand(samples, 1, 4, 4, 4, generator=rng)
    ct = nn.functional.interpolate(coarse, (16, 16, 16), mode="trilinear")
    weight = torch.ones_like(ct)
    weight[:, :, :, 12:] = 0.5
    for sample in range(samples):
        weight[sample, :, :4] = 4.0
        weight[sample, :, :, :, : 3 + 2 * sample] = 0.0
    body = (weight > 0).float()
    ct, pet = ct * body, 0.4 * ct * body
    seen = torch.cat([ct, *[body] * (channels - 1)], dim=1)
    return Batch(seen, pet, weight)


def part_of(batch: Batch, samples: slice) -> Batch:
    return Batch(batch.input[samples], batch.pet[samples], batch.weight[samples])


def gradients(network: nn.Module) -> list[Tensor]:
    """What the last update left."""
    found = [parameter.grad for parameter in network.parameters()]
    return [grad.clone() for grad in found if grad is not None]


def norm_of(network: nn.Module) -> float:
    return float(torch.cat([grad.flatten() for grad in gradients(network)]).norm())


def mean_l1(fake: NDArray[np.float64], real: NDArray[np.float64], weight: NDArray[np.float64]) -> float:
    """Sample by sample and voxel by voxel: sum(w |f - r|) / sum(w), then the mean of the samples."""
    samples = []
    for f, r, w in zip(fake, real, weight, strict=True):
        above, below = 0.0, 0.0
        for fv, rv, wv in zip(f.flat, r.flat, w.flat, strict=True):
            above += wv * abs(fv - rv)
            below += wv
        samples.append(above / below)
    return sum(samples) / len(samples)


def double(tensor: Tensor) -> NDArray[np.float64]:
    array: NDArray[np.float64] = tensor.detach().double().numpy()
    return array


class Counting(nn.Module):
    """A wrap that counts its forward passes, as DistributedDataParallel hides a module behind `module`."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.forwards = 0

    def forward(self, *inputs: Any) -> Any:
        self.forwards += 1
        return self.module(*inputs)
