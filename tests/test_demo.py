"""`dicom-node demo` goes the whole way, here with a small phantom and a small bundle.

The shipped bundle goes the same way in test_orthanc_round_trip.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_bundle import write_tiny_bundle

NODE = Path(sys.executable).parent / "dicom-node"


@pytest.mark.slow
def test_the_demo_brings_a_pet_series_back_from_the_pacs_and_draws_it(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    small = ["--matrix", "128", "--slice-mm", "6", "--coverage", "thigh", "--pose", "raised"]
    small += ["--bundle", str(write_tiny_bundle(tmp_path / "bundle"))]
    done = subprocess.run(
        [NODE, "demo", "--out", str(out), *small], capture_output=True, text=True, check=False, timeout=560
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for expected in ("synthesis", "head", "trunk", "legs", "read back from the PACS"):
        assert expected in done.stdout
    assert (out / "overview.png").read_bytes().startswith(b"\x89PNG")
    listed = subprocess.run(
        [NODE, "jobs", "list", "--json", "--config", str(out / "config.toml")],
        capture_output=True,
        text=True,
        check=True,
    )
    (job,) = json.loads(listed.stdout)
    assert job["state"] == "DONE"
    pets = list((out / "from-pacs").glob("*.dcm"))
    assert sum(one["instances"] for one in job["details"]["result_series"] if one["kind"] == "pet") == len(pets)


def test_the_demo_never_removes_a_folder_that_is_not_its_own(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("keep")
    done = subprocess.run([NODE, "demo", "--out", str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "not an earlier demo's" in done.stderr
    assert (tmp_path / "precious.txt").read_text() == "keep"
