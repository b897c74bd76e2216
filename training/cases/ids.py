"""Names of studies and patients: stable, safe as file names, and without anything that names a person."""

from __future__ import annotations

import hashlib
import re

# What published collections call a case, by their own prefixes, or a short running number. Digits alone, or behind
# "patient", may as well be a hospital's number of a person.
_CASE = re.compile(r"(petct|fdg|psma|phantom|ph)[-_]?[0-9a-f]{1,32}|(case|sub)[-_]?[0-9]{1,4}", re.I)


def patient_hash(subject: str) -> str:
    """12 hex digits that stand for a patient's ID."""
    return hashlib.sha256(subject.encode()).hexdigest()[:12]


def study_id(case: str, unique: str) -> str:
    """A file name for the study that `unique` (a UID, or case and study names) identifies.

    It shows `case` where that is plainly a pseudonym; any other name could be a person's and is only hashed.
    """
    digest = hashlib.sha256(unique.encode()).hexdigest()
    return f"{case}-{digest[:8]}" if _CASE.fullmatch(case) else f"study-{digest[:12]}"
