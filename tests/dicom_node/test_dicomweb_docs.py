"""docs/dicomweb.md: its examples load, and it explains every code that a DICOMweb delivery can end with."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dicom_node.config import load_config
from dicom_node.net import stow, web

TEXT = (Path(__file__).parents[2] / "docs" / "dicomweb.md").read_text(encoding="utf-8")


def codes() -> list[str]:
    source = "".join(Path(str(module.__file__)).read_text(encoding="utf-8") for module in (web, stow))
    return sorted(set(re.findall(r'(?:WebFailure\(|_Meaning\(|\bcode ?= ?)"([a-z_]+)"', source)))


def test_the_codes_are_found() -> None:
    assert {meaning.code for meaning in web.STATUSES.values()} | {"interrupted", "sop_class_refused"} <= set(codes())


@pytest.mark.parametrize("code", codes())
def test_the_document_explains_the_code(code: str) -> None:
    assert f"| `{code}` |" in TEXT


@pytest.mark.parametrize("example", re.findall(r"```toml\n(.*?)```", TEXT, flags=re.DOTALL))
def test_an_example_is_a_configuration(example: str, tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(example, encoding="utf-8")
    assert load_config(path).destinations[0].url
