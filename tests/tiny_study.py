"""A small torso CT series of the phantom, 8 mm voxels: a whole job on it takes a second or two."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from ct_factory import write_ct

from training.phantom import Phantom, PhantomSpec, make_phantom

SPACING_MM = (8.0, 8.0, 8.0)


@cache
def tiny_phantom() -> Phantom:
    """Pelvis to lower chest, arms raised."""
    return make_phantom(PhantomSpec(seed=1, spacing_mm=SPACING_MM, pose="raised", coverage=(0.60, 0.72)))


def write_tiny_study(folder: Path, **changes: Any) -> list[Path]:
    """Write the series; `changes` go to `ct_factory.write_ct`."""
    return write_ct(folder, tiny_phantom().hu, spacing_mm=SPACING_MM, **changes)
