"""A whole node killed at random while series arrive, run and leave; benchmarks/kill.py does the same fifty times."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from kill import kill_at_random


@pytest.mark.slow
def test_killed_at_random_every_series_ends_with_one_result(tmp_path: Path) -> None:
    found = kill_at_random(tmp_path, 2, random.Random())
    assert found["wrong"] == []
