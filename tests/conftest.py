"""Fixtures that several test packages share, and the rule that nothing is skipped in CI."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch: the workers share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")
for name in ("COLUMNS", "LINES"):  # a worker has 80 and 24: rich would keep them whatever a test asks for
    os.environ.pop(name, None)

hypothesis.settings.register_profile(  # no test asserts a wall-clock time
    "any machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any machine")

TESTS = Path(__file__).parent
ROOT = TESTS.parent
sys.path.insert(0, str(TESTS))  # `from ct_factory import write_ct`
sys.path.append(str(TESTS / "dicom_node"))  # `from intake_tools import running_intake`, in tests/hostile
sys.path.append(str(TESTS / "pipeline"))  # `from outputs_samples import Sample`, in every folder of tests


# One worker takes a file as a whole: the ones that take minutes come first, so that no worker ends long after the other
SLOW_FILES = (
    "dicom_node/test_node_restart.py",
    "readers/test_reader_ohif.py",
    "dicom_node/test_idempotence.py",
    "test_bad_input.py",
    "test_demo.py",
    "test_orthanc_round_trip.py",
    "dicom_node/test_district_engine.py",
    "dicom_node/test_shadow_job.py",
    "dicom_node/test_proof_restart.py",
    "training/test_train_all.py",
    "training/test_prepare_ray.py",
    "pipeline/test_districts_real.py",
)


@pytest.hookimpl(trylast=True)  # after the shuffle of pytest-randomly
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow files first, in the order above; the rest stays as it is."""
    places = {TESTS / name: place for place, name in enumerate(SLOW_FILES)}
    if gone := [str(path) for path in places if not path.is_file()]:
        raise pytest.UsageError(f"tests/conftest.py: SLOW_FILES names what is not there: {', '.join(gone)}")
    items.sort(key=lambda item: places.get(item.path, len(places)))


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
