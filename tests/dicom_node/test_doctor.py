"""`dicom-node doctor` proves the whole path of a running node; its study goes where it shall and nowhere else."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from bad_input_tools import log_file
from fake_archive import FakeArchive
from fake_pacs import RESULT_CLASSES, free_port
from intake_tools import config, running_intake
from pydicom import dcmread
from pydicom.uid import (
    Comprehensive3DSRStorage,
    GrayscaleSoftcopyPresentationStateStorage,
    KeyObjectSelectionDocumentStorage,
    PositronEmissionTomographyImageStorage,
    PseudoColorSoftcopyPresentationStateStorage,
    SecondaryCaptureImageStorage,
    SegmentationStorage,
    generate_uid,
)
from pynetdicom.events import Event
from tiny_bundle import write_tiny_bundle
from tiny_study import write_tiny_study
from tls_tools import Authority
from typer.testing import CliRunner

from dicom_node.cli import app
from dicom_node.cli.check_node import ourselves
from dicom_node.cli.doctor import make_test_study
from dicom_node.config import Config, DestinationConfig, load_config
from dicom_node.net.scu import echo, send_series
from dicom_node.net.trial_lock import a_test_is_sent, sending_a_test
from dicom_node.node import Node
from dicom_node.started_with import node_runs_on
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
[[peers]]
name = "picky"
ae_title = "PACS"
port = {picky}
[[peers]]
name = "blind"
ae_title = "PACS"
port = {blind}
[[destinations]]
name = "near"
peer = "near"
[[destinations]]
name = "far"
peer = "far"
encoding = "pet"
[[destinations]]
name = "picky"
peer = "picky"
encoding = "pet"
[[destinations]]
name = "blind"
peer = "blind"
encoding = "pet"
max_attempts = 2
first_retry_s = 0.1
max_retry_s = 0.1
[output]
seg = true
uncertainty = true
sr = true
presentation_states = true
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


COMPANION_CLASSES = (
    SegmentationStorage,
    Comprehensive3DSRStorage,
    GrayscaleSoftcopyPresentationStateStorage,
    PseudoColorSoftcopyPresentationStateStorage,
)


def config_text(bundle: object, near: int = 1, far: int = 1, picky: int = 1, blind: int = 1) -> str:
    return CONFIG.format(port=free_port(), near=near, far=far, picky=picky, blind=blind, bundle=bundle)


class PickyArchive(FakeArchive):
    """Takes PET images and rejection notes, and answers everything else with "cannot understand"."""

    def _on_store(self, event: Event) -> int:
        wanted = (PositronEmissionTomographyImageStorage, KeyObjectSelectionDocumentStorage)
        return super()._on_store(event) if event.request.AffectedSOPClassUID in wanted else 0xC000


@dataclass
class House:
    """A running node and four archives. `far` refuses every instance, `picky` each that is no PET and no note; `blind`
    shows nothing of what it has.
    """

    path: Path
    config: Config
    node: Node
    near: FakeArchive
    far: FakeArchive
    picky: FakeArchive
    blind: FakeArchive

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
    classes = [*RESULT_CLASSES, *COMPANION_CLASSES, KeyObjectSelectionDocumentStorage]
    near, far = FakeArchive(classes=classes), FakeArchive(status_for=lambda _uid, _times: 0xC000)
    picky, blind = PickyArchive(classes=classes), FakeArchive(classes=classes, shown=lambda _stored, _look: 0)
    with near, far, picky, blind, log_file(folder / "log"):
        bundle = write_tiny_bundle(folder / "bundle")
        path.write_text(config_text(bundle, near.port, far.port, picky.port, blind.port), encoding="utf-8")
        config = load_config(path)
        node = Node(config, drain_s=0)
        node.start()
        try:
            yield House(path, config, node, near, far, picky, blind)
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
    check_labels(house.node.spool.ct_files(job.id), house.node.spool.result_folder(job.id))


def check_labels(ct: Sequence[Path], result: Path) -> None:
    """Every object of the test study: its CT, both encodings of its PET, the companions and the rejection notes."""
    found = [dcmread(path, stop_before_pixels=True) for path in (*ct, *sorted(result.rglob("*.dcm")))]
    assert {str(ds.Modality) for ds in found} == {"CT", "PT", "OT", "SEG", "SR", "PR", "KO"}
    pets = {ds.SOPClassUID for ds in found if ds.Modality == "PT"}
    assert pets == {SecondaryCaptureImageStorage, PositronEmissionTomographyImageStorage}
    for ds in found:
        assert str(ds.PatientName) == "TEST^DICOM-NODE DOCTOR", ds.Modality
        assert str(ds.StudyDescription).startswith("TEST "), ds.Modality
        assert str(ds.SeriesDescription).startswith("TEST " if ds.Modality == "CT" else "SYNTHETIC TEST "), ds.Modality
        assert str(ds.PatientComments).startswith("TEST: a generated phantom"), ds.Modality
        comments = str(ds.get("ImageComments", ""))  # documents and presentation states have none
        assert "TEST" in comments if ds.Modality in ("CT", "PT", "OT", "SEG") else not comments, ds.Modality


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


def test_a_pet_that_arrived_is_retired_also_when_what_comes_after_it_is_refused(house: House) -> None:
    code, steps = house.doctor("--destination", "picky", "--retire")
    assert code == 1
    assert list(steps)[-2:] == ["delivery", "retire"]
    assert "0xC000" in steps["delivery"]["text"]
    assert steps["retire"]["ok"], steps
    assert steps["retire"]["text"].startswith("retired: pet (pet) at picky; retired in case it arrived: mip (")
    assert_the_pet_is_named_by_a_note(house, house.picky)


def test_a_pet_that_the_archive_does_not_show_is_retired_all_the_same(house: House) -> None:
    code, steps = house.doctor("--destination", "blind", "--retire")
    assert code == 1
    assert list(steps)[-2:] == ["proof", "retire"]
    assert not steps["proof"]["ok"]
    assert steps["retire"]["ok"], steps
    assert_the_pet_is_named_by_a_note(house, house.blind)


def assert_the_pet_is_named_by_a_note(house: House, archive: FakeArchive) -> None:
    job = house.latest()
    (pet,) = [one for one in house.node.ledger.deliveries(job.id) if one.kind == "pet"]
    sent = {note.encoding for note in house.node.ledger.deliveries(job.id) if note.kind == REJECTION and note.sent}
    assert "kos-quality-pet-pet" in sent
    note = dcmread(house.node.spool.result_folder(job.id) / "rejection-kos-quality-pet-pet" / "0001.dcm")
    (study,) = note.CurrentRequestedProcedureEvidenceSequence
    assert [one.SeriesInstanceUID for one in study.ReferencedSeriesSequence] == [pet.series_uid]
    assert str(note.SOPInstanceUID) in archive.instances
    assert len(archive.received.series[pet.series_uid]) == pet.instances


def test_an_archive_that_refuses_the_notes_too_is_told_with_what_is_not_retired(house: House) -> None:
    code, steps = house.doctor("--destination", "far", "--retire")
    assert code == 1
    assert list(steps)[-2:] == ["delivery", "retire"]
    assert not steps["retire"]["ok"]
    assert steps["retire"]["text"].startswith("NOT retired: pet (pet), ")
    assert " at far: optional_refused" in steps["retire"]["text"]
    assert f"dicom-node doctor --retire-study {house.latest().info.accession}" in steps["retire"]["remedy"]


def test_a_test_of_earlier_is_retired_by_the_accession_number_that_was_told(house: House) -> None:
    code, steps = house.doctor("--destination", "near")
    assert code == 0, steps
    job = house.latest()
    assert f"dicom-node doctor --retire-study {job.info.accession}" in steps["test study"]["text"]
    before = set(house.near.instances)
    for _ in ("retired", "and told again"):
        code, steps = house.doctor("--retire-study", job.info.accession)
        assert (code, list(steps)) == (0, ["config", "node", "study", "retire"])
        assert steps["retire"]["text"].startswith("retired: pet (sc), mip (sc), ")
        notes = [one for one in house.node.ledger.deliveries(job.id) if one.kind == REJECTION]
        assert len(set(house.near.instances) - before) == len(notes) > 1
    words = ["doctor", "--config", str(house.path), "--retire-study", job.info.accession]
    *lines, last = RUNNER.invoke(app, words).output.splitlines()
    assert [line.split()[:2] for line in lines] == [["ok", name] for name in steps]
    assert all(re.match(r"ok     .{18} +[0-9]+\.[0-9] s  ", line) for line in lines), lines
    assert re.fullmatch(r"all 4 steps succeeded, in [0-9.]+ s", last)


def test_a_study_that_is_no_test_of_ours_is_not_retired(house: House) -> None:
    job = house.node.ledger.open_job(SeriesInfo(study_uid="1.2.3", series_uid="1.2.3.4", accession="ACC1"))
    house.node.ledger.move(job.id, JobState.REJECTED, code="not_ct", text="")
    code, steps = house.doctor("--retire-study", "ACC1")
    assert (code, list(steps)[-1], steps["study"]["ok"]) == (1, "study", False)
    assert "is no test study of dicom-node doctor, nothing was done" in steps["study"]["text"]


def test_a_step_that_fails_is_told_with_the_remedy_below_it_and_in_the_last_line(house: House) -> None:
    result = RUNNER.invoke(app, ["doctor", "--config", str(house.path), "--retire-study", "TEST0"])
    assert result.exit_code == 1
    failed, remedy, last = result.output.splitlines()[-3:]
    assert re.match(r"FAILED  study +[0-9.]+ s  no job of this ledger has the accession number 'TEST0'", failed)
    assert remedy.startswith("        -> ")
    assert last.startswith("FAILED: study; 2 of 3 steps succeeded, in ")


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
    path.write_text(config_text(write_tiny_bundle(tmp_path / "bundle")), encoding="utf-8")
    result = RUNNER.invoke(app, ["doctor", "--config", str(path)], env={"COLUMNS": "300"})
    assert result.exit_code == 1
    assert "no node runs on" in result.output
    assert "-> start it: dicom-node serve --config" in result.output
    assert result.output.splitlines()[-1].endswith("; no test study was sent")
    later = RUNNER.invoke(app, ["doctor", "--config", str(path), "--retire-study", "TEST0"])
    assert (later.exit_code, "no node runs on" in later.output) == (1, True)
    assert "\N{REPLACEMENT CHARACTER}" not in result.output


def test_a_warning_has_a_verdict_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    text = config_text(write_tiny_bundle(tmp_path / "bundle"))
    path.write_text(text.replace("[node]\n", '[node]\nunknown_peers = "accept"\n'), encoding="utf-8")
    result = RUNNER.invoke(app, ["doctor", "--config", str(path)], env={"COLUMNS": "300"})
    verdicts = {row[1]: row[0] for line in result.output.splitlines() if len(row := line.split()) > 2}
    assert (verdicts["callers"], verdicts["bundle"], verdicts["node"]) == ("warning", "ok", "FAILED")
    assert "warning: " not in result.output


def test_a_destination_that_is_none_is_a_mistake_of_the_caller(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(config_text("phantom"), encoding="utf-8")
    wrong = RUNNER.invoke(app, ["doctor", "--config", str(path), "--destination", "nowhere"])
    assert (wrong.exit_code, "near, far, picky, blind" in wrong.output) == (2, True)
    assert RUNNER.invoke(app, ["doctor", "--config", str(path), "--retire"]).exit_code == 2
    for more in (["--retire"], ["--destination", "near"]):
        both = RUNNER.invoke(app, ["doctor", "--config", str(path), "--retire-study", "TEST0", *more])
        assert (both.exit_code, "--retire-study goes wherever that study went" in both.output) == (2, True)


def test_the_help_teaches_how_a_test_is_taken_back() -> None:
    text = " ".join(RUNNER.invoke(app, ["doctor", "--help"], env={"COLUMNS": "200"}).output.replace("│", "").split())
    assert "--retire-study ACCESSION Send nothing: ask the archives to hide a test study of earlier" in text
    assert "also when a step before has failed" in text
    assert "[]" not in text  # a table's name that was taken for markup


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
