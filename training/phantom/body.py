"""Skin, fat, muscle, limbs: the outside of the person, and the districts.

Reference millimetres: origin at the trunk's centre, soles at z = SOLES, crown at z = CROWN. Districts are cut at
the neck's base and the crotch; an arm is whatever of the arm's rods lies outside trunk, head and legs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.types import District
from training.phantom.shapes import Capsule, Ellipsoid, Point, Profile, Shape, Within, chain
from training.phantom.sketch import SIDES, Sketch, between

SOLES = -1135.0
CROWN = 634.0
NECK_BASE = 362.0  # C7: above is head
CROTCH = -335.0  # below is legs
BELOW, MIDDLE, ABOVE = (-np.inf, CROTCH), (CROTCH, NECK_BASE), (NECK_BASE, np.inf)

TRUNK = Profile(
    z=[-345, -300, -250, -190, -110, -40, 40, 120, 200, 260, 300, 325, 345, 370],
    half_x=[146, 158, 160, 155, 140, 131, 136, 146, 153, 156, 155, 138, 98, 58],
    half_y=[86, 95, 98, 95, 90, 87, 92, 100, 102, 94, 80, 68, 60, 54],
    centre_y=[10, 8, 5, 2, 0, 0, 0, 0, 0, 5, 12, 16, 17, 15],
)
TRUNK_FAT = [0.8, 0.95, 1.0, 1.0, 1.0, 1.0, 0.9, 0.65, 0.5, 0.4, 0.35, 0.3, 0.25, 0.2]  # of the person's fat
NECK = Profile(
    z=[340, 375, 410, 450, 480],
    half_x=[66, 56, 54, 56, 58],
    half_y=[60, 56, 57, 62, 66],
    centre_y=[15, 14, 12, 10, 10],
    power=2.0,
)
LEG = Profile(
    z=[-1120, -1085, -1040, -960, -880, -790, -735, -690, -550, -420, -340, -270],
    half_x=[34, 34, 33, 44, 54, 50, 52, 53, 66, 77, 80, 62],
    half_y=[44, 42, 36, 46, 58, 52, 54, 56, 70, 82, 86, 70],
    centre_x=[76, 76, 76, 78, 80, 80, 80, 81, 83, 85, 86, 88],
    centre_y=[14, 14, 12, 14, 16, 10, 6, 6, 6, 8, 10, 8],
    power=2.1,
)
LEG_FAT = [0.15, 0.15, 0.15, 0.2, 0.25, 0.25, 0.25, 0.3, 0.45, 0.7, 0.85, 0.9]


@dataclass(frozen=True, slots=True)
class Arm:
    """Joints of one arm and what its rods measure."""

    shoulder: Point
    elbow: Point
    wrist: Point
    finger: Point
    fat_mm: float


def mirrored(profile: Profile, sign: float) -> Profile:
    centre_x = [sign * c for c in profile.centre_x or ()]
    return Profile(profile.z, profile.half_x, profile.half_y, centre_x, profile.centre_y, profile.power)


def trunk_skin(sketch: Sketch) -> Profile:
    """The trunk with its fat: the belly carries more of it to the front."""
    fat = sketch.person.fat_mm
    grown = TRUNK.grown([f * fat for f in TRUNK_FAT])
    belly = [-0.22 * fat * f for f in TRUNK_FAT]
    centre_y = [c + b for c, b in zip(grown.centre_y or (), belly, strict=True)]
    return Profile(grown.z, grown.half_x, grown.half_y, None, centre_y, grown.power)


def pose_arm(sketch: Sketch, sign: float) -> Arm:
    """Where shoulder, elbow, wrist and fingertips lie for the person's pose."""
    person, rng = sketch.person, sketch.rng
    skin = trunk_skin(sketch)
    fat = 3 + 0.3 * person.fat_mm
    jitter = [float(v) for v in rng.uniform(-1, 1, 6)]
    shoulder: Point = (sign * 166, 12.0, 282.0)
    if person.pose == "raised":
        spread = 20 * jitter[0]
        elbow: Point = (sign * (188 + spread), 5 + 15 * jitter[1], 575.0)
        wrist: Point = (sign * (90 + 2 * spread), -15 + 20 * jitter[2], 770 + 15 * jitter[3])
        finger: Point = (sign * (20 + spread), -25 + 20 * jitter[4], 905.0)
        return Arm((sign * 158, 12.0, 312.0), elbow, wrist, finger, fat)
    if person.pose == "folded":
        elbow = (sign * (skin.half_width(0) + 22 + fat), 5.0, 5 + 15 * jitter[0])
        height = (40 if sign > 0 else -25) + 15 * jitter[1]
        across = 45 + 25 * jitter[2]
        wrist = (sign * across, skin.front(height) - 21 - fat, height + 15)
        finger = (sign * (across - 120), skin.front(height + 25) - 14 - fat, height + 40)
        return Arm(shoulder, elbow, wrist, finger, fat)
    gap = person.arm_gap_mm if person.pose == "sides" else -6.0
    beside = max(skin.half_width(z) for z in (-60.0, -10.0, 40.0, 100.0))
    elbow = (sign * (beside + 36 + fat + gap), 20 + 10 * jitter[0], -10.0)
    wrist = (sign * (skin.half_width(-230) + 26 + fat + gap), -5 + 15 * jitter[1], -235.0)
    finger = (wrist[0], wrist[1] - 10, -395.0)
    return Arm(shoulder, elbow, wrist, finger, fat)


def _arm_rods(arm: Arm, extra: float) -> list[Capsule | Ellipsoid]:
    forearm = between(arm.elbow, arm.wrist, 0.3)
    palm = between(arm.wrist, arm.finger, 0.45)
    radii = [44 + extra, 36 + extra, 36 + extra, 24 + 0.5 * extra]
    rods: list[Capsule | Ellipsoid] = [*chain([arm.shoulder, arm.elbow, forearm, arm.wrist], radii)]
    rods += chain([arm.wrist, palm, arm.finger], [23 + 0.4 * extra, 30 + 0.3 * extra, 13 + 0.3 * extra])
    return rods


def draw_soft_body(sketch: Sketch) -> dict[str, Arm]:
    """Paint fat and muscle of the whole person and write the districts; returns the arms for the bones."""
    person = sketch.person
    arms = {side: pose_arm(sketch, sign) for side, sign in SIDES}
    for arm in arms.values():
        sketch.add_all("fat", _arm_rods(arm, arm.fat_mm), region=District.ARMS)
        sketch.add_all("muscle", _arm_rods(arm, -2.0), over=["fat"])
    skin, leg_fat = trunk_skin(sketch), [3 + f * person.fat_mm for f in LEG_FAT]
    for _, sign in SIDES:
        leg = mirrored(LEG, sign)
        sketch.add("fat", leg.grown(leg_fat), region=District.LEGS)
        sketch.add_all("fat", foot(sign, 3), region=District.LEGS)
    sketch.add("fat", Within(skin, z=BELOW), region=District.LEGS)
    sketch.add("fat", Within(skin, z=MIDDLE), region=District.TRUNK)
    for _, sign in SIDES:  # the hips' sides above the crotch belong to the trunk
        hip = Within(mirrored(LEG, sign).grown(leg_fat), z=MIDDLE)
        sketch.add("fat", hip, region=District.TRUNK)
    if person.female:
        for _, sign in SIDES:
            depth = 22 + 0.6 * person.fat_mm
            breast = Ellipsoid((sign * 72, skin.front(165) + 12, 160), (56 + 0.4 * person.fat_mm, depth, 58))
            sketch.add("fat", breast, region=District.TRUNK)
            sketch.add("breast", Ellipsoid((sign * 72, skin.front(165) + 8, 158), (30, depth * 0.6, 30)), over=["fat"])
    neck = NECK.grown(4 + 0.15 * person.fat_mm)
    sketch.add("fat", Within(neck, z=MIDDLE), region=District.TRUNK)
    solids: list[Shape] = [neck, *_head(4 + 0.05 * person.fat_mm)]
    for shape in solids:
        sketch.add("fat", Within(shape, z=ABOVE), region=District.HEAD)
    for _, sign in SIDES:
        sketch.add("muscle", mirrored(LEG, sign), over=["fat"])
        sketch.add_all("muscle", foot(sign, -2), over=["fat"])
        sketch.add_all("muscle", chain([(sign * 90, 15, 338), (sign * 160, 14, 292)], [26, 38]), over=["fat"])
        septum = Profile(
            z=[-720, -550, -400, -330],
            half_x=[6, 12, 16, 10],
            half_y=[5, 10, 12, 8],
            centre_x=[sign * 78] * 4,
            centre_y=[20, 18, 14, 10],
        )
        sketch.add("fat", septum, over=["muscle"])
    sketch.add("muscle", TRUNK, over=["fat"])
    sketch.add_all("muscle", (NECK, *_head(0.0)), over=["fat"])
    return arms


def _head(extra: float) -> list[Ellipsoid]:
    return [
        Ellipsoid((0, 4, 526), (74 + extra, 95 + extra, 103 + extra), power=2.15),
        Ellipsoid((0, -38, 466), (56 + extra, 56 + extra, 62 + extra), power=2.2),
        Ellipsoid((0, -92, 480), (13 + extra, 16 + extra, 20 + extra)),
        *(Ellipsoid((s * 78, 10, 488), (7 + extra * 0.5, 14, 26)) for _, s in SIDES),
    ]


def foot(sign: float, extra: float) -> list[Capsule]:
    x = sign * 78
    return [
        Capsule((x, 24, -1096), (x + sign * 8, -80, -1104), 34 + extra, 30 + extra),
        Capsule((x + sign * 8, -80, -1104), (x + sign * 14, -165, -1110), 30 + extra, 18 + extra),
    ]
