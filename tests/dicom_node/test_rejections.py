"""What a later result replaces is rejected where the destination wants it, after the later one has arrived."""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from fake_pacs import FakePacs
from pydicom import dcmread
from pydicom.uid import KeyObjectSelectionDocumentStorage
from recall_tools import Bench

from dicom_node import rejections as rejections_module
from dicom_node.config import DestinationConfig
from dicom_node.delivery import Deliveries, outbox_files
from dicom_node.lineage import RECALLED, RECALLED_AT
from dicom_node.node import Node
from dicom_node.proof import asked_of, goal_of
from dicom_node.recall import recall, results_of
from dicom_node.rejections import keep_references, reject, reject_superseded
from dicom_node.upkeep import Upkeep
from pipeline.outputs.rejection_note import KIND, RejectionReason
from pipeline.types import EncodedSeries
from storage.errors import NoSpace, OtherSeries
from storage.ledger import open_ledger
from storage.records import REJECTION, Delivery, DeliveryState, Job, JobState


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path, reject_superseded=True)
    yield made
    made.ledger.close()


def rejections(bench: Bench, job_id: str) -> list[tuple[str, str, DeliveryState]]:
    return [(d.destination, d.encoding, d.state) for d in bench.ledger.deliveries(job_id) if d.kind == REJECTION]


def sweep(bench: Bench) -> int:
    return reject_superseded(bench.config, bench.ledger, bench.spool, clock=bench.clock)


def test_nothing_is_rejected_before_the_later_series_has_arrived(bench: Bench) -> None:
    old = bench.finished()
    bench.send()
    bench.finished(supersedes=old.id, version="4")
    assert sweep(bench) == 0
    bench.send(only="other")  # which asked for no rejections
    assert sweep(bench) == 0
    assert rejections(bench, old.id) == []


def test_once_the_later_series_has_arrived_every_series_of_the_old_one_is_rejected_there(bench: Bench) -> None:
    old = bench.finished()
    bench.send()
    new = bench.finished(supersedes=old.id, version="4")
    bench.send()
    assert sweep(bench) == 2
    assert rejections(bench, old.id) == [
        ("pacs", "kos-quality-pet-sc", DeliveryState.PENDING),
        ("pacs", "kos-quality-mip-sc", DeliveryState.PENDING),
    ]
    assert bench.send() == ["pacs rejection", "pacs rejection"]
    assert (bench.ledger.get(old.id).state, bench.ledger.get(new.id).state) == (JobState.DONE, JobState.DONE)
    assert bench.codes(old.id).count("superseded_rejected") == 1
    assert rejections(bench, new.id) == []


def test_a_note_names_the_instances_that_were_sent(bench: Bench) -> None:
    old = bench.finished()
    bench.send()
    bench.finished(supersedes=old.id, version="4")
    bench.send()
    sweep(bench)
    folder = bench.spool.result_folder(old.id)
    (path,) = outbox_files(folder / "rejection-kos-quality-pet-sc")
    sent = [str(dcmread(one).SOPInstanceUID) for one in outbox_files(folder / "pet-sc")]
    note = dcmread(path)
    items = note.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence[0].ReferencedSOPSequence
    assert [item.ReferencedSOPInstanceUID for item in items] == sent
    row = next(d for d in bench.ledger.deliveries(old.id) if d.encoding == "kos-quality-pet-sc")
    assert (row.series_uid, row.instances) == (note.SeriesInstanceUID, 1)


def test_a_rejection_is_opened_once_however_often_one_looks(bench: Bench) -> None:
    old = bench.finished()
    bench.send()
    bench.finished(supersedes=old.id, version="4")
    bench.send()
    assert sweep(bench) == 2
    note = next(bench.spool.result_folder(old.id).glob("rejection-*/0001.dcm"))
    before, events = note.read_bytes(), len(bench.ledger.events(old.id))
    assert sweep(bench) == 0
    bench.send()
    assert sweep(bench) == 0
    assert note.read_bytes() == before
    assert len(bench.ledger.events(old.id)) == events + 3  # two were sent, the job is done


def test_a_kill_between_the_note_and_the_ledger_sends_the_same_note(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = bench.finished()
    bench.send()
    bench.finished(supersedes=old.id, version="4")
    bench.send()
    with monkeypatch.context() as broken:
        broken.setattr(bench.ledger, "reject_result", lambda _, notes, **__: 1 / 0 if notes else 0)
        with pytest.raises(ZeroDivisionError):
            sweep(bench)
    written = {path: path.read_bytes() for path in bench.spool.result_folder(old.id).glob("rejection-*/*.dcm")}
    assert written
    assert sweep(bench) == 2
    assert all(path.read_bytes() == data for path, data in written.items())


def test_a_destination_that_did_not_ask_gets_no_rejection(bench: Bench) -> None:
    assert not DestinationConfig(name="x", peer="x").reject_superseded
    old = bench.finished()
    bench.send()
    bench.finished(supersedes=old.id, version="4")
    bench.send()
    sweep(bench)
    assert {destination for destination, _, _ in rejections(bench, old.id)} == {"pacs"}


def test_what_was_not_sent_of_the_old_result_is_not_sent_after_the_new_one(bench: Bench) -> None:
    old = bench.finished()
    bench.send(only="other")  # pacs was down: tried, and not one instance known to be there
    new = bench.finished(supersedes=old.id, version="4")
    for delivery in bench.ledger.deliveries(new.id):
        assert delivery.state is DeliveryState.PENDING
    while (claimed := bench.ledger.claim_delivery("x", lease_s=60)) is not None:
        arrives = claimed.job_id == new.id
        state = DeliveryState.SENT if arrives else DeliveryState.PENDING
        bench.ledger.finish_delivery(
            claimed.id,
            "x",
            state=state,
            sent=claimed.instances if arrives else 0,
            statuses={},
            next_attempt=bench.now + timedelta(days=1),
        )
    assert sweep(bench) == 2  # a doubt counts as arrived
    states = {(d.destination, d.kind): d.state for d in bench.ledger.deliveries(old.id)}
    assert states[("pacs", "pet")] is DeliveryState.CANCELLED


def test_a_later_result_that_is_the_same_series_rejects_nothing(bench: Bench) -> None:
    old = bench.finished()
    bench.send()
    bench.finished(supersedes=old.id)
    bench.send()
    assert sweep(bench) == 0


def test_of_a_chain_every_earlier_result_is_rejected(bench: Bench) -> None:
    first = bench.finished()
    bench.send()
    second = bench.finished(supersedes=first.id, version="4")
    bench.ledger.cancel(second.id)  # it never arrived
    third = bench.finished(supersedes=second.id, version="5")
    bench.send()
    assert sweep(bench) == 2
    assert [d for d, _, _ in rejections(bench, first.id)] == ["pacs", "pacs"]
    assert rejections(bench, second.id) == rejections(bench, third.id) == []


def test_a_result_that_retention_removed_can_still_be_rejected(bench: Bench) -> None:
    old = bench.finished()
    bench.send()
    uids = {str(dcmread(p).SOPInstanceUID) for p in outbox_files(bench.spool.result_folder(old.id) / "pet-sc")}
    removed = bench.spool.apply_retention(
        timedelta(),
        timedelta(),
        bench.now + timedelta(days=10_000),
        is_final=lambda _: True,
        before_result=lambda job_id: keep_references(bench.spool, job_id),
    )
    assert f"outbox/{old.id}" in removed
    assert not bench.spool.has_result(old.id)
    bench.finished(supersedes=old.id, version="4")
    bench.send()
    assert sweep(bench) == 2
    note = dcmread(next(bench.spool.result_folder(old.id).glob("rejection-kos-quality-pet-sc/*")))
    items = note.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence[0].ReferencedSOPSequence
    assert {item.ReferencedSOPInstanceUID for item in items} == uids


def test_what_is_kept_of_a_removed_result_goes_with_the_history(bench: Bench) -> None:
    old = bench.finished()
    keep_references(bench.spool, old.id)
    assert set(bench.spool.references(old.id)) == {"pet-sc", "pet-pet", "mip-sc"}
    far = bench.now + timedelta(days=10_000)
    always = timedelta(days=100_000)
    kept = bench.spool.apply_retention(
        always, always, far, is_final=lambda _: True, keep_references=timedelta(days=365)
    )
    assert kept == [f"references/{old.id}.json"]
    assert bench.spool.references(old.id) == {}


def test_two_processes_that_reject_at_once_send_one_note(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    old = bench.finished()
    bench.send()
    bench.finished(supersedes=old.id, version="4")
    bench.send()
    encode, other = rejections_module.encode_rejection_note, []

    def while_the_other_is_quicker(*args: Any, **kwargs: Any) -> EncodedSeries:
        if not other:
            other.append(True)
            other.append(sweep(bench))
        return encode(*args, **kwargs)

    monkeypatch.setattr(rejections_module, "encode_rejection_note", while_the_other_is_quicker)
    assert sweep(bench) == 0
    assert other[1] == 2
    for row in (d for d in bench.ledger.deliveries(old.id) if d.kind == REJECTION):
        (path,) = outbox_files(bench.spool.result_folder(old.id) / f"rejection-{row.encoding}")
        assert dcmread(path).SeriesInstanceUID == row.series_uid


def test_the_nodes_retention_keeps_what_names_a_result(bench: Bench) -> None:
    old = bench.finished()
    bench.send()
    storage = bench.config.storage.model_copy(update={"keep_results_days": 0.0})
    node = Node(bench.config.model_copy(update={"storage": storage}))
    node.ledger, node.spool = bench.ledger, bench.spool
    Upkeep(node.config, node.ledger, node.spool).retention()
    assert not bench.spool.has_result(old.id)
    assert set(bench.spool.references(old.id)) == {"pet-sc", "pet-pet", "mip-sc"}


def test_a_damaged_result_does_not_stop_retention(bench: Bench) -> None:
    old = bench.finished()
    (bench.spool.result_folder(old.id) / "result.json").write_bytes(b"damaged")
    keep_references(bench.spool, old.id)
    assert bench.spool.references(old.id) == {}


def test_a_damaged_series_costs_the_others_not_their_names(bench: Bench) -> None:
    old = bench.finished()
    (bench.spool.result_folder(old.id) / "pet-sc" / "0001.dcm").write_bytes(b"damaged")
    keep_references(bench.spool, old.id)
    assert set(bench.spool.references(old.id)) == {"pet-pet", "mip-sc"}


def test_damaged_names_of_a_removed_result_are_told_and_stop_no_other_rejection(bench: Bench) -> None:
    old = bench.finished()
    bench.send()
    keep_references(bench.spool, old.id)
    bench.spool.discard_result(old.id)
    (bench.spool.root / "references" / f"{old.id}.json").write_bytes(b'{"pet-sc": ')
    done = reject(
        bench.ledger, bench.spool, old, reason=RejectionReason.QUALITY, description="", code="recalled", text=""
    )
    assert done.opened == 0
    assert "is damaged" in done.unnamed[0]


def test_a_note_never_names_another_series_than_the_one_that_was_sent(bench: Bench) -> None:
    """As after a result was computed anew in place, and its files were lost: the kept names are of the one before."""
    old, other = bench.finished(), bench.finished(version="4", series_uid="2.25.7")
    bench.send()
    keep_references(bench.spool, other.id)
    names = bench.spool.references(other.id)
    bench.spool.discard_result(old.id)
    bench.spool.keep_references(old.id, names)
    assert take_back(bench, old) == 0
    assert rejections(bench, old.id) == []


def test_a_result_that_was_recalled_replaces_nothing(bench: Bench) -> None:
    old = bench.finished()
    bench.send()
    new = bench.finished(supersedes=old.id, version="4")
    bench.send()
    bench.ledger.update(new.id, details={RECALLED: {"time": ""}})  # the old one is the good one, and goes on
    assert sweep(bench) == 0
    assert rejections(bench, old.id) == []


def test_a_result_that_was_recalled_there_replaces_nothing_there(bench: Bench) -> None:
    old = bench.finished()
    bench.send()
    new = bench.finished(supersedes=old.id, version="4")
    bench.send()
    bench.ledger.update(new.id, details={RECALLED_AT: {"pacs": {}}})
    assert sweep(bench) == 0
    bench.ledger.update(new.id, details={RECALLED_AT: {"other": {}}})
    assert sweep(bench) == 2


def test_a_recalled_result_gets_no_second_note_with_another_title_when_it_is_replaced(bench: Bench) -> None:
    old = bench.finished()
    bench.send()
    (result,) = results_of(bench.ledger, "phantom")
    recall(bench.ledger, bench.spool, result, RejectionReason.SAFETY)
    bench.send()
    told = rejections(bench, old.id)
    bench.finished(supersedes=old.id, version="4")
    bench.send()
    assert sweep(bench) == 0
    assert rejections(bench, old.id) == told


def test_one_job_that_cannot_be_rejected_stops_no_other(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = bench.finished(series_uid="2.25.1"), bench.finished(series_uid="2.25.2")
    bench.send()
    bench.finished(supersedes=first.id, version="4", series_uid="2.25.1")
    bench.finished(supersedes=second.id, version="4", series_uid="2.25.2")
    bench.send()
    opened = bench.ledger.reject_result

    def refuse_first(job_id: str, *args: Any, **kwargs: Any) -> int:
        if job_id == first.id:
            raise OtherSeries("its note was sent under another UID")
        return opened(job_id, *args, **kwargs)

    monkeypatch.setattr(bench.ledger, "reject_result", refuse_first)
    assert sweep(bench) == 2
    assert len(rejections(bench, second.id)) == 2


def test_the_ledger_and_the_writer_have_one_word_for_a_note() -> None:
    assert KIND == REJECTION


def test_a_note_need_not_be_visible_where_series_must(bench: Bench) -> None:
    strict = DestinationConfig(name="x", peer="x", verify=True, commitment=True)
    assert goal_of(asked_of(strict, "pet")) is DeliveryState.VISIBLE
    assert goal_of(asked_of(strict, REJECTION)) is DeliveryState.COMMITTED


def deliver(bench: Bench, done: object) -> None:
    """Run the node's own delivery threads until `done()` holds."""
    deliveries = Deliveries(bench.config, bench.ledger, bench.spool, owner="node-test", poll_s=0.02, clock=bench.clock)
    deliveries.reclaim()
    deliveries.start()
    try:
        end = time.monotonic() + 240
        while not done():  # type: ignore[operator]
            assert time.monotonic() < end
            bench.clock()
            time.sleep(0.02)
    finally:
        deliveries.stop()


def test_notes_reach_the_pacs_over_the_wire_after_a_restart(tmp_path: Path) -> None:
    with FakePacs(ae_title="PACS", classes=[KeyObjectSelectionDocumentStorage]) as pacs:
        bench = Bench(tmp_path, ports=(pacs.port, 104), reject_superseded=True, transfer_syntax="rle")
        old = bench.finished()
        bench.send()
        bench.finished(supersedes=old.id, version="4")
        bench.send()
        sweep(bench)
        bench.ledger.close()  # a restart: only the disk is left
        bench.ledger = open_ledger(bench.config.ledger_url, clock=bench.clock)
        deliver(bench, lambda: bench.ledger.get(old.id).state is JobState.DONE)
        assert [state for _, _, state in rejections(bench, old.id)] == [DeliveryState.SENT] * 2
        notes = {str(dcmread(p).SOPInstanceUID) for p in bench.spool.result_folder(old.id).glob("rejection-*/*")}
        assert pacs.instances == notes
        bench.ledger.close()


def test_a_pacs_that_takes_no_key_objects_leaves_the_job_done_and_the_ledger_says_so(tmp_path: Path) -> None:
    with FakePacs(ae_title="PACS") as pacs:
        bench = Bench(tmp_path, ports=(pacs.port, 104), reject_superseded=True)
        old = bench.finished()
        bench.send()
        bench.finished(supersedes=old.id, version="4")
        bench.send()
        sweep(bench)
        deliver(bench, lambda: bench.ledger.get(old.id).state is JobState.DONE)
        told = [(d.state, d.reason_code) for d in bench.ledger.deliveries(old.id) if d.kind == REJECTION]
        assert told == [(DeliveryState.CANCELLED, "optional_refused")] * 2
        assert sweep(bench) == 0  # it is not asked again and again
        bench.ledger.close()


def test_what_waits_cannot_set_out_between_the_look_and_the_notes(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = bench.finished()
    look, set_out = rejections_module.arrived, []

    def while_a_sender_claims(*args: Any) -> list[Delivery]:
        found = look(*args)
        set_out.append(bench.ledger.claim_delivery("sender", lease_s=60))
        return found

    monkeypatch.setattr(rejections_module, "arrived", while_a_sender_claims)
    take_back(bench, old)
    assert set_out == [None]
    assert {d.state for d in bench.ledger.deliveries(old.id)} == {DeliveryState.CANCELLED}


def take_back(bench: Bench, job: Job) -> int:
    done = rejections_module.reject(
        bench.ledger, bench.spool, job, reason=RejectionReason.QUALITY, description="", code="recalled", text="recalled"
    )
    return done.opened


def test_a_class_refused_when_sent_again_does_not_hide_that_the_series_is_there(bench: Bench) -> None:
    old = bench.finished()
    bench.send()
    bench.ledger.redeliver(old.id)
    while (row := bench.ledger.claim_delivery("s", lease_s=60)) is not None:
        bench.ledger.finish_delivery(
            row.id, "s", state=DeliveryState.FAILED, sent=0, statuses={}, code="no_presentation_context"
        )
    assert take_back(bench, bench.ledger.get(old.id)) == 4


def test_a_class_refused_from_the_first_gets_no_note(bench: Bench) -> None:
    old = bench.finished()
    while (row := bench.ledger.claim_delivery("s", lease_s=60)) is not None:
        bench.ledger.finish_delivery(
            row.id, "s", state=DeliveryState.FAILED, sent=0, statuses={}, code="no_presentation_context"
        )
    assert take_back(bench, bench.ledger.get(old.id)) == 0


def test_a_fault_of_the_disk_that_passes_costs_no_rejection(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    old = bench.finished()
    bench.send()
    bench.finished(supersedes=old.id, version="4")
    bench.send()
    with monkeypatch.context() as broken:
        broken.setattr(rejections_module, "read_rejected_series", out_of_files)
        assert sweep(bench) == 0
    assert "superseded_at" not in bench.ledger.get(old.id).details
    assert sweep(bench) == 2


def out_of_files(*_: object) -> None:
    raise OSError(errno.EMFILE, "Too many open files")


def test_a_full_disk_keeps_the_result_it_cannot_name_and_the_history_is_still_shortened(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = bench.finished(series_uid="2.25.1"), bench.finished(series_uid="2.25.2")
    bench.send()
    keep_references(bench.spool, second.id)  # and then the disk was full
    storage = bench.config.storage.model_copy(update={"keep_results_days": 0.0, "keep_events_days": 1.0})
    node = Node(bench.config.model_copy(update={"storage": storage}))
    node.ledger, node.spool = bench.ledger, bench.spool

    def full(*_: object) -> None:
        raise NoSpace("No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(bench.spool, "keep_references", full)
        Upkeep(node.config, node.ledger, node.spool).retention()
    assert bench.spool.has_result(first.id)
    assert not bench.spool.has_result(second.id)
    assert bench.ledger.events(first.id) == []  # the bench's clock is long ago
    Upkeep(node.config, node.ledger, node.spool).retention()
    assert not bench.spool.has_result(first.id)
    assert set(bench.spool.references(first.id)) == {"pet-sc", "pet-pet", "mip-sc"}


def test_a_result_whose_file_cannot_be_read_now_stays_and_a_failing_retention_still_forgets(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = bench.finished()
    bench.send()
    with monkeypatch.context() as broken:
        broken.setattr(rejections_module, "read_rejected_series", out_of_files)
        with pytest.raises(OSError, match="Too many open files"):
            keep_references(bench.spool, old.id)
    storage = bench.config.storage.model_copy(update={"keep_events_days": 1.0})
    node = Node(bench.config.model_copy(update={"storage": storage}))
    node.ledger, node.spool = bench.ledger, bench.spool
    monkeypatch.setattr(bench.spool, "apply_retention", out_of_files_in)
    with pytest.raises(OSError, match="Too many open files"):
        Upkeep(node.config, node.ledger, node.spool).retention()
    assert not bench.ledger.search_events(since=bench.now - timedelta(days=1))


def out_of_files_in(*_: object, **__: object) -> None:
    out_of_files()
