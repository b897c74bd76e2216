"""A second bundle on the same CT, beside the one whose result is used: compared, recorded, never written or sent.

So a new bundle can be watched on the cases of the site before it is trusted with one.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.bundle import ModelBundle
from pipeline.device import Compute
from pipeline.geometry import resample, result_grid
from pipeline.result import ShadowRegion, ShadowSummary
from pipeline.run import choose_networks, synthesize_volume
from pipeline.types import AIR_HU, OUTSIDE, District, DistrictMap, FloatVolume, Grid, JobVolumes, PipelineOptions

BODY = "body"


def compare_shadow(
    volumes: JobVolumes, bundle: ModelBundle, options: PipelineOptions, *, compute: Compute
) -> ShadowSummary:
    """Run `bundle` on the volumes of a finished job and compare.

    The options are the job's, but blending and stitching are the shadow's own: the question is what it would do.
    On another grid spacing the CT is resampled anew, the districts follow by nearest voxel, and the shadow's SUV is
    brought back to the result's grid.

    Raises:
        BundleError, GeometryError: the shadow cannot be run. RuntimeError: out of memory on the last rung.
    """
    began = time.perf_counter()
    manifest = bundle.manifest
    notes: list[str] = []
    grid = result_grid(volumes.ct.grid, manifest.spacing_mm)
    hu, districts = _on(grid, volumes)
    networks, said = choose_networks(districts, bundle.keys, options)
    unit = synthesize_volume(
        manifest.normalization.ct_to_unit(hu), districts, networks, bundle, compute=compute, report=notes.append
    )
    suv = manifest.normalization.unit_to_suv(unit)
    if grid != volumes.suv.grid:
        suv = resample(suv, grid, volumes.suv.grid, fill=0.0)
    seen = [d for d in networks if d not in volumes.suv.not_evaluated]
    return ShadowSummary(
        bundle_name=manifest.name,
        bundle_version=manifest.version,
        bundle_sha256=bundle.manifest_sha256,
        seconds=round(time.perf_counter() - began, 3),
        device=compute.name,
        regions=tuple(_regions(suv, volumes, seen)),
        notes=(*said, *notes),
    )


def _on(grid: Grid, volumes: JobVolumes) -> tuple[FloatVolume, DistrictMap]:
    """The job's CT (HU) and districts on the shadow's grid; the very same where the grids agree."""
    districts = volumes.districts
    if grid == districts.grid:
        return volumes.hu, districts
    hu: FloatVolume = resample(volumes.ct.hu, volumes.ct.grid, grid, fill=AIR_HU)
    labels = resample(districts.labels, districts.grid, grid, fill=OUTSIDE, nearest=True)
    return hu, replace(districts, labels=labels, grid=grid)


def _regions(shadow: FloatVolume, volumes: JobVolumes, seen: list[District]) -> Iterator[ShadowRegion]:
    labels = volumes.districts.labels
    if len(seen) > 0:
        yield _region(BODY, shadow, volumes, np.isin(labels, [int(d) for d in seen]))
    for district in seen:
        yield _region(district.key, shadow, volumes, labels == district)


def _region(name: str, shadow: FloatVolume, volumes: JobVolumes, mask: NDArray[np.bool_]) -> ShadowRegion:
    ours = volumes.suv.suv[mask].astype(np.float64)
    theirs = shadow[mask].astype(np.float64)
    figures: dict[str, Any] = {
        "mae_suv": np.abs(theirs - ours).mean(),
        "bias_suv": (theirs - ours).mean(),
        "suv_mean": ours.mean(),
        "shadow_suv_mean": theirs.mean(),
    }
    rounded = {key: round(float(value), 6) for key, value in figures.items()}
    return ShadowRegion(region=name, volume_ml=round(ours.size * volumes.suv.grid.voxel_ml, 3), **rounded)
