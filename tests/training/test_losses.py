from __future__ import annotations

import math

import pytest
import torch

from training.discriminators import PatchDiscriminator
from training.losses import adversarial_loss, discriminator_loss, generator_loss, weighted_l1


def sigmoid(v: float) -> float:
    return 1 / (1 + math.exp(-v))


LOGITS = [-1.5, 0.0, 0.3, 2.0]


def test_the_adversarial_loss_is_the_mean_log_likelihood() -> None:
    logits = torch.tensor(LOGITS)
    real = -sum(math.log(sigmoid(v)) for v in LOGITS) / 4
    fake = -sum(math.log(1 - sigmoid(v)) for v in LOGITS) / 4
    assert adversarial_loss(logits, real=True).item() == pytest.approx(real, rel=1e-6)
    assert adversarial_loss(logits, real=False).item() == pytest.approx(fake, rel=1e-6)
    assert discriminator_loss(logits, logits).item() == pytest.approx((real + fake) / 2, rel=1e-6)


def test_l1_is_weighted_and_averaged_over_the_weights() -> None:
    fake, real = torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0.2, 0.1, 0.0])
    weight = torch.tensor([2.0, 1.0, 0.0])
    assert weighted_l1(fake, real, weight).item() == pytest.approx((2 * 0.1 + 1 * 0.4) / 3)
    assert weighted_l1(fake, real, torch.zeros(3)).item() == 0


def test_the_generator_adds_lambda_times_l1() -> None:
    logits = torch.tensor(LOGITS)
    fake, real, weight = torch.tensor([0.3]), torch.tensor([0.1]), torch.tensor([1.0])
    expected = -sum(math.log(sigmoid(v)) for v in LOGITS) / 4 + 100 * 0.2
    assert generator_loss(logits, fake, real, weight, 100.0).item() == pytest.approx(expected, rel=1e-5)
    quieter = generator_loss(logits, fake, real, weight, 100.0, adversarial_weight=0.5).item()
    assert quieter == pytest.approx((expected + 100 * 0.2) / 2, rel=1e-5)


def test_the_discriminator_judges_regions_of_34_voxels() -> None:
    torch.manual_seed(0)
    judge = PatchDiscriminator(2, 2)
    for module in judge.modules():  # normalization would let every voxel see every other
        if isinstance(module, torch.nn.InstanceNorm3d):
            module.forward = lambda x: x  # type: ignore[method-assign]
    ct = torch.rand(1, 1, 48, 48, 48, requires_grad=True)
    logits = judge(ct, torch.rand(1, 1, 48, 48, 48))
    middle = logits.shape[-1] // 2
    logits[0, 0, middle, middle, middle].backward()
    assert ct.grad is not None
    seen = ct.grad[0, 0].abs().amax(dim=(1, 2)).nonzero()
    assert int(seen.max() - seen.min()) + 1 == 34


def test_a_discriminator_without_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        PatchDiscriminator(4, 0)
