"""The model card says what the manifest and the report hold, and what is not known to work."""

from __future__ import annotations

from typing import Any

import pytest
from test_export import CREATED, Workshop, write_report

from pipeline.bundle import CARD, Manifest
from training.card import model_card
from training.evaluation.report_format import EvaluationReport, read_report


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("card"))


@pytest.fixture(scope="module")
def manifest(shop: Workshop) -> Manifest:
    return shop.export().manifest  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def card(shop: Workshop, manifest: Manifest) -> str:
    return (shop.root / "bundle" / CARD).read_text()


def altered(shop: Workshop, **changes: Any) -> EvaluationReport:
    return read_report(write_report(shop.root / "other", shop.prepared, shop.records, **changes))


def test_it_says_research_only_and_phantoms_only(card: str) -> None:
    assert "**Not for clinical use**" in card
    assert "Research only" in card
    assert "only ever seen computer phantoms" in card


def test_it_names_data_digests_counts_and_runs(card: str, shop: Workshop) -> None:
    assert "| train | 2 | 1 |" in card
    assert shop.prepared.manifest.digest in card
    assert shop.prepared.manifest.split_digest in card
    assert "| head | pix2pix | unet3d, width 2, depth 2 | 0 | 10 | 1.5 | cpu |" in card


def test_the_table_sets_districts_against_the_whole_body_and_both_baselines(card: str) -> None:
    rows = [line for line in card.splitlines() if line.startswith("| ")]
    header = "|  | body | head | trunk | arms | legs |"
    table = rows[rows.index(header) + 2 : rows.index(header) + 6]
    assert [row.split("|")[1].strip() for row in table] == [
        "pix2pix district networks, stitched",
        "pix2pix whole-body network alone",
        "HU-to-SUV look-up (baseline)",
        "district mean (baseline)",
    ]
    assert "0.0200 ± 0.1000 [0.0000, 1.0000], n 1" in table[0]
    assert table[0].rstrip(" |").endswith("not measured")
    assert "cyclegan" not in card
    assert "a segmenter adds" in card  # the districts of the evaluation are the prepared ones


def test_every_weights_file_is_listed_with_its_digest(card: str, manifest: Manifest) -> None:
    for entry in manifest.networks.values():
        assert f"| {entry.file} | `{entry.sha256}` |" in card


def test_a_district_that_no_study_shows_is_named_as_unmeasured(card: str) -> None:
    assert "Not measured on the test studies: legs." in card


def test_a_bundle_of_patients_does_not_speak_of_phantoms(shop: Workshop, manifest: Manifest) -> None:
    text = model_card(manifest, altered(shop, phantom=False))
    assert "FDG-PET/CT studies of patients" in text
    assert "phantoms" not in text.replace(manifest.statement, "")


def test_figures_of_the_validation_side_are_called_so(shop: Workshop, manifest: Manifest) -> None:
    assert "may have served to choose settings" in model_card(manifest, altered(shop, split="validation"))


def test_a_split_by_study_is_called_flattering(shop: Workshop, manifest: Manifest) -> None:
    training = manifest.training | {"split_unit": "study"}
    text = model_card(manifest.model_copy(update={"training": training}), altered(shop))
    assert "the figures flatter" in text


def test_districts_without_a_network_are_limits(shop: Workshop, manifest: Manifest) -> None:
    networks = {key: entry for key, entry in manifest.networks.items() if key not in ("arms", "legs")}
    text = model_card(manifest.model_copy(update={"networks": networks}), altered(shop))
    assert "No network for: arms, legs; the whole-body network serves them." in text


def test_the_card_s_date_is_the_bundle_s(card: str) -> None:
    assert f"{CREATED:%Y-%m-%d}" in card


def test_lesions_are_shown_as_they_were_measured(shop: Workshop, manifest: Manifest) -> None:
    figures = {"n": 3, "mean": 0.151, "sd": 0.02, "se": 0.01, "low": 0.1, "high": 0.2}
    details = {
        "tables": {"II": [{"group": "lesions", "method": "pix2pix/districts", "metric": "mae", **figures}]},
        "sensitivity_at": {"pix2pix/districts": {"1": 0.25, "2": None}, "cyclegan/districts": {"1": 0.9}},
        "false_positive_ml": {"pix2pix/districts": {**figures, "mean": None}},
    }
    text = model_card(manifest, altered(shop, details=details))
    line = next(line for line in text.splitlines() if "25% at 1" in line)
    assert "0.1510 ± 0.0200 [0.1000, 0.2000], n 3" in line
    assert line.count("not measured") == 2
    assert "90%" not in text


def test_figures_of_several_seeds_are_called_an_average(shop: Workshop, manifest: Manifest, card: str) -> None:
    assert "seeds" not in card
    text = model_card(manifest.model_copy(update={"metrics": manifest.metrics | {"seeds": [0, 1]}}), altered(shop))
    assert "runs of seeds 0, 1" in text
