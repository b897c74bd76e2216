"""The losses of Pix2Pix and CycleGAN. Every one is a mean over the batch of a mean within each sample.

So the mean of the gradients of two processes with half a batch each is the gradient of one with the whole batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor


def adversarial_loss(logits: Tensor, *, real: bool) -> Tensor:
    """Mean of -log(sigmoid(l)) for real, -log(1 - sigmoid(l)) for fake, over all patches of the map.

    Goodfellow et al. 2014 with the generator's -log D(G(x)), as in Pix2Pix (Isola et al. 2017, section 3.3).
    """
    target = torch.ones_like(logits) if real else torch.zeros_like(logits)
    return F.binary_cross_entropy_with_logits(logits, target)


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Half the sum for the real and the fake pair, as in Pix2Pix."""
    return 0.5 * (adversarial_loss(real_logits, real=True) + adversarial_loss(fake_logits, real=False))


def least_squares_loss(scores: Tensor, *, real: bool) -> Tensor:
    """Mean of (s - 1)^2 for real, s^2 for fake, over all patches of the map (LSGAN, Mao et al. 2017).

    CycleGAN (Zhu et al. 2017, section 4) takes it in place of the likelihood, for generator and discriminator.
    """
    return (scores - (1.0 if real else 0.0)).square().mean()


def least_squares_discriminator_loss(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    """Half the sum for the real and the fake, as CycleGAN slows its discriminators down."""
    return 0.5 * (least_squares_loss(real_scores, real=True) + least_squares_loss(fake_scores, real=False))


def weighted_l1(fake: Tensor, real: Tensor, weight: Tensor) -> Tensor:
    """Mean over the samples of sum(w |fake - real|) / sum(w); all (N, 1, z, y, x). A sample without weight adds 0.

    Normalized within the sample, not over the batch: a patch at the skin counts as much as one in the middle.
    """
    axes = tuple(range(1, weight.dim()))
    error = (weight * (fake - real).abs()).sum(axes)
    return (error / weight.sum(axes).clamp_min(1.0)).mean()


def generator_loss(
    fake_logits: Tensor,
    fake: Tensor,
    real: Tensor,
    weight: Tensor,
    lambda_l1: float,
    adversarial_weight: float = 1.0,
) -> Tensor:
    """Pix2Pix: the generator wants its pair judged real, and to be near the truth: a * adversarial + lambda * L1."""
    return adversarial_weight * adversarial_loss(fake_logits, real=True) + lambda_l1 * weighted_l1(fake, real, weight)
