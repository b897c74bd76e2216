from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import label as components

from pipeline.types import District
from training.phantom import Phantom, PhantomSpec, make_phantom

COARSE = (12.0, 8.0, 8.0)


def scan(**changes: object) -> Phantom:
    return make_phantom(PhantomSpec(**{"seed": 3, "spacing_mm": COARSE, "coverage": (0.0, 1.02), **changes}))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def whole() -> Phantom:
    return scan(pose="sides", fat_mm=15, height_mm=1750)


def test_districts_partition_the_body(whole: Phantom) -> None:
    assert set(np.unique(whole.districts)) == {0, 1, 2, 3, 4}
    painted = whole.organs > 0
    assert not (painted & (whole.districts == 0)).any()  # every painted voxel has a district
    assert not (~painted & whole.body).any()  # and no district lies in empty air
    assert whole.hu[whole.body].mean() > -250
    assert whole.hu[whole.districts == 0].mean() < -850


def test_districts_lie_where_they_should(whole: Phantom) -> None:
    centre = {d: np.argwhere(whole.districts == d).mean(axis=0) for d in District}
    assert centre[District.HEAD][0] > centre[District.TRUNK][0] > centre[District.LEGS][0]
    arms = np.argwhere(whole.districts == District.ARMS)[:, 2]
    middle = whole.grid.shape[2] / 2
    assert (arms < middle).mean() == pytest.approx(0.5, abs=0.15)


def test_left_is_left(whole: Phantom) -> None:
    """LPS: x grows to the patient's left. Liver right, spleen, stomach and heart left."""
    middle = np.argwhere(whole.districts == District.TRUNK)[:, 2].mean()
    mean_x = {o: np.argwhere(whole.organ(o))[:, 2].mean() for o in ("liver", "spleen", "stomach", "myocardium")}
    assert mean_x["liver"] < middle < min(mean_x["spleen"], mean_x["stomach"], mean_x["myocardium"])
    spine, bladder = (np.argwhere(whole.organ(o))[:, 1].mean() for o in ("spinal_cord", "bladder"))
    assert spine > bladder  # y grows to the back


def test_uptake_is_hot_in_brain_and_bladder_and_cold_in_lungs(whole: Phantom) -> None:
    mean = {o: whole.suv[whole.organ(o)].mean() for o in ("grey_matter", "liver", "lung", "muscle", "fat")}
    assert mean["grey_matter"] > 4
    assert mean["grey_matter"] > mean["liver"] > mean["muscle"] > mean["fat"]
    assert mean["lung"] < 1
    assert whole.suv[whole.organ("bladder")].max() > 4


def test_weight_is_a_persons(whole: Phantom) -> None:
    assert 50 < whole.weight_kg < 110
    fatter = scan(pose="sides", fat_mm=45, height_mm=1750)
    assert fatter.weight_kg > whole.weight_kg + 10


def test_a_seed_gives_the_same_phantom_twice() -> None:
    a, b, other = scan(lesions=3), scan(lesions=3), scan(lesions=3, seed=4)
    assert np.array_equal(a.hu, b.hu)
    assert np.array_equal(a.suv, b.suv)
    assert np.array_equal(a.lesions, b.lesions)
    assert a.grid == b.grid
    assert other.grid.frame_of_reference_uid != a.grid.frame_of_reference_uid


def test_one_person_can_be_painted_on_any_grid() -> None:
    coarse = scan(pose="sides", lesions=4, seed=8)
    fine = scan(pose="sides", lesions=4, seed=8, spacing_mm=(8.0, 4.0, 4.0))
    assert fine.weight_kg == coarse.weight_kg
    assert [lesion.centre_mm for lesion in fine.lesion_list][:2] == [c.centre_mm for c in coarse.lesion_list][:2]
    for district in District:
        volumes = [(p.districts == district).sum() * p.grid.voxel_ml for p in (coarse, fine)]
        assert volumes[0] == pytest.approx(volumes[1], rel=0.06)


def test_lesions_or_noise_do_not_change_the_anatomy() -> None:
    plain, changed = scan(lesions=0), scan(lesions=5, noise=False)
    assert np.array_equal(plain.districts, changed.districts)
    assert np.array_equal(plain.organs, changed.organs)


@pytest.mark.parametrize("pose", ["raised", "sides", "touching", "folded"])
def test_each_pose_puts_the_arms_where_it_says(pose: str) -> None:
    phantom = scan(pose=pose, coverage=(0.0, 1.2), fat_mm=12, seed=5, spacing_mm=(8.0, 4.0, 4.0), fov_mm=620)
    arms, head, trunk = (np.argwhere(phantom.districts == d) for d in (3, 1, 2))
    if pose == "raised":
        assert arms[:, 0].max() > head[:, 0].max()
    else:
        assert arms[:, 0].max() < head[:, 0].max()
    if pose == "folded":  # a forearm lies in front of the belly
        front = arms[(np.abs(arms[:, 2] - phantom.grid.shape[2] / 2) < 10)]
        assert front.size > 0
        assert front[:, 1].max() < trunk[:, 1].mean()
    if pose in ("sides", "touching"):
        belly = int(np.quantile(trunk[:, 0], 0.3))
        pieces = components(phantom.body[belly])[1]
        assert pieces == (3 if pose == "sides" else 1)


def test_coverage_is_what_is_scanned() -> None:
    chest = scan(coverage=(0.55, 0.75), height_mm=1800)
    assert chest.grid.extent_mm[0] == pytest.approx(0.2 * 1800, abs=COARSE[0])
    assert set(np.unique(chest.districts)) <= {0, District.TRUNK, District.ARMS}
    legs = scan(coverage=(0.0, 0.3), pose="raised")
    assert set(np.unique(legs.districts)) == {0, District.LEGS}


def test_seen_lesions_differ_on_ct_and_unseen_ones_do_not() -> None:
    found: dict[bool, list[float]] = {True: [], False: []}
    for seed in range(2):
        spec = {"seed": seed, "noise": False, "spacing_mm": (6.0, 5.0, 5.0), "pose": "raised", "blanket": False}
        sick, well = scan(**spec, lesions=20), scan(**spec, lesions=0)
        for lesion in sick.lesion_list:
            inside = sick.lesions == lesion.label
            if inside.sum() >= 10:
                found[lesion.visible_on_ct].append(float(np.abs(sick.hu[inside] - well.hu[inside]).mean()))
                assert sick.suv[inside].max() > 1.5
    assert min(found[True]) > 3
    assert max(found[False], default=0.0) < 3


def test_table_and_blanket_are_no_part_of_the_body() -> None:
    bare, lying = scan(table=False, blanket=False), scan(table=True, blanket=True)
    assert np.array_equal(bare.districts, lying.districts)
    assert (bare.hu[bare.districts == 0] > -500).mean() < 0.001
    assert (lying.hu[lying.districts == 0] > -500).mean() > 0.001


def test_a_spec_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="pose 'standing'"):
        PhantomSpec(pose="standing")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="coverage"):
        PhantomSpec(coverage=(0.5, 0.5))
