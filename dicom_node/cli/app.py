"""Puts the commands together and turns our errors into one line and an exit code."""

from __future__ import annotations

import sys

import typer

from dicom_node import __version__
from dicom_node.cli import check, conformance, demo, doctor, jobs, ledger, models, pull, recall, run, serve, train, why
from dicom_node.cli.common import console_err, print_error
from dicom_node.config import ConfigError
from dicom_node.errors import NodeError
from pipeline.errors import PipelineError
from storage.errors import LedgerDamaged, StorageError

app = typer.Typer(
    name="dicom-node",
    help="A DICOM node that turns a routed CT series into a SYNTHETIC FDG-PET series (research only).\n\n"
    "Start with `dicom-node demo`, or `dicom-node serve --config config.toml`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("serve")(serve.serve)
app.command("run")(run.run)
app.command("check")(check.check)
app.command("doctor")(doctor.doctor)
app.command("why")(why.why)
app.command("pull")(pull.pull)
app.command("recall")(recall.recall_results)
app.command("conformance")(conformance.conformance)
app.command("demo")(demo.demo)
app.add_typer(jobs.app, name="jobs")
app.add_typer(ledger.app, name="ledger")
app.add_typer(models.app, name="models")
app.add_typer(train.app, name="train")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dicom-node {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", help="Print the version and exit.", callback=_version),
) -> None:
    """One place for options of every command."""


def main() -> None:
    """The console script: an error of ours is one clear message, never a traceback."""
    try:
        app()
    except ConfigError as error:
        print_error(str(error))
        sys.exit(2)
    except LedgerDamaged as error:  # starting again cannot help: deploy/dicom-node.service
        print_error(f"error: {error}")
        sys.exit(3)
    except (NodeError, StorageError, PipelineError) as error:
        print_error(f"error: {error}")
        sys.exit(1)
    except KeyboardInterrupt:
        console_err.print("interrupted")
        sys.exit(130)
