"""The uncertainty map on its way from the configuration to the destinations and to the person who asks."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from fake_pacs import FakePacs
from pydicom import dcmread
from pydicom.uid import SecondaryCaptureImageStorage
from tiny_bundle import write_tiny_bundle
from tiny_study import write_tiny_study
from typer.testing import CliRunner

from dicom_node.cli import app
from dicom_node.cli.common import print_outcome
from dicom_node.config import Config, DestinationConfig, OutputConfig
from dicom_node.net.scu import Timeouts, send_series
from dicom_node.settle import OPTIONAL_KINDS
from dicom_node.worker import new_deliveries, pipeline_options, result_details
from pipeline.result import SeriesSummary, read_summary

SERIES = tuple(
    SeriesSummary(
        kind=kind, encoding=encoding, series_uid=f"2.25.{n}", sop_class_uid="1.2", instances=n, folder=f"{kind}-x"
    )
    for n, (kind, encoding) in enumerate(
        (("pet", "sc"), ("pet", "pet"), ("mip", "sc"), ("seg", "sc"), ("seg", "pet"), ("uncertainty", "sc")), start=1
    )
)


def destination(**changes: Any) -> DestinationConfig:
    return DestinationConfig(name="d", peer="d", **changes)


@pytest.mark.parametrize("encoding", ["sc", "pet"])
def test_a_destination_gets_the_map_last_whatever_its_encoding(encoding: Any) -> None:
    wanted = new_deliveries(SERIES, [destination(encoding=encoding)])
    assert [(d.kind, d.encoding) for d in wanted][-1] == ("uncertainty", "sc")
    assert [d.kind for d in wanted] == ["pet", "mip", "seg", "uncertainty"]


def test_a_destination_that_wants_no_map_gets_none() -> None:
    assert [d.kind for d in new_deliveries(SERIES, [destination(send_uncertainty=False)])] == ["pet", "mip", "seg"]


def test_a_map_that_a_destination_refuses_by_class_does_not_fail_the_job() -> None:
    assert "uncertainty" in OPTIONAL_KINDS


def test_the_configured_map_reaches_the_pipeline() -> None:
    options = pipeline_options(Config(output=OutputConfig(uncertainty=True, uncertainty_series_number=77))).output
    assert (options.uncertainty, options.uncertainty_series_number) == (True, 77)
    assert not pipeline_options(Config()).output.uncertainty


def test_the_shipped_configuration_names_the_keys_with_their_defaults() -> None:
    shipped = tomllib.loads((Path(__file__).parents[2] / "config.toml").read_text(encoding="utf-8"))
    for key in ("uncertainty", "uncertainty_series_number"):
        assert shipped["output"][key] == getattr(OutputConfig(), key)
    assert shipped["destinations"][0]["send_uncertainty"] == destination().send_uncertainty


def test_run_writes_a_map_that_a_pacs_takes_and_shows_its_means(tmp_path: Path) -> None:
    write_tiny_study(tmp_path / "ct")
    bundle, out = write_tiny_bundle(tmp_path / "bundle"), tmp_path / "out"
    words = ["run", tmp_path / "ct", out, "--bundle", bundle, "--device", "cpu", "--no-mip", "--uncertainty"]
    done = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    assert "mean SD" in done.output
    summary = read_summary(out)
    assert [s.folder for s in summary.series] == ["pet-sc", "uncertainty-sc"]
    rows = json.loads((out / "result.json").read_text())["stats"]
    assert all(row["uncertainty"] > 0 for row in rows)
    assert result_details(summary)["stats"] == rows  # what the job keeps
    assert all(f"{row['uncertainty']:.3f}" in done.output for row in rows)
    files = sorted((out / "uncertainty-sc").iterdir())
    with FakePacs(classes=[SecondaryCaptureImageStorage]) as pacs:
        sent = send_series(files, pacs.peer(), calling_ae="SYNPET", timeouts=Timeouts(acse_s=60, dimse_s=60))
    assert sent.ok, sent.text
    assert pacs.received.order == [dcmread(path, stop_before_pixels=True).SOPInstanceUID for path in files]


def test_a_result_of_an_older_node_is_still_read(tmp_path: Path) -> None:
    row = {"district": "head", "volume_ml": 4.0, "suv_mean": 2.5, "suv_max": 12.0, "confidence": 0.9, "evaluated": True}
    made = dict.fromkeys(("software_version", "bundle_name", "bundle_version", "bundle_sha256"), "x")
    made |= dict.fromkeys(("segmenter", "segmenter_version", "device"), "x")
    old = {"series": [], "stats": [row], "provenance": {**made, "models": []}, "stage_seconds": {}}
    (tmp_path / "result.json").write_text(json.dumps(old))
    assert read_summary(tmp_path).stats[0].uncertainty is None


def test_a_job_without_a_map_shows_no_column_for_it(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"district": "head", "volume_ml": 4.0, "suv_mean": 2.5, "suv_max": 12.0, "confidence": 0.9, "evaluated": True}
    print_outcome({}, [row], [])  # as an older node left it
    print_outcome({}, [{**row, "uncertainty": None}], [])
    assert "SD" not in capsys.readouterr().out
    print_outcome({}, [{**row, "uncertainty": 0.1234}, {**row, "district": "legs", "evaluated": False}], [])
    assert "0.123" in capsys.readouterr().out
