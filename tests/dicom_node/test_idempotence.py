"""A whole node and a PACS: the same study is one series, other contents are other series, however often it is asked."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from fake_pacs import FakePacs, free_port
from pydicom import dcmread
from pydicom.uid import KeyObjectSelectionDocumentStorage, SecondaryCaptureImageStorage, SegmentationStorage
from seg_factory import write_seg
from tiny_bundle import write_tiny_bundle
from tiny_study import tiny_phantom, write_tiny_study

from dicom_node.config import Config, PeerConfig
from dicom_node.errors import RerunRefused
from dicom_node.net.scu import send_series
from dicom_node.node import Node
from dicom_node.recall import recall, results_of
from dicom_node.rejections import reject_superseded
from dicom_node.rerun import changes, rerun
from pipeline.outputs.rejection_note import RejectionReason
from pipeline.types import District
from storage.records import REJECTION, DeliveryState, Job, JobFilter, JobState

CLASSES = (SecondaryCaptureImageStorage, SegmentationStorage, KeyObjectSelectionDocumentStorage)
pytestmark = pytest.mark.slow

UNTIL_S = 240.0  # only a test that fails waits so long
ENDED = {JobState.DONE, JobState.FAILED, JobState.REJECTED, JobState.CANCELLED}


class House:
    """A PACS and a node with a tiny bundle, in one process."""

    def __init__(self, root: Path, pacs: FakePacs) -> None:
        self.root, self.pacs = root, pacs
        write_tiny_bundle(root / "bundle")
        write_tiny_bundle(root / "other_bundle", seed=50)
        self.paths = write_tiny_study(root / "ct")
        self.node = Node(self.config(), drain_s=0)
        self._port = self.node.start(port=0)

    def config(self, bundle: str = "bundle") -> Config:
        pipeline = {"bundle": str(self.root / bundle), "device": "cpu", "threads": 1}
        return Config.model_validate(
            {
                "node": {"host": "127.0.0.1", "port": free_port()},
                "peers": [self.pacs.peer().model_dump()],
                "intake": {
                    "quiet_period_s": 0.5,
                    "study_quiet_period_s": 0.5,
                    "scan_interval_s": 0.1,
                    "incomplete_after_s": 5.0,
                    "min_free_bytes": 0,
                },
                "selection": {"min_slices": 3, "min_coverage_mm": 10},
                "pipeline": {**pipeline, "districts": ["dicom_seg", "builtin"]},
                "gate": {"min_coverage_mm": 30, "required_districts": []},
                "destinations": [{"name": "pacs", "peer": "pacs", "verify": False, "reject_superseded": True}],
                "storage": {"root": str(self.root / "spool")},
            }
        )

    def restart(self, bundle: str) -> None:
        """With another bundle in the configuration."""
        self.node.stop()
        self.node = Node(self.config(bundle), drain_s=0)
        self._port = self.node.start(port=0)

    def route(self, paths: Sequence[Path]) -> None:
        us = PeerConfig(name="node", ae_title="SYNPET", port=self._port)
        assert send_series(paths, us, calling_ae=self.pacs.ae_title).ok

    @property
    def jobs(self) -> list[Job]:
        """Oldest first."""
        return self.node.ledger.find(JobFilter())[::-1]

    def until(self, holds: Callable[[], bool]) -> None:
        end = time.monotonic() + UNTIL_S
        while not holds():
            assert time.monotonic() < end, [(job.state, job.reason) for job in self.jobs]
            time.sleep(0.05)

    def until_ended(self, count: int) -> list[Job]:
        """Wait until there are `count` jobs at their end; one that the gate holds (random weights) is let go."""

        def ended() -> bool:
            for job in self.jobs:
                if job.state is JobState.HELD:
                    self.node.ledger.release(job.id)
            return len(self.jobs) == count and all(job.state in ENDED for job in self.jobs)

        self.until(ended)
        return self.jobs

    def sent(self, job: Job) -> set[str]:
        """The UIDs of the series that went out for a job, without notes."""
        deliveries = self.node.ledger.deliveries(job.id)
        return {d.series_uid for d in deliveries if d.kind != REJECTION and d.state is DeliveryState.SENT}

    def rejected(self, job: Job) -> list[DeliveryState]:
        return [d.state for d in self.node.ledger.deliveries(job.id) if d.kind == REJECTION]

    def rerun(self, job: Job) -> Job:
        why = changes(job, self.node.config, self.node.spool)
        return rerun(self.node.ledger, self.node.spool, job, why)


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    with FakePacs(classes=CLASSES) as pacs:
        made = House(tmp_path, pacs)
        try:
            yield made
        finally:
            made.node.stop()


def one_content_each(pacs: FakePacs) -> bool:
    return all(len(digests) == 1 for digests in pacs.received.digests.values())


def test_a_study_that_is_routed_twice_is_one_series_and_one_computation(house: House) -> None:
    house.route(house.paths)
    (job,) = house.until_ended(1)
    got = dict(house.pacs.received.attempts)
    house.route(house.paths)
    first, second = house.until_ended(2)
    assert (second.state, second.reason_code) == (JobState.REJECTED, "duplicate_series")
    assert first == job
    assert dict(house.pacs.received.attempts) == got
    # also when retention has removed the CT meanwhile
    house.node.spool.discard_work(job.id)
    house.route(house.paths)
    third = house.until_ended(3)[2]
    assert (third.state, third.reason_code) == (JobState.REJECTED, "duplicate_series")
    assert dict(house.pacs.received.attempts) == got
    # and a redelivery is the same bytes
    house.node.ledger.redeliver(job.id)
    house.until(lambda: house.node.ledger.get(job.id).state is JobState.DONE)
    assert set(house.pacs.received.attempts.values()) == {2}
    assert one_content_each(house.pacs)


def test_a_series_that_the_archive_lost_is_made_again_byte_for_byte(house: House) -> None:
    """After retention has removed result and CT: the job says so, and its CT, routed again, gives the same series."""
    house.route(house.paths)
    (job,) = house.until_ended(1)
    house.node.spool.discard_result(job.id)
    house.node.spool.discard_work(job.id)
    house.node.ledger.redeliver(job.id)
    house.until(lambda: house.jobs[0].state is JobState.FAILED)
    assert {d.reason_code for d in house.node.ledger.deliveries(job.id)} == {"result_missing"}
    house.route(house.paths)
    _, again = house.until_ended(2)
    assert again.state is JobState.DONE
    assert again.created > job.created
    assert house.sent(again) == {d.series_uid for d in house.node.ledger.deliveries(job.id)}
    assert one_content_each(house.pacs)


def test_a_late_slice_gives_another_series_and_the_first_one_is_rejected(house: House) -> None:
    house.route(house.paths[:-1])
    (first,) = house.until_ended(1)
    house.route(house.paths[-1:])
    house.until_ended(2)
    reject_superseded(house.node.config, house.node.ledger, house.node.spool)
    first, second = house.until_ended(2)
    assert (first.state, second.state, second.supersedes) == (JobState.DONE, JobState.DONE, first.id)
    assert house.sent(first).isdisjoint(house.sent(second))
    assert house.rejected(first) == [DeliveryState.SENT] * 2
    notes = [dcmread(p) for p in house.node.spool.result_folder(first.id).glob("rejection-*/*")]
    studies = [note.CurrentRequestedProcedureEvidenceSequence[0] for note in notes]
    named = {str(study.ReferencedSeriesSequence[0].SeriesInstanceUID) for study in studies}
    assert named == house.sent(first)
    order = house.pacs.received.order
    last_of_new = max(order.index(uid) for uid in order if uid in house.pacs.received.series[min(house.sent(second))])
    assert all(order.index(str(note.SOPInstanceUID)) > last_of_new for note in notes)
    assert one_content_each(house.pacs)


def test_a_done_job_is_computed_again_with_another_bundle_as_another_series(house: House) -> None:
    house.route(house.paths)
    (first,) = house.until_ended(1)
    with pytest.raises(RerunRefused, match="nothing that the result is made of has changed"):
        house.rerun(first)
    delivered = {p: p.read_bytes() for p in house.node.spool.result_folder(first.id).rglob("*.dcm")}
    house.restart("other_bundle")
    second = house.rerun(first)
    assert second.details["rerun"] == ["bundle: tiny 1 -> tiny 1"]  # same name and version, other weights
    with pytest.raises(RerunRefused, match="supersedes it already"):
        house.rerun(first)
    first, second = house.until_ended(2)
    assert (second.state, second.supersedes) == (JobState.DONE, first.id)
    assert house.sent(first).isdisjoint(house.sent(second))
    assert {p: p.read_bytes() for p in delivered} == delivered
    assert one_content_each(house.pacs)


def test_a_corrected_seg_gives_a_superseding_series(house: House) -> None:
    labels = tiny_phantom().districts
    masks = {d.key: labels == d for d in District if (labels == d).any()}
    seg = write_seg(house.root / "seg.dcm", house.paths, masks)
    house.route([*house.paths, seg])
    (first,) = house.until_ended(1)
    assert first.details["provenance"]["segmenter"] == "dicom_seg"
    corrected = write_seg(house.root / "corrected.dcm", house.paths, masks)
    assert dcmread(seg).SOPInstanceUID != dcmread(corrected).SOPInstanceUID
    house.route([corrected])
    house.until(lambda: len(house.node.spool.segmentations(first.info.study_uid)) == 2)
    second = house.rerun(first)
    assert second.details["rerun"] == ["SEG objects of the study: 1 -> 2, not the same ones"]
    first, second = house.until_ended(2)
    assert second.state is JobState.DONE
    assert house.sent(first).isdisjoint(house.sent(second))
    assert one_content_each(house.pacs)


def test_a_change_that_makes_no_difference_sends_nothing(house: House) -> None:
    house.route(house.paths)
    (first,) = house.until_ended(1)
    attempts = dict(house.pacs.received.attempts)
    second = rerun(house.node.ledger, house.node.spool, first, ["somebody thinks so"])
    first, second = house.until_ended(2)
    assert (second.state, house.sent(second)) == (JobState.DONE, set())
    assert "same_series" in [event.code for event in house.node.ledger.events(second.id)]
    assert second.details["same_as"] == first.id
    assert dict(house.pacs.received.attempts) == attempts
    assert reject_superseded(house.node.config, house.node.ledger, house.node.spool) == 0


def test_a_recalled_study_that_is_routed_again_is_computed_with_the_new_bundle(house: House) -> None:
    house.route(house.paths)
    house.until_ended(1)
    ledger, spool = house.node.ledger, house.node.spool
    (result,) = results_of(ledger, "tiny", "1")
    assert recall(ledger, spool, result, RejectionReason.SAFETY).notes == 2
    house.until_ended(1)
    house.route(house.paths)  # the same bundle would give the same, rejected series
    house.until_ended(2)
    assert house.sent(house.jobs[1]) == set()
    house.restart("other_bundle")
    (again,) = [one for one in results_of(house.node.ledger, "tiny") if one.job.id == house.jobs[1].id]
    recall(house.node.ledger, house.node.spool, again, RejectionReason.SAFETY)
    house.route(house.paths)
    jobs = house.until_ended(3)
    assert jobs[2].state is JobState.DONE
    assert house.sent(jobs[2]).isdisjoint(house.sent(jobs[0]))
    assert len(house.sent(jobs[2])) == 2
    assert one_content_each(house.pacs)


def test_what_a_result_was_asked_to_be_is_kept_with_it(house: House) -> None:
    house.route(house.paths)
    (job,) = house.until_ended(1)
    json.dumps(job.details["asked_for"])
    other = house.node.config.model_copy(
        update={"pipeline": house.node.config.pipeline.model_copy(update={"stitching": "feathered"})}
    )
    assert changes(job, house.node.config, house.node.spool) == ()
    assert changes(job, other, house.node.spool) == ("stitching: bundle -> feathered",)
