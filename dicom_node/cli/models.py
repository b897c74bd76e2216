"""`dicom-node models …`: which networks there are, and whether they are whole."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from dicom_node.cli.common import AsJson, console, fail, print_json, safe, table
from pipeline.errors import BundleError

if TYPE_CHECKING:  # the commands load torch when they run: `serve` and `--help` must not
    from pipeline.bundle import ModelBundle

app = typer.Typer(help="List and verify model bundles.", no_args_is_help=True)

BundleArgument = Annotated[str, typer.Argument(help="A shipped bundle's name or the folder of a bundle.")]


@app.command("list")
def list_models(as_json: AsJson = False) -> None:
    """The bundles that ship with the product, with what they were trained on."""
    from pipeline.bundle import load_bundle, shipped_bundles

    rows = [_row(load_bundle(folder)) for folder in shipped_bundles()]
    if as_json:
        print_json(rows)
        return
    shown = table(f"{len(rows)} bundles", "name", "version", "networks", "spacing mm", "licence", "statement")
    for row in rows:
        shown.add_row(
            *(safe(row[key]) for key in ("name", "version", "networks", "spacing_mm", "licence", "statement"))
        )
    console.print(shown)


def _row(bundle: ModelBundle) -> dict[str, str]:
    manifest = bundle.manifest
    return {
        "name": manifest.name,
        "version": manifest.version,
        "networks": ", ".join(bundle.keys),
        "spacing_mm": " x ".join(f"{value:g}" for value in manifest.spacing_mm),
        "licence": manifest.licence,
        "statement": manifest.statement,
        "sha256": bundle.manifest_sha256,
    }


@app.command("verify")
def verify(bundle: BundleArgument = "phantom", as_json: AsJson = False) -> None:
    """Check the manifest and the SHA-256 of every weights file, and load every network."""
    import torch

    from pipeline.bundle import bundle_path, load_bundle

    try:
        folder = bundle_path(bundle)
        loaded = load_bundle(folder)
    except BundleError as error:
        raise fail(str(error)) from error
    for key in loaded.keys:
        loaded.network(key, torch.device("cpu"), torch.float32)
    entries = {key: entry.sha256 for key, entry in loaded.manifest.networks.items()}
    if as_json:
        print_json({**_row(loaded), "weights": entries})
        return
    shown = table(f"bundle {loaded.manifest.name} {loaded.manifest.version}: whole", "network", "sha256")
    for key, digest in entries.items():
        shown.add_row(key, digest)
    console.print(shown)
    console.print(safe(f"manifest sha256 {loaded.manifest_sha256}"))
    console.print(safe(loaded.manifest.statement))
