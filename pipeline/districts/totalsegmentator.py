"""Districts by TotalSegmentator: its task `body` tells trunk from extremities, the bones of `total` do the rest.

Both tasks run in their fast variants (3 mm and 6 mm), or in the full ones where only those weights are there. The
weights are looked for offline; the process of the segmenter cannot reach the network, and its usage statistics are
switched off before the package is imported.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import redirect_stdout
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.districts.outside import checked, finished, require_package, run_apart
from pipeline.districts.totalsegmentator_rule import BODY_CLASSES, TOTAL_CLASSES, combined
from pipeline.errors import SegmenterUnavailable
from pipeline.geometry import resample
from pipeline.types import OUTSIDE, CtVolume, DistrictMap, DistrictOptions, FloatVolume, Grid

NAME = "totalsegmentator"
WORK = f"{__name__}:label"
# the data sets (nnU-Net's numbers) of each task, fast variant first: TotalSegmentator 2, map_tasks_config.py
WEIGHTS: Mapping[str, Mapping[bool, tuple[int, ...]]] = {
    "total": {True: (297,), False: (291, 292, 293, 294, 295)},
    "body": {True: (300,), False: (299,)},
}
NO_NETWORK = "http://127.0.0.1:9"  # nothing answers at the discard port


def segment(ct: CtVolume, grid: Grid, options: DistrictOptions) -> DistrictMap:
    """Districts of `ct` on `grid`. Confidence is `outside.finished`'s, with a certainty of 1: it tells none of its own.

    Raises SegmenterUnavailable (see `outside`; segmenter_weights_missing), DistrictError (no_body).
    """
    require_package("totalsegmentator", "totalsegmentator")
    weights = options.totalsegmentator_weights or default_weights()
    fast = {task: choose_variant(weights, task) for task in WEIGHTS}
    settings = {"fast": fast, "device": options.device}
    answer = run_apart(WORK, ct, settings, options=options, environment=offline(weights))
    total, body = (
        resample(checked(answer.maps[task], ct.grid, classes), ct.grid, grid, fill=OUTSIDE, nearest=True)
        for task, classes in (("total", TOTAL_CLASSES), ("body", BODY_CLASSES))
    )
    return finished(
        combined(total, body, grid.spacing_mm),
        ct,
        grid,
        segmenter=NAME,
        version=" ".join(
            [answer.facts["version"], *(f"{task}-fast" if is_fast else task for task, is_fast in fast.items())]
        ),
        certainty={},
    )


def default_weights() -> Path:
    """Where TotalSegmentator 2 looks for its weights: TOTALSEG_WEIGHTS_PATH, TOTALSEG_HOME_DIR, the home folder."""
    if path := os.environ.get("TOTALSEG_WEIGHTS_PATH"):
        return Path(path)
    home = os.environ.get("TOTALSEG_HOME_DIR")
    return (Path(home) if home else Path.home() / ".totalsegmentator") / "nnunet" / "results"


def choose_variant(weights: Path, task: str) -> bool:
    """True for a task's fast variant, False for the full one, by the weights that are there: fast if both.

    Raises SegmenterUnavailable (segmenter_weights_missing).
    """
    for fast, numbers in WEIGHTS[task].items():
        if all(any(weights.glob(f"Dataset{number}_*/*/fold_*")) for number in numbers):
            return fast
    fast_ones, full_ones = (", ".join(f"Dataset{n}" for n in numbers) for numbers in WEIGHTS[task].values())
    raise SegmenterUnavailable(
        "segmenter_weights_missing",
        f"no weights for its task {task}: {fast_ones} (or {full_ones}) expected in the folder of "
        "pipeline.totalsegmentator_weights, TOTALSEG_WEIGHTS_PATH or ~/.totalsegmentator/nnunet/results",
    )


def offline(weights: Path) -> dict[str, str]:
    """The environment of its process: where the weights are, and a proxy that leads nowhere."""
    proxies = {f"{scheme}_proxy": NO_NETWORK for scheme in ("http", "https", "all")}
    return {
        **proxies,
        **{name.upper(): value for name, value in proxies.items()},
        "no_proxy": "",
        "NO_PROXY": "",
        "TOTALSEG_WEIGHTS_PATH": str(weights.resolve()),
    }


def label(hu: FloatVolume, grid: Grid, settings: Mapping[str, Any]) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """The work of the segmenter's own process: the label map [z, y, x] of each task, on the CT's grid."""
    switch_statistics_off(Path.cwd())
    with redirect_stdout(StringIO()):
        from nibabel.nifti1 import Nifti1Image
        from totalsegmentator.python_api import totalsegmentator

    affine = nifti_affine(grid)
    image = Nifti1Image(hu.transpose(2, 1, 0), affine)
    device = {"auto": "gpu", "cuda": "gpu"}.get(settings["device"], settings["device"].replace("cuda:", "gpu:"))
    maps: dict[str, NDArray[Any]] = {}
    for task, fast in settings["fast"].items():
        found = totalsegmentator(image, None, ml=True, fast=fast, task=task, device=device, quiet=True)
        maps[task] = from_nifti(np.asanyarray(found.dataobj), found.affine, affine, task)
    return maps, {"version": version("TotalSegmentator")}


def switch_statistics_off(folder: Path) -> None:
    """Let `folder` be TotalSegmentator's home, with a configuration that sends no usage statistics."""
    config = {
        "totalseg_id": "",
        "send_usage_stats": False,
        "prediction_counter": 0,
        "statistics_disclaimer_shown": True,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    os.environ["TOTALSEG_HOME_DIR"] = str(folder)


def nifti_affine(grid: Grid) -> NDArray[np.float64]:
    """4x4, maps an index (x, y, z, 1) to NIfTI's RAS position in mm; ours is LPS."""
    dz, dy, dx = grid.spacing_mm
    ox, oy, oz = grid.origin_mm
    return np.array([[-dx, 0, 0, -ox], [0, -dy, 0, -oy], [0, 0, dz, oz], [0, 0, 0, 1]], dtype=np.float64)


def from_nifti(
    labels: NDArray[Any], affine: NDArray[np.float64], expected: NDArray[np.float64], task: str
) -> NDArray[np.int32]:
    """A label map [x, y, z] as [z, y, x]; raises SegmenterUnavailable where it lies elsewhere than the CT."""
    if labels.ndim != 3 or not np.allclose(affine, expected, atol=1e-3):
        raise SegmenterUnavailable("segmenter_bad_labels", f"its task {task} gave labels elsewhere than the CT")
    return np.ascontiguousarray(np.rint(labels).astype(np.int32).transpose(2, 1, 0))
