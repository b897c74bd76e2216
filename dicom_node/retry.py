"""When to try again, and when to give up: pure functions for jobs and deliveries."""

from __future__ import annotations

from datetime import datetime

# The destination is down, restarting, full or busy, or the network is: nothing that we could send would change it.
OUTAGE_CODES = frozenset(
    {
        "connection_failed",
        "association_rejected",  # a transient one; a permanent one never asks
        "association_aborted",
        "tls_failed",  # it hung up in the handshake; what a certificate is to blame for is permanent
        "no_response",
        "instances_deferred",  # 0xA7xx
        "service_busy",
        "no_space",  # our own disk
    }
)


# of these: what may as well be the fault of the one result that is being sent
UNANSWERED_CODES = frozenset({"association_aborted", "no_response", "instances_deferred"})
UNREACHABLE_CODES = OUTAGE_CODES - UNANSWERED_CODES


def retry_delay_s(attempts: int, *, first_s: float, longest_s: float) -> float:
    """Seconds to wait after the `attempts`-th failed attempt (1, 2, ...): `first_s`, doubling, at most `longest_s`.

    Without jitter: one node talks to few destinations, and an operator can foretell the next attempt.
    """
    if attempts < 1:
        raise ValueError(f"{attempts} attempts were made: at least 1 is expected")
    doublings = min(attempts - 1, 60)  # beyond this any sensible first wait exceeds any sensible longest one
    return float(min(first_s * 2**doublings, longest_s))


def outage_delay_s(failing_s: float, *, first_s: float, longest_s: float) -> float:
    """Seconds to wait in an outage that has lasted `failing_s`: as long again, so that the pauses double."""
    return float(min(max(failing_s, first_s), longest_s))


def seconds_since(began: datetime | None, now: datetime) -> float:
    """0 for what has not begun, and where the clock was set back behind it."""
    return max(0.0, (now - began).total_seconds()) if began is not None else 0.0
