"""Inside arms and legs: muscle groups, joints, vessels, bones and their two kinds of marrow.

Much of it looks alike on CT and not on PET, as in persons: vessels without contrast have the HU of muscle and twice
its uptake, postural muscles take up more than their neighbors, and spongy bone holds red marrow at the metaphyses of
hip and shoulder but fat everywhere else in an adult's limbs. Where a voxel lies tells them apart.
"""

from __future__ import annotations

from training.phantom.body import Arm
from training.phantom.shapes import Capsule, Ellipsoid, Point, chain
from training.phantom.sketch import SIDES, Sketch, between, plus

SOFT = ("fat", "muscle", "postural_muscle", "synovium", "blood")
MUSCLE = ("muscle",)


def draw_arms(sketch: Sketch, arms: dict[str, Arm]) -> None:
    """Everything under the muscle of both arms. Offsets in y are across the arm in every pose."""
    for (side, sign), arm in zip(SIDES, arms.values(), strict=True):
        del side
        _draw_arm_soft(sketch, arm, sign)
        _draw_arm_bones(sketch, arm)


def _draw_arm_soft(sketch: Sketch, arm: Arm, sign: float) -> None:
    def at(start: Point, end: Point, t: float, offset: Point) -> Point:
        return plus(between(start, end, t), offset)

    upper = (arm.shoulder, arm.elbow)
    brachialis = chain([at(*upper, 0.45, (0, -14, 0)), at(*upper, 0.97, (0, -12, 0))], [15, 13])
    sketch.add_all("postural_muscle", brachialis, over=MUSCLE)
    flexors = chain([at(arm.elbow, arm.wrist, t, (0, -17, 0)) for t in (0.05, 0.35, 0.75)], [14, 17, 8])
    sketch.add_all("postural_muscle", flexors, over=MUSCLE)
    head = between(*upper, 0.02)
    sketch.add("synovium", Ellipsoid(head, (32, 32, 32)), over=("fat", "muscle"))
    sketch.add("synovium", Ellipsoid(arm.elbow, (25, 25, 25)), over=("fat", "muscle"))
    inner = (-sign * 17.0, 8.0, 0.0)  # the medial side of the upper arm
    start: Point = (sign * 60, 0.0, 304.0)
    brachial = [start, at(*upper, 0.1, (-sign * 24, 4, -6)), at(*upper, 0.5, inner), at(*upper, 0.95, (0, -20, 0))]
    sketch.add_all("blood", chain(brachial, [8, 7.5, 7, 6]), over=SOFT)
    for across in (-13.0, 13.0):
        fork = [brachial[-1], *(at(arm.elbow, arm.wrist, t, (0, across * (1 - 0.3 * t), 0)) for t in (0.25, 0.95))]
        sketch.add_all("blood", chain(fork, [5, 4.5, 3.5]), over=SOFT)


def _draw_arm_bones(sketch: Sketch, arm: Arm) -> None:
    over = (*SOFT, "cortical_bone")
    elbow_a, elbow_b = between(arm.elbow, arm.shoulder, 0.03), between(arm.elbow, arm.wrist, 0.05)
    head = between(arm.shoulder, arm.elbow, 0.02)
    sketch.add("cortical_bone", Ellipsoid(head, (25, 25, 25)), over=SOFT)
    shaft = [head, between(head, arm.elbow, 0.25), elbow_a]
    sketch.add_all("cortical_bone", chain(shaft, [18, 12, 16]), over=SOFT)
    sketch.add("spongy_bone", Ellipsoid(head, (21, 21, 21)), over=over)
    sketch.add("yellow_marrow", Capsule(between(head, elbow_a, 0.2), between(head, elbow_a, 0.9), 7, 6), over=over)
    neck = chain([between(head, arm.elbow, t) for t in (0.07, 0.14, 0.3)], [14, 12, 7])
    sketch.add_all("red_marrow", neck, over=("cortical_bone", "spongy_bone", "yellow_marrow"))
    for offset, r in ((-11.0, 8.0), (11.0, 8.5)):
        a, b = plus(elbow_b, (0, offset, 0)), plus(arm.wrist, (0, offset, 0))
        sketch.add("cortical_bone", Capsule(a, b, r, r), over=SOFT)
        sketch.add("yellow_marrow", Capsule(between(a, b, 0.1), between(a, b, 0.9), 3.5, 3.5), over=over)
    sketch.add_all("rib", _hand_bones(arm), over=SOFT)


def _hand_bones(arm: Arm) -> list[Capsule]:
    palm = between(arm.wrist, arm.finger, 0.5)
    return [Capsule(arm.wrist, (palm[0], palm[1] + o, palm[2]), 9, 4) for o in (-17, -6, 6, 17)] + [
        Capsule((palm[0], palm[1] + o, palm[2]), (arm.finger[0], arm.finger[1] + o * 0.7, arm.finger[2]), 5, 4)
        for o in (-15, -5, 5, 15)
    ]


def draw_legs(sketch: Sketch) -> None:
    """Everything under the muscle of both legs."""
    for _, sign in SIDES:
        _draw_leg_soft(sketch, sign)
        _draw_leg_bones(sketch, sign)


def _draw_leg_soft(sketch: Sketch, s: float) -> None:
    groups = (  # adductors, vastus intermedius about the femur, soleus
        chain([(s * 52, 18, -330), (s * 62, 22, -480), (s * 74, 14, -620)], [24, 24, 9]),
        chain([(s * 108, -12, -380), (s * 98, -14, -640)], [24, 20]),
        chain([(s * 80, 34, -790), (s * 80, 38, -870), (s * 77, 34, -990)], [20, 26, 9]),
    )
    for group in groups:
        sketch.add_all("postural_muscle", group, over=MUSCLE)
    sketch.add("synovium", Ellipsoid((s * 88, -2, -262), (31, 31, 31)), over=("muscle", "fat"))
    sketch.add("synovium", Ellipsoid((s * 82, -8, -720), (42, 37, 24)), over=("muscle", "fat", "postural_muscle"))
    trees: tuple[tuple[list[Point], list[float]], ...] = (  # artery, vein, deep branch, to the ankle
        ([(s * 70, -68, -270), (s * 74, -48, -450), (s * 76, 30, -700), (s * 84, 30, -900)], [7, 6, 6, 4]),
        ([(s * 60, -62, -270), (s * 66, -34, -450), (s * 84, 38, -700), (s * 78, 36, -900)], [8, 7, 7, 4]),
        ([(s * 76, -58, -300), (s * 92, 26, -460), (s * 96, 30, -600)], [6, 5, 4]),
        ([(s * 80, 32, -900), (s * 72, 34, -1070)], [5, 4]),
    )
    for points, radii in trees:
        sketch.add_all("blood", chain(points, radii), over=SOFT)


def _draw_leg_bones(sketch: Sketch, s: float) -> None:
    over = (*SOFT, "cortical_bone", "visceral_fat")
    head, neck, trochanter = (s * 88, -2, -262), (s * 108, 2, -280), (s * 126, 8, -300)
    knee, tibia_top, ankle = (s * 82, 6, -708), (s * 81, 8, -752), (s * 76, 14, -1078)
    shaft = (s * 112, 4, -380)
    condyles = [(s * 82 + o, 10, -712) for o in (-18, 18)]
    sketch.add("cortical_bone", Ellipsoid(head, (24, 24, 24)), over=over)
    sketch.add_all("cortical_bone", chain([head, neck, trochanter], [18, 16, 22]), over=over)
    sketch.add_all("cortical_bone", chain([trochanter, shaft, knee], [20, 14.5, 17]), over=over)
    sketch.add_all("cortical_bone", [Ellipsoid(c, (20, 26, 24)) for c in condyles], over=over)
    sketch.add("spongy_bone", Ellipsoid(head, (20.5, 20.5, 20.5)), over=over)
    sketch.add_all("spongy_bone", chain([neck, trochanter], [12, 17]), over=over)
    sketch.add_all("spongy_bone", [Ellipsoid(c, (16.5, 22, 20)) for c in condyles], over=over)
    sketch.add_all("yellow_marrow", chain([trochanter, shaft, knee], [8, 7.5, 9]), over=over)
    metaphysis: list[Point] = [neck, (s * 121, 6, -318), (s * 113, 4, -375), (s * 107, 4, -455)]
    sketch.add_all(
        "red_marrow", chain(metaphysis, [12, 14, 9.5, 7]), over=("cortical_bone", "spongy_bone", "yellow_marrow")
    )
    sketch.add("rib", Ellipsoid((s * 82, -42, -712), (19, 9, 21)), over=over)
    tibia: list[Point] = [tibia_top, (s * 80, 0, -830), ankle]
    sketch.add_all("cortical_bone", chain(tibia, [30, 14, 16]), over=over)
    sketch.add("spongy_bone", Capsule(tibia_top, (s * 81, 4, -790), 25, 16), over=over)
    sketch.add_all("yellow_marrow", chain([(s * 81, 3, -795), (s * 80, 0, -830), ankle], [12, 7.5, 9]), over=over)
    sketch.add("cortical_bone", Capsule((s * 108, 22, -770), (s * 100, 22, -1090), 7, 7), over=over)
    sketch.add("cortical_bone", Capsule((s * 77, 30, -1098), (s * 82, -40, -1096), 22, 16), over=over)
    sketch.add("spongy_bone", Capsule((s * 77, 30, -1098), (s * 82, -40, -1096), 18, 12), over=over)
    toes = [Capsule((s * (72 + 9 * i), -45, -1098), (s * (76 + 11 * i), -150, -1110), 7, 5) for i in range(4)]
    sketch.add_all("rib", toes, over=over)
