"""Fixtures that several test packages share, and the rule that nothing is skipped in CI."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

hypothesis.settings.register_profile("any machine", deadline=None)  # no test asserts a wall-clock time
hypothesis.settings.load_profile("any machine")

TESTS = Path(__file__).parent
ROOT = TESTS.parent
sys.path.insert(0, str(TESTS))  # `from ct_factory import write_ct`
sys.path.append(str(TESTS / "dicom_node"))  # `from intake_tools import running_intake`, in tests/hostile
sys.path.append(str(TESTS / "pipeline"))  # `from outputs_samples import Sample`, in every folder of tests


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, None]:
    """In CI every peer is installed, so a skip means that something is missing: it fails. Only `gpu` may skip."""
    outcome = yield
    report = outcome.get_result()
    may_skip = hasattr(report, "wasxfail") or item.get_closest_marker("gpu") is not None
    if os.environ.get("CI") == "true" and report.skipped and not may_skip:
        report.outcome = "failed"
        report.longrepr = f"skipped in CI, where every peer must be there: {report.longrepr}"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real CT series (README, "Real CT"); skips where there is none, which CI forbids."""
    folder = Path(os.environ.get("CT_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip("no real CT series: set CT_DATA to a folder with ct-chest, ct-abdomen-feet-first, ct-arms-jpeg2000")
    return folder
