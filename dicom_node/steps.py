"""Steps of a test of the whole node: each is a value with what was found, in which time, and what to do about it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from storage.errors import StorageError
from storage.records import Delivery, DeliveryState

POLL_S = 0.25


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One line of the report."""

    name: str
    ok: bool
    text: str
    seconds: float = 0.0
    remedy: str = ""


class StepFailed(Exception):
    """A step did not succeed: what was found, and what to do."""

    def __init__(self, text: str, remedy: str) -> None:
        super().__init__(text)
        self.remedy = remedy


def taken(name: str, action: Callable[[], str]) -> Step:
    """Take a step. `action` returns what it found, or raises `StepFailed`; a full disk or busy ledger fails it, too."""
    began = time.monotonic()
    text, ok, remedy = "", True, ""
    try:
        text = action()
    except StepFailed as failure:
        text, ok, remedy = str(failure), False, failure.remedy
    except (StorageError, OSError) as error:
        text, ok, remedy = f"{type(error).__name__}: {error}", False, "dicom-node check; the log of the node"
    return Step(name=name, ok=ok, text=text, seconds=time.monotonic() - began, remedy=remedy)


def waited(holds: Callable[[], bool], timeout_s: float) -> bool:
    """Wait until it holds, `timeout_s` at most; whether it does."""
    end = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(POLL_S)
    return True


def was_tried(delivery: Delivery) -> bool:
    """With whatever success: whoever waits shall hear of a failure now, and not after the last attempt."""
    waits = delivery.state in (DeliveryState.PENDING, DeliveryState.SENDING)
    return not waits or (delivery.state is DeliveryState.PENDING and bool(delivery.reason_code))
