"""SUV per district, from the values that a reader of the written file sees."""

from __future__ import annotations

import numpy as np

from pipeline.outputs.quantize import quantize
from pipeline.types import District, DistrictMap, DistrictStats, GeometryError, SuvVolume


def district_stats(suv: SuvVolume, districts: DistrictMap) -> tuple[DistrictStats, ...]:
    """Volume (ml), mean and maximum SUV (g/ml) of each district in the field of view, in `District` order.

    The numbers come from the quantized codes, so they agree with what any viewer measures. A district that was
    not evaluated has `evaluated` False and zeros, which mean "no statement". Raises GeometryError where the two
    do not share a grid.
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
    return tuple(
        DistrictStats(
            district=district,
            volume_ml=float(voxels[district]) * suv.grid.voxel_ml,
            suv_mean=float(sums[district] / voxels[district]) * per_code if evaluated else 0.0,
            suv_max=float(tops[district]) * per_code if evaluated else 0.0,
            confidence=float(districts.confidence.get(district, 0.0)),
            evaluated=evaluated,
        )
        for district in District
        if voxels[district]
        for evaluated in (district not in suv.not_evaluated,)
    )
