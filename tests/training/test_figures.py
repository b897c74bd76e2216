from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from pipeline.bundle import Normalization
from training.evaluation.agreement import Agreement
from training.evaluation.detection import FrocPoint
from training.evaluation.evaluate import Picture
from training.evaluation.figures import (
    LARGEST_PNG,
    bland_altman,
    froc_curves,
    mae_by_district,
    panels,
    projections,
    save,
)
from training.evaluation.measure import Measure, Truth, read_truth
from training.evaluation.tables import make_tables
from training.prepared import PreparedStudy, StudyRecord

SHAPE = (60, 20, 30)
NOTE = "Computer phantoms, not patients; not for clinical use."


def truth_of(*, lesion: bool) -> Truth:
    districts = np.zeros(SHAPE, np.uint8)
    districts[2:40, 4:16, 5:25] = 2
    districts[40:58, 6:14, 10:20] = 1
    lesions = np.zeros(SHAPE, np.uint8)
    pet = np.where(districts == 1, 0.4, np.where(districts == 2, 0.05, 0)).astype(np.float16)
    if lesion:
        lesions[12:14, 13:15, 8:10] = 1
        pet[lesions > 0] = 0.6
    record = StudyRecord(
        id="phantom-1",
        patient="hash",
        shape=SHAPE,
        spacing_mm=(10.0, 10.0, 10.0),
        origin_mm=(0, 0, 0),
        files={},
        segmenter="given",
    )
    study = PreparedStudy(
        record=record, ct=(districts > 0).astype(np.float16) * 0.5, pet=pet, districts=districts, lesions=lesions
    )
    return read_truth(study)


def picture_of(*methods: str, lesion: bool = True) -> Picture:
    truth = truth_of(lesion=lesion)
    suv = {"real": truth.pet * np.float32(20), **{method: truth.pet * np.float32(18) for method in methods}}
    return Picture(model="pix2pix", seed=0, truth=truth, suv=suv)


def texts(figure: Figure) -> str:
    found = [figure.get_suptitle(), *(axes.get_title() for axes in figure.axes)]
    return "\n".join([*found, *(axes.get_ylabel() for axes in figure.axes)])


def test_the_panels_show_ct_true_and_both_synthetic_pets_with_the_suv_scale_and_what_the_data_are() -> None:
    said = texts(panels(picture_of("districts", "whole_body"), Normalization(), NOTE))
    for expected in ("CT", "true PET", "district networks", "whole-body network", "SUV (g/ml)", NOTE, "phantom-1"):
        assert expected in said


def test_a_network_that_is_not_there_has_no_column() -> None:
    both, one = (panels(picture_of(*m), Normalization(), NOTE) for m in (("districts", "whole_body"), ("districts",)))
    assert "whole-body network" not in texts(one)
    assert len(one.axes) < len(both.axes)


def test_the_head_is_up_and_uptake_is_dark() -> None:
    figure = panels(picture_of("districts"), Normalization(), NOTE)
    image = next(axes for axes in figure.axes if axes.get_title() == "true PET").images[0]
    assert image.origin == "lower"
    assert image.get_cmap().name == "gray_r"
    assert image.get_clim() == (0, 8)
    shown = np.asarray(image.get_array())
    assert shown[50, 15] == pytest.approx(8, abs=0.1)  # the head's uptake lies at high z


def test_a_zoomed_region_holds_the_lesion() -> None:
    figure = panels(picture_of("districts"), Normalization(), NOTE)
    zooms = [axes.images[0] for axes in figure.axes if axes.images and axes.images[0].get_array().shape == (15, 15)]
    highest = [float(image.get_array().max()) for image in zooms if image.get_cmap().name == "gray_r"]
    assert max(highest) == pytest.approx(12, abs=0.1)


def test_a_study_without_a_lesion_has_pictures_too(tmp_path: Path) -> None:
    figure = panels(picture_of("districts", lesion=False), Normalization(ct_range="volume"), NOTE)
    save(figure, tmp_path / "panels.png")
    assert (tmp_path / "panels.png").stat().st_size > 1000


def test_projections_keep_the_highest_uptake_of_every_line() -> None:
    figure = projections(picture_of("districts"), NOTE)
    front = next(axes for axes in figure.axes if axes.get_title() == "true PET").images[0]
    assert np.asarray(front.get_array())[13, 9] == pytest.approx(12, abs=0.1)
    assert NOTE in texts(figure)


def test_a_figure_is_made_coarser_until_it_is_small(tmp_path: Path) -> None:
    figure = Figure(figsize=(12, 12))
    figure.subplots().imshow(np.random.default_rng(0).random((900, 900)), cmap="gray")
    whole = io.BytesIO()
    figure.savefig(whole, format="png", dpi=110)
    save(figure, tmp_path / "noise.png")
    assert (tmp_path / "noise.png").stat().st_size <= LARGEST_PNG < whole.tell()
    with Image.open(tmp_path / "noise.png") as image:
        assert image.size[0] >= 360


def test_the_mae_figure_leaves_out_what_was_not_measured() -> None:
    rows = [
        Measure.model_validate(
            {
                "study": f"s{patient}",
                "patient": f"p{patient}",
                "diagnosis": "negative",
                "method": method,
                "seed": 0,
                "regions": {"trunk": {"mae": 0.01 * (patient + 1), "psnr": 30.0, "ssim": 0.9}},
            }
        )
        for method in ("pix2pix/districts", "hu_lookup")
        for patient in range(3)
    ]
    figure = mae_by_district(make_tables(rows)[0], 20.0, NOTE)
    (axes,) = figure.axes
    points = [list(container[0].get_ydata()) for container in axes.containers]
    assert points == [[pytest.approx(0.02)], [pytest.approx(0.02)]]
    assert axes.get_ylabel() == "MAE (SUV / 20)"


def test_bland_altman_draws_bias_and_both_limits() -> None:
    agreement = Agreement(place="trunk", means=(1.0, 1.1, 1.2), differences=(0.1, 0.2, 0.3))
    (axes,) = bland_altman({"pix2pix/districts": [agreement]}, NOTE).axes
    lines = sorted(float(line.get_ydata()[0]) for line in axes.lines if line.get_marker() == "None")
    assert lines == pytest.approx([0.0, 0.004, 0.2, 0.396])


def test_the_froc_figure_has_a_curve_per_method_with_lesions() -> None:
    points = [FrocPoint(threshold_suv=4.0, sensitivity=0.5, false_positives=2.0)]
    (axes,) = froc_curves({"pix2pix/districts": points, "hu_lookup": []}, NOTE).axes
    assert [line.get_label() for line in axes.lines] == ["Pix2Pix, districts"]
    (empty,) = froc_curves({}, NOTE).axes
    assert empty.get_legend() is None
