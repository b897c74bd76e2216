"""An A-ASSOCIATE-RQ as pynetdicom can read it: what it would break on is left out or named unacceptable.

pynetdicom aborts an association for an item that it does not know, though the standard has such items ignored, and
its thread dies of a presentation context without a transfer syntax, which leaves the requestor without an answer.

A-ASSOCIATE-RQ   type, reserved, length, 68 bytes of titles and version, item...     PS3.8 section 9.3.2
item             type, reserved, length, value                                       PS3.8 sections 9.3.2.1 to 9.3.2.3
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from dicom_node.net.command import Malformed
from dicom_node.net.scp import VERIFICATION

ASSOCIATE_RQ = 0x01
MIN_PEER_PDU = 128  # bytes: less does not hold the longest response, and no peer means it

_PDU_HEADER = struct.Struct(">BxL")
_ITEM_HEADER = struct.Struct(">BxH")
_FIXED = 68  # protocol version, titles and reserved bytes between the PDU's header and its items

_APPLICATION, _CONTEXT, _USER = 0x10, 0x20, 0x50
_ABSTRACT, _TRANSFER = 0x30, 0x40
_MAX_LENGTH, _ASYNC, _ROLE, _VERSION_NAME = 0x51, 0x53, 0x54, 0x55
_EXTENDED, _COMMON_EXTENDED, _IDENTITY = 0x56, 0x57, 0x58
_CLASS_UID = 0x52

_MAX_VERSION_NAME = 16  # characters (PS3.7 annex D.3.3.2.3)
_IDENTITY_TYPES = range(1, 6)  # PS3.7 table D.3-14
_NO_SYNTAX = b"2.25.0"  # stands for the transfer syntax that a context lacks: nobody supports it


def readable_request(pdu: bytes) -> bytes:
    """The A-ASSOCIATE-RQ `pdu` without what pynetdicom cannot read; every presentation context stays answered.

    Left out: items and user items that are unknown (PS3.8 section 9.3.1: they are ignored) or whose length is not what
    their content says, user identities of a type that does not exist. A version name is cut to its 16 characters; no
    maximum length is an unlimited one. A presentation context that names no abstract or no transfer syntax is turned
    into one that is answered as not supported (PS3.8 table 9-18, result 4 or 3).

    Raises Malformed where the peer is to be told so by an A-ABORT: an item longer than the PDU, a context ID that is
    not odd, a maximum length too small for any response.
    """
    fixed, items = pdu[: _PDU_HEADER.size + _FIXED], pdu[_PDU_HEADER.size + _FIXED :]
    if len(fixed) < _PDU_HEADER.size + _FIXED:
        raise Malformed("an association request that ends before its items")
    kept, user = [], b""
    for kind, value in _items(items):
        if kind == _CONTEXT:
            kept.append(_item(kind, _context(value)))
        elif kind == _USER:
            user += value
        elif kind == _APPLICATION:
            kept.append(_item(kind, value))
    kept.append(_item(_USER, _user_information(user)))
    body = fixed[_PDU_HEADER.size :] + b"".join(kept)
    return _PDU_HEADER.pack(ASSOCIATE_RQ, len(body)) + body


def _items(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at < len(data):
        if at + _ITEM_HEADER.size > len(data):
            raise Malformed("an association request with half an item")
        kind, length = _ITEM_HEADER.unpack_from(data, at)
        at += _ITEM_HEADER.size
        if at + length > len(data):
            raise Malformed(f"an item of type 0x{kind:02X} claims {length} bytes, {len(data) - at} are there")
        yield kind, data[at : at + length]
        at += length


def _item(kind: int, value: bytes) -> bytes:
    return _ITEM_HEADER.pack(kind, len(value)) + value


def _context(value: bytes) -> bytes:
    """A presentation context with one abstract syntax and at least one transfer syntax (PS3.8 section 9.3.2.2)."""
    if len(value) < 4 or value[0] % 2 == 0:
        raise Malformed("a presentation context without an odd ID")
    found = [(kind, name) for kind, name in _items(value[4:]) if kind in (_ABSTRACT, _TRANSFER) and name.strip(b"\0 ")]
    abstract = [name for kind, name in found if kind == _ABSTRACT][:1]
    transfer = [name for kind, name in found if kind == _TRANSFER]
    if not abstract or not transfer:
        abstract, transfer = [VERIFICATION.encode("ascii")], [_NO_SYNTAX]
    return value[:4] + _item(_ABSTRACT, abstract[0]) + b"".join(_item(_TRANSFER, name) for name in transfer)


def _user_information(value: bytes) -> bytes:
    """The user items, with a maximum length: without one there is none (PS3.8 annex D.1.1)."""
    items = list(_user_items(value))
    if all(kind != _MAX_LENGTH for kind, _ in items):
        items.insert(0, (_MAX_LENGTH, bytes(4)))
    return b"".join(_item(kind, content) for kind, content in items)


def _user_items(value: bytes) -> Iterator[tuple[int, bytes]]:
    for kind, content in _items(value):
        if kind == _VERSION_NAME:
            content = content.decode("ascii", "replace").replace("\ufffd", "?")[:_MAX_VERSION_NAME].encode("ascii")
        if kind == _MAX_LENGTH and 0 < int.from_bytes(content, "big") < MIN_PEER_PDU:
            raise Malformed(f"a maximum length of {int.from_bytes(content, 'big')} bytes for what we send")
        if _fits(kind, content):
            yield kind, content


def _fits(kind: int, content: bytes) -> bool:
    """Whether a user item is known and as long as it says (PS3.8 annex D.1, PS3.7 annex D.3.3)."""
    if kind in (_CLASS_UID, _VERSION_NAME):
        return bool(content)
    if kind in (_MAX_LENGTH, _ASYNC):
        return len(content) == 4
    if kind == _IDENTITY:
        return len(content) > 2 and content[0] in _IDENTITY_TYPES and _after(content, 2, fields=2) == len(content)
    after_uid = _after(content, 0, fields=1)
    if kind == _ROLE:
        return after_uid + 2 == len(content)
    if kind == _EXTENDED:
        return 2 < after_uid <= len(content)
    if kind == _COMMON_EXTENDED:
        return after_uid > 2 and _related_fit(content, _after(content, after_uid, fields=1))
    return False


def _after(content: bytes, at: int, *, fields: int) -> int:
    """The place behind `fields` fields of two bytes of length and a value; beyond the end where they do not fit."""
    for _ in range(fields):
        at += 2 + int.from_bytes(content[at : at + 2], "big")
    return at


def _related_fit(content: bytes, at: int) -> bool:
    """The related general SOP classes of a common extended negotiation; they end with the item (PS3.7 D.3.3.6)."""
    end = _after(content, at, fields=1)
    at += 2
    while at < end:
        at = _after(content, at, fields=1)
    return at == end == len(content)
