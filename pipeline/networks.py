"""The generators that turn a CT window into a PET window: a 3D U-Net after Pix2Pix, a 3D ResNet after CycleGAN.

The paper (arXiv 2503.15555) names the networks and not their sizes. Depth 4 at a window of 32 voxels ends at
2 voxels; one more level would leave a single number per channel, with nothing for instance normalization to do.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise, product
from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from torch import Tensor, nn

MAX_WIDTH_FACTOR = 8  # deeper levels stop growing at eight times the width, as in Pix2Pix
SMALLEST_MAP = 2  # voxels per side at the bottom of the U
RESTING_LOGIT = -3.5  # sigmoid 0.03, SUV 0.6 of 20: the body's usual uptake, so that training starts near it
LAYERS = 2  # raised when weights of before no longer fit
KERNEL = 3  # where nothing is strided, a ResNet's stem and head too; see ResNet3d


class NetworkSpec(BaseModel):
    """What is needed to build a generator again: stored in the bundle's manifest."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    architecture: Literal["unet3d", "resnet3d"] = "unet3d"
    version: int = LAYERS  # of the layers that an architecture stands for
    in_channels: int = Field(default=1, ge=1, le=8)
    width: int = Field(default=16, ge=1, le=512)
    depth: int = Field(default=4, ge=1, le=8)
    blocks: int = Field(default=6, ge=1, le=16)  # residual, of a resnet3d; CycleGAN has 6 for its smaller images
    window: int = Field(default=32, ge=4, le=512)

    @field_validator("version")
    @classmethod
    def _layers_are_these(cls, version: int) -> int:
        if version != LAYERS:
            raise ValueError(f"layers of version {version}, this software has version {LAYERS}: train and export again")
        return version

    @model_validator(mode="after")
    def _bottom_is_wide_enough(self) -> NetworkSpec:
        bottom, rest = divmod(self.window, 2**self.depth)
        if rest or bottom < SMALLEST_MAP:
            raise ValueError(
                f"window {self.window} and depth {self.depth} end at {self.window / 2**self.depth} voxels: "
                f"a whole number of at least {SMALLEST_MAP} is needed"
            )
        return self


class InterleavedUp(nn.Module):
    """ConvTranspose3d(kernel 4, stride 2, padding 1) written as one 2x2x2 convolution and an interleave.

    An output voxel of even index 2i sees the inputs i-1 and i, one of odd index 2i+1 sees i and i+1: two taps per
    axis either way. So each of the eight parities is a 2x2x2 convolution of its own, and all eight are computed
    at once as output channels. Equal to the transposed convolution to rounding, and much faster on a CPU when
    there is one output channel.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.conv = nn.Conv3d(in_channels, 8 * out_channels, kernel_size=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, D, H, W) to (N, out_channels, 2D, 2H, 2W)."""
        n, _, d, h, w = x.shape
        taps = self.conv(x).view(n, 8, self.out_channels, d + 1, h + 1, w + 1)
        parts = [
            taps[:, index, :, pz : pz + d, py : py + h, px : px + w]
            for index, (pz, py, px) in enumerate(product((0, 1), repeat=3))
        ]
        stacked = torch.stack(parts, dim=2).view(n, self.out_channels, 2, 2, 2, d, h, w)
        return stacked.permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(n, self.out_channels, 2 * d, 2 * h, 2 * w)

    @torch.no_grad()
    def set_from_transposed(self, weight: Tensor, bias: Tensor) -> None:
        """Take over the weights (in, out, 4, 4, 4) and bias (out,) of the equal ConvTranspose3d."""
        for index, parity in enumerate(product((0, 1), repeat=3)):
            # output 2i+p takes input i-1+p+t through kernel tap 3-p-2t (t = 0, 1)
            z, y, x = ([3 - p, 1 - p] for p in parity)
            taps = weight[:, :, z][:, :, :, y][:, :, :, :, x]
            start = index * self.out_channels
            self.conv.weight[start : start + self.out_channels] = taps.transpose(0, 1)
        if self.conv.bias is not None:
            self.conv.bias.copy_(bias.repeat(8))


def _down(inputs: int, outputs: int, *, normalize: bool) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv3d(inputs, outputs, kernel_size=4, stride=2, padding=1, bias=not normalize)]
    if normalize:
        layers.append(nn.InstanceNorm3d(outputs, affine=True))
    return nn.Sequential(*layers, nn.LeakyReLU(0.2))


def _up(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.ConvTranspose3d(inputs, outputs, kernel_size=4, stride=2, padding=1, bias=False),
        nn.InstanceNorm3d(outputs, affine=True),
        nn.ReLU(),
    )


class UNet3d(nn.Module):
    """Encoder and decoder of `depth` strided levels with skip connections; sigmoid output in [0, 1].

    One departure from Pix2Pix: a 3x3x3 convolution at half the resolution before the head. Pix2Pix' last layer makes
    eight voxels of linear sums of what it found at half the resolution, which draws fat too hot and muscle too cold
    at every border between them. As in Pix2Pix, the first and the innermost level of the encoder are not normalized.
    A generator without any normalization was tried on phantoms: the head came out the same, the trunk learned more
    slowly (no bladder yet after 1,200 steps).
    """

    def __init__(self, spec: NetworkSpec, resting_logit: float = RESTING_LOGIT) -> None:
        super().__init__()
        widths = [spec.width * min(2**level, MAX_WIDTH_FACTOR) for level in range(spec.depth)]
        self.encoder = nn.ModuleList(
            _down(inputs, outputs, normalize=0 < level < spec.depth - 1)
            for level, (inputs, outputs) in enumerate(zip([spec.in_channels, *widths[:-1]], widths, strict=True))
        )
        self.decoder = nn.ModuleList(
            _up(widths[level] * (1 if level == spec.depth - 1 else 2), widths[level - 1])
            for level in range(spec.depth - 1, 0, -1)
        )
        channels = widths[0] * (2 if spec.depth > 1 else 1)
        self.refine = nn.Sequential(nn.Conv3d(channels, channels, KERNEL, padding=1), nn.LeakyReLU(0.2))
        self.head = InterleavedUp(channels, 1)
        self.apply(initialize_weights)
        _set_bias(self.head.conv, resting_logit)

    def forward(self, x: Tensor) -> Tensor:
        """Windows (N, in_channels, w, w, w) in [0, 1] to windows (N, 1, w, w, w) in [0, 1]."""
        skips: list[Tensor] = []
        for down in self.encoder:
            x = down(x)
            skips.append(x)
        skips.pop()
        for up in self.decoder:
            x = torch.cat([up(x), skips.pop()], dim=1)
        return torch.sigmoid(self.head(self.refine(x)))


def _reflected(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.ReflectionPad3d(1), nn.Conv3d(inputs, outputs, KERNEL, bias=False))


def _normalized(convolution: nn.Module, channels: int) -> nn.Sequential:
    return nn.Sequential(convolution, nn.InstanceNorm3d(channels, affine=True), nn.ReLU())


class OneChannelHead(nn.Conv3d):
    """Conv3d(in_channels, 1, kernel 3) after reflection padding, written as one strided convolution and an interleave.

    The eight voxels of a 2x2x2 block see a common 4x4x4 neighborhood: each is one output channel of a convolution of
    kernel 4 and stride 2, the 3x3x3 kernel at one of eight places in it. Equal, and three times as fast on a CPU,
    which has little use for a single output channel. Sides must be even.
    """

    def __init__(self, in_channels: int) -> None:
        super().__init__(in_channels, 1, KERNEL)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, D, H, W) to (N, 1, D, H, W)."""
        n, _, d, h, w = x.shape
        kernels = [
            F.pad(self.weight[0], (right, 1 - right, down, 1 - down, back, 1 - back))
            for back, down, right in product((0, 1), repeat=3)
        ]
        padded = F.pad(x, (1,) * 6, mode="reflect")
        bias = None if self.bias is None else self.bias.expand(8)
        parts = F.conv3d(padded, torch.stack(kernels), bias, stride=2).view(n, 2, 2, 2, d // 2, h // 2, w // 2)
        return parts.permute(0, 4, 1, 5, 2, 6, 3).reshape(n, 1, d, h, w)


class ResidualBlock(nn.Module):
    """x + norm(conv(relu(norm(conv(x))))), 3x3x3, reflection padding: CycleGAN's block after Johnson et al. 2016."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = _normalized(_reflected(channels, channels), channels)
        self.second = nn.Sequential(_reflected(channels, channels), nn.InstanceNorm3d(channels, affine=True))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, D, H, W) to the same shape."""
        out: Tensor = x + self.second(self.first(x))
        return out


class ResNet3d(nn.Module):
    """CycleGAN's generator (Zhu et al. 2017, appendix 7.2) in 3D: stem, strided levels, residual blocks, and back.

    Sigmoid output in [0, 1] where CycleGAN has tanh. Two departures. Stem and head have kernels of 3 and not 7: at
    width 8 and a window of 32, forward and back on one CPU core took 1.8 times as long with 5 and 3.5 times with 7,
    and the blocks at a quarter of the resolution see past the window as it is. And a level up is a
    transposed convolution of kernel 4 and not 3: every output voxel gets the same number of taps, so that no
    checkerboard is drawn (Odena et al. 2016).
    """

    def __init__(self, spec: NetworkSpec, resting_logit: float = RESTING_LOGIT) -> None:
        super().__init__()
        widths = [spec.width * min(2**level, MAX_WIDTH_FACTOR) for level in range(spec.depth + 1)]
        levels = list(pairwise(widths))
        self.stem = _normalized(_reflected(spec.in_channels, widths[0]), widths[0])
        self.encoder = nn.Sequential(
            *(_normalized(nn.Conv3d(a, b, 3, stride=2, padding=1, bias=False), b) for a, b in levels)
        )
        self.blocks = nn.Sequential(*(ResidualBlock(widths[-1]) for _ in range(spec.blocks)))
        self.decoder = nn.Sequential(*(_up(b, a) for a, b in reversed(levels)))
        self.head = OneChannelHead(widths[0])
        self.apply(initialize_weights)
        _set_bias(self.head, resting_logit)

    def forward(self, x: Tensor) -> Tensor:
        """Windows (N, in_channels, w, w, w) in [0, 1] to windows (N, 1, w, w, w) in [0, 1]."""
        x = self.blocks(self.encoder(self.stem(x)))
        return torch.sigmoid(self.head(self.decoder(x)))


def _set_bias(convolution: nn.Module, value: float) -> None:
    if isinstance(convolution, nn.Conv3d) and convolution.bias is not None:
        nn.init.constant_(convolution.bias, value)


def initialize_weights(module: nn.Module) -> None:
    """Normal weights with sigma 0.02 and no bias, as Pix2Pix and CycleGAN start; for `nn.Module.apply`."""
    if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


ARCHITECTURES: Mapping[str, type[UNet3d] | type[ResNet3d]] = {"unet3d": UNet3d, "resnet3d": ResNet3d}


def build_network(spec: NetworkSpec, *, resting_logit: float = RESTING_LOGIT) -> nn.Module:
    """A generator with fresh weights: (N, in_channels, window, window, window) to one channel, all in [0, 1].

    `resting_logit` is the bias of the last layer: the sigmoid of it is what the generator answers at first.
    """
    return ARCHITECTURES[spec.architecture](spec, resting_logit)
