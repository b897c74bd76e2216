"""What becomes of a delivery after one attempt to send it: pure rules, walked by tables in the tests."""

from __future__ import annotations

from dataclasses import dataclass
from math import nextafter

from dicom_node.config import DestinationConfig
from dicom_node.net.scu import SendOutcome, is_stored
from dicom_node.retry import OUTAGE_CODES, UNANSWERED_CODES, outage_delay_s, retry_delay_s
from storage.records import Delivery, DeliveryState

# A destination that refuses these for good does not fail the job
OPTIONAL_KINDS = frozenset({"mip", "seg", "uncertainty", "sr", "gsps", "pcps", "rejection"})
CLASS_REFUSED = frozenset({"no_presentation_context", "sop_class_refused"})  # by C-STORE, by STOW-RS
LOUD_AFTER_S = 3600.0  # an outage that lasts longer is an error in the log, at each attempt
CLASS_NOT_SUPPORTED = "0x0122"  # PS3.7 annex C


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What becomes of a delivery after one attempt."""

    state: DeliveryState
    code: str = ""
    text: str = ""
    retry_in_s: float | None = None
    outage: bool = False  # the destination was down: the attempt does not count


def settle(
    delivery: Delivery,
    outcome: SendOutcome,
    stored: int,
    destination: DestinationConfig,
    *,
    failing_s: float = 0.0,
    others_arrive: bool = False,
) -> Verdict:
    """SENT when every instance is with the peer; else PENDING again, FAILED, or CANCELLED for an optional object.

    `stored` counts over all attempts. Rules, in this order: whole; refused for good; told to stop (does not count
    as an attempt that failed); attempts used up, or days of an outage; again after a growing pause. `failing_s` says
    for how many seconds nothing more has arrived. An attempt that finds the destination down is none of its
    `max_attempts`: a PACS that is gone for a night must not cost every result of that night. Where `others_arrive`
    meanwhile, a destination that leaves this one unanswered is not down: its attempts count.
    """
    if outcome.ok and stored == delivery.instances:
        told = f"{stored} of {delivery.instances} instances accepted by {destination.name}; {outcome.note}"
        return Verdict(state=DeliveryState.SENT, text=told if outcome.note else "")
    if outcome.ok:
        text = f"{stored} of {delivery.instances} instances were in the outbox: the result is not whole"
        return Verdict(state=DeliveryState.FAILED, code="result_incomplete", text=text)
    if outcome.permanent and delivery.kind in OPTIONAL_KINDS and _of_a_class_refused(outcome):
        text = f"skipped, it is optional: {outcome.text}"
        return Verdict(state=DeliveryState.CANCELLED, code="optional_refused", text=text)
    if outcome.permanent:
        return Verdict(state=DeliveryState.FAILED, code=outcome.code, text=outcome.text)
    if outcome.code == "interrupted":
        return Verdict(state=DeliveryState.PENDING, code=outcome.code, text=outcome.text, retry_in_s=0.0)
    pauses = {"first_s": destination.first_retry_s, "longest_s": destination.max_retry_s}
    outage = outcome.code in OUTAGE_CODES and not (others_arrive and outcome.code in UNANSWERED_CODES)
    if outage:
        if gave_up := over(failing_s, destination):
            return Verdict(state=DeliveryState.FAILED, code=outcome.code, text=f"{outcome.text}; {gave_up}")
        pause = outage_delay_s(failing_s, **pauses)
        text = outage_text(outcome.text, failing_s, destination)
    else:
        tries = delivery.attempts - delivery.outages
        if tries >= destination.max_attempts:
            text = f"{outcome.text}; given up after {tries} attempts"
            return Verdict(state=DeliveryState.FAILED, code=outcome.code, text=text)
        pause, text = retry_delay_s(max(tries, 1), **pauses), outcome.text
    if outcome.retry_after_s is not None:
        pause = max(pause, min(outcome.retry_after_s, destination.max_retry_s))
    return Verdict(state=DeliveryState.PENDING, code=outcome.code, text=text, retry_in_s=pause, outage=outage)


def over(failing_s: float, destination: DestinationConfig) -> str:
    """What to say when an outage has lasted too long; empty while it has not."""
    if failing_s < _give_up_s(destination):
        return ""
    return f"given up after {failing_s / 86400:.1f} days (give_up_after_days)"


def outage_s(lasted_s: float, destination: DestinationConfig, *, trusted: bool) -> float:
    """How long an outage has lasted, in seconds: short of its end by `over` while the clock is not trusted."""
    return lasted_s if trusted else min(lasted_s, nextafter(_give_up_s(destination), 0.0))


def _give_up_s(destination: DestinationConfig) -> float:
    return destination.give_up_after_days * 86400


def outage_text(text: str, failing_s: float, destination: DestinationConfig) -> str:
    """With how long it has lasted, once that is worth a person's attention."""
    if failing_s < LOUD_AFTER_S:
        return text
    hours, days = failing_s / 3600, destination.give_up_after_days
    return f"{text}; for {hours:.1f} hours now, it is tried for {days:g} days"


def _of_a_class_refused(outcome: SendOutcome) -> bool:
    """Refused because the destination does not take the class, in the negotiation or by the status."""
    bad = {status for status in outcome.statuses.values() if not is_stored(status)}
    return outcome.code in CLASS_REFUSED or bad == {CLASS_NOT_SUPPORTED}


def missing(delivery: Delivery) -> frozenset[str] | None:
    """The SOP Instance UIDs that earlier attempts left unsent; None when all have to be sent.

    The ledger keeps the statuses that were not a success. They are trusted only if they account for every
    instance that is not counted as sent.
    """
    left = frozenset(uid for uid, status in delivery.statuses.items() if not is_stored(status))
    if delivery.sent and left and delivery.sent + len(left) == delivery.instances:
        return left
    return None


def stored_before(delivery: Delivery) -> dict[str, str]:
    """The warnings of earlier attempts that a later one, which sends only the rest, must not forget."""
    if missing(delivery) is None:
        return {}
    return {uid: status for uid, status in delivery.statuses.items() if is_stored(status)}
