"""How far the synthesis answers differently when it is shown the same body mirrored: test-time augmentation.

Which flips depends on how the networks were trained. One that was trained with flips should answer alike for
left-right and front-back, and where it does not, it is not sure. One that was trained without them is only shown
left-right: most of a body looks much the same that way, while no body has its spine in front; its map then also shows
what it makes of a liver on the left, so it rather says too much than too little. Feet-head is always left out: no body
has its legs above its head, and the scan's two ends would trade places. The result itself stays that of the volume as
it is; the members serve the standard deviation only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from pipeline.types import DistrictMap, FloatVolume, OnProgress, Progress, Stage

FLIPS = {"left-right": 2, "front-back": 1}  # the axis of [z, y, x] that is mirrored
UNSEEN = ("left-right",)  # for networks that were trained without flips
UNSEEN_NOTE = "uncertainty: the networks were trained without flips; mirrored bodies are new to them"
STEPS = 1000  # of the stage's progress: the number of windows differs a little between the flips

Synthesize = Callable[[FloatVolume, DistrictMap, OnProgress], FloatVolume]


def flips_for(training: Mapping[str, Any]) -> tuple[str, ...]:
    """The flips for networks with this `training` part of a manifest; where it does not say, they saw none."""
    recipe = training.get("recipe")
    augment = recipe.get("augment") if isinstance(recipe, Mapping) else None
    seen = isinstance(augment, Mapping) and augment.get("flips") is True
    return tuple(FLIPS) if seen else UNSEEN


def flip_deviation(
    suv: FloatVolume,
    ct_unit: FloatVolume,
    districts: DistrictMap,
    synthesize: Synthesize,
    flips: Sequence[str],
    on_progress: OnProgress,
) -> FloatVolume:
    """The standard deviation of the SUV over the volume as it is and its flips.

    Args:
        suv: the result, float32 [z, y, x], g/ml: the first member; it is not changed.
        ct_unit: the scaled CT that it was made of, [z, y, x].
        districts: on the same grid.
        synthesize: gives the SUV of a flipped CT and its flipped districts; 0 outside the body and in districts
            that are not evaluated, as `pipeline.run.synthesize_volume`.
        flips: names of FLIPS.
        on_progress: told how much of the stage UNCERTAINTY is done.

    Returns:
        float32 [z, y, x], SUV in g/ml; of the members themselves (divided by their number, not one less), as they
        are no sample of a larger set. 0 outside the body and where nothing is evaluated, as every member is 0 there.
    """
    mean, squares = suv.copy(), np.zeros_like(suv)  # Welford's running sums: two volumes, however many flips
    for index, name in enumerate(flips):
        axis = FLIPS[name]
        labels = np.ascontiguousarray(np.flip(districts.labels, axis))
        flipped = np.ascontiguousarray(np.flip(ct_unit, axis))
        member = synthesize(flipped, replace(districts, labels=labels), _share(on_progress, index, len(flips), name))
        member = np.flip(member, axis)
        delta = member - mean
        mean += delta / np.float32(index + 2)
        squares += delta * (member - mean)
    deviation: FloatVolume = np.sqrt(np.maximum(squares, 0) / np.float32(len(flips) + 1))
    return deviation


def _share(on_progress: OnProgress, index: int, count: int, name: str) -> OnProgress:
    """Turns the progress of one member's synthesis into its share of the stage UNCERTAINTY."""

    def listen(progress: Progress) -> None:
        done = int(STEPS * (index + progress.done / max(progress.total, 1)) / count)
        on_progress(Progress(stage=Stage.UNCERTAINTY, done=done, total=STEPS, text=name))

    return listen
