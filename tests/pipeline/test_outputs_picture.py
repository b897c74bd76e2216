"""The MIP object, the overview, and the numbers per district."""

from __future__ import annotations

from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from outputs_samples import Sample, header_only, read_back, sample_suv, source_of, write_sample_ct
from PIL import Image

from pipeline.outputs import picture
from pipeline.outputs.picture import MIP_BANNER, mip_image, overview_png
from pipeline.outputs.statistics import district_stats
from pipeline.types import CtVolume, District, DistrictMap, GeometryError, Grid, SuvVolume

GRID = Grid(
    shape=(60, 40, 50), spacing_mm=(5.0, 4.0, 4.0), origin_mm=(-100.0, -80.0, 0.0), frame_of_reference_uid="2.25.1"
)


def body(grid: Grid = GRID) -> np.ndarray:
    mask = np.zeros(grid.shape, bool)
    mask[:, 8:32, 10:40] = True
    return mask


def labels() -> np.ndarray:
    made = np.where(body(), int(District.TRUNK), 0).astype(np.uint8)
    made[50:][body()[50:]] = District.HEAD
    made[:20][body()[:20]] = District.LEGS
    return made


def district_map() -> DistrictMap:
    return DistrictMap(
        labels=labels(),
        grid=GRID,
        segmenter="built$in",
        version="1$",
        confidence={District.HEAD: 0.9, District.TRUNK: 0.8},
    )


def ct_volume() -> CtVolume:
    hu = np.where(body(), 40, -1000).astype(np.float32)
    return CtVolume(hu=hu, grid=GRID, source=header_only())


def suv_volume(not_evaluated: tuple[District, ...] = ()) -> SuvVolume:
    suv = np.where(body(), 1.0, 0.0).astype(np.float32)
    suv[30, 20, 35] = 12.0  # a spot on the patient's left
    for district in not_evaluated:
        suv[labels() == district] = 0
    return SuvVolume(suv=suv, grid=GRID, not_evaluated=not_evaluated)


def test_the_mip_object_says_what_it_is(tmp_path: Path):
    sample = Sample(source=source_of(write_sample_ct(tmp_path)), suv=sample_suv())
    series = sample.mip()
    (ds,) = read_back(series)
    assert (series.kind, series.encoding, len(series.instances)) == ("mip", "sc", 1)
    assert ds.SOPClassUID == "1.2.840.10008.5.1.4.1.1.7"
    assert (ds.Modality, ds.ConversionType, ds.SyntheticData, ds.BurnedInAnnotation) == ("OT", "SYN", "YES", "YES")
    assert (ds.PhotometricInterpretation, ds.BitsAllocated, ds.BitsStored) == ("MONOCHROME2", 8, 8)
    assert ds.SeriesNumber == 9030
    assert ds.SeriesDescription.startswith("SYNTHETIC")
    assert ds.StudyInstanceUID == sample.source.study_uid
    assert ds.SeriesInstanceUID == series.series_uid != sample.pet("sc").series_uid
    assert "RescaleSlope" not in ds
    assert np.array_equal(ds.pixel_array, mip_image(sample.suv))
    assert series == sample.mip()
    assert sample.mip("pet").series_uid != series.series_uid
    assert "NOT FOR DIAGNOSIS" in MIP_BANNER


def test_the_mip_picture_has_three_views_and_a_color_bar_in_suv(monkeypatch: pytest.MonkeyPatch):
    views, bars = [], []
    show, color_bar = picture.show, picture.color_bar

    def shown(axes: Axes, image: np.ndarray, grid: Grid, plane: str, *arguments: object, **how: object) -> None:
        show(axes, image, grid, plane, *arguments, **how)
        views.append((plane, image))

    def barred(axes: Axes, colors: str, limits: tuple[float, float], **how: str) -> None:
        color_bar(axes, colors, limits, **how)
        bars.append((limits, how["label"]))

    monkeypatch.setattr(picture, "show", shown)
    monkeypatch.setattr(picture, "color_bar", barred)
    suv = suv_volume()
    mip_image(suv)
    for (plane, image), (name, axis) in zip(views, (("coronal", 1), ("sagittal", 2), ("axial", 0)), strict=True):
        assert plane == name
        assert np.array_equal(image, suv.suv.max(axis=axis))
    assert bars == [((0.0, 7.0), "SUVbw (g/ml)")]


def test_the_banner_is_burned_into_the_mip_picture(monkeypatch: pytest.MonkeyPatch):
    image = mip_image(suv_volume())
    monkeypatch.setattr(picture, "MIP_BANNER", "")
    without = mip_image(suv_volume())
    rows = np.flatnonzero((image != without).any(axis=1))
    assert ((image[rows] < 128) & (without[rows] == 255)).sum() > 500
    assert rows.max() < 40  # above the views: it covers no value


def test_the_mip_picture_is_dark_where_uptake_is_and_on_the_patients_left():
    image = mip_image(suv_volume())
    assert image.dtype == np.uint8
    assert image[0, 0] == 255
    box = coronal_box(image)
    middle = image[box][100:-100, 20:-20]  # without letters and scale bar
    rows, columns = np.nonzero(middle < 30)
    assert rows.size
    assert columns.min() > middle.shape[1] / 2


def coronal_box(image: np.ndarray) -> tuple[slice, slice]:
    """The leftmost panel: inside the first long dark line of the frame."""
    columns = np.flatnonzero((image < 128).sum(axis=0) > image.shape[0] * 0.5)
    rows = np.flatnonzero((image < 128).sum(axis=1) > image.shape[1] * 0.2)
    left = columns[0]
    right = columns[columns > left + 20][0]
    return slice(rows[0] + 2, rows[-1] - 1), slice(left + 2, right - 1)


def test_the_panels_have_the_shape_of_the_body_in_millimeters():
    image = mip_image(suv_volume())
    rows, columns = coronal_box(image)
    # body 300 mm high, filling the grid; 120 mm wide and 15 mm margin on both sides
    assert (rows.stop - rows.start) / (columns.stop - columns.start) == pytest.approx(300 / 150, rel=0.03)


def test_an_empty_volume_still_gives_a_picture():
    empty = SuvVolume(suv=np.full(GRID.shape, np.nan, np.float32), grid=GRID)
    assert mip_image(empty).shape[0] > 100


def open_png(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(png)).convert("RGB"))


def test_the_overview_is_a_picture_and_the_same_for_the_same_inputs():
    arguments = (ct_volume(), district_map(), suv_volume())
    png = overview_png(*arguments, title="phantom $3$")
    assert png == overview_png(*arguments, title="phantom $3$")
    pixels = open_png(png)
    assert pixels.shape[0] > 300
    with_truth = open_png(overview_png(*arguments, true_suv=suv_volume().suv))
    assert with_truth.shape[1] > pixels.shape[1]


def test_the_color_bars_of_a_very_short_series_do_not_touch(monkeypatch: pytest.MonkeyPatch):
    short = replace(GRID, shape=(8, 40, 50))  # 40 mm
    bars = []
    real = picture.color_bar

    def remembered(axes: Axes, *arguments: str, **how: str) -> None:
        real(axes, *arguments, **how)
        bars.append(axes)

    monkeypatch.setattr(picture, "color_bar", remembered)
    ct = CtVolume(hu=ct_volume().hu[:8], grid=short, source=header_only())
    districts = replace(district_map(), labels=labels()[30:38], grid=short)
    overview_png(ct, districts, SuvVolume(suv=suv_volume().suv[:8], grid=short))
    low, high = (bar.get_tightbbox(FigureCanvasAgg(bar.figure).get_renderer()) for bar in bars)  # with their labels
    assert 0 < low.y0 < low.y1 < high.y0 < high.y1 < bars[0].figure.bbox.y1


def test_the_overview_shows_what_was_not_evaluated():
    stripes = (89, 115, 191)  # blue, over the white of the MIP
    pixels = open_png(overview_png(ct_volume(), district_map(), suv_volume((District.LEGS,))))
    whole = open_png(overview_png(ct_volume(), district_map(), suv_volume()))

    def striped(image: np.ndarray) -> int:
        return int((np.abs(image.astype(int) - stripes).max(axis=2) < 25).sum())

    assert striped(pixels) > striped(whole) + 500


def test_the_overview_accepts_grids_of_their_own_and_refuses_a_truth_that_does_not_fit():
    fine = Grid(
        shape=(90, 70, 66), spacing_mm=(3.1, 2.2, 3.0), origin_mm=(-90.0, -70.0, 5.0), frame_of_reference_uid="2.25.1"
    )
    ct = CtVolume(hu=np.zeros(fine.shape, np.float32), grid=fine, source=header_only())
    assert overview_png(ct, district_map(), suv_volume())[:4] == b"\x89PNG"
    with pytest.raises(GeometryError, match="does not fit"):
        overview_png(ct, district_map(), suv_volume(), true_suv=np.zeros((2, 2, 2), np.float32))


def test_the_statistics_are_those_of_the_written_values():
    head, trunk, legs = district_stats(suv_volume((District.LEGS,)), district_map())
    assert [s.district for s in (head, trunk, legs)] == [District.HEAD, District.TRUNK, District.LEGS]
    code_of_one = round(1 / 0.0009999) * 0.0009999
    assert head.suv_mean == pytest.approx(code_of_one, abs=1e-9)
    assert head.volume_ml == pytest.approx(10 * 24 * 30 * 0.08)
    assert trunk.suv_max == pytest.approx(12.0, abs=0.0005)
    assert (head.confidence, legs.confidence) == (0.9, 0.0)
    assert (legs.evaluated, legs.suv_mean, legs.suv_max) == (False, 0.0, 0.0)
    assert legs.volume_ml > 0


def test_statistics_agree_with_plain_arithmetic_on_noise():
    rng = np.random.default_rng(3)
    suv = SuvVolume(suv=rng.gamma(1.5, 2.0, GRID.shape).astype(np.float32), grid=GRID)
    for stats in district_stats(suv, district_map()):
        inside = suv.suv[labels() == stats.district]
        assert stats.suv_mean == pytest.approx(inside.mean(), abs=0.0005)
        assert stats.suv_max == pytest.approx(inside.max(), abs=0.001)


def test_statistics_need_one_grid():
    with pytest.raises(GeometryError, match="differ in shape"):
        district_stats(sample_suv(), district_map())
