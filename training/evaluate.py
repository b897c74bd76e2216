"""How well a bundle does on held-out phantoms, through the inference code that the node runs.

The districts are the phantom's own, so that the networks are measured and not the segmenter. Primary region:
district and body (background would flatter every number). Results on phantoms say nothing about patients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.bundle import ModelBundle, Normalization
from pipeline.stitching import reach, stitch
from pipeline.synthesis import masked_input, synthesize
from pipeline.types import WHOLE_BODY, District, DistrictMap, FloatVolume
from training.baselines import Baselines, fit_baselines
from training.cases import body_box, load_cases, phantoms
from training.metrics import mae, mean_in, psnr, ssim_map
from training.phantom import Phantom
from training.recipe import Recipe

METHODS = ("districts", "whole_body", "hu_lookup", "district_mean")
METRICS = ("mae", "psnr", "ssim", "bias_suv_mean")
REGIONS = ("body", *(d.key for d in District))
BATCH = 16


@dataclass(frozen=True, slots=True)
class Picture:
    """One held-out phantom for the report: HU and SUV volumes [z, y, x], spacing in mm."""

    name: str
    hu: FloatVolume
    true_suv: FloatVolume
    synthetic_suv: FloatVolume
    labels: NDArray[np.uint8]
    spacing_mm: tuple[float, float, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """`rows`: one per case, method and region. `lesions`: one per lesion. `organs`: one per case, method and organ."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    lesions: list[dict[str, Any]] = field(default_factory=list)
    organs: list[dict[str, Any]] = field(default_factory=list)
    picture: Picture | None = None

    @property
    def summary(self) -> dict[str, Any]:
        """Per method, region and metric: number of cases, mean, SD and standard error of the mean."""
        table: dict[str, Any] = {}
        for method in METHODS:
            for region in REGIONS:
                rows = [r for r in self.rows if r["method"] == method and r["region"] == region]
                table.setdefault(method, {})[region] = {m: describe(r[m] for r in rows) for m in METRICS}
        return {
            "cases": len({row["case"] for row in self.rows}),
            "note": "held-out phantoms with their own districts; says nothing about patients",
            "data_range": "1.0 = suv_max; inside district and body",
            "table": table,
        }


def describe(values: Iterable[float]) -> dict[str, float | int | None]:
    """n, mean, SD and SE of the finite values; None where there are too few."""
    kept = [v for v in values if math.isfinite(v)]
    if not kept:
        return {"n": 0, "mean": None, "sd": None, "se": None}
    sd = float(np.std(kept, ddof=1)) if len(kept) > 1 else None
    se = sd / math.sqrt(len(kept)) if sd is not None else None
    mean = float(np.mean(kept))
    return {"n": len(kept), "mean": round(mean, 6), "sd": sd and round(sd, 6), "se": se and round(se, 6)}


def evaluate_bundle(
    bundle: ModelBundle,
    recipe: Recipe,
    cases_folder: Path,
    *,
    device: str = "cpu",
    on_case: Callable[[int, int], None] = lambda _done, _total: None,
) -> Evaluation:
    """Measure the bundle's district networks, its whole-body network and both baselines on every held-out phantom."""
    baselines = fit_baselines(load_cases(cases_folder))
    evaluation = Evaluation()
    picture: Picture | None = None
    for number, phantom in enumerate(phantoms(recipe, test=True), start=1):
        predictions = predict(bundle, phantom, baselines, torch.device(device))
        _measure(evaluation, phantom, predictions, bundle.manifest.normalization)
        if picture is None or (phantom.districts == District.LEGS).any() > (picture.labels == District.LEGS).any():
            picture = _picture(phantom, bundle.manifest.normalization.unit_to_suv(predictions["districts"]))
        on_case(number, recipe.data.test_cases)
    return Evaluation(rows=evaluation.rows, lesions=evaluation.lesions, organs=evaluation.organs, picture=picture)


def predict(
    bundle: ModelBundle, phantom: Phantom, baselines: Baselines, device: torch.device
) -> dict[str, FloatVolume]:
    """[0, 1] volumes on the phantom's grid, 0 outside the body, by method."""
    manifest = bundle.manifest
    districts = DistrictMap(
        labels=phantom.districts,
        grid=phantom.grid,
        segmenter="phantom",
        version="1",
        confidence=dict.fromkeys(_present(phantom), 1.0),
    )
    unit = manifest.normalization.ct_to_unit(phantom.hu)
    body = phantom.body

    def run(key: str, ct: FloatVolume, mask: NDArray[np.bool_]) -> FloatVolume:
        return synthesize(
            ct,
            mask,
            bundle.network(key, device),
            window=manifest.window,
            overlap=manifest.overlap,
            blending=manifest.blending,
            batch=BATCH,
            device=device,
        )

    volumes: dict[District, FloatVolume] = {}
    for district in districts.present:
        if district.key in bundle.keys:
            seen = masked_input(unit, districts, district, district.key, manifest.input_mask)
            mask = reach(districts, district, mode=manifest.stitching, feather_mm=manifest.feather_mm)
            volumes[district] = run(district.key, seen, mask)
    masked = np.where(body, unit, np.float32(0))
    result = {
        "districts": stitch(volumes, districts, mode=manifest.stitching, feather_mm=manifest.feather_mm),
        "hu_lookup": baselines.predict_lookup(masked, phantom.districts),
        "district_mean": baselines.predict_mean(phantom.districts),
    }
    if WHOLE_BODY in bundle.keys:
        result["whole_body"] = run(WHOLE_BODY, masked, body) * body
    return result


def _present(phantom: Phantom) -> list[District]:
    return [d for d in District if (phantom.districts == d).any()]


def _measure(
    evaluation: Evaluation, phantom: Phantom, predictions: dict[str, FloatVolume], normalization: Normalization
) -> None:
    name = f"phantom-{phantom.spec.seed}"
    box = body_box(phantom.body)
    labels, organs, lesions = phantom.districts[box], phantom.organs[box], phantom.lesions[box]
    body = labels > 0
    real = normalization.suv_to_unit(phantom.suv[box]) * body
    scale = normalization.suv_max
    regions = {"body": body, **{d.key: labels == d for d in District}}
    for method, volume in predictions.items():
        fake = volume[box]
        similarity = ssim_map(fake, real)
        for region, mask in regions.items():
            if not mask.any():
                continue
            evaluation.rows.append(
                {
                    "case": name,
                    "pose": phantom.pose,
                    "method": method,
                    "region": region,
                    "mae": mae(fake, real, mask),
                    "psnr": psnr(fake, real, mask),
                    "ssim": mean_in(similarity, mask),
                    "bias_suv_mean": scale
                    * float(fake[mask].mean(dtype=np.float64) - real[mask].mean(dtype=np.float64)),
                }
            )
        for label, organ in enumerate(phantom.organ_names):
            inside = (organs == label) & body & (lesions == 0)
            if label and inside.sum() >= 20:
                evaluation.organs.append(
                    {
                        "case": name,
                        "method": method,
                        "organ": organ,
                        "true_suv_mean": scale * float(real[inside].mean(dtype=np.float64)),
                        "suv_mean": scale * float(fake[inside].mean(dtype=np.float64)),
                    }
                )
        for lesion in phantom.lesion_list:
            inside = lesions == lesion.label
            if inside.any():
                evaluation.lesions.append(
                    {
                        "case": name,
                        "method": method,
                        "organ": lesion.organ,
                        "visible_on_ct": lesion.visible_on_ct,
                        "mae": mae(fake, real, inside),
                        "true_suv_max": scale * float(real[inside].max()),
                        "suv_max": scale * float(fake[inside].max()),
                    }
                )


def _picture(phantom: Phantom, synthetic_suv: FloatVolume) -> Picture:
    return Picture(
        name=f"phantom-{phantom.spec.seed}",
        hu=phantom.hu,
        true_suv=phantom.suv * phantom.body,
        synthetic_suv=synthetic_suv,
        labels=phantom.districts,
        spacing_mm=phantom.grid.spacing_mm,
    )
