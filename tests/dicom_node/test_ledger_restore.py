"""A ledger is restored from a backup, or lost: the node goes on with what the backup knows and what the spool knows."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from ct_factory import write_ct
from pydicom import dcmread
from pydicom.uid import generate_uid
from small_node import FolderPacs, SmallEngine, SmallNode, small_config
from structlog.testing import capture_logs
from typer.testing import CliRunner

from dicom_node.backup import Backups, backup_folder, lost_ledger
from dicom_node.cli import main
from dicom_node.cli.app import app
from dicom_node.config import load_config
from dicom_node.engine.local import LocalEngine
from dicom_node.node import Node, lock_root
from dicom_node.recover import cancel
from dicom_node.trial import TEST_NAME, announce
from storage.backup import backup_time, backups, make_backup, restore
from storage.errors import IllegalMove, LedgerDamaged
from storage.ledger import open_ledger
from storage.records import JobState

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)


@pytest.fixture
def ct(tmp_path: Path) -> Callable[[], list[Path]]:
    """A new series of four slices, each file named by its UID."""
    numbers = count()

    def make() -> list[Path]:
        folder = tmp_path / f"ct{next(numbers)}"
        hu = np.zeros((4, 8, 8), dtype=np.int16)
        files = write_ct(folder, hu, spacing_mm=(2.0, 2.0, 2.0), study_uid=generate_uid(), series_uid=generate_uid())
        return [path.rename(folder / f"{dcmread(path).SOPInstanceUID}.dcm") for path in files]

    return make


class Place:
    """A spool with its ledger and backups, and the PACS that outlives them."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "spool"
        self.root.mkdir()
        self.file = self.root / "ledger.sqlite"
        self.pacs = FolderPacs(folder / "pacs")
        self.pacs.folder.mkdir()
        self.node: SmallNode | None = None

    def start(self) -> SmallNode:
        self.stop()
        self.node = SmallNode(self.root, self.pacs)
        return self.node

    def stop(self) -> None:
        if self.node is not None:
            self.node.close()
            self.node = None

    def backup(self) -> Path:
        return make_backup(self.file, self.root / "backups", keep=9, now=NOW)

    def restore(self, backup: Path) -> None:
        self.stop()
        restore(backup, self.file, now=NOW)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path)
    yield made
    made.stop()


def test_jobs_and_deliveries_are_as_of_the_backup_and_what_came_later_ends_under_its_own_id(
    place: Place, ct: Callable[[], list[Path]]
) -> None:
    node = place.start()
    node.receive(ct())
    node.run_to_end()
    [first] = node.jobs(JobState.DONE)
    backup = place.backup()
    node.receive(ct())
    node.run_to_end()
    second = next(job for job in node.jobs(JobState.DONE) if job.id != first.id)
    before = place.pacs.contents()
    place.restore(backup)
    node = place.start()
    assert node.adopted == [second.id]
    node.run_to_end()
    again = node.ledger.get(second.id)
    assert node.ledger.get(first.id) == first
    assert (again.state, again.created, again.info, again.source_digest) == (
        JobState.DONE, second.created, second.info, second.source_digest,
    )  # fmt: skip
    assert place.pacs.contents() == before  # sent again, as the same bytes
    assert "adopted" in [event.code for event in node.ledger.events(second.id)]


def test_a_result_that_nothing_but_the_spool_knows_is_delivered(place: Place, ct: Callable[[], list[Path]]) -> None:
    node = place.start()
    backup = place.backup()
    place.pacs.up = False
    node.receive(ct())
    with pytest.raises(AssertionError, match="DELIVERING"):
        node.run_to_end(rounds=2)
    place.restore(backup)
    place.pacs.up = True
    node = place.start()
    node.run_to_end()
    assert [job.state for job in node.jobs()] == [JobState.DONE]
    assert len(place.pacs.contents()) == 3


def test_a_series_that_waited_in_the_inbox_or_for_its_turn_becomes_a_job_again(
    place: Place, ct: Callable[[], list[Path]]
) -> None:
    node = place.start()
    backup = place.backup()
    node.receive(ct())
    node.assembler.tick()
    node.now_s += 1000
    node.assembler.tick()  # in work, chosen, not begun
    node.receive(ct())
    node.assembler.tick()  # in the inbox
    [queued] = node.jobs(JobState.QUEUED)
    assert len(node.jobs(JobState.RECEIVING)) == 1
    place.restore(backup)
    node = place.start()
    assert node.adopted == [queued.id]
    node.run_to_end()
    assert [job.state for job in node.jobs()] == [JobState.DONE, JobState.DONE]
    assert len(place.pacs.contents()) == 6


def test_a_ledger_that_is_lost_altogether_comes_back_from_the_spool(place: Place, ct: Callable[[], list[Path]]) -> None:
    node = place.start()
    node.receive(ct())
    node.run_to_end()
    before = place.pacs.contents()
    place.stop()
    place.file.unlink()
    node = place.start()
    node.run_to_end()
    assert [job.state for job in node.jobs()] == [JobState.DONE]
    assert place.pacs.contents() == before


def test_a_result_that_was_taken_back_since_the_backup_waits_for_a_person(
    place: Place, ct: Callable[[], list[Path]]
) -> None:
    node = place.start()
    backup = place.backup()
    node.receive(ct())
    node.run_to_end()
    [job] = node.jobs()
    (node.spool.result_folder(job.id) / "rejection-sc").mkdir()
    place.restore(backup)
    node = place.start()
    [held] = node.jobs()
    assert (held.id, held.state) == (job.id, JobState.HELD)
    assert "look before you release it" in held.reason


@pytest.mark.parametrize("known", [False, True], ids=["unknown to the backup", "known to it"])
def test_a_job_that_a_person_cancelled_stays_cancelled_until_a_person_retries_it(
    place: Place, ct: Callable[[], list[Path]], config: str, known: bool
) -> None:
    node = place.start()
    backup = place.backup()
    place.pacs.up = False
    node.receive(ct())
    node.step()
    [job] = node.jobs(JobState.DELIVERING)
    if known:
        backup = make_backup(place.file, place.root / "backups", keep=9, now=NOW + timedelta(hours=1))
    assert CliRunner().invoke(app, ["jobs", "cancel", job.id, "--config", config]).exit_code == 0
    place.restore(backup)
    place.pacs.up = True
    node = place.start()
    node.run_to_end()
    assert [(one.id, one.state) for one in node.jobs()] == [(job.id, JobState.CANCELLED)]
    assert place.pacs.contents() == {}
    assert CliRunner().invoke(app, ["jobs", "retry", job.id, "--config", config]).exit_code == 0
    node = place.start()
    node.run_to_end()
    assert [one.state for one in node.jobs()] == [JobState.DONE]
    assert len(place.pacs.contents()) == 3


def test_a_job_that_cannot_be_cancelled_is_not_kept_as_cancelled(place: Place, ct: Callable[[], list[Path]]) -> None:
    node = place.start()
    node.receive(ct())
    node.run_to_end()
    [job] = node.jobs()
    with pytest.raises(IllegalMove):
        cancel(node.ledger, node.spool, job.id)
    assert node.spool.cancelled_ids() == []


def test_half_of_a_job_that_was_to_be_computed_again_is_no_job(place: Place, ct: Callable[[], list[Path]]) -> None:
    node = place.start()
    node.receive(ct())
    node.run_to_end()
    [job] = node.jobs()
    node.spool.link_previous("ab" * 16, job.id)  # killed before the ledger heard of it
    node = place.start()
    assert node.adopted == []
    assert [one.id for one in node.jobs()] == [job.id]


def test_input_that_cannot_be_read_does_not_hold_the_start_up(place: Place) -> None:
    node = place.start()
    folder = node.spool.work_folder("cd" * 16) / "ct"
    folder.mkdir()
    (folder / "1.2.dcm").write_bytes(b"no DICOM")
    with capture_logs() as logged:
        node = place.start()
    assert node.adopted == []
    assert [line["job_id"] for line in logged if line["event"] == "job.not_adopted"] == ["cd" * 16]


# ---- a test, and who sent it


def labeled(files: list[Path]) -> list[Path]:
    for path in files:
        ds = dcmread(path)
        ds.PatientName, ds.QualityControlImage = TEST_NAME, "YES"
        ds.save_as(path)
    return files


@pytest.mark.parametrize("chosen", [False, True], ids=["in the inbox", "queued"])
def test_a_test_study_whose_announcement_is_lost_is_sent_nowhere(
    place: Place, ct: Callable[[], list[Path]], chosen: bool
) -> None:
    node = place.start()
    backup = place.backup()
    files = labeled(ct())
    announce(node.ledger, str(dcmread(files[0]).StudyInstanceUID), "pacs")
    node.receive(files)
    node.assembler.tick()
    if chosen:
        node.step_to_queued()
        assert [job.state for job in node.jobs()] == [JobState.QUEUED]
    place.restore(backup)
    node = place.start()
    node.run_to_end()
    [job] = node.jobs()
    assert (job.state, job.reason_code) == (JobState.REJECTED, "unannounced_test")
    node.ledger.retry(job.id)
    node.run_to_end()
    assert [one.state for one in node.jobs()] == [JobState.DONE]
    assert place.pacs.contents() == {}


@pytest.mark.parametrize("chosen", [False, True], ids=["in the inbox", "queued"])
def test_a_series_that_nothing_but_the_spool_knows_still_has_its_sender(
    place: Place, ct: Callable[[], list[Path]], chosen: bool
) -> None:
    node = place.start()
    backup = place.backup()
    node.receive(ct())
    node.assembler.tick()
    if chosen:
        node.step_to_queued()
    place.restore(backup)
    node = place.start()
    node.run_to_end()
    [job] = node.jobs()
    assert (job.info.calling_ae, job.info.peer_address) == ("PACS", "127.0.0.1")


# ---- every day


def test_a_backup_is_made_once_a_day_and_a_failure_is_told_once(place: Place) -> None:
    node = place.start()
    config = small_config(place.root)
    now = [NOW]
    keeper = Backups(config, node.ledger, clock=lambda: now[0])
    for hours in (0, 1, 25, 26):
        now[0] = NOW + timedelta(hours=hours)
        keeper.tick()
    assert len(backups(backup_folder(config))) == 2
    blocked = small_config(place.root, storage={"root": str(place.root), "backup_folder": str(place.file)})
    keeper = Backups(blocked, node.ledger, clock=lambda: now[0])
    keeper.tick()
    keeper.tick()
    [told] = node.ledger.search_events(code="backup_failed")
    assert "backup folder" in told.text


def test_a_backup_of_the_future_pushes_no_good_one_out(place: Place) -> None:
    node = place.start()
    config = small_config(place.root, storage={"root": str(place.root), "keep_backups": 2})
    folder = backup_folder(config)
    for ahead in (-2, -1, 3000):
        make_backup(place.file, folder, keep=9, now=NOW + timedelta(days=ahead))
    now = [NOW]
    keeper = Backups(config, node.ledger, clock=lambda: now[0])
    for minutes in range(0, 60, 5):
        now[0] = NOW + timedelta(minutes=minutes)
        keeper.tick()
    assert [backup_time(one) for one in backups(folder)] == [NOW + timedelta(days=n) for n in (-1, 0, 3000)]


def test_a_clock_that_fell_back_pushes_no_good_backup_out(place: Place) -> None:
    node = place.start()
    config = small_config(place.root, storage={"root": str(place.root), "keep_backups": 2})
    folder = backup_folder(config)
    for day in range(2):
        make_backup(place.file, folder, keep=9, now=NOW + timedelta(days=day))
    now = [NOW]
    keeper = Backups(config, node.ledger, clock=lambda: now[0])
    for day in range(5):
        now[0] = NOW - timedelta(days=10000 - day)
        keeper.tick()
    assert [backup_time(one) for one in backups(folder)][-2:] == [NOW, NOW + timedelta(days=1)]
    assert len(backups(folder)) == 4


def test_no_backups_are_made_where_none_are_wanted_or_the_database_has_its_own(place: Place) -> None:
    node = place.start()
    for storage in ({"keep_backups": 0}, {"database_url": "postgresql+psycopg://node@db/ledger"}):
        config = small_config(place.root, storage={"root": str(place.root), **storage})
        Backups(config, node.ledger).tick()
        assert not backup_folder(config).exists()


# ---- at start, and by command


@pytest.fixture
def config(place: Place, tmp_path: Path) -> str:
    path = tmp_path / "config.toml"
    path.write_text(f'[node]\nhost = "127.0.0.1"\n[storage]\nroot = "{place.root}"\n')
    return str(path)


def damage(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[4096 * 2 : 4096 * 4] = b"\xa5" * 8192
    file.write_bytes(data)


def test_a_node_never_starts_on_a_damaged_ledger(place: Place, config: str) -> None:
    place.start()
    place.stop()
    damage(place.file)
    before = place.file.read_bytes()
    with pytest.raises(LedgerDamaged, match="dicom-node ledger restore FILE"):
        Node(load_config(Path(config)), engine=LocalEngine(job_timeout_s=1)).start(port=0)
    assert place.file.read_bytes() == before
    lock_root(place.root)()  # and it has let go of the folder


def test_a_damaged_ledger_is_an_exit_code_of_its_own(
    place: Place, config: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place.start()
    place.stop()
    damage(place.file)
    monkeypatch.setattr("sys.argv", ["dicom-node", "ledger", "check", "--config", config])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 3
    assert "restore a backup" in capsys.readouterr().err


def lose(place: Place, how: str) -> None:
    """The ledger of a node that has run: removed, or cut to nothing."""
    place.start()
    place.stop()
    (place.root / "node.id").write_text("node-1\n")
    place.file.unlink() if how == "removed" else os.truncate(place.file, 0)


@pytest.mark.parametrize("how", ["removed", "cut to nothing"])
@pytest.mark.parametrize("with_backup", [True, False])
def test_a_node_never_begins_anew_where_its_ledger_is_lost(
    place: Place, config: str, how: str, with_backup: bool
) -> None:
    place.start()
    made = place.backup() if with_backup else None
    lose(place, how)
    wanted = f"dicom-node ledger restore {made}" if made else f"there is no backup in {place.root / 'backups'}"
    with pytest.raises(LedgerDamaged, match=re.escape(wanted)):
        Node(load_config(Path(config)), engine=LocalEngine(job_timeout_s=1)).start(port=0)
    assert not place.file.exists() or place.file.stat().st_size == 0


@pytest.mark.parametrize("how", ["removed", "cut to nothing"])
@pytest.mark.parametrize("command", [["check"], ["why", "ACC1"], ["ledger", "check", "--quick"], ["ledger", "backup"]])
def test_no_command_makes_a_ledger_in_the_place_of_a_lost_one(
    place: Place, config: str, how: str, command: list[str]
) -> None:
    place.start()
    made = place.backup()
    lose(place, how)
    answer = CliRunner().invoke(app, [*command, "--config", config], env={"COLUMNS": "1000"})
    assert answer.exit_code == 1
    assert f"dicom-node ledger restore {made}" in answer.output + str(answer.exception)
    assert not place.file.exists() or place.file.stat().st_size == 0
    assert backups(place.root / "backups") == [made]


def test_a_lost_ledger_is_restored_or_begun_anew_when_a_person_says_so(place: Place, config: str) -> None:
    place.start()
    made = place.backup()
    lose(place, "removed")
    assert CliRunner().invoke(app, ["ledger", "restore", str(made), "--config", config]).exit_code == 0
    assert lost_ledger(load_config(Path(config))) == ""
    lose(place, "removed")
    (place.root / "node.id").unlink()
    node = Node(load_config(Path(config)), engine=SmallEngine(), drain_s=0)
    node.start(port=0)
    node.stop()
    assert place.file.stat().st_size > 0


def test_a_ledger_that_was_never_made_is_left_to_the_node(place: Place, config: str) -> None:
    answer = CliRunner().invoke(app, ["check", "--json", "--config", config])
    assert "the node's first start makes it" in answer.output
    assert not place.file.exists()


def test_the_log_of_a_lost_ledger_is_not_taken_into_the_restored_one(place: Place) -> None:
    node = place.start()
    made = place.backup()
    node.ledger.note("", "later", "is only in the log of changes")
    log = place.file.with_name("ledger.sqlite-wal").read_bytes()
    place.stop()
    place.file.unlink()
    place.file.with_name("ledger.sqlite-wal").write_bytes(log)
    place.restore(made)
    assert "later" not in [event.code for event in place.start().ledger.search_events()]
    assert [path.read_bytes() for path in place.root.glob("ledger.sqlite.before-*-wal")] == [log]


def test_check_backup_and_restore_by_command(place: Place, config: str, ct: Callable[[], list[Path]]) -> None:
    node = place.start()
    node.receive(ct())
    node.run_to_end()
    run = CliRunner().invoke
    answer = run(app, ["ledger", "check", "--config", config])
    assert (answer.exit_code, "whole" in answer.output, "backups: none in" in answer.output) == (0, True, True)
    assert run(app, ["ledger", "backup", "--config", config]).exit_code == 0
    [made] = backups(place.root / "backups")
    assert made.name in run(app, ["ledger", "check", "--quick", "--config", config]).output
    place.stop()
    damage(place.file)
    answer = run(app, ["ledger", "restore", str(made), "--config", config])
    assert answer.exit_code == 0, answer.output
    ledger = open_ledger(f"sqlite:///{place.file}")
    assert [event.code for event in ledger.search_events(limit=1)] == ["ledger_restored"]
    ledger.close()
    node = place.start()
    assert [job.state for job in node.jobs()] == [JobState.DONE]


def test_of_a_damaged_backup_the_newest_whole_one_is_named_in_its_place(place: Place, config: str) -> None:
    place.start()
    folder = place.root / "backups"
    older, whole, damaged, other = (
        make_backup(place.file, folder, keep=9, now=NOW + timedelta(hours=hours)) for hours in range(4)
    )
    place.stop()
    for backup in (damaged, other):
        damage(backup)
    answer = CliRunner().invoke(app, ["ledger", "restore", str(damaged), "--config", config])
    assert answer.exit_code == 1
    assert f"backup {damaged}: " in answer.output
    assert f"the newest whole one: `dicom-node ledger restore {whole}`" in answer.output
    for backup in (older, whole):
        damage(backup)
    answer = CliRunner().invoke(app, ["ledger", "restore", str(damaged), "--config", config])
    assert f"there is no other whole one in {folder}" in answer.output


def test_nothing_is_restored_under_a_running_node(place: Place, config: str) -> None:
    place.start()
    made = place.backup()
    before = place.file.stat().st_ino
    unlock = lock_root(place.root)
    answer = CliRunner().invoke(app, ["ledger", "restore", str(made), "--config", config])
    unlock()
    assert answer.exit_code == 1
    assert "another node is running" in str(answer.exception)
    assert place.file.stat().st_ino == before
