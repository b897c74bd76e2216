"""The engine "ray" gives what processes give. Ray is an extra: `pip install "dicom-node[ray]"`."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_prepared import tiny_recipe

from training.cases import find_studies
from training.phantom.cohort import write_cohort
from training.preparation.prepare import prepare
from training.prepared import open_prepared

pytest.importorskip("ray", reason="Ray is not installed")


def test_ray_prepares_what_one_process_prepares(tmp_path: Path) -> None:
    data = tmp_path / "data"
    write_cohort(data, cases=2, layout="nifti", spacing_mm=(10.0, 10.0, 10.0), ct_pixel_mm=10.0, workers=1)
    assert find_studies(data).layout == "nifti"
    recipe = tiny_recipe(prepare={"spacing_mm": [10.0, 10.0, 10.0]})
    with_ray = prepare(data, tmp_path / "ray", recipe, workers=2, engine="ray")
    alone = prepare(data, tmp_path / "alone", recipe, workers=1)
    assert with_ray.digest == alone.digest
    open_prepared(tmp_path / "ray")
