"""What follows from a gate's finding: rejected, held for a person, or noted."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.errors import GateRefusal
from pipeline.gate import CHECKS, Severity, settled, severity_of, sifted
from pipeline.types import GateFinding, GateOptions

ROOT = Path(__file__).parent.parent.parent
DOC = (ROOT / "docs" / "gates.md").read_text(encoding="utf-8")
SOURCE = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "pipeline" / "gate").glob("*.py")))


def finding(code: str) -> GateFinding:
    return GateFinding(code=code, text=f"about {code}")


@pytest.mark.parametrize("code", CHECKS)
def test_a_check_allows_its_own_severity(code: str) -> None:
    assert CHECKS[code].severity in CHECKS[code].allowed


@pytest.mark.parametrize("code", CHECKS)
def test_a_check_is_made_and_documented_with_its_severity(code: str) -> None:
    assert f'"{code}"' in SOURCE.replace(f'    "{code}": ', "")
    row = next((line for line in DOC.splitlines() if line.startswith(f"| `{code}` |")), None)
    assert row is not None, f"docs/gates.md has no row for {code}"
    assert row.split("|")[2].strip() == CHECKS[code].severity
    fixed = len(CHECKS[code].allowed) == 1
    assert fixed == (row.split("|")[3].strip() == "fixed")


def test_the_document_names_no_check_that_there_is_not() -> None:
    named = re.findall(r"^\| `([a-z_]+)` \| (?:reject|hold|note) \|", DOC, flags=re.MULTILINE)
    assert sorted(named) == sorted(CHECKS)


def test_a_refusal_ends_the_checks_and_carries_its_code() -> None:
    asked = []

    def checks() -> Iterator[GateFinding]:
        for code in ("metal", "no_body", "body_size"):
            asked.append(code)
            yield finding(code)

    with pytest.raises(GateRefusal, match="no_body: about no_body"):
        sifted(checks(), GateOptions())
    assert asked == ["metal", "no_body"]


def test_what_is_configured_replaces_a_checks_own_severity() -> None:
    options = GateOptions(severity={"child": "hold", "metal": "reject"})
    assert severity_of("child", options) is Severity.HOLD
    assert severity_of("body_size", options) is Severity.REJECT
    assert [one.code for one in sifted([finding("child")], options)] == ["child"]
    with pytest.raises(GateRefusal):
        sifted([finding("metal")], options)


def test_a_held_result_has_the_first_code_and_every_reason() -> None:
    found = [finding(code) for code in ("age_unknown", "seam", "asymmetry", "metal")]
    held, notes = settled(found, GateOptions())
    assert held == GateFinding(code="seam", text="about seam; asymmetry: about asymmetry")
    assert notes == ("age_unknown: about age_unknown", "metal: about metal")


def test_notes_alone_hold_nothing() -> None:
    assert settled([finding("metal")], GateOptions()) == (None, ("metal: about metal",))
    assert settled([], GateOptions()) == (None, ())


def test_the_options_of_the_gates_can_be_pickled() -> None:
    options = GateOptions(severity={"child": "hold"})
    assert pickle.loads(pickle.dumps(options)) == options
