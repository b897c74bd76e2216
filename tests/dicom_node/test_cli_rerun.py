"""`jobs retry --rerun` of a job that is DONE: another job, and only for a reason."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest
from recall_tools import Bench, write_config
from typer.testing import CliRunner, Result

from dicom_node.assembler import Assembler
from dicom_node.cli import app
from dicom_node.incoming import source_digest
from dicom_node.net.associations import AssociationRegistry
from dicom_node.rejections import keep_references
from storage.records import DeliveryState, Job, JobState, SeriesInfo
from storage.spool import Spool

RUNNER = CliRunner()
UIDS = ("2.25.902.1", "2.25.902.2", "2.25.902.3")


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    write_config(made)
    yield made
    made.ledger.close()


def give_ct(bench: Bench, job_id: str) -> None:
    for uid in UIDS:
        bench.spool.adopt(bench.spool.store_incoming("ab", uid, [b"ct"]), "2.25.902")
    bench.spool.take_series(job_id, "2.25.902")
    bench.ledger.update(job_id, source_digest=source_digest(UIDS))


def done(bench: Bench) -> Job:
    """A DONE job with its CT. Its bundle is not the one that the configuration names."""
    job = bench.finished()
    give_ct(bench, job.id)
    bench.send()
    return bench.ledger.get(job.id)


def retry(bench: Bench, job: Job, *words: str) -> Result:
    command = ["jobs", "retry", job.id[:8], *words, "--config", str(bench.root / "config.toml")]
    return RUNNER.invoke(app, command, env={"COLUMNS": "300"})


def test_a_done_job_is_computed_again_as_a_job_of_its_own(bench: Bench) -> None:
    job = done(bench)
    files = {p: p.read_bytes() for p in bench.spool.result_folder(job.id).rglob("*") if p.is_file()}
    answer = retry(bench, job, "--rerun")
    assert answer.exit_code == 0, answer.output
    new, old = bench.ledger.jobs_of_series("2.25.902")
    assert f"{new.id[:8]}: QUEUED, supersedes job {job.id[:8]}" in answer.output
    assert (new.state, new.supersedes, new.instances) == (JobState.QUEUED, job.id, 3)
    assert new.source_digest == job.source_digest
    assert [path.name for path in bench.spool.ct_files(new.id)] == [f"{uid}.dcm" for uid in UIDS]
    assert (old.id, old.state) == (job.id, JobState.DONE)
    assert {p: p.read_bytes() for p in files} == files
    shown = RUNNER.invoke(app, ["why", "ACC1", "--config", str(bench.root / "config.toml")]).output
    assert "computed again (bundle: phantom 3 -> phantom" in shown
    assert "with slices that came after" not in shown


def test_without_rerun_a_done_job_is_left_alone(bench: Bench) -> None:
    job = done(bench)
    assert retry(bench, job).exit_code == 1
    assert [one.id for one in bench.ledger.jobs_of_series("2.25.902")] == [job.id]


def test_a_successor_that_is_on_its_way_is_named(bench: Bench) -> None:
    job = done(bench)
    retry(bench, job, "--rerun")
    again = retry(bench, job, "--rerun")
    assert again.exit_code == 1
    assert f"{bench.ledger.jobs_of_series('2.25.902')[0].id} supersedes it already" in again.output
    assert len(bench.ledger.jobs_of_series("2.25.902")) == 2


@pytest.mark.parametrize(("recalled", "said"), [(False, "jobs redeliver"), (True, "the series that was taken back")])
def test_what_nothing_has_changed_of_is_refused_with_what_helps(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, recalled: bool, said: str
) -> None:
    job = done(bench)
    monkeypatch.setattr("dicom_node.rerun.changes", lambda *_: ())
    if recalled:
        words = ["recall", "--bundle", "phantom", "--send-rejections", "--yes"]
        RUNNER.invoke(app, [*words, "--config", str(bench.root / "config.toml")])
    refused = retry(bench, job, "--rerun")
    assert (refused.exit_code, said in refused.output) == (1, True)


def test_a_ct_that_retention_removed_is_asked_for_and_found_when_it_is_routed_again(bench: Bench) -> None:
    job = done(bench)
    bench.spool.discard_work(job.id)
    refused = retry(bench, job, "--rerun")
    assert refused.exit_code == 1
    assert "route the study again" in refused.output
    assert len(bench.ledger.jobs_of_series("2.25.902")) == 1
    routed = bench.ledger.open_job(SeriesInfo(study_uid="2.25.901", series_uid="2.25.902"))
    give_ct(bench, routed.id)
    bench.ledger.move(routed.id, JobState.REJECTED, code="duplicate_series", text="the instances of the first job")
    assert retry(bench, job, "--rerun").exit_code == 0
    assert len(bench.spool.ct_files(bench.ledger.jobs_of_series("2.25.902")[0].id)) == 3


def test_a_bundle_that_cannot_be_read_is_said_and_nothing_is_opened(bench: Bench) -> None:
    job = done(bench)
    with (bench.root / "config.toml").open("a") as file:
        file.write('[pipeline]\nbundle = "nobody"\n')
    refused = retry(bench, job, "--rerun")
    assert refused.exit_code == 1
    assert "nobody" in refused.output
    assert len(bench.ledger.jobs_of_series("2.25.902")) == 1


def test_why_offers_it_when_a_seg_came_after_the_result(bench: Bench) -> None:
    job = done(bench)
    bench.ledger.update(job.id, details={"segmentations": ["2.25.50"]})

    def seg_came(uid: str) -> str:
        details = {"study_uid": "2.25.901", "sop_instance_uid": uid}
        bench.ledger.note("", "segmentation_kept", "SEG kept", details=details)
        return RUNNER.invoke(app, ["why", "ACC1", "--config", str(bench.root / "config.toml")]).output

    assert "--rerun" not in seg_came("2.25.50")  # the one that it used
    assert f"jobs retry --rerun {job.id[:8]}" in seg_came("2.25.51").replace("\n", "")
    retry(bench, job, "--rerun")
    assert "--rerun" not in seg_came("2.25.52")


def test_a_kill_before_the_new_job_is_queued_leaves_no_job_that_waits_for_ever(bench: Bench) -> None:
    job = done(bench)
    bench.ledger.open_job(job.info, supersedes=job.id)  # and then the power went
    now = [0.0]
    registry = AssociationRegistry(limit=1, clock=lambda: now[0])
    assembler = Assembler(bench.config, bench.spool, bench.ledger, registry, clock=lambda: now[0])
    for _ in range(3):
        assembler.tick()
        now[0] += 10_000.0
    left = bench.ledger.jobs_of_series("2.25.902")[0]
    assert left.state is JobState.REJECTED


def half_delivered(bench: Bench) -> Job:
    """A FAILED job with its CT: "pacs" has its series, "other" refused them."""
    job = bench.finished()
    give_ct(bench, job.id)
    while (row := bench.ledger.claim_delivery("s", lease_s=60)) is not None:
        there = row.destination == "pacs"
        state = DeliveryState.SENT if there else DeliveryState.FAILED
        bench.ledger.finish_delivery(row.id, "s", state=state, sent=row.instances if there else 0, statuses={})
    return bench.ledger.get(job.id)


@pytest.mark.parametrize("words", [("--rerun",), ()])
def test_a_job_of_which_something_was_sent_is_computed_again_as_a_job_of_its_own(
    bench: Bench, words: tuple[str, ...]
) -> None:
    job = half_delivered(bench)
    assert job.state is JobState.FAILED
    before = bench.ledger.deliveries(job.id)
    if not words:  # retention
        keep_references(bench.spool, job.id)
        bench.spool.discard_result(job.id)
    answer = retry(bench, job, *words)
    assert answer.exit_code == 0, answer.output
    new, old = bench.ledger.jobs_of_series("2.25.902")
    assert (new.state, new.supersedes, old.state) == (JobState.QUEUED, job.id, JobState.FAILED)
    assert bench.ledger.deliveries(job.id) == before
    assert set(bench.spool.references(job.id)) == {"pet-sc", "pet-pet", "mip-sc"}


def test_where_nothing_has_changed_it_is_computed_in_place(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    job = half_delivered(bench)
    monkeypatch.setattr("dicom_node.rerun.changes", lambda *_: ())
    answer = retry(bench, job, "--rerun")
    assert answer.exit_code == 0, answer.output
    assert [one.id for one in bench.ledger.jobs_of_series("2.25.902")] == [job.id]
    assert bench.ledger.get(job.id).state is JobState.QUEUED
    assert not bench.spool.has_result(job.id)


def test_a_result_that_turned_out_to_be_another_series_gets_a_job_of_its_own(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = half_delivered(bench)
    monkeypatch.setattr("dicom_node.rerun.changes", lambda *_: ())
    retry(bench, job, "--rerun")
    assert bench.ledger.claim("w", lease_s=60)
    bench.ledger.fail_run(job.id, "w", code="other_series", text="another", permanent=True, max_attempts=3)
    assert retry(bench, job).exit_code == 0
    assert bench.ledger.jobs_of_series("2.25.902")[0].supersedes == job.id


def test_a_retry_on_a_broken_disk_says_so_and_changes_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    job = done(bench)
    bench.ledger.redeliver(job.id)
    bench.ledger.cancel(job.id)

    def broken(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Spool, "keep_references", broken)
    answer = retry(bench, job, "--rerun")
    assert (answer.exit_code, type(answer.exception)) == (1, SystemExit)
    assert f"job {job.id[:8]}: spool_failed: Input/output error" in answer.output
    assert bench.ledger.get(job.id).state is JobState.CANCELLED
    assert bench.spool.has_result(job.id)
