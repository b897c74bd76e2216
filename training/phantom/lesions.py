"""Lesions: most can be seen on CT, some cannot, and those are an error that no network can avoid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.types import Grid, LabelVolume
from training.phantom.shapes import Coords, Ellipsoid, Point
from training.phantom.spec import Disease, Lesion
from training.phantom.tissues import LABEL


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of lesion: where it grows, how often, what the CT shows (None: nothing), size and uptake ranges."""

    organ: str
    share: float
    hu: float | None
    diameter_mm: tuple[float, float]
    suv: tuple[float, float]


KINDS = (
    Kind("lung", 0.28, 35.0, (10, 32), (4, 12)),
    Kind("liver", 0.14, 22.0, (14, 40), (5, 12)),
    Kind("liver", 0.08, None, (12, 30), (5, 11)),
    Kind("visceral_fat", 0.18, 45.0, (10, 28), (4, 13)),
    Kind("fat", 0.12, 45.0, (10, 24), (4, 12)),
    Kind("red_marrow", 0.10, 650.0, (10, 26), (4, 11)),
    Kind("red_marrow", 0.07, None, (10, 24), (4, 10)),
    Kind("muscle", 0.03, None, (10, 26), (4, 9)),
)
# How much more often than above an organ is struck: lymphoma grows in nodes and marrow, lung cancer in lung and the
# nodes beside it, melanoma under the skin, in muscle, liver and lung.
FAVORED: Mapping[Disease, Mapping[str, float]] = {
    "mixed": {},
    "lymphoma": {"lung": 0.1, "liver": 0.2, "visceral_fat": 3.0, "fat": 1.0, "red_marrow": 1.5, "muscle": 0.0},
    "lung_cancer": {"lung": 2.0, "liver": 0.7, "fat": 0.1, "muscle": 0.0},
    "melanoma": {"lung": 0.8, "visceral_fat": 0.6, "fat": 2.0, "muscle": 3.0},
}


@dataclass(frozen=True, slots=True)
class Site:
    """A lesion before any grid, in reference mm."""

    label: int
    organ: str
    shape: Ellipsoid
    hu: float | None
    suv: float
    diameter_mm: float


def choose_sites(
    rng: np.random.Generator,
    labels: LabelVolume,
    axes: Sequence[Coords],
    scanned: np.ndarray,
    count: int,
    disease: Disease = "mixed",
) -> tuple[Site, ...]:
    """`count` lesions in the scanned slices of a survey of the person; organs that are not there are passed over."""
    x, y, z = (axis.ravel() for axis in axes)
    voxels = {k.organ: np.argwhere((labels == LABEL[k.organ]) & scanned[:, None, None]) for k in KINDS} if count else {}
    present = [k for k in KINDS if len(voxels.get(k.organ, ())) and FAVORED[disease].get(k.organ, 1.0) > 0]
    sites: list[Site] = []
    for label in range(1, count + 1 if present else 1):
        shares = np.array([k.share * FAVORED[disease].get(k.organ, 1.0) for k in present])
        kind = present[int(rng.choice(len(present), p=shares / shares.sum()))]
        iz, iy, ix = voxels[kind.organ][int(rng.integers(len(voxels[kind.organ])))]
        diameter = float(rng.uniform(*kind.diameter_mm))
        radii = tuple(float(r) for r in diameter / 2 * rng.uniform(0.8, 1.2, 3))
        angles = tuple(float(a) for a in rng.uniform(-40, 40, 3))
        shape = Ellipsoid((float(x[ix]), float(y[iy]), float(z[iz])), radii, angles)  # type: ignore[arg-type]
        hu = None if kind.hu is None else float(kind.hu + rng.normal(0, 5))
        sites.append(Site(label, kind.organ, shape, hu, float(rng.uniform(*kind.suv)), diameter))
    return tuple(sites)


def paint_lesions(
    sites: Sequence[Site],
    reference: Sequence[Coords],
    districts: LabelVolume,
    scale: Point,
    grid: Grid,
    offset_mm: Point,
) -> tuple[LabelVolume, tuple[Lesion, ...]]:
    """Lesion labels [z, y, x] inside the body, and the list of those that have at least one voxel."""
    x, y, z = reference
    lesions = np.zeros(grid.shape, np.uint8)
    listed: list[Lesion] = []
    for site in sites:
        low, high = site.shape.bounds
        cuts = [slice(*np.searchsorted(a.ravel(), (lo, hi))) for a, lo, hi in zip((x, y, z), low, high, strict=True)]
        box = (cuts[2], cuts[1], cuts[0])
        if any(c.stop <= c.start for c in box):
            continue
        inside = site.shape.inside(x[:, :, box[2]], y[:, box[1]], z[box[0]]) & (districts[box] > 0)
        if not inside.any():
            continue
        lesions[box][inside] = site.label
        cx, cy, cz = site.shape.centre
        centre = (cx * scale[0] - offset_mm[0], cy * scale[1] - offset_mm[1], cz * scale[2] + offset_mm[2])
        listed.append(
            Lesion(
                label=site.label,
                organ=site.organ,
                centre_mm=centre,
                diameter_mm=site.diameter_mm,
                suv=site.suv,
                visible_on_ct=site.hu is not None,
            )
        )
    return lesions, tuple(listed)
