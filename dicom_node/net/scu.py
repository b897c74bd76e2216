"""The node as SCU: C-STORE a series over one association, and C-ECHO.

What happened is a value, never an exception: a delivery must be told what was sent before the trouble. Permanent
is what only an operator can mend (PS3.8 9.3.4 rejections of an AE title, no presentation context, a data set that
is refused); the rest is worth another try.

SendOutcome codes: "" (every instance was stored), connection_failed, association_rejected, association_aborted,
no_presentation_context, no_response, interrupted, instance_unreadable, instances_refused, instances_deferred, no_space.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

from pydicom.errors import InvalidDicomError
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import _config, build_context
from pynetdicom.association import Association
from pynetdicom.presentation import PresentationContext
from pynetdicom.sop_class import Verification  # type: ignore[attr-defined]

from dicom_node.config import PeerConfig
from dicom_node.net.compression import EXPLICIT, TRANSFER_SYNTAXES, compressed_file
from dicom_node.net.link import Link, RequestOutcome, Timeouts, Trouble, dimse_status, where
from dicom_node.net.part10 import Part10, read_part10, to_compress
from dicom_node.net.scp import IMPLEMENTATION_CLASS_UID
from dicom_node.net.sending import Sender, Way, opened
from dicom_node.net.status import Outcome, classify, status_text
from storage.errors import NoSpace

# A path that is given to `send_c_store` goes out as the bytes that it holds: same UID, same bytes.
_config.STORE_SEND_CHUNKED_DATASET = True

NOT_SENT = "not_sent"


@dataclass(frozen=True, kw_only=True, slots=True)
class SendOutcome(RequestOutcome):
    """What became of a series. `statuses`: SOP Instance UID to "0x0000", or a word, for every instance to be sent.

    Words: not_sent, no_response, no_presentation_context.
    """

    statuses: Mapping[str, str] = field(default_factory=dict)
    note: str = ""  # what an administrator should know although it is no trouble
    retry_after_s: float | None = None  # the destination asked not to be tried again before

    @property
    def stored(self) -> int:
        """How many instances the peer has."""
        return sum(is_stored(status) for status in self.statuses.values())


def is_stored(status: str) -> bool:
    """Whether an instance's status word says that the peer has it (success or a warning, PS3.4 B.2.3)."""
    return status.startswith("0x") and classify(int(status, 16)) is Outcome.OK


def send_series(
    files: Sequence[Path],
    peer: PeerConfig,
    *,
    calling_ae: str,
    timeouts: Timeouts | None = None,
    max_pdu: int = 262144,
    only: Collection[str] | None = None,
    transfer_syntax: str = EXPLICIT,
    sender: Way = "stream",
    on_sent: Callable[[int], None] = lambda _: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> SendOutcome:
    """C-STORE the files, in the order given, over one association; `only` names the SOP Instance UIDs still missing.

    The peer gets the bytes of the files; a peer that takes Implicit VR Little Endian only gets them transcoded.
    With a `transfer_syntax` of `compression.TRANSFER_SYNTAXES` images go out compressed where the peer accepts that,
    else as they are, and `note` says so. `sender` is `[node].sender`: whose code writes the requests.
    `on_sent(n)` is called after each response with the number of instances that the peer has. `should_stop` is
    asked before each instance; a stop is a transient outcome ("interrupted").
    """
    began = monotonic()
    try:
        everything = [read_part10(path) for path in files]
    except (OSError, InvalidDicomError) as error:
        text = f"a result file cannot be read: {type(error).__name__}"
        return SendOutcome(code="instance_unreadable", text=text, permanent=True)
    parts = [part for part in everything if only is None or part.sop_instance_uid in only]
    nothing_yet = {part.sop_instance_uid: NOT_SENT for part in parts}
    timeouts = timeouts or Timeouts()
    with Link(peer, storage_contexts(parts, transfer_syntax), calling_ae, timeouts, max_pdu) as link:
        if link.trouble:
            return _outcome(nothing_yet, link.trouble, began)
        note = _declined(link.assoc, parts, peer, transfer_syntax)
        accepted = {part.sop_class_uid: _accepted(link.assoc, part.sop_class_uid) for part in parts}
        with opened(sender, link.assoc, timeouts.dimse_s) as send:
            tried, trouble = _send_all(send, accepted, parts, transfer_syntax, on_sent, should_stop)
    statuses = {**nothing_yet, **tried}
    return _outcome(statuses, trouble or _refusal(statuses, peer), began, note)


@dataclass(frozen=True, kw_only=True, slots=True)
class EchoAnswer(RequestOutcome):
    """What came of a C-ECHO; no `implementation_class_uid` (PS3.7 annex D.3.3.2) where no association came to be."""

    implementation_class_uid: str = ""

    @property
    def is_this_software(self) -> bool:
        """Whether this product answered, of whatever version and on whatever machine."""
        return self.implementation_class_uid == IMPLEMENTATION_CLASS_UID


def echo(peer: PeerConfig, *, calling_ae: str, timeouts: Timeouts | None = None) -> EchoAnswer:
    """C-ECHO (PS3.4 annex A): does the peer answer, and does it know us, in which time, whose software, and why not?"""
    began, software = monotonic(), ""
    with Link(peer, [echo_context()], calling_ae, timeouts or Timeouts(), 16382) as link:
        trouble = link.trouble
        if not trouble:
            software = str(link.assoc.acceptor.implementation_class_uid or "")
            status = dimse_status(link.assoc.send_c_echo())
            if status is None:
                trouble = Trouble("no_response", "no response to C-ECHO", False)
            elif status != 0:
                trouble = Trouble("echo_refused", f"C-ECHO was answered with 0x{status:04X}", True)
    seconds = monotonic() - began
    return EchoAnswer.of(trouble, seconds=seconds, implementation_class_uid=software)


def echo_context() -> PresentationContext:
    """What we propose for C-ECHO."""
    return build_context(Verification, [ExplicitVRLittleEndian, ImplicitVRLittleEndian])


def storage_contexts(parts: Sequence[Part10], transfer_syntax: str = EXPLICIT) -> list[PresentationContext]:
    """One context per class and syntax, so that the peer's answer tells all it takes and not only its favorite."""
    wanted: dict[tuple[str, str], None] = {}
    for part in parts:
        if to_compress(part, transfer_syntax):
            wanted[part.sop_class_uid, str(TRANSFER_SYNTAXES[transfer_syntax])] = None
        wanted[part.sop_class_uid, part.transfer_syntax_uid] = None
        wanted[part.sop_class_uid, str(ImplicitVRLittleEndian)] = None
    return [build_context(sop_class, syntax) for sop_class, syntax in wanted]


def _accepted(assoc: Association, sop_class_uid: str) -> frozenset[str]:
    """The transfer syntaxes that the peer accepted for a class."""
    return frozenset(
        str(context.transfer_syntax[0])
        for context in assoc.accepted_contexts
        if context.abstract_syntax == sop_class_uid
    )


def _declined(assoc: Association, parts: Sequence[Part10], peer: PeerConfig, transfer_syntax: str) -> str:
    """The note that images go out uncompressed because the peer does not take the configured syntax; "" if it does."""
    wanted = {part.sop_class_uid for part in parts if to_compress(part, transfer_syntax)}
    accepted = {sop_class: _accepted(assoc, sop_class) for sop_class in wanted}
    if all(not syntaxes or TRANSFER_SYNTAXES[transfer_syntax] in syntaxes for syntaxes in accepted.values()):
        return ""
    return f"{where(peer)} does not accept {TRANSFER_SYNTAXES[transfer_syntax].name}: sent uncompressed"


def _send_all(
    send: Sender,
    accepted: Mapping[str, frozenset[str]],
    parts: Sequence[Part10],
    transfer_syntax: str,
    on_sent: Callable[[int], None],
    should_stop: Callable[[], bool],
) -> tuple[dict[str, str], Trouble | None]:
    """Send until the end or until the association is gone; what was not tried has no status."""
    statuses: dict[str, str] = {}
    stored = 0
    for part, message_id in zip(parts, _message_ids(), strict=False):
        if should_stop():
            return statuses, Trouble("interrupted", f"stopped after {stored} of {len(parts)} instances", False)
        if not send.is_open:
            return statuses, Trouble("association_aborted", _cut_short(stored, parts), False)
        try:
            word = _store(send, accepted[part.sop_class_uid], part, transfer_syntax, message_id)
        except NoSpace as error:
            return statuses, Trouble("no_space", f"no room for the compressed instances: {error}", False)
        statuses[part.sop_instance_uid] = word
        if word == "no_response":
            return statuses, Trouble("no_response", _cut_short(stored, parts), False)
        stored += is_stored(word)
        on_sent(stored)
    return statuses, None


def _cut_short(stored: int, parts: Sequence[Part10]) -> str:
    return f"the association ended after {stored} of {len(parts)} instances"


def _message_ids() -> Iterator[int]:
    """1..65535 over and over (PS3.7 9.1.1.1.1)."""
    while True:
        yield from range(1, 65536)


def _store(send: Sender, syntaxes: frozenset[str], part: Part10, transfer_syntax: str, message_id: int) -> str:
    """One C-STORE: the status as "0x0000", "no_presentation_context" or "no_response"."""
    if not syntaxes:
        return "no_presentation_context"
    if to_compress(part, transfer_syntax) and TRANSFER_SYNTAXES[transfer_syntax] in syntaxes:
        part = read_part10(compressed_file(part.path, transfer_syntax))
    try:
        status = send.store(part, message_id, convert=part.transfer_syntax_uid not in syntaxes)
    except ValueError:  # no convertible context
        return "no_presentation_context"
    return "no_response" if status is None else f"0x{status:04X}"


def _refusal(statuses: Mapping[str, str], peer: PeerConfig) -> Trouble | None:
    """Why a series that went through to its last instance is not stored whole; None when it is."""
    bad = [status for status in statuses.values() if not is_stored(status)]
    if not bad:
        return None
    kinds = ", ".join(f"{bad.count(status)} x {_meaning(status)}" for status in sorted(set(bad)))
    text = f"{where(peer)} refused {len(bad)} of {len(statuses)} instances: {kinds}"
    if "no_presentation_context" in bad:
        return Trouble("no_presentation_context", text, True)
    if any(classify(int(status, 16)) is Outcome.PERMANENT for status in bad):
        return Trouble("instances_refused", text, True)
    return Trouble("instances_deferred", text, False)


def _meaning(status: str) -> str:
    """A status word for a person: a number with its name in the standard."""
    return status_text(int(status, 16)) if status.startswith("0x") else status


def _outcome(statuses: Mapping[str, str], trouble: Trouble | None, began: float, note: str = "") -> SendOutcome:
    return SendOutcome.of(trouble, statuses=statuses, seconds=monotonic() - began, note=note)
