"""Names of studies and patients: stable, safe as file names, and without anything that names a person."""

from __future__ import annotations

import hashlib
import re

# What de-identified collections call a case: hex or a number, with or without one of their prefixes.
_CASE = re.compile(r"((petct|fdg|psma|phantom|ph|case|sub|pat|patient|study)[-_]?[0-9a-f]{1,32}|[0-9a-f]{6,32})", re.I)


def patient_hash(subject: str) -> str:
    """12 hex digits that stand for a patient's ID."""
    return hashlib.sha256(subject.encode()).hexdigest()[:12]


def study_id(case: str, unique: str) -> str:
    """A file name for the study that `unique` (a UID, or case and study names) identifies.

    It shows `case` where that is plainly a pseudonym; any other name could be a person's and is only hashed.
    """
    digest = hashlib.sha256(unique.encode()).hexdigest()
    return f"{case}-{digest[:8]}" if _CASE.fullmatch(case) else f"study-{digest[:12]}"
