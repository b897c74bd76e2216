"""`dicom-node doctor` proves the whole path of a running node; its study goes where it shall and nowhere else."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from bad_input_tools import log_file
from fake_archive import FakeArchive
from fake_pacs import RESULT_CLASSES, free_port
from intake_tools import config, running_intake
from pydicom import dcmread
from pydicom.uid import KeyObjectSelectionDocumentStorage, generate_uid
from tiny_bundle import write_tiny_bundle
from tiny_study import write_tiny_study
from tls_tools import Authority
from typer.testing import CliRunner

from dicom_node.cli import app
from dicom_node.cli.check import ourselves
from dicom_node.cli.doctor import make_test_study
from dicom_node.config import Config, DestinationConfig, load_config
from dicom_node.doctor import node_runs_on
from dicom_node.net.scu import echo, send_series
from dicom_node.net.trial_lock import a_test_is_sent, sending_a_test
from dicom_node.node import Node
from dicom_node.trial import Trial, announce, only_for, trial_of
from storage.ledger import Ledger, open_ledger
from storage.records import REJECTION, Job, JobFilter, JobState, SeriesInfo

RUNNER = CliRunner()
CONFIG = """
[node]
host = "127.0.0.1"
port = {port}
receiver_processes = 1
[[peers]]
name = "near"
ae_title = "PACS"
port = {near}
[[peers]]
name = "far"
ae_title = "PACS"
port = {far}
[[destinations]]
name = "near"
peer = "near"
[[destinations]]
name = "far"
peer = "far"
encoding = "pet"
[intake]
quiet_period_s = 0.5
study_quiet_period_s = 0.5
scan_interval_s = 0.1
min_free_bytes = 1
[pipeline]
bundle = "{bundle}"
device = "cpu"
threads = 1
"""


@dataclass
class House:
    """A running node with two archives; `far` refuses every instance."""

    path: Path
    config: Config
    node: Node
    near: FakeArchive
    far: FakeArchive

    def doctor(self, *words: str) -> tuple[int, dict[str, dict[str, Any]]]:
        result = RUNNER.invoke(app, ["doctor", "--json", "--config", str(self.path), "--timeout", "120", *words])
        steps = json.loads(result.output)
        return result.exit_code, {step["name"]: step for step in steps}

    def latest(self) -> Job:
        return self.node.ledger.find(JobFilter(limit=1))[0]


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("doctor")
    path = folder / "config.toml"
    classes = [*RESULT_CLASSES, KeyObjectSelectionDocumentStorage]
    near, far = FakeArchive(classes=classes), FakeArchive(status_for=lambda _uid, _times: 0xC000)
    with near, far, log_file(folder / "log"):
        bundle = write_tiny_bundle(folder / "bundle")
        path.write_text(CONFIG.format(port=free_port(), near=near.port, far=far.port, bundle=bundle), encoding="utf-8")
        config = load_config(path)
        node = Node(config, drain_s=0)
        node.start()
        try:
            yield House(path, config, node, near, far)
        finally:
            node.stop()


def test_the_whole_path_is_proven_and_the_test_is_retired(house: House) -> None:
    before = set(house.near.instances)
    code, steps = house.doctor("--destination", "near", "--retire")
    assert code == 0, steps
    assert list(steps)[-6:] == ["send", "assembly", "synthesis", "delivery", "proof", "retire"]
    assert {"config", "disk", "ledger", "bundle", "device", "node", "peer near", "proof near"} < set(steps)
    assert "near shows the PET series with its" in steps["proof"]["text"]
    job = house.latest()
    assert job.info.accession in steps["send"]["text"]
    deliveries = house.node.ledger.deliveries(job.id)
    assert {one.destination for one in deliveries} == {"near"}
    notes = [one for one in deliveries if one.kind == REJECTION]
    assert len(notes) == len(deliveries) - len(notes) > 1
    assert len(house.near.instances - before) == sum(one.instances for one in deliveries)
    check_labels(house.node.spool.result_folder(job.id))


def check_labels(result: Path) -> None:
    """One instance of each series, the rejection notes among them."""
    found = [dcmread(min(folder.glob("*.dcm"))) for folder in sorted(result.iterdir()) if folder.is_dir()]
    assert {str(ds.Modality) for ds in found} == {"PT", "OT", "KO"}
    for ds in found:
        assert str(ds.PatientName).startswith("TEST^")
        assert str(ds.StudyDescription).startswith("TEST ")
        assert str(ds.SeriesDescription).startswith("SYNTHETIC TEST " if ds.Modality != "KO" else "SYNTHETIC ")


def test_without_a_destination_nothing_leaves_the_node(house: House) -> None:
    near, far = set(house.near.instances), len(house.far.received.order)
    code, steps = house.doctor()
    assert code == 0, steps
    assert "--destination NAME proves the way on: near, far" in steps["delivery"]["text"]
    assert house.latest().state is JobState.DONE
    assert house.node.ledger.deliveries(house.latest().id) == []
    assert (set(house.near.instances), len(house.far.received.order)) == (near, far)


def test_an_archive_that_refuses_is_named_with_its_reason_and_the_remedy(house: House) -> None:
    code, steps = house.doctor("--destination", "far")
    assert code == 1
    assert list(steps)[-1] == "delivery"
    assert not steps["delivery"]["ok"]
    assert "0xC000" in steps["delivery"]["text"]
    assert "jobs show" in steps["delivery"]["remedy"]


def test_what_comes_under_our_own_title_unannounced_is_refused_with_the_reason(house: House, tmp_path: Path) -> None:
    study_uid = generate_uid()
    files = write_tiny_study(tmp_path, study_uid=study_uid, series_uid=generate_uid())
    with sending_a_test(house.config.storage.root):  # somebody else's test is on its way just now
        assert send_series(files, ourselves(house.config), calling_ae="SYNPET").ok
    ledger = house.node.ledger

    def decided() -> bool:
        jobs = ledger.jobs_of_study(study_uid)
        return bool(jobs) and jobs[0].state is not JobState.RECEIVING

    until(decided)
    [job] = ledger.jobs_of_study(study_uid)
    assert (job.state, job.reason_code) == (JobState.REJECTED, "unannounced_test")
    assert "our own AE title 'SYNPET'" in job.reason


def test_while_no_test_is_sent_our_own_title_stores_nothing_and_may_still_ask_whether_we_answer(
    house: House, tmp_path: Path
) -> None:
    files = write_tiny_study(tmp_path, study_uid=generate_uid(), series_uid=generate_uid())
    before = len(house.node.ledger.search_events(code="association_rejected"))
    refused = send_series(files, ourselves(house.config), calling_ae="SYNPET")
    assert (refused.code, refused.permanent, refused.stored) == ("association_rejected", True, 0)
    assert echo(ourselves(house.config), calling_ae="SYNPET").ok
    until(lambda: len(house.node.ledger.search_events(code="association_rejected")) > before)
    event = house.node.ledger.search_events(code="association_rejected")[0]
    assert event.details["reason"] == "own_title_without_test"
    assert "send under the sender's own AE title" in event.text


def test_a_test_is_on_its_way_as_long_as_its_doctor_holds_the_lock(tmp_path: Path) -> None:
    assert not a_test_is_sent(tmp_path)
    with sending_a_test(tmp_path):
        assert a_test_is_sent(tmp_path)
        assert a_test_is_sent(tmp_path)
    assert not a_test_is_sent(tmp_path)
    assert (tmp_path / "doctor.lock").stat().st_mode & 0o777 == 0o600


def test_a_doctor_that_was_killed_leaves_nobody_the_right_to_store(tmp_path: Path) -> None:
    hold = "import os, sys\nfrom pathlib import Path\nfrom dicom_node.net.trial_lock import sending_a_test\n"
    hold += "with sending_a_test(Path(sys.argv[1])):\n    os.kill(os.getpid(), 9)\n"
    assert subprocess.run([sys.executable, "-c", hold, str(tmp_path)], timeout=60, check=False).returncode == -9
    assert (tmp_path / "doctor.lock").exists()
    assert not a_test_is_sent(tmp_path)


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_node_that_does_not_run_is_told_with_how_to_start_it(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    text = CONFIG.format(port=free_port(), near=1, far=1, bundle=write_tiny_bundle(tmp_path / "bundle"))
    path.write_text(text, encoding="utf-8")
    result = RUNNER.invoke(app, ["doctor", "--config", str(path)], env={"COLUMNS": "300"})
    assert result.exit_code == 1
    assert "no node runs on" in result.output
    assert "dicom-node serve --config" in result.output
    assert "test study" not in result.output


def test_a_destination_that_is_none_is_a_mistake_of_the_caller(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(CONFIG.format(port=free_port(), near=1, far=1, bundle="phantom"), encoding="utf-8")
    wrong = RUNNER.invoke(app, ["doctor", "--config", str(path), "--destination", "nowhere"])
    assert (wrong.exit_code, "near, far" in wrong.output) == (2, True)
    assert RUNNER.invoke(app, ["doctor", "--config", str(path), "--retire"]).exit_code == 2


def test_a_running_node_is_seen_by_its_lock(house: House, tmp_path: Path) -> None:
    assert node_runs_on(house.config.storage.root)
    assert not node_runs_on(tmp_path)


def test_a_node_that_speaks_nothing_but_tls_is_asked_over_tls(tmp_path: Path) -> None:
    ca = Authority(tmp_path / "ca")
    tls = {"cert_file": str(ca.certificate("node")), "ca_file": str(ca.file), "port": 11112}
    with running_intake(tmp_path, config(tls=tls)) as intake:
        us = ourselves(intake.config).model_copy(update={"port": intake.port})
        assert us.tls
        assert echo(us, calling_ae="SYNPET").ok


def test_two_test_studies_share_no_uid(tmp_path: Path) -> None:
    uids: set[str] = set()
    for name in ("a", "b"):
        for path in make_test_study(tmp_path / name).files:
            ds = dcmread(path, stop_before_pixels=True)
            uids |= {str(ds.SOPInstanceUID), str(ds.SeriesInstanceUID), str(ds.StudyInstanceUID)}
            assert str(ds.ImageComments).startswith("TEST")
            assert str(ds.SeriesDescription).startswith("TEST")
    assert len(uids) == 2 * (len(list((tmp_path / "a").iterdir())) + 2)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    made = open_ledger(f"sqlite:///{tmp_path / 'ledger.sqlite'}")
    yield made
    made.close()


DESTINATIONS = [DestinationConfig(name=name, peer="pacs") for name in ("near", "far")]


def test_a_study_goes_only_where_it_was_announced_for(ledger: Ledger) -> None:
    announce(ledger, "1.2.3", "far")
    job = ledger.open_job(SeriesInfo(study_uid="1.2.3", series_uid="1.2.3.4", calling_ae="ANOTHER"))
    assert trial_of(ledger, job, "SYNPET") == Trial(destination="far")
    assert [one.name for one in only_for(trial_of(ledger, job, "SYNPET"), DESTINATIONS)] == ["far"]


def test_a_destination_that_is_configured_no_more_gets_nothing_and_no_other_in_its_place(ledger: Ledger) -> None:
    assert only_for(Trial(destination="gone"), DESTINATIONS) == []
    assert only_for(Trial(), DESTINATIONS) == []


def test_a_study_of_the_pacs_is_no_test(ledger: Ledger) -> None:
    job = ledger.open_job(SeriesInfo(study_uid="1.2.3", series_uid="1.2.3.4", calling_ae="PACS"))
    assert trial_of(ledger, job, "SYNPET") is None
    assert only_for(None, DESTINATIONS) == DESTINATIONS


def test_a_labeled_study_whose_announcement_is_lost_goes_nowhere_also_when_a_person_retries_it(ledger: Ledger) -> None:
    job = ledger.open_job(SeriesInfo(study_uid="1.2.3", series_uid="1.2.3.4"))
    job = ledger.update(job.id, details={"labeled_test": True})
    assert trial_of(ledger, job, "SYNPET") == Trial()
