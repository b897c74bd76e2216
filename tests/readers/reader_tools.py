"""Where the readers are: what `make readers` installed, and what Debian brings. A missing one skips with the reason."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from install_readers import INSTALLED, OLD_SIMPLEITK, TARGET

HERE = Path(__file__).parent
DEBIAN = "/usr/local/bin:/usr/bin:/bin"  # not the environment's own, which may be first on the path
NODE_TIMEOUT_S = 1500  # every page of OHIF, software rendering, a busy machine


def program(name: str, package: str, *, beside: bool = True) -> str:
    """The path of an installed program: beside the interpreter (unless not wanted), else one of Debian's."""
    own = Path(sys.executable).parent / name
    found = str(own) if beside and own.exists() else shutil.which(name, path=DEBIAN)
    return found or pytest.skip(f"{name} is not installed (Debian: apt-get install {package})")


def node_modules() -> Path:
    """The folder that holds `node_modules`."""
    if not (TARGET / INSTALLED).is_file():
        pytest.skip("the node packages of the readers are not installed (make readers; it needs npm)")
    return TARGET


def ohif_dist() -> Path:
    """The built OHIF application."""
    folder = TARGET / "ohif"
    return folder if folder.is_dir() else pytest.skip("OHIF is not installed (make readers; it needs npm)")


def old_simpleitk() -> Path:
    """The folder that makes `import SimpleITK` the old one when it comes first on the path."""
    folder = TARGET / f"simpleitk-{OLD_SIMPLEITK}"
    return folder if folder.is_dir() else pytest.skip(f"SimpleITK {OLD_SIMPLEITK} is not installed (make readers)")


def run_node(script: str, *arguments: str, timeout_s: int = 120) -> Any:
    """Run a script of this folder in node; returns what it printed, as JSON."""
    command = [program("node", "nodejs"), str(HERE / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout_s)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)
