"""Skull, brain, face and neck, in reference millimetres."""

from __future__ import annotations

import numpy as np

from training.phantom.shapes import Capsule, Coords, Ellipsoid, Mask, Point, Where, Within, chain
from training.phantom.sketch import SIDES, Sketch

BRAIN: Point = (0.0, 4.0, 530.0)


def _above_skull_base(x: Coords, y: Coords, z: Coords) -> Mask:
    """The floor of the skull runs down from the brow to the back of the head; `x` does not matter."""
    del x
    above: Mask = z > np.where(y < 0, 486 - 0.1 * y, 486 - 0.95 * y)
    return above


def _folds(x: Coords, y: Coords, z: Coords) -> Coords:
    """A wavy surface, 0 at rest: stands for gyri where grey matter meets white."""
    waves: Coords = np.sin(0.21 * x + 0.6) * np.sin(0.19 * y) + np.sin(0.2 * y + 0.17 * z) * np.sin(0.18 * z + 0.11 * x)
    return waves


def _white(x: Coords, y: Coords, z: Coords) -> Mask:
    radius2 = ((x - BRAIN[0]) / 57.5) ** 2 + ((y - BRAIN[1]) / 77.5) ** 2 + ((z - BRAIN[2]) / 84.5) ** 2
    white: Mask = (np.sqrt(radius2) < 0.76 + 0.1 * _folds(x, y, z)) & (np.abs(x) > 4)
    return white


def draw_head(sketch: Sketch) -> None:
    """Everything above the neck's base, painted over the muscle that the soft body left there."""
    grow = 1 + 0.03 * float(sketch.rng.uniform(-1, 1))
    outer, inner = (65.5 * grow, 86 * grow, 93 * grow), (57.5 * grow, 77.5 * grow, 84.5 * grow)
    shell = Ellipsoid(BRAIN, outer, power=2.15)
    soft = ("muscle", "fat")
    sketch.add("cortical_bone", Where(shell, lambda x, y, z: _above_skull_base(x, y, z + 9)), over=soft)
    diploe = tuple((a + b) / 2 for a, b in zip(outer, inner, strict=True))
    sketch.add("red_marrow", Where(Ellipsoid(BRAIN, diploe, power=2.15), _above_skull_base), over=["cortical_bone"])  # type: ignore[arg-type]
    shell_in = Ellipsoid(BRAIN, tuple(v + 2 for v in inner), power=2.15)  # type: ignore[arg-type]
    sketch.add("cortical_bone", Where(shell_in, _above_skull_base), over=["red_marrow"])
    brain = Ellipsoid(BRAIN, inner, power=2.15)
    inside = Where(brain, _above_skull_base)
    sketch.add("csf", inside, over=["cortical_bone", "red_marrow", "muscle"])
    cortex = Ellipsoid(BRAIN, tuple(v - 2.5 for v in inner), power=2.15)  # type: ignore[arg-type]
    skull = ("csf",)
    sketch.add("grey_matter", Where(cortex, lambda x, y, z: _above_skull_base(x, y, z) & (np.abs(x) > 1.5)), over=skull)
    sketch.add(
        "white_matter",
        Where(cortex, lambda x, y, z: _above_skull_base(x, y, z) & _white(x, y, z)),
        over=["grey_matter"],
    )
    sketch.add("white_matter", Ellipsoid((0, 6, 538), (14, 34, 8)), over=("csf", "grey_matter"))
    for _, s in SIDES:
        brain_parts = ("white_matter", "grey_matter", "csf")
        sketch.add("basal_ganglia", Ellipsoid((s * 22, -8, 522), (9, 17, 14)), over=brain_parts)
        sketch.add("basal_ganglia", Ellipsoid((s * 11, 10, 522), (8, 12, 10)), over=brain_parts)
        sketch.add("csf", Ellipsoid((s * 9, 2, 542), (6, 28, 8), (0, 0, s * 8)), over=brain_parts)
        lobe = Ellipsoid((s * 21, 46, 466), (27, 27, 22))
        sketch.add("csf", Ellipsoid(lobe.centre, (30, 30, 25)), over=(*brain_parts, "cortical_bone", *soft))
        sketch.add("cerebellum", lobe, over=(*brain_parts, "cortical_bone", *soft))
    back = Ellipsoid((0, 48, 464), (56, 38, 32))
    sketch.add("cortical_bone", Within(back, z=(-np.inf, 478.0)), over=("muscle", "fat"))
    stem = chain([(0, 20, 505), (0, 24, 450)], [14, 9])
    sketch.add_all("white_matter", stem, over=("csf", "grey_matter", "cortical_bone", "muscle", "red_marrow"))
    _draw_face(sketch)
    _draw_neck(sketch)


def _draw_face(sketch: Sketch) -> None:
    soft = ("muscle", "fat")
    for _, s in SIDES:
        jaw: list[Point] = [(0, -86, 424), (s * 34, -62, 424), (s * 48, -14, 440), (s * 52, -4, 482)]
        sketch.add_all("cortical_bone", chain(jaw, [8, 8, 7, 6]), over=soft)
        sketch.add_all("red_marrow", chain(jaw[:3], [4.5, 4.5, 4]), over=["cortical_bone"])
        sketch.add_all("tooth", chain([(0, -84, 438), (s * 22, -70, 438), (s * 28, -44, 438)], [5, 5, 5]), over=soft)
        sketch.add_all(
            "cortical_bone", chain([(s * 34, -70, 470), (s * 58, -40, 474), (s * 66, 0, 482)], [7, 5, 4]), over=soft
        )
        sketch.add("cortical_bone", Ellipsoid((s * 27, -54, 462), (21, 25, 20)), over=soft)
        sketch.add("airway", Ellipsoid((s * 28, -52, 462), (17, 21, 16)), over=None)
        sketch.add("fat", Ellipsoid((s * 31, -62, 497), (19, 24, 17)), over=None)
        sketch.add("eye", Ellipsoid((s * 32, -70, 497), (12, 12, 12)), over=None)
        sketch.add("cortical_bone", Ellipsoid((s * 50, 20, 482), (16, 18, 14)), over=soft)
        sketch.add("salivary", Ellipsoid((s * 59, 2, 450), (14, 22, 27)), over=soft)
        sketch.add("salivary", Ellipsoid((s * 32, -42, 416), (13, 18, 13)), over=soft)
    sketch.add("airway", Ellipsoid((0, -66, 466), (8, 28, 20)), over=None)
    sketch.add("tongue", Ellipsoid((0, -48, 434), (25, 35, 19)), over=(*soft, "tooth"))


def _draw_neck(sketch: Sketch) -> None:
    over = ("muscle", "fat")
    throat: list[Point] = [(0, -38, 470), (0, -14, 450), (0, -12, 420)]
    sketch.add_all("airway", chain(throat, [8, 8, 8]), over=None)
    for _, s in SIDES:
        sketch.add("tonsil", Ellipsoid((s * 15, -16, 440), (6, 8, 11)), over=over)
        sketch.add("thyroid", sketch.organ((s * 18, -18, 366), (10, 11, 22)), over=over)
        sketch.add("blood", Capsule((s * 34, 4, 320), (s * 38, 6, 440), 6, 6), over=over)
        sketch.add("fat", Capsule((s * 44, 22, 350), (s * 44, 26, 440), 6, 5), over=["muscle"])
    sketch.add("cartilage", Within(Ellipsoid((0, -22, 394), (19, 17, 15)), y=(-np.inf, -14.0)), over=over)
