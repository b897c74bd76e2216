"""A list of strokes (solid, structure, what it may paint over), and the person they are drawn for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from training.phantom.shapes import Ellipsoid, Point, Shape
from training.phantom.spec import Pose

SIDES = (("right", -1.0), ("left", 1.0))  # name, sign of x (LPS: +x is the patient's left)


@dataclass(frozen=True, slots=True)
class Stroke:
    """Paint `structure` inside `shape`, only over the structures in `over` (None: over everything)."""

    shape: Shape
    structure: str
    over: frozenset[str] | None = None
    region: int = 0  # a District to write into the district map as well


@dataclass(frozen=True, kw_only=True, slots=True)
class Person:
    """The drawn patient. The anatomy lives in reference mm; `scale` (x, y, z) makes this person's size of it."""

    scale: Point
    fat_mm: float
    female: bool
    pose: Pose
    arm_gap_mm: float
    organ_scale: float  # spread of single organs' size, +-
    organ_shift_mm: float  # spread of single organs' place, +-


@dataclass
class Sketch:
    """Collects strokes; `vary` gives an organ its own size and place."""

    person: Person
    rng: np.random.Generator
    strokes: list[Stroke] = field(default_factory=list)
    bladder_fill: float = 0.9  # size of the drawn bladder: a full one dilutes what it holds

    def add(self, structure: str, shape: Shape, *, over: Iterable[str] | None = None, region: int = 0) -> None:
        self.strokes.append(Stroke(shape, structure, None if over is None else frozenset(over), region))

    def add_all(
        self, structure: str, shapes: Iterable[Shape], *, over: Iterable[str] | None = None, region: int = 0
    ) -> None:
        over = None if over is None else frozenset(over)
        for shape in shapes:
            self.add(structure, shape, over=over, region=region)

    def shift(self, amount: float = 1.0) -> Point:
        """A random displacement within the person's organ shift."""
        x, y, z = self.rng.uniform(-1, 1, 3) * self.person.organ_shift_mm * amount
        return float(x), float(y), float(z)

    def size(self) -> float:
        """A random size factor about 1."""
        return float(1 + self.rng.uniform(-1, 1) * self.person.organ_scale)

    def organ(self, centre: Point, radii: Point, angles_deg: Point = (0, 0, 0), *, power: float = 2.0) -> Ellipsoid:
        """An ellipsoid with its own size, place and a turn of up to 8 degrees."""
        turn = tuple(float(a + self.rng.uniform(-8, 8)) for a in angles_deg) if power == 2.0 else (0.0, 0.0, 0.0)
        size = self.size()
        return Ellipsoid(plus(centre, self.shift()), scaled(radii, size), turn, power)  # type: ignore[arg-type]


def plus(a: Point, b: Point) -> Point:
    return a[0] + b[0], a[1] + b[1], a[2] + b[2]


def scaled(a: Point, factor: float) -> Point:
    return a[0] * factor, a[1] * factor, a[2] * factor


def between(a: Point, b: Point, t: float) -> Point:
    """The point at fraction t of the way from a to b."""
    return a[0] + (b[0] - a[0]) * t, a[1] + (b[1] - a[1]) * t, a[2] + (b[2] - a[2]) * t
