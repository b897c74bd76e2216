"""Fixtures that several test packages share."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ROOT = TESTS.parent
sys.path.insert(0, str(TESTS))  # `from ct_factory import write_ct`


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real CT series (README, "Real CT"); skips where there is none, which CI forbids."""
    folder = Path(os.environ.get("CT_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip("no real CT series: set CT_DATA to a folder with ct-chest, ct-abdomen-feet-first, ct-arms-jpeg2000")
    return folder
