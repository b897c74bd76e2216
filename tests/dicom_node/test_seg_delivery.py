"""The districts' SEG on its way from the configuration to the destinations."""

from __future__ import annotations

import json
import tomllib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from fake_pacs import FakePacs
from pydicom import dcmread
from pydicom.uid import ImplicitVRLittleEndian, SegmentationStorage
from result_factory import write_instances
from tiny_bundle import write_tiny_bundle
from tiny_study import write_tiny_study

from dicom_node.config import Config, DestinationConfig, OutputConfig
from dicom_node.net.scu import Timeouts, send_series
from dicom_node.settle import OPTIONAL_KINDS
from dicom_node.worker import new_deliveries, pipeline_options
from pipeline.bundle import load_bundle
from pipeline.result import SeriesSummary, read_summary
from pipeline.run import synthesize_series, write_result

SERIES = tuple(
    SeriesSummary(
        kind=kind, encoding=encoding, series_uid=f"2.25.{n}", sop_class_uid="1.2", instances=n, folder=f"{kind}-x"
    )
    for n, (kind, encoding) in enumerate(
        (("pet", "sc"), ("pet", "pet"), ("mip", "sc"), ("seg", "sc"), ("seg", "pet")), start=1
    )
)


def destination(**changes: Any) -> DestinationConfig:
    return DestinationConfig(name="d", peer="d", **changes)


@pytest.mark.parametrize("encoding", ["sc", "pet"])
def test_a_destination_gets_the_seg_of_its_own_pet_last(encoding: Any) -> None:
    wanted = new_deliveries(SERIES, [destination(encoding=encoding)])
    assert [(d.kind, d.encoding) for d in wanted] == [("pet", encoding), ("mip", "sc"), ("seg", encoding)]


def test_a_seg_on_the_pet_series_of_another_encoding_is_not_sent() -> None:
    wanted = new_deliveries(SERIES[:4], [destination(encoding="pet")])
    assert [(d.kind, d.encoding) for d in wanted] == [("pet", "pet"), ("mip", "sc")]


def test_a_destination_that_wants_no_seg_gets_none() -> None:
    wanted = new_deliveries(SERIES, [destination(send_seg=False)])
    assert [d.kind for d in wanted] == ["pet", "mip"]


def test_a_result_without_a_seg_opens_no_delivery_for_it() -> None:
    assert [d.kind for d in new_deliveries(SERIES[:3], [destination()])] == ["pet", "mip"]


def test_a_seg_that_a_destination_refuses_by_class_does_not_fail_the_job() -> None:
    assert "seg" in OPTIONAL_KINDS


def test_the_configured_seg_reaches_the_pipeline() -> None:
    options = pipeline_options(Config(output=OutputConfig(seg=True, seg_series_number=77))).output
    assert (options.seg, options.seg_series_number) == (True, 77)
    assert not pipeline_options(Config()).output.seg


def test_the_shipped_configuration_names_the_keys_with_their_defaults() -> None:
    shipped = tomllib.loads((Path(__file__).parents[2] / "config.toml").read_text(encoding="utf-8"))
    assert (shipped["output"]["seg"], shipped["output"]["seg_series_number"]) == (
        OutputConfig().seg,
        OutputConfig().seg_series_number,
    )
    assert shipped["destinations"][0]["send_seg"] == destination().send_seg


def test_a_job_with_seg_leaves_a_whole_result_and_the_pacs_takes_it(tmp_path: Path) -> None:
    paths = write_tiny_study(tmp_path / "ct")
    bundle = load_bundle(write_tiny_bundle(tmp_path / "bundle"))
    config = Config.model_validate(
        {"output": {"seg": True}, "pipeline": {"device": "cpu", "threads": 1}, "gate": {"required_districts": []}}
    )
    result = synthesize_series(paths, bundle, pipeline_options(config), created=datetime(2024, 5, 6, tzinfo=UTC))
    write_result(result, tmp_path / "out")
    summary = read_summary(tmp_path / "out")
    assert [(s.kind, s.encoding) for s in summary.series] == [("pet", "sc"), ("mip", "sc"), ("seg", "sc")]
    assert summary.series[2].sop_class_uid == SegmentationStorage
    (path,) = sorted((tmp_path / "out" / summary.series[2].folder).iterdir())
    ds = dcmread(path)
    present = [row["district"] for row in json.loads((tmp_path / "out" / "result.json").read_text())["stats"]]
    assert [item.SegmentLabel for item in ds.SegmentSequence] == present
    assert ds.FrameOfReferenceUID == dcmread(paths[0], stop_before_pixels=True).FrameOfReferenceUID
    with FakePacs(classes=[SegmentationStorage]) as pacs:
        sent = send_series([path], pacs.peer(), calling_ae="SYNPET", timeouts=Timeouts(acse_s=60, dimse_s=60))
    assert sent.ok, sent.text
    assert pacs.received.order == [ds.SOPInstanceUID]


def test_a_peer_that_takes_implicit_little_endian_only_gets_the_seg_transcoded(tmp_path: Path) -> None:
    files = write_instances(tmp_path, 1, sop_class_uid=SegmentationStorage)
    with FakePacs(classes=[SegmentationStorage], syntaxes=[ImplicitVRLittleEndian]) as pacs:
        assert send_series(files, pacs.peer(), calling_ae="SYNPET").ok
    assert set(pacs.received.syntaxes) == {ImplicitVRLittleEndian}
