"""`dicom-node conformance`: the DICOM conformance statement of this configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dicom_node.cli.common import DEFAULT_CONFIG, ConfigPath, console, safe
from dicom_node.config import load_config


def conformance(
    config: ConfigPath = DEFAULT_CONFIG,
    out: Annotated[Path | None, typer.Option(help="A file to write; without it the statement is printed.")] = None,
) -> None:
    """Write the DICOM conformance statement (PS3.2) of this configuration, as Markdown.

    Everything in it is asked of the code: what it negotiates, answers and writes.
    """
    from dicom_node.conformance.document import statement

    text = statement(load_config(config))
    if out is None:
        typer.echo(text, nl=False)
        return
    out.write_text(text, encoding="utf-8")
    console.print(safe(f"{out}: the conformance statement of {config}"), soft_wrap=True)
