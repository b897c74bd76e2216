"""The skeleton of the trunk and the organs of chest, abdomen and pelvis, in reference millimetres."""

from __future__ import annotations

import numpy as np

from training.phantom.body import TRUNK
from training.phantom.shapes import Capsule, Coords, Ellipsoid, Mask, Point, Predicate, Profile, Where, Within, chain
from training.phantom.sketch import SIDES, Sketch, between, plus

RIB_PITCH_MM = 26.0
FAT = ("visceral_fat",)
BELLY = ("visceral_fat", "muscle", "postural_muscle", "lung")
CAVITY_KNOTS = slice(1, 12)


def cavity() -> Profile:
    """The inside of the wall of chest and abdomen; its back lies on the ribs and the back muscles."""
    z, a, b, c = (list(row)[CAVITY_KNOTS] for row in (TRUNK.z, TRUNK.half_x, TRUNK.half_y, TRUNK.centre_y or ()))
    wall = [34, 34, 26, 20, 18, 20, 22, 22, 24, 38, 66]
    depth = [24, 22, 20, 20, 20, 20, 20, 20, 20, 20, 26]
    half_x = [v - w for v, w in zip(a, wall, strict=True)]
    half_y = [v - d for v, d in zip(b, depth, strict=True)]
    centre_y = [v - 6.0 if zz < 30 else v for v, zz in zip(c, z, strict=True)]
    return Profile(z, half_x, half_y, None, centre_y, 2.3)


def spine_y(z: float) -> float:
    """Where the vertebral bodies lie from front to back: lordosis in loin and neck, kyphosis in the chest."""
    return float(np.interp(z, [-250, -190, -110, 0, 120, 220, 320, 380, 460], [66, 52, 36, 44, 56, 57, 44, 30, 34]))


def draw_walls(sketch: Sketch) -> None:
    """Cavity fat, ribs, sternum, shoulder girdle."""
    inside = cavity()
    sketch.add("visceral_fat", inside, over=["muscle", "fat"])
    for _, s in SIDES:  # back muscles beside the spine, buttocks behind the hip bones
        erector = chain([(s * 34, 82, -230), (s * 32, 68, -60), (s * 26, 82, 110)], [22, 24, 12])
        sketch.add_all("postural_muscle", erector, over=(*FAT, "muscle"))
        sketch.add("muscle", Ellipsoid((s * 98, 62, -245), (56, 44, 66)), over=FAT)
    sketch.add("muscle", Within(inside, z=(-np.inf, -288.0)), over=FAT)  # pelvic floor
    outer, inner = inside.grown(9.0), inside.grown(1.5)

    def on_a_rib(x: Coords, y: Coords, z: Coords) -> Mask:
        phase = np.mod(z - 0.55 * y + 4.0, np.float32(RIB_PITCH_MM))
        lower_edge = 20 - 0.0045 * np.minimum(np.abs(x), 130) ** 2 + 0.35 * y  # the arch below the sternum
        rib: Mask = (
            (phase < 12) & (z > 48 + 0.45 * y) & (z > lower_edge + 60 * (y < -40)) & (z < 318) & (np.abs(x) > 14)
        )
        return rib

    def shell(predicate: Predicate) -> Where:
        return Where(outer, lambda x, y, z: predicate(x, y, z) & ~inner.inside(x, y, z))

    def in_front(x: Coords, y: Coords, z: Coords) -> Mask:
        return on_a_rib(x, y, z) & (np.abs(x) < 62) & (y < 0)

    sketch.add("rib", shell(on_a_rib), over=["muscle", "postural_muscle", "fat", "visceral_fat"])
    sketch.add("cartilage", shell(in_front), over=["rib"])
    front = TRUNK.front(200) + 14
    for structure, grow in (("cortical_bone", 0.0), ("red_marrow", -3.5)):
        plate = Ellipsoid((0, front + 2, 210), (20 + grow, 7 + grow, 82 + grow), (-6, 0, 0))
        sketch.add(structure, plate, over=None)
    soft = ("muscle", "postural_muscle", "fat", "visceral_fat")
    for _, s in SIDES:
        blade = Ellipsoid((s * 92, 74, 225), (46, 6, 72), (0, s * 14, -s * 28))
        sketch.add("rib", blade, over=soft)
        sketch.add_all("cortical_bone", chain([(s * 70, 68, 285), (s * 146, 24, 312)], [6, 9]), over=soft)
        collar: list[Point] = [(s * 14, -44, 306), (s * 70, -46, 322), (s * 148, 0, 326)]
        sketch.add_all("cortical_bone", chain(collar, [9, 7, 8]), over=soft)


def draw_spine_and_pelvis(sketch: Sketch) -> None:
    """Vertebrae with discs, canal and arches from C2 to the sacrum; hip bones."""
    z, top = -168.0, 462.0
    over = None
    while z < top:
        pitch = float(np.interp(z, [-170, 100, 330, 460], [37, 28, 21, 17]))
        rx, ry = np.interp(z, [-170, 100, 330, 460], [26, 18, 13, 11]), np.interp(z, [-170, 460], [19, 10])
        y, half = spine_y(z), pitch / 2
        sketch.add("disc", Ellipsoid((0, y, z - half), (rx * 0.95, ry * 0.95, 5), power=3), over=over)
        sketch.add("cortical_bone", Ellipsoid((0, y, z), (rx, ry, half - 1.5), power=4), over=over)
        sketch.add("red_marrow", Ellipsoid((0, y, z), (rx - 3, ry - 3, half - 4), power=4), over=over)
        back = y + ry
        sketch.add("cortical_bone", Capsule((0, back + 14, z), (0, back + 23, z - 0.6 * half), 5, 4), over=over)
        for s in (-1.0, 1.0):
            sketch.add("cortical_bone", Capsule((s * 12, back + 3, z), (0, back + 18, z), 4.5, 4.5), over=over)
            sketch.add("cortical_bone", Capsule((s * 10, back + 8, z), (s * (rx + 14), back + 10, z), 4, 4), over=over)
        canal = Capsule((0, back + 8, z - half), (0, spine_y(z + half) + ry + 8, z + half), 8, 8)
        sketch.add("csf", canal, over=over)
        if z > -60:
            sketch.add("spinal_cord", Capsule(canal.start, canal.end, 5, 5), over=over)
        z += pitch
    for structure, grow in (("cortical_bone", 0.0), ("red_marrow", -4.0)):
        sketch.add(structure, Ellipsoid((0, 68, -222), (52 + grow, 17 + grow, 48 + grow), (-22, 0, 0)), over=over)
        sketch.add_all(structure, chain([(0, 80, -260), (0, 70, -300)], [10 + grow * 0.7, 6 + grow * 0.7]), over=over)
        for _, s in SIDES:
            wing = Ellipsoid((s * 96, 22, -192), (12 + grow * 0.8, 66 + grow, 62 + grow), (0, s * 24, -s * 32))
            sketch.add(structure, wing, over=over)
            cup = Ellipsoid((s * 84, 2, -258), (34 + grow, 33 + grow, 33 + grow))
            sketch.add(structure, Within(cup, x=(-96.0, 96.0)), over=over)
            pubis: list[Point] = [(s * 74, -28, -262), (s * 14, -58, -292)]
            sketch.add_all(structure, chain(pubis, [13 + grow, 12 + grow]), over=over)
            sketch.add_all(
                structure, chain([(s * 14, -56, -296), (s * 52, 8, -330)], [10 + grow, 13 + grow]), over=over
            )
            sketch.add_all(
                structure, chain([(s * 52, 12, -328), (s * 84, 24, -266)], [17 + grow, 17 + grow]), over=over
            )


def draw_chest(sketch: Sketch) -> None:
    """Lungs with vessels, airways, heart and great vessels, oesophagus."""
    rng = sketch.rng
    chest = ("visceral_fat",)
    lung_size = 1 + 0.06 * float(rng.uniform(-1, 1))
    for _, s in SIDES:
        centre: Point = (s * 76, 8.0, 62.0)
        lobe = Ellipsoid(centre, (64 * lung_size, 92, 256 * lung_size), power=2.9)
        sketch.add("lung", Within(lobe, z=(10.0, np.inf)), over=chest)
        hilum: Point = (s * 26, 12.0, 178.0)
        for _ in range(16):
            direction = rng.normal(0, 1, 3) * (0.7, 1.0, 1.6) + (s * 0.9, 0, -0.25)
            direction /= np.linalg.norm(direction)
            length = float(rng.uniform(60, 130))
            end = plus(hilum, tuple(float(v) for v in direction * length))  # type: ignore[arg-type]
            sketch.add("lung_vessel", Capsule(hilum, end, 6.5, 1.8), over=["lung"])
    dx, dy, dz = sketch.shift(0.8)
    heart: Point = (16 + dx, -22 + dy, 108 + dz)
    size = sketch.size()
    sac = Ellipsoid(heart, (54 * size, 46 * size, 64 * size), (0, 28, -20))
    sketch.add("blood", sac, over=("lung", *chest))
    hot = "myocardium"
    left: Point = plus(heart, (24, 2, -10))
    sketch.add(hot, Ellipsoid(left, (33 * size, 31 * size, 46 * size), (0, 38, -20)), over=("blood", "lung", *chest))
    sketch.add("blood", Ellipsoid(plus(left, (-2, 1, 5)), (21 * size, 20 * size, 36 * size), (0, 38, -20)), over=[hot])
    aorta: list[Point] = [plus(heart, (0, 2, 30)), (-16, -20, 215), (-4, 0, 240), (14, 26, 232)]
    sketch.add_all("blood", chain(aorta, [16, 16, 14, 13]), over=("lung", *chest))
    down: list[Point] = [(14, 26, 232), (20, 38, 120), (12, 20, 0), (4, 8, -120)]
    sketch.add_all("blood", chain(down, [13, 12, 11, 9]), over=("lung", *chest, "muscle"))
    cava: list[Point] = [(-26, -8, 300), (-30, -6, 190), (-28, 0, 80), (-20, 12, 0), (-16, 14, -120)]
    sketch.add_all("blood", chain(cava, [9, 10, 11, 11, 10]), over=("lung", *chest, "muscle"))
    for _, s in SIDES:
        sketch.add_all("blood", chain([(0, 8, -120), (s * 62, -20, -220), (s * 70, -66, -280)], [9, 8, 7]), over=None)
        sketch.add_all("blood", chain([(s * 6, -2, 235), (s * 22, -4, 320), (s * 30, 0, 430)], [7, 5, 4]), over=None)
        sketch.add("blood", Capsule((0, 0, 190), (s * 46, 12, 182), 12, 8), over=("lung", *chest))
    sketch.add_all("muscle", chain([(4, 24, 400), (4, 28, 200), (14, 12, 60)], [7, 7, 8]), over=("lung", *chest))
    fork: Point = (0.0, 10.0, 206.0)
    sketch.add_all("airway", chain([(0, -8, 420), (0, -4, 330), fork], [9, 9, 9]), over=None)
    for _, s in SIDES:
        sketch.add_all("airway", chain([fork, (s * 32, 16, 176), (s * 52, 20, 150)], [7, 6, 4]), over=None)


def draw_abdomen(sketch: Sketch) -> None:
    """Liver, gallbladder, spleen, stomach, pancreas, adrenals, kidneys, bowel, psoas, pelvic organs."""
    rng = sketch.rng
    dome = cavity().grown(-1.0)
    _within: Predicate = dome.inside
    for _, s in SIDES:  # diaphragm and the fat under it
        sketch.add("visceral_fat", Where(Ellipsoid((s * 68, 0, 8), (74, 86, 62 if s < 0 else 54)), _within), over=BELLY)
        sketch.add_all(
            "muscle", chain([(s * 34, 40, -20), (s * 52, 40, -110), (s * 72, 0, -250)], [14, 24, 18]), over=BELLY
        )
    dx, dy, dz = sketch.shift(0.8)
    size = sketch.size()
    tilt = float(rng.uniform(0.45, 0.65))
    lobe = Ellipsoid((-52 + dx, -8 + dy, 18 + dz), (97 * size, 80 * size, 77 * size), power=2.2)
    liver = Where(lobe, lambda x, y, z: _within(x, y, z) & (z > -92 + dz + tilt * (x + 125)) & (x - 0.35 * y < 62))
    sketch.add("liver", liver, over=(*BELLY, "blood"))
    sketch.add_all("blood", chain([(-20, -4, -10), (-50, -8, 20), (-85, -5, 35)], [7, 6, 4]), over=["liver"])
    sketch.add("gallbladder", sketch.organ((-58, -58, -32), (20, 19, 36)), over=(*BELLY, "liver"))
    sketch.add("spleen", Where(sketch.organ((96, 38, 22), (30, 42, 56), (12, -14, 0)), _within), over=BELLY)
    dx, dy, dz = sketch.shift(0.6)
    pancreas: list[Point] = [
        (-36 + dx, -16 + dy, -50 + dz),
        (-4 + dx, -20 + dy, -30 + dz),
        (34 + dx, -4, -20),
        (78, 20, 4),
    ]
    sketch.add_all("pancreas", chain(pancreas, [21, 16.5, 15.5, 14]), over=(*BELLY, "liver"))
    stomach = sketch.organ((58, -38, 6), (42, 34, 66), (0, 24, 0))
    r = stomach.radii
    sketch.add("stomach", Where(stomach, _within), over=BELLY)
    content = Ellipsoid(stomach.centre, (r[0] - 7, r[1] - 7, r[2] - 7), stomach.angles_deg)
    sketch.add("stomach_content", Where(content, _within), over=["stomach"])
    air_line = stomach.centre[1] - float(rng.uniform(2, 20))
    sketch.add("gas", Where(content, lambda x, y, z: _within(x, y, z) & (y < air_line)), over=["stomach_content"])
    _draw_kidneys(sketch)
    _draw_bowel(sketch)
    _draw_pelvis_organs(sketch)


def _draw_kidneys(sketch: Sketch) -> None:
    for _, s in SIDES:
        shift = sketch.shift(0.8)
        centre = plus((s * 60, 38, -46 if s < 0 else -32), shift)
        size = sketch.size()
        kidney = Ellipsoid(centre, (27.5 * size, 24.5 * size, 55 * size), (8, s * -10, s * 20))
        sketch.add("visceral_fat", Ellipsoid(centre, (35, 32, 62)), over=("muscle",))
        sketch.add("kidney", kidney, over=(*BELLY, "liver", "spleen"))
        pelvis = plus(centre, (-s * 10, -4, -2))
        sketch.add("urine", Ellipsoid(pelvis, (10 * size, 8 * size, 20 * size), (8, s * -10, s * 20)), over=None)
        ureter: list[Point] = [pelvis, (s * 42, 20, -120), (s * 48, 20, -215), (s * 18, 2, -262)]
        sketch.add_all("urine", chain(ureter, [4, 2.6, 2.6, 2.6]), over=("visceral_fat", "muscle"))
        sketch.add("adrenal", Ellipsoid(plus(centre, (-s * 12, -6, 58)), (7, 15, 17)), over=BELLY)


def _draw_bowel(sketch: Sketch) -> None:
    rng = sketch.rng
    inner = cavity().grown(-6.0)
    jitter = [float(v) for v in rng.uniform(-14, 14, 8)]
    over = ("visceral_fat",)
    frame: list[Point] = [
        (-92, 5, -195),
        (-98, 12, -130),
        (-94, 10, -70 + jitter[0]),
        (-60, -52, -85 + jitter[1]),
        (0, -66, -100 + jitter[2]),
        (60, -52, -75 + jitter[3]),
        (98, 14, -50),
        (102, 22, -130),
        (96, 18, -200),
        (50 + jitter[4], 10, -232),
        (10 + jitter[5], 30, -222),
        (4, 46, -265),
        (0, 42, -305),
    ]
    radii = [28, 25, 23, 21, 21, 20, 19, 17, 17, 16, 16, 20, 15]
    for rod in chain(frame, radii):
        sketch.add("colon", Where(rod, inner.inside), over=over)
        if rng.random() < 0.6:
            a, b = sorted(rng.uniform(0.1, 0.9, 2))
            r = min(rod.r_start, rod.r_end) * float(rng.uniform(0.35, 0.7))
            lift = (0.0, -0.3 * r, 0.0)
            ends = plus(between(rod.start, rod.end, a), lift), plus(between(rod.start, rod.end, b), lift)
            sketch.add("gas", Capsule(*ends, r, r), over=["colon"])
    for _ in range(26):
        start = rng.uniform((-70, -62, -215), (74, 6, -80))
        step = rng.normal(0, 1, 3) * (30, 12, 18)
        loop = Capsule(tuple(map(float, start)), tuple(map(float, start + step)), 12.5, 12.5)  # type: ignore[arg-type]
        sketch.add("bowel", Where(loop, inner.inside), over=over)
        if rng.random() < 0.35:
            sketch.add("gas", Ellipsoid(loop.start, (7, 6, 7)), over=["bowel"])


def _draw_pelvis_organs(sketch: Sketch) -> None:
    dx, _, dz = sketch.shift(0.6)
    fill = sketch.bladder_fill = float(sketch.rng.uniform(0.65, 1.15))
    bladder: Point = (dx, -26, -270 + 14 * fill + dz)
    radii: Point = (48 * fill, 36 * fill, 34 * fill)
    soft = ("visceral_fat", "muscle", "postural_muscle", "bowel", "colon", "gas", "fat")
    if sketch.person.female:
        sketch.add("prostate_uterus", Ellipsoid((dx, 18, -248), (26, 20, 34), (30, 0, 0)), over=soft)
        for _, s in SIDES:
            sketch.add("gonad", Ellipsoid((s * 44, 8, -236), (13, 11, 16)), over=soft)
    else:
        sketch.add("prostate_uterus", Ellipsoid((0, -4, -312), (22, 18, 17)), over=soft)
    sketch.add("bladder_wall", Ellipsoid(bladder, tuple(v + 3 for v in radii)), over=soft)  # type: ignore[arg-type]
    sketch.add("bladder", Ellipsoid(bladder, radii), over=(*soft, "bladder_wall"))
