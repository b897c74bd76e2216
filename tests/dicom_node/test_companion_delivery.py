"""The measurement report and the presentation states on their way from the configuration to the destinations."""

from __future__ import annotations

import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

import highdicom as hd
import pytest
from fake_pacs import FakePacs
from orthanc import running_orthanc
from pydicom import dcmread
from tiny_bundle import write_tiny_bundle
from tiny_study import write_tiny_study
from typer.testing import CliRunner

from dicom_node.cli import app
from dicom_node.config import Config, DestinationConfig, OutputConfig, PeerConfig
from dicom_node.net.scu import Timeouts, send_series
from dicom_node.settle import OPTIONAL_KINDS
from dicom_node.worker import new_deliveries, pipeline_options
from pipeline.provenance import NOT_IN_KEY
from pipeline.result import SeriesSummary, read_summary
from pipeline.types import OutputOptions

KEYS = ("sr", "presentation_states", "sr_series_number", "gsps_series_number", "pcps_series_number")
EVERY_KIND = ("pet", "mip", "seg", "uncertainty", "sr", "gsps", "pcps")
SERIES = tuple(
    SeriesSummary(
        kind=kind, encoding=encoding, series_uid=f"2.25.{n}", sop_class_uid="1.2", instances=n, folder=f"{kind}-x"
    )
    for n, (kind, encoding) in enumerate(
        [
            *(("pet", "sc"), ("pet", "pet"), ("mip", "sc"), ("uncertainty", "sc")),
            *((kind, encoding) for encoding in ("sc", "pet") for kind in ("seg", "sr", "gsps", "pcps")),
        ],
        start=1,
    )
)


def destination(**changes: Any) -> DestinationConfig:
    return DestinationConfig(name="d", peer="d", **changes)


@pytest.mark.parametrize("encoding", ["sc", "pet"])
def test_a_destination_gets_the_report_and_the_states_of_its_own_pet_after_what_they_refer_to(encoding: Any) -> None:
    wanted = new_deliveries(SERIES, [destination(encoding=encoding)])
    assert tuple(d.kind for d in wanted) == EVERY_KIND
    for delivery in wanted:
        if delivery.kind in ("pet", "seg", "sr", "gsps", "pcps"):
            assert delivery.encoding == encoding


def test_a_report_on_the_pet_series_of_another_encoding_is_not_sent() -> None:
    left_out = [s for s in SERIES if (s.kind, s.encoding) not in (("sr", "pet"), ("gsps", "pet"))]
    kinds = [d.kind for d in new_deliveries(left_out, [destination(encoding="pet")])]
    assert kinds == ["pet", "mip", "seg", "uncertainty", "pcps"]


def test_a_destination_that_wants_none_gets_none() -> None:
    kinds = {d.kind for d in new_deliveries(SERIES, [destination(send_sr=False)])}
    assert kinds == set(EVERY_KIND) - {"sr"}
    kinds = {d.kind for d in new_deliveries(SERIES, [destination(send_presentation_states=False)])}
    assert kinds == set(EVERY_KIND) - {"gsps", "pcps"}


def test_a_companion_that_a_destination_refuses_by_class_does_not_fail_the_job() -> None:
    assert set(EVERY_KIND) - OPTIONAL_KINDS == {"pet"}


def test_the_configured_companions_reach_the_pipeline() -> None:
    numbers = {"sr_series_number": 71, "gsps_series_number": 72, "pcps_series_number": 73}
    changed = OutputConfig(sr=True, presentation_states=True, **numbers)
    options = pipeline_options(Config(output=changed)).output
    assert [getattr(options, key) for key in KEYS] == [True, True, 71, 72, 73]
    plain = pipeline_options(Config()).output
    assert (plain.sr, plain.presentation_states) == (False, False)


def test_the_shipped_configuration_names_the_keys_with_their_defaults() -> None:
    shipped = tomllib.loads((Path(__file__).parents[2] / "config.toml").read_text(encoding="utf-8"))
    for key in KEYS:
        assert shipped["output"][key] == getattr(OutputConfig(), key) == getattr(OutputOptions(), key)
    for key in ("send_sr", "send_presentation_states"):
        assert shipped["destinations"][0][key] == getattr(destination(), key) is True


def test_no_two_series_of_one_job_have_the_same_number() -> None:
    numbers = [f.default for f in fields(OutputOptions) if f.name.endswith("series_number")]
    assert len(numbers) == len(set(numbers)) == len(EVERY_KIND)


def test_a_companion_more_leaves_the_pet_its_uids() -> None:
    assert set(KEYS) <= set(NOT_IN_KEY)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `dicom-node run` writes with every companion that refers to another object."""
    folder = tmp_path_factory.mktemp("run")
    write_tiny_study(folder / "ct")
    bundle, out = write_tiny_bundle(folder / "bundle"), folder / "out"
    words = ["run", folder / "ct", out, "--bundle", bundle, "--device", "cpu", "--no-mip", "--encoding", "both"]
    words += ["--seg", "--sr", "--presentation-states"]
    done = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    return out


REFERRING = tuple(f"{kind}-{encoding}" for encoding in ("sc", "pet") for kind in ("sr", "gsps", "pcps"))


def test_run_writes_a_report_and_states_for_each_encoding_of_the_pet(result: Path) -> None:
    folders = tuple(s.folder for s in read_summary(result).series)
    assert folders == ("pet-sc", "pet-pet", "seg-sc", "seg-pet", *REFERRING)


def test_the_report_says_what_the_job_says(result: Path) -> None:
    stats = read_summary(result).stats
    for encoding in ("sc", "pet"):
        report = hd.sr.srread(result / f"sr-{encoding}" / "0001.dcm").content
        groups = {g.tracking_identifier: g for g in report.get_volumetric_roi_measurement_groups()}
        assert list(groups) == [row.district.key for row in stats]
        for row in stats:
            mean, top = (m.value for m in groups[row.district.key].get_measurements() if m.derivation)
            assert (mean, top) == (pytest.approx(row.suv_mean, abs=1e-6), pytest.approx(row.suv_max, abs=1e-6))


@pytest.mark.parametrize("encoding", ["sc", "pet"])
def test_report_and_seg_refer_to_the_pet_of_their_own_encoding(result: Path, encoding: str) -> None:
    pet, seg = (dcmread(result / f"{kind}-{encoding}" / "0001.dcm") for kind in ("pet", "seg"))
    assert [one.SeriesInstanceUID for one in seg.ReferencedSeriesSequence] == [pet.SeriesInstanceUID]
    report = hd.sr.srread(result / f"sr-{encoding}" / "0001.dcm")
    (study,) = report.CurrentRequestedProcedureEvidenceSequence
    assert {one.SeriesInstanceUID for one in study.ReferencedSeriesSequence} == {
        pet.SeriesInstanceUID,
        seg.SeriesInstanceUID,
    }
    for group in report.content.get_volumetric_roi_measurement_groups():
        assert group.referenced_segment.referenced_sop_instance_uid == seg.SOPInstanceUID


def test_orthanc_keeps_the_report_and_the_states_beside_their_pet(result: Path, tmp_path: Path) -> None:
    with running_orthanc(tmp_path / "orthanc", modalities={}) as orthanc:
        pacs = PeerConfig(name="pacs", ae_title=orthanc.ae_title, port=orthanc.dicom_port)
        for folder in ("pet-sc", "seg-sc", *REFERRING[:3], *REFERRING[:3]):  # sent twice: kept once
            files = sorted((result / folder).iterdir())
            sent = send_series(files, pacs, calling_ae="SYNPET", timeouts=Timeouts(acse_s=60, dimse_s=60))
            assert sent.ok, f"{folder}: {sent.text}"
        assert {m: len(orthanc.series(m)) for m in ("PT", "SEG", "SR", "PR")} == {"PT": 1, "SEG": 1, "SR": 1, "PR": 2}
        (report,) = orthanc.instances(orthanc.series("SR")[0], tmp_path / "back")
        assert dcmread(report).ContentSequence == dcmread(result / "sr-sc" / "0001.dcm").ContentSequence


def test_a_pacs_that_knows_the_classes_takes_them(result: Path) -> None:
    files = [result / folder / "0001.dcm" for folder in REFERRING]
    with FakePacs(classes=[dcmread(path).SOPClassUID for path in files[:3]]) as pacs:
        sent = send_series(files, pacs.peer(), calling_ae="SYNPET", timeouts=Timeouts(acse_s=60, dimse_s=60))
    assert sent.ok, sent.text
    assert pacs.received.order == [dcmread(path).SOPInstanceUID for path in files]
