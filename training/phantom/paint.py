"""From a spec to a scanned phantom: draw the person, paint it on a grid, image it as CT and PET would."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydicom.uid import generate_uid
from scipy.ndimage import gaussian_filter

from pipeline.types import FloatVolume, Grid, LabelVolume
from training.phantom.body import CROWN, SOLES, draw_soft_body
from training.phantom.couch import add_blanket, add_table
from training.phantom.head import draw_head
from training.phantom.lesions import Site, choose_sites, paint_lesions
from training.phantom.limbs import draw_arms, draw_legs
from training.phantom.shapes import Coords, Point
from training.phantom.sketch import Person, Sketch, Stroke
from training.phantom.spec import POSES, Lesion, Phantom, PhantomSpec, Pose
from training.phantom.tissues import (
    FATTY,
    FIRST_OUTSIDE_BODY,
    LABEL,
    NAMES,
    TISSUES,
    draw_hu,
    draw_residual,
    expected_suv,
)
from training.phantom.torso import draw_abdomen, draw_chest, draw_spine_and_pelvis, draw_walls

CT_BLUR_MM = 0.6  # sigma of the scanner's point spread; matters on fine grids only
SURVEY_MM = 8.0  # grid of the quick look at the whole person: weight and sites of lesions, whatever grid is asked
# Fewer photons are lost on the way out of a thin part than out of the trunk, so its counts are better.
NOISE_OF_DISTRICT = (1.0, 0.8, 1.0, 0.7, 0.7)  # by district label
NOISE_BLUR = 0.8  # of the PET's point spread: what the reconstruction's filter leaves of the noise's grain
# Scanned ranges as fractions of the body height, and how often each is drawn.
COVERAGES: tuple[tuple[float, float, float], ...] = (
    (0.40, 1.02, 0.40),  # vertex to mid-thigh
    (0.00, 1.02, 0.30),  # whole body
    (0.42, 0.90, 0.15),  # skull base to mid-thigh
    (0.40, 1.15, 0.10),  # with what is raised above the head
    (0.45, 0.80, 0.05),  # chest and abdomen
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Anatomy:
    """The drawn person before any grid: the same on every grid that it is painted on."""

    person: Person
    strokes: tuple[Stroke, ...]
    hu: NDArray[np.float32]  # by label
    expected_suv: NDArray[np.float32]  # what this body composition and CT let one expect
    suv: NDArray[np.float32]  # and what it is
    coverage: tuple[float, float]
    weight_kg: float
    fat_fraction: float  # of the weight
    sites: tuple[Site, ...]
    ct_noise_hu: float
    pet_sigma_mm: float
    pet_noise: float
    offset_mm: Point  # where the scanner's origin is


def _stream(seed: int, purpose: int, visit: int = 0) -> np.random.Generator:
    """Independent random numbers per purpose: noise, lesions or another day never change the anatomy."""
    return np.random.default_rng([seed, purpose, visit] if visit else [seed, purpose])


def draw_person(spec: PhantomSpec) -> Person:
    """Size, girth, sex, pose: from the seed where the spec leaves them open."""
    rng = _stream(spec.seed, 1)
    height = float(rng.normal(1.0, 0.05)) if spec.height_mm is None else spec.height_mm / (CROWN - SOLES)
    height = float(np.clip(height, 0.75, 1.25))
    girth = height * float(rng.normal(1.0, 0.045))
    fat = float(np.clip(rng.gamma(1.7, 13.0), 4, 60)) if spec.fat_mm is None else spec.fat_mm
    female = bool(rng.random() < 0.5)
    drawn: Pose = POSES[int(rng.choice(len(POSES), p=(0.5, 0.2, 0.15, 0.15)))]
    return Person(
        scale=(girth, girth * float(rng.normal(1.0, 0.04)), height),
        fat_mm=fat,
        female=female,
        pose=drawn if spec.pose == "random" else spec.pose,
        arm_gap_mm=float(rng.uniform(6, 25)),
        organ_scale=0.13,
        organ_shift_mm=9.0,
    )


def draw_strokes(person: Person, rng: np.random.Generator) -> Sketch:
    """The whole anatomy of a person, in painting order."""
    sketch = Sketch(person, rng)
    arms = draw_soft_body(sketch)
    draw_walls(sketch)
    draw_chest(sketch)
    draw_abdomen(sketch)
    draw_spine_and_pelvis(sketch)
    draw_arms(sketch, arms)
    draw_legs(sketch)
    draw_head(sketch)
    return sketch


def draw_anatomy(spec: PhantomSpec) -> Anatomy:
    """Everything about one person and scan that does not depend on the grid. Deterministic from the spec."""
    person = draw_person(spec)
    sketch = draw_strokes(person, _stream(spec.seed, 2))
    labels, districts, axes = _survey(sketch.strokes, person)
    weight_kg, fat_fraction = _weigh(labels, districts, person)
    rng = _stream(spec.seed, 3, spec.visit)
    contrast = bool(rng.random() < 0.4)
    plain_hu, hu = draw_hu(rng, contrast=contrast if spec.contrast is None else spec.contrast)
    expected = expected_suv(fat_fraction, plain_hu, sketch.bladder_fill)
    suv = expected * draw_residual(rng)
    if rng.random() < 0.6:  # fasting heart: the myocardium lives on fat and stays faint
        suv[LABEL["myocardium"]] = float(rng.uniform(1.5, 2.2))
    pick = int(rng.choice(len(COVERAGES), p=[c[2] for c in COVERAGES]))
    coverage = spec.coverage or (COVERAGES[pick][0], COVERAGES[pick][1])
    low, high = (SOLES + f * (CROWN - SOLES) for f in coverage)
    scanned = (axes[2].ravel() >= low + 10) & (axes[2].ravel() <= high - 10)
    return Anatomy(
        person=person,
        strokes=tuple(sketch.strokes),
        hu=hu,
        expected_suv=expected,
        suv=suv,
        coverage=coverage,
        weight_kg=weight_kg,
        fat_fraction=fat_fraction,
        sites=choose_sites(_stream(spec.seed, 4, spec.visit), labels, axes, scanned, spec.lesions, spec.disease),
        ct_noise_hu=float(rng.uniform(8, 20)),
        pet_sigma_mm=float(rng.uniform(5, 7)) / 2.355,
        pet_noise=float(rng.uniform(0.02, 0.05)),  # a scanner with a long axial field of view
        offset_mm=tuple(float(v) for v in rng.uniform((-12, -12, -400), (12, 12, 400))),  # type: ignore[arg-type]
    )


def _survey(strokes: Sequence[Stroke], person: Person) -> tuple[LabelVolume, LabelVolume, tuple[Coords, ...]]:
    """A quick look at the whole person on a coarse grid: labels, districts, reference coordinates."""
    axes = _axes((SOLES, CROWN + 320), (SURVEY_MM,) * 3, 640.0, person.scale)
    return *paint_labels(strokes, axes), axes


def _weigh(labels: LabelVolume, districts: LabelVolume, person: Person) -> tuple[float, float]:
    """Weight in kg and the fat's share of it."""
    density = np.array([t.density for t in TISSUES.values()])
    counts = np.bincount(labels[districts > 0], minlength=len(NAMES)) * density
    weight_kg = float(counts.sum()) * SURVEY_MM**3 * float(np.prod(person.scale)) / 1e6
    return weight_kg, float(counts[[LABEL[name] for name in FATTY]].sum() / counts.sum())


def _axes(z_range: tuple[float, float], spacing: Sequence[float], width: float, scale: Point) -> tuple[Coords, ...]:
    """Open reference coordinates (x, y, z) of a survey grid; `spacing` is in reference mm here."""
    del scale
    z = np.arange(z_range[0] + spacing[0] / 2, z_range[1], spacing[0], dtype=np.float32)
    side = np.arange(-width / 2 + spacing[1] / 2, width / 2, spacing[1], dtype=np.float32)
    return side[None, None, :], side[None, :, None], z[:, None, None]


def scan_grid(anatomy: Anatomy, spec: PhantomSpec) -> tuple[Grid, tuple[Coords, Coords, Coords]]:
    """The scan's LPS grid, and the reference coordinates (x, y, z) of its voxels as open arrays."""
    sx, sy, sz = anatomy.person.scale
    dz, dy, dx = spec.spacing_mm
    low, high = ((SOLES + f * (CROWN - SOLES)) * sz for f in anatomy.coverage)
    shape = max(round((high - low) / dz), 1), max(round(spec.fov_mm / dy), 1), max(round(spec.fov_mm / dx), 1)
    first = low + dz / 2, (1 - shape[1]) / 2 * dy, (1 - shape[2]) / 2 * dx
    ox, oy, oz = anatomy.offset_mm
    z, y, x = (f + np.arange(n) * d for f, n, d in zip(first, shape, (dz, dy, dx), strict=True))
    reference = (
        ((x + ox) / sx).astype(np.float32)[None, None, :],
        ((y + oy) / sy).astype(np.float32)[None, :, None],
        (z / sz).astype(np.float32)[:, None, None],
    )
    day = [str(spec.visit)] if spec.visit else []
    uid = generate_uid(entropy_srcs=["phantom frame of reference", str(spec.seed), *day])
    grid = Grid(
        shape=shape,
        spacing_mm=spec.spacing_mm,
        origin_mm=(float(first[2]), float(first[1]), float(first[0] + oz)),
        frame_of_reference_uid=str(uid),
    )
    return grid, reference


def paint_labels(strokes: Sequence[Stroke], axes: Sequence[Coords]) -> tuple[LabelVolume, LabelVolume]:
    """Structure and district labels [z, y, x] on open reference coordinates (x, y, z)."""
    x, y, z = axes
    shape = (z.size, y.size, x.size)
    labels, districts = np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)
    for stroke in strokes:
        low, high = stroke.shape.bounds
        cuts = [slice(*np.searchsorted(a.ravel(), (lo, hi))) for a, lo, hi in zip((x, y, z), low, high, strict=True)]
        box = (cuts[2], cuts[1], cuts[0])
        if any(c.stop <= c.start for c in box):
            continue
        inside = stroke.shape.inside(x[:, :, box[2]], y[:, box[1]], z[box[0]])
        part = labels[box]
        if stroke.over is not None:
            allowed = np.zeros(256, dtype=bool)
            allowed[[LABEL[name] for name in stroke.over]] = True
            inside = inside & allowed[part]
        elif not stroke.region:
            inside = inside & (part > 0)  # nothing grows outside the skin
        part[inside] = LABEL[stroke.structure]
        if stroke.region:
            districts[box][inside] = stroke.region
    return labels, districts


def make_phantom(spec: PhantomSpec) -> Phantom:
    """Draw the person of `spec.seed` and scan them on the spec's grid.

    The anatomy is the same on every grid; only the noise depends on it. About 1 s at 4 mm, 20 s at 512x512x300.
    """
    return scan(draw_anatomy(spec), spec)


def scan_ct(anatomy: Anatomy, spec: PhantomSpec) -> tuple[FloatVolume, Grid]:
    """Only the CT, on the spec's grid: for a CT that is finer than the PET of the same anatomy."""
    found = _painted(anatomy, spec)
    rng = found.rng if spec.noise else None
    return _ct(anatomy, found.labels, found.lesions, found.grid, rng), found.grid


def scan(anatomy: Anatomy, spec: PhantomSpec) -> Phantom:
    """CT, PET and labels of a drawn person on the spec's grid."""
    found = _painted(anatomy, spec)
    rng = found.rng if spec.noise else None
    hu = _ct(anatomy, found.labels, found.lesions, found.grid, rng)
    suv = _pet(anatomy, found.labels, found.districts, found.lesions, found.grid, rng)
    return Phantom(
        hu=hu,
        suv=suv,
        districts=found.districts,
        organs=np.where(found.labels >= FIRST_OUTSIDE_BODY, np.uint8(0), found.labels),
        lesions=found.lesions,
        grid=found.grid,
        organ_names=NAMES[:FIRST_OUTSIDE_BODY],
        lesion_list=found.lesion_list,
        spec=spec,
        pose=anatomy.person.pose,
        weight_kg=anatomy.weight_kg,
        fat_fraction=anatomy.fat_fraction,
        sex="F" if anatomy.person.female else "M",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Painted:
    """The labels on the scan's grid, and the random numbers for the noise."""

    labels: LabelVolume
    districts: LabelVolume
    lesions: LabelVolume
    lesion_list: tuple[Lesion, ...]
    grid: Grid
    rng: np.random.Generator


def _painted(anatomy: Anatomy, spec: PhantomSpec) -> _Painted:
    grid, reference = scan_grid(anatomy, spec)
    labels, districts = paint_labels(anatomy.strokes, reference)
    lesions, lesion_list = paint_lesions(
        anatomy.sites, reference, districts, anatomy.person.scale, grid, anatomy.offset_mm
    )
    rng = _stream(spec.seed, 5, spec.visit)
    if spec.table:
        add_table(labels, districts, grid, rng)
    if spec.blanket and rng.random() < 0.7:
        add_blanket(labels, districts, grid, rng)
    return _Painted(labels=labels, districts=districts, lesions=lesions, lesion_list=lesion_list, grid=grid, rng=rng)


def _ct(
    anatomy: Anatomy, labels: LabelVolume, lesions: LabelVolume, grid: Grid, rng: np.random.Generator | None
) -> FloatVolume:
    hu = anatomy.hu[labels]
    for site in anatomy.sites:
        if site.hu is not None:
            hu[lesions == site.label] = site.hu
    blurred = _blur(hu, CT_BLUR_MM, grid)
    if rng is not None:
        noise = rng.standard_normal(hu.shape, dtype=np.float32)
        noise *= np.float32(anatomy.ct_noise_hu)
        blurred += noise
    return np.clip(blurred, -1024, 3071, out=blurred)


def _pet(
    anatomy: Anatomy,
    labels: LabelVolume,
    districts: LabelVolume,
    lesions: LabelVolume,
    grid: Grid,
    rng: np.random.Generator | None,
) -> FloatVolume:
    suv = anatomy.suv[labels]
    for site in anatomy.sites:
        suv[lesions == site.label] = site.suv
    suv = _blur(suv, anatomy.pet_sigma_mm, grid)
    if rng is not None:
        # Iterative reconstruction leaves noise in proportion to the activity (Barrett, Wilson and Tsui 1994), and as
        # coarse as its filter; scaled so that its size does not depend on the grid.
        grain = _blur(rng.standard_normal(suv.shape, dtype=np.float32), NOISE_BLUR * anatomy.pet_sigma_mm, grid)
        grain *= np.float32(anatomy.pet_noise / max(float(grain.std()), 1e-6))
        grain *= np.asarray(NOISE_OF_DISTRICT, np.float32)[districts]
        suv += suv * grain
    return np.maximum(suv, 0, out=suv)


def _blur(volume: FloatVolume, sigma_mm: float, grid: Grid) -> FloatVolume:
    sigma = [sigma_mm / s if sigma_mm / s > 0.25 else 0.0 for s in grid.spacing_mm]
    if not any(sigma):
        return volume
    blurred: FloatVolume = gaussian_filter(volume, sigma, mode="nearest", truncate=3.0, output=np.float32)
    return blurred
