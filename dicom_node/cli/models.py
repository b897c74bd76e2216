"""`dicom-node models …`: which networks there are, whether they are whole, and putting new ones in place."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dicom_node.cli.common import (
    DEFAULT_CONFIG,
    AsJson,
    ConfigPath,
    bundle_folders,
    console,
    fail,
    print_json,
    safe,
    table,
)
from pipeline.errors import BundleError

if TYPE_CHECKING:  # the commands load torch when they run: `serve` and `--help` must not
    from pipeline.bundle import ModelBundle

app = typer.Typer(help="Install, list and verify model bundles.", no_args_is_help=True)

BundleArgument = Annotated[str, typer.Argument(help="The name of a shipped or installed bundle, or a bundle's folder.")]
COLUMNS = ("name", "version", "networks", "profile", "licence", "statement", "where")


@app.command("list")
def list_models(config: ConfigPath = DEFAULT_CONFIG, as_json: AsJson = False) -> None:
    """The bundles that ship with the product and those that were installed, with what they were trained on."""
    from pipeline.bundle import bundles_in, shipped_bundles

    found = [("shipped", path) for path in shipped_bundles()]
    found += [("installed", path) for place in bundle_folders(config) for path in bundles_in(place)]
    rows = [_described(path, where) for where, path in found]
    if as_json:
        print_json(rows)
        return
    shown = table(f"{len(rows)} bundles", *COLUMNS)
    for row in rows:
        cells = [safe(row.get(column, "")) for column in COLUMNS]
        if "problem" in row:
            cells[5] = safe(f"BROKEN: {row['problem']}")
        shown.add_row(*cells)
    console.print(shown)


def _described(folder: Path, where: str) -> dict[str, str]:
    """One row; a broken bundle is a row with its reason, so that it does not hide the others."""
    from pipeline.bundle import load_bundle

    place = {"where": where if where == "shipped" else f"{where}: {folder}"}
    try:
        return _row(load_bundle(folder)) | place
    except BundleError as error:
        return {"name": folder.name, "problem": str(error)} | place


def _row(bundle: ModelBundle) -> dict[str, str]:
    manifest = bundle.manifest
    return {
        "name": manifest.name,
        "version": manifest.version,
        "networks": ", ".join(bundle.keys),
        "profile": manifest.profile,
        "spacing_mm": " x ".join(f"{value:g}" for value in manifest.spacing_mm),
        "licence": manifest.licence,
        "statement": manifest.statement,
        "sha256": bundle.manifest_sha256,
    }


@app.command("install")
def install(
    bundle: Annotated[Path, typer.Argument(help="The bundle's folder, as `train export` wrote it.")],
    config: ConfigPath = DEFAULT_CONFIG,
    replace: Annotated[
        bool, typer.Option("--replace", help="Take the place of another bundle of the same name.")
    ] = False,
) -> None:
    """Check every digest and every network, then copy the bundle into the folder that `pipeline.bundles` names.

    `pipeline.bundle = "NAME"` in the configuration uses it after the node's next start.
    """
    from pipeline.installing import install_bundle

    loaded = _loaded(bundle)
    _load_networks(loaded)
    try:
        folder = install_bundle(loaded, bundle_folders(config)[0], replace=replace)
    except BundleError as error:
        raise fail(str(error)) from error
    manifest = loaded.manifest
    console.print(safe(f"{manifest.name} {manifest.version} is installed: {folder}"), soft_wrap=True)
    console.print(safe(manifest.statement))


@app.command("verify")
def verify(bundle: BundleArgument = "phantom", config: ConfigPath = DEFAULT_CONFIG, as_json: AsJson = False) -> None:
    """Check the manifest and the SHA-256 of every file that it names, and load every network."""
    loaded = _find(bundle, config)
    _load_networks(loaded)
    entries = {key: entry.sha256 for key, entry in loaded.manifest.networks.items()}
    if as_json:
        print_json({**_row(loaded), "weights": entries, "files": dict(loaded.manifest.files)})
        return
    shown = table(f"bundle {loaded.manifest.name} {loaded.manifest.version}: whole", "what", "sha256")
    for name, digest in (*entries.items(), *loaded.manifest.files.items()):
        shown.add_row(safe(name), digest)
    console.print(shown)
    console.print(safe(f"manifest sha256 {loaded.manifest_sha256}"))
    console.print(safe(loaded.manifest.statement))


@app.command("card")
def card(bundle: BundleArgument = "phantom", config: ConfigPath = DEFAULT_CONFIG) -> None:
    """Print the model card: what the bundle is for, its data, its figures and its limits."""
    from pipeline.bundle import CARD

    loaded = _find(bundle, config)
    if CARD not in loaded.manifest.files:
        raise fail(f"bundle {loaded.manifest.name} {loaded.manifest.version} has no model card")
    text = (loaded.folder / CARD).read_text(encoding="utf-8")
    printable = "".join(c for c in text if c.isprintable() or c == "\n")
    typer.echo(printable, nl=False)


def _find(bundle: str, config: Path) -> ModelBundle:
    from pipeline.bundle import bundle_path

    try:
        folder = bundle_path(bundle, *bundle_folders(config))
    except BundleError as error:
        raise fail(str(error)) from error
    return _loaded(folder)


def _loaded(folder: Path) -> ModelBundle:
    from pipeline.bundle import load_bundle

    try:
        return load_bundle(folder)
    except BundleError as error:
        raise fail(str(error)) from error


def _load_networks(bundle: ModelBundle) -> None:
    """The digests say that the files are the ones that were meant; this says that they are networks."""
    import torch

    try:
        for key in bundle.keys:
            bundle.network(key, torch.device("cpu"), torch.float32)
    except BundleError as error:
        raise fail(str(error)) from error
