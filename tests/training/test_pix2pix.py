"""The step of Pix2Pix: its figures against plain numpy, who learns from what, and going on after an interruption."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from step_tools import CPU, FREE, Counting, batch_of, double, gradients, mean_l1, norm_of, part_of, recipe_for

from training.models.losses import adversarial_loss, discriminator_loss, generator_loss
from training.models.optimization import uses_bf16, warmed_decay
from training.models.pix2pix import Pix2Pix
from training.patches.sampler import Batch
from training.recipe import RecipeError


def model_of(channels: int = 1, seed: int = 0, **train: Any) -> Pix2Pix:
    torch.manual_seed(seed)
    return Pix2Pix(recipe_for(channels, **train), CPU)


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("adversarial_weight", [1.0, 0.02])
def test_a_step_reports_the_published_formulas(channels: int, adversarial_weight: float) -> None:
    model = model_of(channels, adversarial_weight=adversarial_weight)
    batch = batch_of(2, channels)
    losses = model.step(batch, 0.0, (0,))  # at rate 0 nothing moves: the networks can be asked again
    seen, pet, weight = (double(t) for t in (batch.input, batch.pet, batch.weight))
    with torch.no_grad():
        fake = double(model.generator(batch.input))
        real_logits, fake_logits = (
            double(model.discriminator(torch.from_numpy(np.concatenate([seen, np.where(weight > 0, p, 0)], 1)).float()))
            for p in (pet, fake)
        )
    log_real, log_fake = (np.log(1 / (1 + np.exp(-s * v))) for s, v in ((1, real_logits), (-1, fake_logits)))
    adversarial = -np.mean(np.log(1 / (1 + np.exp(-fake_logits))))
    l1 = mean_l1(fake, pet, weight)
    assert losses["discriminator"].item() == pytest.approx(-(log_real.mean() + log_fake.mean()) / 2, rel=1e-5)
    assert losses["adversarial"].item() == pytest.approx(adversarial, rel=1e-5)
    assert losses["l1"].item() == pytest.approx(l1, rel=1e-5)
    assert losses["generator"].item() == pytest.approx(adversarial_weight * adversarial + 100 * l1, rel=1e-5)
    assert not any(loss.requires_grad for loss in losses.values())


def test_each_network_learns_from_its_own_loss_only() -> None:
    model = model_of(**FREE)
    batch = batch_of()
    model.step(batch, 0.0, (0,))
    fake = model.generator(batch.input)
    pair = torch.cat([batch.input, fake * batch.body], dim=1)
    loss_g = generator_loss(model.discriminator(pair), fake, batch.pet, batch.weight, 100.0, 0.02)
    for found, own in zip(
        gradients(model.generator), torch.autograd.grad(loss_g, list(model.generator.parameters())), strict=True
    ):
        torch.testing.assert_close(found, own, rtol=1e-4, atol=1e-7)
    real = model.discriminator(torch.cat([batch.input, batch.pet * batch.body], dim=1))
    loss_d = discriminator_loss(real, model.discriminator(pair.detach()))
    expected = torch.autograd.grad(loss_d, list(model.discriminator.parameters()))
    for found, own in zip(gradients(model.discriminator), expected, strict=True):
        torch.testing.assert_close(found, own, rtol=1e-4, atol=1e-7)
    assert adversarial_loss(real, real=True).requires_grad  # the discriminator can learn again


def test_air_is_not_judged() -> None:
    batch = batch_of()
    hot = Batch(batch.input, torch.where(batch.weight > 0, batch.pet, 1.0), batch.weight)
    assert not torch.equal(hot.pet, batch.pet)
    one, other = (model_of().step(b, 1.0, (0,)) for b in (batch, hot))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_two_half_batches_give_the_gradients_of_the_whole() -> None:
    model = model_of(**FREE)
    batch = batch_of(4)
    found = []
    for samples in (slice(0, 4), slice(0, 2), slice(2, 4)):
        model.step(part_of(batch, samples), 0.0, (0,))
        found.append(gradients(model.generator) + gradients(model.discriminator))
    for whole, first, second in zip(*found, strict=True):
        torch.testing.assert_close(whole, (first + second) / 2, rtol=1e-4, atol=1e-6)


def test_gradients_are_clipped_by_their_norm() -> None:
    model, free = model_of(clip_norm=1e-3), model_of(**FREE)
    for each in (model, free):
        each.step(batch_of(), 1.0, (0,))
    assert min(norm_of(free.generator), norm_of(free.discriminator)) > 1e-3
    assert norm_of(model.generator) == pytest.approx(1e-3, rel=1e-3)
    assert norm_of(model.discriminator) == pytest.approx(1e-3, rel=1e-3)


def test_the_averaged_weights_follow_slowly() -> None:
    model = model_of(ema_decay=0.15)
    model.step(batch_of(), 1.0, (0,))
    before = [p.clone() for p in model.averaged.parameters()]
    model.step(batch_of(), 1.0, (1,))
    for mean, old, now in zip(model.averaged.parameters(), before, model.generator.parameters(), strict=True):
        torch.testing.assert_close(mean, 0.15 * old + 0.85 * now)
        assert not mean.requires_grad
    plain = model_of(ema_decay=0.0)
    plain.step(batch_of(), 1.0, (0,))
    for mean, now in zip(plain.averaged.parameters(), plain.generator.parameters(), strict=True):
        assert torch.equal(mean, now)


def test_a_short_run_forgets_its_random_start() -> None:
    assert [warmed_decay(0.995, step) for step in (0, 8, 90)] == pytest.approx([0.1, 0.5, 0.91])
    assert warmed_decay(0.995, 1790) == 0.995
    model = model_of(ema_decay=0.995)
    start = [p.clone() for p in model.averaged.parameters()]
    model.step(batch_of(), 1.0, (0,))
    for mean, old, now in zip(model.averaged.parameters(), start, model.generator.parameters(), strict=True):
        torch.testing.assert_close(mean, 0.1 * old + 0.9 * now)


def test_the_rate_scales_both_learning_rates() -> None:
    # Adam's first step is the learning rate itself wherever there is a gradient
    moved = []
    for rate in (1.0, 0.25):
        model = model_of()
        before = [p.clone() for p in (*model.generator.parameters(), *model.discriminator.parameters())]
        model.step(batch_of(), rate, (0,))
        after = (*model.generator.parameters(), *model.discriminator.parameters())
        moved.append([float((a - b).abs().max().detach()) for a, b in zip(after, before, strict=True)])
    count = len(list(model_of().generator.parameters()))
    assert max(moved[0][:count]) == pytest.approx(1e-3, rel=0.01)
    assert max(moved[0][count:]) == pytest.approx(2e-4, rel=0.01)
    assert max(moved[1][:count]) == pytest.approx(0.25e-3, rel=0.01)
    assert max(moved[1][count:]) == pytest.approx(0.5e-4, rel=0.01)


def test_a_simple_mapping_is_learned() -> None:
    model = model_of(learning_rate=1e-2)
    batch = batch_of()
    seen = [model.step(batch, 1.0, (step,))["l1"].item() for step in range(40)]
    assert seen[-1] < 0.6 * seen[0]


def test_training_goes_on_from_its_state_bit_for_bit() -> None:
    model, batch = model_of(), batch_of()
    for step in range(2):
        model.step(batch, 1.0, (step,))
    state = copy.deepcopy(model.state())
    expected = model.step(batch, 0.5, (2,))
    other = model_of(seed=1)
    other.restore(state)
    again = other.step(batch, 0.5, (2,))
    assert all(torch.equal(expected[name], again[name]) for name in expected)
    for name in ("generator", "averaged", "discriminator"):
        for a, b in zip(getattr(model, name).parameters(), getattr(other, name).parameters(), strict=True):
            assert torch.equal(a, b)


def test_a_wrap_goes_around_what_is_trained_and_hides_no_name() -> None:
    wraps: list[Counting] = []

    def counted(module: torch.nn.Module) -> torch.nn.Module:
        wraps.append(Counting(module))
        return wraps[-1]

    torch.manual_seed(0)
    model = Pix2Pix(recipe_for(), CPU, wrap=counted)
    losses = model.step(batch_of(), 1.0, (0,))
    assert [wrap.forwards for wrap in wraps] == [1, 1]  # one forward per backward
    plain = model_of()
    assert all(torch.equal(loss, losses[name]) for name, loss in plain.step(batch_of(), 1.0, (0,)).items())
    for name in ("generator", "averaged", "discriminator"):
        assert model.state()[name].keys() == plain.state()[name].keys()


def test_bf16_is_used_where_asked_for_and_keeps_the_weights() -> None:
    assert not uses_bf16("fp32", CPU)
    assert not uses_bf16("auto", CPU)
    assert uses_bf16("bf16", CPU)
    full, half = model_of(), model_of(precision="bf16")
    exact, rounded = (model.step(batch_of(), 1.0, (0,)) for model in (full, half))
    assert not torch.equal(exact["l1"], rounded["l1"])
    assert rounded["l1"].item() == pytest.approx(exact["l1"].item(), rel=0.05)
    assert {p.dtype for p in half.generator.parameters()} == {torch.float32}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_compiled_step_on_a_gpu_keeps_the_names_and_learns() -> None:
    device = torch.device("cuda")
    torch.manual_seed(0)
    model = Pix2Pix(recipe_for(precision="auto", compile=True, learning_rate=1e-2), device)
    batch = batch_of()
    there = Batch(batch.input.to(device), batch.pet.to(device), batch.weight.to(device))
    seen = [model.step(there, 1.0, (step,))["l1"].item() for step in range(40)]
    assert seen[-1] < 0.7 * seen[0]
    assert model.state()["generator"].keys() == model_of().state()["generator"].keys()


def test_a_discriminator_too_deep_for_the_window_is_refused() -> None:
    recipe = recipe_for()
    deep = recipe.model_copy(update={"model": recipe.model.model_copy(update={"discriminator_layers": 3})})
    with pytest.raises(RecipeError, match="discriminator_layers"):
        Pix2Pix(deep, CPU)
