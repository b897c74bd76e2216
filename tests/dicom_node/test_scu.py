"""Sending to a PACS that behaves, and to one that does not."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from fake_pacs import FakePacs, free_port
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import AE, build_context
from pynetdicom.sop_class import Verification  # type: ignore[attr-defined]
from result_factory import sop_uids, write_instances

from dicom_node.config import PeerConfig
from dicom_node.net.scu import Timeouts, echo, is_stored, send_series

PATIENT = Timeouts(acse_s=60.0, dimse_s=60.0, network_s=60.0)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    return write_instances(tmp_path / "out", 6)


@contextmanager
def held_association(pacs: FakePacs) -> Iterator[None]:
    assoc = AE("OTHER").associate("127.0.0.1", pacs.port, contexts=[build_context(Verification)])
    assert assoc.is_established
    yield
    assoc.release()


def test_a_series_goes_over_one_association_in_order_and_byte_for_byte(files: list[Path]) -> None:
    told: list[int] = []
    with FakePacs() as pacs:
        outcome = send_series(files, pacs.peer(), calling_ae="SYNPET", timeouts=PATIENT, on_sent=told.append)
    assert outcome.ok
    assert outcome.stored == 6
    assert set(outcome.statuses.values()) == {"0x0000"}
    assert pacs.received.order == sop_uids(files)
    assert pacs.received.associations == 1
    assert pacs.received.syntaxes == {ExplicitVRLittleEndian: 6}
    assert told == [1, 2, 3, 4, 5, 6]


def test_sending_twice_gives_the_same_bytes_under_the_same_uids(files: list[Path]) -> None:
    with FakePacs() as pacs:
        for _ in range(2):
            assert send_series(files, pacs.peer(), calling_ae="SYNPET", timeouts=PATIENT).ok
    assert all(len(digests) == 1 for digests in pacs.received.digests.values())
    assert len(pacs.instances) == 6


def test_a_peer_that_takes_implicit_vr_only_gets_it_transcoded(files: list[Path]) -> None:
    with FakePacs(syntaxes=[ImplicitVRLittleEndian]) as pacs:
        outcome = send_series(files, pacs.peer(), calling_ae="SYNPET", timeouts=PATIENT)
    assert outcome.ok
    assert pacs.received.syntaxes == {ImplicitVRLittleEndian: 6}
    assert pacs.instances == set(sop_uids(files))


@pytest.mark.parametrize("warning", [0xB000, 0xB006, 0xB007])
def test_a_warning_means_stored(files: list[Path], warning: int) -> None:
    with FakePacs(status_for=lambda uid, times: warning) as pacs:
        outcome = send_series(files, pacs.peer(), calling_ae="SYNPET", timeouts=PATIENT)
    assert outcome.ok
    assert outcome.stored == 6


def test_a_peer_that_is_down_is_a_transient_matter(files: list[Path]) -> None:
    peer = PeerConfig(name="pacs", ae_title="PACS", port=free_port())
    outcome = send_series(files, peer, calling_ae="SYNPET", timeouts=PATIENT)
    assert (outcome.code, outcome.permanent, outcome.stored) == ("connection_failed", False, 0)
    assert set(outcome.statuses.values()) == {"not_sent"}


def test_a_host_name_that_does_not_resolve_is_a_transient_matter(files: list[Path]) -> None:
    peer = PeerConfig(name="pacs", ae_title="PACS", host="no-such-host.invalid", port=104)
    outcome = send_series(files, peer, calling_ae="SYNPET", timeouts=PATIENT)
    assert (outcome.code, outcome.permanent) == ("connection_failed", False)


def test_an_ae_title_that_is_not_recognized_is_permanent(files: list[Path]) -> None:
    with FakePacs(require_called=True) as pacs:
        wrong = send_series(files, pacs.peer(ae_title="WRONG"), calling_ae="SYNPET", timeouts=PATIENT)
    with FakePacs(known_callers=["SOMEBODY"]) as pacs:
        unknown = send_series(files, pacs.peer(), calling_ae="SYNPET", timeouts=PATIENT)
    assert (wrong.code, wrong.permanent) == ("association_rejected", True)
    assert "its AE title is not recognized" in wrong.text
    assert (unknown.code, unknown.permanent) == ("association_rejected", True)
    assert "our AE title is not recognized" in unknown.text


def test_a_limit_of_associations_is_transient(files: list[Path]) -> None:
    with FakePacs(max_associations=1) as pacs, held_association(pacs):
        outcome = send_series(files, pacs.peer(), calling_ae="SYNPET", timeouts=PATIENT)
    assert (outcome.code, outcome.permanent) == ("association_rejected", False)


def test_a_class_that_is_refused_is_permanent_and_names_the_class(files: list[Path]) -> None:
    with FakePacs(classes=["1.2.840.10008.5.1.4.1.1.2"]) as pacs:
        outcome = send_series(files, pacs.peer(), calling_ae="SYNPET", timeouts=PATIENT)
    assert (outcome.code, outcome.permanent) == ("no_presentation_context", True)
    assert "1.2.840.10008.5.1.4.1.1.7" in outcome.text
    assert pacs.received.order == []


def test_half_of_the_instances_deferred_leaves_the_other_half(files: list[Path]) -> None:
    uids = sop_uids(files)
    with FakePacs(status_for=lambda uid, times: 0xA700 if uids.index(uid) % 2 and times == 1 else 0) as pacs:
        first = send_series(files, pacs.peer(), calling_ae="SYNPET", timeouts=PATIENT)
        left = {uid for uid, status in first.statuses.items() if not is_stored(status)}
        second = send_series(files, pacs.peer(), calling_ae="SYNPET", timeouts=PATIENT, only=left)
    assert (first.code, first.permanent, first.stored) == ("instances_deferred", False, 3)
    assert "3 of 6" in first.text
    assert second.ok
    assert second.stored == 3
    assert pacs.received.order == uids + uids[1::2]


@pytest.mark.parametrize("status", [0xA900, 0xC000, 0x0122])
def test_a_data_set_that_is_refused_is_permanent(files: list[Path], status: int) -> None:
    with FakePacs(status_for=lambda uid, times: status) as pacs:
        outcome = send_series(files, pacs.peer(), calling_ae="SYNPET", timeouts=PATIENT)
    assert (outcome.code, outcome.permanent) == ("instances_refused", True)
    assert f"0x{status:04X}" in outcome.text


def test_one_permanent_refusal_outweighs_transient_ones(files: list[Path]) -> None:
    uids = sop_uids(files)
    with FakePacs(status_for=lambda uid, times: 0xC000 if uid == uids[0] else 0xA700) as pacs:
        outcome = send_series(files, pacs.peer(), calling_ae="SYNPET", timeouts=PATIENT)
    assert outcome.permanent


def test_an_association_that_is_aborted_is_transient_and_tells_what_got_through(files: list[Path]) -> None:
    with FakePacs(abort_after=[2]) as pacs:
        outcome = send_series(files, pacs.peer(), calling_ae="SYNPET", timeouts=PATIENT)
    assert outcome.code in {"association_aborted", "no_response"}
    assert not outcome.permanent
    assert outcome.stored == 2
    assert set(outcome.statuses) == set(sop_uids(files))


def test_a_peer_that_never_answers_the_association_is_given_up(files: list[Path]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        peer = PeerConfig(name="pacs", ae_title="PACS", port=deaf.getsockname()[1])
        outcome = send_series(files, peer, calling_ae="SYNPET", timeouts=Timeouts(acse_s=0.5))
    assert (outcome.code, outcome.permanent) == ("association_aborted", False)


def test_a_peer_that_answers_no_store_is_given_up(files: list[Path]) -> None:
    with FakePacs(delay_s=60.0) as pacs:
        outcome = send_series(files, pacs.peer(), calling_ae="SYNPET", timeouts=Timeouts(dimse_s=0.5))
    assert (outcome.code, outcome.permanent, outcome.stored) == ("no_response", False, 0)


def test_a_stop_ends_between_two_instances(files: list[Path]) -> None:
    stop = threading.Event()
    with FakePacs() as pacs:
        outcome = send_series(
            files,
            pacs.peer(),
            calling_ae="SYNPET",
            timeouts=PATIENT,
            on_sent=lambda n: stop.set() if n == 2 else None,
            should_stop=stop.is_set,
        )
    assert (outcome.code, outcome.permanent, outcome.stored) == ("interrupted", False, 2)


def test_a_file_that_is_no_dicom_is_permanent(tmp_path: Path) -> None:
    broken = tmp_path / "0001.dcm"
    broken.write_bytes(b"no dicom")
    peer = PeerConfig(name="pacs", ae_title="PACS", port=free_port())
    outcome = send_series([broken], peer, calling_ae="SYNPET", timeouts=PATIENT)
    assert (outcome.code, outcome.permanent) == ("instance_unreadable", True)


def test_echo_tells_answer_refusal_and_silence() -> None:
    with FakePacs(require_called=True) as pacs:
        assert echo(pacs.peer(), calling_ae="SYNPET", timeouts=PATIENT).ok
        refused = echo(pacs.peer(ae_title="WRONG"), calling_ae="SYNPET", timeouts=PATIENT)
        assert (refused.ok, refused.code, refused.permanent) == (False, "association_rejected", True)
    gone = echo(pacs.peer(), calling_ae="SYNPET", timeouts=PATIENT)
    assert (gone.ok, gone.code) == (False, "connection_failed")
