"""A job that is computed again while something else happens to its series: one result takes its place, or none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from recall_tools import Bench

from dicom_node.errors import RerunRefused
from dicom_node.incoming import source_digest
from dicom_node.lineage import RECALLED
from dicom_node.rerun import rerun
from storage.errors import StaleState
from storage.records import Job, JobState

WHY = ("bundle: a 1 -> a 2",)
UIDS = ("2.25.902.1", "2.25.902.2")


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.ledger.close()


def done(bench: Bench, **given: Any) -> Job:
    job = bench.finished(**given)
    for uid in UIDS:
        bench.spool.adopt(bench.spool.store_incoming("ab", uid, [b"ct"]), "2.25.902")
    bench.spool.take_series(job.id, "2.25.902")
    bench.ledger.update(job.id, source_digest=source_digest(UIDS))
    bench.send()
    return bench.ledger.get(job.id)


def work_folders(bench: Bench) -> set[str]:
    return {path.name for path in (bench.spool.root / "work").iterdir()}


def test_the_new_job_is_queued_whole_or_not_opened(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    job = done(bench)
    seen = []
    opened = bench.ledger.open_successor

    def look(job_id: str, *args: Any, **kwargs: Any) -> Job:
        seen.append(([path.name for path in bench.spool.ct_files(job_id)], bench.ledger.receiving()))
        return opened(job_id, *args, **kwargs)

    monkeypatch.setattr(bench.ledger, "open_successor", look)
    new = rerun(bench.ledger, bench.spool, job, WHY)
    assert seen == [([f"{uid}.dcm" for uid in UIDS], [])]  # its input first, and never a job that waits for slices
    assert (new.state, new.instances, new.source_digest) == (JobState.QUEUED, 2, job.source_digest)
    assert [event.code for event in bench.ledger.events(new.id)] == ["opened", "rerun"]


def test_of_two_operators_at_once_one_opens_the_job(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    job = done(bench)
    linked = bench.spool.link_previous

    def the_other_is_quicker(*args: str) -> int:
        monkeypatch.setattr(bench.spool, "link_previous", linked)
        rerun(bench.ledger, bench.spool, job, WHY)
        return linked(*args)

    monkeypatch.setattr(bench.spool, "link_previous", the_other_is_quicker)
    with pytest.raises(StaleState, match="opened meanwhile"):
        rerun(bench.ledger, bench.spool, job, WHY)
    new, _ = bench.ledger.jobs_of_series("2.25.902")
    assert work_folders(bench) == {job.id, new.id}


def test_while_late_slices_arrive_nothing_is_computed_again(bench: Bench) -> None:
    job = done(bench)
    late = bench.ledger.open_job(job.info, supersedes=job.id)
    with pytest.raises(RerunRefused, match=f"arriving as job {late.id}"):
        rerun(bench.ledger, bench.spool, job, WHY)
    assert len(bench.ledger.jobs_of_series("2.25.902")) == 2


def test_a_recalled_job_is_not_computed_again_beside_the_one_that_was_routed_again(bench: Bench) -> None:
    job = done(bench)
    bench.ledger.update(job.id, details={RECALLED: {"time": ""}})
    again = bench.finished(version="4")  # supersedes nothing: the first did not stand any more
    with pytest.raises(RerunRefused, match=f"job {again.id} of the same series is newer"):
        rerun(bench.ledger, bench.spool, bench.ledger.get(job.id), WHY)


def test_a_ct_that_goes_at_this_moment_is_said_to_be_gone(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    job = done(bench)
    listed = bench.spool.ct_files(job.id)
    bench.spool.discard_work(job.id)
    monkeypatch.setattr(bench.spool, "ct_files", lambda job_id: listed if job_id == job.id else [])
    with pytest.raises(RerunRefused, match="route the study again"):
        rerun(bench.ledger, bench.spool, job, WHY)
    assert work_folders(bench) == set()
    assert len(bench.ledger.jobs_of_series("2.25.902")) == 1
