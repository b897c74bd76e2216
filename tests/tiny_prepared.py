"""A prepared set of small phantoms, made in a second without the files of a cohort: for tests of what reads one."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.bundle import NETWORK_KEYS
from pipeline.geometry import bounding_box
from training.ablation import merged
from training.files import sha256_of, write_whole
from training.phantom import Phantom, PhantomSpec, make_phantom
from training.prepared import (
    DTYPES,
    MANIFEST,
    STUDY,
    Diagnosis,
    PreparedManifest,
    PreparedSet,
    Split,
    StudyRecord,
    open_prepared,
)
from training.recipe import MODELS, Recipe, parse_recipe

DIAGNOSES: tuple[Diagnosis, ...] = ("negative", "lymphoma", "lung_cancer", "melanoma")
LESIONS = 5
TINY: dict[str, Any] = {
    "name": "tiny",
    "version": "1",
    "profile": "robust",
    "licence": "Apache-2.0",
    "statement": "Trained on computer phantoms only. Research only, not for clinical use.",
    "prepare": {"spacing_mm": [8.0, 8.0, 8.0], "registration": False, "districts": ["given"]},
    "model": {
        "discriminator_width": 2,
        "discriminator_layers": 1,
        "pix2pix": {"architecture": "unet3d", "width": 2, "depth": 2, "window": 16},
        "cyclegan": {"architecture": "resnet3d", "width": 2, "depth": 1, "window": 16},
    },
    "train": {
        "batch": 2,
        "learning_rate": 1e-3,
        "discriminator_learning_rate": 2e-4,
        "adversarial_weight": 0.02,
        "ema_decay": 0.5,
        "lesion_share": 0.2,
        "steps": {model: dict.fromkeys(NETWORK_KEYS, 6) for model in MODELS},
    },
    "inference": {"overlap": 4, "blending": "gaussian", "stitching": "feathered", "feather_mm": 8.0},
}


def tiny_recipe(**changes: Any) -> Recipe:
    """Width 2, window 16, 6 steps; `changes` are merged in as in TOML: `tiny_recipe(train={"batch": 4})`."""
    return parse_recipe(merged(TINY, changes), "tiny")


def write_tiny_prepared(
    folder: Path,
    *,
    studies: int = 6,
    spacing_mm: float = 8.0,
    recipe: Recipe,
    coverage: tuple[float, float] | None = None,
) -> PreparedSet:
    """Write phantoms (one patient each) as `train prepare` would and open them.

    Of 6 studies 4 are for training, then 1 for validation, 1 for testing. Every fourth has no lesion and is
    "negative". Without `coverage` the whole body is scanned.
    """
    records = []
    for number in range(studies):
        lesions = 0 if number % len(DIAGNOSES) == 0 else LESIONS
        spec = PhantomSpec(
            seed=100 + number,
            spacing_mm=(spacing_mm,) * 3,
            coverage=coverage or (0.0, 1.02),
            lesions=lesions,
        )
        records.append(_write_study(folder, make_phantom(spec), recipe, number, _side(number, studies)))
    manifest = PreparedManifest(
        recipe=recipe.name,
        prepare_digest=recipe.prepare_digest,
        layout="tcia",
        phantom=True,
        spacing_mm=(spacing_mm,) * 3,
        organ_names=make_phantom(PhantomSpec(spacing_mm=(30.0,) * 3)).organ_names,
        studies=tuple(records),
    )
    write_whole(folder / MANIFEST, manifest.model_dump_json(indent=1).encode())
    return open_prepared(folder)


def _side(number: int, studies: int) -> Split:
    test, validation = max(1, round(0.2 * studies)), max(1, round(0.1 * studies))
    if number >= studies - test:
        return "test"
    return "validation" if number >= studies - test - validation else "train"


def _write_study(folder: Path, phantom: Phantom, recipe: Recipe, number: int, split: Split) -> StudyRecord:
    box = bounding_box(phantom.body)
    assert box is not None
    scale = recipe.normalization
    arrays: dict[str, NDArray[Any]] = {
        "ct": scale.ct_to_unit(phantom.hu)[box],
        "pet": scale.suv_to_unit(phantom.suv)[box],
        "districts": phantom.districts[box],
        "lesions": phantom.lesions[box] > 0,
        "organs": phantom.organs[box],
    }
    study = f"phantom-{number:03d}"
    place = folder / "studies" / study
    place.mkdir(parents=True)
    for name, array in arrays.items():
        np.save(place / f"{name}.npy", np.ascontiguousarray(array.astype(DTYPES[name])))
    grid = phantom.grid
    corner = grid.affine @ np.array([*(side.start for side in box), 1.0])
    record = StudyRecord(
        id=study,
        patient=hashlib.sha256(study.encode()).hexdigest()[:16],
        diagnosis=DIAGNOSES[number % len(DIAGNOSES)],
        age=40.0 + number,
        sex="FM"[number % 2],
        shape=arrays["ct"].shape,
        spacing_mm=grid.spacing_mm,
        origin_mm=tuple(float(v) for v in corner[:3]),
        files={name: sha256_of(place / f"{name}.npy") for name in arrays},
        segmenter="given",
        split=split,
    )
    write_whole(place / STUDY, record.model_dump_json(indent=1).encode())
    return record
