"""From files in the inbox to jobs; the clock is the test's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import structlog
from intake_tools import HELD, QUEUED, RECEIVING, REJECTED, Intake, config, running_intake, small_ct
from pydicom import Dataset, dcmread
from pydicom.uid import generate_uid

from dicom_node.incoming import source_digest
from storage.errors import LedgerError, LedgerOutage
from storage.incoming_file import PREAMBLE_BYTES
from storage.records import JobState

STUDY_QUIET_S = 30
QUIET_S = 10
GIVE_UP_S = 300


@pytest.fixture
def intake(tmp_path: Path) -> Iterator[Intake]:
    with running_intake(tmp_path, listen=False) as running:
        yield running


def uids(paths: list[Path]) -> list[str]:
    return [dcmread(path, stop_before_pixels=True).SOPInstanceUID for path in paths]


def test_a_whole_series_is_one_job_queued_when_the_study_is_quiet(intake: Intake, tmp_path: Path) -> None:
    series_uid = generate_uid()
    paths = small_ct(tmp_path / "ct", series_uid=series_uid, accession="A7")
    intake.put(paths)
    intake.assembler.tick()
    assert (intake.job().state, intake.job().instances) == (RECEIVING, 6)
    intake.pass_time(STUDY_QUIET_S - 1)
    assert intake.job().state is RECEIVING
    intake.pass_time(1)
    job = intake.job(series_uid)
    assert (job.state, job.info.accession, intake.codes(job.id)[-1]) == (QUEUED, "A7", "chosen")
    assert job.source_digest == source_digest(uids(paths))
    assert (job.details["coverage_mm"], job.details["slices"]) == (30.0, 6)
    assert sorted(p.stem for p in intake.spool.ct_files(job.id)) == sorted(uids(paths))
    assert intake.spool.series_uids() == []
    assert intake.spool.incoming() == []


def test_slices_that_keep_coming_put_the_decision_off(intake: Intake, tmp_path: Path) -> None:
    paths = small_ct(tmp_path / "ct")
    for path in paths:
        intake.put([path])
        intake.pass_time(STUDY_QUIET_S - 1)
        assert intake.job().state is RECEIVING
    intake.pass_time(1)
    assert intake.job().state is QUEUED


def test_an_open_association_puts_the_decision_off_until_it_closes(intake: Intake, tmp_path: Path) -> None:
    token = intake.registry.open(calling_ae="PACS", address="10.0.0.1", peer="pacs")
    assert token is not None
    intake.put(small_ct(tmp_path / "ct"), token)
    intake.pass_time(STUDY_QUIET_S * 3)
    assert intake.job().state is RECEIVING
    assert (intake.job().info.calling_ae, intake.job().info.peer_address) == ("PACS", "10.0.0.1")
    intake.registry.close(token)
    intake.pass_time(0)
    assert intake.job().state is QUEUED


def test_an_association_that_idles_for_ever_does_not_hold_a_series_for_ever(intake: Intake, tmp_path: Path) -> None:
    token = intake.registry.open(calling_ae="PACS", address="10.0.0.1", peer="pacs")
    assert token is not None
    intake.put(small_ct(tmp_path / "ct"), token)
    intake.pass_time(GIVE_UP_S + 1)
    assert intake.job().state is QUEUED


def test_cut_off_in_the_middle_and_the_rest_on_another_association_is_one_whole_job(
    intake: Intake, tmp_path: Path
) -> None:
    paths = small_ct(tmp_path / "ct", 8)
    intake.put(paths[:3], aborted=True)
    intake.pass_time(STUDY_QUIET_S * 2)
    assert intake.job().state is RECEIVING
    intake.put(paths[3:])
    intake.pass_time(STUDY_QUIET_S)
    assert (intake.job().state, intake.job().instances) == (QUEUED, 8)


def test_cut_off_for_good_a_series_goes_on_with_what_is_there(intake: Intake, tmp_path: Path) -> None:
    intake.put(small_ct(tmp_path / "ct", 8)[:6], aborted=True)
    intake.pass_time(GIVE_UP_S - 1)
    assert intake.job().state is RECEIVING
    intake.pass_time(1)
    assert (intake.job().state, intake.job().instances) == (QUEUED, 6)


def test_a_series_that_is_half_there_is_waited_for(intake: Intake, tmp_path: Path) -> None:
    paths = small_ct(tmp_path / "ct", 20)
    first = [path for k, path in enumerate(paths) if k % 5 not in (1, 3)]  # gaps at two steps of three
    intake.put(first)
    intake.pass_time(STUDY_QUIET_S * 2)
    assert intake.job().state is RECEIVING
    intake.put([path for path in paths if path not in first])
    intake.pass_time(STUDY_QUIET_S)
    assert (intake.job().state, intake.job().instances) == (QUEUED, 20)


def test_after_a_restart_a_series_that_may_have_been_cut_off_is_waited_for(intake: Intake, tmp_path: Path) -> None:
    intake.put(small_ct(tmp_path / "ct", 8)[:6])
    intake.assembler.tick()
    intake.restart()
    intake.pass_time(STUDY_QUIET_S * 2)
    assert intake.job().state is RECEIVING
    intake.pass_time(GIVE_UP_S)
    assert intake.job().state is QUEUED


def test_two_series_interleaved_on_two_associations_are_two_jobs(intake: Intake, tmp_path: Path) -> None:
    one, other = small_ct(tmp_path / "1", 6), small_ct(tmp_path / "2", 9)
    for k in range(9):
        intake.put(one[k : k + 1])
        intake.put(other[k : k + 1])
        intake.assembler.tick()
    intake.pass_time(STUDY_QUIET_S)
    assert sorted((job.state, job.instances) for job in intake.jobs()) == [(QUEUED, 6), (QUEUED, 9)]


def test_a_missing_slice_is_waited_for_and_then_named(intake: Intake, tmp_path: Path) -> None:
    paths = small_ct(tmp_path / "ct", 8, origin_mm=(0.0, 0.0, -100.0))
    intake.put([*paths[:3], *paths[4:]])
    intake.pass_time(STUDY_QUIET_S * 2)
    assert intake.job().state is RECEIVING
    intake.pass_time(GIVE_UP_S)
    job = intake.job()
    assert (job.state, job.reason_code) == (REJECTED, "missing_slices")
    assert "1 between z = -90.0 and -80.0 mm" in job.reason


def test_a_missing_slice_that_comes_in_time_makes_the_series_whole(intake: Intake, tmp_path: Path) -> None:
    paths = small_ct(tmp_path / "ct", 8)
    intake.put([*paths[:3], *paths[4:]])
    intake.pass_time(STUDY_QUIET_S * 2)
    intake.put(paths[3:4])
    intake.pass_time(STUDY_QUIET_S)
    assert (intake.job().state, intake.job().instances) == (QUEUED, 8)


def test_a_missing_slice_that_comes_too_late_gives_the_series_a_new_chance(intake: Intake, tmp_path: Path) -> None:
    paths = small_ct(tmp_path / "ct", 8)
    intake.put([*paths[:3], *paths[4:]])
    intake.pass_time(GIVE_UP_S + 1)
    intake.put(paths[3:4])
    intake.pass_time(STUDY_QUIET_S)
    new, old = intake.jobs()
    assert (old.state, new.state, new.instances) == (REJECTED, QUEUED, 8)
    assert len(intake.spool.ct_files(new.id)) == 8


def test_a_localizer_is_rejected_by_name_and_its_study_goes_on(intake: Intake, tmp_path: Path) -> None:
    study_uid = generate_uid()
    scout = small_ct(tmp_path / "s", 1, study_uid=study_uid, image_type=("ORIGINAL", "PRIMARY", "LOCALIZER"))
    body = small_ct(tmp_path / "b", study_uid=study_uid)
    intake.put([*scout, *body])
    intake.pass_time(STUDY_QUIET_S)
    assert {(job.state, job.reason_code or "-") for job in intake.jobs()} >= {(REJECTED, "localizer")}
    assert sorted(job.state for job in intake.jobs()) == [QUEUED, REJECTED]


def test_a_later_better_series_of_the_study_is_not_missed(intake: Intake, tmp_path: Path) -> None:
    study_uid = generate_uid()
    intake.put(small_ct(tmp_path / "1", 6, study_uid=study_uid))
    intake.pass_time(STUDY_QUIET_S - 1)
    intake.put(small_ct(tmp_path / "2", 20, study_uid=study_uid))
    intake.pass_time(STUDY_QUIET_S)
    better, first = intake.jobs()
    assert (better.state, better.instances) == (QUEUED, 20)
    assert (first.state, first.reason_code) == (REJECTED, "not_best")
    assert better.info.series_uid in first.reason


@pytest.mark.parametrize(("slices", "state"), [(7, REJECTED), (8, QUEUED)])
def test_after_the_choice_only_a_clearly_better_series_is_chosen_as_well(
    intake: Intake, tmp_path: Path, slices: int, state: JobState
) -> None:
    study_uid = generate_uid()
    intake.put(small_ct(tmp_path / "1", 6, study_uid=study_uid))
    intake.pass_time(STUDY_QUIET_S)
    intake.put(small_ct(tmp_path / "2", slices, study_uid=study_uid))
    intake.pass_time(STUDY_QUIET_S)
    late = intake.jobs()[0]
    assert late.state is state
    assert intake.codes(late.id)[-1] == ("chosen_late" if state is QUEUED else "study_has_result")


def test_a_held_series_waits_for_a_person(tmp_path: Path) -> None:
    rules = [{"name": "look", "action": "hold", "series_description": "body*"}]
    with running_intake(tmp_path, config(rules=rules), listen=False) as intake:
        intake.put(small_ct(tmp_path / "ct"))
        intake.pass_time(STUDY_QUIET_S)
        job = intake.job()
        assert job.state is HELD
        assert len(intake.spool.ct_files(intake.ledger.release(job.id).id)) == 6


# -- the same again, and late slices


def test_the_same_slices_again_while_receiving_are_dropped_and_counted(intake: Intake, tmp_path: Path) -> None:
    paths = small_ct(tmp_path / "ct")
    intake.put(paths)
    intake.assembler.tick()
    intake.put(paths)
    intake.pass_time(STUDY_QUIET_S)
    assert (intake.job().state, intake.job().instances, intake.job().details["duplicates"]) == (QUEUED, 6, 6)


def test_the_same_series_again_after_its_job_is_rejected_and_names_the_job(intake: Intake, tmp_path: Path) -> None:
    paths = small_ct(tmp_path / "ct")
    intake.put(paths)
    intake.pass_time(STUDY_QUIET_S)
    intake.put(paths)
    intake.pass_time(QUIET_S)
    again, first = intake.jobs()
    assert (first.state, again.state, again.reason_code) == (QUEUED, REJECTED, "duplicate_series")
    assert first.id in again.reason
    assert intake.spool.incoming() == []
    assert len(intake.spool.ct_files(first.id)) == 6


@pytest.mark.parametrize("state", [JobState.CANCELLED, JobState.FAILED])
def test_the_same_series_after_its_job_was_given_up_has_a_new_chance(
    intake: Intake, tmp_path: Path, state: JobState
) -> None:
    paths = small_ct(tmp_path / "ct")
    intake.put(paths)
    intake.pass_time(STUDY_QUIET_S)
    job = intake.job()
    if state is JobState.FAILED:
        intake.ledger.claim("worker", lease_s=60)
        intake.ledger.fail_run(job.id, "worker", code="x", text="x", permanent=True, max_attempts=3)
    else:
        intake.ledger.cancel(job.id)
    intake.put(paths)
    intake.pass_time(STUDY_QUIET_S)
    again, first = intake.jobs()
    assert (first.state, again.state, again.instances) == (state, QUEUED, 6)


def test_a_slice_after_the_job_began_makes_a_successor_with_all_slices(intake: Intake, tmp_path: Path) -> None:
    paths = small_ct(tmp_path / "ct", 8)
    intake.put(paths[:7])
    intake.pass_time(STUDY_QUIET_S)
    first = intake.job()
    assert intake.ledger.claim("worker", lease_s=60) is not None
    intake.put(paths[7:])
    intake.pass_time(QUIET_S)
    successor, first = intake.jobs()
    assert (first.state, successor.state) == (JobState.RUNNING, QUEUED)
    assert (successor.supersedes, successor.instances) == (first.id, 8)
    assert successor.source_digest == source_digest(uids(paths))
    assert {"late_slices", "superseded"} <= set(intake.codes(first.id))
    assert "late_slices" in intake.codes(successor.id)
    assert len(intake.spool.ct_files(first.id)) == 7


def test_a_late_slice_before_the_job_began_replaces_the_job(intake: Intake, tmp_path: Path) -> None:
    paths = small_ct(tmp_path / "ct", 8)
    intake.put(paths[:7])
    intake.pass_time(STUDY_QUIET_S)
    intake.put(paths[7:])
    intake.pass_time(QUIET_S)
    successor, first = intake.jobs()
    assert (first.state, first.reason_code, successor.state) == (JobState.CANCELLED, "superseded", QUEUED)


def test_other_content_under_a_known_uid_is_put_aside(intake: Intake, tmp_path: Path) -> None:
    paths = small_ct(tmp_path / "ct", series_uid=generate_uid())
    intake.put(paths)
    intake.pass_time(STUDY_QUIET_S)
    changed = paths[0].read_bytes()[:-2] + b"\x07\x07"
    intake.spool.store_incoming("bb" * 28, uids(paths)[0], (changed[PREAMBLE_BYTES:],))
    intake.pass_time(STUDY_QUIET_S)
    assert intake.job().state is QUEUED
    (event,) = intake.ledger.search_events(code="quarantined")
    assert event.details["reason"] == "different_content"


def test_a_series_of_which_nothing_was_kept_is_not_waited_for(intake: Intake, tmp_path: Path) -> None:
    paths = small_ct(tmp_path / "ct", series_uid=generate_uid())
    intake.put(paths)
    intake.pass_time(STUDY_QUIET_S)
    for path, uid in zip(paths, uids(paths), strict=True):
        changed = path.read_bytes()[:-2] + b"\x07\x07"
        intake.spool.store_incoming("bb" * 28, uid, (changed[PREAMBLE_BYTES:],))
    intake.pass_time(STUDY_QUIET_S)
    assert intake.assembler.receiving == 0
    assert intake.job().state is QUEUED


# -- what cannot be used


def bad(keyword: str, value: str) -> Callable[[Dataset, int], None]:
    def change(ds: Dataset, k: int) -> None:
        if k == 0:
            ds.add_new(keyword, "UT", value)

    return change


def test_unusable_files_are_put_aside_with_one_event_and_the_rest_goes_on(intake: Intake, tmp_path: Path) -> None:
    paths = small_ct(tmp_path / "ct")
    intake.put(paths)
    for k in range(3):
        intake.spool.store_incoming("ab" * 28, f"1.2.{k}", (b"not DICOM at all",))
    with structlog.testing.capture_logs() as logs:
        intake.pass_time(STUDY_QUIET_S)
    assert intake.job().state is QUEUED
    (event,) = intake.ledger.search_events(code="quarantined")
    assert (event.details["reason"], event.details["instances"]) == ("not_dicom", 3)
    assert [line["event"] for line in logs].count("instances.quarantined") == 1
    assert len(list((tmp_path / "spool" / "quarantine" / "not_dicom").iterdir())) == 3


@pytest.mark.parametrize(
    ("keyword", "value", "code"),
    [
        ("SeriesInstanceUID", "../../../tmp/x", "bad_uid"),
        ("SeriesInstanceUID", "1." + "2" * 64, "bad_uid"),
        ("SeriesInstanceUID", "", "missing_uid"),
        ("SOPInstanceUID", "1.2.3.4", "uid_mismatch"),
        ("StudyInstanceUID", "1.2.3.4", "mixed_study"),
    ],
)
def test_a_hostile_header_puts_its_file_aside(
    intake: Intake, tmp_path: Path, keyword: str, value: str, code: str
) -> None:
    implicit = "1.2.840.10008.1.2"
    paths = small_ct(tmp_path / "ct", 6, transfer_syntax=implicit, modify=bad(keyword, value))
    sent = uids(paths)[0]
    intake.put(paths[1:])
    intake.assembler.tick()
    told = "1.2.9" if code == "uid_mismatch" else sent
    intake.spool.store_incoming("ab" * 28, told, (paths[0].read_bytes()[PREAMBLE_BYTES:],))
    intake.pass_time(STUDY_QUIET_S)
    assert (intake.job().state, intake.job().instances) == (QUEUED, 5)
    (event,) = intake.ledger.search_events(code="quarantined")
    assert event.details["reason"] == code
    if code in {"uid_mismatch", "mixed_study"}:
        assert event.details["accession"] == "ACC1"
    assert "\n" not in event.text


def test_what_was_put_aside_while_the_ledger_was_out_is_told_when_it_is_back(
    intake: Intake, monkeypatch: pytest.MonkeyPatch
) -> None:
    intake.spool.store_incoming("ab" * 28, "1.2.3", (b"not DICOM at all",))

    def fail(*_: object, **__: object) -> None:
        raise LedgerOutage("locked")

    with monkeypatch.context() as patch:
        patch.setattr(intake.ledger, "note", fail)
        with pytest.raises(LedgerOutage):
            intake.assembler.tick()
    intake.assembler.tick()
    intake.assembler.tick()
    (event,) = intake.ledger.search_events(code="quarantined")
    assert event.details["reason"] == "not_dicom"


def test_more_instances_than_allowed_are_put_aside_and_the_series_rejected(tmp_path: Path) -> None:
    with running_intake(tmp_path, config(intake={"max_instances_per_series": 5}), listen=False) as intake:
        intake.put(small_ct(tmp_path / "ct", 8))
        intake.assembler.tick()
        intake.restart()
        intake.pass_time(GIVE_UP_S)
        job = intake.job()
        assert (job.state, job.reason_code, job.instances) == (REJECTED, "too_large", 6)
        assert intake.spool.incoming() == []
        (event,) = intake.ledger.search_events(code="quarantined")
        assert (event.details["reason"], event.details["instances"]) == ("too_many_instances", 2)
        assert (
            len(list((tmp_path / "spool" / "quarantine" / "too_many_instances").iterdir())) == 2
        )  # acknowledged: kept


def test_an_unexpected_error_with_one_study_leaves_the_others_alone(
    intake: Intake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = generate_uid()
    intake.put(small_ct(tmp_path / "1", series_uid=broken))
    intake.put(small_ct(tmp_path / "2"))
    intake.assembler.tick()
    take = intake.spool.take_series

    def fail(job_id: str, series_uid: str) -> Path:
        if series_uid == broken:
            raise OSError("disk")
        return take(job_id, series_uid)

    with monkeypatch.context() as patch, structlog.testing.capture_logs() as logs:
        patch.setattr(intake.spool, "take_series", fail)
        intake.pass_time(STUDY_QUIET_S)
        intake.pass_time(5)
    assert [line["event"] for line in logs].count("assembler.step_failed") == 1
    assert sorted(job.state for job in intake.jobs()) == [QUEUED, RECEIVING]
    intake.pass_time(61)
    assert [job.state for job in intake.jobs()] == [QUEUED, QUEUED]


@pytest.mark.parametrize("error", [OSError("disk"), LedgerError("a value that it does not take")])
def test_a_study_whose_decision_fails_again_and_again_ends(
    intake: Intake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    intake.put(small_ct(tmp_path / "ct"))
    intake.assembler.tick()

    def fail(*_: object) -> Path:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(intake.spool, "link_previous", fail)
        patch.setattr(intake.ledger, "jobs_of_study", fail)
        intake.pass_time(STUDY_QUIET_S)
        assert intake.job().state is RECEIVING
        intake.pass_time(GIVE_UP_S)
    assert (intake.job().state, intake.job().reason_code) == (REJECTED, "internal_error")
    assert intake.assembler.receiving == 0


def test_the_rest_of_a_series_that_was_cancelled_while_it_arrived_is_cancelled_too(
    intake: Intake, tmp_path: Path
) -> None:
    paths = small_ct(tmp_path / "ct", 8)
    token = intake.registry.open(calling_ae="PACS", address="10.0.0.1", peer="pacs")
    assert token is not None
    intake.put(paths[:4], token)
    intake.assembler.tick()
    first = intake.ledger.cancel(intake.job().id)
    intake.assembler.tick()
    intake.put(paths[4:], token)
    intake.registry.close(token)
    intake.pass_time(STUDY_QUIET_S)
    rest = intake.jobs()[0]
    assert (rest.state, rest.reason_code, rest.instances) == (JobState.CANCELLED, "cancelled", 8)
    assert first.id in rest.reason
    assert len(intake.spool.ct_files(rest.id)) == 8  # `jobs retry` runs all of it


def test_a_job_cancelled_while_receiving_keeps_its_slices_for_a_retry(intake: Intake, tmp_path: Path) -> None:
    intake.put(small_ct(tmp_path / "ct"))
    intake.assembler.tick()
    intake.ledger.cancel(intake.job().id)
    intake.pass_time(STUDY_QUIET_S)
    assert intake.job().state is JobState.CANCELLED
    assert len(intake.spool.ct_files(intake.job().id)) == 6
    assert intake.assembler.receiving == 0


def test_a_receiving_job_without_any_file_does_not_wait_for_ever(intake: Intake, tmp_path: Path) -> None:
    intake.put(small_ct(tmp_path / "ct"))
    intake.assembler.tick()
    for path in intake.spool.series_files(intake.job().info.series_uid):
        path.unlink()
    intake.restart()
    intake.pass_time(GIVE_UP_S + 1)
    assert (intake.job().state, intake.job().reason_code) == (REJECTED, "no_instances")


def test_folders_of_closed_associations_go_when_they_are_empty(intake: Intake, tmp_path: Path) -> None:
    token = intake.registry.open(calling_ae="PACS", address="10.0.0.1", peer="pacs")
    assert token is not None
    intake.put(small_ct(tmp_path / "ct"), token)
    intake.assembler.tick()
    folder = tmp_path / "spool" / "inbox" / "incoming" / token
    assert folder.is_dir()
    intake.spool.close_incoming(token)
    intake.registry.close(token)
    intake.assembler.tick()
    assert not folder.exists()


# -- kill -9


class Killed(BaseException):
    """What the process sees of kill -9: nothing after this line."""


STEPS = [
    ("spool", "adopt"),
    ("ledger", "open_job"),
    ("ledger", "update"),
    ("ledger", "note"),
    ("spool", "take_series"),
    ("spool", "link_previous"),
    ("ledger", "move"),
]


def kill_at(monkeypatch: pytest.MonkeyPatch, thing: object, name: str, nth: int, *, after: bool) -> None:
    real = getattr(thing, name)
    calls = [0]

    def step(*args: object, **kwargs: object) -> object:
        calls[0] += 1
        if calls[0] == nth and not after:
            raise Killed
        result = real(*args, **kwargs)
        if calls[0] == nth:
            raise Killed
        return result

    monkeypatch.setattr(thing, name, step)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("nth", [1, 2])
@pytest.mark.parametrize(("owner", "name"), STEPS)
def test_killed_at_any_step_the_outcome_is_the_same(
    intake: Intake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: str, name: str, nth: int, after: bool
) -> None:
    """A study of two series, one with a late slice after its job began: killed once, resumed, and checked."""
    study_uid = generate_uid()
    body = small_ct(tmp_path / "1", 5, study_uid=study_uid, series_uid="1.2.1")
    part = small_ct(tmp_path / "2", 3, study_uid=study_uid, series_uid="1.2.2")
    with monkeypatch.context() as patch:
        kill_at(patch, getattr(intake, owner), name, nth, after=after)
        killed = False

        def until_quiet(seconds: float) -> None:
            nonlocal killed
            try:
                intake.pass_time(seconds)
            except Killed:
                killed = True
                patch.undo()
                intake.restart()
                intake.pass_time(GIVE_UP_S)  # whether the sender was cut off is not known after a restart

        intake.put([*body[:4], *part])
        until_quiet(STUDY_QUIET_S)
        assert intake.ledger.claim("worker", lease_s=600) is not None
        intake.put(body[4:])
        until_quiet(QUIET_S)
    assert killed or (name, nth) in {("link_previous", 2)}
    jobs = intake.jobs("1.2.1")
    assert [(job.state, job.instances) for job in jobs] == [(QUEUED, 5), (JobState.RUNNING, 4)]
    assert jobs[0].supersedes == jobs[1].id
    assert jobs[0].source_digest == source_digest(uids(body))
    assert [len(intake.spool.ct_files(job.id)) for job in jobs] == [5, 4]
    (loser,) = intake.jobs("1.2.2")
    assert (loser.state, loser.reason_code) in {(REJECTED, "not_best"), (REJECTED, "study_has_result")}
    assert intake.spool.series_uids() == []
    assert intake.spool.incoming() == []


def test_slices_that_come_between_taking_and_queueing_join_as_late_slices(
    intake: Intake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = small_ct(tmp_path / "ct", 8)
    intake.put(paths[:7])
    with monkeypatch.context() as patch:
        kill_at(patch, intake.spool, "take_series", 1, after=True)
        with pytest.raises(Killed):
            intake.pass_time(STUDY_QUIET_S)
    intake.put(paths[7:])
    intake.restart()
    intake.pass_time(GIVE_UP_S)
    intake.pass_time(GIVE_UP_S)
    newest = intake.jobs()[0]
    assert (newest.state, newest.instances) == (QUEUED, 8)
    assert len(intake.spool.ct_files(newest.id)) == 8


def test_a_restart_keeps_the_sender_of_what_was_not_indexed(intake: Intake, tmp_path: Path) -> None:
    token = intake.registry.open(calling_ae="PACS", address="10.0.0.1", peer="pacs")
    assert token is not None
    intake.put(small_ct(tmp_path / "ct"), token)
    intake.restart()
    intake.assembler.tick()
    assert (intake.job().info.calling_ae, intake.job().info.peer_address) == ("PACS", "10.0.0.1")


# -- over the network


def test_a_series_interrupted_by_an_abort_is_whole_when_the_rest_comes(tmp_path: Path) -> None:
    paths = small_ct(tmp_path / "ct", 8)
    with running_intake(tmp_path) as intake:
        assoc = intake.associate()
        for path in paths[:4]:
            assert assoc.send_c_store(dcmread(path)).Status == 0x0000
        assoc.abort()
        intake.wait(lambda: not intake.registry.open_tokens())
        intake.pass_time(QUIET_S)
        with intake.association() as second:
            for path in paths[3:]:
                assert second.send_c_store(dcmread(path)).Status == 0x0000
        intake.pass_time(STUDY_QUIET_S)
        assert (intake.job().state, intake.job().instances, intake.job().details["duplicates"]) == (QUEUED, 8, 1)


def test_the_same_instance_over_two_associations_is_the_same_bytes(tmp_path: Path) -> None:
    paths = small_ct(tmp_path / "ct", 4)
    with running_intake(tmp_path) as intake:
        for _ in range(2):
            with intake.association() as assoc:
                for path in paths:
                    assert assoc.send_c_store(dcmread(path)).Status == 0x0000
            intake.pass_time(STUDY_QUIET_S)
        again, first = intake.jobs()
        assert (first.state, again.state, again.reason_code) == (QUEUED, REJECTED, "duplicate_series")
        assert intake.ledger.search_events(code="quarantined") == []
