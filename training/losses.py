"""The losses of Pix2Pix: binary cross-entropy on the discriminator's logits, and a weighted L1."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor


def adversarial_loss(logits: Tensor, *, real: bool) -> Tensor:
    """Mean of -log(sigmoid(l)) for real, -log(1 - sigmoid(l)) for fake, over all patches of the map."""
    target = torch.ones_like(logits) if real else torch.zeros_like(logits)
    return F.binary_cross_entropy_with_logits(logits, target)


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Half the sum for the real and the fake pair, as in Pix2Pix."""
    return 0.5 * (adversarial_loss(real_logits, real=True) + adversarial_loss(fake_logits, real=False))


def weighted_l1(fake: Tensor, real: Tensor, weight: Tensor) -> Tensor:
    """sum(w |fake - real|) / sum(w); 0 where no voxel has a weight."""
    return (weight * (fake - real).abs()).sum() / weight.sum().clamp_min(1.0)


def generator_loss(
    fake_logits: Tensor,
    fake: Tensor,
    real: Tensor,
    weight: Tensor,
    lambda_l1: float,
    adversarial_weight: float = 1.0,
) -> Tensor:
    """The generator wants its pair judged real, and to be near the truth: a * adversarial + lambda * L1."""
    return adversarial_weight * adversarial_loss(fake_logits, real=True) + lambda_l1 * weighted_l1(fake, real, weight)
