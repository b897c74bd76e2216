"""What a check found: one line of the table of `dicom-node check`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Verdict(StrEnum):
    """OK, a warning that a person should read, or a failure (exit code 1)."""

    OK = "ok"
    WARN = "warn"
    FAIL = "FAIL"


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One line of the table."""

    check: str
    verdict: Verdict
    text: str
