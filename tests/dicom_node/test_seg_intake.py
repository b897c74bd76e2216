"""SEG objects from the wire to the job: kept only when they are asked for, whatever is killed in between."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from intake_tools import QUEUED, Intake, config, running_intake, small_ct
from pydicom import dcmread
from pydicom.uid import CTImageStorage, SegmentationStorage
from seg_factory import write_seg

from dicom_node import assembler as assembler_module
from dicom_node.worker import Worker
from pipeline.types import OnProgress, PipelineOptions
from storage.errors import BadUid
from storage.incoming_file import PREAMBLE_BYTES
from storage.spool import Adopted, Spool

STUDY, SERIES = "2.25.71", "2.25.72"
ASSOC = "ab" * 16
CONTEXTS = ((CTImageStorage, ()), (SegmentationStorage, ()))
WITH_SEG = {"districts": ["dicom_seg", "builtin"]}


@pytest.fixture
def study(tmp_path: Path) -> tuple[list[Path], Path]:
    """A CT and a SEG of it."""
    ct = small_ct(tmp_path / "ct", study_uid=STUDY, series_uid=SERIES)
    mask = np.zeros((len(ct), 8, 8), dtype=bool)
    mask[:, 2:6, 2:6] = True
    return ct, write_seg(tmp_path / "seg.dcm", ct, {"Trunk": mask}, sop_instance_uid="2.25.73")


@pytest.fixture
def intake(tmp_path: Path) -> Iterator[Intake]:
    with running_intake(tmp_path / "node", config(pipeline=WITH_SEG)) as running:
        yield running


def send(intake: Intake, paths: Sequence[Path]) -> list[int]:
    with intake.association(CONTEXTS) as assoc:
        return [int(assoc.send_c_store(dcmread(path)).Status) for path in paths]


class RecordingEngine:
    """Remembers the options of each run, and ends it without a result."""

    def __init__(self) -> None:
        self.options: list[PipelineOptions] = []

    def run(
        self,
        job_id: str,
        paths: Sequence[Path],
        options: PipelineOptions,
        result_folder: Path,
        created: datetime,
        *,
        on_progress: OnProgress,
        should_stop: Callable[[], bool],
    ) -> None:
        self.options.append(options)
        raise OSError("no result in this test")

    def warm_up(self, options: PipelineOptions) -> None: ...

    def shadow(self, *_: Any, **__: Any) -> Any: ...

    def close(self) -> None: ...


def run_job(intake: Intake) -> PipelineOptions:
    engine = RecordingEngine()
    worker = Worker(intake.config, intake.ledger, intake.spool, engine, owner="node-test")
    assert worker.work_one()
    return engine.options[0]


def test_a_seg_waits_beside_its_study_and_goes_with_the_job(intake: Intake, study: tuple[list[Path], Path]) -> None:
    ct, seg = study
    assert set(send(intake, [*ct, seg])) == {0x0000}
    intake.pass_time(31)
    assert intake.job().state is QUEUED
    assert intake.job().instances == len(ct)
    (kept,) = intake.spool.segmentations(STUDY)
    assert dcmread(kept).SegmentSequence[0].SegmentLabel == "Trunk"
    assert "segmentation_kept" in [event.code for event in intake.ledger.events_of_study(STUDY)]
    assert run_job(intake).districts.segmentations == (kept,)


def test_a_job_knows_the_series_that_were_made_of_its_ct_before(intake: Intake, study: tuple[list[Path], Path]) -> None:
    """Who corrects the districts on our PET in a viewer sends a SEG that names the PET, and not the CT."""
    send(intake, study[0])
    intake.pass_time(31)
    assert intake.job().details.get("result_series") is None
    intake.ledger.update(intake.job().id, details={"result_series": [{"series_uid": "2.25.4711"}]})
    assert run_job(intake).districts.result_series == ("2.25.4711",)


def test_a_seg_opens_no_job_of_its_own(intake: Intake, study: tuple[list[Path], Path]) -> None:
    send(intake, [study[1]])
    intake.pass_time(31)
    assert intake.jobs() == []
    assert intake.spool.incoming() == []


def test_a_seg_is_dropped_where_no_segmenter_uses_it(tmp_path: Path, study: tuple[list[Path], Path]) -> None:
    ct, seg = study
    with running_intake(tmp_path / "node") as intake:
        assert set(send(intake, [*ct, seg])) == {0x0000}
        intake.pass_time(31)
        assert intake.spool.segmentations(STUDY) == []
        intake.wait(lambda: "dropped_sop_class" in intake.event_codes())  # told after the association's end
        assert run_job(intake).districts.segmentations == ()


def test_a_seg_that_comes_before_or_after_the_ct_is_used(intake: Intake, study: tuple[list[Path], Path]) -> None:
    ct, seg = study
    intake.put([seg])
    intake.pass_time(1)
    intake.put(ct)
    intake.pass_time(31)
    assert len(run_job(intake).districts.segmentations) == 1


def test_a_seg_prolongs_the_quiet_period_of_its_study(intake: Intake, study: tuple[list[Path], Path]) -> None:
    ct, seg = study
    intake.put(ct)
    intake.pass_time(20)
    intake.put([seg])
    intake.pass_time(20)
    assert intake.job().state is not QUEUED
    intake.pass_time(11)
    assert intake.job().state is QUEUED


def test_a_seg_survives_a_kill_before_and_after_it_was_sorted(intake: Intake, study: tuple[list[Path], Path]) -> None:
    ct, seg = study
    intake.put([*ct, seg])
    intake.restart()  # only the inbox knows
    intake.assembler.tick()
    assert len(intake.spool.segmentations(STUDY)) == 1
    intake.restart()
    intake.spool.clean_temp()
    intake.pass_time(301)
    assert len(run_job(intake).districts.segmentations) == 1


def test_the_same_seg_again_is_one_and_another_under_its_uid_is_set_aside(
    intake: Intake, study: tuple[list[Path], Path], tmp_path: Path
) -> None:
    ct, seg = study
    for path in (seg, seg):
        intake.put([path])
        intake.assembler.tick()
    other = write_seg(
        tmp_path / "other.dcm", ct, {"Legs": np.ones((len(ct), 8, 8), dtype=bool)}, sop_instance_uid="2.25.73"
    )
    intake.put([other])
    intake.assembler.tick()
    (kept,) = intake.spool.segmentations(STUDY)
    assert kept.read_bytes()[PREAMBLE_BYTES:] == seg.read_bytes()[PREAMBLE_BYTES:]
    assert [p.name for p in (intake.spool.root / "quarantine" / "different_content").iterdir()] == ["2.25.73.dcm"]
    assert "quarantined" in [event.code for event in intake.ledger.events_of_study(STUDY)]


def test_a_flood_of_segs_is_set_aside(
    intake: Intake, study: tuple[list[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assembler_module, "MAX_SEGMENTATIONS", 1)
    mask = {"Trunk": np.ones((len(study[0]), 8, 8), dtype=bool)}
    more = write_seg(tmp_path / "more.dcm", study[0], mask, sop_instance_uid="2.25.74")
    for path in (study[1], more, study[1]):
        intake.put([path])
        intake.assembler.tick()
    assert [p.stem for p in intake.spool.segmentations(STUDY)] == ["2.25.73"]
    assert (intake.spool.root / "quarantine" / "too_many_segmentations" / "2.25.74.dcm").exists()


def test_retention_takes_a_seg_when_its_study_is_over(tmp_path: Path) -> None:
    spool = Spool(tmp_path, min_free_bytes=0)
    for uid in ("1.1", "1.2"):
        assert spool.keep_segmentation(spool.store_incoming(ASSOC, f"{uid}.9", [b"x"]), uid) is Adopted.NEW
        (path,) = spool.segmentations(uid)
        old = (datetime.now(UTC) - timedelta(days=10)).timestamp()
        os.utime(path, (old, old))

    def apply(days: int) -> list[str]:
        return spool.apply_retention(
            timedelta(days=days),
            timedelta(days=30),
            datetime.now(UTC),
            is_final=lambda _: True,
            is_over=lambda study_uid: study_uid == "1.1",
        )

    assert apply(11) == []
    assert apply(7) == ["inbox/segmentations/1.1/1.1.9.dcm"]
    assert len(spool.segmentations("1.2")) == 1


def test_a_study_uid_that_is_none_becomes_no_path(tmp_path: Path) -> None:
    spool = Spool(tmp_path, min_free_bytes=0)
    with pytest.raises(BadUid):
        spool.segmentations("../../etc")
