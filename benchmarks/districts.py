"""The built-in segmenter on a large CT, beside a plain body mask by SimpleITK: python benchmarks/districts.py

A phantom from head to foot, brought to 512 x 512 x 600 voxels with a scanner's noise. The peer is what comes first in
any segmentation of the body: a threshold, an opening, the largest connected part, holes filled, at full resolution.
Every measurement has a process of its own, so that its peak of memory is its own; it includes the CT (630 MB).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import SimpleITK

from pipeline.districts.builtin import segment_coarse, shrink, working_grid
from pipeline.geometry import grid_at_spacing, resample
from pipeline.types import Grid, LabelVolume
from training.phantom import PhantomSpec, make_phantom

SHAPE = (600, 512, 512)
NOISE_HU = 20.0
BUNDLE_MM = (4.0, 4.0, 4.0)  # the grid of the shipped bundle's networks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", choices=sorted(WAYS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measured(arguments.one, arguments.folder)))
        return
    with tempfile.TemporaryDirectory() as temp:
        grid = write_volume(Path(temp))
        print(f"CT of {SHAPE} voxels of {tuple(round(s, 2) for s in grid.spacing_mm)} mm, {os.cpu_count()} CPUs")
        rounds = [{name: in_a_process(name, Path(temp)) for name in WAYS} for _ in range(arguments.rounds)]
    for name in WAYS:
        seconds, cpu, gib = (statistics.median(r[name][key] for r in rounds) for key in ("seconds", "cpu", "gib"))
        print(f"{name:9} {seconds:6.2f} s, {cpu:6.2f} s of CPU, peak {gib:.2f} GiB")
    ratio = statistics.median(r["ours"]["cpu"] / r["plain"]["cpu"] for r in rounds)
    print(f"ours / plain body mask, CPU seconds: {ratio:.2f}; districts found: {rounds[0]['ours']['found']}")


def write_volume(folder: Path) -> Grid:
    """hu.npy (float32) and the grid: a phantom on a field of 500 mm and its whole height."""
    phantom = make_phantom(PhantomSpec(seed=1))
    dz, dy, dx = phantom.grid.extent_mm
    grid = Grid(
        shape=SHAPE,
        spacing_mm=(dz / SHAPE[0], max(dy, dx) / SHAPE[1], max(dy, dx) / SHAPE[2]),
        origin_mm=phantom.grid.origin_mm,
        frame_of_reference_uid=phantom.grid.frame_of_reference_uid,
    )
    hu = resample(phantom.hu, phantom.grid, grid, fill=-1024.0)
    noise = np.random.default_rng(0).normal(0.0, NOISE_HU, SHAPE[1:]).astype(np.float32)
    for number, plane in enumerate(hu):  # the same noise shifted: 157 million random numbers take long
        plane += np.roll(noise, number * 37, axis=(0, 1))
    np.save(folder / "hu.npy", hu)
    (folder / "grid.json").write_text(json.dumps({"spacing": grid.spacing_mm, "origin": grid.origin_mm}))
    return grid


def in_a_process(name: str, folder: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", name, "--folder", str(folder)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def measured(name: str, folder: Path) -> dict[str, object]:
    hu = np.load(folder / "hu.npy")
    told = json.loads((folder / "grid.json").read_text())
    grid = Grid(
        shape=SHAPE,
        spacing_mm=tuple(told["spacing"]),
        origin_mm=tuple(told["origin"]),
        frame_of_reference_uid="1.2.3",
    )
    began, cpu = time.perf_counter(), time.process_time()
    labels = WAYS[name](hu, grid)
    return {
        "seconds": time.perf_counter() - began,
        "cpu": time.process_time() - cpu,
        "gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "found": np.unique(labels[labels > 0]).tolist(),
    }


def ours(hu: np.ndarray, grid: Grid) -> LabelVolume:
    coarse = working_grid(grid)
    labels, _, _ = segment_coarse(shrink(hu, grid, coarse))
    return resample(labels, coarse, grid_at_spacing(grid, BUNDLE_MM), fill=0, nearest=True)  # as a job does


def plain(hu: np.ndarray, _: Grid) -> np.ndarray:
    mask = SimpleITK.BinaryThreshold(SimpleITK.GetImageFromArray(hu), -300.0, 1e5)
    mask = SimpleITK.BinaryMorphologicalOpening(mask, [2, 2, 2])
    parts = SimpleITK.RelabelComponent(SimpleITK.ConnectedComponent(mask), sortByObjectSize=True)
    return SimpleITK.GetArrayFromImage(SimpleITK.BinaryFillhole(parts == 1))


WAYS = {"ours": ours, "plain": plain}

if __name__ == "__main__":
    main()
