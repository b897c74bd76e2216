"""The arrows between the packages (docs: CONTRIBUTING.md) hold."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_import_contracts_hold() -> None:
    linter = Path(sys.executable).parent / "lint-imports"
    done = subprocess.run([linter, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_top_level_holds_only_the_fixed_packages() -> None:
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages == {"dicom_node", "pipeline", "storage", "training"}


def test_only_config_reads_the_configuration_file() -> None:
    readers = [path for path in (ROOT / "dicom_node").rglob("*.py") if "tomllib" in path.read_text(encoding="utf-8")]
    assert [path.name for path in readers] == ["config.py"]
