"""District volumes to one body: hard, by mask (the paper's eq. 15), or feathered at the borders.

Pure: arrays in, one array out. Every body voxel's weights sum to 1 over the districts that were synthesized, and
a voxel whose own district was not is 0, whatever its neighbors hold: uptake is never spread into a region that no
network was trusted with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from pipeline.types import OUTSIDE, District, DistrictMap, FloatVolume, GeometryError, LabelVolume

MODES = ("hard", "feathered")
BLOCK = 32  # voxels along an axis: the fastest of 16 to 64, as larger ones hold less of a border and more beside it

Box = tuple[slice, ...]


def stitch(
    volumes: Mapping[District, FloatVolume], districts: DistrictMap, *, mode: str, feather_mm: float
) -> FloatVolume:
    """The body's volume from one volume per district.

    Args:
        volumes: float32 [z, y, x] per district, each on the districts' grid. With "feathered" a volume must also
            hold values up to half of `feather_mm` beyond its district (see `reach`). A district that is missing
            here is left at 0.
        mode: "hard" (eq. 15) or "feathered".
        feather_mm: the width of the ramp from one district to the next, centered on their border. Districts that
            air parts are not mixed across more than half of it.

    Returns:
        float32 [z, y, x], 0 outside the body.

    Raises:
        GeometryError: a shape does not fit, or the mode is unknown.
    """
    _check(volumes, districts, mode)
    if mode == "hard" or feather_mm <= 0 or len({id(volume) for volume in volumes.values()}) == 1:
        return _hard(volumes, districts.labels)  # one network for all: between its districts is nothing to blend
    return _feathered(volumes, districts, feather_mm)


def _check(volumes: Mapping[District, FloatVolume], districts: DistrictMap, mode: str) -> None:
    if mode not in MODES:
        raise GeometryError(f"stitching: mode {mode!r} is not one of {MODES}")
    for district, volume in volumes.items():
        if volume.shape != districts.grid.shape:
            raise GeometryError(f"stitching: {district.key} {volume.shape} does not fit grid {districts.grid.shape}")


def _hard(volumes: Mapping[District, FloatVolume], labels: LabelVolume) -> FloatVolume:
    out = np.zeros(labels.shape, dtype=np.float32)
    for district, volume in volumes.items():
        np.copyto(out, volume, where=labels == district)
    return out


def _feathered(volumes: Mapping[District, FloatVolume], districts: DistrictMap, feather_mm: float) -> FloatVolume:
    """Block by block: a weight away from a border is 0 or 1, so distances are only needed where two districts meet."""
    out = np.zeros(districts.grid.shape, dtype=np.float32)
    for core, padded, inner in _blocks(districts.grid.shape, _reach_voxels(districts, feather_mm)):
        labels = districts.labels[core]
        given = np.isin(labels, [int(d) for d in volumes])
        if not given.any():
            continue
        total, weight = np.zeros(labels.shape, dtype=np.float32), np.zeros(labels.shape, dtype=np.float32)
        for district, volume in volumes.items():
            share = feather_weight(districts.labels[padded], district, districts.grid.spacing_mm, feather_mm)[inner]
            total += share * volume[core]
            weight += share
        np.divide(total, weight, out=out[core], where=given & (weight > 0))
    return out


def _blocks(shape: tuple[int, int, int], pad: tuple[int, ...]) -> Iterator[tuple[Box, Box, Box]]:
    """Boxes that tile a volume; for each the same grown by `pad` within the volume, and its place in that."""
    for start in np.ndindex(*(-(-n // BLOCK) for n in shape)):
        core = tuple(slice(i * BLOCK, min((i + 1) * BLOCK, n)) for i, n in zip(start, shape, strict=True))
        padded = tuple(
            slice(max(c.start - by, 0), min(c.stop + by, n)) for c, by, n in zip(core, pad, shape, strict=True)
        )
        inner = tuple(slice(c.start - p.start, c.stop - p.start) for c, p in zip(core, padded, strict=True))
        yield core, padded, inner


def feather_weight(
    labels: LabelVolume, district: District, spacing_mm: tuple[float, float, float], feather_mm: float
) -> FloatVolume:
    """How much one district counts at each body voxel before the weights are made to sum to 1.

    float32 [z, y, x]: 1 deep inside the district, 0 beyond its reach and outside the body, and in between a ramp
    over `feather_mm` of the signed distance to the border with the other districts. Air is no border: a weight
    does not fall toward the skin.
    """
    own = labels == district
    body = labels != OUTSIDE
    others = body & ~own
    if not (own.any() and others.any()):
        return own.astype(np.float32)
    ramp = np.clip(0.5 - _signed_distance_mm(own, others, spacing_mm) / feather_mm, 0.0, 1.0)
    return np.where(body, ramp, np.float32(0.0))


def reach(districts: DistrictMap, district: District, *, mode: str, feather_mm: float) -> NDArray[np.bool_]:
    """The body voxels [z, y, x] at which stitching may look into this district's volume."""
    own = districts.mask(district)
    return own if mode == "hard" or feather_mm <= 0 else _near(districts, own, feather_mm)


def _near(districts: DistrictMap, own: NDArray[np.bool_], feather_mm: float) -> NDArray[np.bool_]:
    """`own` grown within the body by at least the feather's reach (a box: a little more at the corners)."""
    size = [2 * n + 1 for n in _reach_voxels(districts, feather_mm)]
    grown: NDArray[np.bool_] = ndimage.maximum_filter(own, size=size, mode="constant", cval=0)
    return grown & (districts.labels != OUTSIDE)


def _reach_voxels(districts: DistrictMap, feather_mm: float) -> tuple[int, ...]:
    # half of the ramp lies beyond the border, and the border half a voxel before the first center beyond it
    return tuple(int((feather_mm / 2 + min(districts.grid.spacing_mm) / 2) / s) for s in districts.grid.spacing_mm)


def _signed_distance_mm(
    inside: NDArray[np.bool_], others: NDArray[np.bool_], spacing_mm: tuple[float, float, float]
) -> FloatVolume:
    """Distance to the border between `inside` and `others`, of which neither is empty: negative on the inner side.

    Between voxel centers, less half a voxel, so that the border lies between two neighbors.
    """
    to_inside = ndimage.distance_transform_edt(~inside, sampling=spacing_mm)
    to_others = ndimage.distance_transform_edt(~others, sampling=spacing_mm)
    half = min(spacing_mm) / 2
    return np.where(inside, half - to_others, to_inside - half).astype(np.float32)
