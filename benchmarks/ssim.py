"""Our separable SSIM against MONAI's on one region, side by side in one run: the times, their ratio, the difference.

    python benchmarks/ssim.py                     # 200 x 150 x 250 voxels, one thread each
    python benchmarks/ssim.py --threads 2

Ours runs in one thread whatever `--threads` says. MONAI computes its map where the window fits, ours everywhere
(edges mirrored), so the maps are compared where both have a value.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from monai.metrics.regression import compute_ssim_and_cs

from training.evaluation.metrics import REACH, SIGMA, WINDOW, ssim_map


def timed(call: Callable[[], Any], repeats: int) -> tuple[Any, float]:
    """The last result and the shortest time in seconds."""
    best, result = float("inf"), None
    for _ in range(repeats):
        began = time.perf_counter()
        result = call()
        best = min(best, time.perf_counter() - began)
    return result, best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=(200, 150, 250))
    parser.add_argument("--threads", type=int, default=1, help="of torch, for MONAI")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rng = np.random.default_rng(0)
    real = rng.random(options.shape, dtype=np.float32)
    fake = np.clip(real + rng.normal(0, 0.1, real.shape).astype(np.float32), 0, 1)
    x, y = (torch.from_numpy(volume)[None, None] for volume in (fake, real))

    ours, seconds = timed(lambda: ssim_map(fake, real), options.repeats)
    theirs, seconds_monai = timed(
        lambda: compute_ssim_and_cs(
            x, y, spatial_dims=3, kernel_size=(WINDOW,) * 3, kernel_sigma=(SIGMA,) * 3, data_range=1.0
        )[0],
        max(1, options.repeats - 2),
    )
    inner = ours[REACH:-REACH, REACH:-REACH, REACH:-REACH]
    difference = float(np.abs(inner - theirs[0, 0].numpy()).max())
    print(f"region {' x '.join(map(str, options.shape))} voxels, float32")
    print(f"ours, separable   {seconds:8.2f} s")
    print(f"MONAI {options.threads} thread(s) {seconds_monai:8.2f} s")
    print(f"ratio             {seconds_monai / seconds:8.1f}")
    print(f"largest difference of the maps {difference:.1e} (1e-4 is allowed)")


if __name__ == "__main__":
    main()
