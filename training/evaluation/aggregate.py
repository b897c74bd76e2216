"""From figures per study and seed to one figure per patient, for `metrics.describe` and the tests.

Seeds are averaged within a study first, then studies within a patient, so that n counts independent patients.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from training.evaluation.measure import Measure

Value = Callable[[Measure], float | None]


def per_patient(measures: Iterable[Measure], value: Value) -> dict[str, float]:
    """One value per patient, by the patient's hash; a patient without any is left out."""
    studies: dict[tuple[str, str], list[float]] = defaultdict(list)
    for measure in measures:
        found = value(measure)
        if found is not None and math.isfinite(found):
            studies[measure.patient, measure.study].append(found)
    patients: dict[str, list[float]] = defaultdict(list)
    for (patient, _), found_values in sorted(studies.items()):
        patients[patient].append(float(np.mean(found_values)))
    return {patient: float(np.mean(values)) for patient, values in patients.items()}


def of_region(region: str, metric: str) -> Value:
    """Reads one metric of one region from a measure."""

    def read(measure: Measure) -> float | None:
        figures: Mapping[str, float | None] = measure.regions.get(region, {})
        return figures.get(metric)

    return read


def by_method(measures: Iterable[Measure]) -> dict[str, list[Measure]]:
    """The measures of every method, in the order in which methods are shown."""
    found: dict[str, list[Measure]] = {}
    for measure in measures:
        found.setdefault(measure.method, []).append(measure)
    return dict(sorted(found.items(), key=lambda item: method_rank(item[0])))


def method_rank(method: str) -> tuple[int, int, str]:
    """Pix2Pix before CycleGAN, districts before whole body, the networks before the baselines."""
    model, _, variant = method.partition("/")
    models = {"pix2pix": 0, "cyclegan": 1, "hu_lookup": 2, "district_mean": 3}
    return models.get(model, 9), 0 if variant == "districts" else 1, method
