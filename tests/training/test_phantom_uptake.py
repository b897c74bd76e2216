"""What of a phantom's uptake can be told from its CT, and how big its organs are."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pipeline.types import District
from training.phantom import PhantomSpec, make_phantom
from training.phantom.paint import draw_anatomy, draw_strokes, paint_labels, scan_grid
from training.phantom.sketch import Person
from training.phantom.tissues import FATTY, LABEL, NAMES, TISSUES, expected_suv, lean_factor

# Adult male, ICRP Publication 89, grams (from memory); 1.76 m and 73 kg.
REFERENCE_G = {
    ("liver",): 1800,
    ("kidney",): 310,
    ("spleen",): 150,
    ("pancreas",): 140,
    ("lung", "lung_vessel"): 1200,
    ("grey_matter", "white_matter", "cerebellum", "basal_ganglia"): 1450,
}
PLAIN_HU = np.array([t.hu for t in TISSUES.values()], np.float32)


@pytest.fixture(scope="module")
def reference_mass_g() -> dict[str, float]:
    person = Person(
        scale=(1, 1, 1),
        fat_mm=15,
        female=False,
        pose="sides",
        arm_gap_mm=10,
        organ_scale=0,
        organ_shift_mm=0,
    )
    strokes = draw_strokes(person, np.random.default_rng(0)).strokes
    side = np.arange(-320, 320, 4, dtype=np.float32)
    z = np.arange(-1140, 640, 4, dtype=np.float32)
    labels, _ = paint_labels(strokes, (side[None, None, :], side[None, :, None], z[:, None, None]))
    ml = np.bincount(labels.ravel(), minlength=len(NAMES)) * 4**3 / 1000
    return {name: float(ml[LABEL[name]]) * tissue.density for name, tissue in TISSUES.items()}


@pytest.mark.parametrize("names", REFERENCE_G, ids=lambda names: names[0])
def test_an_organ_weighs_what_the_reference_persons_does(
    names: tuple[str, ...], reference_mass_g: dict[str, float]
) -> None:
    assert sum(reference_mass_g[name] for name in names) == pytest.approx(REFERENCE_G[names], rel=0.1)


def test_the_reference_person_weighs_73_kg_of_which_a_quarter_is_fat(reference_mass_g: dict[str, float]) -> None:
    total = sum(reference_mass_g.values())
    assert total == pytest.approx(73_000, rel=0.05)
    assert sum(reference_mass_g[name] for name in FATTY) / total == pytest.approx(0.27, abs=0.04)


def test_fat_thickens_every_district() -> None:
    thin, fat = (
        make_phantom(
            PhantomSpec(
                seed=3,
                spacing_mm=(12.0, 6.0, 6.0),
                coverage=(0.0, 1.02),
                pose="sides",
                height_mm=1750,
                fat_mm=mm,
                fov_mm=620,
            )
        )
        for mm in (8.0, 50.0)
    )
    assert fat.fat_fraction > thin.fat_fraction + 0.15
    for district in District:
        share = [
            (p.organ("fat") & (p.districts == district)).sum() / (p.districts == district).sum() for p in (thin, fat)
        ]
        assert share[1] > share[0] + 0.05, district.key


def test_body_composition_conserves_the_injected_activity() -> None:
    """Whatever the fat fraction, lean and fat tissue together hold the same activity per body weight."""
    for fraction in (0.1, 0.28, 0.5):
        lean = lean_factor(fraction)
        held = lean * ((1 - fraction) + 0.3 * fraction)
        assert held == pytest.approx(lean_factor(0.28) * (1 - 0.7 * 0.28))
    assert lean_factor(0.28) == pytest.approx(1)
    assert lean_factor(0.5) > 1.2 > 1 > lean_factor(0.15)


def test_uptake_follows_body_fat_lung_density_fat_in_muscle_and_a_full_bladder() -> None:
    usual = expected_suv(0.28, PLAIN_HU, 0.9)
    fatter = expected_suv(0.45, PLAIN_HU, 0.9)
    for name in ("liver", "muscle", "fat", "blood", "grey_matter"):
        assert fatter[LABEL[name]] / usual[LABEL[name]] == pytest.approx(lean_factor(0.45), rel=1e-5)
    assert fatter[LABEL["bladder"]] == usual[LABEL["bladder"]]  # excreted
    other = PLAIN_HU.copy()
    other[LABEL["lung"]], other[LABEL["muscle"]] = -850, 30
    changed = expected_suv(0.28, other, 1.1)
    assert changed[LABEL["lung"]] == pytest.approx(0.75 * usual[LABEL["lung"]])
    assert 0.85 < changed[LABEL["muscle"]] / usual[LABEL["muscle"]] < 0.97
    assert changed[LABEL["bladder"]] < 0.8 * usual[LABEL["bladder"]]


@pytest.mark.parametrize(
    ("cold", "hot", "districts"),
    [("muscle", "postural_muscle", (3, 4)), ("muscle", "blood", (3, 4)), ("spongy_bone", "red_marrow", (3, 4))],
)
def test_limbs_hold_tissues_that_only_pet_tells_apart(cold: str, hot: str, districts: tuple[int, ...]) -> None:
    spec = PhantomSpec(seed=9, spacing_mm=(8.0, 4.0, 4.0), coverage=(0.0, 1.02), pose="sides", contrast=False)
    phantom = make_phantom(replace(spec, noise=False))
    anatomy = draw_anatomy(spec)
    for district in districts:
        where = [phantom.organ(name) & (phantom.districts == district) for name in (cold, hot)]
        assert min(mask.sum() for mask in where) > 30
    assert abs(TISSUES[cold].hu - TISSUES[hot].hu) < 20
    assert anatomy.suv[LABEL[hot]] > 1.3 * anatomy.suv[LABEL[cold]]


def test_what_the_ct_tells_is_most_of_the_spread_of_lean_tissue_between_persons() -> None:
    people = [draw_anatomy(PhantomSpec(seed=seed)) for seed in range(16)]
    label = LABEL["muscle"]
    expected = np.array([p.expected_suv[label] for p in people])
    true = np.array([p.suv[label] for p in people])
    assert np.std(true - expected) < 0.7 * np.std(true)
    assert 0.07 < np.std(true) / np.mean(true) < 0.25


@pytest.mark.parametrize("spacing", [(8.0, 4.0, 4.0), (8.0, 8.0, 8.0)])
def test_noise_in_the_liver_is_that_of_a_modern_scanner_on_any_grid(spacing: tuple[float, float, float]) -> None:
    spec = PhantomSpec(seed=4, spacing_mm=spacing, coverage=(0.5, 0.8), pose="raised")
    noisy, plain = make_phantom(spec), make_phantom(replace(spec, noise=False))
    liver = noisy.organ("liver") & (plain.suv > 0.98 * np.median(plain.suv[noisy.organ("liver")]))
    grain = noisy.suv[liver] / plain.suv[liver] - 1
    assert 0.015 < grain.std() < 0.06
    assert grain.std() == pytest.approx(draw_anatomy(spec).pet_noise, rel=0.15)


def test_noise_is_grainy_as_a_reconstruction_leaves_it() -> None:
    spec = PhantomSpec(seed=4, spacing_mm=(8.0, 3.0, 3.0), coverage=(0.6, 0.75), pose="raised")
    noisy, plain = make_phantom(spec), make_phantom(replace(spec, noise=False))
    grain = np.where(noisy.body, noisy.suv - plain.suv, 0)
    beside = np.corrcoef(grain[..., 1:].ravel(), grain[..., :-1].ravel())[0, 1]
    far = np.corrcoef(grain[..., 6:].ravel(), grain[..., :-6].ravel())[0, 1]
    assert beside > 0.3
    assert abs(far) < 0.1


def test_another_day_keeps_the_anatomy_and_changes_the_rest() -> None:
    spec = PhantomSpec(seed=6, spacing_mm=(12.0, 8.0, 8.0), coverage=(0.4, 0.9), lesions=4)
    one, two = draw_anatomy(spec), draw_anatomy(replace(spec, visit=1))
    assert one.person == two.person
    assert (one.weight_kg, one.fat_fraction) == (two.weight_kg, two.fat_fraction)
    assert not np.array_equal(one.suv, two.suv)
    assert [s.shape.centre for s in one.sites] != [s.shape.centre for s in two.sites]
    assert scan_grid(one, spec)[0].origin_mm != scan_grid(two, spec)[0].origin_mm
    with pytest.raises(ValueError, match="visit -1"):
        PhantomSpec(visit=-1)


def test_lesions_grow_where_the_disease_likes_to() -> None:
    def organs(disease: str) -> list[str]:
        spec = PhantomSpec(seed=12, lesions=60, coverage=(0.0, 1.02), disease=disease)  # type: ignore[arg-type]
        return [site.organ for site in draw_anatomy(spec).sites]

    share = {d: organs(d) for d in ("lymphoma", "lung_cancer", "melanoma")}
    assert share["lung_cancer"].count("lung") > 3 * max(share["lymphoma"].count("lung"), 1)
    assert share["lymphoma"].count("visceral_fat") > share["lung_cancer"].count("visceral_fat")
    assert share["melanoma"].count("fat") > share["lung_cancer"].count("fat")
    assert "muscle" not in share["lymphoma"]
