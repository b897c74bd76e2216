from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from pipeline.networks import InterleavedUp, NetworkSpec, build_network


@pytest.mark.parametrize(("channels_in", "channels_out"), [(1, 1), (3, 2)])
def test_the_interleaved_layer_equals_the_transposed_convolution(channels_in: int, channels_out: int) -> None:
    torch.manual_seed(0)
    transposed = nn.ConvTranspose3d(channels_in, channels_out, kernel_size=4, stride=2, padding=1)
    layer = InterleavedUp(channels_in, channels_out)
    layer.set_from_transposed(transposed.weight.detach(), transposed.bias.detach())  # type: ignore[union-attr]
    x = torch.randn(2, channels_in, 3, 4, 5)
    torch.testing.assert_close(layer(x), transposed(x), rtol=0, atol=1e-6)


def test_a_generator_keeps_the_shape_and_stays_in_0_to_1() -> None:
    torch.manual_seed(0)
    network = build_network(NetworkSpec(width=2)).eval()
    with torch.inference_mode():
        out = network(torch.rand(2, 1, 32, 32, 32))
    assert out.shape == (2, 1, 32, 32, 32)
    assert 0 <= out.min() <= out.max() <= 1
    assert out.mean() < 0.1  # it starts near the body's usual uptake


def test_windows_in_one_batch_do_not_change_each_other() -> None:
    torch.manual_seed(0)
    network = build_network(NetworkSpec(width=2)).eval()
    windows = torch.rand(3, 1, 32, 32, 32)
    with torch.inference_mode():
        together = network(windows)
        alone = torch.cat([network(w[None]) for w in windows])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_even_air_alone_gives_finite_uptake() -> None:
    network = build_network(NetworkSpec(width=2)).eval()
    with torch.inference_mode():
        assert network(torch.zeros(1, 1, 32, 32, 32)).isfinite().all()


@pytest.mark.parametrize(("window", "depth"), [(32, 5), (33, 4), (16, 4)])
def test_a_network_that_would_end_below_two_voxels_is_refused(window: int, depth: int) -> None:
    with pytest.raises(ValidationError, match="at least 2"):
        NetworkSpec(window=window, depth=depth)


def test_smaller_and_deeper_networks_can_be_built() -> None:
    for spec in (NetworkSpec(width=1, depth=1, window=4), NetworkSpec(width=1, depth=3, window=16)):
        side = spec.window
        assert build_network(spec)(torch.rand(1, 1, side, side, side)).shape == (1, 1, side, side, side)
