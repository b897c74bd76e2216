"""What peers may propose beside the plain case: each is answered as the standard says, and the CT is stored."""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest
import structlog
from hypothesis import given, settings
from hypothesis import strategies as st
from intake_tools import Intake, config, running_intake, small_ct
from odd_requests import (
    ABORT,
    ASSOCIATE_AC,
    CT,
    VERIFICATION,
    Talk,
    common_extended,
    context,
    extended,
    identity,
    item,
    request,
    roles,
    talking,
    text,
    window,
    without_user_information,
)
from pydicom import dcmread
from pydicom.uid import CTImageStorage, JPEG2000Lossless, RLELossless
from pynetdicom import AE
from pynetdicom.pdu_primitives import SOPClassCommonExtendedNegotiation, SOPClassExtendedNegotiation
from raw_sender import EXPLICIT, IMPLICIT, store_message

from dicom_node.net.command import Malformed
from dicom_node.net.negotiation import readable_request
from dicom_node.net.scp import ct_transfer_syntaxes

NO_ABSTRACT_SYNTAX, NO_TRANSFER_SYNTAX = 3, 4  # PS3.8 table 9-18
PRIVATE = "1.3.12.2.1107.5.9.1"
_numbers = count(1)


@pytest.fixture(scope="module", params=["stream", "plain"])
def intake(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Intake]:
    given_config = config(intake={"reader": request.param}, node={"max_associations": 4})
    with running_intake(tmp_path_factory.mktemp("node"), given_config) as running:
        yield running


def stored(intake: Intake, talk: Talk, number: int, *, size: int = 3000, pdu: int = 0) -> None:
    """An instance goes in over this association and lies in the spool, byte for byte."""
    uid, data = f"1.2.3.{next(_numbers)}", bytes(range(256)) * (size // 256) + b"ab"
    assert talk.store(number, uid, data, pdu=pdu) == 0x0000
    (path,) = [path for path in intake.spool.incoming() if path.name == f"{uid}.dcm"]
    assert path.read_bytes().endswith(data)


# -- user identity (PS3.7 annex D.3.3.7)


@pytest.mark.parametrize("asks", [False, True], ids=["silent", "asks for a response"])
@pytest.mark.parametrize("kind", [1, 2, 3, 4, 5], ids=["name", "passcode", "Kerberos", "SAML", "JWT"])
def test_a_user_identity_is_taken_and_only_names_get_the_response_they_ask_for(
    intake: Intake, kind: int, asks: bool
) -> None:
    user = identity(kind, b"user or ticket", b"secret" if kind == 2 else b"", asks=asks)
    with structlog.testing.capture_logs() as logs, talking(intake.port, request(context(1), user=user)) as talk:
        assert talk.answer.kind == ASSOCIATE_AC
        assert talk.answer.user.get(0x59) == (b"\0\0" if asks and kind in (1, 2) else None)
        stored(intake, talk, 1)
        talk.release()
    assert "secret" not in repr(logs)
    assert "ticket" not in repr(logs)


@pytest.mark.parametrize(
    "user",
    [
        identity(0, b"user", asks=True),
        identity(6, b"user", asks=True),
        identity(255, b"", asks=False),
        item(0x58, b"\x01"),
        item(0x58, b"\x01\x01\x00\x10short\x00\x00"),
        item(0x58, b""),
    ],
    ids=["type 0", "type 6", "type 255", "half", "longer than it is", "empty"],
)
def test_a_user_identity_that_is_none_is_ignored(intake: Intake, user: bytes) -> None:
    with talking(intake.port, request(context(1), user=user)) as talk:
        assert talk.answer.results == {1: 0}
        assert 0x59 not in talk.answer.user
        talk.release()


# -- windows, extended negotiation, roles


@pytest.mark.parametrize("asked", [(0, 0), (8, 8), (5, 1), (1, 65535)])
def test_an_asynchronous_window_is_answered_with_one(intake: Intake, asked: tuple[int, int]) -> None:
    with talking(intake.port, request(context(1), user=window(*asked))) as talk:
        assert talk.answer.user[0x53] == struct.pack(">HH", 1, 1)
        stored(intake, talk, 1)
        talk.release()


@pytest.mark.parametrize("sop_class", [CT, PRIVATE])
@pytest.mark.parametrize("service", ["1.2.840.10008.4.2", "1.2.840.10008.5.1.4.1.2.2.1", VERIFICATION, "1.2.3"])
def test_a_peer_cannot_say_that_a_storage_class_is_of_another_service(
    intake: Intake, sop_class: str, service: str
) -> None:
    user = common_extended(sop_class, service, ["1.2.840.10008.5.1.4.1.1.88.22"]) + extended(sop_class, b"\2\1\1")
    with talking(intake.port, request(context(1, sop_class), user=user)) as talk:
        assert talk.answer.results == {1: 0}
        assert not {0x56, 0x57} & talk.answer.user.keys()
        uid = f"1.2.9.{next(_numbers)}"
        data = b"\x08\x00\x60\x00\x02\x00\x00\x00CT"
        assert talk.exchange(store_message(1, 1, sop_class, uid, data)) == 0x0000
        talk.release()
    assert any(path.name == f"{uid}.dcm" for path in intake.spool.incoming()) == (sop_class == CT)


@pytest.mark.parametrize("asked", [(1, 0), (1, 1), (0, 1), (0, 0)])
def test_roles_for_storage_are_the_default_ones_whatever_is_asked(intake: Intake, asked: tuple[int, int]) -> None:
    """No reply means the default roles: the requestor stores, we keep (PS3.7 annex D.3.3.4)."""
    with talking(intake.port, request(context(1), user=roles(CT, *asked))) as talk:
        assert talk.answer.results == {1: 0}
        assert 0x54 not in talk.answer.user
        stored(intake, talk, 1)
        talk.release()


def test_pynetdicom_and_its_negotiation_items_are_served(intake: Intake, tmp_path: Path) -> None:
    ae = AE("PACS")
    ae.add_requested_context(CTImageStorage, [EXPLICIT])
    common, more = SOPClassCommonExtendedNegotiation(), SOPClassExtendedNegotiation()
    common.sop_class_uid, common.service_class_uid = CTImageStorage, "1.2.840.10008.4.2"
    more.sop_class_uid, more.service_class_application_information = CTImageStorage, b"\x02\x00\x03\x00\x01\x00"
    assoc = ae.associate("127.0.0.1", intake.port, ae_title="SYNPET", ext_neg=[common, more])
    assert assoc.is_established
    assert assoc.send_c_store(dcmread(small_ct(tmp_path, slices=1)[0])).Status == 0x0000
    assoc.release()


# -- unknown items, and broken ones


UNKNOWN: dict[str, bytes] = {
    "a user item": request(context(1), user=item(0x5F, b"whatever")),
    "an empty user item": request(context(1), user=item(0x60, b"")),
    "an item": request(context(1), item(0x70, b"whatever")),
    "an item of an answer": request(context(1), item(0x21, b"\1\0\0\0")),
    "a sub-item of a context": request(
        item(0x20, b"\1\0\0\0" + item(0x30, CT.encode()) + item(0x41, b"?") + item(0x40, EXPLICIT.encode()))
    ),
    "a version name of 40 characters": request(context(1), user=item(0x55, b"V" * 40)),
    "a version name that is no ASCII": request(context(1), user=item(0x55, b"caf\xe9\xff")),
    "a window of three bytes": request(context(1), user=item(0x53, b"\0\1\0")),
    "roles without a class": request(context(1), user=item(0x54, b"\1\1")),
    "an extended item that is cut": request(context(1), user=item(0x56, b"\0\x20" + CT.encode())),
    "a related class that is cut": request(
        context(1), user=item(0x57, text(CT) + text("1.2") + text(b"\0\x09" + b"1.2"))
    ),
    "no maximum length": request(context(1), max_pdu=None),
    "no user information": without_user_information(context(1)),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_what_we_do_not_know_is_ignored(intake: Intake, case: str) -> None:
    with talking(intake.port, UNKNOWN[case]) as talk:
        assert talk.answer.results == {1: 0}
        stored(intake, talk, 1)
        talk.release()


MALFORMED: dict[str, bytes] = {
    "an even context ID": request(context(2)),
    "context ID 0": request(context(0)),
    "an item longer than the PDU": request(context(1), b"\x20\x00\xff\xff\x01"),
    "half an item": request(context(1), b"\x20\x00"),
    "a context without an ID": request(item(0x20, b"")),
    "a maximum length of one byte": request(context(1), max_pdu=1),
    "no items and half a header": struct.pack(">BxL", 1, 20) + bytes(20),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_what_cannot_be_meant_is_aborted_in_words(intake: Intake, case: str) -> None:
    with talking(intake.port, MALFORMED[case]) as talk:
        assert talk.answer.kind == ABORT
    with talking(intake.port, request(context(1))) as talk:  # and the next one is served
        assert talk.answer.results == {1: 0}
        talk.release()


@given(data=st.binary(max_size=80), place=st.integers(0, 300), cut=st.integers(0, 40))
@settings(max_examples=200)
def test_a_request_with_garbage_in_it_is_readable_or_malformed(data: bytes, place: int, cut: int) -> None:
    """What comes out has the right length, only known items, and reads the same a second time."""
    good = request(context(1), context(3, VERIFICATION), user=identity(2, b"a", b"b", asks=True) + roles(CT, 1, 0))
    raw = good[: 6 + place] + data + good[6 + place + cut :]
    try:
        readable = readable_request(raw)
    except Malformed:
        return
    assert struct.unpack_from(">L", readable, 2)[0] == len(readable) - 6
    assert readable_request(readable) == readable


def test_a_good_request_stays_as_it_is() -> None:
    user = identity(1, b"a", asks=False) + window(2, 2) + roles(CT, 1, 0) + item(0x55, b"A_VERSION_1.0")
    user += extended(CT, b"\1") + common_extended(CT, "1.2.840.10008.4.2", [CT, PRIVATE])
    good = request(*[context(2 * k + 1) for k in range(128)], user=user)
    assert readable_request(good) == good


# -- presentation contexts


def test_every_context_of_128_is_answered_with_what_it_offers(intake: Intake) -> None:
    syntaxes = ct_transfer_syntaxes()
    offered = {2 * k + 1: syntaxes[k % len(syntaxes)] for k in range(128)}
    with talking(intake.port, request(*[context(n, CT, [uid]) for n, uid in offered.items()])) as talk:
        assert talk.answer.results == dict.fromkeys(offered, 0)
        assert talk.answer.syntaxes == offered
        stored(intake, talk, 1)
        stored(intake, talk, 255)
        talk.release()


def test_one_class_in_many_contexts_is_answered_in_each_by_its_own_syntaxes(intake: Intake) -> None:
    contexts = [context(1, CT, [IMPLICIT]), context(3, CT, ["1.2.3.4"]), context(5, CT, [RLELossless, EXPLICIT])]
    contexts += [context(7, CT, [JPEG2000Lossless, RLELossless]), context(9, VERIFICATION, [EXPLICIT])]
    with talking(intake.port, request(*contexts)) as talk:
        assert talk.answer.results == {1: 0, 3: NO_TRANSFER_SYNTAX, 5: 0, 7: 0, 9: 0}
        assert (talk.answer.syntaxes[1], talk.answer.syntaxes[5]) == (IMPLICIT, EXPLICIT)
        assert talk.answer.syntaxes[7] == JPEG2000Lossless
        for number in (1, 5, 7):
            stored(intake, talk, number)
        assert talk.echo(9) == 0x0000
        talk.release()


@pytest.mark.parametrize(
    "broken",
    [context(1, CT, []), context(1, None), item(0x20, b"\1\0\0\0"), context(1, "", [""]), context(1, CT, ["\0"])],
    ids=["no transfer syntax", "no abstract syntax", "neither", "empty ones", "a null"],
)
def test_a_context_that_names_no_syntax_is_not_supported_and_the_others_are(intake: Intake, broken: bytes) -> None:
    with talking(intake.port, request(broken, context(3))) as talk:
        assert talk.answer.results == {1: NO_TRANSFER_SYNTAX, 3: 0}
        stored(intake, talk, 3)
        talk.release()


def test_a_request_without_contexts_is_answered(intake: Intake) -> None:
    with talking(intake.port, request()) as talk:
        assert (talk.answer.kind, talk.answer.results) == (ASSOCIATE_AC, {})
        talk.release()


def test_uids_padded_with_a_null_are_the_uids(intake: Intake) -> None:
    with talking(intake.port, request(context(1, CT + "\0", [EXPLICIT + "\0"]))) as talk:
        assert talk.answer.results == {1: 0}
        stored(intake, talk, 1)
        talk.release()


# -- sizes


@pytest.mark.parametrize("theirs", [128, 4095, 4096, 65535, 2**32 - 1, 0])
def test_a_peers_maximum_is_kept_whatever_it_is(intake: Intake, theirs: int) -> None:
    with talking(intake.port, request(context(1), context(3, VERIFICATION), max_pdu=theirs)) as talk:
        stored(intake, talk, 1)
        assert talk.echo(3) == 0x0000
        talk.release()


@pytest.mark.parametrize("ours", [4096, 65535, 0])
@pytest.mark.parametrize("reader", ["stream", "plain"])
def test_our_maximum_is_told_and_served_with_pdus_of_every_size(tmp_path: Path, ours: int, reader: str) -> None:
    given_config = config(node={"max_pdu": ours}, intake={"reader": reader})
    with running_intake(tmp_path, given_config) as intake, talking(intake.port, request(context(1))) as talk:
        told = 16_777_216 if (reader, ours) == ("plain", 0) else ours  # it collects each PDU
        assert talk.answer.user[0x51] == struct.pack(">L", told)
        for pdu in (7, 4096, 65535):
            stored(intake, talk, 1, size=1000 if pdu == 7 else 200_000, pdu=min(pdu, ours or pdu))
        if not ours:
            stored(intake, talk, 1, size=3_000_000, pdu=4_000_000)
        talk.release()


# -- DCMTK


needs_dcmtk = pytest.mark.skipif(not shutil.which("storescu"), reason="DCMTK is not installed")
Options = Callable[[Path], tuple[str, ...]]


def from_file(flag: str) -> Options:
    def options(folder: Path) -> tuple[str, ...]:
        (folder / "credential").write_bytes(b"eyJhbGciOiJub25lIn0.e30.")
        return flag, str(folder / "credential")

    return options


DCMTK: dict[str, Options] = {
    "PDUs of 4096 bytes": lambda _: ("-pdu", "4096", "--max-send-pdu", "4096"),
    "PDUs of 131072 bytes": lambda _: ("-pdu", "131072"),
    "a user": lambda _: ("--user", "somebody"),
    "a user who asks for a response": lambda _: ("--user", "somebody", "--pos-response"),
    "a password and a response": lambda _: ("--user", "somebody", "--password", "secret", "--pos-response"),
    "an empty password": lambda _: ("--user", "somebody", "--empty-password"),
    "Kerberos": from_file("--kerberos"),
    "SAML": from_file("--saml"),
    "JWT": from_file("--jwt"),
    "every syntax that it can propose": lambda _: ("--propose-lossless", "--required"),
}


@needs_dcmtk
@pytest.mark.parametrize("case", DCMTK)
def test_storescu_stores_with(tmp_path: Path, intake: Intake, case: str) -> None:
    (path,) = small_ct(tmp_path, slices=1)
    here = ("-aet", "PACS", "-aec", "SYNPET", "127.0.0.1", str(intake.port))
    command = ["storescu", *DCMTK[case](tmp_path), *here, str(path)]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert said.returncode == 0, said.stderr
    assert any(kept.name == f"{dcmread(path).SOPInstanceUID}.dcm" for kept in intake.spool.incoming())
