"""What a phantom is asked to be, and what comes back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.types import FloatVolume, Grid, LabelVolume

Pose = Literal["raised", "sides", "touching", "folded"]
Disease = Literal["mixed", "lymphoma", "lung_cancer", "melanoma"]
POSES: tuple[Pose, ...] = ("raised", "sides", "touching", "folded")


@dataclass(frozen=True, kw_only=True, slots=True)
class PhantomSpec:
    """One stylised patient and one scan of them. Everything left at None or "random" is drawn from `seed`.

    `visit` is another day of the same person: the anatomy stays; uptake, coverage, lesions, noise and the scanner's
    origin change. `coverage` is the scanned part of the body height as fractions from the soles (0) to the crown (1);
    above 1 lie raised arms. `fat_mm` is the subcutaneous fat over the belly. `lesions` is how many are painted,
    `disease` where they like to grow.
    """

    seed: int = 0
    visit: int = 0
    spacing_mm: tuple[float, float, float] = (4.0, 4.0, 4.0)  # (z, y, x)
    fov_mm: float = 500.0  # edge to edge, square, in the plane
    pose: Pose | Literal["random"] = "random"
    coverage: tuple[float, float] | None = None
    table: bool = True
    blanket: bool = True
    contrast: bool | None = None
    lesions: int = 0
    disease: Disease = "mixed"
    noise: bool = True
    height_mm: float | None = None
    fat_mm: float | None = None

    def __post_init__(self) -> None:
        if min(self.spacing_mm) <= 0 or self.fov_mm <= 0:
            raise ValueError(f"phantom spacing {self.spacing_mm} and field of view {self.fov_mm} mm must be positive")
        if self.pose != "random" and self.pose not in POSES:
            raise ValueError(f"phantom pose {self.pose!r} is not one of {POSES} or 'random'")
        if self.coverage is not None and not self.coverage[0] < self.coverage[1]:
            raise ValueError(f"phantom coverage {self.coverage} must run from low to high")
        if min(self.seed, self.visit) < 0:
            raise ValueError(f"phantom seed {self.seed} and visit {self.visit} must not be negative")
        if not 0 <= self.lesions <= 200:
            raise ValueError(f"phantom with {self.lesions} lesions: 0 to 200 are possible")


@dataclass(frozen=True, kw_only=True, slots=True)
class Lesion:
    """One painted lesion: `label` in `Phantom.lesions`, the organ it grew in, and whether the CT shows it."""

    label: int
    organ: str
    centre_mm: tuple[float, float, float]  # LPS x, y, z
    diameter_mm: float
    suv: float
    visible_on_ct: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Phantom:
    """A scanned phantom: every volume is [z, y, x] on `grid` (axis-aligned LPS).

    `districts` holds 1 head, 2 trunk, 3 arms, 4 legs for every voxel of the body (air inside it too) and 0
    elsewhere. `organs` indexes `organ_names`, 0 is none. `lesions` is 0 or a `Lesion.label`.
    """

    hu: FloatVolume
    suv: FloatVolume
    districts: LabelVolume
    organs: LabelVolume
    lesions: LabelVolume
    grid: Grid
    organ_names: tuple[str, ...]
    lesion_list: tuple[Lesion, ...]
    spec: PhantomSpec
    pose: Pose
    weight_kg: float  # of the whole person, scanned or not: the SUV's weight
    fat_fraction: float  # of that weight
    sex: Literal["F", "M"]

    @property
    def body(self) -> NDArray[np.bool_]:
        mask: NDArray[np.bool_] = self.districts > 0
        return mask

    def organ(self, name: str) -> NDArray[np.bool_]:
        """The mask of one organ by name."""
        mask: NDArray[np.bool_] = self.organs == self.organ_names.index(name)
        return mask
