"""Where head, trunk and legs end: dynamic programming over states that follow each other from foot to head.

    LEGS -> PELVIS -> BELLY -> CHEST -> NECK -> SKULL         any may be missing at either end

Each slice speaks for every state through soft gates on its `Profile`; a path that goes upward through the states
collects what the slices say. The gates compare shares and ratios only, never lengths or areas in cm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from pipeline.districts.profile import FloatArray, Profile
from pipeline.types import District


class Level(IntEnum):
    """States of a slice, foot to head."""

    LEGS = 0
    PELVIS = 1
    BELLY = 2
    CHEST = 3
    NECK = 4
    SKULL = 5


DISTRICT_OF_LEVEL: Mapping[Level, District] = {
    Level.LEGS: District.LEGS,
    Level.PELVIS: District.TRUNK,
    Level.BELLY: District.TRUNK,
    Level.CHEST: District.TRUNK,
    Level.NECK: District.HEAD,
    Level.SKULL: District.HEAD,
}

STEP_COST = 1.5  # what a change of state costs, in slices that speak against it


@dataclass(frozen=True, kw_only=True, slots=True)
class Landmarks:
    """The level of every slice, and how clearly the slices spoke.

    `levels` is [z] of `Level`; `certainty` gives 0..1 for each of head, trunk and legs that is present.
    """

    levels: NDArray[np.int64]
    certainty: Mapping[District, float]

    def districts(self) -> NDArray[np.uint8]:
        """The district of each slice's core, [z]."""
        table = np.array([DISTRICT_OF_LEVEL[level] for level in Level], dtype=np.uint8)
        return table[self.levels]


def find_landmarks(profile: Profile) -> Landmarks:
    """The best path through the levels for a volume, foot to head."""
    scores = np.stack([score(profile) for score in SCORES.values()])
    levels = best_path(scores)
    return Landmarks(levels=levels, certainty=_certainty(scores, levels))


def best_path(scores: FloatArray) -> NDArray[np.int64]:
    """The ascending state path [z] with the greatest sum of `scores` [state, z]; states may be left out."""
    states, slices = scores.shape
    total = scores[:, 0].copy()
    came_from = np.zeros((states, slices), dtype=np.int64)
    for z in range(1, slices):
        # step[s, t]: from state t to s >= t; leaving a state out costs no more than passing through it
        step = np.where(np.tri(states, dtype=bool), total[None, :] - STEP_COST * (1 - np.eye(states)), -np.inf)
        came_from[:, z] = step.argmax(axis=1)
        total = step.max(axis=1) + scores[:, z]
    path = np.empty(slices, dtype=np.int64)
    path[-1] = total.argmax()
    for z in range(slices - 1, 0, -1):
        path[z - 1] = came_from[path[z], z]
    return path


def gate(values: FloatArray, low: float, high: float) -> FloatArray:
    """0 at or below `low`, 1 at or above `high`, straight between."""
    return np.clip((values - low) / (high - low), 0.0, 1.0)


def _relative_area(p: Profile) -> FloatArray:
    """Area of each slice over that of the volume's typical trunk slice.

    A skull gives the scale where there is one (a trunk is about three skulls wide and deep); else the median of
    the slices with a spine; else the median of all.
    """
    skull = p.skull > 0.4
    if skull.sum() >= 3:
        return p.area / (TRUNK_PER_SKULL * np.median(p.area[skull]))
    spine = p.spine > 0.04
    chosen = p.area[spine] if spine.any() else p.area
    return p.area / np.maximum(np.median(chosen), 1.0)


TRUNK_PER_SKULL = 2.8


def _legs(p: Profile) -> FloatArray:
    return (
        1.0
        + 1.0 * gate(p.cleft, 0.1, 0.6)
        - 3.0 * gate(p.spine, 0.01, 0.04)
        - 3.0 * gate(p.skull, 0.15, 0.4)
        - 3.0 * gate(p.air, 0.03, 0.1)
    )


def _pelvis(p: Profile) -> FloatArray:
    return (
        gate(p.spine, 0.005, 0.03)
        - 3.0 * gate(p.cleft, 0.2, 0.6)
        - 3.0 * gate(p.skull, 0.15, 0.4)
        - 1.0 * gate(p.air, 0.05, 0.15)
        - _small(p)
    )


def _belly(p: Profile) -> FloatArray:
    return (
        1.2 * gate(p.spine, 0.01, 0.04)
        - 0.3 * gate(p.air, 0.05, 0.15)
        - 3.0 * gate(p.cleft, 0.1, 0.5)
        - 3.0 * gate(p.skull, 0.15, 0.4)
        - _small(p)
    )


def _chest(p: Profile) -> FloatArray:
    return (
        gate(p.spine, 0.01, 0.04)
        + gate(p.air, 0.05, 0.15)
        - 3.0 * gate(p.cleft, 0.1, 0.5)
        - 3.0 * gate(p.skull, 0.15, 0.4)
        - _small(p)
    )


def _neck(p: Profile) -> FloatArray:
    return (
        gate(p.spine, 0.01, 0.05)
        + 1.0 * _small(p)
        - 1.2
        - 2.0 * gate(p.air, 0.05, 0.15)
        - 1.0 * gate(p.skull, 0.15, 0.4)
        + 0.8 * _small(p)
        - 2.0 * gate(p.cleft, 0.2, 0.6)
    )


def _skull(p: Profile) -> FloatArray:
    return 3.0 * gate(p.skull, 0.1, 0.4) - 1.0


def _small(p: Profile) -> FloatArray:
    """1 where the slice is too small for a trunk."""
    return 1.0 - gate(_relative_area(p), 0.4, 0.6)


SCORES: Mapping[Level, Callable[[Profile], FloatArray]] = {
    Level.LEGS: _legs,
    Level.PELVIS: _pelvis,
    Level.BELLY: _belly,
    Level.CHEST: _chest,
    Level.NECK: _neck,
    Level.SKULL: _skull,
}


def _certainty(scores: FloatArray, levels: NDArray[np.int64]) -> dict[District, float]:
    """How far, on average, the chosen district's slices preferred it to the best other district, as 0..1."""
    district = np.array([DISTRICT_OF_LEVEL[level] for level in Level])
    best = {d: scores[district == d].max(axis=0) for d in set(district.tolist())}
    chosen = district[levels]
    result = {}
    for d in sorted(set(chosen.tolist())):
        here = chosen == d
        others = np.max([best[o] for o in best if o != d], axis=0)
        margin = float(np.mean(best[d][here] - others[here]))
        result[District(d)] = float(np.clip(0.5 + margin / 2.0, 0.0, 1.0))
    return result
