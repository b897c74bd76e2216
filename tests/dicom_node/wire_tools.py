"""One association over a raw socket, and everything that it left: for comparing the two readers."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from intake_tools import Intake, config, running_intake
from pydicom.uid import CTImageStorage, SecondaryCaptureImageStorage
from raw_sender import Message, RawSender

from dicom_node.net.associations import Association

VERIFICATION = "1.2.840.10008.1.1"
CONTEXTS = (str(CTImageStorage), str(SecondaryCaptureImageStorage), VERIFICATION)
CT, CAPTURE, ECHO = 1, 3, 5  # context IDs
READERS = ("stream", "plain")


@dataclass
class Outcome:
    """What an association left. Response PDUs are in the order of their messages."""

    responses: list[bytes] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    stored: int = 0
    stored_bytes: int = 0
    refused: dict[int, int] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    aborted: bool = False


class Wire:
    """An intake whose closed associations are kept for the test."""

    def __init__(self, intake: Intake) -> None:
        self.intake = intake
        self.closed: list[Association] = []
        close = intake.registry.close

        def remembered(token: str, *, aborted: bool = False) -> Association | None:
            association = close(token, aborted=aborted)
            if association is not None:
                self.closed.append(association)
            return association

        intake.registry.close = remembered  # type: ignore[method-assign]

    @contextlib.contextmanager
    def talk(self, *, max_pdu: int = 16384) -> Iterator[tuple[RawSender, Outcome]]:
        """An association; at the end it is released if the sender is still connected, and the outcome filled in."""
        self.closed.clear()
        outcome = Outcome()
        with RawSender(self.intake.port, CONTEXTS, max_pdu=max_pdu) as sender:
            yield sender, outcome
            if sender.socket.fileno() >= 0:
                sender.release()
        self.intake.wait(lambda: bool(self.closed))
        self._fill(outcome)

    def _fill(self, outcome: Outcome) -> None:
        (closed,) = self.closed
        folder = self.folder(closed.token)
        outcome.files = {path.name: path.read_bytes() for path in folder.glob("*")} if folder.is_dir() else {}
        shutil.rmtree(folder, ignore_errors=True)
        outcome.stored, outcome.stored_bytes = closed.stored, closed.stored_bytes
        outcome.refused, outcome.dropped, outcome.aborted = dict(closed.refused), dict(closed.dropped), closed.aborted

    def folder(self, token: str) -> Path:
        return self.intake.spool.root / "inbox" / "incoming" / token

    def in_turn(self, messages: Sequence[Message], encode: Callable[[Message], bytes] = Message.in_pdus) -> Outcome:
        """Each message when the one before is answered, as a decent sender does."""
        with self.talk() as (sender, outcome):
            for message in messages:
                sender.write(encode(message))
                outcome.responses.append(sender.pdu())
        return outcome

    def at_once(self, raw: bytes, n_responses: int, places: Sequence[int] = ()) -> Outcome:
        """All bytes without waiting for an answer, in segments that end at `places`."""
        with self.talk() as (sender, outcome):
            sender.write_in_pieces(raw, places)
            outcome.responses = sorted((sender.pdu() for _ in range(n_responses)), key=message_id_of)
        return outcome


def message_id_of(response: bytes) -> bytes:
    """Message ID Being Responded To, of any response."""
    at = response.index(b"\x00\x00\x20\x01\x02\x00\x00\x00") + 8
    return response[at : at + 2][::-1]


@contextlib.contextmanager
def wire(folder: Path, reader: str, **tables: object) -> Iterator[Wire]:
    intake = {"reader": reader, **tables.pop("intake", {})}  # type: ignore[dict-item]
    with running_intake(folder, config(intake=intake, **tables)) as running:
        yield Wire(running)
