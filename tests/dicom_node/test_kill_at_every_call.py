"""Killed or without power at its n-th system call, the node ends with one result at its next start.

Another part of the calls each time: KILL_FIRST=7 tries those of a failure again.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ct_factory import write_ct
from pydicom import dcmread

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests" / "crash_at.py"
EVERY = 19  # some five of a hundred; all of them take minutes
FIRST = int(os.environ.get("KILL_FIRST") or random.SystemRandom().randint(1, EVERY))  # pytest-randomly seeds `random`


@pytest.mark.parametrize("how", [[], ["--power"]], ids=["kill", "power cut"])
def test_killed_at_any_call_of_any_stage_the_next_start_ends_with_one_result(tmp_path: Path, how: list[str]) -> None:
    ct, lives = tmp_path / "ct", tmp_path / "lives"
    lives.mkdir()
    for path in write_ct(ct, np.zeros((4, 8, 8), dtype=np.int16), spacing_mm=(2.0, 2.0, 2.0)):
        path.rename(ct / f"{dcmread(path).SOPInstanceUID}.dcm")
    child = subprocess.run(
        [sys.executable, SCRIPT, lives, ct, str(EVERY), str(FIRST), *how],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    again = f"again with KILL_FIRST={FIRST}"
    assert child.returncode == 0, f"{again}: {child.stderr[-2000:]}"
    found = json.loads(child.stdout.splitlines()[-1])
    assert found["wrong"] == [], again
    assert found["calls"] > 80
    assert found["tried"] >= 4
