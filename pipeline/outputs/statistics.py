"""SUV per district, from the values that a reader of the written file sees."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.outputs.quantize import quantize
from pipeline.types import District, DistrictMap, DistrictStats, GeometryError, LabelVolume, SuvVolume


def district_stats(
    suv: SuvVolume, districts: DistrictMap, deviation: SuvVolume | None = None
) -> tuple[DistrictStats, ...]:
    """Volume (ml), mean and maximum SUV (g/ml) of each district in the field of view, in `District` order.

    The numbers come from the quantized codes, so they agree with what any viewer measures. A district that was
    not evaluated has `evaluated` False and zeros, which mean "no statement". `deviation` is the uncertainty map; its
    mean in each evaluated district goes with them. Raises GeometryError where they do not share a grid.
    """
    if suv.suv.shape != districts.labels.shape:
        raise GeometryError(f"SUV {suv.suv.shape} and districts {districts.labels.shape} differ in shape")
    codes, slope = quantize(suv.suv)
    labels = districts.labels
    n_labels = int(labels.max(initial=0)) + 1
    size = max(n_labels, len(District) + 1)
    voxels = np.zeros(size, dtype=np.int64)
    sums = np.zeros(size, dtype=np.float64)
    tops = np.zeros(size, dtype=np.uint16)
    for code_plane, label_plane in zip(codes, labels, strict=True):  # plane by plane: no volume-sized temporaries
        flat = label_plane.ravel()
        counts = np.bincount(flat, minlength=size)
        voxels += counts
        sums += np.bincount(flat, weights=code_plane.ravel(), minlength=size)
        for district in District:
            if counts[district]:
                tops[district] = max(tops[district], code_plane[label_plane == district].max())
    per_code = float(slope)
    deviations = None if deviation is None else _means(deviation, labels, size)
    return tuple(
        DistrictStats(
            district=district,
            volume_ml=float(voxels[district]) * suv.grid.voxel_ml,
            suv_mean=float(sums[district] / voxels[district]) * per_code if evaluated else 0.0,
            suv_max=float(tops[district]) * per_code if evaluated else 0.0,
            confidence=float(districts.confidence.get(district, 0.0)),
            evaluated=evaluated,
            uncertainty=float(deviations[district]) if deviations is not None and evaluated else None,
        )
        for district in District
        if voxels[district]
        for evaluated in (district not in suv.not_evaluated,)
    )


def _means(volume: SuvVolume, labels: LabelVolume, size: int) -> NDArray[np.float64]:
    """The mean of the written values under each label, [size]; 0 where there is none."""
    if volume.suv.shape != labels.shape:
        raise GeometryError(f"uncertainty {volume.suv.shape} and districts {labels.shape} differ in shape")
    codes, slope = quantize(volume.suv)
    voxels, sums = np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.float64)
    for code_plane, label_plane in zip(codes, labels, strict=True):
        voxels += np.bincount(label_plane.ravel(), minlength=size)
        sums += np.bincount(label_plane.ravel(), weights=code_plane.ravel(), minlength=size)
    means: NDArray[np.float64] = sums / np.maximum(voxels, 1) * float(slope)
    return means
