"""Who may do what here: a pure decision over `[node]` and `[[peers]]`."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address, ip_network
from itertools import chain, count

from pydantic import ValidationError

from dicom_node.config import ANY_ADDRESS, Config, NodeConfig, PeerConfig
from dicom_node.net.status import CALLED_AE_NOT_RECOGNIZED, CALLING_AE_NOT_RECOGNIZED, Rejection, rejection

_THIS_MACHINE = ("127.0.0.1", "::1")
_LEFT_TO_OTHERS = 4  # a peer without a limit of its own leaves the others every fourth place


@dataclass(frozen=True, kw_only=True, slots=True)
class Admission:
    """An association request that is let in. `peer` is the configured name, empty for an unknown caller.

    `max_associations` is the peer's own limit (`places_of`); of several tables that match it is the first's. `own`: it
    calls by our own AE title, from this machine.
    """

    peer: str
    may_store: bool
    may_echo: bool
    max_associations: int = 0
    own: bool = False


def shown(text: str) -> str:
    """A peer's text as one ASCII line in quotes: no line break or control character reaches a log or the ledger."""
    return ascii(text[:64])


def plain_address(address: str) -> str:
    """The IP address without the IPv4-in-IPv6 wrapping of a dual-stack socket; other text is returned unchanged."""
    try:
        parsed = ip_address(address)
    except ValueError:
        return address
    if isinstance(parsed, IPv6Address) and parsed.ipv4_mapped:
        return str(parsed.ipv4_mapped)
    return str(parsed)


def is_loopback(address: str) -> bool:
    """True for this machine's own loopback addresses."""
    try:
        return ip_address(plain_address(address)).is_loopback
    except ValueError:
        return False


def is_own(node: NodeConfig, address: str) -> bool:
    """True for an address that only this machine calls us from: loopback, or the one address that we listen on."""
    return is_loopback(address) or plain_address(address) == plain_address(node.host)


def addresses_of(peer: PeerConfig) -> tuple[str, ...]:
    """The addresses and networks that a peer may call from: `allowed_addresses`, or else its `host`; none: any.

    A host name is not looked up: whether a caller is let in must not wait for a name server, nor hang on its word.
    """
    if peer.allowed_addresses:
        return () if ANY_ADDRESS in peer.allowed_addresses else peer.allowed_addresses
    return _address_in(peer.host)


def _address_in(host: str) -> tuple[str, ...]:
    """The host as the one address that it is, without a zone (RFC 4007); none where it is a name."""
    try:
        return (plain_address(str(ip_address(host.partition("%")[0]))),)
    except ValueError:
        return ()


def address_allowed(peer: PeerConfig, address: str) -> bool:
    """True when the peer may call from any address, or `address` is one of its own or lies in one of its networks."""
    addresses = addresses_of(peer)
    return not addresses or _lies_in(address, addresses)


def _lies_in(address: str, networks: Collection[str]) -> bool:
    try:
        source = ip_address(plain_address(address))
    except ValueError:
        return False
    return any(source in ip_network(one, strict=False) for one in networks)


def calls_from_a_peer(node: NodeConfig, peers: Sequence[PeerConfig], address: str) -> bool:
    """True for an address that a peer calls from: where it may call from any, its `host` alone.

    This machine's own address counts, too: `dicom-node check`, which may be what a container's health is judged by.
    """
    source = plain_address(address)
    own = (*_THIS_MACHINE, plain_address(node.host))
    return source in own or any(_lies_in(source, addresses_of(peer) or _address_in(peer.host)) for peer in peers)


def places_of(node: NodeConfig, peers: Sequence[PeerConfig], peer: PeerConfig) -> int:
    """How many associations a peer may have at once; 0: as many as the node.

    Without a `max_associations` of its own it leaves a quarter to the other peers: one that opens associations and
    forgets them must not lock them out.
    """
    if peer.max_associations or not any(one.may for one in peers if one.name != peer.name):
        return peer.max_associations
    together = node.associations_of_peers
    return max(1, together - max(1, together // _LEFT_TO_OTHERS))


def peer_that_may(peers: Sequence[PeerConfig], what: str, *, calling_ae: str, address: str) -> PeerConfig | None:
    """The first peer of this AE title and address that may do `what`, or None."""
    named = (peer for peer in peers if peer.ae_title == calling_ae.strip() and what in peer.may)
    return next((peer for peer in named if address_allowed(peer, address)), None)


def is_asked(config: Config, calling_ae: str, address: str) -> bool:
    """Whether a caller is an archive that we ask for Storage Commitment, by its AE title or by where it calls from."""
    archives = [config.peer(one.peer) for one in config.destinations if one.commitment]
    if calling_ae.strip() in {archive.ae_title for archive in archives}:
        return True
    return any(_lies_in(address, addresses_of(archive)) for archive in archives)


def lines_to_admit(calling_ae: str, address: str, names: Collection[str]) -> tuple[str, ...]:
    """The lines of config.toml that make a stranger a peer; none where its AE title could not stand there.

    What the stranger said of itself is quoted: an AE title may hold quotes and brackets, and no line break.
    """
    wanted = re.sub(r"[^a-z0-9_-]+", "-", calling_ae.lower()).strip("-_") or "peer"
    name = next(one for one in chain((wanted,), (f"{wanted}-{n}" for n in count(2))) if one not in names)
    try:
        peer = PeerConfig(name=name, ae_title=calling_ae, allowed_addresses=(address,))
    except ValidationError:
        return ()
    return (
        "[[peers]]",
        f"name = {json.dumps(peer.name)}",
        f"ae_title = {json.dumps(peer.ae_title)}",
        f"host = {json.dumps(address)}",
        f"port = {peer.port}",
        'may = ["store", "echo"]',
        f"allowed_addresses = {json.dumps(list(peer.allowed_addresses))}",
    )


def lines_to_allow(peer: PeerConfig, address: str) -> tuple[str, ...]:
    """The lines of config.toml that let a peer call from `address` too; none where that is no address."""
    addresses = [*addresses_of(peer), *_address_in(address)]
    if len(addresses) == len(addresses_of(peer)):
        return ()
    return (f"# in the table of the peer {json.dumps(peer.name)}:", f"allowed_addresses = {json.dumps(addresses)}")


def admit(
    node: NodeConfig,
    peers: Sequence[PeerConfig],
    *,
    calling_ae: str,
    called_ae: str,
    address: str,
    by_tls: bool = False,
) -> Admission | Rejection:
    """Decide on an association request; AE titles are compared without outer spaces (PS3.5 table 6.2-1).

    Several peers may share an AE title from different addresses: what any of them may, the caller may.
    """
    calling, called = calling_ae.strip(), called_ae.strip()
    if node.require_called_ae and called != node.ae_title:
        return rejection(
            "called_ae_unknown",
            CALLED_AE_NOT_RECOGNIZED,
            f"{shown(calling)} at {shown(address)} called {shown(called)}: this node is {node.ae_title!r}",
        )
    if calling == node.ae_title and is_own(node, address):  # `dicom-node check` and `doctor`, whose studies are tests
        return Admission(peer="", may_store=True, may_echo=True, own=True)
    titled = [peer for peer in peers if peer.ae_title == calling]
    placed = [peer for peer in titled if address_allowed(peer, address)]
    matching = [peer for peer in placed if by_tls or not peer.must_call_by_tls]
    if matching:
        return Admission(
            peer=matching[0].name,
            may_store=any("store" in peer.may for peer in matching),
            may_echo=any("echo" in peer.may for peer in matching),
            max_associations=places_of(node, peers, matching[0]),
        )
    if placed:
        return rejection(
            "tls_required",
            CALLING_AE_NOT_RECOGNIZED,
            f"{shown(calling)} at {shown(address)} called without TLS: must_call_by_tls",
        )
    if titled:  # a known title from a foreign address is refused even where strangers are welcome
        return rejection(
            "address_not_allowed",
            CALLING_AE_NOT_RECOGNIZED,
            f"{shown(calling)} at {shown(address)}: the peer {titled[0].name} may call from "
            f"{', '.join(addresses_of(titled[0]))} alone",
            lines_to_allow(titled[0], address),
        )
    if node.unknown_peers == "reject":
        meant = next((peer for peer in peers if peer.ae_title.casefold() == calling.casefold()), None)
        if meant is not None:  # no lines for config.toml: a second peer would hide what is wrong
            text = f"differs from peer {meant.name} ({meant.ae_title}) only in case; correct the sender"
            return rejection(
                "calling_ae_unknown", CALLING_AE_NOT_RECOGNIZED, f"{shown(calling)} at {shown(address)}: {text}"
            )
        return rejection(
            "calling_ae_unknown",
            CALLING_AE_NOT_RECOGNIZED,
            f"{shown(calling)} at {shown(address)}: no peer has this AE title",
            lines_to_admit(calling, plain_address(address), {peer.name for peer in peers}),
        )
    return Admission(peer="", may_store=True, may_echo=True)
