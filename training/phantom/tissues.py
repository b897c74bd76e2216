"""What each painted structure looks like on CT and on FDG PET.

Means and spreads (between patients) of the SUV after Parlak 2019 (blood pool, liver) and Wang 2007 (brain); the
others are textbook values. They make a plausible picture and are no reference for a patient.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

AIR_HU = -1000.0


@dataclass(frozen=True, slots=True)
class Tissue:
    """HU and SUV with their spread between patients, and what contrast medium adds to the HU."""

    hu: float
    hu_spread: float
    suv: float
    suv_spread: float
    contrast_hu: float = 0.0
    density: float = 1.04  # g/ml, for the person's weight


def _t(
    hu: float, hu_spread: float, suv: float, suv_spread: float, contrast: float = 0.0, density: float = 1.04
) -> Tissue:
    return Tissue(hu, hu_spread, suv, suv_spread, contrast, density)


# The order gives the label in `Phantom.organs`; names from "table" on are not part of the body.
TISSUES: Mapping[str, Tissue] = {
    "air": _t(AIR_HU, 0, 0, 0, density=0.0),
    "fat": _t(-100, 8, 0.3, 0.06, density=0.95),
    "muscle": _t(52, 5, 0.7, 0.12, 10, 1.05),
    "visceral_fat": _t(-95, 8, 0.4, 0.08, density=0.95),
    "skin": _t(10, 10, 0.7, 0.1),
    "airway": _t(-990, 5, 0.2, 0.05, density=0.0),
    "gas": _t(-950, 30, 0.5, 0.1, density=0.0),
    "lung": _t(-800, 40, 0.5, 0.1, 8, 0.26),
    "lung_vessel": _t(40, 5, 1.3, 0.12, 110),
    "blood": _t(45, 4, 1.57, 0.14, 115, 1.06),
    "myocardium": _t(48, 4, 3.0, 1.2, 45, 1.05),
    "liver": _t(56, 6, 2.34, 0.16, 52, 1.06),
    "gallbladder": _t(10, 4, 0.6, 0.1),
    "spleen": _t(50, 4, 1.9, 0.2, 65, 1.06),
    "pancreas": _t(40, 5, 1.4, 0.2, 50),
    "stomach": _t(42, 4, 2.0, 0.4, 35),
    "stomach_content": _t(22, 10, 0.7, 0.15, 0, 1.0),
    "bowel": _t(38, 5, 1.7, 0.4, 30),
    "colon": _t(34, 6, 1.4, 0.35, 25),
    "kidney": _t(33, 3, 2.8, 0.5, 130, 1.05),
    "urine": _t(6, 3, 9.0, 3.0, 0, 1.0),
    "adrenal": _t(25, 5, 1.3, 0.2, 40),
    "bladder_wall": _t(40, 4, 1.5, 0.3, 20),
    "bladder": _t(6, 3, 14.0, 5.0, 0, 1.0),
    "prostate_uterus": _t(45, 5, 1.6, 0.3, 25),
    "gonad": _t(30, 4, 2.0, 0.4),
    "breast": _t(20, 10, 0.9, 0.2),
    "thyroid": _t(105, 10, 1.5, 0.3, 60),
    "salivary": _t(15, 10, 2.2, 0.4, 20),
    "tonsil": _t(50, 5, 3.2, 0.8, 25),
    "tongue": _t(55, 5, 1.6, 0.4, 15),
    "cortical_bone": _t(850, 80, 0.6, 0.1, density=1.85),
    "red_marrow": _t(220, 30, 1.4, 0.25, density=1.18),
    "yellow_marrow": _t(-40, 10, 0.45, 0.08, density=1.0),
    "rib": _t(420, 40, 1.0, 0.15, density=1.4),
    "cartilage": _t(95, 12, 0.7, 0.1, density=1.1),
    "disc": _t(75, 8, 0.8, 0.1, density=1.1),
    "spinal_cord": _t(36, 3, 2.0, 0.3),
    "grey_matter": _t(38, 2, 8.0, 1.2, 2),
    "white_matter": _t(28, 2, 3.2, 0.5, 1),
    "cerebellum": _t(35, 2, 7.5, 1.2, 2),
    "basal_ganglia": _t(40, 2, 8.8, 1.3, 2),
    "csf": _t(8, 2, 1.0, 0.2, 0, 1.0),
    "eye": _t(16, 4, 1.5, 0.3),
    "tooth": _t(1500, 200, 0.6, 0.1, density=2.0),
    "lesion": _t(35, 0, 6.0, 0.0, 20),
    "table": _t(20, 50, 0, 0, density=0.0),
    "table_foam": _t(-920, 20, 0, 0, density=0.0),
    "blanket": _t(-820, 40, 0, 0, density=0.0),
}
NAMES = tuple(TISSUES)
LABEL = {name: label for label, name in enumerate(NAMES)}
FIRST_OUTSIDE_BODY = LABEL["table"]


def draw_values(rng: np.random.Generator, *, contrast: bool) -> tuple[np.ndarray, np.ndarray]:
    """HU and SUV of every label for one patient: normal about the mean, at most two spreads away."""
    spread = np.clip(rng.standard_normal((2, len(NAMES))), -2, 2)
    phase = rng.uniform(0.7, 1.2) if contrast else 0.0
    hu = [t.hu + t.hu_spread * s + t.contrast_hu * phase for t, s in zip(TISSUES.values(), spread[0], strict=True)]
    suv = [max(t.suv + t.suv_spread * s, 0.0) for t, s in zip(TISSUES.values(), spread[1], strict=True)]
    return np.asarray(hu, dtype=np.float32), np.asarray(suv, dtype=np.float32)
