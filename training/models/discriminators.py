"""The PatchGAN discriminator: it judges small regions of what it is shown.

Pix2Pix shows it the generator's input and a PET as channels, CycleGAN one volume alone. Two strided layers see 34
voxels, which fits a window of 32; three would look past its border.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.networks import initialize_weights
from training.recipe import RecipeError

KERNEL = 4


def map_sides(window: int, layers: int) -> list[int]:
    """Voxels per side after every convolution of a discriminator; the last is the map of logits."""
    sides = [window]
    for stride in [2] * layers + [1, 1]:
        sides.append((sides[-1] + 2 - KERNEL) // stride + 1)
    return sides[1:]


class PatchDiscriminator(nn.Module):
    """PatchGAN with `layers` strided levels; scores without a sigmoid (logits, or LSGAN's plain numbers)."""

    def __init__(self, in_channels: int, width: int = 64, layers: int = 2) -> None:
        super().__init__()
        if min(in_channels, width, layers) < 1:
            text = f"discriminator of {in_channels} channels, width {width} and {layers} strided layers"
            raise ValueError(f"{text}: all must be at least 1")
        parts: list[nn.Module] = [nn.Conv3d(in_channels, width, KERNEL, stride=2, padding=1), nn.LeakyReLU(0.2)]
        inputs = width
        for level in range(1, layers + 1):
            outputs = width * min(2**level, 8)
            stride = 2 if level < layers else 1
            parts += [
                nn.Conv3d(inputs, outputs, KERNEL, stride=stride, padding=1, bias=False),
                nn.InstanceNorm3d(outputs, affine=True),
                nn.LeakyReLU(0.2),
            ]
            inputs = outputs
        parts.append(nn.Conv3d(inputs, 1, KERNEL, stride=1, padding=1))
        self.net = nn.Sequential(*parts)
        self.apply(initialize_weights)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, w, w, w) in [0, 1] to a map of scores (N, 1, m, m, m)."""
        scores: Tensor = self.net(x)
        return scores


def check_window(window: int, layers: int) -> None:
    """Raise RecipeError where a discriminator has nothing to normalize left in a window of that many voxels."""
    normalized = map_sides(window, layers)[-2]
    if normalized < 2:
        text = f"model.discriminator_layers {layers} end at {normalized} voxels of a window of {window}"
        raise RecipeError(f"{text}: at least 2 are needed")


def half_batches(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The scores (2N, ...) of real and fake that were shown as one batch, as float32."""
    real, fake = torch.chunk(scores.float(), 2)
    return real, fake
