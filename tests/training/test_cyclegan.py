"""The step of CycleGAN: its figures against plain numpy, the image pool, and going on after an interruption."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from step_tools import CPU, FREE, Counting, batch_of, double, gradients, mean_l1, norm_of, part_of, recipe_for

from training.models.cyclegan import CycleGAN, with_ct
from training.models.image_pool import ImagePool
from training.patches.sampler import Batch


def model_of(channels: int = 1, seed: int = 0, cycle: dict[str, Any] | None = None, **train: Any) -> CycleGAN:
    torch.manual_seed(seed)
    return CycleGAN(recipe_for(channels, cycle=cycle, **train), CPU)


class Reference:
    """The published formulas in numpy; a network is asked for its output only."""

    def __init__(self, model: CycleGAN, batch: Batch) -> None:
        self.body = (double(batch.weight) > 0).astype(float)
        self.seen, self.pet = double(batch.input), double(batch.pet) * self.body
        self.ct = self.seen[:, :1] * self.body
        self.to_pet = lambda seen: self.ask(model.generators.ct_to_pet, seen) * self.body
        self.to_ct = lambda pet: self.ask(model.generators.pet_to_ct, pet) * self.body
        self.of_pet = lambda pet: self.ask(model.discriminators.of_pet, pet)
        self.of_ct = lambda ct: self.ask(model.discriminators.of_ct, ct)
        self.made_pet, self.made_ct = self.to_pet(self.seen), self.to_ct(self.pet)

    @staticmethod
    def ask(network: torch.nn.Module, values: NDArray[np.float64]) -> NDArray[np.float64]:
        with torch.no_grad():
            return double(network(torch.from_numpy(values).float()))

    def instead_of_ct(self, ct: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.concatenate([ct, self.seen[:, 1:]], axis=1)

    def adversarial(self) -> float:
        of_pet, of_ct = self.of_pet(self.made_pet), self.of_ct(self.made_ct)
        return float(np.mean((of_pet - 1) ** 2) + np.mean((of_ct - 1) ** 2))

    def cycle(self) -> float:
        ct_again, pet_again = self.to_ct(self.made_pet), self.to_pet(self.instead_of_ct(self.made_ct))
        return mean_l1(ct_again, self.ct, self.body) + mean_l1(pet_again, self.pet, self.body)

    def identity(self) -> float:
        same_pet, same_ct = self.to_pet(self.instead_of_ct(self.pet)), self.to_ct(self.ct)
        return mean_l1(same_pet, self.pet, self.body) + mean_l1(same_ct, self.ct, self.body)

    def discriminator(self) -> float:
        pairs = ((self.of_pet, self.pet, self.made_pet), (self.of_ct, self.ct, self.made_ct))
        return float(sum(0.5 * (np.mean((d(real) - 1) ** 2) + np.mean(d(made) ** 2)) for d, real, made in pairs))


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("identity", [0.0, 0.5])
def test_a_step_reports_the_published_formulas(channels: int, identity: float) -> None:
    model = model_of(channels, cycle={"lambda_identity": identity, "lambda_cycle": 7.0, "adversarial_weight": 0.3})
    batch = batch_of(2, channels)
    losses = model.step(batch, 0.0, (0,))  # at rate 0 nothing moves: the networks can be asked again
    plain = Reference(model, batch)
    whole = 0.3 * plain.adversarial() + 7.0 * plain.cycle()
    if identity:
        whole += identity * 7.0 * plain.identity()
        assert losses["identity"].item() == pytest.approx(plain.identity(), rel=1e-5)
    assert ("identity" in losses) == (identity > 0)
    assert losses["adversarial"].item() == pytest.approx(plain.adversarial(), rel=1e-5)
    assert losses["cycle"].item() == pytest.approx(plain.cycle(), rel=1e-5)
    assert losses["generator"].item() == pytest.approx(whole, rel=1e-5)
    assert losses["discriminator"].item() == pytest.approx(plain.discriminator(), rel=1e-5)
    made = double(model.generator(batch.input))
    assert losses["l1"].item() == pytest.approx(mean_l1(made, plain.pet, double(batch.weight)), rel=1e-5)
    assert not any(loss.requires_grad for loss in losses.values())


def test_the_generators_learn_from_their_loss_and_the_discriminators_from_theirs() -> None:
    model, batch = model_of(**FREE), batch_of()
    model.step(batch, 0.0, (0,))
    made = model.generators(batch.input, batch.pet, batch.body, False)
    of_pet, of_ct = model.discriminators(made.pet, made.ct)
    mean = lambda error: torch.stack([(e * b).sum() / b.sum() for e, b in zip(error, batch.body, strict=True)]).mean()  # noqa: E731
    cycles = mean((made.pet_again - batch.pet).abs()) + mean((made.ct_again - batch.input).abs())
    loss = ((of_pet - 1) ** 2).mean() + ((of_ct - 1) ** 2).mean() + 10 * cycles
    own = torch.autograd.grad(loss, list(model.generators.parameters()))
    for found, expected in zip(gradients(model.generators), own, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    real = model.discriminators(batch.pet, batch.input)
    fake = model.discriminators(made.pet.detach(), made.ct.detach())
    loss_d = torch.stack([((r - 1) ** 2).mean() / 2 + (f**2).mean() / 2 for r, f in zip(real, fake, strict=True)]).sum()
    own = torch.autograd.grad(loss_d, list(model.discriminators.parameters()))
    for found, expected in zip(gradients(model.discriminators), own, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_only_the_inside_of_the_body_is_looked_at() -> None:
    batch = batch_of()
    hot = Batch(batch.input, torch.where(batch.weight > 0, batch.pet, 1.0), batch.weight)
    assert not torch.equal(hot.pet, batch.pet)
    one, other = (model_of(cycle={"lambda_identity": 0.5}).step(b, 1.0, (0,)) for b in (batch, hot))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_no_loss_compares_the_pet_with_the_ct_of_its_place() -> None:
    # the same CTs and PETs in other pairs: what is learned stays the same, only the logged L1 does not
    batch = batch_of(2)
    weight = torch.ones_like(batch.weight)
    paired, crossed = (Batch(batch.input, pet, weight) for pet in (batch.pet, batch.pet.flip(0)))
    found = []
    for each in (paired, crossed):
        model = model_of(**FREE, ema_decay=0.0)
        losses = model.step(each, 1.0, (0,))
        found.append((losses, gradients(model.generators) + gradients(model.discriminators)))
    for one, other in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert found[0][0]["l1"] != found[1][0]["l1"]


@pytest.mark.parametrize("channels", [1, 2])
def test_two_half_batches_give_the_gradients_of_the_whole(channels: int) -> None:
    batch = batch_of(4, channels)
    found = []
    for samples in (slice(0, 4), slice(0, 2), slice(2, 4)):
        model = model_of(channels, cycle={"lambda_identity": 0.5}, **FREE)
        model.step(part_of(batch, samples), 0.0, (0,))
        found.append(gradients(model.generators) + gradients(model.discriminators))
    for whole, first, second in zip(*found, strict=True):
        torch.testing.assert_close(whole, (first + second) / 2, rtol=1e-4, atol=1e-6)


def test_each_networks_gradients_are_clipped_by_their_norm() -> None:
    model = model_of(clip_norm=1e-3)
    model.step(batch_of(), 1.0, (0,))
    generators, discriminators = model.generators, model.discriminators
    for network in (generators.ct_to_pet, generators.pet_to_ct, discriminators.of_pet, discriminators.of_ct):
        assert norm_of(network) == pytest.approx(1e-3, rel=1e-3)


def test_the_ct_to_pet_generator_is_averaged() -> None:
    model = model_of(ema_decay=0.15)
    model.step(batch_of(), 1.0, (0,))
    before = [p.clone() for p in model.averaged.parameters()]
    model.step(batch_of(), 1.0, (1,))
    assert model.generator is model.generators.ct_to_pet
    for mean, old, now in zip(model.averaged.parameters(), before, model.generator.parameters(), strict=True):
        torch.testing.assert_close(mean, 0.15 * old + 0.85 * now)


def test_a_simple_mapping_is_learned_without_pairs() -> None:
    model, batch = model_of(learning_rate=1e-2, discriminator_learning_rate=1e-2), batch_of(4)
    seen = [model.step(batch, 1.0, (step,)) for step in range(40)]
    assert seen[-1]["cycle"] < 0.6 * seen[0]["cycle"]
    assert seen[-1]["l1"] < 0.5 * seen[0]["l1"]


@pytest.mark.parametrize("channels", [1, 2])
def test_training_goes_on_from_its_state_bit_for_bit(channels: int) -> None:
    pool = {"pool": 3}  # full after two steps: then old fakes come back
    model, batches = model_of(channels, cycle=pool), [batch_of(2, channels, seed) for seed in range(4)]
    for step in range(3):
        model.step(batches[step], 1.0, (step,))
    state = copy.deepcopy(model.state())
    other = model_of(channels, seed=1, cycle=pool)
    other.restore(state)
    for step in (3, 4):
        expected, again = (m.step(batches[3], 0.5, (step,)) for m in (model, other))
        assert all(torch.equal(expected[name], again[name]) for name in expected)
    for a, b in zip(model.averaged.parameters(), other.averaged.parameters(), strict=True):
        assert torch.equal(a, b)
    empty = model_of(channels, seed=1, cycle=pool)
    empty.restore(state | {"pet_pool": [], "ct_pool": []})
    assert not torch.equal(empty.step(batches[3], 0.5, (3,))["discriminator"], expected["discriminator"])


def test_a_state_survives_a_file_that_may_hold_tensors_only(tmp_path: Any) -> None:
    model = model_of()
    model.step(batch_of(), 1.0, (0,))
    torch.save(model.state(), tmp_path / "state.pt")
    read = torch.load(tmp_path / "state.pt", weights_only=True)
    other = model_of(seed=1)
    other.restore(read)
    assert len(other.state()["pet_pool"]) == 2


def test_a_wrap_goes_around_both_pairs_of_networks() -> None:
    wraps: list[Counting] = []

    def counted(module: torch.nn.Module) -> torch.nn.Module:
        wraps.append(Counting(module))
        return wraps[-1]

    torch.manual_seed(0)
    model = CycleGAN(recipe_for(), CPU, wrap=counted)
    model.step(batch_of(), 1.0, (0,))
    assert [wrap.forwards for wrap in wraps] == [1, 1]  # one forward per backward
    plain = model_of().state()
    for name, found in model.state().items():
        if "optimizer" not in name and "pool" not in name and name != "steps":
            assert found.keys() == plain[name].keys()


def test_a_made_ct_takes_the_ct_channel_only() -> None:
    seen = torch.rand(2, 3, 4, 4, 4)
    ct = torch.zeros(2, 1, 4, 4, 4)
    assert torch.equal(with_ct(seen, ct)[:, 1:], seen[:, 1:])
    assert with_ct(seen, ct)[:, 0].abs().max() == 0


def images(start: int, count: int) -> torch.Tensor:
    return torch.arange(start, start + count, dtype=torch.float32).view(count, 1, 1, 1, 1)


def test_a_pool_passes_on_its_first_images_and_then_exchanges_half_of_them() -> None:
    pool, rng = ImagePool(50), np.random.default_rng(0)
    for start in range(0, 50, 5):
        assert torch.equal(pool.exchange(images(start, 5), rng), images(start, 5))
    assert len(pool.state()) == 50
    shown = pool.exchange(images(50, 2000), rng).flatten()
    same = (shown == images(50, 2000).flatten()).float().mean()
    assert same == pytest.approx(0.5, abs=0.05)  # 0.011 is the standard deviation
    assert len(pool.state()) == 50
    # none is lost and none is shown while it is held: shown and held together are everything that came
    held = torch.stack(pool.state()).flatten()
    assert sorted([*shown.tolist(), *held.tolist()]) == list(range(2050))


def test_a_pool_of_none_passes_everything_on() -> None:
    pool = ImagePool(0)
    assert torch.equal(pool.exchange(images(0, 9), np.random.default_rng(0)), images(0, 9))
    assert pool.state() == []


def test_a_pool_holds_no_gradients() -> None:
    pool = ImagePool(2)
    made = (images(0, 3) * torch.ones(1, requires_grad=True)).requires_grad_()
    assert not pool.exchange(made, np.random.default_rng(0)).requires_grad
    assert not any(image.requires_grad for image in pool.state())
