"""What a test needs and does not find is a skip on a person's machine and a failure in CI (tests/conftest.py)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TESTS_OF_A_DISK = "tests/dicom_node/test_disk_full.py"
PLAIN = ("-q", "-p", "no:randomly", "-p", "no:cacheprovider")


@pytest.mark.parametrize(("ci", "ends_with"), [("true", 1), ("", 0)], ids=["in CI", "elsewhere"])
def test_a_disk_that_cannot_be_mounted_skips_its_tests_and_fails_them_in_ci(
    tmp_path: Path, ci: str, ends_with: int
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", TESTS_OF_A_DISK, "-k", "plain", *PLAIN, f"--basetemp={tmp_path / 'inner'}"],
        cwd=ROOT,
        env={**os.environ, "CI": ci, "PATH": str(tmp_path)},  # a PATH without mount
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == ends_with, done.stdout
    assert ("skipped in CI, where every peer must be there" in done.stdout) is bool(ci)
    assert "mounting a small tmpfs needs root" in done.stdout
