"""Putting a bundle's folder where it is found by name: whole or absent, and never over another one unasked.

BundleError codes: bundle_name, bundle_exists, not_written.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from pipeline.bundle import MANIFEST, ModelBundle, load_bundle, shipped_bundles
from pipeline.durable import sync_folder
from pipeline.errors import BundleError

# a name becomes a folder: no separator, no leading dot, nothing that a shell or another file system would turn
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


def checked_name(name: str) -> str:
    """The name itself, if it can be a folder's.

    Raises:
        BundleError: bundle_name.
    """
    if not _NAME.fullmatch(name):
        text = f"bundle name {name!r}: 1 to 64 of letters, digits, '-' and '_' are expected, a letter or digit first"
        raise BundleError("bundle_name", text)
    return name


def install_bundle(bundle: ModelBundle, folder: Path, *, replace: bool = False) -> Path:
    """Copy what the manifest names into `folder`/<name>; it appears there with one rename. Returns that folder.

    A bundle that is already there, byte for byte, is left as it is. `replace` also allows a name that is in use,
    by an installed bundle or by one that ships with the product (the installed one is then found first).

    Raises:
        BundleError: bundle_name, bundle_exists; not_written (the disk); or the copy is not what was read.
    """
    name = checked_name(bundle.manifest.name)
    target = folder / name
    if _holds(target, bundle):
        return target
    if not replace:
        if target.exists():
            raise BundleError("bundle_exists", f"{target} is another bundle; --replace puts this one in its place")
        if name in {path.name for path in shipped_bundles()}:
            text = f"a bundle {name!r} ships with the product; --replace lets this one be found before it"
            raise BundleError("bundle_exists", text)
    part = folder / f".{name}.tmp"
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        weights = (entry.file for entry in bundle.manifest.networks.values())
        for file in dict.fromkeys((*weights, *bundle.manifest.files, MANIFEST)):  # networks may share a file
            _copy(bundle.folder / file, part / file)
        if load_bundle(part).manifest_sha256 != bundle.manifest_sha256:
            raise BundleError("manifest_invalid", f"model bundle {bundle.folder}: {MANIFEST} changed while it was read")
        put_in_place(part, target)
    except OSError as error:
        raise BundleError("not_written", f"bundle folder {target}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target


def _holds(target: Path, bundle: ModelBundle) -> bool:
    try:
        return load_bundle(target).manifest_sha256 == bundle.manifest_sha256
    except BundleError:
        return False


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as read, target.open("xb") as write:
        shutil.copyfileobj(read, write)
        write.flush()
        os.fsync(write.fileno())


def put_in_place(part: Path, target: Path) -> None:
    """Rename the finished folder `part` to `target` on the same file system; what was there goes."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    part.rename(target)
    sync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)
