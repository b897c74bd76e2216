"""When to try again: one pure function for jobs and deliveries."""

from __future__ import annotations


def retry_delay_s(attempts: int, *, first_s: float, longest_s: float) -> float:
    """Seconds to wait after the `attempts`-th failed attempt (1, 2, ...): `first_s`, doubling, at most `longest_s`.

    Without jitter: one node talks to few destinations, and an operator can foretell the next attempt.
    """
    if attempts < 1:
        raise ValueError(f"{attempts} attempts were made: at least 1 is expected")
    doublings = min(attempts - 1, 60)  # beyond this any sensible first wait exceeds any sensible longest one
    return float(min(first_s * 2**doublings, longest_s))
