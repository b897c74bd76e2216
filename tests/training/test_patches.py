"""Facts about training patches: where they lie, what repeats, what augmentation may and may not do."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pipeline.bundle import INPUT_CHANNELS
from pipeline.synthesis import network_input
from pipeline.types import District, DistrictMap
from training.patches.sampler import JITTER, MAX_CHOICES, Batch, PatchSampler, cube_sides, turn, voxel_rotation
from training.patches.volumes import LESION, DeviceVolumes, MappedVolumes, Placement
from training.prepared import PreparedStudy, StudyRecord
from training.recipe import AugmentRecipe, TrainRecipe

CPU = torch.device("cpu")
WINDOW = 16
PLAIN, PAPER = AugmentRecipe(), AugmentRecipe(rotation_deg=10, flips=True, ct_noise=0.01)
TURNED = PAPER.model_copy(update={"ct_noise": 0.0})
SHAPE = (48, 36, 40)


def make_study(
    name: str = "one",
    shape: tuple[int, int, int] = SHAPE,
    spacing_mm: tuple[float, float, float] = (4.0, 4.0, 4.0),
    **arrays: NDArray[Any],
) -> PreparedStudy:
    """A body of four stacked districts with a margin of air, noise for a CT and another for a PET, two lesions."""
    rng = np.random.default_rng(len(name))
    districts = np.zeros(shape, np.uint8)
    inner = districts[:, 3:-3, 3:-3]
    for label, layer in enumerate(np.array_split(np.arange(shape[0]), 4), start=1):
        inner[layer] = label
    lesions = np.zeros(shape, np.uint8)
    lesions[shape[0] // 3, shape[1] // 2, shape[2] // 2 : shape[2] // 2 + 2] = 1  # in the trunk
    volumes: dict[str, NDArray[Any]] = {
        "ct": rng.uniform(0.2, 0.9, shape).astype(np.float16),
        "pet": rng.uniform(0.1, 0.8, shape).astype(np.float16),
        "districts": districts,
        "lesions": lesions,
    }
    record = StudyRecord(
        id=name, patient="p", shape=shape, spacing_mm=spacing_mm, origin_mm=(0, 0, 0), files={}, segmenter="given"
    )
    return PreparedStudy(record=record, **(volumes | arrays))


def sampler(
    *studies: PreparedStudy, key: str = "trunk", mask: str = "body", augment: AugmentRecipe = PLAIN, **train: Any
) -> PatchSampler:
    numbers = TrainRecipe(batch=1, learning_rate=1e-3, discriminator_learning_rate=1e-3, **train)
    chosen = list(studies) or [make_study()]
    return PatchSampler(chosen, key, window=WINDOW, input_mask=mask, train=numbers, augment=augment, device=CPU)


def entropies(count: int, seed: int = 7) -> list[tuple[int, ...]]:
    return [(seed, 0, index) for index in range(count)]


def parts(batch: Batch) -> tuple[torch.Tensor, ...]:
    return batch.input, batch.pet, batch.weight


def ramp(shape: tuple[int, int, int] = SHAPE) -> NDArray[np.float16]:
    """A linear ramp from 0.1 to 0.9: trilinear interpolation leaves it linear."""
    total = sum(np.indices(shape) / np.array(shape)[:, None, None, None]) / 3
    return (0.1 + 0.8 * total).astype(np.float16)


def whole(shape: tuple[int, int, int] = SHAPE) -> NDArray[np.uint8]:
    return np.full(shape, District.TRUNK, np.uint8)


# --- what repeats


@pytest.mark.parametrize("augment", [PLAIN, PAPER])
def test_the_same_entropy_gives_the_same_batch_and_another_does_not(augment: AugmentRecipe) -> None:
    first, second = (sampler(augment=augment).draw(entropies(3)) for _ in range(2))
    other = sampler(augment=augment).draw(entropies(3, seed=8))
    for a, b in zip(parts(first), parts(second), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first.input, other.input)


@pytest.mark.parametrize("augment", [PLAIN, PAPER])
def test_a_batch_shared_out_among_processes_is_the_batch_of_one(augment: AugmentRecipe) -> None:
    patches, words = sampler(make_study(), make_study("second"), augment=augment, lesion_share=0.5), entropies(6)
    together = patches.draw(words)
    shares = patches.draw(words[1::2]), patches.draw(words[0::2])  # in another order too
    for whole_part, odd, even in zip(parts(together), parts(shares[0]), parts(shares[1]), strict=True):
        assert torch.equal(whole_part[1::2], odd)
        assert torch.equal(whole_part[0::2], even)


def test_augmentation_does_not_move_the_patches() -> None:
    words = entropies(5)
    noisy = sampler(augment=AugmentRecipe(ct_noise=0.05)).draw(words)
    assert torch.equal(sampler().draw(words).pet, noisy.pet)


def test_buffers_on_a_device_give_the_voxels_of_the_mapped_files() -> None:
    studies = [make_study(), make_study("second", (20, 50, 31))]
    places = [
        Placement(index % 2, start, flips, np.eye(3), 0)
        for index, (start, flips) in enumerate(
            [
                ((3, 4, 5), (False, False, False)),
                ((-9, 4, 20), (True, False, True)),
                ((40, 30, 33), (True, True, True)),
                ((-90, 10, 10), (False, True, False)),  # wholly beyond the volume
                ((10, 900, 10), (False, True, False)),
            ]
        )
    ]
    mapped = MappedVolumes(studies).cut(places, (20, 16, 18), WINDOW)
    device = DeviceVolumes(studies, CPU).cut(places, (20, 16, 18), WINDOW)
    assert torch.equal(mapped[0], device[0])
    assert torch.equal(mapped[1], device[1])
    assert mapped[0].any(dim=(1, 2, 3, 4)).tolist() == [True, True, True, False, False]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpu_draws_the_patches_of_the_cpu() -> None:
    gpu, numbers = torch.device("cuda"), TrainRecipe(batch=1, learning_rate=1e-3, discriminator_learning_rate=1e-3)
    drawn = [
        PatchSampler(
            [make_study()], "trunk", window=WINDOW, input_mask="channel", train=numbers, augment=TURNED, device=device
        ).draw(entropies(4))
        for device in (CPU, gpu, gpu)
    ]
    for cpu, first, again in zip(*(parts(batch) for batch in drawn), strict=True):
        assert first.device.type == "cuda"
        assert torch.equal(first, again)
        near = (first.cpu() - cpu).abs() < 1e-4
        assert near.float().mean() > 0.999  # a label halfway between two voxels may go either way


# --- where patches lie


@pytest.mark.parametrize("augment", [PLAIN, PAPER])
@pytest.mark.parametrize("key", [*(d.key for d in District), "whole_body"])
def test_every_patch_shows_its_district(key: str, augment: AugmentRecipe) -> None:
    batch = sampler(key=key, augment=augment, neighbor_weight=0.5).draw(entropies(40))
    assert ((batch.weight == 1).flatten(1).sum(dim=1) > 0).all()
    assert set(batch.weight.unique().tolist()) <= ({0.0, 1.0} if key == "whole_body" else {0.0, 0.5, 1.0})


def test_the_chosen_voxel_stays_within_reach_of_the_center_of_a_turned_patch() -> None:
    chosen = np.array([20, 18, 22])
    lonely = np.zeros(SHAPE, np.uint8)
    lonely[tuple(chosen)] = District.TRUNK
    patches = sampler(make_study(districts=lonely), augment=AugmentRecipe(rotation_deg=45, flips=True))
    furthest = 0.0
    for words in entropies(300):
        place = patches.place(words)
        offset = (chosen - place.start - (WINDOW - 1) / 2) * np.where(place.flips, -1, 1)
        furthest = max(furthest, np.abs(np.linalg.inv(place.matrix) @ offset[::-1]).max())
    reach = int(WINDOW * JITTER)
    assert reach < furthest < reach + math.sqrt(3)  # half a voxel each: the even window's middle, and rounding


def test_a_lesion_is_aimed_at_in_its_share_of_the_patches() -> None:
    lesion_only, none = sampler(lesion_share=1.0, lesion_weight=4.0), sampler(lesion_share=0.0)
    assert all((one.weight == 4).any() for one in (lesion_only.draw([words]) for words in entropies(30)))
    study = make_study()
    aimed = sampler(study, lesion_share=0.3)
    moved = sum(aimed.place(words).start != none.place(words).start for words in entropies(1000))
    assert 250 < moved < 350


def test_a_lesion_in_another_district_is_not_aimed_at() -> None:
    with_share, without = sampler(key="legs", lesion_share=1.0), sampler(key="legs")
    for words in entropies(20):
        assert with_share.place(words).start == without.place(words).start


def test_studies_are_drawn_alike_whatever_their_size() -> None:
    patches = sampler(make_study("small", (24, 24, 24)), make_study("large", (60, 60, 60)))
    small = sum(patches.place(words).study == 0 for words in entropies(1000))
    assert 430 < small < 570


def test_a_study_without_the_district_is_left_out_and_all_of_them_are_an_error() -> None:
    headless = make_study("headless")
    headless.districts[headless.districts == District.HEAD] = 0
    patches = sampler(headless, make_study(), key="head")
    assert len(patches) == 1
    with pytest.raises(ValueError, match="any voxel of head"):
        sampler(headless, key="head")


def test_the_choice_of_voxels_is_bounded_and_still_reaches_every_part() -> None:
    shape = (80, 70, 60)
    patches = sampler(make_study(shape=shape, districts=whole(shape)))
    (voxels,) = patches._voxels
    assert voxels.size == MAX_CHOICES
    assert np.unique(voxels).size == MAX_CHOICES
    per_slab = np.bincount(voxels // (10 * 70 * 60), minlength=8)
    assert per_slab.min() > 0.9 * MAX_CHOICES / 8


def test_at_the_volumes_border_a_patch_goes_on_as_air() -> None:
    corner = np.zeros(SHAPE, np.uint8)
    corner[0, 0, 0] = District.TRUNK
    study = make_study(districts=corner, ct=np.ones(SHAPE, np.float16), lesions=np.zeros(SHAPE, np.uint8))
    for words in entropies(20):
        batch = sampler(study, mask="channel").draw([words])
        z, y, x = sampler(study).place(words).start
        expected = torch.zeros(WINDOW, WINDOW, WINDOW)
        expected[max(-z, 0) :, max(-y, 0) :, max(-x, 0) :] = 1
        assert torch.equal(batch.input[0, 0], expected)
        assert batch.input[0, 1].sum() == 1
        assert batch.weight.sum() == 1


def test_a_volume_smaller_than_the_window_is_padded_with_air() -> None:
    shape = (6, 7, 5)
    batch = sampler(make_study(shape=shape, districts=whole(shape)), augment=PAPER).draw(entropies(3))
    assert batch.input.shape == (3, 1, WINDOW, WINDOW, WINDOW)
    assert (batch.weight > 0).any()
    assert not (batch.weight > 0).all()


def test_mapped_files_are_cut_and_not_changed(tmp_path: Path) -> None:
    study = make_study()
    arrays: dict[str, NDArray[Any]] = {}
    for name in ("ct", "pet", "districts", "lesions"):
        np.save(tmp_path / f"{name}.npy", getattr(study, name))
        arrays[name] = np.load(tmp_path / f"{name}.npy", mmap_mode="r")
    mapped = sampler(make_study(**arrays), augment=PAPER).draw(entropies(4))
    for a, b in zip(parts(mapped), parts(sampler(study, augment=PAPER).draw(entropies(4))), strict=True):
        assert torch.equal(a, b)


# --- channels and weights


@pytest.mark.parametrize("mask", sorted(INPUT_CHANNELS))
@pytest.mark.parametrize("key", ["trunk", "whole_body"])
def test_the_channels_are_those_that_the_input_mask_names(key: str, mask: str) -> None:
    study, words = make_study(), entropies(1, seed=3)
    patches = sampler(study, key=key, mask=mask)
    batch, start = patches.draw(words), patches.place(words[0]).start
    ct, pet, districts = (padded(v, start) for v in (study.ct, study.pet, study.districts))
    body = (districts > 0).astype(np.float32)
    own = body if key == "whole_body" else (districts == District.TRUNK).astype(np.float32)
    channels = {
        "body": [ct * body],
        "district": [ct * own],
        "channel": [ct, own],
        "districts": [ct * body, *(districts == d for d in District)],
    }[mask]
    assert batch.input.dtype == batch.pet.dtype == batch.weight.dtype == torch.float32
    assert batch.input.shape[1] == INPUT_CHANNELS[mask]
    np.testing.assert_array_equal(batch.input[0].numpy(), np.stack(channels))
    np.testing.assert_array_equal(batch.pet[0, 0].numpy(), pet * body)


@pytest.mark.parametrize("mask", sorted(INPUT_CHANNELS))
@pytest.mark.parametrize("key", ["trunk", "whole_body"])
def test_a_network_is_trained_on_what_inference_shows_it(key: str, mask: str) -> None:
    study, words = make_study(), entropies(3)
    patches = sampler(study, key=key, mask=mask)
    ct, labels = np.asarray(study.ct, np.float32), study.districts
    districts = DistrictMap(labels=labels, grid=study.record.grid, segmenter="given", version="1", confidence={})
    shown = network_input(ct, districts, District.TRUNK, key, mask)
    for word, seen in zip(words, patches.draw(words).input, strict=True):
        start = patches.place(word).start
        np.testing.assert_array_equal(seen.numpy(), np.stack([padded(channel, start) for channel in shown]))


def padded(volume: NDArray[Any], start: tuple[int, int, int]) -> NDArray[np.float32]:
    wide = np.pad(volume, WINDOW)
    cube = wide[tuple(slice(first + WINDOW, first + 2 * WINDOW) for first in start)]
    return cube.astype(np.float32)


def test_neighbors_and_lesions_weigh_as_the_recipe_says() -> None:
    study, words = make_study(), entropies(12)
    patches = sampler(study, neighbor_weight=0.25, lesion_weight=4.0, lesion_share=0.5)
    for word in words:
        batch, start = patches.draw([word]), patches.place(word).start
        districts, lesions = padded(study.districts, start), padded(study.lesions, start)
        expected = np.where(districts == District.TRUNK, 1.0, np.where(districts > 0, 0.25, 0.0))
        np.testing.assert_array_equal(batch.weight[0, 0].numpy(), np.where(lesions > 0, 4 * expected, expected))
        assert torch.equal(batch.body, (batch.weight > 0).float())


def test_the_papers_loss_does_not_look_beside_the_district() -> None:
    batch = sampler(mask="district", neighbor_weight=0.0).draw(entropies(10))
    assert (batch.input[batch.weight == 0] == 0).all()
    assert (batch.input[batch.weight > 0] > 0).all()


def test_an_input_mask_that_does_not_exist_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'skull'"):
        sampler(mask="skull")


# --- augmentation


def test_ct_and_pet_are_turned_and_flipped_together() -> None:
    volume = ramp()
    study = make_study(ct=volume, pet=volume, districts=whole())
    batch = sampler(study, augment=TURNED).draw(entropies(20))
    assert torch.equal(batch.input, batch.pet)
    assert (batch.pet > 0).any()


def test_a_turned_ramp_is_the_ramp_at_the_turned_places() -> None:
    """Ties the direction of the matrix, the flips and the order of the axes to the voxels that come out."""
    shape = (70, 60, 64)
    index = np.indices(shape).astype(np.float64)
    for axis in range(3):
        volume = (index[axis] / 128).astype(np.float16)  # exact in half precision
        study = make_study(ct=volume, shape=shape, districts=np.pad(whole((6, 6, 6)), [(29, 35), (27, 27), (29, 29)]))
        study = make_study(ct=volume, shape=shape, districts=study.districts, spacing_mm=(3.0, 2.0, 2.0))
        patches = sampler(study, mask="channel", augment=TURNED)
        for words in entropies(5):
            place = patches.place(words)
            offsets = np.indices((WINDOW,) * 3).reshape(3, -1) - (WINDOW - 1) / 2
            moved = (place.matrix @ offsets[::-1])[::-1] * np.where(place.flips, -1, 1)[:, None]
            expected = (moved[axis] + place.start[axis] + (WINDOW - 1) / 2) / 128
            np.testing.assert_allclose(patches.draw([words]).input[0, 0].numpy().ravel(), expected, atol=2e-5)


def test_flips_happen_along_each_axis_in_half_of_the_patches() -> None:
    patches = sampler(augment=AugmentRecipe(flips=True))
    flips = np.array([patches.place(words).flips for words in entropies(1000)])
    assert (np.abs(flips.mean(axis=0) - 0.5) < 0.06).all()
    assert (np.abs(np.corrcoef(flips.T) - np.eye(3)) < 0.12).all()


def test_a_flipped_patch_is_the_mirrored_patch_of_the_volume() -> None:
    study, patches = make_study(), sampler(augment=AugmentRecipe(flips=True), mask="channel")
    for words in entropies(8):
        place, batch = patches.place(words), patches.draw([words])
        axes = [axis for axis, flip in enumerate(place.flips) if flip]
        np.testing.assert_array_equal(batch.input[0, 0].numpy(), np.flip(padded(study.ct, place.start), axes))


def test_no_corner_of_a_turned_patch_is_empty_where_the_volume_has_data() -> None:
    shape = (90, 90, 90)
    center = np.zeros(shape, np.uint8)
    center[44:46, 44:46, 44:46] = District.TRUNK
    ones, spacings = np.ones(shape, np.float16), [(4.0, 4.0, 4.0), (3.0, 2.0, 2.0), (2.0, 2.0, 5.0)]
    for spacing_mm in spacings:
        study = make_study(ct=ones, districts=center, shape=shape, spacing_mm=spacing_mm)
        for degrees in (10, 45):
            augment = AugmentRecipe(rotation_deg=degrees, flips=True)
            batch = sampler(study, mask="channel", augment=augment).draw(entropies(10))
            assert batch.input[:, 0].min() > 0.9999


def test_the_box_around_a_window_holds_it_in_every_corner_of_the_angles() -> None:
    signs = np.array(np.meshgrid(*[[-1, 1]] * 3)).reshape(3, -1).T
    for window in (16, 17, 32):
        for spacing_mm in ((4.0, 4.0, 4.0), (3.0, 2.0, 2.5)):
            sides = np.array(cube_sides(window, 10, [spacing_mm]))
            assert ((sides - window) % 2 == 0).all()
            for angles in 10 * signs:
                reach = np.abs(voxel_rotation(angles, spacing_mm)).sum(axis=1)[::-1] * (window - 1) / 2
                assert (reach <= (sides - 1) / 2).all()


def test_turning_to_and_back_is_near_the_identity() -> None:
    z, y, x = torch.meshgrid(*[torch.linspace(0, 3, 64)] * 3, indexing="ij")
    smooth = (torch.sin(2 * z) * torch.cos(y) + torch.sin(x + y))[None, None]
    matrix = voxel_rotation(np.array([7.0, -9.0, 5.0]), (3.0, 2.0, 2.0))[None]
    labels = torch.zeros_like(smooth, dtype=torch.uint8)
    there, _ = turn(smooth, labels, matrix, 40)
    back, _ = turn(there, labels[..., :40, :40, :40], np.linalg.inv(matrix), 20)
    assert (there - smooth[:, :, 12:52, 12:52, 12:52]).abs().max() > 0.1
    assert (back - smooth[:, :, 22:42, 22:42, 22:42]).abs().max() < 2e-3


@pytest.mark.parametrize(("axis", "plane"), [(0, (2, 3)), (1, (4, 2)), (2, (3, 4))])
def test_a_quarter_turn_is_exact(axis: int, plane: tuple[int, int]) -> None:
    angles = np.zeros(3)
    angles[axis] = 90
    images = torch.rand(1, 2, 20, 20, 20, generator=torch.Generator().manual_seed(0))
    labels = (images[:, :1] * 13).to(torch.uint8)
    turned, turned_labels = turn(images, labels, voxel_rotation(angles, (4.0, 4.0, 4.0))[None], 20)
    expected = [torch.rot90(t, direction, plane) for t in (images, labels) for direction in (1, -1)]
    assert min((turned - e).abs().max().item() for e in expected[:2]) < 1e-4
    assert any(torch.equal(turned_labels, e) for e in expected[2:])


def test_no_turn_is_the_plain_patch() -> None:
    images, eye = torch.rand(2, 2, 24, 22, 20), np.stack([np.eye(3)] * 2)
    labels = (images[:, :1] * (LESION + 5)).to(torch.uint8)
    turned, turned_labels = turn(images, labels, eye, 16)
    torch.testing.assert_close(turned, images[:, :, 4:20, 3:19, 2:18], atol=1e-5, rtol=0)
    assert torch.equal(turned_labels, labels[:, :, 4:20, 3:19, 2:18])


def test_a_rotation_turns_the_patient_and_not_the_voxels() -> None:
    """On oblong voxels lengths in mm stay; the matrix in voxels alone would shear."""
    spacing = np.array([2.0, 2.0, 3.0])  # x, y, z
    matrix = voxel_rotation(np.array([8.0, -6.0, 10.0]), (3.0, 2.0, 2.0))
    for offset in np.eye(3):
        assert np.linalg.norm(matrix @ offset * spacing) == pytest.approx(np.linalg.norm(offset * spacing))


def test_angles_stay_within_the_recipes_and_use_their_range() -> None:
    patches = sampler(augment=AugmentRecipe(rotation_deg=10))
    turns = [patches.place(words).matrix for words in entropies(500)]
    about_y = np.degrees(np.arcsin([-matrix[2, 0] for matrix in turns]))  # z @ y @ x has -sin(b) there
    assert np.abs(about_y).max() <= 10
    assert about_y.max() > 9.5
    assert about_y.min() < -9.5
    assert abs(about_y.mean()) < 1


def test_noise_is_on_the_ct_only_and_never_in_air() -> None:
    ct = make_study().ct.copy()
    ct[:, 10:14] = 0  # air inside the body
    study, words = make_study(ct=ct), entropies(30)
    quiet, noisy = (
        sampler(study, mask="districts", augment=AugmentRecipe(ct_noise=sigma)).draw(words) for sigma in (0.0, 0.01)
    )
    difference = (noisy.input - quiet.input)[:, 0]
    air = quiet.input[:, 0] == 0
    assert air.any()
    assert (difference[air] == 0).all()
    assert difference[~air].std() == pytest.approx(0.01, rel=0.02)
    assert abs(difference[~air].mean()) < 1e-4
    assert torch.equal(noisy.input[:, 1:], quiet.input[:, 1:])
    assert torch.equal(noisy.pet, quiet.pet)
    assert torch.equal(noisy.weight, quiet.weight)


def test_noise_leaves_the_ct_in_its_range() -> None:
    study = make_study(ct=np.full(SHAPE, 0.999, np.float16))
    batch = sampler(study, augment=AugmentRecipe(ct_noise=0.5)).draw(entropies(2))
    assert batch.input.min() == 0
    assert batch.input.max() == 1


def test_weights_stay_among_the_recipes_values_when_turned() -> None:
    batch = sampler(augment=TURNED, neighbor_weight=0.25, lesion_weight=3.0, lesion_share=1.0).draw(entropies(20))
    assert set(batch.weight.unique().tolist()) <= {0.0, 0.25, 1.0, 3.0}
