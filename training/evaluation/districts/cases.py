"""Phantoms that a segmenter of districts is tried on: poses, coverage, fields of view, and what goes wrong in scans.

Every case is a phantom and the changes made to it. Changes keep labels and HU together: what is cut out of the one
is cut out of the other, and what a header says wrongly it says of both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import ndimage

from pipeline.types import AIR_HU, District, FloatVolume, Grid, LabelVolume
from training.phantom import PhantomSpec, make_phantom
from training.phantom.spec import POSES, Pose

SPACING_MM = (4.0, 4.0, 4.0)
USUAL = (0.40, 1.02)  # vertex to mid-thigh
METAL_HU = 3000.0
NOISE_HU = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class DistrictCase:
    """One try: `group` is what is varied, `changes` are names of `CHANGES`, applied in turn."""

    name: str
    group: str
    spec: PhantomSpec
    changes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class DistrictVolume:
    """HU and true districts [z, y, x] on `grid`."""

    hu: FloatVolume
    labels: LabelVolume
    grid: Grid


Change = Callable[[DistrictVolume, np.random.Generator], DistrictVolume]


def make_case(case: DistrictCase) -> DistrictVolume:
    """Paint the phantom of a case and change it; the same case gives the same volume."""
    phantom = make_phantom(case.spec)
    volume = DistrictVolume(hu=phantom.hu, labels=phantom.districts, grid=phantom.grid)
    rng = np.random.default_rng((case.spec.seed, 1))
    for name in case.changes:
        volume = CHANGES[name](volume, rng)
    return volume


def district_cases(
    count: int, *, seed: int = 5000, spacing_mm: tuple[float, float, float] = SPACING_MM
) -> list[DistrictCase]:
    """`count` cases with a different person each, the kinds of `_kinds` in turn."""
    kinds = _kinds()
    cases = []
    for index in range(count):
        name, group, pose, settings, changes = kinds[index % len(kinds)]
        spec = PhantomSpec(seed=seed + index, spacing_mm=spacing_mm, pose=pose, coverage=USUAL)
        spec = replace(spec, **dict(settings))
        cases.append(DistrictCase(name=f"{index:03d} {name}", group=group, spec=spec, changes=changes))
    return cases


_Kind = tuple[str, str, Pose, Mapping[str, Any], tuple[str, ...]]


def _kinds() -> list[_Kind]:
    kinds: list[_Kind] = []
    for pose in POSES:
        kinds.append((pose, f"pose {pose}", pose, {}, ()))
        kinds.append((f"{pose}, head to feet", f"pose {pose}", pose, {"coverage": (0.0, 1.02)}, ()))
    kinds.append(("one arm", "one arm", "sides", {"coverage": (0.40, 1.02)}, ("one_arm",)))
    for low, high in ((0.0, 0.1), (0.0, 0.3), (0.0, 0.5), (0.0, 0.7), (0.0, 0.85)):
        kinds.append((f"feet up to {high:.0%}", "cut above", "sides", {"coverage": (low, high)}, ()))
    for low in (0.9, 0.8, 0.6, 0.5, 0.3):
        kinds.append((f"crown down to {low:.0%}", "cut below", "raised", {"coverage": (low, 1.02)}, ()))
    kinds.append(("chest alone", "slab", "raised", {"coverage": (0.62, 0.8)}, ()))
    kinds.append(("belly alone", "slab", "sides", {"coverage": (0.5, 0.65)}, ()))
    kinds.append(("without head", "head missing", "touching", {"coverage": (0.0, 0.82)}, ()))
    kinds.append(("without legs", "legs missing", "sides", {"coverage": (0.5, 1.02)}, ()))
    kinds.append(("arms cut by the field", "field of view", "sides", {"fov_mm": 420.0}, ()))
    kinds.append(("a large patient cut at the sides", "field of view", "raised", {"fov_mm": 400.0, "fat_mm": 60.0}, ()))
    for step in (1.0, 2.0, 5.0):
        kinds.append((f"slices of {step:.0f} mm", "slice spacing", "sides", {"spacing_mm": (step, 4.0, 4.0)}, ()))
    kinds.append(("bare", "table and blanket", "sides", {"table": False, "blanket": False}, ()))
    kinds.append(("table in front (prone)", "table and blanket", "raised", {"table": False}, ("table_in_front",)))
    kinds.append(("table at the side (lateral)", "table and blanket", "raised", {"table": False}, ("table_at_side",)))
    kinds.append(("headrest", "table and blanket", "sides", {}, ("headrest",)))
    kinds.append(("contrast", "contrast", "raised", {"contrast": True}, ()))
    kinds.append(("hip of metal", "metal", "sides", {"coverage": (0.3, 1.02)}, ("metal",)))
    kinds.append(("noise", "noise", "touching", {}, ("noise",)))
    kinds.append(("spacing halved in the header", "wrong spacing", "sides", {}, ("half_spacing",)))
    kinds.append(("spacing doubled in the header", "wrong spacing", "touching", {}, ("double_spacing",)))
    return kinds


def _one_arm(volume: DistrictVolume, _: np.random.Generator) -> DistrictVolume:
    """The arm on the patient's left is not there."""
    arms = volume.labels == District.ARMS
    middle = int(np.median(np.nonzero(volume.labels == District.TRUNK)[2]))
    arms[:, :, :middle] = False
    return replace(volume, hu=np.where(arms, AIR_HU, volume.hu), labels=np.where(arms, 0, volume.labels))


def _slab(volume: DistrictVolume, axis: int, *, at_start: bool) -> DistrictVolume:
    """A table top of 2 cm, foam between two shells, 8 mm off the body at one end of an axis."""
    body = volume.labels > 0
    rows = np.flatnonzero(body.any(axis=tuple(a for a in range(3) if a != axis)))
    step = volume.grid.spacing_mm[axis]
    gap, thick = max(1, round(8 / step)), max(2, round(20 / step))
    first = rows[0] - gap - thick if at_start else rows[-1] + 1 + gap
    hu = np.moveaxis(volume.hu.copy(), axis, 0)
    for row in range(first, first + thick):
        if 0 <= row < hu.shape[0]:
            hu[row] = 100.0 if row in (first, first + thick - 1) else -900.0
    return replace(volume, hu=np.moveaxis(hu, 0, axis))


def _headrest(volume: DistrictVolume, _: np.random.Generator) -> DistrictVolume:
    """A shell of plastic around the back and the sides of the head."""
    head = volume.labels == District.HEAD
    if not head.any():
        return volume
    dz, dy, _dx = volume.grid.spacing_mm
    near = ndimage.binary_dilation(head.any(axis=0), iterations=max(round(12 / dy), 1))
    shell = ndimage.binary_dilation(near, iterations=1) & ~near
    shell[: int(np.median(np.nonzero(head)[1]))] = False
    slices = np.flatnonzero(head.any(axis=(1, 2)))[round(12 / dz) :]
    hu = volume.hu.copy()
    hu[slices[0] :, shell] = np.where(volume.labels[slices[0] :, shell] == 0, 120.0, hu[slices[0] :, shell])
    return replace(volume, hu=hu)


def _metal(volume: DistrictVolume, rng: np.random.Generator) -> DistrictVolume:
    """A ball of metal in the pelvis, with bright and dark streaks across its slices."""
    trunk = np.argwhere(volume.labels == District.TRUNK)
    z = int(np.quantile(trunk[:, 0], 0.06))
    plane = trunk[trunk[:, 0] == z]
    y, x = int(np.median(plane[:, 1])), int(np.quantile(plane[:, 2], 0.25))
    hu = volume.hu.copy()
    rows, columns = np.ogrid[: hu.shape[1], : hu.shape[2]]
    angle = np.arctan2(rows - y, columns - x)
    reach = max(2, round(24 / volume.grid.spacing_mm[0]))
    for step in range(-reach, reach + 1):
        if 0 <= z + step < len(hu):
            phases = rng.uniform(0, 2 * np.pi, 4)
            streaks = sum(np.sin((2 * n + 3) * angle + phase) for n, phase in enumerate(phases))
            hu[z + step] += np.where(volume.labels[z + step] > 0, 80.0 * streaks, 25.0 * streaks).astype(np.float32)
    dz, dy, dx = volume.grid.spacing_mm
    nz, ny, nx = (np.arange(n) for n in hu.shape)
    beside = ((ny[:, None] - y) * dy) ** 2 + ((nx[None, :] - x) * dx) ** 2
    ball = ((nz - z) * dz)[:, None, None] ** 2 + beside[None] < 24.0**2
    hu[ball] = METAL_HU
    return replace(volume, hu=hu)


def _noise(volume: DistrictVolume, rng: np.random.Generator) -> DistrictVolume:
    return replace(volume, hu=volume.hu + rng.normal(0, NOISE_HU, volume.hu.shape).astype(np.float32))


def _scaled(factor: float) -> Change:
    def change(volume: DistrictVolume, _: np.random.Generator) -> DistrictVolume:
        z, y, x = (s * factor for s in volume.grid.spacing_mm)
        return replace(volume, grid=replace(volume.grid, spacing_mm=(z, y, x)))

    return change


CHANGES: Mapping[str, Change] = {
    "one_arm": _one_arm,
    "table_in_front": lambda volume, _: _slab(volume, 1, at_start=True),
    "table_at_side": lambda volume, _: _slab(volume, 2, at_start=True),
    "headrest": _headrest,
    "metal": _metal,
    "noise": _noise,
    "half_spacing": _scaled(0.5),
    "double_spacing": _scaled(2.0),
}
