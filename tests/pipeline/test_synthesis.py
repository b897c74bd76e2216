"""Sliding windows: exact where they look, blind where nothing is asked for, and safe when memory runs out."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.inferers import sliding_window_inference
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.bundle import INPUT_CHANNELS
from pipeline.device import Compute, DeviceError, choose_compute, is_out_of_memory, rungs, with_fallbacks
from pipeline.geometry import bounding_box
from pipeline.networks import NetworkSpec, build_network
from pipeline.synthesis import (
    INPUT_MASKS,
    network_input,
    place_windows,
    synthesize,
    window_weights,
)
from pipeline.types import District, DistrictMap, FloatVolume, GeometryError, Grid

CPU = torch.device("cpu")
SHAPES = st.tuples(*[st.integers(1, 18)] * 3)
OVERLAPS = st.sampled_from([0, 1, 3, 4, 5, 6])  # 7 of 8 would be 512 windows over each voxel: right, and slow


def tiny_network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build_network(NetworkSpec(width=4, depth=2, window=8)).eval().requires_grad_(False)


def noise(shape: tuple[int, ...], seed: int = 0) -> FloatVolume:
    return np.random.default_rng(seed).random(shape, dtype=np.float32)


def blob(shape: tuple[int, ...], seed: int = 0, share: float = 0.02) -> NDArray[np.bool_]:
    """A ragged mask with at least one voxel."""
    rng = np.random.default_rng(seed)
    mask = rng.random(shape) < share
    mask[tuple(int(rng.integers(n)) for n in shape)] = True
    return mask


def run(ct: FloatVolume, mask: NDArray[np.bool_], network: nn.Module, **changes: object) -> FloatVolume:
    arguments: dict[str, object] = {
        "window": 8,
        "overlap": 4,
        "blending": "gaussian",
        "batch": 5,
        "margin": 0,
        "device": CPU,
    }
    return synthesize(ct[np.newaxis], mask, network, **(arguments | changes))  # type: ignore[arg-type]


@settings(deadline=None, max_examples=40)
@given(
    shape=SHAPES,
    overlap=OVERLAPS,
    blending=st.sampled_from(["mean", "gaussian"]),
    margin=st.integers(0, 5),
    batch=st.integers(1, 40),
    seed=st.integers(0, 10),
)
def test_an_identity_network_gives_the_input_back(
    shape: tuple[int, int, int], overlap: int, blending: str, margin: int, batch: int, seed: int
) -> None:
    ct, mask = noise(shape, seed), blob(shape, seed)
    out = run(ct, mask, nn.Identity(), overlap=overlap, blending=blending, margin=margin, batch=batch)
    assert out.dtype == np.float32
    np.testing.assert_allclose(out[mask], ct[mask], atol=1e-5)
    looked_at = out != 0
    np.testing.assert_allclose(out[looked_at], ct[looked_at], atol=1e-5)


@settings(deadline=None, max_examples=40)
@given(shape=SHAPES, overlap=OVERLAPS, margin=st.integers(0, 5), seed=st.integers(0, 10))
def test_the_windows_cover_the_mask_and_each_contains_some_of_it(
    shape: tuple[int, int, int], overlap: int, margin: int, seed: int
) -> None:
    mask = blob(shape, seed)
    lattice = place_windows(mask, window=8, overlap=overlap, margin=margin)
    assert lattice is not None
    seen = np.zeros_like(mask)
    for start in lattice.starts + np.array(lattice.origin):
        window = tuple(slice(max(int(a), 0), max(int(a) + 8, 0)) for a in start)
        assert mask[window].any()
        seen[window] = True
    assert seen[mask].all()


@pytest.mark.parametrize("blending", ["mean", "gaussian"])
def test_skipping_equals_the_dense_result_where_air_is_constant(blending: str) -> None:
    """The dense result here is the definition, written with every window of the lattice and no skipping."""
    ct, network = noise((25, 18, 30)), tiny_network()
    mask = np.zeros(ct.shape, dtype=bool)
    mask[3:9, 2:6, 4:7] = mask[15:22, 12:17, 20:29] = True
    skipped = run(ct, mask, network, blending=blending)
    lattice = place_windows(mask, window=8, overlap=4, margin=0)
    every = place_windows(np.ones_like(mask), window=8, overlap=4, margin=0)
    assert lattice is not None
    assert every is not None
    assert len(lattice.starts) < len(every.starts)

    padded = np.pad(ct, 16)
    total, weight = np.zeros(padded.shape), np.zeros(padded.shape)
    weights = window_weights(8, blending).numpy()
    for start in lattice.starts + np.array(lattice.origin) + 16:
        window = tuple(slice(int(a), int(a) + 8) for a in start)
        with torch.inference_mode():
            total[window] += network(torch.from_numpy(padded[window].copy())[None, None])[0, 0].numpy() * weights
        weight[window] += weights
    dense = np.divide(total, weight, out=np.zeros_like(total), where=weight > 0)[16:-16, 16:-16, 16:-16]
    np.testing.assert_allclose(skipped, dense, atol=1e-6)


@pytest.mark.parametrize(("blending", "mode"), [("mean", "constant"), ("gaussian", "gaussian")])
def test_a_full_mask_agrees_with_monai(blending: str, mode: str) -> None:
    ct, network = noise((24, 20, 28)), tiny_network()  # 8 + 4 n along each axis: both place the same windows
    ours = run(ct, np.ones(ct.shape, dtype=bool), network, blending=blending)
    with torch.inference_mode():
        theirs = sliding_window_inference(
            torch.from_numpy(ct)[None, None], (8, 8, 8), 4, network, overlap=0.5, mode=mode, sigma_scale=0.125
        )
    np.testing.assert_allclose(ours, theirs[0, 0].numpy(), atol=2e-6)


def test_the_batch_does_not_change_the_result() -> None:
    ct, mask, network = noise((20, 20, 20)), blob((20, 20, 20)), tiny_network()
    np.testing.assert_allclose(run(ct, mask, network, batch=1), run(ct, mask, network, batch=64), atol=1e-6)


def test_the_same_input_gives_the_same_bytes_on_the_cpu() -> None:
    ct, mask, network = noise((24, 20, 20)), blob((24, 20, 20)), tiny_network()
    assert run(ct, mask, network).tobytes() == run(ct, mask, network).tobytes()


def test_bf16_stays_close_to_fp32() -> None:
    ct, mask, network = noise((16, 16, 16)), blob((16, 16, 16)), tiny_network()
    np.testing.assert_allclose(run(ct, mask, network, precision="bf16"), run(ct, mask, network), atol=0.01)


def test_an_empty_mask_asks_the_network_nothing() -> None:
    class Unwanted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("called")

    ct = noise((10, 10, 10))
    assert not run(ct, np.zeros(ct.shape, dtype=bool), Unwanted()).any()
    assert bounding_box(np.zeros((2, 2, 2), dtype=bool)) is None


def test_memory_follows_the_box_of_the_mask_not_the_volume() -> None:
    mask = np.zeros((200, 150, 150), dtype=bool)
    mask[90:100, 70:80, 60:75] = True
    lattice = place_windows(mask, window=8, overlap=4, margin=0)
    assert lattice is not None
    assert lattice.shape == (12, 12, 16)
    with_context = place_windows(mask, window=8, overlap=4)
    assert with_context is not None
    assert with_context.shape == (16, 16, 20)


def test_progress_counts_windows_to_the_end() -> None:
    reports: list[tuple[int, int]] = []
    run(
        noise((16, 16, 16)),
        np.ones((16, 16, 16), dtype=bool),
        nn.Identity(),
        batch=10,
        on_progress=lambda *r: reports.append(r),
    )
    assert reports == [(10, 27), (20, 27), (27, 27)]


def test_gaussian_weights_trust_the_middle_and_are_never_zero() -> None:
    weights = window_weights(32, "gaussian")
    assert weights.max() == weights[15, 15, 15] == pytest.approx(1, abs=0.03)
    assert weights.min() == pytest.approx(1e-3)
    torch.testing.assert_close(weights, weights.flip(0, 1, 2))


@pytest.mark.parametrize(
    "wrong",
    [{"overlap": 8}, {"overlap": -1}, {"batch": 0}, {"precision": "fp8"}, {"blending": "median"}],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(GeometryError):
        run(noise((8, 8, 8)), np.ones((8, 8, 8), dtype=bool), nn.Identity(), **wrong)


@pytest.mark.parametrize(
    ("ct", "mask"),
    [
        (noise((8, 8, 8)), np.ones((8, 8, 9), dtype=bool)),
        (noise((8, 8, 8)).astype(np.float64), np.ones((8, 8, 8), dtype=bool)),
        (noise((8, 8, 8)), np.ones((8, 8, 8), dtype=np.uint8)),
    ],
)
def test_arrays_that_do_not_fit_are_refused(ct: FloatVolume, mask: NDArray[np.bool_]) -> None:
    with pytest.raises(GeometryError):
        run(ct, mask, nn.Identity())


# --- what a network sees ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "input_mask", "expected"),
    [
        ("trunk", "body", [[0, 2, 2, 2, 0]]),
        ("trunk", "district", [[0, 2, 2, 0, 0]]),
        ("trunk", "channel", [[2, 2, 2, 2, 2], [0, 1, 1, 0, 0]]),
        ("trunk", "districts", [[0, 2, 2, 2, 0], [0, 0, 0, 1, 0], [0, 1, 1, 0, 0], [0] * 5, [0] * 5]),
        ("whole_body", "body", [[0, 2, 2, 2, 0]]),
        ("whole_body", "district", [[0, 2, 2, 2, 0]]),
        ("whole_body", "channel", [[2, 2, 2, 2, 2], [0, 1, 1, 1, 0]]),
        ("whole_body", "districts", [[0, 2, 2, 2, 0], [0, 0, 0, 1, 0], [0, 1, 1, 0, 0], [0] * 5, [0] * 5]),
    ],
)
def test_a_network_sees_what_it_was_trained_on(key: str, input_mask: str, expected: list[list[float]]) -> None:
    labels = np.array([0, District.TRUNK, District.TRUNK, District.HEAD, 0], dtype=np.uint8).reshape(5, 1, 1)
    grid = Grid(shape=labels.shape, spacing_mm=(4, 4, 4), origin_mm=(0, 0, 0), frame_of_reference_uid="1.2.3")
    districts = DistrictMap(labels=labels, grid=grid, segmenter="t", version="1", confidence={District.TRUNK: 1.0})
    ct = np.full(labels.shape, 2, dtype=np.float32)
    seen = network_input(ct, districts, District.TRUNK, key, input_mask)
    assert seen.dtype == np.float32
    assert seen.shape == (INPUT_CHANNELS[input_mask], *ct.shape)
    assert seen[:, :, 0, 0].tolist() == expected
    assert (ct == 2).all()


def test_every_input_mask_of_the_manifest_is_known_here() -> None:
    assert set(INPUT_MASKS) == set(INPUT_CHANNELS)


def test_an_unknown_input_mask_is_refused() -> None:
    grid = Grid(shape=(1, 1, 1), spacing_mm=(4, 4, 4), origin_mm=(0, 0, 0), frame_of_reference_uid="1.2.3")
    labels = np.ones((1, 1, 1), dtype=np.uint8)
    districts = DistrictMap(labels=labels, grid=grid, segmenter="t", version="1", confidence={})
    with pytest.raises(GeometryError, match="input_mask 'skin'"):
        network_input(np.ones((1, 1, 1), dtype=np.float32), districts, District.HEAD, "head", "skin")


def test_every_channel_of_a_window_reaches_the_network() -> None:
    class Second(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, 1:2]

    mask = blob((20, 18, 22))
    channels = np.stack([noise(mask.shape, 1), noise(mask.shape, 2)])
    out = synthesize(channels, mask, Second(), window=8, overlap=4, blending="gaussian", batch=5, device=CPU)
    np.testing.assert_allclose(out[mask], channels[1][mask], atol=1e-5)


# --- out of memory ---------------------------------------------------------------------------------------------


def needs_batch_of(limit: int, error: Callable[[], Exception]) -> Callable[[Compute], int]:
    def work(rung: Compute) -> int:
        if rung.batch > limit or rung.device.type != "cpu":
            raise error()
        return rung.batch

    return work


def cpu_allocator_error() -> RuntimeError:
    return RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")


def context_error() -> RuntimeError:
    # what the driver says when not even its own context fits beside another process
    return torch.AcceleratorError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA` to enable ...")


def cublas_error() -> RuntimeError:
    return RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


OUT_OF_MEMORY = [torch.OutOfMemoryError, MemoryError, cpu_allocator_error, context_error, cublas_error]


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_too_little_memory_means_fewer_windows_at_once(error: Callable[[], Exception]) -> None:
    said: list[str] = []
    first = Compute(device=CPU, precision="fp32", batch=16)
    result, rung = with_fallbacks(needs_batch_of(4, error), first, said.append)
    assert (result, rung.batch) == (4, 4)
    assert said == [
        "out of memory on cpu with 16 windows at once: 8 at once",
        "out of memory on cpu with 8 windows at once: 4 at once",
    ]


def test_a_gpu_without_memory_hands_over_to_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    said: list[str] = []
    first = Compute(device=torch.device("cuda:0"), precision="bf16", batch=2)
    result, rung = with_fallbacks(needs_batch_of(16, torch.OutOfMemoryError), first, said.append)
    assert (result, rung) == (16, Compute(device=CPU, precision="fp32", batch=16))
    assert said[-1] == "out of memory on cuda:0 with 1 windows at once: on the cpu"


def test_the_ladder_ends_with_one_window_on_the_cpu() -> None:
    ladder = list(rungs(Compute(device=torch.device("cuda:0"), precision="bf16", batch=3)))
    assert [(r.device.type, r.precision, r.batch) for r in ladder] == [
        ("cuda", "bf16", 3),
        ("cuda", "bf16", 1),
        ("cpu", "fp32", 16),
        ("cpu", "fp32", 8),
        ("cpu", "fp32", 4),
        ("cpu", "fp32", 2),
        ("cpu", "fp32", 1),
    ]
    with pytest.raises(MemoryError):
        with_fallbacks(needs_batch_of(0, MemoryError), ladder[-2], lambda _: None)


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    def work(_: Compute) -> None:
        raise RuntimeError("expected scalar type Float but found Half")

    said: list[str] = []
    with pytest.raises(RuntimeError, match="expected scalar type"):
        with_fallbacks(work, Compute(device=CPU, precision="fp32", batch=16), said.append)
    assert not said


def test_torch_says_in_known_words_that_the_machine_has_no_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**55, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def test_the_options_choose_the_device() -> None:
    assert choose_compute("cpu") == Compute(device=CPU, precision="fp32", batch=16)
    assert choose_compute("cpu", "bf16", 3) == Compute(device=CPU, precision="bf16", batch=3)
    assert choose_compute("cpu").name == "cpu"
    assert choose_compute("auto").device.type == ("cuda" if torch.cuda.is_available() else "cpu")


def full_gpu(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """A GPU on which the first question fails."""

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", fail)


@pytest.mark.parametrize("batch", [0, 3])
def test_a_gpu_that_is_full_before_the_job_begins_leaves_it_to_the_cpu(
    monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    full_gpu(monkeypatch, context_error())
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", torch.cuda.mem_get_info)  # it needs the context, too
    said: list[str] = []
    assert choose_compute(batch=batch, report=said.append) == Compute(device=CPU, precision="fp32", batch=16)
    assert said == ["out of memory on cuda:0 before the first window: on the cpu"]


def test_a_full_gpu_that_is_asked_for_by_name_and_other_faults_of_it_are_errors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    full_gpu(monkeypatch, context_error())
    with pytest.raises(RuntimeError, match="out of memory"):
        choose_compute("cuda")
    full_gpu(monkeypatch, RuntimeError("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        choose_compute("auto")


def test_a_gpu_that_is_not_there_is_named() -> None:
    with pytest.raises(DeviceError, match="cuda:99"):
        choose_compute("cuda:99")


@pytest.mark.gpu
def test_the_gpu_agrees_with_the_cpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    ct, mask = noise((40, 30, 30)), blob((40, 30, 30))
    gpu = torch.device("cuda", 0)
    np.testing.assert_allclose(
        run(ct, mask, tiny_network().to(gpu), device=gpu), run(ct, mask, tiny_network()), atol=1e-3
    )
