"""The conditional discriminator of Pix2Pix: it judges small regions of a (CT, PET) pair.

Two strided layers see 34 voxels, which fits a window of 32; three would look past its border.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """PatchGAN with `layers` strided levels; logits, no sigmoid (binary cross-entropy works on logits)."""

    def __init__(self, width: int = 64, layers: int = 2) -> None:
        super().__init__()
        if width < 1 or layers < 1:
            raise ValueError(f"discriminator of width {width} and {layers} strided layers: both must be at least 1")
        parts: list[nn.Module] = [nn.Conv3d(2, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        inputs = width
        for level in range(1, layers + 1):
            outputs = width * min(2**level, 8)
            stride = 2 if level < layers else 1
            parts += [
                nn.Conv3d(inputs, outputs, 4, stride=stride, padding=1, bias=False),
                nn.InstanceNorm3d(outputs, affine=True),
                nn.LeakyReLU(0.2),
            ]
            inputs = outputs
        parts.append(nn.Conv3d(inputs, 1, 4, stride=1, padding=1))
        self.net = nn.Sequential(*parts)
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.normal_(module.weight, 0.0, 0.02)

    def forward(self, ct: Tensor, pet: Tensor) -> Tensor:
        """CT and PET windows (N, 1, w, w, w) in [0, 1] to a map of logits (N, 1, m, m, m)."""
        logits: Tensor = self.net(torch.cat([ct, pet], dim=1))
        return logits
