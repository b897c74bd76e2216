"""The losses against the published formulas, written out value by value in double precision."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from step_tools import mean_l1

from training.models.discriminators import PatchDiscriminator, check_window, map_sides
from training.models.losses import (
    adversarial_loss,
    discriminator_loss,
    generator_loss,
    least_squares_discriminator_loss,
    least_squares_loss,
    weighted_l1,
)
from training.recipe import RecipeError

LOGITS = [-1.5, 0.0, 0.3, 2.0]
OTHERS = [0.7, -0.2, 1.1, -3.0]


def sigmoid(v: float) -> float:
    return 1 / (1 + math.exp(-v))


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_the_adversarial_loss_is_the_mean_log_likelihood() -> None:
    logits, others = torch.tensor(LOGITS), torch.tensor(OTHERS)
    real = mean([-math.log(sigmoid(v)) for v in LOGITS])
    fake = mean([-math.log(1 - sigmoid(v)) for v in LOGITS])
    assert adversarial_loss(logits, real=True).item() == pytest.approx(real, rel=1e-6)
    assert adversarial_loss(logits, real=False).item() == pytest.approx(fake, rel=1e-6)
    other_fake = mean([-math.log(1 - sigmoid(v)) for v in OTHERS])
    assert discriminator_loss(logits, others).item() == pytest.approx((real + other_fake) / 2, rel=1e-6)


def test_least_squares_pull_real_to_one_and_made_to_zero() -> None:
    scores, others = torch.tensor(LOGITS), torch.tensor(OTHERS)
    real, made = mean([(v - 1) ** 2 for v in LOGITS]), mean([v**2 for v in OTHERS])
    assert least_squares_loss(scores, real=True).item() == pytest.approx(real, rel=1e-6)
    assert least_squares_loss(others, real=False).item() == pytest.approx(made, rel=1e-6)
    assert least_squares_discriminator_loss(scores, others).item() == pytest.approx((real + made) / 2, rel=1e-6)


def test_l1_is_normalized_within_a_sample_and_then_averaged() -> None:
    rng = np.random.default_rng(0)
    fake, real = rng.random((3, 1, 4, 4, 4)), rng.random((3, 1, 4, 4, 4))
    weight = rng.choice([0.0, 0.5, 1.0, 4.0], (3, 1, 4, 4, 4))
    weight[2, :, :, 1:] = 0  # a patch that is mostly air counts as much as the others
    found = weighted_l1(*(torch.from_numpy(a) for a in (fake, real, weight))).item()
    assert found == pytest.approx(mean_l1(fake, real, weight), rel=1e-12)
    assert found != pytest.approx((weight * abs(fake - real)).sum() / weight.sum(), rel=1e-3)


def test_a_sample_without_weight_adds_nothing_and_no_nan() -> None:
    fake = torch.ones(2, 1, 2, 2, 2, requires_grad=True)
    weight = torch.ones(2, 1, 2, 2, 2)
    weight[1] = 0
    loss = weighted_l1(fake, torch.zeros(2, 1, 2, 2, 2), weight)
    loss.backward()
    assert loss.item() == 0.5
    assert fake.grad is not None
    assert fake.grad[1].abs().max() == 0


def test_the_generator_adds_lambda_times_l1() -> None:
    logits = torch.tensor(LOGITS)
    fake, real, weight = (torch.full((1, 1, 1, 1, 1), v) for v in (0.3, 0.1, 1.0))
    expected = mean([-math.log(sigmoid(v)) for v in LOGITS]) + 100 * 0.2
    assert generator_loss(logits, fake, real, weight, 100.0).item() == pytest.approx(expected, rel=1e-5)
    quieter = generator_loss(logits, fake, real, weight, 100.0, adversarial_weight=0.5).item()
    assert quieter == pytest.approx((expected + 100 * 0.2) / 2, rel=1e-5)


def test_the_discriminator_judges_regions_of_34_voxels() -> None:
    torch.manual_seed(0)
    judge = PatchDiscriminator(2, 2, 2)
    for module in judge.modules():  # normalization would let every voxel see every other
        if isinstance(module, torch.nn.InstanceNorm3d):
            module.forward = lambda x: x  # type: ignore[method-assign]
    pair = torch.rand(1, 2, 48, 48, 48, requires_grad=True)
    scores = judge(pair)
    assert scores.shape[-1] == map_sides(48, 2)[-1]
    middle = scores.shape[-1] // 2
    scores[0, 0, middle, middle, middle].backward()
    assert pair.grad is not None
    for channel in pair.grad[0]:
        seen = channel.abs().amax(dim=(1, 2)).nonzero()
        assert int(seen.max() - seen.min()) + 1 == 34


def test_a_discriminator_starts_from_narrow_weights_without_bias() -> None:
    torch.manual_seed(0)
    judge = PatchDiscriminator(1, 16, 2)
    convolutions = [module for module in judge.modules() if isinstance(module, torch.nn.Conv3d)]
    assert len(convolutions) == 4
    for convolution in convolutions:
        assert convolution.weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert convolution.bias is None or convolution.bias.abs().max() == 0


def test_a_discriminator_without_layers_or_with_too_many_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        PatchDiscriminator(2, 4, 0)
    check_window(32, 3)
    with pytest.raises(RecipeError, match="discriminator_layers 3 end at 1 voxels of a window of 16"):
        check_window(16, 3)
