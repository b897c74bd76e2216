"""What the node's processes do not load: libraries that cost seconds at each start and hundreds of MB."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TELL = "import importlib, sys; importlib.import_module(sys.argv[1]); print(*sys.modules)"


@pytest.mark.parametrize(
    ("module", "without"),
    [
        ("dicom_node.node", {"torch", "matplotlib", "scipy"}),  # the engine's process has torch
        ("dicom_node.net.receivers", {"torch", "highdicom", "SimpleITK", "matplotlib", "scipy"}),
    ],
)
def test_a_process_loads_no_library_that_it_does_not_need(module: str, without: set[str]) -> None:
    told = subprocess.run([sys.executable, "-c", TELL, module], cwd=ROOT, capture_output=True, text=True, check=True)
    assert module in told.stdout.split()
    assert not without & set(told.stdout.split())
