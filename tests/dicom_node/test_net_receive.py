"""The receiver on a real loopback association."""

from __future__ import annotations

import logging
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path

import pytest
import structlog
from intake_tools import Intake, config, running_intake, small_ct
from pydicom import Dataset, dcmread
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_file_meta_info
from pydicom.uid import (
    BasicTextSRStorage,
    CTImageStorage,
    EnhancedCTImageStorage,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    RLELossless,
    SecondaryCaptureImageStorage,
    SegmentationStorage,
    generate_uid,
)
from pynetdicom import evt
from pynetdicom.dimse_messages import C_STORE_RQ
from pynetdicom.dimse_primitives import C_STORE
from pynetdicom.dsutils import encode

from dicom_node.net.scp import ct_transfer_syntaxes
from dicom_node.net.store import file_header
from dicom_node.net.thinning import MOST_NAMES
from storage.incoming_file import PREAMBLE_BYTES

VERIFICATION = "1.2.840.10008.1.1"
PRIVATE_STORAGE = "1.3.12.2.1107.5.9.1"  # Siemens CSA non-image: comes along with many CT studies
RETIRED_STORAGE = "1.2.840.10008.5.1.4.1.1.6"
DICOM_DIR_QUERY = "1.2.840.10008.5.1.4.1.2.2.1"


@pytest.fixture
def intake(tmp_path: Path) -> Iterator[Intake]:
    with running_intake(tmp_path) as running:
        yield running


def rejection(intake: Intake, **titles: str) -> tuple[int, int, int]:
    assoc = intake.associate(**titles)  # type: ignore[arg-type]
    assert assoc.is_rejected
    primitive = assoc.acceptor.primitive
    assert primitive is not None
    return primitive.result, primitive.result_source, primitive.diagnostic  # type: ignore[return-value]


def send_raw(assoc: object, *, instance_uid: str, class_uid: str = CTImageStorage, data: bytes = b"") -> Dataset:
    """A C-STORE request as no decent library sends it: whatever stands in the command set."""
    request = C_STORE()
    request.MessageID = 7
    request.AffectedSOPClassUID = CTImageStorage
    request.AffectedSOPInstanceUID = "1.2.3"
    request.Priority = 2
    request.DataSet = BytesIO(data or b"\x08\x00\x60\x00\x02\x00\x00\x00CT")
    message = C_STORE_RQ()
    message.primitive_to_message(request)
    # VR UT: pydicom does not validate it, and in the implicit VR of a command set no VR is on the wire
    message.command_set.add_new(0x00001000, "UT", instance_uid)
    message.command_set.add_new(0x00000002, "UT", class_uid)
    command = message.command_set
    del command[0x0000, 0x0000]
    command.CommandGroupLength = len(encode(command, True, True) or b"")
    assoc._reactor_checkpoint.clear()  # type: ignore[attr-defined]
    for pdata in message.encode_msg(1, 16382):
        assoc.dul.send_pdu(pdata)  # type: ignore[attr-defined]
    _, response = assoc.dimse.get_msg(block=True)  # type: ignore[attr-defined]
    assoc._reactor_checkpoint.set()  # type: ignore[attr-defined]
    answer = Dataset()
    if response is not None:
        answer.Status = response.Status
    return answer


# -- associations


def test_an_echo_is_answered(intake: Intake) -> None:
    with intake.association([(VERIFICATION, ())]) as assoc:
        assert assoc.send_c_echo().Status == 0x0000


def test_a_calling_ae_title_is_quoted_in_no_line_of_the_log(intake: Intake) -> None:
    with structlog.testing.capture_logs() as logs, intake.association():
        pass
    said = {line["event"]: line["calling_ae"] for line in logs if "calling_ae" in line}
    assert said == {"association.opened": "PACS", "association.closed": "PACS"}


def test_a_wrong_called_ae_is_rejected_and_told(intake: Intake) -> None:
    assert rejection(intake, called_ae="OTHER") == (1, 1, 7)
    intake.wait(lambda: intake.event_codes() == ["association_rejected"])


def test_an_unknown_calling_ae_is_rejected_and_told(intake: Intake) -> None:
    with structlog.testing.capture_logs() as logs:
        assert rejection(intake, calling_ae="STRANGER") == (1, 1, 3)
        intake.wait(lambda: [line["event"] for line in logs].count("association.to_let_it_in") == 7)
    assert any(line["event"] == "association.rejected" for line in logs)
    (event,) = intake.ledger.search_events()
    assert event.code == "association_rejected"
    assert "'STRANGER'" in event.text
    lines = [line["add_to_config"] for line in logs if line["event"] == "association.to_let_it_in"]
    assert 'ae_title = "STRANGER"' in lines
    assert event.details["config_lines"] == lines
    assert intake.registry.counts()["rejected_calling_ae_unknown"] == 1


def test_a_rejection_that_repeats_is_one_event(intake: Intake) -> None:
    for _ in range(3):
        rejection(intake, calling_ae="STRANGER")
    intake.wait(lambda: intake.registry.counts().get("rejected_calling_ae_unknown") == 3)
    intake.wait(lambda: "association_rejected" in intake.event_codes())
    assert intake.event_codes() == ["association_rejected"]


def test_every_modality_behind_one_address_is_told_with_its_lines(intake: Intake) -> None:
    titles = [f"MODALITY{number}" for number in range(6)]
    with structlog.testing.capture_logs() as logs:
        for title in titles:
            rejection(intake, calling_ae=title)
        intake.wait(lambda: intake.event_codes().count("association_rejected") == 6)
    lines = [line["add_to_config"] for line in logs if line["event"] == "association.to_let_it_in"]
    assert [line for line in lines if line.startswith("ae_title")] == [f'ae_title = "{title}"' for title in titles]


def test_the_titles_that_an_address_calls_itself_make_a_bounded_number_of_events(intake: Intake) -> None:
    with structlog.testing.capture_logs() as logs:
        for number in range(MOST_NAMES + 5):
            rejection(intake, calling_ae=f"STRANGER{number}")
        intake.wait(lambda: intake.registry.counts().get("rejected_calling_ae_unknown") == MOST_NAMES + 5)
        intake.wait(lambda: intake.event_codes().count("association_rejected") == MOST_NAMES + 1)
        intake.clock.now += 61
        for number in range(MOST_NAMES):
            rejection(intake, calling_ae=f"STRANGER{number}")
        rejection(intake, calling_ae="ONE_MORE")
        intake.wait(lambda: intake.event_codes().count("association_rejected") == 2 * (MOST_NAMES + 1))
    repeated = [event.details["repeated"] for event in intake.ledger.search_events()]
    assert repeated[::-1] == [0] * (2 * MOST_NAMES + 1) + [4]
    assert any(line.get("add_to_config") == 'ae_title = "ONE_MORE"' for line in logs)


def test_a_foreign_address_is_rejected(tmp_path: Path) -> None:
    peers = [{"name": "pacs", "ae_title": "PACS", "allowed_addresses": ["10.0.0.0/8"]}]
    with running_intake(tmp_path, config(peers=peers)) as intake:
        assert rejection(intake) == (1, 1, 3)
        intake.wait(lambda: intake.event_codes() == ["association_rejected"])
        (event,) = intake.ledger.search_events()
        assert event.details["reason"] == "address_not_allowed"


def test_a_peer_elsewhere_than_at_its_host_is_rejected_with_the_line_that_lets_it_in(
    tmp_path: Path,
) -> None:
    peers = [{"name": "pacs", "ae_title": "PACS", "host": "10.1.2.3"}]
    with running_intake(tmp_path, config(peers=peers)) as intake:
        assert rejection(intake) == (1, 1, 3)
        intake.wait(lambda: intake.event_codes() == ["association_rejected"])
        (event,) = intake.ledger.search_events()
    assert "'PACS' at '127.0.0.1': the peer pacs may call from 10.1.2.3 alone" in event.text
    assert event.details["config_lines"][1] == 'allowed_addresses = ["10.1.2.3", "127.0.0.1"]'


def test_a_peer_that_forgets_its_associations_leaves_the_others_their_places(tmp_path: Path) -> None:
    peers = [{"name": "pacs", "ae_title": "PACS"}, {"name": "ct", "ae_title": "CT_1"}]
    limits = config(node={"max_associations": 4}, peers=peers)
    with running_intake(tmp_path, limits) as intake, ExitStack() as forgotten:
        for _ in range(3):
            forgotten.enter_context(intake.association())
        assert rejection(intake) == (2, 3, 2)
        intake.wait(lambda: intake.event_codes() == ["association_rejected"])
        (event,) = intake.ledger.search_events()
        assert "4 associations, or the peer's 3, are open" in event.text
        with intake.association(calling_ae="CT_1") as assoc:
            assert assoc.is_established


def test_one_association_too_many_is_rejected_as_local_limit_exceeded(tmp_path: Path) -> None:
    with running_intake(tmp_path, config(node={"max_associations": 1})) as intake:
        with intake.association():
            assert rejection(intake) == (2, 3, 2)
        with intake.association() as assoc:
            assert assoc.is_established
        intake.wait(lambda: "rejected_association_limit" in intake.registry.counts())
        assert intake.registry.counts() == {"open": 0, "accepted": 2, "rejected_association_limit": 1}


def test_a_peer_that_may_only_echo_gets_no_storage_context(tmp_path: Path) -> None:
    peers = [{"name": "pacs", "ae_title": "PACS", "may": ["echo"]}]
    contexts = [(VERIFICATION, ()), (CTImageStorage, ())]
    with running_intake(tmp_path, config(peers=peers)) as intake, intake.association(contexts) as assoc:
        assert [c.abstract_syntax for c in assoc.accepted_contexts] == [VERIFICATION]


def test_an_admission_check_that_breaks_lets_nobody_in(intake: Intake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dicom_node.net.receive.admit", lambda *_a, **_k: 1 / 0)
    assert rejection(intake) == (2, 2, 1)


def test_ct_is_taken_in_every_syntax_that_can_be_decoded_and_native_is_preferred(intake: Intake) -> None:
    syntaxes = ct_transfer_syntaxes()
    assert {ImplicitVRLittleEndian, JPEG2000Lossless, RLELossless, JPEGBaseline8Bit} <= set(syntaxes)
    with intake.association([(CTImageStorage, (uid,)) for uid in syntaxes]) as assoc:
        assert len(assoc.accepted_contexts) == len(syntaxes)
    with intake.association([(CTImageStorage, (JPEG2000Lossless, ImplicitVRLittleEndian))]) as assoc:
        assert assoc.accepted_contexts[0].transfer_syntax == [ImplicitVRLittleEndian]


def test_nagle_is_off_on_accepted_sockets(intake: Intake, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    assoc = intake.associate()
    for mine in list(intake.receiver._tokens):
        sock = mine.dul.socket.socket
        seen.append(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
    assoc.release()
    assert seen
    assert all(seen)


# -- instances


def test_a_stored_instance_is_the_senders_bytes_behind_our_own_header(intake: Intake, tmp_path: Path) -> None:
    (path, *_) = small_ct(tmp_path / "ct")
    sent = dcmread(path)
    with intake.association([(CTImageStorage, (ExplicitVRLittleEndian,))]) as assoc:
        assert assoc.send_c_store(sent).Status == 0x0000
        (kept,) = intake.spool.incoming()
        assert intake.spool.association_of(kept) in intake.registry.open_tokens()
    stored = dcmread(kept)
    assert stored == sent
    assert stored.file_meta.TransferSyntaxUID == ExplicitVRLittleEndian
    assert stored.file_meta.MediaStorageSOPInstanceUID == sent.SOPInstanceUID
    assert "SourceApplicationEntityTitle" not in stored.file_meta


@pytest.mark.parametrize("uid", ["1.2.3", "1.2.34", "1." + "2" * 62])
def test_our_header_is_what_pydicom_writes(uid: str) -> None:
    written = file_header(sop_class_uid=CTImageStorage, sop_instance_uid=uid, transfer_syntax=ExplicitVRLittleEndian)
    header = bytes(PREAMBLE_BYTES) + written
    meta = dcmread(BytesIO(header)).file_meta
    again = DicomBytesIO()
    again.write(header[:132])
    write_file_meta_info(again, meta)
    assert again.getvalue() == header
    assert meta.MediaStorageSOPInstanceUID == uid


def test_the_handler_decodes_nothing(intake: Intake) -> None:
    with intake.association() as assoc:
        assert send_raw(assoc, instance_uid="1.2.3.4", data=b"no data set at all").Status == 0x0000
    assert intake.spool.incoming()[0].read_bytes().endswith(b"no data set at all")


@pytest.mark.parametrize("uid", ["../../../etc/passwd", "1.2." + "3" * 61, "", "1.2\n3", "1..2", "1.2/3"])
def test_a_hostile_instance_uid_is_refused_and_the_association_goes_on(
    intake: Intake, tmp_path: Path, uid: str
) -> None:
    (good, *_) = small_ct(tmp_path / "ct")
    with structlog.testing.capture_logs() as logs, intake.association() as assoc:
        assert send_raw(assoc, instance_uid=uid).Status == 0xC000
        assert assoc.send_c_store(dcmread(good)).Status == 0x0000
    assert [path.stem for path in intake.spool.incoming()] == [dcmread(good).SOPInstanceUID]
    faults = [line["fault"] for line in logs if line["event"] == "store.bad_uid"]
    assert faults
    assert "\n" not in faults[0]
    assert "store_refused" in intake.event_codes()


def test_a_class_that_is_not_the_contexts_is_refused(intake: Intake) -> None:
    with intake.association() as assoc:
        assert send_raw(assoc, instance_uid="1.2.3", class_uid=SecondaryCaptureImageStorage).Status == 0xA900
        assert send_raw(assoc, instance_uid="1.2.3", class_uid=VERIFICATION).Status == 0xA900
    assert intake.spool.incoming() == []


def photograph(sop_class_uid: str) -> Dataset:
    ds = Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID = sop_class_uid, generate_uid()
    ds.StudyInstanceUID, ds.SeriesInstanceUID = generate_uid(), generate_uid()
    ds.PatientName, ds.Modality = "PHANTOM^TEST", "OT"
    ds.file_meta = Dataset()  # type: ignore[assignment]
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    return ds


def test_what_we_do_not_use_is_accepted_dropped_and_counted_once(intake: Intake) -> None:
    classes = [SecondaryCaptureImageStorage, BasicTextSRStorage, RETIRED_STORAGE, PRIVATE_STORAGE]
    with intake.association([(uid, ()) for uid in classes]) as assoc:
        assert len(assoc.accepted_contexts) == len(classes)
        for _ in range(3):
            for uid in (SecondaryCaptureImageStorage, BasicTextSRStorage, PRIVATE_STORAGE):
                status = assoc.send_c_store(photograph(uid))
                assert status.Status == 0x0000, uid
        assert intake.spool.incoming() == []
    intake.wait(lambda: intake.event_codes().count("dropped_sop_class") == 3)
    counts = {e.details["sop_class_uid"]: e.details["instances"] for e in intake.ledger.search_events()}
    assert counts == {SecondaryCaptureImageStorage: 3, BasicTextSRStorage: 3, PRIVATE_STORAGE: 3}


def test_an_association_for_each_dropped_instance_is_one_event_a_minute(intake: Intake) -> None:
    for _ in range(2):
        for _ in range(3):
            with intake.association([(SecondaryCaptureImageStorage, ())]) as assoc:
                assoc.send_c_store(photograph(SecondaryCaptureImageStorage))
        intake.wait(lambda: "dropped_sop_class" in intake.event_codes())
        intake.clock.now += 61
    intake.wait(lambda: intake.event_codes().count("dropped_sop_class") == 2)
    assert sorted(event.details["instances"] for event in intake.ledger.search_events()) == [1, 3]


NOT_SUPPORTED = 3  # PS3.8 table 9-18: abstract syntax not supported


@pytest.mark.parametrize("districts", [["builtin"], ["dicom_seg", "builtin"]])
def test_where_other_classes_are_refused_what_the_node_uses_is_accepted(tmp_path: Path, districts: list[str]) -> None:
    seg = 0 if "dicom_seg" in districts else NOT_SUPPORTED
    expected = {CTImageStorage: 0, EnhancedCTImageStorage: 0, VERIFICATION: 0, SegmentationStorage: seg}
    expected |= dict.fromkeys((SecondaryCaptureImageStorage, RETIRED_STORAGE, PRIVATE_STORAGE), NOT_SUPPORTED)
    refusing = config(intake={"other_classes": "refuse"}, pipeline={"districts": districts})
    with running_intake(tmp_path, refusing) as intake, structlog.testing.capture_logs() as logs:
        for _ in range(2):
            with intake.association([(uid, ()) for uid in expected]) as assoc:
                answered = [*assoc.accepted_contexts, *assoc.rejected_contexts]
                assert {str(one.abstract_syntax): one.result for one in answered} == expected
        intake.wait(lambda: intake.event_codes() == ["storage_class_refused"])
        (event,) = intake.ledger.search_events()
        assert "'PACS' got no presentation context for " in event.text
        assert "Secondary Capture Image Storage" in event.text
        assert ("Segmentation Storage" in event.text) is bool(seg)
        assert intake.registry.counts()["rejected_storage_class_refused"] == 2
    assert [line["event"] for line in logs].count("association.storage_class_refused") == 1


def test_no_refusal_is_told_where_only_what_the_node_uses_is_proposed(tmp_path: Path) -> None:
    with running_intake(tmp_path, config(intake={"other_classes": "refuse"})) as intake:
        with intake.association([(CTImageStorage, ()), (VERIFICATION, ())]) as assoc:
            assert len(assoc.accepted_contexts) == 2
        assert intake.event_codes() == []
        assert "rejected_storage_class_refused" not in intake.registry.counts()


@pytest.mark.parametrize("reader", ["stream", "plain"])
@pytest.mark.parametrize(
    ("others", "command", "comes"),
    [
        ("refuse", ("dcmsend", "--no-halt"), True),
        ("refuse", ("storescu", "--no-halt"), True),
        ("refuse", ("dcmsend",), False),  # it stops at the first instance without a context: so "drop" is the default
        ("drop", ("dcmsend",), True),
    ],
)
def test_the_ct_of_a_mixed_study_comes_in_where_other_classes_are_refused_and_the_sender_goes_on(
    tmp_path: Path, reader: str, others: str, command: tuple[str, ...], comes: bool
) -> None:
    if not shutil.which(command[0]):
        pytest.skip("DCMTK is not installed")
    study = tmp_path / "study"
    ct = small_ct(study)
    for number in range(2):
        ds = photograph(SecondaryCaptureImageStorage)
        ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID
        ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
        ds.save_as(study / f"{number}-photograph.dcm", enforce_file_format=True)
    with running_intake(tmp_path, config(intake={"other_classes": others, "reader": reader})) as intake:
        to = ["-aet", "PACS", "-aec", "SYNPET", "127.0.0.1", str(intake.port)]
        # "0-photograph" comes first, "1-photograph" last
        sent = subprocess.run([*command, *to, *map(str, sorted(study.iterdir()))], capture_output=True, check=False)
        intake.wait(lambda: intake.registry.counts()["open"] == 0)
        kept = {path.stem for path in intake.spool.incoming()}
    assert (sent.returncode == 0) is comes
    assert kept == ({dcmread(path).SOPInstanceUID for path in ct} if comes else set())


def test_a_query_class_is_not_accepted(intake: Intake) -> None:
    assoc = intake.associate([(DICOM_DIR_QUERY, ()), (VERIFICATION, ())])
    assert [c.abstract_syntax for c in assoc.accepted_contexts] == [VERIFICATION]
    assoc.release()


def test_below_the_watermark_an_instance_is_refused_with_a700_before_anything_is_lost(tmp_path: Path) -> None:
    (path, *_) = small_ct(tmp_path / "ct")
    with running_intake(tmp_path, config(intake={"min_free_bytes": 10**18})) as intake:
        with intake.association() as assoc:
            status = assoc.send_c_store(dcmread(path))
        assert status.Status == 0xA700
        assert status.ErrorComment == "no room on disk"
        assert intake.spool.incoming() == []
        assert intake.event_codes().count("store_refused") == 1


def test_a_fault_of_ours_is_answered_and_logged_once(
    intake: Intake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path, *_) = small_ct(tmp_path / "ct")
    monkeypatch.setattr(intake.spool, "open_incoming", lambda *_a: 1 / 0)
    with structlog.testing.capture_logs() as logs, intake.association() as assoc:
        assert assoc.send_c_store(dcmread(path)).Status == 0xC001
        assert assoc.send_c_store(dcmread(path)).Status == 0xC001
    assert [line["event"] for line in logs].count("store.failed") == 2


def test_a_ledger_that_cannot_be_written_costs_no_instance(
    intake: Intake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path, *_) = small_ct(tmp_path / "ct")
    monkeypatch.setattr(intake.ledger, "note", lambda *_a, **_k: 1 / 0)
    with (
        structlog.testing.capture_logs(),
        intake.association([(CTImageStorage, ()), (BasicTextSRStorage, ())]) as assoc,
    ):
        assert assoc.send_c_store(photograph(BasicTextSRStorage)).Status == 0x0000
        assert assoc.send_c_store(dcmread(path)).Status == 0x0000
    assert len(intake.spool.incoming()) == 1


@pytest.mark.parametrize("name", ["山田^太郎", "Пациент^Иван", "<script>alert(1)</script>"])
def test_a_patients_name_never_reaches_a_log(
    intake: Intake, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    caplog.set_level(logging.DEBUG)
    logging.getLogger("pynetdicom").setLevel(logging.DEBUG)
    paths = small_ct(tmp_path / "ct", patient_name=name, patient_id="SECRET-ID")
    try:
        with structlog.testing.capture_logs() as logs:
            with intake.association() as assoc:
                for path in paths:
                    assert assoc.send_c_store(dcmread(path)).Status == 0x0000
            intake.pass_time(31)
    finally:
        logging.getLogger("pynetdicom").setLevel(logging.WARNING)
    # the sender in this test is pynetdicom, too: its own debug lines about the request are not the node's
    told = (
        str(logs)
        + "".join(r.getMessage() for r in caplog.records if not r.name.startswith("pynetdicom"))
        + capfd.readouterr().err
    )
    assert intake.job().state == "QUEUED"
    for secret in (name, name.split("^")[0], "SECRET-ID", "19600101"):
        assert secret not in told
        assert secret not in str([e.text for e in intake.ledger.search_events()])


def test_an_abort_gives_the_place_back_and_keeps_what_was_acknowledged(intake: Intake, tmp_path: Path) -> None:
    paths = small_ct(tmp_path / "ct")
    assoc = intake.associate()
    for path in paths[:3]:
        assert assoc.send_c_store(dcmread(path)).Status == 0x0000
    assoc.abort()
    intake.wait(lambda: not intake.registry.open_tokens())
    assert len(intake.spool.incoming()) == 3


@pytest.mark.parametrize("last_words", [b"", b"\x04\x00\x00\x00\x00\x10" + b"\xff" * 16, b"\x99" * 64])
def test_a_sender_that_breaks_off_or_talks_nonsense_gives_its_place_back(intake: Intake, last_words: bytes) -> None:
    assoc = intake.associate()
    wire = assoc.dul.socket.socket
    intake.wait(lambda: len(intake.registry.open_tokens()) == 1)
    wire.sendall(last_words)
    if not last_words:
        wire.shutdown(socket.SHUT_RDWR)
    intake.wait(lambda: not intake.registry.open_tokens())
    with intake.association([(VERIFICATION, ())]) as other:
        assert other.send_c_echo().Status == 0x0000
    assoc.kill()
    wire.close()  # pynetdicom leaves a socket open whose association was killed


def test_a_connection_that_says_nothing_holds_no_place(intake: Intake) -> None:
    with socket.create_connection(("127.0.0.1", intake.port)) as silent:
        silent.sendall(b"GET / HTTP/1.1\r\n\r\n")
        with intake.association() as assoc:
            assert assoc.is_established
    assert intake.registry.counts()["accepted"] == 1


def test_stop_leaves_no_thread_and_no_open_association(tmp_path: Path) -> None:
    with running_intake(tmp_path) as intake:
        assoc = intake.associate()
        intake.receiver.stop()
        intake.wait(lambda: not assoc.is_established)
        assert intake.registry.open_tokens() == ()
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.1", intake.port))


def test_pynetdicom_logs_no_line_per_message(intake: Intake) -> None:
    handlers = intake.receiver._servers[0].get_handlers(evt.EVT_DIMSE_RECV)
    assert [h[0].__name__ for h in handlers] == ["_on_message"]


@pytest.mark.dcmtk
@pytest.mark.parametrize("tool", ["storescu", "dcmsend"])
def test_dcmtk_sends_a_compressed_series(intake: Intake, tmp_path: Path, tool: str) -> None:
    program = shutil.which(tool)
    if program is None:
        pytest.skip(f"DCMTK's {tool} is not installed")
    paths = small_ct(tmp_path / "ct", transfer_syntax=RLELossless)
    syntax = {"storescu": ["-xr"], "dcmsend": ["--decompress-never"]}[tool]
    command = [program, *syntax, "-aet", "PACS", "-aec", "SYNPET", "127.0.0.1", str(intake.port), *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    kept = intake.spool.incoming()
    assert len(kept) == len(paths)
    assert {dcmread(path).file_meta.TransferSyntaxUID for path in kept} == {RLELossless}


def test_connections_that_say_nothing_are_closed_beyond_a_limit_and_one_event_says_so(tmp_path: Path) -> None:
    limit = 5  # four silent connections for each allowed association
    with running_intake(tmp_path, config(node={"max_associations": 1})) as intake, ExitStack() as opened:
        for _ in range(limit + 3):
            opened.enter_context(socket.create_connection(("127.0.0.1", intake.port), timeout=5))
        intake.wait(lambda: bool(intake.ledger.search_events(code="association_rejected")))
        (event,) = intake.ledger.search_events(code="association_rejected")
        assert event.details["reason"] == "connection_limit"
        assert intake.registry.counts()["rejected_connection_limit"] >= 1
        intake.receiver.stop()  # with silent connections open: no thread ends with a traceback


STRANGER = "127.0.0.2"  # this machine calls itself from 127.0.0.1


def silent(intake: Intake, address: str) -> socket.socket:
    """A connection from `address` that says nothing."""
    return socket.create_connection(("127.0.0.1", intake.port), timeout=5, source_address=(address, 0))


def test_strangers_cannot_take_the_places_of_peers(tmp_path: Path) -> None:
    with running_intake(tmp_path, config(node={"max_associations": 1})) as intake, ExitStack() as opened:
        for _ in range(8):
            opened.enter_context(silent(intake, STRANGER))
        intake.wait(lambda: intake.registry.counts().get("rejected_connection_limit", 0) >= 3)
        with intake.association():
            pass
        (event,) = intake.ledger.search_events(code="association_rejected")
        assert event.text == "more than 5 connections of strangers were open: new ones are closed unheard"


def test_peers_cannot_take_the_places_of_strangers(tmp_path: Path) -> None:
    settings = config(node={"max_associations": 1, "unknown_peers": "accept"})
    with running_intake(tmp_path, settings) as intake, ExitStack() as opened:
        for _ in range(8):
            opened.enter_context(silent(intake, "127.0.0.1"))
        intake.wait(lambda: intake.registry.counts().get("rejected_connection_limit", 0) >= 3)
        late = opened.enter_context(silent(intake, STRANGER))
        late.settimeout(0.3)
        with pytest.raises(TimeoutError):  # not closed: somebody waits for what it says
            late.recv(1)


def test_strangers_that_are_let_in_leave_half_of_the_associations_to_peers(tmp_path: Path) -> None:
    settings = config(node={"max_associations": 4, "unknown_peers": "accept"})
    with running_intake(tmp_path, settings) as intake:
        strangers = [intake.associate(calling_ae=f"STRANGER{n}") for n in range(3)]
        peers = [intake.associate() for _ in range(3)]
        assert [one.is_established for one in strangers] == [True, True, False]
        assert [one.is_established for one in peers] == [True, True, False]
        for one in (*strangers, *peers):
            if one.is_established:
                one.release()
