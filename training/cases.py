"""Training cases: a CT and a PET volume on one grid, scaled to [0, 1], with districts and lesions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.bundle import Normalization
from pipeline.types import LabelVolume
from training.phantom import Phantom, PhantomSpec, make_phantom
from training.recipe import Recipe

_VOLUMES = ("ct", "pet", "districts", "lesions")
HalfVolume = NDArray[np.float16]


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One volume cropped to the body, [z, y, x].

    `ct` is 0 (air) outside the body; `pet` is 0 there as well. Half precision: 1/2048 of the range is 1 HU.
    """

    name: str
    ct: HalfVolume
    pet: HalfVolume
    districts: LabelVolume
    lesions: NDArray[np.bool_]

    def __post_init__(self) -> None:
        shapes = {self.ct.shape, self.pet.shape, self.districts.shape, self.lesions.shape}
        if len(shapes) != 1:
            raise ValueError(f"case {self.name}: CT, PET, districts and lesions have the shapes {sorted(shapes)}")


def body_box(body: NDArray[np.bool_]) -> tuple[slice, slice, slice]:
    """The smallest box [z, y, x] around the body. Raises ValueError when there is none."""
    spans = []
    for axis in range(3):
        used = np.flatnonzero(body.any(axis=tuple(a for a in range(3) if a != axis)))
        if used.size == 0:
            raise ValueError("no body in the volume")
        spans.append(slice(int(used[0]), int(used[-1]) + 1))
    return spans[0], spans[1], spans[2]


def case_of(phantom: Phantom, normalization: Normalization) -> Case:
    """Scale, set everything outside the body to 0 after scaling (eq. 7, with the body as mask), crop."""
    box = body_box(phantom.body)
    body = phantom.body[box]
    return Case(
        name=f"phantom-{phantom.spec.seed}",
        ct=(normalization.ct_to_unit(phantom.hu[box]) * body).astype(np.float16),
        pet=(normalization.suv_to_unit(phantom.suv[box]) * body).astype(np.float16),
        districts=np.ascontiguousarray(phantom.districts[box]),
        lesions=phantom.lesions[box] > 0,
    )


def phantom_spec(recipe: Recipe, seed: int) -> PhantomSpec:
    """The spec of one phantom: number of lesions and field of view follow from the seed, the rest is random too."""
    rng = np.random.default_rng([seed, 77])
    return PhantomSpec(
        seed=seed,
        spacing_mm=recipe.data.spacing_mm,
        fov_mm=float(rng.choice([500.0, 600.0])),
        lesions=int(rng.integers(0, recipe.data.max_lesions + 1)),
    )


def phantoms(recipe: Recipe, *, test: bool) -> Iterator[Phantom]:
    """The recipe's training phantoms, or the held-out ones: other seeds, so other persons."""
    first, count = (
        (recipe.data.first_test_seed, recipe.data.test_cases)
        if test
        else (recipe.data.first_seed, recipe.data.train_cases)
    )
    for seed in range(first, first + count):
        yield make_phantom(phantom_spec(recipe, seed))


def save_case(case: Case, folder: Path) -> None:
    """One .npy file per volume, so that several training processes share them through the page cache."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in _VOLUMES:
        np.save(folder / f"{case.name}.{name}.npy", getattr(case, name))


def load_cases(folder: Path) -> list[Case]:
    """Every case in the folder, mapped and not read."""
    names = sorted(path.name.removesuffix(".ct.npy") for path in folder.glob("*.ct.npy"))
    return [
        Case(name=name, **{v: np.load(folder / f"{name}.{v}.npy", mmap_mode="r") for v in _VOLUMES}) for name in names
    ]
