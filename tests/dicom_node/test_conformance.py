"""The conformance statement says what the node does: held against its file, its network and its objects."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from pydicom.uid import (
    CTImageStorage,
    JPEGLSLossless,
    KeyObjectSelectionDocumentStorage,
    RTPlanStorage,
    SegmentationStorage,
)
from pynetdicom import AE, build_context, evt
from pynetdicom._globals import ALL_TRANSFER_SYNTAXES
from pynetdicom.presentation import PresentationContext
from typer.testing import CliRunner

from dicom_node.cli import app
from dicom_node.config import Config, PeerConfig, load_config
from dicom_node.conformance.annexes import OBJECTS
from dicom_node.conformance.attributes import attributes_of
from dicom_node.conformance.document import REJECTIONS, statement
from dicom_node.conformance.negotiation import (
    DROPPED,
    REFUSED,
    accepted,
    asked,
    known_sop_classes,
    proposed,
    verification,
)
from dicom_node.conformance.sample import Samples, make_samples
from dicom_node.net.commitment_scp import Verdict, send_report
from dicom_node.net.move import Retrieval
from dicom_node.net.query import Finder, count_series_instances
from dicom_node.net.scp import IMPLEMENTATION_CLASS_UID, STORAGE_COMMITMENT
from dicom_node.net.scu import Timeouts, echo, send_series
from dicom_node.node import Node
from dicom_node.worker import pipeline_options
from pipeline.outputs.rejection_note import KIND as REJECTION
from pipeline.types import OutputOptions

ROOT = Path(__file__).parents[2]
MOST_CONTEXTS = 128  # PS3.8 7.1.1.13: odd numbers from 1 to 255
PATIENT = Timeouts(acse_s=60.0, dimse_s=60.0, network_s=60.0)


def config_of(root: Path, **tables: Any) -> Config:
    base: dict[str, Any] = {
        "node": {"host": "127.0.0.1", "port": 11112},
        "storage": {"root": str(root / "spool")},
        "peers": [{"name": "pacs", "ae_title": "PACS"}],
    }
    return Config.model_validate({**base, **tables})


@pytest.fixture(scope="module")
def samples() -> Samples:
    return make_samples(OutputOptions())


@pytest.fixture(scope="module")
def shipped() -> str:
    return statement(load_config(ROOT / "config.toml"))


# ---- the file


def test_the_file_in_docs_is_the_statement_of_the_shipped_configuration(shipped: str) -> None:
    file = ROOT / "docs" / "conformance.md"
    assert file.read_text(encoding="utf-8") == shipped, "run: dicom-node conformance --out docs/conformance.md"


def test_the_command_writes_the_file_or_prints_it(tmp_path: Path, shipped: str) -> None:
    out = tmp_path / "statement.md"
    written = CliRunner().invoke(app, ["conformance", "--config", str(ROOT / "config.toml"), "--out", str(out)])
    printed = CliRunner().invoke(app, ["conformance", "--config", str(ROOT / "config.toml")])
    assert (written.exit_code, printed.exit_code) == (0, 0)
    assert printed.stdout == out.read_text(encoding="utf-8") == shipped


def test_the_statement_follows_the_configuration(tmp_path: Path) -> None:
    config = config_of(
        tmp_path,
        node={"ae_title": "ELSEWHERE", "max_pdu": 65536, "max_associations": 7},
        output={"seg": True, "sr": True, "series_number": 4711},
        pipeline={"districts": ["dicom_seg", "builtin"]},
        peers=[
            {"name": "modality", "ae_title": "CT1", "may": ["store", "commit"]},
            {"name": "pacs", "ae_title": "PACS", "we_may": ["find", "move"]},
        ],
        pulls=[{"name": "missed", "peer": "pacs", "days_back": 2}],
        destinations=[
            {"name": "a", "peer": "pacs", "encoding": "pet", "transfer_syntax": "jpeg-ls", "commitment": True},
            {"name": "w", "url": "https://pacs.example/dicom-web", "token_file": "/run/secrets/token"},
        ],
    )
    text = statement(config)
    assert "`ELSEWHERE`" in text
    assert "65536 bytes" in text
    assert "| SeriesNumber | ALWAYS | CONFIG | 4711 |" in text
    assert "| Segmentation Storage | `1.2.840.10008.5.1.4.1.1.66.4` | yes | yes |" in text
    assert "| Comprehensive 3D SR Storage | `1.2.840.10008.5.1.4.1.1.88.34` | yes | no |" in text
    assert "| Storage Commitment Push Model SOP Class | `1.2.840.10008.1.20.1` | yes | yes |" in text
    assert "(`may` has `commit`): modality." in text
    assert "| pacs | C-FIND, C-MOVE |" in text
    assert "| missed | pacs | 03:00 | 2 | C-MOVE |" in text
    assert "| Study Root Query/Retrieve Information Model - MOVE | `1.2.840.10008.5.1.4.1.2.2.2` | yes | no |" in text
    assert "- GET |" not in text
    assert "JPEG-LS Lossless Image Compression, Explicit VR Little Endian" in text
    assert "| w | TLS | bearer token |" in text
    assert "/run/secrets" not in text


# ---- what is accepted


@contextmanager
def running_node(config: Config) -> Iterator[int]:
    node = Node(config, drain_s=0)
    try:
        yield node.start(port=0)
    finally:
        node.stop()


def granted(port: int, contexts: Sequence[PresentationContext]) -> set[tuple[str, str]]:
    """The class and transfer syntax of each context that the node accepted."""
    assoc = AE("PACS").associate("127.0.0.1", port, contexts=list(contexts), ae_title="SYNPET")
    if not assoc.is_established:
        return set()
    found = {(str(one.abstract_syntax), str(one.transfer_syntax[0])) for one in assoc.accepted_contexts}
    assoc.release()
    return found


def in_requests(these: Sequence[Any]) -> list[Sequence[Any]]:
    """In pieces of what one association request can hold."""
    return [these[start : start + MOST_CONTEXTS] for start in range(0, len(these), MOST_CONTEXTS)]


def granted_one_by_one(port: int, sop_classes: Sequence[str]) -> set[tuple[str, str]]:
    """Every transfer syntax alone, so that each gets an answer of its own."""
    every = [build_context(sop_class, syntax) for sop_class in sop_classes for syntax in ALL_TRANSFER_SYNTAXES]
    return set().union(*(granted(port, some) for some in in_requests(every)))


@pytest.mark.parametrize(
    ("asks", "gives", "role", "others"),
    [(False, False, "", "drop"), (True, True, "SCU and SCP", "drop"), (True, False, "SCU", "refuse")],
)
def test_a_running_node_accepts_what_the_statement_says_and_nothing_else(
    tmp_path: Path, asks: bool, gives: bool, role: str, others: str
) -> None:
    may = ["store", "echo", *(["commit"] if gives else [])]
    config = config_of(
        tmp_path,
        peers=[{"name": "pacs", "ae_title": "PACS", "may": may}],
        pipeline={"districts": ["dicom_seg", "builtin"] if asks else ["builtin"]},
        destinations=[{"name": "pacs", "peer": "pacs", "commitment": asks}],
        intake={"other_classes": others},
    )
    said = {one.sop_class_uid: one for one in accepted(config)}
    kept = [uid for uid, one in said.items() if one.use != DROPPED]
    assert (SegmentationStorage in kept, STORAGE_COMMITMENT in kept) == (asks, asks or gives)
    assert [one.role for one in said.values() if one.sop_class_uid == STORAGE_COMMITMENT] == ([role] if role else [])
    with running_node(config) as port:
        all_at_once = set().union(
            *(
                granted(port, [build_context(uid, list(ALL_TRANSFER_SYNTAXES)) for uid in some])
                for some in in_requests(known_sop_classes())
            )
        )
        one_by_one = granted_one_by_one(port, [*kept, RTPlanStorage])
    assert {uid for uid, _ in all_at_once} == set(said)
    listed = {(uid, syntax) for uid in kept for syntax in said[uid].transfer_syntaxes}
    if SegmentationStorage in kept:  # not CT: whatever is proposed
        listed |= {(str(SegmentationStorage), str(syntax)) for syntax in ALL_TRANSFER_SYNTAXES}
    dropped = {(str(RTPlanStorage), str(syntax)) for syntax in ALL_TRANSFER_SYNTAXES}
    assert one_by_one == listed | (dropped if others == "drop" else set())
    assert (set(said) == set(kept)) is (others == "refuse")


def test_the_statement_says_what_becomes_of_classes_that_are_not_used(tmp_path: Path, shipped: str) -> None:
    refusing = statement(config_of(tmp_path, intake={"other_classes": "refuse"}))
    assert (DROPPED in shipped, REFUSED in shipped) == (True, False)
    assert (DROPPED in refusing, REFUSED in refusing) == (False, True)


def test_of_several_transfer_syntaxes_the_first_of_the_statement_is_chosen(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    (ct,) = [one for one in accepted(config) if one.sop_class_uid == CTImageStorage]
    assert JPEGLSLossless in ct.transfer_syntaxes
    with running_node(config) as port:
        for count in range(1, len(ct.transfer_syntaxes)):
            left = ct.transfer_syntaxes[count:]
            assert granted(port, [build_context(CTImageStorage, list(reversed(left)))]) == {(CTImageStorage, left[0])}


def test_associations_are_rejected_and_identified_as_the_statement_says(tmp_path: Path) -> None:
    config = config_of(tmp_path, node={"host": "127.0.0.1", "max_associations": 1, "max_pdu": 65536})
    echo_only = [build_context(verification().sop_class_uid)]
    with running_node(config) as port:
        held = AE("PACS").associate("127.0.0.1", port, contexts=echo_only, ae_title="SYNPET")
        assert held.acceptor.implementation_class_uid == IMPLEMENTATION_CLASS_UID
        assert held.acceptor.maximum_length == 65536
        answers = [
            AE(calling).associate("127.0.0.1", port, contexts=echo_only, ae_title=called).acceptor.primitive
            for calling, called in (("PACS", "OTHER"), ("STRANGER", "SYNPET"), ("PACS", "SYNPET"))
        ]
        held.release()
    found = [(answer.result, answer.result_source, answer.diagnostic) for answer in answers if answer]
    assert found == [reason for reason, _ in REJECTIONS[:3]]


# ---- what is proposed


class Witness:
    """An SCP that takes everything and remembers what it was asked for."""

    def __init__(self) -> None:
        self.asked: dict[str, list[str]] = {}
        self.identities: set[str] = set()
        self._ae = AE("PACS")
        for uid in known_sop_classes():
            self._ae.add_supported_context(uid, list(ALL_TRANSFER_SYNTAXES))

    def __enter__(self) -> Witness:
        handlers = [
            (evt.EVT_REQUESTED, self._on_requested),
            (evt.EVT_C_STORE, lambda _event: 0x0000),
            (evt.EVT_C_ECHO, lambda _event: 0x0000),
            (evt.EVT_C_FIND, lambda _event: iter(())),
            (evt.EVT_C_MOVE, lambda _event: iter([(None, None)])),
            (evt.EVT_C_GET, lambda _event: iter([0])),
            (evt.EVT_N_EVENT_REPORT, lambda _event: (0x0000, None)),
        ]
        self._server = self._ae.start_server(("127.0.0.1", 0), block=False, evt_handlers=handlers)
        return self

    def __exit__(self, *_: object) -> None:
        self._ae.shutdown()

    def peer(self) -> PeerConfig:
        return PeerConfig(name="pacs", ae_title="PACS", port=self._server.server_address[1])

    def _on_requested(self, event: evt.Event) -> None:
        self.identities.add(str(event.assoc.requestor.implementation_class_uid))
        for context in event.assoc.requestor.requested_contexts:
            known = self.asked.setdefault(str(context.abstract_syntax), [])
            known += [str(uid) for uid in context.transfer_syntax if str(uid) not in known]


@pytest.mark.parametrize("transfer_syntax", ["explicit", "jpeg-ls"])
def test_a_peer_is_asked_for_what_the_statement_says(samples: Samples, tmp_path: Path, transfer_syntax: str) -> None:
    config = config_of(
        tmp_path,
        output={"seg": True, "uncertainty": True, "sr": True, "presentation_states": True},
        destinations=[{"name": "pacs", "peer": "pacs", "encoding": "pet", "transfer_syntax": transfer_syntax}],
    )
    (destination,) = config.destinations
    said = proposed(samples.full.series, pipeline_options(config).output, destination)
    sent = [one for one in samples.full.series if f"{one.kind}-{one.encoding}" in _objects(said)]
    with Witness() as witness:
        for one in sent:
            files = []
            for instance in one.instances:
                files.append(tmp_path / f"{one.kind}-{one.encoding}-{instance.file_name}")
                files[-1].write_bytes(instance.data)
            peer = witness.peer()
            assert send_series(
                files, peer, calling_ae="SYNPET", timeouts=PATIENT, transfer_syntax=destination.transfer_syntax
            ).ok
        assert count_series_instances(witness.peer(), "1.2", "1.3", calling_ae="SYNPET", timeouts=PATIENT).ok
        told = {one.sop_class_uid: sorted(one.transfer_syntaxes) for one in said}
        assert {uid: sorted(syntaxes) for uid, syntaxes in witness.asked.items()} == told
        witness.asked.clear()
        assert echo(witness.peer(), calling_ae="SYNPET", timeouts=PATIENT).ok
        check = verification()
        assert witness.asked == {check.sop_class_uid: list(check.transfer_syntaxes)}
    assert witness.identities == {IMPLEMENTATION_CLASS_UID}


def test_a_peer_that_is_asked_for_studies_is_asked_for_what_the_statement_says() -> None:
    with Witness() as witness:
        peer = witness.peer().model_copy(update={"we_may": ("find", "move", "get"), "may": ("commit",)})
        told = {one.sop_class_uid: sorted(one.transfer_syntaxes) for one in asked(peer)}
        Finder(peer, calling_ae="SYNPET", timeouts=PATIENT).study("1.2")
        retrieval = Retrieval(peer=peer, calling_ae="SYNPET", timeouts=PATIENT)
        retrieval.move("1.2", "1.3")
        retrieval.get("1.2", "1.3", None, "")  # type: ignore[arg-type] # nothing is sent
        send_report(Verdict(transaction_uid="1.2"), peer, calling_ae="SYNPET", timeouts=PATIENT, max_pdu=16382)
        assert {uid: sorted(syntaxes) for uid, syntaxes in witness.asked.items()} == told
    assert {one.role for one in asked(peer) if one.sop_class_uid in (CTImageStorage, STORAGE_COMMITMENT)} == {"SCP"}


def _objects(said: Sequence[Any]) -> set[str]:
    return {kind for one in said for kind in one.objects}


def test_the_shipped_configuration_proposes_the_pet_the_picture_and_the_rejection_note(samples: Samples) -> None:
    config = load_config(ROOT / "config.toml")
    said = proposed(samples.full.series, pipeline_options(config).output, config.destinations[0])
    assert _objects(said) == {"pet-sc", "mip-sc", f"{REJECTION}-kos"}
    assert said[1].sop_class_uid == KeyObjectSelectionDocumentStorage


# ---- what is written


def test_every_kind_of_object_that_is_written_has_a_title(samples: Samples) -> None:
    written = {kind.partition("-")[0] for kind in samples.full.written}
    assert written == {kind.partition("-")[0] for kind in OBJECTS}


def test_every_attribute_that_is_written_has_a_row(samples: Samples) -> None:
    for kind, instances in samples.full.written.items():
        rows = {row.path[0] for row in attributes_of(samples, kind) if len(row.path) == 1}
        assert all(int(elem.tag) in rows for ds in instances for elem in ds)


def test_the_rows_tell_fixed_copied_configured_and_generated_values_apart(samples: Samples) -> None:
    rows = {row.keyword: row for row in attributes_of(samples, "pet-sc") if len(row.path) == 1}
    told = {name: (row.presence, row.source, row.value) for name, row in rows.items()}
    assert told["SyntheticData"] == ("ALWAYS", "FIXED", "YES")
    assert told["Modality"] == ("ALWAYS", "FIXED", "PT")
    assert told["PatientName"] == ("VNAP", "COPY", "")
    assert told["PatientWeight"] == ("ANAP", "COPY", "")
    assert told["SeriesDate"] == ("ALWAYS", "COPY", "of AcquisitionDate")
    assert told["BodyPartExamined"] == ("ALWAYS", "COPY", "else WHOLEBODY")
    assert told["SeriesNumber"] == ("ALWAYS", "CONFIG", "9001")
    assert told["SOPInstanceUID"] == ("ALWAYS", "AUTO", "")
    assert told["InstanceNumber"] == ("ALWAYS", "AUTO", "by instance, e.g. 1")
    assert told["CollimatorType"] == ("EMPTY", "FIXED", "")


def test_the_statement_holds_nothing_of_the_imagined_patients(samples: Samples, shipped: str) -> None:
    for sample in (samples.full, samples.other):
        for elem in sample.header:
            common = elem.keyword in ("SOPClassUID", "PositionReferenceIndicator")  # a class; two letters
            if elem.VR in ("AS", "LO", "PN", "SH", "UI") and not common:
                assert str(elem.value) not in shipped, elem.keyword
