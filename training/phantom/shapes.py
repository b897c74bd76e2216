"""Solids that can be asked, on open coordinate arrays, which voxels lie inside.

Coordinates are reference millimetres of the anatomy (x left, y back, z head), given as three arrays that
broadcast to [z, y, x]; every shape computes as much as it can on the small arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import PchipInterpolator
from scipy.spatial.transform import Rotation

Coords = NDArray[np.float32]
Mask = NDArray[np.bool_]
Point = tuple[float, float, float]  # x, y, z
Bounds = tuple[Point, Point]
Predicate = Callable[[Coords, Coords, Coords], Mask]


class Shape(Protocol):
    """A solid: where it can be at all, and what is inside."""

    @property
    def bounds(self) -> Bounds:
        """Lower and upper corner (x, y, z) in mm of a box around the solid."""

    def inside(self, x: Coords, y: Coords, z: Coords) -> Mask:
        """Which points are inside; x, y, z broadcast to the result."""


@dataclass(frozen=True)
class Ellipsoid:
    """|x/a|^p + |y/b|^p + |z/c|^p < 1 about `centre`, turned by `angles_deg` about x, y and z. p 2 if turned."""

    centre: Point
    radii: Point
    angles_deg: Point = (0.0, 0.0, 0.0)
    power: float = 2.0

    @property
    def bounds(self) -> Bounds:
        reach = self.radii if self.angles_deg == (0.0, 0.0, 0.0) else (max(self.radii),) * 3
        return _box(self.centre, reach)

    def inside(self, x: Coords, y: Coords, z: Coords) -> Mask:
        offsets = (x - np.float32(self.centre[0]), y - np.float32(self.centre[1]), z - np.float32(self.centre[2]))
        if self.angles_deg == (0.0, 0.0, 0.0):
            u, v, w = (
                np.abs(o / np.float32(r)) ** np.float32(self.power) for o, r in zip(offsets, self.radii, strict=True)
            )
            unturned: Mask = (u + v) + w < 1
            return unturned
        turn = Rotation.from_euler("xyz", self.angles_deg, degrees=True).as_matrix().T.astype(np.float32)
        total: Coords | None = None
        for row, radius in zip(turn, self.radii, strict=True):
            part = (row[0] * offsets[0] + row[1] * offsets[1] + row[2] * offsets[2]) / np.float32(radius)
            part *= part
            total = part if total is None else total + part
        assert total is not None
        return total < 1


@dataclass(frozen=True)
class Capsule:
    """A rod with round ends from `start` to `end` whose radius goes from `r_start` to `r_end`."""

    start: Point
    end: Point
    r_start: float
    r_end: float

    @property
    def bounds(self) -> Bounds:
        reach = max(self.r_start, self.r_end)
        low = tuple(min(a, b) - reach for a, b in zip(self.start, self.end, strict=True))
        high = tuple(max(a, b) + reach for a, b in zip(self.start, self.end, strict=True))
        return low, high  # type: ignore[return-value]

    def inside(self, x: Coords, y: Coords, z: Coords) -> Mask:
        sx, sy, sz = (np.float32(c) for c in self.start)
        dx, dy, dz = (np.float32(b - a) for a, b in zip(self.start, self.end, strict=True))
        length2 = np.float32(max(float(dx * dx + dy * dy + dz * dz), 1e-6))
        qx, qy, qz = x - sx, y - sy, z - sz
        along = (qx * dx + qy * dy) + qz * dz
        t = np.clip(along / length2, 0, 1)
        gap2 = (qx * qx + qy * qy) + qz * qz - 2 * t * along + t * t * length2
        radius = np.float32(self.r_start) + t * np.float32(self.r_end - self.r_start)
        near: Mask = gap2 < radius * radius
        return near


@dataclass(frozen=True)
class Profile:
    """A stack of super-ellipses along z: half-widths and centres are smooth through knots `z` (ascending)."""

    z: Sequence[float]
    half_x: Sequence[float]
    half_y: Sequence[float]
    centre_x: Sequence[float] | None = None
    centre_y: Sequence[float] | None = None
    power: float = 2.4

    @cached_property
    def _curves(self) -> tuple[PchipInterpolator, ...]:
        zeros = [0.0] * len(self.z)
        rows = (self.half_x, self.half_y, self.centre_x or zeros, self.centre_y or zeros)
        return tuple(PchipInterpolator(self.z, row) for row in rows)

    @property
    def bounds(self) -> Bounds:
        cx, cy = self.centre_x or [0.0], self.centre_y or [0.0]
        low = (min(cx) - max(self.half_x), min(cy) - max(self.half_y), self.z[0])
        return low, (max(cx) + max(self.half_x), max(cy) + max(self.half_y), self.z[-1])

    def _value(self, curve: int, z: float) -> float:
        return float(self._curves[curve](np.float32(np.clip(z, self.z[0], self.z[-1]))))

    def half_width(self, z: float) -> float:
        """Half-width along x at height z."""
        return self._value(0, z)

    def front(self, z: float) -> float:
        """The most frontal y at height z."""
        return self._value(3, z) - self._value(1, z)

    def back(self, z: float) -> float:
        """The most dorsal y at height z."""
        return self._value(3, z) + self._value(1, z)

    def grown(self, dx: Sequence[float] | float, dy: Sequence[float] | float | None = None) -> Profile:
        """The same stack with half-widths larger by `dx` and `dy` mm (per knot, or one number)."""
        dy = dx if dy is None else dy
        half_x = np.maximum(np.asarray(self.half_x) + dx, 1.0).tolist()
        half_y = np.maximum(np.asarray(self.half_y) + dy, 1.0).tolist()
        return Profile(self.z, half_x, half_y, self.centre_x, self.centre_y, self.power)

    def inside(self, x: Coords, y: Coords, z: Coords) -> Mask:
        a, b, cx, cy = (np.asarray(f(np.clip(z, self.z[0], self.z[-1])), dtype=np.float32) for f in self._curves)
        u = (np.abs(x - cx) / a) ** np.float32(self.power)
        v = (np.abs(y - cy) / b) ** np.float32(self.power)
        v = np.where((z >= self.z[0]) & (z <= self.z[-1]), v, np.float32(2))
        within: Mask = u + v < 1
        return within


@dataclass(frozen=True)
class Where:
    """The part of a solid where `predicate(x, y, z)` holds."""

    shape: Shape
    predicate: Predicate

    @property
    def bounds(self) -> Bounds:
        return self.shape.bounds

    def inside(self, x: Coords, y: Coords, z: Coords) -> Mask:
        return self.shape.inside(x, y, z) & self.predicate(x, y, z)


@dataclass(frozen=True)
class Within:
    """The part of a solid between planes: `low <= coordinate < high` for each axis given."""

    shape: Shape
    x: tuple[float, float] = (-np.inf, np.inf)
    y: tuple[float, float] = (-np.inf, np.inf)
    z: tuple[float, float] = (-np.inf, np.inf)

    @property
    def bounds(self) -> Bounds:
        low, high = self.shape.bounds
        limits = (self.x, self.y, self.z)
        lower = tuple(max(v, limit[0]) for v, limit in zip(low, limits, strict=True))
        return lower, tuple(min(v, limit[1]) for v, limit in zip(high, limits, strict=True))  # type: ignore[return-value]

    def inside(self, x: Coords, y: Coords, z: Coords) -> Mask:
        kept = self.shape.inside(x, y, z)
        for axis, (low, high) in zip((x, y, z), (self.x, self.y, self.z), strict=True):
            if low > -np.inf or high < np.inf:
                kept = kept & ((axis >= np.float32(low)) & (axis < np.float32(high)))
        return kept


def chain(points: Sequence[Point], radii: Sequence[float]) -> list[Capsule]:
    """Capsules through the points, one radius per point."""
    ends = zip(points[1:], radii[1:], strict=True)
    return [Capsule(a, b, ra, rb) for (a, ra), (b, rb) in zip(zip(points, radii, strict=True), ends, strict=False)]


def _box(centre: Point, reach: Point) -> Bounds:
    low = tuple(c - r for c, r in zip(centre, reach, strict=True))
    high = tuple(c + r for c, r in zip(centre, reach, strict=True))
    return low, high  # type: ignore[return-value]
