"""What each painted structure looks like on CT and on FDG PET.

Means of the SUV after Parlak 2019 (blood pool, liver) and Wang 2007 (brain); the others are textbook values. They
make a plausible picture and are no reference for a patient.

Part of the spread between patients can be told from their CT, and is drawn so (`expected_suv`):
- body composition: fat takes up little FDG, so the same injected activity per kilogram of a fat person leaves more for
  every gram of the rest; this is why SUV by body weight rises with fat (Zasadny and Wahl, Radiology 1993);
- the air in the lungs and the fat within muscle dilute uptake and HU alike;
- a full bladder holds the same activity in more urine.
What remains is `suv_residual`, which no network can know.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FAT_TO_LEAN = 0.3  # uptake of fat over that of the lean body, per gram
REFERENCE_FAT = 0.28  # mass fraction at which the table below holds
MUSCLE_HU = 58.0  # of muscle without any fat; with fat the HU falls to the mixture's
AIR_HU = -1000.0


@dataclass(frozen=True, slots=True)
class Tissue:
    """HU with its spread between patients, what contrast medium adds, SUV at reference body composition.

    `suv_residual` is the standard deviation of the SUV among patients whose CTs look the same.
    """

    hu: float
    hu_spread: float
    suv: float
    suv_residual: float
    contrast_hu: float = 0.0
    density: float = 1.04  # g/ml, for the person's weight


def _t(
    hu: float, hu_spread: float, suv: float, suv_residual: float, contrast: float = 0.0, density: float = 1.04
) -> Tissue:
    return Tissue(hu, hu_spread, suv, suv_residual, contrast, density)


# The order gives the label in `Phantom.organs`; names from "table" on are not part of the body.
TISSUES: Mapping[str, Tissue] = {
    "air": _t(AIR_HU, 0, 0, 0, density=0.0),
    "fat": _t(-100, 8, 0.27, 0.02, density=0.95),
    "muscle": _t(52, 6, 0.66, 0.033, 10, 1.05),
    "postural_muscle": _t(54, 5, 0.98, 0.05, 10, 1.05),  # soleus, adductors, back: oxidative fibers, never at rest
    "visceral_fat": _t(-95, 8, 0.38, 0.035, density=0.95),
    "skin": _t(10, 10, 0.7, 0.05),
    "airway": _t(-990, 5, 0.2, 0.05, density=0.0),
    "gas": _t(-950, 30, 0.5, 0.1, density=0.0),
    "lung": _t(-800, 40, 0.5, 0.04, 8, 0.21),
    "lung_vessel": _t(40, 5, 1.45, 0.08, 110),
    "blood": _t(45, 4, 1.57, 0.1, 115, 1.06),
    "myocardium": _t(48, 4, 3.0, 1.2, 45, 1.05),
    "liver": _t(56, 6, 2.34, 0.15, 52, 1.06),
    "gallbladder": _t(10, 4, 0.6, 0.1),
    "spleen": _t(50, 4, 1.9, 0.18, 65, 1.06),
    "pancreas": _t(40, 5, 1.4, 0.12, 50),
    "stomach": _t(42, 4, 1.9, 0.3, 35),
    "stomach_content": _t(22, 10, 0.7, 0.15, 0, 1.0),
    "bowel": _t(38, 5, 1.7, 0.35, 30),
    "colon": _t(34, 6, 1.4, 0.3, 25),
    "kidney": _t(33, 3, 2.8, 0.45, 130, 1.05),
    "urine": _t(6, 3, 9.0, 2.5, 0, 1.0),
    "adrenal": _t(25, 5, 1.3, 0.2, 40),
    "bladder_wall": _t(40, 4, 1.5, 0.3, 20),
    "bladder": _t(6, 3, 12.0, 3.5, 0, 1.0),
    "prostate_uterus": _t(45, 5, 1.6, 0.3, 25),
    "gonad": _t(30, 4, 2.0, 0.4),
    "breast": _t(20, 10, 0.9, 0.2),
    "thyroid": _t(105, 10, 1.5, 0.3, 60),
    "salivary": _t(15, 10, 2.2, 0.4, 20),
    "tonsil": _t(50, 5, 3.2, 0.8, 25),
    "tongue": _t(55, 5, 1.6, 0.3, 15),
    "cortical_bone": _t(850, 80, 0.6, 0.04, density=1.85),
    "red_marrow": _t(215, 25, 1.4, 0.16, density=1.18),
    "spongy_bone": _t(210, 25, 0.45, 0.03, density=1.16),  # trabeculae with yellow marrow
    "yellow_marrow": _t(-40, 10, 0.42, 0.03, density=1.0),
    "rib": _t(420, 40, 1.0, 0.07, density=1.4),
    "cartilage": _t(95, 12, 0.7, 0.1, density=1.1),
    "synovium": _t(42, 5, 1.05, 0.06, 15),  # lining and fluid of the large joints
    "disc": _t(75, 8, 0.8, 0.1, density=1.1),
    "spinal_cord": _t(36, 3, 2.0, 0.3),
    "grey_matter": _t(38, 2, 8.0, 0.8, 2),
    "white_matter": _t(28, 2, 3.2, 0.32, 1),
    "cerebellum": _t(35, 2, 7.5, 0.75, 2),
    "basal_ganglia": _t(40, 2, 8.8, 0.9, 2),
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


# Excreted or empty: does not take part in the body's sharing of the injected activity.
NOT_SHARED = ("air", "airway", "gas", "urine", "bladder", "table", "table_foam", "blanket")
FATTY = ("fat", "visceral_fat", "yellow_marrow")


def lean_factor(fat_fraction: float) -> float:
    """How much higher the SUV by body weight is than at the reference fat fraction (of the whole mass).

    Body weight = lean + fat share the activity as 1 : FAT_TO_LEAN, and the SUV's mean over all mass is 1.
    """
    return (1 - (1 - FAT_TO_LEAN) * REFERENCE_FAT) / (1 - (1 - FAT_TO_LEAN) * fat_fraction)


def expected_suv(fat_fraction: float, plain_hu: NDArray[np.float32], bladder_fill: float) -> NDArray[np.float32]:
    """The SUV by label that a person of this body composition, these HU (before contrast) and bladder has."""
    suv = np.array([t.suv for t in TISSUES.values()], dtype=np.float32)
    shared = np.array([name not in NOT_SHARED for name in NAMES])
    suv[shared] *= lean_factor(fat_fraction)
    lung = LABEL["lung"]
    suv[lung] *= (plain_hu[lung] - AIR_HU) / (TISSUES["lung"].hu - AIR_HU)  # uptake goes with tissue per milliliter
    for name in ("muscle", "postural_muscle"):
        now, usual = (_fat_within(hu) for hu in (float(plain_hu[LABEL[name]]), TISSUES[name].hu))
        suv[LABEL[name]] *= (1 - (1 - FAT_TO_LEAN) * now) / (1 - (1 - FAT_TO_LEAN) * usual)
    suv[LABEL["bladder"]] *= (0.9 / bladder_fill) ** 1.5
    return suv


def _fat_within(muscle_hu: float) -> float:
    return max(MUSCLE_HU - muscle_hu, 0.0) / (MUSCLE_HU - TISSUES["fat"].hu)


def draw_hu(rng: np.random.Generator, *, contrast: bool) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """HU of every label for one patient, without and with contrast medium: at most two spreads from the mean."""
    spread = np.clip(rng.standard_normal(len(NAMES)), -2, 2)
    phase = rng.uniform(0.7, 1.2) if contrast else 0.0
    plain = np.array([t.hu + t.hu_spread * s for t, s in zip(TISSUES.values(), spread, strict=True)], np.float32)
    return plain, plain + np.array([t.contrast_hu * phase for t in TISSUES.values()], np.float32)


def draw_residual(rng: np.random.Generator) -> NDArray[np.float32]:
    """What the CT does not tell: a factor on every label's expected SUV, at most two spreads from 1."""
    spread = np.clip(rng.standard_normal(len(NAMES)), -2, 2)
    relative = [t.suv_residual / t.suv if t.suv else 0.0 for t in TISSUES.values()]
    return np.maximum(1 + spread * relative, 0).astype(np.float32)
