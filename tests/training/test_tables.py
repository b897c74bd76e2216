from __future__ import annotations

import csv
import io

import pytest

from training.evaluation.aggregate import by_method, of_region, per_patient
from training.evaluation.agreement import region_agreement
from training.evaluation.measure import Measure
from training.evaluation.tables import (
    Table,
    cell,
    comparisons_csv,
    latex,
    make_tables,
    markdown,
    markdown_rows,
    tables_csv,
    tex,
)

METHODS = ("pix2pix/districts", "pix2pix/whole_body", "cyclegan/districts", "hu_lookup", "district_mean")


def row(method: str, mae: float, *, patient: str = "p", study: str | None = None, **other: object) -> Measure:
    regions = {
        region: {"mae": mae, "psnr": 30.0 - 100 * mae, "ssim": 0.9 - mae, "suv_mean": 1 + mae, "true_suv_mean": 1.0}
        for region in ("body", "trunk", "field_of_view")
    }
    content = {"study": study or patient, "patient": patient, "diagnosis": "lymphoma", "seed": 0, "regions": regions}
    return Measure.model_validate(content | {"method": method} | other)


@pytest.fixture
def measures() -> list[Measure]:
    return [
        row(method, 0.01 * (rank + 1) + 0.001 * number * (rank + 1), patient=f"p{number}")
        for rank, method in enumerate(METHODS)
        for number in range(6)
    ]


@pytest.fixture
def tables(measures: list[Measure]) -> list[Table]:
    return make_tables(measures)


def test_seeds_are_averaged_within_a_study_and_studies_within_a_patient() -> None:
    rows = [
        row("pix2pix/districts", 0.1, patient="a", study="a1", seed=0),
        row("pix2pix/districts", 0.3, patient="a", study="a1", seed=1),
        row("pix2pix/districts", 0.4, patient="a", study="a2", seed=0),
        row("pix2pix/districts", 0.5, patient="b", study="b1", seed=0),
    ]
    assert per_patient(rows, of_region("body", "mae")) == pytest.approx({"a": 0.3, "b": 0.5})


def test_a_region_that_a_study_does_not_show_is_absent_and_not_zero(tables: list[Table]) -> None:
    absent = tables[0].cells["head", "pix2pix/districts", "mae"]
    assert (absent["n"], absent["mean"]) == (0, None)
    assert cell(absent, 3) == "-"


def test_every_table_has_both_models_and_both_baselines_in_the_paper_s_order(measures: list[Measure]) -> None:
    for table in make_tables(list(reversed(measures))):
        assert table.methods == METHODS
    assert list(by_method(reversed(measures))) == list(METHODS)


def test_the_groups_are_districts_lesions_and_conditions(tables: list[Table]) -> None:
    first, second, third = tables
    assert first.groups == ("head", "trunk", "arms", "legs", "body", "field_of_view")
    assert second.groups == ("lesions",)
    assert third.groups == ("lymphoma", "lung_cancer", "melanoma", "negative")
    assert third.cells["lymphoma", "hu_lookup", "mae"]["n"] == 6
    assert third.cells["negative", "hu_lookup", "mae"]["n"] == 0


def test_districts_meet_the_whole_body_network_and_every_network_the_baselines(tables: list[Table]) -> None:
    pairs = dict.fromkeys((t.method, t.other) for t in tables[0].tests)
    assert list(pairs) == [
        ("pix2pix/districts", "pix2pix/whole_body"),
        ("pix2pix/districts", "hu_lookup"),
        ("pix2pix/districts", "district_mean"),
        ("pix2pix/whole_body", "hu_lookup"),
        ("pix2pix/whole_body", "district_mean"),
        ("cyclegan/districts", "hu_lookup"),
        ("cyclegan/districts", "district_mean"),
    ]
    assert {t.group for t in tables[0].tests} == {"head", "trunk", "arms", "legs", "body"}


def test_the_family_of_a_table_is_all_its_comparisons(tables: list[Table]) -> None:
    tested = [t for t in tables[0].tests if t.p_t is not None]
    assert len(tested) == 7 * 2 * 3  # trunk and body; the other districts are not tested
    smallest = min(tested, key=lambda t: t.p_t)
    assert smallest.holm_t == pytest.approx(len(tested) * smallest.p_t)


def test_sd_and_se_are_told_apart_in_every_caption(tables: list[Table]) -> None:
    text = "\n".join(markdown(tables[0], 20.0))
    assert "Mean ± SD (SE) [95 % bootstrap interval of the mean]" in text
    assert "MAE in SUV / 20" in text
    shown = cell({"n": 4, "mean": 0.5, "sd": 0.2, "se": 0.1, "low": 0.3, "high": 0.7}, 2)
    assert shown == "0.50 ± 0.20 (0.10) [0.30, 0.70]"


def test_the_csv_reads_back_to_the_cells(tables: list[Table]) -> None:
    lines = list(csv.DictReader(io.StringIO(tables_csv(tables))))
    assert len(lines) == sum(len(t.cells) for t in tables)
    (found,) = [
        r for r in lines if (r["table"], r["group"], r["method"], r["metric"]) == ("I", "trunk", "hu_lookup", "psnr")
    ]
    assert float(found["mean"]) == tables[0].cells["trunk", "hu_lookup", "psnr"]["mean"]
    assert {r["mean"] for r in lines if r["group"] == "head"} == {""}
    assert {r["verdict"] for r in csv.DictReader(io.StringIO(comparisons_csv(tables)))} == {"win", "not tested"}


def test_latex_is_escaped_and_every_row_has_every_column(tables: list[Table]) -> None:
    assert tex("50 % & a_b ± c ↓ {x}\\") == r"50 \% \& a\_b $\pm$ c $\downarrow$ \{x\}\textbackslash{}"
    text = latex(tables, 20.0, "100 % phantoms_only")
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == text.count(r"\toprule") == 3
    assert r"100 \% phantoms\_only" in text
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert len(rows) == 3 + sum(len(t.groups) * len(t.methods) for t in tables)
    assert {line.replace(r"\&", "").count("&") for line in rows} == {5}
    assert text.isascii()


def test_a_pipe_in_a_cell_does_not_break_a_markdown_table() -> None:
    assert markdown_rows(["a|b"], [["c"]]) == ["| a\\|b |", "| --- |", "| c |"]


def test_agreement_gives_bias_and_limits_over_patients() -> None:
    rows = [row("hu_lookup", value, patient=f"p{value}") for value in (0.1, 0.2, 0.3)]
    found = region_agreement(rows, "trunk")
    assert found is not None
    assert (found.n, found.bias) == (3, pytest.approx(0.2))
    assert found.limits == pytest.approx((0.2 - 1.96 * 0.1, 0.2 + 1.96 * 0.1))
    assert region_agreement(rows, "head") is None
    only = region_agreement(rows[:1], "trunk")
    assert only is not None
    assert only.limits is None
