from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from pipeline.bundle import MANIFEST, BundleError, Manifest, bundle_path, load_bundle
from pipeline.networks import InterleavedUp, NetworkSpec, OneChannelHead, ResNet3d, build_network


@pytest.mark.parametrize(("channels_in", "channels_out"), [(1, 1), (3, 2)])
def test_the_interleaved_layer_equals_the_transposed_convolution(channels_in: int, channels_out: int) -> None:
    torch.manual_seed(0)
    transposed = nn.ConvTranspose3d(channels_in, channels_out, kernel_size=4, stride=2, padding=1)
    layer = InterleavedUp(channels_in, channels_out)
    layer.set_from_transposed(transposed.weight.detach(), transposed.bias.detach())  # type: ignore[union-attr]
    x = torch.randn(2, channels_in, 3, 4, 5)
    torch.testing.assert_close(layer(x), transposed(x), rtol=0, atol=1e-6)


def test_the_head_equals_a_plain_convolution_with_its_gradients() -> None:
    torch.manual_seed(0)
    head = OneChannelHead(3)
    plain = nn.Sequential(nn.ReflectionPad3d(1), nn.Conv3d(3, 1, 3))
    plain[1].load_state_dict(head.state_dict())
    x = torch.randn(2, 3, 4, 6, 8)
    found, expected = head(x), plain(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    for out in (found, expected):
        (out * torch.arange(out.numel()).view(out.shape) / out.numel()).sum().backward()
    torch.testing.assert_close(head.weight.grad, plain[1].weight.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(head.bias.grad, plain[1].bias.grad)  # type: ignore[union-attr]


SPECS = [
    NetworkSpec(width=2),
    NetworkSpec(width=2, in_channels=5),
    NetworkSpec(architecture="resnet3d", width=2, depth=2, blocks=2),
    NetworkSpec(architecture="resnet3d", width=2, depth=4, in_channels=2),
]
every_spec = pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.architecture}-{s.in_channels}")


def windows(spec: NetworkSpec, count: int) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.rand(count, spec.in_channels, 32, 32, 32)


def fresh(spec: NetworkSpec) -> nn.Module:
    torch.manual_seed(0)
    return build_network(spec).eval()


@every_spec
@torch.inference_mode()
def test_a_generator_makes_one_channel_that_stays_in_0_to_1(spec: NetworkSpec) -> None:
    out = fresh(spec)(windows(spec, 2))
    assert out.shape == (2, 1, 32, 32, 32)
    assert 0 <= out.min() <= out.max() <= 1
    assert out.mean() < 0.1  # it starts near the body's usual uptake


@every_spec
@torch.inference_mode()
def test_every_input_channel_is_looked_at(spec: NetworkSpec) -> None:
    network, seen = fresh(spec), windows(spec, 1)
    before = network(seen)
    for channel in range(spec.in_channels):
        other = seen.clone()
        other[:, channel] = 1 - other[:, channel]
        assert not torch.equal(network(other), before)


@every_spec
@torch.inference_mode()
def test_windows_in_one_batch_do_not_change_each_other(spec: NetworkSpec) -> None:
    network, seen = fresh(spec), windows(spec, 3)
    alone = torch.cat([network(w[None]) for w in seen])
    torch.testing.assert_close(network(seen), alone, rtol=0, atol=1e-5)


@every_spec
@torch.inference_mode()
def test_even_air_alone_gives_finite_uptake(spec: NetworkSpec) -> None:
    assert fresh(spec)(torch.zeros(1, spec.in_channels, 32, 32, 32)).isfinite().all()


@every_spec
def test_weights_start_narrow_and_biases_at_zero_but_the_last(spec: NetworkSpec) -> None:
    torch.manual_seed(0)
    network = build_network(spec.model_copy(update={"width": 8}), resting_logit=1.0)
    biases = 0.0
    for module in network.modules():
        if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):  # OneChannelHead too
            assert module.weight.mean().item() == pytest.approx(0, abs=0.004)
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.15)
            biases += 0.0 if module.bias is None else module.bias.mean().item()
    assert biases == 1.0


@pytest.mark.parametrize("window", [4, 8, 16])
def test_a_resnet_fits_the_smallest_window_that_its_depth_allows(window: int) -> None:
    depth = window.bit_length() - 2
    spec = NetworkSpec(architecture="resnet3d", width=2, depth=depth, blocks=1, window=window)
    network = build_network(spec)
    out = network(torch.rand(1, 1, window, window, window))
    assert out.shape[-1] == window
    out.mean().backward()
    assert all(p.grad is not None for p in network.parameters())


def test_a_resnet_has_the_blocks_and_levels_of_its_spec() -> None:
    network = build_network(NetworkSpec(architecture="resnet3d", width=2, depth=3, blocks=5))
    assert isinstance(network, ResNet3d)
    assert (len(network.blocks), len(network.encoder), len(network.decoder)) == (5, 3, 3)


def test_the_shipped_weights_fit() -> None:
    """Names in a U-Net's state dict must not change: bundles out there would no longer load."""
    bundle = load_bundle(bundle_path("phantom"))
    for key in bundle.keys:
        network = bundle.network(key, torch.device("cpu"))
        spec = bundle.manifest.networks[key].spec
        with torch.inference_mode():
            assert network(windows(spec, 1)).isfinite().all()


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    shutil.copytree(bundle_path("phantom"), tmp_path / "bundle")
    manifest = json.loads((tmp_path / "bundle" / MANIFEST).read_text())
    key = next(iter(manifest["networks"]))
    other = {"architecture": "resnet3d", "width": 4, "depth": 2, "blocks": 1}
    manifest["networks"][key]["spec"] |= other
    sealed = Manifest.model_validate(manifest).sealed()  # whoever wrote it believed it
    (tmp_path / "bundle" / MANIFEST).write_text(sealed.model_dump_json())
    bundle = load_bundle(tmp_path / "bundle")
    with pytest.raises(BundleError, match="do not fit") as caught:
        bundle.network(key, torch.device("cpu"))
    assert caught.value.code == "weights_unfit"


def test_weights_of_earlier_layers_are_refused_in_words(tmp_path: Path) -> None:
    shutil.copytree(bundle_path("phantom"), tmp_path / "bundle")
    path = tmp_path / "bundle" / MANIFEST
    now, before = (f'"version": {n},\n        "in_channels"' for n in (2, 1))
    path.write_text(path.read_text().replace(now, before))
    with pytest.raises(BundleError, match="layers of version 1, this software has version 2: train and export again"):
        load_bundle(tmp_path / "bundle")


@pytest.mark.parametrize(("window", "depth"), [(32, 5), (33, 4), (16, 4)])
def test_a_network_that_would_end_below_two_voxels_is_refused(window: int, depth: int) -> None:
    with pytest.raises(ValidationError, match="at least 2"):
        NetworkSpec(window=window, depth=depth)


def test_smaller_and_deeper_networks_can_be_built() -> None:
    for spec in (NetworkSpec(width=1, depth=1, window=4), NetworkSpec(width=1, depth=3, window=16)):
        side = spec.window
        assert build_network(spec)(torch.rand(1, 1, side, side, side)).shape == (1, 1, side, side, side)
