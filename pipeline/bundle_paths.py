"""Where bundles lie and what they are called: for whoever must not wait for the networks' libraries.

BundleError codes: bundle_missing, manifest_invalid.
"""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.errors import BundleError

MANIFEST = "manifest.json"
SHIPPED = Path(__file__).parent / "bundles"


def bundles_in(folder: Path) -> list[Path]:
    """The folders with a manifest in `folder`, by name; none where the folder does not exist."""
    return sorted(path.parent for path in folder.glob(f"[!.]*/{MANIFEST}"))


def shipped_bundles() -> list[Path]:
    """The folders of the bundles that come with the product, by name."""
    return bundles_in(SHIPPED)


def bundle_path(name_or_folder: str, *folders: Path) -> Path:
    """The folder of an installed or shipped bundle's name ("phantom"), else the folder itself.

    Args:
        name_or_folder: what a person wrote.
        folders: where bundles are installed. An installed bundle comes before a shipped one of the same name.

    Raises:
        BundleError: neither a name nor a folder with a manifest.
    """
    known: dict[str, Path] = {}
    for place in (*folders, SHIPPED):
        for path in bundles_in(place):
            known.setdefault(path.name, path)
    if name_or_folder in known:
        return known[name_or_folder]
    folder = Path(name_or_folder).expanduser()
    if name_or_folder and (folder / MANIFEST).is_file():
        return folder
    names = ", ".join(sorted(known)) or "none"
    text = f"model bundle {name_or_folder!r} is neither a known one ({names}) nor a folder with {MANIFEST}"
    raise BundleError("bundle_missing", text)


def name_and_version(folder: Path) -> tuple[str, str]:
    """What a bundle's manifest calls it; nothing else of it is looked at.

    Raises:
        BundleError: there is no manifest, or it does not say.
    """
    try:
        told = json.loads((folder / MANIFEST).read_bytes())
        return str(told["name"]), str(told["version"])
    except OSError as error:
        text = f"model bundle {folder}: {MANIFEST} cannot be read: {error.strerror}"
        raise BundleError("bundle_missing", text) from error
    except (ValueError, KeyError, TypeError) as error:
        raise BundleError("manifest_invalid", f"model bundle {folder}: {MANIFEST} has no name and version") from error
