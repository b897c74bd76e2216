"""Everything that a PACS, a network, a disk or a person can get wrong, done to one running node for real.

Each bad input is sent over C-STORE, in a study of its own, all before the first test; then every test asks what a
person asks: `dicom-node why ACCESSION`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bad_input_tools import (
    ENDED,
    UNTIL_S,
    Sent,
    Ward,
    log_file,
    log_lines,
    rejection,
    running_ward,
    store_raw,
    until,
    write_config,
)
from ct_factory import write_ct
from fake_pacs import FakePacs, free_port
from pydicom import Dataset, dcmread
from pydicom.uid import (
    UID,
    BasicTextSRStorage,
    ComputedRadiographyImageStorage,
    ImplicitVRLittleEndian,
    SecondaryCaptureImageStorage,
    generate_uid,
)
from tiny_bundle import write_tiny_bundle

from dicom_node.cli import main
from dicom_node.config import load_config
from storage.ledger import open_ledger
from storage.records import JobState
from storage.spool import Spool
from training.phantom import PhantomSpec, make_phantom

LONG_UID = "1.2." + "3" * 61
PATH_UID = "../../../tmp/x"
NAMES = {
    "INTERLEAVED-A": "Yamada^Tarou=山田^太郎=やまだ^たろう",
    "INTERLEAVED-B": "Пациентов^Иван",
    "ABORTED": "<script>alert^(1)</script>",
}
PATIENT_ID = "SECRET-4711"
LATE_FROM = -3  # the slices that come after the job began


# -- the ward: one node, everything sent


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture(scope="module")
def pacs() -> Iterator[FakePacs]:
    with FakePacs() as running:
        yield running


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with log_file(tmp_path_factory.mktemp("log") / "node.log") as path:
        yield path


@pytest.fixture(scope="module")
def ward(tmp_path_factory: pytest.TempPathFactory, bundle: Path, pacs: FakePacs, log: Path) -> Iterator[Ward]:
    folder = tmp_path_factory.mktemp("ward")
    with running_ward(folder, write_config(folder, bundle, [pacs])) as running:
        send_headers_that_lie(running)
        send_pixels_and_places_that_lack(running)
        send_no_volumes(running)
        send_in_pieces(running)
        running.until_settled()
        send_again_and_late(running)
        running.until_settled()
        yield running


def send_headers_that_lie(ward: Ward) -> None:
    with ward.association() as assoc:
        statuses = [store_raw(assoc, sop_instance_uid=f"1.2.3.{k}", data=b"no data set at all") for k in range(3)]
    ward.cases["NOT-DICOM"] = Sent(accession="", paths=[], study_uid="", series_uid="", statuses=statuses)
    ward.acknowledged |= {f"1.2.3.{k}" for k in range(3)}
    for accession, keyword, value in (
        ("NO-SERIES-UID", "SeriesInstanceUID", None),
        ("NO-STUDY-UID", "StudyInstanceUID", None),
        ("PATH-UID", "SeriesInstanceUID", PATH_UID),
        ("LONG-UID", "SeriesInstanceUID", LONG_UID),
    ):
        ward.send(
            ward.ct(accession, transfer_syntax=ImplicitVRLittleEndian, modify=Change(keyword, value)),
            transfer_syntax=ImplicitVRLittleEndian,
        )
    for name, uid in (("RAW-EMPTY", ""), ("RAW-PATH", PATH_UID), ("RAW-LONG", LONG_UID)):
        with ward.association() as assoc:
            statuses = [store_raw(assoc, sop_instance_uid=uid, data=b"\x08\x00\x60\x00CS\x02\x00CT")]
        ward.cases[name] = Sent(accession="", paths=[], study_uid="", series_uid="", statuses=statuses)


class Change:
    """Delete an element, or give it a value that pydicom would not write, in the slices of these numbers (or all)."""

    def __init__(self, keyword: str, value: str | None, *numbers: int) -> None:
        self.keyword, self.value, self.numbers = keyword, value, numbers

    def __call__(self, ds: Dataset, k: int) -> None:
        if self.numbers and k not in self.numbers:
            return
        if self.value is None:
            del ds[self.keyword]
        else:
            ds.add_new(self.keyword, "UT", self.value)  # not validated; implicit VR does not show it


def send_pixels_and_places_that_lack(ward: Ward) -> None:
    def cut(ds: Dataset, k: int) -> None:
        if k == 3:
            ds.PixelData = ds.PixelData[:1000]

    ward.send(ward.ct("TRUNCATED", modify=cut))
    ward.send(ward.ct("NO-PIXELS", modify=Change("PixelData", None, 4)))
    ward.send(ward.ct("NO-POSITION", modify=Change("ImagePositionPatient", None)))
    ward.send(ward.ct("ONE-NO-POSITION", modify=Change("ImagePositionPatient", None, 0)))


def send_no_volumes(ward: Ward) -> None:
    single = ward.ct("SINGLE")
    ward.send(single, single.paths[:1])
    ward.send(ward.ct("LOCALIZER", image_type=("ORIGINAL", "PRIMARY", "LOCALIZER")))
    for accession, sop_class_uid in (
        ("PHOTO", SecondaryCaptureImageStorage),
        ("REPORT", BasicTextSRStorage),
        ("RADIOGRAPH", ComputedRadiographyImageStorage),
    ):

        def change(ds: Dataset, _k: int, sop_class_uid: UID = sop_class_uid) -> None:
            ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = sop_class_uid

        sent = ward.ct(accession, modify=change)
        with ward.association(sop_class_uid=sop_class_uid) as assoc:
            sent.statuses = [int(assoc.send_c_store(path).Status) for path in sent.paths[:2]]


def send_in_pieces(ward: Ward) -> None:
    a, b, aborted = (ward.ct(case, patient_name=name, patient_id=PATIENT_ID) for case, name in NAMES.items())
    with ward.association() as first, ward.association() as second:
        for k, (one, other) in enumerate(zip(a.paths, b.paths, strict=True)):  # both series on both associations
            a.statuses.append(ward.store((first, second)[k % 2], one))
            b.statuses.append(ward.store((second, first)[k % 2], other))
    assoc = ward.associate()
    aborted.statuses += [ward.store(assoc, path) for path in aborted.paths[:10]]
    assoc.abort()
    ward.send(aborted, aborted.paths[10:])
    gap = ward.ct("GAP")
    ward.send(gap, [path for k, path in enumerate(gap.paths) if k != 12])
    ward.send(ward.ct("AGAIN"))
    late = ward.ct("LATE")
    ward.send(late, late.paths[:LATE_FROM])


def send_again_and_late(ward: Ward) -> None:
    ward.send(ward.cases["AGAIN"])
    late = ward.cases["LATE"]
    ward.send(late, late.paths[LATE_FROM:])


def check_done(ward: Ward, accession: str, instances: int) -> None:
    """The newest job of the study ran on every slice and its result is whole and delivered."""
    job = ward.jobs(accession)[0]
    assert (job.state, job.reason, job.instances) == (JobState.DONE, "", instances)
    assert len(ward.results(accession)) > 0
    assert "became a synthetic PET series" in ward.why(accession)


# -- headers


def test_bytes_that_are_no_data_set_are_set_aside_and_why_says_so(ward: Ward) -> None:
    assert ward.cases["NOT-DICOM"].statuses == [0x0000] * 3  # nothing is decoded before Success
    said = ward.why("AN-ACCESSION-NOBODY-SAW")
    assert "never arrived" in said
    counts = re.findall(r"(\d+) instances were put into quarantine \(not_dicom\); the first: 1\.2\.3\.\d: ", said)
    assert sum(map(int, counts)) == 3


@pytest.mark.parametrize(
    ("accession", "code", "text"),
    [
        ("NO-SERIES-UID", "missing_uid", "SeriesInstanceUID is missing"),
        ("NO-STUDY-UID", "missing_uid", "StudyInstanceUID is missing"),
        ("PATH-UID", "bad_uid", "SeriesInstanceUID: '../../../tmp/x' is not a UID"),
        ("LONG-UID", "bad_uid", f"SeriesInstanceUID: '{LONG_UID}' is not a UID: expected 1 to 64 characters"),
    ],
)
def test_a_header_that_cannot_be_used_is_found_under_its_accession(
    ward: Ward, accession: str, code: str, text: str
) -> None:
    sent = ward.cases[accession]
    assert sent.statuses == [0x0000] * len(sent.paths)
    assert ward.jobs(accession) == []
    said = ward.why(accession)
    assert f"instances were put into quarantine ({code})" in said
    assert text in said
    aside = {path.name for path in (ward.root / "quarantine" / code).iterdir()}
    assert {f"{uid}.dcm" for uid in sent.sop_instance_uids} <= aside


@pytest.mark.parametrize(("name", "shown"), [("RAW-EMPTY", "''"), ("RAW-PATH", f"'{PATH_UID}'"), ("RAW-LONG", "1.2.3")])
def test_an_instance_uid_that_is_none_is_refused_and_why_says_so(ward: Ward, name: str, shown: str) -> None:
    assert ward.cases[name].statuses == [0xC000]
    assert f"an instance from 'PACS' was refused: SOP Instance UID {shown}" in ward.why("NOBODY").replace("'1.", "1.")


def test_no_path_of_a_peer_left_the_spool(ward: Ward) -> None:
    assert not (ward.root.parent / "tmp").exists()  # where PATH_UID leads from inbox/series
    folders = {path.name for path in ward.root.iterdir() if path.is_dir()}
    assert folders == {"inbox", "work", "outbox", "references", "jobs", "commitments", "quarantine"}


# -- pixels and places


@pytest.mark.parametrize(
    ("accession", "code"),
    [
        ("TRUNCATED", "truncated_pixel_data"),
        ("NO-PIXELS", "no_pixel_data"),
        ("NO-POSITION", "no_geometry"),
        ("ONE-NO-POSITION", "missing_attribute"),
        ("SINGLE", "too_few_slices"),
        ("LOCALIZER", "localizer"),
        ("GAP", "missing_slices"),
    ],
)
def test_a_series_that_is_no_volume_is_not_used_and_why_says_what_is_wrong(
    ward: Ward, accession: str, code: str
) -> None:
    sent = ward.cases[accession]
    assert set(sent.statuses) == {0x0000}
    (job,) = ward.jobs(accession)
    assert (job.state, job.reason_code, job.instances) == (JobState.REJECTED, code, len(sent.statuses))
    said = ward.why(accession)
    assert "was not used" in said
    assert f"why: {code}: " in said


def test_the_missing_slice_is_named_by_its_place(ward: Ward) -> None:
    assert "slices missing: 1 between z = 88.0 and 104.0 mm; waited 6 s for them" in ward.why("GAP")


def test_the_slice_with_the_fault_is_named(ward: Ward) -> None:
    for accession, k in (("TRUNCATED", 3), ("NO-PIXELS", 4), ("ONE-NO-POSITION", 0)):
        assert ward.cases[accession].sop_instance_uids[k] in ward.why(accession)


# -- what comes along


@pytest.mark.parametrize(
    ("accession", "name"),
    [
        ("PHOTO", "Secondary Capture Image Storage"),
        ("REPORT", "Basic Text SR Storage"),
        ("RADIOGRAPH", "Computed Radiography Image Storage"),
    ],
)
def test_what_is_not_ct_is_accepted_dropped_and_told(ward: Ward, accession: str, name: str) -> None:
    assert ward.cases[accession].statuses == [0x0000] * 2  # so that auto-routing does not stall on it
    assert ward.jobs(accession) == []
    assert f"2 instances of {name} from 'PACS' were accepted and dropped: not CT" in ward.why(accession)


# -- associations


def test_a_wrong_called_ae_is_rejected_and_why_says_so(ward: Ward) -> None:
    assoc = ward.associate(called_ae="SOMEBODY")
    assert rejection(assoc) == (1, 1, 7)
    said = "'PACS' at '127.0.0.1' called 'SOMEBODY': this node is 'SYNPET'"
    until(lambda: said in ward.why("NOBODY"), lambda: ward.why("NOBODY"))


def test_an_unknown_calling_ae_is_rejected_and_why_says_so(ward: Ward) -> None:
    assoc = ward.associate(calling_ae="STRANGER")
    assert rejection(assoc) == (1, 1, 3)
    said = "'STRANGER' at '127.0.0.1': no peer has this AE title"
    until(lambda: said in ward.why("NOBODY"), lambda: ward.why("NOBODY"))


def test_two_series_interleaved_on_two_associations_are_two_results(ward: Ward, pacs: FakePacs) -> None:
    for accession in ("INTERLEAVED-A", "INTERLEAVED-B"):
        sent = ward.cases[accession]
        assert set(sent.statuses) == {0x0000}
        assert len(ward.jobs(accession)) == 1
        check_done(ward, accession, len(sent.paths))
        (pet,) = [d for d in ward.node.ledger.deliveries(ward.jobs(accession)[0].id) if d.kind == "pet"]
        assert len(pacs.received.series[pet.series_uid]) == len(ward.results(accession))


def test_an_association_aborted_in_the_middle_and_the_rest_later_is_one_whole_series(ward: Ward) -> None:
    assert set(ward.cases["ABORTED"].statuses) == {0x0000}
    check_done(ward, "ABORTED", len(ward.cases["ABORTED"].paths))


def test_the_same_series_twice_is_one_result_and_why_names_the_first_job(ward: Ward) -> None:
    sent = ward.cases["AGAIN"]
    assert sent.statuses == [0x0000] * 2 * len(sent.paths)
    again, first = ward.jobs("AGAIN")
    assert first.state is JobState.DONE
    assert (again.state, again.reason_code) == (JobState.REJECTED, "duplicate_series")
    assert f"why: duplicate_series: all {len(sent.paths)} instances are those of job {first.id}" in ward.why("AGAIN")


def test_slices_after_the_job_began_make_a_second_job_on_all_slices(ward: Ward) -> None:
    sent = ward.cases["LATE"]
    successor, first = ward.jobs("LATE")
    assert (first.state, first.instances) == (JobState.DONE, len(sent.paths) + LATE_FROM)
    assert successor.supersedes == first.id
    check_done(ward, "LATE", len(sent.paths))
    assert f"with slices that came after job {first.id[:8]} began: use this result, not that one" in ward.why("LATE")


# -- names


@pytest.mark.parametrize("accession", NAMES)
def test_a_name_in_any_script_is_in_the_result_as_it_came(ward: Ward, accession: str) -> None:
    check_done(ward, accession, len(ward.cases[accession].paths))
    for path in ward.results(accession)[::10]:
        result = dcmread(path)
        assert str(result.PatientName) == NAMES[accession]
        assert result.PatientID == PATIENT_ID


def test_no_log_line_event_or_reason_holds_a_patients_name_or_id(ward: Ward, log: Path) -> None:
    words = [PATIENT_ID, "PHANTOM^TEST", "Yamada", "山田", "やまだ", "Пациентов", "<script", "alert"]
    ledger = ward.node.ledger
    events = ledger.search_events(limit=100_000)
    told = [log.read_text(encoding="utf-8"), *(f"{e.text} {e.details}" for e in events)]
    told += [f"{job.reason} {job.details}" for job in ward.jobs()]
    told += [ward.why(accession) for accession in ward.cases]
    assert len(events) > len(ward.cases)
    for word in words:
        assert not [text for text in told if word in text or word.encode("unicode_escape").decode() in text]


# -- all of it


def test_every_acknowledged_instance_is_still_there(ward: Ward) -> None:
    assert len(ward.acknowledged) > 300
    assert ward.lost() == set()


def test_nothing_of_it_is_an_error_of_ours(ward: Ward, log: Path) -> None:
    assert [line for line in log_lines(log) if line["level"] in {"error", "critical"}] == []
    assert ward.node.healthy


def test_a_bad_input_is_told_under_its_own_accession_only(ward: Ward) -> None:
    assert "quarantine" not in ward.why("AGAIN").partition("Not assigned")[0]
    assert "LONG-UID" not in ward.why("PATH-UID")
    assert "'1.2.333" not in ward.why("PATH-UID").partition("Not assigned")[0]


# -- destinations


def test_why_tells_what_is_wrong_with_each_destination(tmp_path: Path, bundle: Path, log: Path) -> None:
    def half(sop_instance_uid: str, _times: int) -> int:
        return 0x0000 if int(sop_instance_uid[-1]) % 2 else 0xA900

    with (
        FakePacs() as good,
        FakePacs(ae_title="OTHER", require_called=True) as titled,
        FakePacs(classes=[ComputedRadiographyImageStorage]) as classless,
        FakePacs(status_for=half) as picky,
    ):
        down = FakePacs(port=free_port())  # never started
        titled.ae_title = "PACS2"  # what the configuration believes
        config = write_config(tmp_path, bundle, [good, down, titled, classless, picky])
        with running_ward(tmp_path, config) as ward:
            sent = ward.send(ward.ct("SENT"))
            ward.until_settled()
            (job,) = ward.jobs("SENT")
            said = ward.why("SENT")
            pet = {d.destination: d for d in ward.node.ledger.deliveries(job.id) if d.kind == "pet"}
    assert set(sent.statuses) == {0x0000}
    assert (job.state, job.reason_code) == (JobState.FAILED, "delivery_failed")
    count = pet["pacs0"].instances
    assert f"pacs0: pet SENT {count}/{count}" in said
    assert f"pacs1: pet FAILED 0/{count} (connection_failed: " in said
    assert "given up after 0.0 days (give_up_after_days)" in said
    assert f"pacs2: pet FAILED 0/{count} (association_rejected: " in said
    assert "its AE title is not recognized" in said
    assert f"pacs3: pet FAILED 0/{count} (no_presentation_context: " in said
    assert f"pacs4: pet FAILED {pet['pacs4'].sent}/{count} (instances_refused: " in said
    assert 0 < pet["pacs4"].sent < count
    assert "0xA900 Data Set Does Not Match SOP Class" in said
    assert f"what to do: dicom-node jobs retry {job.id[:8]}" in said


# -- the disk


class SmallDisk:
    """A file system of 24 MB in memory where this machine lets us mount one; else free space is only said to be."""

    SIZE = 24_000_000

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder.mkdir()
        self.folder, self._monkeypatch = folder, monkeypatch
        self._filler = folder / "filler"
        command = ["mount", "-t", "tmpfs", "-o", f"size={self.SIZE}", "tmpfs", str(folder)]
        self.mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0

    def fill(self, *, leave: int) -> None:
        if self.mounted:
            self._filler.write_bytes(bytes(shutil.disk_usage(self.folder).free - leave))
        else:
            self._monkeypatch.setattr(Spool, "free_bytes", lambda _self: -1)

    def clear(self) -> None:
        if self.mounted:
            self._filler.unlink()
        else:
            self._monkeypatch.undo()

    def close(self) -> None:
        if self.mounted:
            subprocess.run(["umount", str(self.folder)], check=True)


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SmallDisk]:
    disk = SmallDisk(tmp_path / "disk", monkeypatch)
    yield disk
    disk.close()


@pytest.mark.parametrize("min_free_bytes", [4_000_000, 0], ids=["watermark", "to_the_last_byte"])
def test_a_full_disk_refuses_before_anything_is_lost_and_goes_on_when_there_is_room(
    tmp_path: Path, bundle: Path, pacs: FakePacs, small_disk: SmallDisk, min_free_bytes: int
) -> None:
    config = write_config(tmp_path, bundle, [pacs], root=small_disk.folder / "spool", min_free_bytes=min_free_bytes)
    # the ledger shares the disk: that it cannot be written then is an error in the log, and no more
    with log_file(tmp_path / "node.log"), running_ward(tmp_path, config) as ward:
        sent = ward.ct("FULL")
        size = sent.paths[0].stat().st_size
        small_disk.fill(leave=min_free_bytes + 10 * size)
        statuses = list(ward.send(sent).statuses)
        refused = [path for path, status in zip(sent.paths, statuses, strict=True) if status != 0x0000]
        assert set(statuses) <= {0x0000, 0xA700}
        assert len(refused) > len(sent.paths) // 2
        assert ward.lost() == set()
        if min_free_bytes:
            until(lambda: "no room on disk" in ward.why("NOBODY"), lambda: ward.why("NOBODY"))
        small_disk.clear()
        ward.send(sent, refused)
        assert set(sent.statuses[len(statuses) :]) == {0x0000}
        until(lambda: ward.state("FULL") is JobState.DONE, lambda: ward.why("FULL"))
        check_done(ward, "FULL", len(sent.paths))


# -- many


@pytest.mark.slow
def test_1500_slices_are_one_job(ward: Ward, tmp_path: Path) -> None:
    body = make_phantom(PhantomSpec(seed=1, spacing_mm=(8.0, 8.0, 8.0), pose="raised")).hu
    hu = np.repeat(body, -(-1500 // len(body)), axis=0)[:1500]
    uids: dict[str, Any] = {"study_uid": generate_uid(), "series_uid": generate_uid()}
    paths = write_ct(tmp_path / "ct", hu, spacing_mm=(8.0 * len(body) / 1500, 8.0, 8.0), accession="MANY", **uids)
    sent = ward.send(Sent(accession="MANY", paths=paths, **uids))
    assert sent.statuses == [0x0000] * 1500
    until(lambda: ward.state("MANY") in ENDED, lambda: ward.jobs("MANY"))
    assert len(ward.jobs("MANY")) == 1
    check_done(ward, "MANY", 1500)


# -- starting wrongly


def serve(config: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["dicom-node", "serve", "--config", str(config)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[node]\nprot = 11112\n", "[node].prot is not a key; did you mean 'port'?"),
        ("[node]\nport = 70000\n", "[node].port = 70000: Input should be less than or equal to 65535"),
        ("[nodes]\n", "nodes is not a key; did you mean 'node'?"),
        ("[node\n", "not valid TOML"),
    ],
)
def test_a_wrong_configuration_stops_serve_with_the_key_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str, told: str
) -> None:
    config = tmp_path / "config.toml"
    config.write_text(text, encoding="utf-8")
    assert serve(config, monkeypatch) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert told in said
    assert "Traceback" not in said


def test_a_missing_configuration_stops_serve_with_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert serve(tmp_path / "none.toml", monkeypatch) == 2
    assert "cannot be read" in capsys.readouterr().err


def serve_without_rights(config: Path) -> subprocess.CompletedProcess[str]:
    """`dicom-node serve` as somebody who has to keep to the permissions: also root does then."""
    command = [sys.executable, "-c", "from dicom_node.cli import main; main()", "serve", "--config", str(config)]
    if os.geteuid() == 0:
        command = ["setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override", *command]
    return subprocess.run(command, capture_output=True, text=True, timeout=UNTIL_S, check=False)


@pytest.mark.parametrize("what", ["ledger", "folder"])
def test_what_cannot_be_written_stops_serve_with_its_name_and_exit_code_1(
    tmp_path: Path, bundle: Path, what: str
) -> None:
    config = write_config(tmp_path, bundle, [])
    root = tmp_path / "spool"
    root.mkdir()
    open_ledger(load_config(config).ledger_url).close()
    file = root / "ledger.sqlite" if what == "ledger" else root
    file.chmod(0o444 if what == "ledger" else 0o555)
    try:
        done = serve_without_rights(config)
    finally:
        file.chmod(0o755)
    said = done.stderr.replace("\n", "")
    assert done.returncode == 1, done.stderr
    assert "error: " in said
    assert str(file) in said
    assert "write" in said
    assert "Traceback" not in said
