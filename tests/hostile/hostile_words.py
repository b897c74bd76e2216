"""What an ordinary sender says, to be mutated and said at the wrong moment, and what nobody means."""

from __future__ import annotations

import struct

from hostile_tools import CT, VERIFICATION
from raw_sender import (
    ABORT,
    RELEASE_RP,
    RELEASE_RQ,
    Message,
    associate_request,
    command,
    echo_message,
    p_data,
    store_message,
    us,
)

DATA = b"\x08\x00\x60\x00CS\x02\x00CT" + b"\x10\x00\x10\x00PN\x04\x00TEST"
REQUEST = associate_request([VERIFICATION, CT])
STORE = store_message(3, 1, CT, "1.2.3.4", DATA).in_pdus()
ECHO = echo_message(1, 2).in_pdus()
STORE_BEGUN = p_data(store_message(3, 1, CT, "1.2.3.4", DATA).pdvs()[0])
REPORT_BEGUN = Message(5, command(field=(0x0100, us(0x0100)), message=(0x0110, us(1)), data=(0x0800, us(1)))).in_pdus()
ACCEPT = b"\x02" + REQUEST[1:]
REJECT = b"\x03\x00\x00\x00\x00\x04\x00\x01\x01\x01"
PDUS = (REQUEST, ACCEPT, REJECT, STORE, ECHO, RELEASE_RQ, RELEASE_RP, ABORT)

# of the fragments: the bits of their message control header, the presentation context, the length
TINY = {
    "empty fragments of a command": (1, 3, 0),
    "fragments of a byte of a command": (1, 3, 1),
    "empty fragments of a data set": (0, 3, 0),
    "fragments of a byte of a data set": (0, 3, 1),
    "empty fragments of a data set that is no instance": (0, 5, 0),
    "fragments of a byte of a data set that is no instance": (0, 5, 1),
}


def next_to_nothing(kind: int, context_id: int, length: int) -> tuple[bytes, bytes]:
    """40,000 fragments of a message that never ends, and what it begins with."""
    fragment = struct.pack(">LBB", length + 2, context_id, kind) + bytes(length)
    begin = b"" if kind else STORE_BEGUN if context_id == 3 else REPORT_BEGUN
    return begin, p_data(fragment * 40_000)
