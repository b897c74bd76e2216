"""Where head, trunk and legs end: dynamic programming over states that follow each other from foot to head.

    LEGS -> PELVIS -> BELLY -> CHEST -> NECK -> SKULL -> ABOVE         any may be missing at either end

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
    ABOVE = 6  # raised hands above the crown


DISTRICT_OF_LEVEL: Mapping[Level, District] = {
    Level.LEGS: District.LEGS,
    Level.PELVIS: District.TRUNK,
    Level.BELLY: District.TRUNK,
    Level.CHEST: District.TRUNK,
    Level.NECK: District.HEAD,
    Level.SKULL: District.HEAD,
    Level.ABOVE: District.HEAD,
}

STEP_COST = 1.0  # what a change of state costs, in slices that speak against it
SKULL_SHARE = 0.4  # of a slice through the brain is enclosed by bone, and more
NECK_GROWTH = 1.35  # downward, where a slice is this much larger than the neck's slimmest, the shoulders begin
CROWN_SLICES = 4  # bone and scalp above the last slice that shows brain


@dataclass(frozen=True, kw_only=True, slots=True)
class Landmarks:
    """The level of every slice, and how clearly the slices spoke.

    `levels` is [z] of `Level`; `crown` is the first slice above the head (the number of slices where the head's
    top is not in the volume); `certainty` gives 0..1 for each of head, trunk and legs that is present.
    """

    levels: NDArray[np.int64]
    crown: int
    certainty: Mapping[District, float]

    def districts(self) -> NDArray[np.uint8]:
        """The district of each slice's core, [z]."""
        table = np.array([DISTRICT_OF_LEVEL[level] for level in Level], dtype=np.uint8)
        return table[self.levels]


def find_landmarks(profile: Profile) -> Landmarks:
    """The best path through the levels for a volume, foot to head."""
    scores = np.stack([score(profile) for score in SCORES.values()]) * (profile.area > 0.5)
    levels = neck_to_shoulders(best_path(scores), profile.area)
    return Landmarks(levels=levels, crown=find_crown(levels), certainty=_certainty(scores, levels))


def best_path(scores: FloatArray) -> NDArray[np.int64]:
    """The ascending state path [z] with the greatest sum of `scores` [state, z]; states may be left out."""
    states, slices = scores.shape
    upward = np.tri(states, dtype=bool)  # [to, from]
    cost = STEP_COST * (1 - np.eye(states))
    total = scores[:, 0].copy()
    came_from = np.zeros((states, slices), dtype=np.int64)
    for z in range(1, slices):
        step = np.where(upward, total[None, :] - cost, -np.inf)
        came_from[:, z] = step.argmax(axis=1)
        total = step.max(axis=1) + scores[:, z]
    path = np.empty(slices, dtype=np.int64)
    path[-1] = total.argmax()
    for z in range(slices - 1, 0, -1):
        path[z - 1] = came_from[path[z], z]
    return path


def neck_to_shoulders(levels: NDArray[np.int64], area: FloatArray) -> NDArray[np.int64]:
    """Move the lower end of the neck to where the slices grow into the shoulders.

    Only where the neck's slimmest slice is seen: in a volume that ends below it nothing says how far it goes.
    """
    skull = np.flatnonzero(levels == Level.SKULL)
    trunk = np.flatnonzero(levels < Level.NECK)
    if not skull.size or not trunk.size:
        return levels
    slimmest = _slimmest(area, trunk[-1], skull[len(skull) // 2])
    below = np.flatnonzero((area[: slimmest + 1] > NECK_GROWTH * area[slimmest]) & (area[: slimmest + 1] > 0))
    if not below.size:
        return levels
    moved = levels.copy()
    first = int(below[-1]) + 1
    moved[:first][moved[:first] >= Level.NECK] = moved[trunk[-1]]
    moved[first:][moved[first:] < Level.NECK] = Level.NECK
    return moved


def _slimmest(area: FloatArray, low: int, high: int) -> int:
    return int(low + np.argmin(area[low : high + 1]))


def find_crown(levels: NDArray[np.int64]) -> int:
    """First slice above the head: a few above the last that shows brain."""
    above = np.flatnonzero(levels == Level.ABOVE)
    return min(int(above[0]) + CROWN_SLICES, len(levels)) if above.size else len(levels)


def gate(values: FloatArray, low: float, high: float) -> FloatArray:
    """0 at or below `low`, 1 at or above `high`, straight between."""
    return np.clip((values - low) / (high - low), 0.0, 1.0)


def _legs(p: Profile) -> FloatArray:
    return 1.0 + gate(p.cleft, 0.1, 0.6) - 3.0 * (gate(p.spine, 0.013, 0.047) + _brain(p) + gate(p.air, 0.03, 0.1))


def _pelvis(p: Profile) -> FloatArray:
    against = 0.2 + _lung(p) + _slim(p) + 3.0 * (gate(p.cleft, 0.05, 0.3) + _brain(p))
    return gate(p.spine, 0.005, 0.03) + 0.5 * _hips(p) - against


def _belly(p: Profile) -> FloatArray:
    against = 0.3 * _lung(p) + 0.4 * _hips(p) + _slim(p) + 3.0 * (gate(p.cleft, 0.1, 0.5) + _brain(p))
    return 1.1 * gate(p.spine, 0.01, 0.04) - against


def _chest(p: Profile) -> FloatArray:
    return gate(p.spine, 0.01, 0.04) + _lung(p) - _slim(p) - 3.0 * (gate(p.cleft, 0.1, 0.5) + _brain(p))


def _neck(p: Profile) -> FloatArray:
    against = _lung(p) + _brain(p) + 2.0 * gate(p.cleft, 0.2, 0.6)
    return gate(p.spine, 0.01, 0.05) + 1.8 * _slim(p) - 1.2 - against


def _skull(p: Profile) -> FloatArray:
    return 3.0 * gate(p.skull, 0.1, SKULL_SHARE) - 1.0


def _above(p: Profile) -> FloatArray:
    if not (p.skull > SKULL_SHARE).any():
        return np.full_like(p.area, -3.0)
    return 0.8 + gate(p.cleft, 0.1, 0.5) - 3.0 * _brain(p)


def _brain(p: Profile) -> FloatArray:
    return gate(p.skull, 0.15, SKULL_SHARE)


def _hips(p: Profile) -> FloatArray:
    return gate(p.hips, 0.01, 0.025)


def _lung(p: Profile) -> FloatArray:
    return gate(p.air, 0.05, 0.15)


def _slim(p: Profile) -> FloatArray:
    """1 where the slice is too small for a trunk, next to the volume's typical trunk slice.

    A skull says best what is small: no trunk is as slim as a face. Without one the measure is the median of the
    slices with a spine, and only a neck is clearly smaller.
    """
    brain = p.skull > SKULL_SHARE
    if brain.sum() >= 3:
        return 1.0 - gate(p.area / float(np.median(p.area[brain])), 1.3, 1.8)
    spine = p.spine > 0.04
    typical = float(np.median(p.area[spine])) if spine.any() else 1.0
    return 1.0 - gate(p.area / max(typical, 1.0), 0.22, 0.36)


SCORES: Mapping[Level, Callable[[Profile], FloatArray]] = {
    Level.LEGS: _legs,
    Level.PELVIS: _pelvis,
    Level.BELLY: _belly,
    Level.CHEST: _chest,
    Level.NECK: _neck,
    Level.SKULL: _skull,
    Level.ABOVE: _above,
}


def _certainty(scores: FloatArray, levels: NDArray[np.int64]) -> dict[District, float]:
    """How far, on average, the chosen district's slices preferred it to the best other district, as 0..1."""
    district = np.array([DISTRICT_OF_LEVEL[level] for level in Level])
    scores = scores[: Level.ABOVE]  # hands above the head look like legs; the head below them tells
    best = {d: scores[district[: Level.ABOVE] == d].max(axis=0) for d in District if (district == d).any()}
    chosen = np.where(levels == Level.ABOVE, 0, district[levels])
    result = {}
    for d in (d for d in best if (chosen == d).any()):
        here = chosen == d
        others = np.max([best[o] for o in best if o != d], axis=0)
        margin = float(np.mean(best[d][here] - others[here]))
        result[d] = float(np.clip(0.5 + margin / 2.0, 0.0, 1.0))
    return result
