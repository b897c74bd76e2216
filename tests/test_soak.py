"""The soak of benchmarks/soak.py, in small: its counts are those of 50 connections, and what it would complain of."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from storage.ledger import open_ledger
from storage.records import Job, JobState, SeriesInfo

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from soak import SLICES, wrong_jobs

PROGRAM = Path(__file__).parents[1] / "benchmarks" / "soak.py"
COUNTS = ("--connects", "50", "--aborts", "5", "--series", "3")


def test_a_node_is_left_as_it_was_and_every_series_has_its_one_job() -> None:
    """Memory is looked at in the full run only."""
    command = [sys.executable, str(PROGRAM), *COUNTS, "--short"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    _before, _after, ended, told = [json.loads(line) for line in done.stdout.splitlines()]
    assert ended == {"jobs": {f"REJECTED rule_ignore, {SLICES} instances": 3}, "open_associations": 0}
    assert told == {"traffic": {"connects": 50, "aborts": 5, "series": 3}, "wrong": []}


def ended_jobs(folder: Path, *series: str) -> list[Job]:
    """Jobs as the soak's rule ends them."""
    ledger = open_ledger(f"sqlite:///{folder / 'ledger.sqlite'}")
    for uid in series:
        job = ledger.open_job(SeriesInfo(study_uid=f"{uid}.1", series_uid=uid))
        ledger.update(job.id, instances=SLICES)
        ledger.move(job.id, JobState.REJECTED, code="rule_ignore", text="")
    jobs = [ledger.jobs_of_series(uid)[0] for uid in series]
    ledger.close()
    return jobs


def test_one_job_for_each_series_is_no_fault(tmp_path: Path) -> None:
    assert wrong_jobs(ended_jobs(tmp_path, "1.1", "1.2"), ["1.1", "1.2"]) == []


def test_series_that_became_one_job_are_told(tmp_path: Path) -> None:
    jobs = ended_jobs(tmp_path, "1.1")
    assert wrong_jobs(jobs, ["1.1", "1.2"]) == ["series 1.2: 0 jobs"]
    assert wrong_jobs([*jobs, *jobs], ["1.1"]) == ["series 1.1: 2 jobs"]


def test_a_job_of_an_association_that_was_cut_off_is_told(tmp_path: Path) -> None:
    assert wrong_jobs(ended_jobs(tmp_path, "1.1", "1.2"), ["1.1"]) == [
        "series 1.2: it has a job and was not sent whole"
    ]


def test_a_job_in_another_state_or_without_all_its_slices_is_told(tmp_path: Path) -> None:
    (job,) = ended_jobs(tmp_path, "1.1")
    for other in (
        replace(job, instances=SLICES - 1),
        replace(job, state=JobState.RECEIVING, reason_code=""),
        replace(job, reason_code="internal_error"),
    ):
        (told,) = wrong_jobs([other], ["1.1"])
        assert told.startswith(f"job {job.id}: ")
        assert told.endswith(f"not REJECTED 'rule_ignore' with {SLICES}")
