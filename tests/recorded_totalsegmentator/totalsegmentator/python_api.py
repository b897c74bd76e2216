"""`totalsegmentator()` with the arguments that we use; the label maps lie beside the weights, as TASK.npy [z, y, x]."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from nibabel.nifti1 import Nifti1Image

HOME = Path(os.environ.get("TOTALSEG_HOME_DIR", Path.home() / ".totalsegmentator"))  # as the package's config.py does
CONFIG = json.loads((HOME / "config.json").read_text(encoding="utf-8"))
WEIGHTS = Path(os.environ["TOTALSEG_WEIGHTS_PATH"])
CALLS: list[list[Any]] = []


def totalsegmentator(
    image: Nifti1Image,
    output: Path | None = None,
    ml: bool = False,
    fast: bool = False,
    task: str = "total",
    device: str = "gpu",
    quiet: bool = False,
) -> Nifti1Image:
    """The recorded labels of `task`, on the image's grid."""
    CALLS.append([task, fast, device])
    noted = {
        "at_import": {**CONFIG, "home": str(HOME)},
        "weights": str(WEIGHTS),
        "proxy": os.environ["https_proxy"],
        "calls": CALLS,
    }
    (WEIGHTS / "noted.json").write_text(json.dumps(noted), encoding="utf-8")
    labels = np.load(WEIGHTS / f"{task}.npy")
    return Nifti1Image(labels.transpose(2, 1, 0).astype(np.uint8), image.affine)
