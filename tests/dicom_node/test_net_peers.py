"""Who is let in."""

from __future__ import annotations

import tomllib

import pytest

from dicom_node.config import Config, NodeConfig, PeerConfig
from dicom_node.net.associations import AssociationRegistry, make_token, sender_of
from dicom_node.net.peers import (
    Admission,
    address_allowed,
    addresses_of,
    admit,
    calls_from_a_peer,
    is_asked,
    lines_to_admit,
    places_of,
    plain_address,
    shown,
)
from dicom_node.net.scp import Limits
from dicom_node.net.status import Rejection

PEERS = (
    PeerConfig(name="pacs", ae_title="PACS", allowed_addresses=("any",)),
    PeerConfig(name="near", ae_title="NEAR", allowed_addresses=("10.1.0.0/16", "192.168.0.7")),
    PeerConfig(name="watch", ae_title="WATCH", host="10.1.2.3", may=("echo",)),
    PeerConfig(name="near-too", ae_title="NEAR", allowed_addresses=("2001:db8::/32",), may=("echo",)),
)

ADDRESSES = ("10.1.2.3", "10.9.9.9", "127.0.0.1", "2001:db8::5", "fe80::1%2")


def ask(calling: str, address: str = "10.1.2.3", called: str = "SYNPET", **node: object) -> Admission | Rejection:
    return admit(NodeConfig.model_validate(node), PEERS, calling_ae=calling, called_ae=called, address=address)


def test_a_peer_that_must_use_tls_is_refused_in_the_clear() -> None:
    peers = (PeerConfig(name="pacs", ae_title="PACS", must_call_by_tls=True),)
    asked = {"calling_ae": "PACS", "called_ae": "SYNPET", "address": "127.0.0.1"}
    refused = admit(NodeConfig(), peers, **asked)
    assert isinstance(refused, Rejection)
    assert refused.code == "tls_required"
    assert isinstance(admit(NodeConfig(), peers, **asked, by_tls=True), Admission)


def test_nobody_can_be_asked_for_tls_where_there_is_none() -> None:
    with pytest.raises(ValueError, match="must_call_by_tls"):
        Config.model_validate({"peers": [{"name": "pacs", "ae_title": "PACS", "must_call_by_tls": True}]})


@pytest.mark.parametrize(
    ("calling", "address", "called", "code", "diagnostic"),
    [
        ("PACS", "10.1.2.3", "OTHER", "called_ae_unknown", 7),
        ("STRANGER", "10.1.2.3", "SYNPET", "calling_ae_unknown", 3),
        ("NEAR", "10.2.2.3", "SYNPET", "address_not_allowed", 3),
        ("NEAR", "no address", "SYNPET", "address_not_allowed", 3),
        ("WATCH", "10.1.2.4", "SYNPET", "address_not_allowed", 3),
        ("WATCH", "127.0.0.1", "SYNPET", "address_not_allowed", 3),
        ("", "10.1.2.3", "SYNPET", "calling_ae_unknown", 3),
        ("pacs", "10.1.2.3", "SYNPET", "calling_ae_unknown", 3),
    ],
)
def test_a_refusal_has_the_standards_reason(
    calling: str, address: str, called: str, code: str, diagnostic: int
) -> None:
    answer = ask(calling, address, called)
    assert isinstance(answer, Rejection)
    assert (answer.code, answer.result, answer.source, answer.diagnostic) == (code, 1, 1, diagnostic)


@pytest.mark.parametrize(
    ("calling", "address", "asked"),
    [
        ("ARCHIVE", "10.9.9.9", True),
        ("ARCHIVE_REPORTS ", "10.1.2.3", True),  # some report under another AE title
        ("ARCHIVE_REPORTS", "::ffff:10.1.2.3", True),
        ("NEAR", "10.1.2.4", False),
        ("PACS", "10.1.2.4", False),  # a destination that is not asked for commitment
    ],
)
def test_an_archive_that_we_ask_is_known_by_its_title_or_its_address(calling: str, address: str, asked: bool) -> None:
    peers = [
        {"name": "archive", "ae_title": "ARCHIVE", "host": "10.1.2.3"},
        {"name": "pacs", "ae_title": "PACS", "host": "10.1.2.4"},
        {"name": "near", "ae_title": "NEAR", "host": "10.1.2.4"},
    ]
    destinations = [{"name": "a", "peer": "archive", "commitment": True}, {"name": "p", "peer": "pacs"}]
    assert is_asked(Config.model_validate({"peers": peers, "destinations": destinations}), calling, address) is asked


def test_a_title_in_another_case_is_told_as_that_and_not_offered_as_a_new_peer() -> None:
    answer = ask("pacs")
    assert isinstance(answer, Rejection)
    assert answer.text == "'pacs' at '10.1.2.3': differs from peer pacs (PACS) only in case; correct the sender"
    assert answer.config_lines == ()


@pytest.mark.parametrize(
    ("calling", "address", "peer", "store", "echo"),
    [
        ("PACS", "10.9.9.9", "pacs", True, True),
        ("PACS ", "10.9.9.9", "pacs", True, True),
        ("NEAR", "10.1.2.3", "near", True, True),
        ("NEAR", "::ffff:192.168.0.7", "near", True, True),
        ("NEAR", "2001:db8::5", "near-too", False, True),
        ("WATCH", "10.1.2.3", "watch", False, True),
        ("WATCH", "::ffff:10.1.2.3", "watch", False, True),
    ],
)
def test_a_known_peer_may_what_its_table_says(calling: str, address: str, peer: str, store: bool, echo: bool) -> None:
    assert ask(calling, address) == Admission(peer=peer, may_store=store, may_echo=echo, max_associations=24)


@pytest.mark.parametrize(
    ("keys", "open_to"),
    [
        ({"host": "10.1.2.3"}, {"10.1.2.3"}),
        ({"host": "::ffff:10.1.2.3"}, {"10.1.2.3"}),
        ({"host": "2001:db8::5"}, {"2001:db8::5"}),
        ({"host": "fe80::1%eth0"}, {"fe80::1%2"}),
        ({}, {"127.0.0.1"}),
        ({"host": "10.1.2.3", "allowed_addresses": ("10.9.0.0/16",)}, {"10.9.9.9"}),
        ({"host": "10.1.2.3", "allowed_addresses": ("10.1.2.3", "10.9.9.9")}, {"10.1.2.3", "10.9.9.9"}),
        ({"host": "10.1.2.3", "allowed_addresses": ("any",)}, set(ADDRESSES)),
        ({"host": "pacs.example"}, set(ADDRESSES)),
        ({"host": "pacs.example", "allowed_addresses": ("10.1.2.3",)}, {"10.1.2.3"}),
    ],
)
def test_a_peer_may_call_from_its_addresses_or_else_from_its_host(keys: dict[str, object], open_to: set[str]) -> None:
    peer = PeerConfig.model_validate({"name": "pacs", "ae_title": "PACS", **keys})
    assert {one for one in ADDRESSES if address_allowed(peer, one)} == open_to


def test_any_address_stands_alone() -> None:
    with pytest.raises(ValueError, match="stands alone"):
        PeerConfig(name="pacs", ae_title="PACS", allowed_addresses=("any", "10.1.2.3"))


@pytest.mark.parametrize(
    ("keys", "address"),
    [
        ({"host": "10.1.2.3"}, "10.9.9.9"),
        ({"host": "10.1.2.3"}, "::ffff:10.9.9.9"),
        ({"allowed_addresses": ("10.1.0.0/16", "2001:db8::/32")}, "fe80::1%2"),
    ],
)
def test_a_peer_at_a_foreign_address_is_told_with_the_line_that_lets_it_in(
    keys: dict[str, object], address: str
) -> None:
    asked = {"calling_ae": "PACS", "called_ae": "SYNPET", "address": address}
    table = {"name": "pacs", "ae_title": "PACS", **keys}
    refused = admit(NodeConfig(), [PeerConfig.model_validate(table)], **asked)
    assert isinstance(refused, Rejection)
    assert plain_address(address) in refused.text
    assert "the peer pacs may call from 10.1." in refused.text
    mended = PeerConfig.model_validate(table | tomllib.loads("\n".join(refused.config_lines)))
    assert set(addresses_of(PeerConfig.model_validate(table))) < set(mended.allowed_addresses)
    assert isinstance(admit(NodeConfig(), [mended], **asked), Admission)


def test_strangers_are_welcome_only_where_the_configuration_says_so() -> None:
    assert isinstance(ask("STRANGER", unknown_peers="accept"), Admission)
    assert isinstance(ask("NEAR", "10.2.2.3", unknown_peers="accept"), Rejection)
    assert isinstance(ask("PACS", called="ANY", require_called_ae=False), Admission)


@pytest.mark.parametrize(
    ("title", "address"),
    [
        ("CT_99", "10.1.2.3"),
        ('"] may="', "2001:db8::5"),
        ("[[peers]]", "10.1.2.3"),
        ("PACS", "10.1.2.3"),
        ("===", "10.1.2.3"),
        ("a'b #c", "10.1.2.3"),
    ],
)
def test_the_lines_that_let_a_stranger_in_are_a_peers_table_of_just_that(title: str, address: str) -> None:
    lines = lines_to_admit(title, address, {"pacs", "pacs-2"})
    (table,) = Config.model_validate(tomllib.loads("\n".join(lines))).peers
    assert (table.ae_title, table.host, table.allowed_addresses) == (title, address, (address,))
    assert table.name not in ("pacs", "pacs-2")
    assert isinstance(admit(NodeConfig(), [table], calling_ae=title, called_ae="SYNPET", address=address), Admission)


@pytest.mark.parametrize(
    ("title", "address"), [("", "10.1.2.3"), ("A\nB", "10.1.2.3"), ("A\\B", "10.1.2.3"), ("A", "no address")]
)
def test_what_could_not_stand_in_a_configuration_is_not_offered_for_it(title: str, address: str) -> None:
    assert lines_to_admit(title, address, set()) == ()


def test_hostile_ae_titles_are_quoted() -> None:
    answer = ask("EVIL\nAE\x1b[2J", called="SYNPET")
    assert isinstance(answer, Rejection)
    assert "\n" not in answer.text
    assert "\x1b" not in answer.text
    assert shown("Ж\n") == r"'\u0416\n'"


@pytest.mark.parametrize(
    ("title", "address", "kept"),
    [
        ("PACS", "10.1.2.3", "10.1.2.3"),
        ("SIXTEEN_LETTERS_", "::ffff:10.1.2.3", "10.1.2.3"),
        ("A", "2001:db8::5", ""),
        ("B", "not an address", ""),
    ],
)
def test_a_token_is_short_hex_and_says_who_sent(title: str, address: str, kept: str) -> None:
    token = make_token(title, address)
    assert len(token) <= 64
    assert set(token) <= set("0123456789abcdef")
    assert sender_of(token) == (title, kept)
    assert make_token(title, address) != token


def test_a_peers_own_limit_leaves_the_others_their_places() -> None:
    registry = AssociationRegistry(limit=3, clock=lambda: 0.0)

    def opened(peer: str) -> str | None:
        return registry.open(calling_ae="X", address="10.1.2.3", peer=peer, peer_limit=1)

    first = opened("a")
    assert first is not None
    assert opened("a") is None
    assert opened("b") is not None
    registry.close(first)
    assert opened("a") is not None


@pytest.mark.parametrize(
    ("own", "may", "unknown", "in_all", "places"),
    [
        (0, ("store",), "reject", 32, 24),
        (0, ("store",), "reject", 4, 3),
        (0, ("store",), "reject", 2, 1),
        (0, ("store",), "reject", 1, 1),
        (0, ("store",), "accept", 32, 12),
        (0, ("store",), "accept", 1, 1),
        (0, (), "reject", 32, 0),  # the other peer never calls
        (30, ("store",), "reject", 32, 30),
        (3, (), "reject", 32, 3),
    ],
)
def test_a_peer_without_a_limit_leaves_places_to_others_that_may_call(
    own: int, may: tuple[str, ...], unknown: str, in_all: int, places: int
) -> None:
    node = NodeConfig.model_validate({"max_associations": in_all, "unknown_peers": unknown})
    pacs = PeerConfig(name="pacs", ae_title="PACS", max_associations=own)
    other = PeerConfig.model_validate({"name": "other", "ae_title": "OTHER", "may": may})
    assert places_of(node, [pacs, other], pacs) == places
    assert places_of(node, [pacs], pacs) == own


@pytest.mark.parametrize(
    ("address", "known"),
    [
        ("10.1.2.3", True),  # in allowed_addresses
        ("::ffff:10.1.2.3", True),
        ("10.2.2.3", False),
        ("10.9.9.9", False),  # the host of a peer that calls from elsewhere
        ("10.9.9.8", True),  # the host of a peer without allowed_addresses
        ("10.9.9.7", True),  # that of one that may call from any
        ("10.9.9.6", False),
        ("2001:db8::1", True),
        ("2001:db9::1", False),
        ("127.0.0.1", True),  # `dicom-node check`
        ("::1", True),
        ("10.0.0.1", True),  # the address that we listen on
        ("127.0.0.2", False),
        ("pacs.example", False),
        ("no address", False),
    ],
)
def test_a_peer_calls_from_its_allowed_addresses_or_else_from_its_host(address: str, known: bool) -> None:
    peers = (
        PeerConfig(name="near", ae_title="A", host="10.9.9.9", allowed_addresses=("10.1.0.0/16", "2001:db8::/32")),
        PeerConfig(name="far", ae_title="B", host="10.9.9.8"),
        PeerConfig(name="anywhere", ae_title="D", host="10.9.9.7", allowed_addresses=("any",)),
        PeerConfig(name="named", ae_title="C", host="archive.example"),
    )
    assert calls_from_a_peer(NodeConfig(host="10.0.0.1"), peers, address) is known


def test_connections_of_peers_and_of_strangers_are_counted_apart() -> None:
    limits = Limits(2, 0, lambda address: address == "10.1.2.3")
    assert limits.exceeded(["10.6.6.6", "10.6.6.7", "10.6.6.8", "10.1.2.3"], "10.1.2.3") == ""
    assert limits.exceeded(["10.1.2.3", "10.1.2.3", "10.6.6.6"], "10.6.6.7") == ""
    assert limits.exceeded(["10.6.6.6", "10.6.6.7"], "10.6.6.8").startswith("more than 2 connections of strangers")
    assert limits.exceeded(["10.1.2.3", "10.1.2.3"], "10.1.2.3").startswith("more than 2 connections of peers")


@pytest.mark.parametrize(("unknown", "peers", "kept"), [("accept", 1, 16), ("accept", 0, 0), ("reject", 1, 0)])
def test_places_are_kept_for_peers_where_strangers_are_let_in(unknown: str, peers: int, kept: int) -> None:
    tables = {"node": {"unknown_peers": unknown}, "peers": [{"name": "pacs", "ae_title": "PACS"}] * peers}
    assert Config.model_validate(tables).places_for_peers == kept


def test_a_foreign_folder_name_has_no_sender() -> None:
    assert sender_of("zz") == ("", "")
    assert sender_of("ab" * 27)[1] == ""


def test_plain_address_unwraps_ipv4_in_ipv6() -> None:
    assert plain_address("::ffff:127.0.0.1") == "127.0.0.1"


def test_the_registry_keeps_the_limit_and_gives_places_back() -> None:
    now = [0.0]
    registry = AssociationRegistry(limit=1, clock=lambda: now[0])
    token = registry.open(calling_ae="PACS", address="10.1.2.3", peer="pacs")
    assert token is not None
    assert registry.open(calling_ae="PACS", address="10.1.2.3", peer="pacs") is None
    registry.stored(token, 7)
    registry.dropped(token, "1.2")
    now[0] = 5.0
    assert registry.is_open(token, idle_limit_s=5)
    now[0] = 5.1
    assert not registry.is_open(token, idle_limit_s=5)
    closed = registry.close(token)
    assert closed is not None
    assert (closed.stored, closed.stored_bytes, closed.dropped.total()) == (1, 7, 1)
    assert registry.close(token) is None
    assert registry.open(calling_ae="PACS", address="10.1.2.3", peer="pacs") is not None


@pytest.mark.parametrize(
    ("address", "host", "admitted"),
    [
        ("127.0.0.1", "0.0.0.0", True),
        ("::1", "0.0.0.0", True),
        ("10.0.0.5", "10.0.0.5", True),
        ("10.0.0.9", "10.0.0.5", False),
        ("10.0.0.9", "0.0.0.0", False),
    ],
)
def test_our_own_title_is_for_check_and_doctor_of_this_machine_only(address: str, host: str, admitted: bool) -> None:
    node = NodeConfig(host=host)
    found = admit(node, (), calling_ae=node.ae_title, called_ae=node.ae_title, address=address)
    assert isinstance(found, Admission) is admitted
    if isinstance(found, Admission):
        assert (found.peer, found.may_store, found.may_echo) == ("", True, True)
