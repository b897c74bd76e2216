"""Everything that is measured of one synthetic PET of one study: each prediction is looked at once.

Primary region: district and body; background would flatter every number. Outside the body both volumes count as 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from pipeline.types import District, DistrictMap, FloatVolume
from training.evaluation.detection import (
    THRESHOLDS_SUV,
    false_positive_ml,
    false_positives,
    label_lesions,
    measure_lesions,
    seam_index,
)
from training.evaluation.metrics import mae, mean_in, psnr, ssim_map
from training.prepared import Diagnosis, PreparedStudy

BODY, LESIONS, FIELD_OF_VIEW = "body", "lesions", "field_of_view"
REGIONS = (BODY, *(d.key for d in District))
METRICS = ("mae", "psnr", "ssim")
PSNR_LIMIT_DB = 100.0  # half precision stores no smaller error; a perfect study stays in the mean
SMALLEST_ORGAN = 20  # voxels; of fewer a mean is noise

Figures = dict[str, float | None]


class Measure(BaseModel):
    """One study under one method and seed (None: a baseline). What could not be measured is None, never 0.

    `regions[region]` holds voxels, mae, psnr, ssim (data range 1.0) and suv_mean, suv_max, their true values and
    their bias (g/ml). `false_positives` counts invented hot spots by threshold (SUV). `not_evaluated` names the
    districts that the study shows and the method had no network for: then nothing of the whole body is given.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    study: str
    patient: str
    diagnosis: Diagnosis
    method: str
    seed: int | None
    regions: dict[str, Figures]
    organs: dict[str, Figures] = {}
    lesions: tuple[Figures, ...] = ()
    false_positives: dict[float, int] = {}
    false_positive_ml: float | None = None
    seam_index: float | None = None
    not_evaluated: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Truth:
    """A study in memory: [0, 1] float32 volumes [z, y, x]; `pet` is 0 outside body and lesions."""

    study: PreparedStudy
    ct: FloatVolume
    pet: FloatVolume
    districts: DistrictMap
    body: NDArray[np.bool_]
    lesions: NDArray[np.int32]  # numbered from 1


def district_map(study: PreparedStudy) -> DistrictMap:
    """The prepared districts as the pipeline takes them, each with confidence 1."""
    labels = np.ascontiguousarray(study.districts)
    present = [d for d in District if (labels == d).any()]
    return DistrictMap(
        labels=labels,
        grid=study.record.grid,
        segmenter=study.record.segmenter,
        version="prepared",
        confidence=dict.fromkeys(present, 1.0),
    )


def read_truth(study: PreparedStudy) -> Truth:
    """Read one study's arrays."""
    districts = district_map(study)
    body = districts.labels > 0
    mask = np.asarray(study.lesions) > 0
    return Truth(
        study=study,
        ct=study.ct.astype(np.float32),
        pet=np.where(body | mask, study.pet.astype(np.float32), np.float32(0)),
        districts=districts,
        body=body,
        lesions=label_lesions(mask)[0],
    )


def measure(
    truth: Truth,
    fake: FloatVolume,
    *,
    method: str,
    seed: int | None,
    suv_max: float,
    organ_names: Sequence[str] = (),
    not_evaluated: Iterable[District] = (),
) -> Measure:
    """All figures of one prediction.

    Args:
        truth: the study.
        fake: the synthetic PET, float32 [z, y, x] in [0, 1], 0 outside the body.
        suv_max: SUV of 1.0.
        organ_names: by organ label; 0 is none.
        not_evaluated: districts without a network, where `fake` is 0 because nothing was predicted.
    """
    left_out = tuple(not_evaluated)
    record, lesions = truth.study.record, truth.lesions > 0
    whole = not left_out
    common = {"study": record.id, "patient": record.patient, "diagnosis": record.diagnosis, "method": method}
    regions = _regions(truth, fake, left_out, suv_max)
    if not whole:
        return Measure(**common, seed=seed, regions=regions, not_evaluated=tuple(d.key for d in left_out))
    grid = record.grid
    fake_suv, real_suv = fake * np.float32(suv_max), truth.pet * np.float32(suv_max)
    found = measure_lesions(truth.lesions, fake_suv, real_suv, truth.body, grid)
    counts = false_positives(fake_suv, real_suv, lesions)
    seam = seam_index(fake, truth.pet, truth.districts.labels)
    return Measure(
        **common,
        seed=seed,
        regions=regions,
        organs=_organs(truth, fake, suv_max, organ_names),
        lesions=tuple(asdict(lesion) for lesion in found),
        false_positives=dict(zip(THRESHOLDS_SUV, counts, strict=True)),
        false_positive_ml=false_positive_ml(fake_suv, real_suv, truth.body, grid.voxel_ml),
        seam_index=None if math.isnan(seam) else seam,
    )


def _regions(truth: Truth, fake: FloatVolume, left_out: tuple[District, ...], suv_max: float) -> dict[str, Figures]:
    labels = truth.districts.labels
    masks = {d.key: labels == d for d in District if d not in left_out}
    if not left_out:
        masks |= {BODY: truth.body, LESIONS: truth.lesions > 0, FIELD_OF_VIEW: np.ones_like(truth.body)}
    similarity = ssim_map(fake, truth.pet)
    return {
        region: _figures(fake, truth.pet, similarity, mask, suv_max) for region, mask in masks.items() if mask.any()
    }


def _figures(
    fake: FloatVolume, real: FloatVolume, similarity: FloatVolume, mask: NDArray[np.bool_], suv_max: float
) -> Figures:
    inside_fake, inside_real = fake[mask], real[mask]
    every = np.ones(inside_fake.shape, dtype=bool)
    figures: Figures = {
        "voxels": inside_fake.size,
        "mae": mae(inside_fake, inside_real, every),
        "psnr": min(psnr(inside_fake, inside_real, every), PSNR_LIMIT_DB),
        "ssim": mean_in(similarity, mask),
    }
    for name, found, true in (
        ("suv_mean", inside_fake.mean(dtype=np.float64), inside_real.mean(dtype=np.float64)),
        ("suv_max", inside_fake.max(), inside_real.max()),
    ):
        figures[name], figures[f"true_{name}"] = suv_max * float(found), suv_max * float(true)
        figures[f"bias_{name}"] = suv_max * (float(found) - float(true))
    return figures


def _organs(truth: Truth, fake: FloatVolume, suv_max: float, names: Sequence[str]) -> dict[str, Figures]:
    if truth.study.organs is None:
        return {}
    organs = np.where(truth.body & (truth.lesions == 0), np.asarray(truth.study.organs), np.uint8(0))
    counts = np.bincount(organs.ravel(), minlength=len(names))
    found = np.bincount(organs.ravel(), fake.ravel().astype(np.float64), minlength=len(names))
    true = np.bincount(organs.ravel(), truth.pet.ravel().astype(np.float64), minlength=len(names))
    return {
        name: {
            "voxels": float(counts[label]),
            "suv_mean": suv_max * float(found[label] / counts[label]),
            "true_suv_mean": suv_max * float(true[label] / counts[label]),
        }
        for label, name in enumerate(names)
        if label and counts[label] >= SMALLEST_ORGAN
    }
