"""How a viewer may show the synthetic PET: as gray or color presentation states, with the word SYNTHETIC over it.

A grayscale state (PS3.3 A.33.1, inverse gray) and a pseudo-color state (A.33.3, hot iron) of the whole PET series, both
with SUV 0 to 5. Each lays a banner over every plane as a text annotation of its own graphic layer: a cover that says
SYNTHETIC in the picture while no voxel of the series is touched. The other cover is the MIP picture, whose banner is
burned in, for the viewers that ignore presentation states.
"""

from __future__ import annotations

from datetime import datetime
from functools import cache
from typing import Any

import highdicom as hd
import numpy as np
from highdicom.color import CIELabColor
from numpy.typing import NDArray
from pydicom import Dataset, dcmread
from pydicom.data import get_palette_files

from pipeline.outputs.attributes import body_part_examined, free_series_number, local_moment
from pipeline.outputs.companions import CONTENT_CREATOR, equipment, one_instance, stand_ins, write_common_modules
from pipeline.outputs.header import ds_text
from pipeline.outputs.modules import Uids, contributing_equipment, described
from pipeline.outputs.picture import MIP_BANNER
from pipeline.types import EncodedSeries, Grid, OutputOptions, Provenance, SourceSeries

GRAYSCALE, PSEUDO_COLOR = "gsps", "pcps"
SUV_WINDOW = (2.5, 5.0)  # center, width in g/ml
WINDOW_NAME = "SUV 0-5"
LAYER = "SYNTHETIC"
BANNER_BOX = (0.0, 0.0, 1.0, 0.06)  # left, top, right, bottom as shares of the displayed area
WARNING_RGB = (255, 90, 77)
PALETTE = "hotiron.dcm"  # PS3.6 B.1.1, as pydicom ships it


def encode_grayscale_state(
    pet: EncodedSeries,
    *,
    slope: str,
    grid: Grid,
    source: SourceSeries,
    provenance: Provenance,
    options: OutputOptions,
    uids: Uids,
    created: datetime,
) -> EncodedSeries:
    """A one-instance Grayscale Softcopy Presentation State series: inverse gray, SUV 0 to 5.

    Args:
        pet: the PET series that is shown; all its planes are referenced.
        slope: its rescale slope, as it stands in the planes.
        grid: of the PET.
        source: the CT.
        provenance: who made the PET.
        options: `gsps_series_number`, and what all results share.
        uids: of the PET's encoding.
        created: aware time, stored with the job.

    Returns:
        A series of kind "gsps" in the encoding of `pet`.

    Raises:
        OutputError: as for the PET series.
    """
    ds = hd.pr.GrayscaleSoftcopyPresentationState(
        **_identity(GRAYSCALE, options.gsps_series_number, "INVERSE GRAY", uids, source, options),
        **_shown(pet, slope, grid, source),
        **equipment(provenance),
        voi_lut_transformations=[_window()],
        presentation_lut_transformation=hd.PresentationLUTTransformation(
            presentation_lut_shape=hd.PresentationLUTShapeValues.INVERSE
        ),
    )
    return _finished(ds, GRAYSCALE, pet, slope, grid, source, provenance, options, created)


def encode_pseudo_color_state(
    pet: EncodedSeries,
    *,
    slope: str,
    grid: Grid,
    source: SourceSeries,
    provenance: Provenance,
    options: OutputOptions,
    uids: Uids,
    created: datetime,
) -> EncodedSeries:
    """A one-instance Pseudo-Color Softcopy Presentation State series: hot iron, SUV 0 to 5.

    As `encode_grayscale_state`, of kind "pcps" and numbered `pcps_series_number`.
    """
    ds = hd.pr.PseudoColorSoftcopyPresentationState(
        **_identity(PSEUDO_COLOR, options.pcps_series_number, "HOT IRON", uids, source, options),
        **_shown(pet, slope, grid, source),
        **equipment(provenance),
        palette_color_lut_transformation=_palette(),
    )
    ds.SoftcopyVOILUTSequence = [_window()]  # highdicom 0.28.2 compares its class with the value, and raises
    return _finished(ds, PSEUDO_COLOR, pet, slope, grid, source, provenance, options, created)


def _identity(
    kind: str, number: int, label: str, uids: Uids, source: SourceSeries, options: OutputOptions
) -> dict[str, Any]:
    description = f"SYNTHETIC FDG PET {label} {WINDOW_NAME} - AI, RESEARCH ONLY"
    return {
        "series_instance_uid": uids.uid(f"{kind}_series", number),
        "series_number": free_series_number(number, source),
        "sop_instance_uid": uids.uid(kind, number),
        "instance_number": 1,
        "series_description": described(description, options),
        "content_label": label,
        "content_description": f"Synthetic PET, {label.lower()}, {WINDOW_NAME}",  # LO: at most 64 characters
        "content_creator_name": CONTENT_CREATOR,
    }


def _shown(pet: EncodedSeries, slope: str, grid: Grid, source: SourceSeries) -> dict[str, Any]:
    """The planes, their rescale, and the banner over them."""
    planes = stand_ins(source, pet, *grid.shape[1:])
    layer = hd.pr.GraphicLayer(layer_name=LAYER, order=1, display_color=CIELabColor.from_rgb(*WARNING_RGB))
    banner = hd.pr.TextObject(text_value=MIP_BANNER, units=hd.pr.AnnotationUnitsValues.DISPLAY, bounding_box=BANNER_BOX)
    return {
        "referenced_images": planes,
        "graphic_layers": [layer],
        "graphic_annotations": [
            hd.pr.GraphicAnnotation(referenced_images=planes, graphic_layer=layer, text_objects=[banner])
        ],
        # floats: highdicom refuses decimal strings
        "modality_lut_transformation": hd.ModalityLUTTransformation(
            rescale_intercept=0.0, rescale_slope=float(slope), rescale_type="US"
        ),
    }


def _window() -> hd.pr.SoftcopyVOILUTTransformation:
    center, width = SUV_WINDOW
    return hd.pr.SoftcopyVOILUTTransformation(
        window_center=[center],
        window_width=[width],
        window_explanation=[WINDOW_NAME],  # lists: highdicom takes a lone string for a list of letters
        voi_lut_function=hd.VOILUTFunctionValues.LINEAR_EXACT,
    )


@cache
def _hot_iron() -> tuple[NDArray[np.uint16], ...]:
    """Red, green and blue of the standard palette, 256 entries each, spread over 16 bits."""
    (path,) = get_palette_files(PALETTE)
    palette = dcmread(path)
    colors = ("Red", "Green", "Blue")
    entries = (palette[f"{color}PaletteColorLookupTableData"].value for color in colors)
    return tuple(np.frombuffer(data, np.uint8).astype(np.uint16) * 257 for data in entries)


def _palette() -> hd.PaletteColorLUTTransformation:
    """Presentation states take 16-bit palettes only."""
    red, green, blue = (
        hd.PaletteColorLUT(first_mapped_value=0, lut_data=data, color=color)
        for data, color in zip(_hot_iron(), ("red", "green", "blue"), strict=True)
    )
    return hd.PaletteColorLUTTransformation(red_lut=red, green_lut=green, blue_lut=blue)


def _finished(
    ds: Dataset,
    kind: str,
    pet: EncodedSeries,
    slope: str,
    grid: Grid,
    source: SourceSeries,
    provenance: Provenance,
    options: OutputOptions,
    created: datetime,
) -> EncodedSeries:
    now = local_moment(source, created)
    write_common_modules(ds, source, options, created, contributors=contributing_equipment(provenance, now.date_time))
    ds.PresentationCreationDate, ds.PresentationCreationTime = now.date, now.time
    ds.BodyPartExamined = body_part_examined(source)
    ds.RescaleIntercept, ds.RescaleSlope = "0", slope  # the very text of the planes
    for area in ds.DisplayedAreaSelectionSequence:  # highdicom takes every pixel for a square
        del area.PresentationPixelAspectRatio
        area.PresentationPixelSpacing = [ds_text(spacing) for spacing in grid.spacing_mm[1:]]
    for annotation in ds.GraphicAnnotationSequence:
        del annotation.ReferencedImageSequence  # absent: it is for every plane that is referenced (PS3.3 C.10.5)
    return one_instance(ds, source, kind=kind, encoding=pet.encoding)
