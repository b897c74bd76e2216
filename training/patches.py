"""Cutting and augmenting training patches. Every random number comes from the generator that is passed in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from numpy.typing import NDArray
from torch import Tensor

from pipeline.types import WHOLE_BODY, District
from training.cases import Case
from training.recipe import AugmentRecipe

JITTER = 0.375  # of the window: how far from the patch's centre the chosen voxel may lie, as windows at inference do


@dataclass(frozen=True, slots=True)
class Batch:
    """(N, 1, w, w, w) float32 each. `weight` is the L1 weight: 1 in the district, less beside it, more in lesions."""

    ct: Tensor
    pet: Tensor
    weight: Tensor

    @property
    def body(self) -> Tensor:
        """1 where the loss looks, 0 elsewhere."""
        return (self.weight > 0).to(self.weight.dtype)


class PatchSampler:
    """Draws patches whose chosen voxel lies in one district (or anywhere in the body for the whole-body network)."""

    def __init__(
        self,
        cases: Sequence[Case],
        key: str,
        *,
        window: int,
        neighbor_weight: float,
        lesion_share: float,
        lesion_weight: float = 1.0,
        district_input: bool = False,
    ) -> None:
        self._label = None if key == WHOLE_BODY else District[key.upper()]
        self._window, self._neighbor, self._lesion_share = window, neighbor_weight, lesion_share
        self._district_input, self._lesion_weight = district_input, lesion_weight
        self._cases = [case for case in cases if self._mask(case).any()]
        if not self._cases:
            raise ValueError(f"no training case has any voxel of {key}")
        self._voxels = [np.flatnonzero(self._mask(case)).astype(np.uint32) for case in self._cases]
        self._lesions = [np.flatnonzero(self._mask(case) & case.lesions).astype(np.uint32) for case in self._cases]

    def _mask(self, case: Case) -> NDArray[np.bool_]:
        mask: NDArray[np.bool_] = case.districts > 0 if self._label is None else case.districts == self._label
        return mask

    def __len__(self) -> int:
        """The number of cases that have the district."""
        return len(self._cases)

    def draw(self, batch: int, rng: np.random.Generator) -> Batch:
        """A batch of patches; a lesion is aimed at with the probability `lesion_share` where the case has one."""
        parts = [self._one(rng) for _ in range(batch)]
        ct, pet, weight = (torch.from_numpy(np.stack(rows))[:, None] for rows in zip(*parts, strict=True))
        return Batch(ct, pet, weight)

    def _one(self, rng: np.random.Generator) -> tuple[NDArray[np.float32], ...]:
        index = int(rng.integers(len(self._cases)))
        case, lesions = self._cases[index], self._lesions[index]
        pool = lesions if lesions.size and rng.random() < self._lesion_share else self._voxels[index]
        chosen = np.unravel_index(int(pool[int(rng.integers(pool.size))]), case.ct.shape)
        reach = int(self._window * JITTER)
        shift = rng.integers(-reach, reach + 1, 3)
        start = [int(c) + int(s) - self._window // 2 for c, s in zip(chosen, shift, strict=True)]
        volumes = (case.ct, case.pet, case.districts, case.lesions)
        ct, pet, districts, sick = (cut(v, start, self._window) for v in volumes)
        own = districts > 0 if self._label is None else districts == self._label
        weight = np.where(own, np.float32(1), np.where(districts > 0, np.float32(self._neighbor), np.float32(0)))
        weight = np.where(sick, weight * np.float32(self._lesion_weight), weight)
        ct = ct.astype(np.float32)
        return (ct * own if self._district_input else ct), pet.astype(np.float32), weight.astype(np.float32)


def cut(volume: NDArray[Any], start: Sequence[int], window: int) -> NDArray[Any]:
    """A cube of `window` voxels from `start` [z, y, x]; 0 where it reaches past the volume."""
    cube = np.zeros((window,) * volume.ndim, dtype=volume.dtype)
    source, target = [], []
    for first, size in zip(start, volume.shape, strict=True):
        low, high = max(first, 0), min(first + window, size)
        if high <= low:
            return cube
        source.append(slice(low, high))
        target.append(slice(low - first, high - first))
    cube[tuple(target)] = volume[tuple(source)]
    return cube


def augment(batch: Batch, recipe: AugmentRecipe, rng: np.random.Generator) -> Batch:
    """Turn and flip CT, PET and weights alike; add noise to the CT inside the body only (air stays exactly 0)."""
    ct, pet, weight = batch.ct, batch.pet, batch.weight
    if recipe.flips:
        axes = [axis for axis in (2, 3, 4) if rng.random() < 0.5]
        ct, pet, weight = (torch.flip(t, axes) if axes else t for t in (ct, pet, weight))
    if recipe.rotation_deg:
        angles = rng.uniform(-recipe.rotation_deg, recipe.rotation_deg, (ct.shape[0], 3))
        ct, pet, weight = _turned(ct, angles), _turned(pet, angles), _turned(weight, angles, mode="nearest")
    if recipe.ct_noise:
        noise = rng.standard_normal(tuple(ct.shape), dtype=np.float32) * np.float32(recipe.ct_noise)
        ct = (ct + torch.from_numpy(noise) * (ct > 0)).clamp(0, 1)
    return Batch(ct, pet, weight)


def _turned(volume: Tensor, angles_deg: NDArray[np.float64], mode: str = "bilinear") -> Tensor:
    matrices = np.stack([_rotation(*(math.radians(a) for a in row)) for row in angles_deg])
    theta = torch.zeros(len(matrices), 3, 4)
    theta[:, :, :3] = torch.from_numpy(matrices)
    grid = F.affine_grid(theta, list(volume.shape), align_corners=False)
    return F.grid_sample(volume, grid, mode=mode, padding_mode="zeros", align_corners=False)


def _rotation(a: float, b: float, c: float) -> NDArray[np.float64]:
    """Rotation by a, b, c (radians) about x, y and z in turn."""
    x = np.array([[1, 0, 0], [0, math.cos(a), -math.sin(a)], [0, math.sin(a), math.cos(a)]])
    y = np.array([[math.cos(b), 0, math.sin(b)], [0, 1, 0], [-math.sin(b), 0, math.cos(b)]])
    z = np.array([[math.cos(c), -math.sin(c), 0], [math.sin(c), math.cos(c), 0], [0, 0, 1]])
    turned: NDArray[np.float64] = z @ y @ x
    return turned
