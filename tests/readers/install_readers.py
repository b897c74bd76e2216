"""Install the readers that no Debian or Python package of this project brings: `make readers`.

They go into the virtual environment's `readers` folder, at pinned versions and checked hashes: the node packages of
package-lock.json, the prebuilt OHIF viewer, and SimpleITK 2.2.1 for its old GDCM. What is already there stays.
Without npm or a network what is missing is not installed, and its tests skip with the reason (in CI they fail).
"""

from __future__ import annotations

import base64
import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
TARGET = Path(sys.prefix) / "readers"

INSTALLED = "installed-package-lock.json"  # a copy of the lock: all of it is there
OHIF = "@ohif/app@3.13.2"
OHIF_SHA512 = "WZdxmpmG7rqFgW9ZJLcbgr3XCtLi1KDNPoMaeY5PPe6j4G4fjEjjkycZM6C6Zk2F87BKxFfpq+jd5xXZB9E8EA=="
OHIF_PREFIX = "package/dist/"
NOT_NEEDED = ("package/dist/ort/",)  # 150 MB for its segmentation assistant

OLD_SIMPLEITK = "2.2.1"  # ITK 5.3: its GDCM reads no plane geometry from a Secondary Capture


def main() -> None:
    TARGET.mkdir(parents=True, exist_ok=True)
    install_old_simpleitk(TARGET / f"simpleitk-{OLD_SIMPLEITK}")
    npm = shutil.which("npm")
    if npm is None:
        print("readers: npm is not installed; the tests of OHIF and calculate-suv will skip")
        return
    try:
        install_node_packages(npm, TARGET)
        install_ohif(npm, TARGET / "ohif")
    except subprocess.CalledProcessError as error:
        print(f"readers: {error}; the tests of OHIF and calculate-suv will skip where something is missing")


def install_old_simpleitk(folder: Path) -> None:
    """SimpleITK beside the environment's own: only a test that puts `folder` first on its path sees it."""
    if folder.is_dir():
        return
    with tempfile.TemporaryDirectory(dir=folder.parent) as made:
        options = ["--quiet", "--no-deps", "--only-binary", ":all:", "--target", f"{made}/lib"]
        pip = [sys.executable, "-m", "pip", "install", *options, f"SimpleITK=={OLD_SIMPLEITK}"]
        if subprocess.run(pip, check=False).returncode:
            print(f"readers: SimpleITK {OLD_SIMPLEITK} has no wheel for this Python; its test will skip")
            return
        (Path(made) / "lib").rename(folder)


def install_node_packages(npm: str, folder: Path) -> None:
    """`npm ci` when the lock is not the one that was installed."""
    lock = HERE / "package-lock.json"
    installed = folder / INSTALLED
    if installed.is_file() and installed.read_bytes() == lock.read_bytes():
        return
    for name in ("package.json", "package-lock.json"):
        shutil.copy(HERE / name, folder / name)
    subprocess.run([npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--silent"], cwd=folder, check=True)
    shutil.copy(lock, installed)


def install_ohif(npm: str, folder: Path) -> None:
    """The built application from its npm package, without the 900 packages it was built from."""
    if folder.is_dir():
        return
    with tempfile.TemporaryDirectory(dir=folder.parent) as made:
        subprocess.run([npm, "pack", "--silent", OHIF], cwd=made, check=True, stdout=subprocess.DEVNULL)
        (archive,) = Path(made).glob("*.tgz")
        found = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
        if found != OHIF_SHA512:
            raise SystemExit(f"readers: {OHIF} has SHA-512 {found}, {OHIF_SHA512} is expected")
        with tarfile.open(archive) as tar:
            tar.extractall(made, members=[one for one in tar if _wanted(one.name)], filter="data")
        (Path(made) / OHIF_PREFIX).rename(folder)


def _wanted(name: str) -> bool:
    return name.startswith(OHIF_PREFIX) and not name.endswith(".map") and not name.startswith(NOT_NEEDED)


if __name__ == "__main__":
    main()
