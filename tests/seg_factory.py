"""Writes Segmentation objects by highdicom, as another program would: of a CT's files and boolean masks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import highdicom as hd
import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset, dcmread
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code

TISSUE: Code = codes.SCT.Tissue  # a code that says nothing about the region


def write_seg(
    path: Path,
    ct_paths: Sequence[Path],
    masks: Mapping[str, NDArray[np.bool_]],
    *,
    kinds: Mapping[str, Code] | None = None,
    segmentation_type: str = "BINARY",
    transfer_syntax: str = "1.2.840.10008.1.2.1",
    modify: Callable[[Dataset], None] | None = None,
    **changes: Any,
) -> Path:
    """One SEG with a segment for each mask [slice, row, column] over the CT's own slices.

    `kinds` are the segments' types by label (default: one that says nothing). `changes` go to highdicom;
    `modify(ds)` changes the object last.
    """
    sources = [dcmread(p) for p in ct_paths]
    stacked = np.stack(list(masks.values()), axis=-1)
    pixels = stacked.astype(np.float32) if segmentation_type == "FRACTIONAL" else stacked.astype(np.uint8)
    descriptions = [
        hd.seg.SegmentDescription(
            segment_number=number,
            segment_label=label,
            segmented_property_category=codes.SCT.AnatomicalStructure,
            segmented_property_type=(kinds or {}).get(label, TISSUE),
            algorithm_type="AUTOMATIC",
            algorithm_identification=hd.AlgorithmIdentificationSequence(
                name="Outliner", family=codes.DCM.ArtificialIntelligence, version="4"
            ),
        )
        for number, label in enumerate(masks, start=1)
    ]
    ds = hd.seg.Segmentation(
        **{
            "source_images": sources,
            "pixel_array": pixels,
            "segmentation_type": segmentation_type,
            "segment_descriptions": descriptions,
            "series_instance_uid": hd.UID(),
            "series_number": 77,
            "sop_instance_uid": hd.UID(),
            "instance_number": 1,
            "manufacturer": "OTHER",
            "manufacturer_model_name": "Outliner",
            "software_versions": "4",
            "device_serial_number": "1",
            "transfer_syntax_uid": transfer_syntax,
            **changes,
        }
    )
    if modify:
        modify(ds)
    ds.save_as(path)
    return path
