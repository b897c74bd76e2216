"""The gates: is this CT one that a network may see, and is this SUV volume one that a reader may see?

`input.check_input` looks at the volume before anything is computed, `input.check_scan` at the districts and at the
bundle's training statistics before a network runs, `output.check_output` at the result before anything is sent.
Each gives findings; a finding's code stands in `CHECKS` with what follows from it:

    reject  the job becomes REJECTED (GateRefusal); no check after it runs
    hold    the result is made and waits as HELD, with its picture, for a person
    note    the result is sent, and the job says so

docs/gates.md explains every code. This module imports nothing heavy: the configuration reads `CHECKS`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from pipeline.errors import GateRefusal
from pipeline.types import GateFinding, GateOptions


class Severity(StrEnum):
    """What follows from a finding."""

    REJECT = "reject"
    HOLD = "hold"
    NOTE = "note"


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """What follows from a finding when nothing is configured, and what else may be configured."""

    severity: Severity
    allowed: tuple[Severity, ...]


_ANY = tuple(Severity)
_AFTER = (Severity.HOLD, Severity.NOTE)  # the work is done: too late to reject


def _fixed(severity: Severity) -> Check:
    """Nobody may send this: what follows would be meaningless."""
    return Check(severity=severity, allowed=(severity,))


CHECKS: Mapping[str, Check] = {
    # the volume, before anything is computed
    "low_coverage": Check(severity=Severity.REJECT, allowed=_ANY),
    "coarse_slices": Check(severity=Severity.REJECT, allowed=_ANY),
    "projection_image": Check(severity=Severity.REJECT, allowed=_ANY),
    "child": Check(severity=Severity.REJECT, allowed=_ANY),
    "age_unknown": Check(severity=Severity.NOTE, allowed=_ANY),
    "implausible_hu": _fixed(Severity.REJECT),
    "eight_bit": Check(severity=Severity.REJECT, allowed=_ANY),
    "wrong_rescale": Check(severity=Severity.REJECT, allowed=_ANY),
    "no_body": _fixed(Severity.REJECT),
    "water_phantom": Check(severity=Severity.REJECT, allowed=_ANY),
    "body_size": Check(severity=Severity.REJECT, allowed=_ANY),
    "field_of_view_cut": Check(severity=Severity.NOTE, allowed=_ANY),
    "metal": Check(severity=Severity.NOTE, allowed=_ANY),
    # the districts and the training statistics, before a network runs
    "missing_district": Check(severity=Severity.REJECT, allowed=_ANY),
    "unlike_training": Check(severity=Severity.NOTE, allowed=_ANY),
    "no_statistics": Check(severity=Severity.NOTE, allowed=_ANY),
    # the result, before anything is sent
    "non_finite": _fixed(Severity.HOLD),
    "negative": _fixed(Severity.HOLD),
    "out_of_range": _fixed(Severity.HOLD),
    "nothing_evaluated": _fixed(Severity.HOLD),
    "nothing_synthesized": _fixed(Severity.HOLD),
    "uptake_outside_body": Check(severity=Severity.HOLD, allowed=_AFTER),
    "lung_uptake": Check(severity=Severity.HOLD, allowed=_AFTER),
    "bone_uptake": Check(severity=Severity.HOLD, allowed=_AFTER),
    "tissue_uptake": Check(severity=Severity.HOLD, allowed=_AFTER),
    "district_uptake": Check(severity=Severity.HOLD, allowed=_AFTER),
    "seam": Check(severity=Severity.HOLD, allowed=_AFTER),
    "asymmetry": Check(severity=Severity.HOLD, allowed=_AFTER),
    "not_evaluated": Check(severity=Severity.HOLD, allowed=_AFTER),
}


def severity_of(code: str, options: GateOptions) -> Severity:
    """What follows from a finding with `code`: what is configured, else the check's own."""
    return Severity(options.severity.get(code, CHECKS[code].severity))


def sifted(findings: Iterable[GateFinding], options: GateOptions) -> tuple[GateFinding, ...]:
    """The findings that do not refuse, in order; raises GateRefusal at the first that does.

    `findings` is read one by one, so that a check never sees what an earlier one refused.
    """
    kept = []
    for finding in findings:
        if severity_of(finding.code, options) is Severity.REJECT:
            raise GateRefusal(finding.code, finding.text)
        kept.append(finding)
    return tuple(kept)


def settled(findings: Iterable[GateFinding], options: GateOptions) -> tuple[GateFinding | None, tuple[str, ...]]:
    """What holds the result (under the code of the first, with the text of all), and the notes, as "code: text"."""
    every = list(findings)
    holding = [one for one in every if severity_of(one.code, options) is Severity.HOLD]
    notes = tuple(f"{one.code}: {one.text}" for one in every if one not in holding)
    if not holding:
        return None, notes
    first, *others = holding
    text = "; ".join([first.text, *(f"{one.code}: {one.text}" for one in others)])
    return GateFinding(code=first.code, text=text), notes
