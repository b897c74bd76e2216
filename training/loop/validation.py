"""How good a network is while it is trained: whole volumes of the validation studies through the node's own code."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from pipeline.device import CPU_BATCH
from pipeline.synthesis import network_input, synthesize
from pipeline.types import OUTSIDE, WHOLE_BODY, District, FloatVolume
from training.evaluation.measure import district_map
from training.evaluation.metrics import mae, psnr
from training.prepared import PreparedStudy
from training.recipe import Recipe


@dataclass(frozen=True, kw_only=True, slots=True)
class Validation:
    """Means over the studies that have the district, inside district and body, in units of [0, 1] (SUV / suv_max).

    `picture` is the first study's middle coronal slice, [3, z, x]: CT, true PET, synthetic PET, head up.
    """

    mae: float
    psnr: float
    studies: int
    picture: FloatVolume | None

    def figures(self, step: int) -> dict[str, float]:
        """For the run's record."""
        return {"step": step, "mae": self.mae, "psnr": self.psnr, "studies": self.studies}


def validate(
    network: nn.Module, recipe: Recipe, key: str, studies: list[PreparedStudy], device: torch.device
) -> Validation:
    """Run one network over up to `recipe.validation.studies` of the studies, as the recipe's bundle would.

    Args:
        network: on `device`; left in eval mode.
        key: "head", "trunk", "arms", "legs" or "whole_body".
        studies: of the validation split; those without the district do not count.
    """
    network.eval()
    found: list[Mapping[str, float]] = []
    picture = None
    for study in studies:
        region = study.districts != OUTSIDE if key == WHOLE_BODY else study.districts == District[key.upper()]
        if not region.any():
            continue
        pet = study.pet.astype(np.float32)
        fake = synthesize_study(network, recipe, key, study, device)
        found.append({"mae": mae(fake, pet, region), "psnr": psnr(fake, pet, region)})
        if picture is None:
            picture = _picture(study.ct, pet * region, fake * region)
        if len(found) == recipe.validation.studies:
            break
    if not found:
        return Validation(mae=math.nan, psnr=math.nan, studies=0, picture=None)
    means = {name: float(np.mean([row[name] for row in found])) for name in ("mae", "psnr")}
    return Validation(mae=means["mae"], psnr=means["psnr"], studies=len(found), picture=picture)


def synthesize_study(
    network: nn.Module, recipe: Recipe, key: str, study: PreparedStudy, device: torch.device
) -> FloatVolume:
    """The network's output where its district is, [z, y, x] in [0, 1]; before stitching, so not masked."""
    districts = district_map(study)
    labels = districts.labels
    district = District.TRUNK if key == WHOLE_BODY else District[key.upper()]  # the whole-body network has none
    region = labels != OUTSIDE if key == WHOLE_BODY else labels == district
    inference = recipe.inference
    return synthesize(
        network_input(study.ct.astype(np.float32), districts, district, key, inference.input_mask),
        region,
        network,
        window=recipe.window,
        overlap=inference.overlap,
        blending=inference.blending,
        batch=CPU_BATCH,
        device=device,
    )


def _picture(ct: np.ndarray, pet: FloatVolume, fake: FloatVolume) -> FloatVolume:
    middle = int(np.argmax(pet.sum(axis=(0, 2))))  # the coronal slice with the most uptake
    return np.stack([v[::-1, middle].astype(np.float32) for v in (ct, pet, fake)])
