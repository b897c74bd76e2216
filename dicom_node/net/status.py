"""DIMSE statuses in one table: what we answer with, and what a peer's answer to a C-STORE means to us.

Sources: PS3.7 annex C (general statuses), PS3.4 table B.2-1 (Storage Service Class).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from types import MappingProxyType


class Status(IntEnum):
    """The statuses that we answer with; ANSWERS says when."""

    SUCCESS = 0x0000
    PROCESSING_FAILURE = 0x0110
    NO_SUCH_INSTANCE = 0x0112
    NO_SUCH_EVENT_TYPE = 0x0113
    INVALID_ARGUMENT = 0x0115
    NO_SUCH_ACTION = 0x0123
    NOT_AUTHORIZED = 0x0124
    RESOURCE_LIMITATION = 0x0213
    OUT_OF_RESOURCES = 0xA700
    DATA_SET_MISMATCH = 0xA900
    CANNOT_UNDERSTAND = 0xC000
    UNABLE_TO_PROCESS = 0xC001


ANSWERS: Mapping[Status, str] = MappingProxyType(
    {
        Status.SUCCESS: "C-STORE: the instance is durable, or of a class that is not kept; "
        "N-EVENT-REPORT, N-ACTION: it is durable",
        Status.PROCESSING_FAILURE: "N-EVENT-REPORT: it could not be kept, send it again; N-ACTION: so, or its "
        "Transaction UID is that of another request",
        Status.NO_SUCH_INSTANCE: "N-ACTION: it is not for the well-known instance of the Push Model",
        Status.NO_SUCH_EVENT_TYPE: "N-EVENT-REPORT: the Event Type ID is neither 1 nor 2",
        Status.INVALID_ARGUMENT: "N-EVENT-REPORT: it cannot be read, or its Transaction UID is not one of ours; "
        "N-ACTION: it cannot be read, or holds what is no UID",
        Status.NO_SUCH_ACTION: "N-ACTION: the Action Type ID is not 1",
        Status.NOT_AUTHORIZED: "N-ACTION: the peer may not ask for commitment",
        Status.RESOURCE_LIMITATION: "N-ACTION: no room, or too many instances or requests; nothing was kept",
        Status.OUT_OF_RESOURCES: "C-STORE: no room on disk; nothing was kept, send it again later",
        Status.DATA_SET_MISMATCH: "C-STORE: the SOP Class UID is not the one of the presentation context",
        Status.CANNOT_UNDERSTAND: "C-STORE: there is no data set, or the SOP Instance UID is none",
        Status.UNABLE_TO_PROCESS: "C-STORE: an error inside the node, which its log explains",
    }
)


class Outcome(StrEnum):
    """What a sender does about a status."""

    OK = "ok"
    TRANSIENT = "transient"
    PERMANENT = "permanent"


@dataclass(frozen=True, kw_only=True, slots=True)
class Meaning:
    """A range of statuses (both ends included) and what it means."""

    first: int
    last: int
    outcome: Outcome
    text: str


MEANINGS: tuple[Meaning, ...] = (
    Meaning(first=0x0000, last=0x0000, outcome=Outcome.OK, text="Success"),
    Meaning(first=0x0107, last=0x0107, outcome=Outcome.OK, text="Attribute List Error (stored)"),
    Meaning(first=0x0110, last=0x0110, outcome=Outcome.TRANSIENT, text="Processing Failure"),
    # one UID never has two contents here, so the instance that the peer already holds is ours
    Meaning(first=0x0111, last=0x0111, outcome=Outcome.OK, text="Duplicate SOP Instance (already there)"),
    Meaning(first=0x0112, last=0x0112, outcome=Outcome.PERMANENT, text="No Such SOP Instance"),
    Meaning(first=0x0113, last=0x0113, outcome=Outcome.PERMANENT, text="No Such Event Type"),
    Meaning(first=0x0115, last=0x0115, outcome=Outcome.PERMANENT, text="Invalid Argument Value"),
    Meaning(first=0x0116, last=0x0116, outcome=Outcome.OK, text="Attribute Value Out of Range (stored)"),
    Meaning(first=0x0117, last=0x0117, outcome=Outcome.PERMANENT, text="Invalid Object Instance"),
    Meaning(first=0x0118, last=0x0118, outcome=Outcome.PERMANENT, text="No Such SOP Class"),
    Meaning(first=0x0119, last=0x0119, outcome=Outcome.PERMANENT, text="Class-Instance Conflict"),
    Meaning(first=0x0122, last=0x0122, outcome=Outcome.PERMANENT, text="SOP Class Not Supported"),
    Meaning(first=0x0123, last=0x0123, outcome=Outcome.PERMANENT, text="No Such Action"),
    Meaning(first=0x0124, last=0x0124, outcome=Outcome.PERMANENT, text="Not Authorized"),
    Meaning(first=0x0210, last=0x0210, outcome=Outcome.TRANSIENT, text="Duplicate Invocation"),
    Meaning(first=0x0211, last=0x0212, outcome=Outcome.PERMANENT, text="Operation Not Recognized"),
    Meaning(first=0x0213, last=0x0213, outcome=Outcome.TRANSIENT, text="Resource Limitation"),
    Meaning(first=0xA700, last=0xA7FF, outcome=Outcome.TRANSIENT, text="Refused: Out of Resources"),
    Meaning(first=0xA900, last=0xA9FF, outcome=Outcome.PERMANENT, text="Data Set Does Not Match SOP Class"),
    Meaning(first=0xB000, last=0xB000, outcome=Outcome.OK, text="Coercion of Data Elements (stored)"),
    Meaning(first=0xB001, last=0xB005, outcome=Outcome.OK, text="Warning (stored)"),  # PS3.7 annex C: Bxxx is a warning
    Meaning(first=0xB006, last=0xB006, outcome=Outcome.OK, text="Elements Discarded (stored)"),
    Meaning(first=0xB007, last=0xB007, outcome=Outcome.OK, text="Data Set Does Not Match SOP Class (stored)"),
    Meaning(first=0xB008, last=0xBFFF, outcome=Outcome.OK, text="Warning (stored)"),
    Meaning(first=0xC000, last=0xCFFF, outcome=Outcome.PERMANENT, text="Cannot Understand"),
    Meaning(first=0xFE00, last=0xFE00, outcome=Outcome.TRANSIENT, text="Cancelled"),
)
_UNKNOWN = Meaning(first=0, last=0xFFFF, outcome=Outcome.PERMANENT, text="Unknown status")


def meaning(status: int) -> Meaning:
    """The row of the table for `status`; a status that no table knows is permanent: an operator looks at it."""
    return next((row for row in MEANINGS if row.first <= status <= row.last), _UNKNOWN)


def classify(status: int) -> Outcome:
    """OK (the peer has the instance), TRANSIENT (send again later) or PERMANENT (an operator's matter)."""
    return meaning(status).outcome


def status_text(status: int) -> str:
    """`0xA700 Refused: Out of Resources`, for logs and the ledger."""
    return f"0x{status:04X} {meaning(status).text}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Rejection:
    """An A-ASSOCIATE-RJ (PS3.8 table 9-21) with our reason code and a sentence for the log and the ledger.

    `config_lines` are what an administrator adds to config.toml to let the caller in.
    """

    code: str
    result: int  # 1 permanent, 2 transient
    source: int  # 1 service user, 2 ACSE, 3 presentation
    diagnostic: int
    text: str
    config_lines: tuple[str, ...] = ()


CALLED_AE_NOT_RECOGNIZED = (1, 1, 7)
CALLING_AE_NOT_RECOGNIZED = (1, 1, 3)
LOCAL_LIMIT_EXCEEDED = (2, 3, 2)
NO_REASON_TRANSIENT = (2, 2, 1)


def rejection(code: str, reason: tuple[int, int, int], text: str, config_lines: tuple[str, ...] = ()) -> Rejection:
    """Join our words with one of the standard's reasons above."""
    result, source, diagnostic = reason
    return Rejection(
        code=code, result=result, source=source, diagnostic=diagnostic, text=text, config_lines=config_lines
    )
