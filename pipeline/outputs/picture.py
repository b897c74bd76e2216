"""Two pictures: the MIP as a DICOM object for the viewer, and the overview of one job for people."""

from __future__ import annotations

from datetime import datetime

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.uid import SecondaryCaptureImageStorage

from pipeline.outputs.attributes import free_series_number
from pipeline.outputs.companions import one_instance
from pipeline.outputs.drawing import (
    Box,
    Page,
    box_of,
    color_bar,
    frame,
    mark_sides,
    new_page,
    scale_bar,
    scale_for,
    show,
)
from pipeline.outputs.modules import Uids, described, result_dataset, secondary_capture
from pipeline.types import (
    CtVolume,
    District,
    DistrictMap,
    EncodedSeries,
    FloatVolume,
    GeometryError,
    Grid,
    OutputOptions,
    Provenance,
    SourceSeries,
    SuvVolume,
)

Place = tuple[float, float, float, float]  # left, bottom, width, height in pixels

MIP_BANNER = "SYNTHETIC PET (AI) - NOT FOR DIAGNOSIS"
OVERVIEW_BANNER = "SYNTHETIC - RESEARCH ONLY"
MIP_DESCRIPTION = "SYNTHETIC FDG PET MIP - AI, RESEARCH ONLY"

SUV_SHOWN = (0.0, 7.0)  # g/ml: brain and bladder saturate, liver is mid-gray, as in the usual MIP window
CT_CENTER_HU, CT_WIDTH_HU = 40.0, 400.0
MARGIN_MM = 15.0
BARS_PX = 280.0  # height that the overview's two color bars need for their labels
INVERSE_GRAY = "gray_r"
FUSION_COLORS = "hot"
FUSION_FROM_SUV, FUSION_FULL_SUV = 0.5, 4.0  # g/ml: below the first only CT, from the second as opaque as it gets
FUSION_OPACITY = 0.7
NOT_EVALUATED_RGBA = (0.35, 0.45, 0.75, 0.9)  # blue stripes: no gray, which would read as a value
STRIPE_MM = 24.0
DISTRICT_COLORS = {
    District.HEAD: "#e6b422",
    District.TRUNK: "#4aa3df",
    District.ARMS: "#d2609b",
    District.LEGS: "#5fbf72",
}
NIGHT, INK, WARNING = "#101216", "#e8e8e8", "#ff5a4d"


def encode_mip(
    suv: SuvVolume,
    *,
    source: SourceSeries,
    provenance: Provenance,
    options: OutputOptions,
    encoding: str,
    uids: Uids,
    created: datetime,
) -> EncodedSeries:
    """A one-instance Secondary Capture series: coronal, sagittal and axial MIP in inverse gray, banner burned in.

    `encoding` is that of the PET series which it accompanies; the picture is the same but has its own UIDs. Modality
    is OT, so that it does not compete with the volume in hanging protocols. Raises OutputError like the PET series.
    """
    ds = result_dataset(
        source=source, provenance=provenance, options=options, created=created, not_evaluated=suv.not_evaluated
    )
    ds.SOPClassUID = SecondaryCaptureImageStorage
    ds.SOPInstanceUID = uids.uid("mip")
    ds.Modality = "OT"
    ds.SeriesInstanceUID = uids.uid("mip_series")
    ds.SeriesNumber = free_series_number(options.mip_series_number, source)
    ds.SeriesDescription = described(MIP_DESCRIPTION, options)
    ds.InstanceNumber = 1
    ds.ImageType = ["DERIVED", "SECONDARY"]
    ds.PatientOrientation = None  # three views in one image
    ds.BurnedInAnnotation = "YES"
    secondary_capture(ds, provenance)
    _eight_bit_pixels(ds, mip_image(suv))
    return one_instance(ds, source, kind="mip", encoding=encoding)


def mip_image(suv: SuvVolume) -> NDArray[np.uint8]:
    """The MIP page as gray values [row, column], 255 white; dark is high SUV, as PET is read."""
    values = _finite(suv.suv)
    box = box_of(values > 0, suv.grid, margin_mm=MARGIN_MM)
    z_mm, y_mm, x_mm = (high - low for low, high in box)
    gap, bar_px, top, bottom = 16, 70, 64, 44
    scale = scale_for(2 * x_mm + y_mm, z_mm, width_px=1200, height_px=1000, at_most=3.0)
    panels = [
        ("coronal", x_mm * scale, z_mm * scale, values.max(axis=1)),
        ("sagittal", y_mm * scale, z_mm * scale, values.max(axis=2)),
        ("axial", x_mm * scale, y_mm * scale, values.max(axis=0)),
    ]
    content = sum(width for _, width, _, _ in panels) + 3 * gap + bar_px
    width = int(max(content + gap, 560))
    height = int(max(z_mm, y_mm) * scale) + top + bottom
    page = new_page(width, height, scale, background="white")
    left = (width - content) / 2
    for plane, panel_width, panel_height, image in panels:
        axes = page.add(left, bottom, panel_width, panel_height)
        show(axes, image, suv.grid, plane, box, colors=INVERSE_GRAY, limits=SUV_SHOWN)
        mark_sides(axes, plane, color="black")
        scale_bar(axes, page, color="black")
        frame(axes, "black", (plane,))
        left += panel_width + gap
    bar = page.add(left, bottom, 14, min(max(z_mm, y_mm) * scale, 240))
    bar.set_yticks([0])
    color_bar(bar, INVERSE_GRAY, SUV_SHOWN, ink="black", label="SUVbw (g/ml)")
    page.text(width / 2, height - 20, MIP_BANNER, ha="center", va="center", fontsize=14, weight="bold", color="black")
    page.text(width / 2, 18, _not_evaluated(suv), ha="center", va="center", fontsize=9, color="black")
    return page.gray()


def overview_png(
    ct: CtVolume,
    districts: DistrictMap,
    suv: SuvVolume,
    *,
    true_suv: FloatVolume | None = None,
    title: str = "",
) -> bytes:
    """One PNG: CT, districts, synthetic PET MIP, fusion, and the true PET's MIP where it is known; all coronal.

    One scale in all panels (mm), head up, the patient's left at the right. `true_suv` is [z, y, x] on `suv.grid`.
    `title` must hold nothing that identifies a patient.
    """
    if true_suv is not None and true_suv.shape != suv.grid.shape:
        raise GeometryError(f"the true SUV {true_suv.shape} does not fit grid {suv.grid.shape}")
    box = box_of(districts.labels > 0, districts.grid, margin_mm=MARGIN_MM)
    z_mm, x_mm = (box[0][1] - box[0][0], box[2][1] - box[2][0])
    n_panels = 4 if true_suv is None else 5
    gap, bar_px, top, bottom = 18, 76, 92, 96
    scale = scale_for(n_panels * x_mm, z_mm, width_px=n_panels * 380, height_px=820, at_most=2.5)
    panel_px = (x_mm * scale, z_mm * scale)
    content = n_panels * (panel_px[0] + gap) + bar_px
    width = int(max(content + 2 * gap, 900))
    middle_px = max(panel_px[1], BARS_PX)  # a very short series gets panels in the middle of a page that fits the bars
    page = new_page(width, int(middle_px) + top + bottom, scale, background=NIGHT)
    panel_bottom = bottom + (middle_px - panel_px[1]) / 2

    y_mm = _fullest_coronal_mm(districts)
    lefts = [(width - content) / 2 + i * (panel_px[0] + gap) for i in range(n_panels)]
    places: list[Place] = [(left, panel_bottom, *panel_px) for left in lefts]
    _ct_panel(page, places[0], ct, box, y_mm)
    _districts_panel(page, places[1], ct, districts, box, y_mm)
    mip = _mip_axes(page, places[2], suv.suv, suv.grid, box, "Synthetic PET, MIP")
    _cover_not_evaluated(mip, districts, suv, box)
    _fusion_panel(page, places[3], ct, suv, box, y_mm)
    if true_suv is not None:
        _mip_axes(page, places[4], true_suv, suv.grid, box, "True PET, MIP")
    bar_left, bar_height = lefts[-1] + panel_px[0] + gap, middle_px * 0.42
    for low, colors, label in ((0.0, INVERSE_GRAY, "MIP, SUVbw (g/ml)"), (0.55, FUSION_COLORS, "fusion, SUVbw (g/ml)")):
        bar = page.add(bar_left, bottom + low * middle_px, 14, bar_height)
        color_bar(bar, colors, SUV_SHOWN, ink=INK, label=label)
    _captions(page, districts, suv, title)
    return page.png()


def _ct_panel(page: Page, place: Place, ct: CtVolume, box: Box, y_mm: float) -> None:
    axes = _ct_axes(page, place, ct, box, y_mm)
    frame(axes, INK, ("CT, coronal", f"W {CT_WIDTH_HU:g} L {CT_CENTER_HU:g} HU"))


def _districts_panel(
    page: Page,
    place: Place,
    ct: CtVolume,
    districts: DistrictMap,
    box: Box,
    y_mm: float,
) -> None:
    axes = _ct_axes(page, place, ct, box, y_mm)
    overlay = _district_rgba(districts.labels[:, _index(districts.grid, y_mm)])
    show(axes, overlay, districts.grid, "coronal", box, smooth=False)
    frame(axes, INK, ("Districts", f"by {districts.segmenter} {districts.version}"))


def _mip_axes(page: Page, place: Place, suv: FloatVolume, grid: Grid, box: Box, label: str) -> Axes:
    axes = page.add(*place)
    axes.set_facecolor("white")
    show(axes, _finite(suv.max(axis=1)), grid, "coronal", box, colors=INVERSE_GRAY, limits=SUV_SHOWN)
    mark_sides(axes, "coronal", color="black")
    scale_bar(axes, page, color="black")
    frame(axes, INK, (label, f"SUV {SUV_SHOWN[0]:g}-{SUV_SHOWN[1]:g}, inverse gray"))
    return axes


def _cover_not_evaluated(axes: Axes, districts: DistrictMap, suv: SuvVolume, box: Box) -> None:
    """Stripes over what no network was trusted with: white would read as "no uptake"."""
    if not suv.not_evaluated:
        return
    unknown = np.isin(districts.labels, [int(district) for district in suv.not_evaluated]).any(axis=1)
    known = np.isin(districts.labels, [int(d) for d in District if d not in suv.not_evaluated]).any(axis=1)
    rgba = np.zeros((*unknown.shape, 4))
    z_mm, _, x_mm = districts.grid.spacing_mm
    rows, columns = np.ogrid[: unknown.shape[0], : unknown.shape[1]]
    stripes = (rows * z_mm + columns * x_mm) % STRIPE_MM < STRIPE_MM / 2
    rgba[unknown & ~known & stripes] = NOT_EVALUATED_RGBA
    show(axes, rgba, districts.grid, "coronal", box, smooth=False)


def _fusion_panel(
    page: Page,
    place: Place,
    ct: CtVolume,
    suv: SuvVolume,
    box: Box,
    y_mm: float,
) -> None:
    axes = _ct_axes(page, place, ct, box, y_mm)
    plane = _finite(suv.suv[:, _index(suv.grid, y_mm)])
    rgba = colormaps[FUSION_COLORS](np.clip(plane / SUV_SHOWN[1], 0, 1))
    ramp = (plane - FUSION_FROM_SUV) / (FUSION_FULL_SUV - FUSION_FROM_SUV)
    rgba[..., 3] = np.clip(ramp, 0, 1) * FUSION_OPACITY
    show(axes, rgba, suv.grid, "coronal", box)
    frame(axes, INK, ("Fusion, coronal", "synthetic PET on CT"))


def _ct_axes(page: Page, place: Place, ct: CtVolume, box: Box, y_mm: float) -> Axes:
    axes = page.add(*place)
    axes.set_facecolor("black")
    low = CT_CENTER_HU - CT_WIDTH_HU / 2
    show(
        axes,
        ct.hu[:, _index(ct.grid, y_mm)],
        ct.grid,
        "coronal",
        box,
        colors="gray",
        limits=(low, low + CT_WIDTH_HU),
    )
    mark_sides(axes, "coronal", color=INK)
    scale_bar(axes, page, color=INK)
    return axes


def _captions(page: Page, districts: DistrictMap, suv: SuvVolume, title: str) -> None:
    middle = page.width_px / 2
    page.text(
        middle,
        page.height_px - 20,
        OVERVIEW_BANNER,
        ha="center",
        va="center",
        fontsize=14,
        weight="bold",
        color=WARNING,
    )
    if title:
        page.text(middle, page.height_px - 42, title, ha="center", va="center", fontsize=10, color=INK)
    handles = [
        Patch(
            color=DISTRICT_COLORS[district],
            label=f"{district.key} (not evaluated)" if district in suv.not_evaluated else district.key,
        )
        for district in districts.present
    ]
    if handles:
        page.figure.legend(
            handles=handles,
            loc="lower center",
            bbox_to_anchor=(0.5, 40 / page.height_px),
            ncols=len(handles),
            frameon=False,
            labelcolor=INK,
            fontsize=9,
        )
    page.text(middle, 24, _not_evaluated(suv), ha="center", va="center", fontsize=9, color=INK)


def _not_evaluated(suv: SuvVolume) -> str:
    if not suv.not_evaluated:
        return "All districts in the field of view were evaluated. Predicted from CT; no radiotracer was given."
    names = ", ".join(district.key for district in suv.not_evaluated)
    return f"NOT EVALUATED: {names}: no statement is made there, it is not absence of uptake. Predicted from CT."


def _district_rgba(labels: NDArray[np.uint8]) -> NDArray[np.float64]:
    table = np.zeros((256, 4))
    for district, color in DISTRICT_COLORS.items():
        table[district, :3] = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        table[district, 3] = 0.45
    return table[labels]


def _fullest_coronal_mm(districts: DistrictMap) -> float:
    """The y (mm) of the coronal plane with the most body in it."""
    counts = np.count_nonzero(districts.labels, axis=(0, 2))
    return districts.grid.origin_mm[1] + int(counts.argmax()) * districts.grid.spacing_mm[1]


def _index(grid: Grid, y_mm: float) -> int:
    """The row of the grid nearest to y, inside it."""
    return int(np.clip(round((y_mm - grid.origin_mm[1]) / grid.spacing_mm[1]), 0, grid.shape[1] - 1))


def _finite(values: FloatVolume) -> FloatVolume:
    return np.nan_to_num(values, nan=0.0, posinf=SUV_SHOWN[1], neginf=0.0)


def _eight_bit_pixels(ds: Dataset, image: NDArray[np.uint8]) -> None:
    """Image Pixel (PS3.3 C.7.6.3) and a window that shows all of it."""
    ds.SamplesPerPixel = 1
    ds.PhotometricInterpretation = "MONOCHROME2"
    ds.Rows, ds.Columns = image.shape
    ds.BitsAllocated = 8
    ds.BitsStored = 8
    ds.HighBit = 7
    ds.PixelRepresentation = 0
    ds.WindowCenter = "128"
    ds.WindowWidth = "256"
    data = image.tobytes()
    ds.PixelData = data + b"\0" * (len(data) % 2)
    ds["PixelData"].VR = "OB"
