"""Head, trunk, arms and legs of a CT, by the first segmenter of a chain that can.

`SEGMENTERS` is the table of those that exist. A segmenter that cannot run raises `SegmenterUnavailable` with the
reason; the next one is tried and the reason is kept in the map's notes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from pipeline.districts import builtin, dicom_seg, nnunet_folder, totalsegmentator
from pipeline.errors import DistrictError, SegmenterUnavailable
from pipeline.types import CtVolume, DistrictMap, DistrictOptions, Grid, OnProgress, Progress, Stage, ignore_progress

__all__ = ["SEGMENTERS", "SegmenterUnavailable", "find_districts"]

Segmenter = Callable[[CtVolume, Grid, DistrictOptions], DistrictMap]


SEGMENTERS: Mapping[str, Segmenter] = {
    dicom_seg.NAME: dicom_seg.segment,
    nnunet_folder.NAME: nnunet_folder.segment,
    totalsegmentator.NAME: totalsegmentator.segment,
    builtin.NAME: builtin.segment,
}


def find_districts(
    ct: CtVolume, grid: Grid, *, options: DistrictOptions, on_progress: OnProgress = ignore_progress
) -> DistrictMap:
    """Label map of `ct` on `grid` by the first segmenter named in `options.chain` that can run.

    Why earlier ones did not run stands in the result's notes. Raises DistrictError: no_body; unknown_segmenter;
    no_segmenter when none of the chain could run.
    """
    unknown = [name for name in options.chain if name not in SEGMENTERS]
    if unknown:
        raise DistrictError(
            "unknown_segmenter", f"segmenting districts: no segmenter {unknown[0]!r}, there are {sorted(SEGMENTERS)}"
        )
    skipped: list[str] = []
    for done, name in enumerate(options.chain):
        on_progress(Progress(stage=Stage.DISTRICTS, done=done, total=len(options.chain), text=name))
        try:
            found = SEGMENTERS[name](ct, grid, options)
        except SegmenterUnavailable as reason:
            skipped.append(f"{name}: {reason.text}")
            continue
        on_progress(Progress(stage=Stage.DISTRICTS, done=len(options.chain), total=len(options.chain), text=name))
        return replace(found, notes=(*skipped, *found.notes))
    raise DistrictError(
        "no_segmenter", f"segmenting districts: none of {list(options.chain)} could run: {'; '.join(skipped)}"
    )
