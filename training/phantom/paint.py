"""From a spec to a scanned phantom: draw the person, paint it on a grid, image it as CT and PET would."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from pydicom.uid import generate_uid
from scipy.ndimage import gaussian_filter

from pipeline.types import FloatVolume, Grid, LabelVolume
from training.phantom.body import CROWN, SOLES, draw_arm_bones, draw_leg_bones, draw_soft_body
from training.phantom.couch import add_blanket, add_table
from training.phantom.head import draw_head
from training.phantom.lesions import Site, choose_sites, paint_lesions
from training.phantom.shapes import Coords, Point
from training.phantom.sketch import Person, Sketch, Stroke
from training.phantom.spec import POSES, Phantom, PhantomSpec, Pose
from training.phantom.tissues import FIRST_OUTSIDE_BODY, LABEL, NAMES, TISSUES, draw_values
from training.phantom.torso import draw_abdomen, draw_chest, draw_spine_and_pelvis, draw_walls

CT_BLUR_MM = 0.6  # sigma of the scanner's point spread; matters on fine grids only
SURVEY_MM = 8.0  # grid of the quick look at the whole person: weight and sites of lesions, whatever grid is asked
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
    suv: NDArray[np.float32]
    coverage: tuple[float, float]
    weight_kg: float
    sites: tuple[Site, ...]
    ct_noise_hu: float
    pet_sigma_mm: float
    pet_noise: float
    offset_mm: Point  # where the scanner's origin is


def _stream(seed: int, purpose: int) -> np.random.Generator:
    """Independent random numbers per purpose: noise or lesions never change the anatomy."""
    return np.random.default_rng([seed, purpose])


def draw_person(spec: PhantomSpec) -> Person:
    """Size, girth, sex, pose: from the seed where the spec leaves them open."""
    rng = _stream(spec.seed, 1)
    height = float(rng.normal(1.0, 0.05)) if spec.height_mm is None else spec.height_mm / (CROWN - SOLES)
    height = float(np.clip(height, 0.75, 1.25))
    girth = height * float(rng.normal(1.0, 0.045))
    fat = float(np.clip(rng.gamma(2.2, 8.0), 4, 60)) if spec.fat_mm is None else spec.fat_mm
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


def draw_anatomy(spec: PhantomSpec) -> Anatomy:
    """Everything about one person and scan that does not depend on the grid. Deterministic from the spec."""
    person = draw_person(spec)
    rng = _stream(spec.seed, 2)
    sketch = Sketch(person, rng)
    arms = draw_soft_body(sketch)
    draw_walls(sketch)
    draw_chest(sketch)
    draw_abdomen(sketch)
    draw_spine_and_pelvis(sketch)
    draw_arm_bones(sketch, arms)
    draw_leg_bones(sketch)
    draw_head(sketch)
    rng = _stream(spec.seed, 3)
    contrast = bool(rng.random() < 0.4) if spec.contrast is None else spec.contrast
    if spec.contrast is not None:
        rng.random()
    hu, suv = draw_values(rng, contrast=contrast)
    if rng.random() < 0.6:  # fasting heart: the myocardium lives on fat and stays faint
        suv[LABEL["myocardium"]] = float(rng.uniform(1.5, 2.2))
    pick = int(rng.choice(len(COVERAGES), p=[c[2] for c in COVERAGES]))
    coverage = spec.coverage or (COVERAGES[pick][0], COVERAGES[pick][1])
    anatomy = Anatomy(
        person=person,
        strokes=tuple(sketch.strokes),
        hu=hu,
        suv=suv,
        coverage=coverage,
        weight_kg=0.0,
        sites=(),
        ct_noise_hu=float(rng.uniform(8, 20)),
        pet_sigma_mm=float(rng.uniform(5, 7)) / 2.355,
        pet_noise=float(rng.uniform(0.06, 0.14)),
        offset_mm=tuple(float(v) for v in rng.uniform((-12, -12, -400), (12, 12, 400))),  # type: ignore[arg-type]
    )
    return _surveyed(anatomy, spec)


def _surveyed(anatomy: Anatomy, spec: PhantomSpec) -> Anatomy:
    """Weigh the person and choose where lesions grow, on a coarse grid of the whole body."""
    axes = _axes((SOLES, CROWN + 320), (SURVEY_MM,) * 3, 640.0, anatomy.person.scale)
    labels, districts = paint_labels(anatomy.strokes, axes)
    density = np.array([t.density for t in TISSUES.values()])
    voxel_ml = float(np.prod([SURVEY_MM, *(SURVEY_MM * s for s in anatomy.person.scale)][1:])) / 1000
    weight = float(density[labels[districts > 0]].sum()) * voxel_ml / 1000
    low, high = (SOLES + f * (CROWN - SOLES) for f in anatomy.coverage)
    scanned = (axes[2].ravel() >= low + 10) & (axes[2].ravel() <= high - 10)
    sites = choose_sites(_stream(spec.seed, 4), labels, axes, scanned, spec.lesions)
    return replace(anatomy, weight_kg=weight, sites=sites)


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
    uid = generate_uid(entropy_srcs=["phantom frame of reference", str(spec.seed)])
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
    anatomy = draw_anatomy(spec)
    grid, reference = scan_grid(anatomy, spec)
    labels, districts = paint_labels(anatomy.strokes, reference)
    lesions, lesion_list = paint_lesions(
        anatomy.sites, reference, districts, anatomy.person.scale, grid, anatomy.offset_mm
    )
    rng = _stream(spec.seed, 5)
    if spec.table:
        add_table(labels, districts, grid, rng)
    if spec.blanket and rng.random() < 0.7:
        add_blanket(labels, districts, grid, rng)
    hu = _ct(anatomy, labels, lesions, grid, rng if spec.noise else None)
    suv = _pet(anatomy, labels, lesions, grid, rng if spec.noise else None)
    organs = np.where(labels >= FIRST_OUTSIDE_BODY, np.uint8(0), labels)
    return Phantom(
        hu=hu,
        suv=suv,
        districts=districts,
        organs=organs,
        lesions=lesions,
        grid=grid,
        organ_names=NAMES[:FIRST_OUTSIDE_BODY],
        lesion_list=lesion_list,
        spec=spec,
        pose=anatomy.person.pose,
        weight_kg=anatomy.weight_kg,
    )


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
    anatomy: Anatomy, labels: LabelVolume, lesions: LabelVolume, grid: Grid, rng: np.random.Generator | None
) -> FloatVolume:
    suv = anatomy.suv[labels]
    for site in anatomy.sites:
        suv[lesions == site.label] = site.suv
    suv = _blur(suv, anatomy.pet_sigma_mm, grid)
    if rng is not None:  # counts: variance goes with activity, and reconstruction smooths it
        noise = rng.standard_normal(suv.shape, dtype=np.float32)
        noise *= np.sqrt(suv) * np.float32(anatomy.pet_noise)
        suv += _blur(noise, 0.5 * anatomy.pet_sigma_mm, grid)
    return np.maximum(suv, 0, out=suv)


def _blur(volume: FloatVolume, sigma_mm: float, grid: Grid) -> FloatVolume:
    sigma = [sigma_mm / s if sigma_mm / s > 0.25 else 0.0 for s in grid.spacing_mm]
    if not any(sigma):
        return volume
    blurred: FloatVolume = gaussian_filter(volume, sigma, mode="nearest", truncate=3.0, output=np.float32)
    return blurred
