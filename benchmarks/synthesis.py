"""Our window loop against MONAI's `sliding_window_inference`, paired in one run: python benchmarks/synthesis.py

Both blend the same network over the same body with the same windows; MONAI computes all of them, ours those with a
voxel of the body. Rounds are interleaved, so that a busy machine slows both, and the ratio of medians is what
counts. `--dense` gives ours a full mask too: the loop alone.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from monai.inferers import sliding_window_inference

from pipeline.device import choose_compute, set_threads
from pipeline.networks import NetworkSpec, build_network
from pipeline.synthesis import place_windows, synthesize

WINDOW, OVERLAP = 32, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shape", type=int, nargs=3, default=(208, 160, 160))
    parser.add_argument("--monai-batch", type=int, default=4)
    parser.add_argument("--dense", action="store_true")
    arguments = parser.parse_args()
    set_threads(0)
    compute = choose_compute(precision="fp32")
    torch.manual_seed(0)
    spec = NetworkSpec(width=arguments.width, window=WINDOW)
    network = build_network(spec).eval().requires_grad_(False).to(compute.device)
    mask = np.ones(arguments.shape, dtype=bool) if arguments.dense else body(tuple(arguments.shape))
    ct = np.where(mask, np.random.default_rng(0).random(mask.shape, dtype=np.float32), np.float32(0))

    def ours() -> np.ndarray:
        return synthesize(
            ct[np.newaxis], mask, network, window=WINDOW, overlap=OVERLAP, blending="gaussian", batch=compute.batch,
            device=compute.device, margin=0,
        )  # fmt: skip

    def monai() -> np.ndarray:
        with torch.inference_mode():
            volume = torch.from_numpy(ct)[None, None].to(compute.device)
            size = (WINDOW,) * 3
            out = sliding_window_inference(volume, size, arguments.monai_batch, network, 0.5, mode="gaussian")
            return np.asarray(out[0, 0].cpu())

    seconds = interleave({"ours": ours, "monai": monai}, arguments.rounds)
    lattice = place_windows(mask, window=WINDOW, overlap=OVERLAP, margin=0)
    every = place_windows(np.ones_like(mask), window=WINDOW, overlap=OVERLAP, margin=0)
    assert lattice is not None
    assert every is not None
    median = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"{compute.name}, {torch.get_num_threads()} threads, width {spec.width}, volume {mask.shape}")
    print(f"ours   {median['ours']:7.2f} s  {len(lattice.starts)} windows, {compute.batch} at once")
    print(f"monai  {median['monai']:7.2f} s  {len(every.starts)} windows, {arguments.monai_batch} at once")
    print(f"ratio  {median['monai'] / median['ours']:7.2f}  (monai / ours, {arguments.rounds} rounds)")


def body(shape: tuple[int, ...]) -> np.ndarray:
    """An elliptic cylinder that fills half of the field of view's width, two thirds of its height."""
    z, y, x = np.ogrid[tuple(slice(-1, 1, n * 1j) for n in shape)]
    return (np.abs(z) < 0.95) & ((y / 0.55) ** 2 + (x / 0.8) ** 2 < 1)


def interleave(work: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, function in work.items():
            began = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - began)
    return seconds


if __name__ == "__main__":
    main()
