"""Killed or without power at its n-th system call, the node ends with one result at its next start."""

from __future__ import annotations

import json
import os
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


@pytest.mark.parametrize("how", [[], ["--power"]], ids=["kill", "power cut"])
def test_killed_at_any_call_of_any_stage_the_next_start_ends_with_one_result(tmp_path: Path, how: list[str]) -> None:
    ct, lives = tmp_path / "ct", tmp_path / "lives"
    lives.mkdir()
    for path in write_ct(ct, np.zeros((4, 8, 8), dtype=np.int16), spacing_mm=(2.0, 2.0, 2.0)):
        path.rename(ct / f"{dcmread(path).SOPInstanceUID}.dcm")
    child = subprocess.run(
        [sys.executable, SCRIPT, lives, ct, str(EVERY), *how],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert child.returncode == 0, child.stderr[-2000:]
    found = json.loads(child.stdout.splitlines()[-1])
    assert found["wrong"] == []
    assert found["calls"] > 80
    assert found["tried"] >= 4
