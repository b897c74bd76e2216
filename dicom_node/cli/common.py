"""What several commands share: options, opening the ledger, printing tables, finding a job by the start of its id."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import pwd
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import structlog
import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from dicom_node.backup import check_not_lost
from dicom_node.config import Config, load_config
from dicom_node.log import escape_controls, reason_of_exception
from storage.errors import LedgerError
from storage.ledger import Ledger, open_ledger
from storage.records import Job

console = Console()
console_err = Console(stderr=True)


class ArmPose(StrEnum):
    """What `--pose` takes (training.phantom.POSES)."""

    RAISED = "raised"
    SIDES = "sides"
    TOUCHING = "touching"
    FOLDED = "folded"


ConfigPath = Annotated[Path, typer.Option("--config", "-c", help="The node's configuration file.", show_default=True)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
DEFAULT_CONFIG = Path("config.toml")

_RELATIVE = re.compile(r"^(\d+)([mhdw])$")
_UNITS = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


@contextmanager
def opened_ledger(config: Config, *, create: bool = False) -> Iterator[Ledger]:
    """The ledger of a configuration, closed at the end. The node may run at the same time (SQLite in WAL mode).

    Without `create` a ledger that is not there is an error: an empty one would answer "no job matches". One that is
    lost is an error in any case: a command must not make a new one in its place.
    """
    check_not_lost(config)
    file = config.storage.root / "ledger.sqlite"
    if not create and not config.storage.database_url and not file.is_file():
        raise LedgerError(
            f"ledger {file}: is not there; no node has run with this configuration yet, or [storage].root is wrong"
        )
    ledger = open_ledger(config.ledger_url)
    try:
        yield ledger
    finally:
        ledger.close()


def check_user(config: Config) -> None:
    """Refuse to write into the spool as somebody else than the node: its files would be closed to the node.

    The node's user is the one that made the inbox. Raises `typer.Exit`.
    """
    root = config.storage.root
    place = next((path for path in (root / "inbox" / "incoming", root) if path.is_dir()), None)
    if place is None or (owner := place.stat().st_uid) == os.geteuid():
        return
    name = _user(owner)
    text = f"{place} belongs to user {name}, and this command runs as {_user(os.geteuid())}"
    raise fail(f"error: {text}: the node could not read what it writes; run it as that user (sudo -u {name} ...)")


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:  # a container has ids without names
        return f"#{uid}"


@contextmanager
def warnings_on_stderr() -> Iterator[None]:
    """For a command that does the node's work: its log shows warnings only, beside what the command prints."""
    known = structlog.get_config()
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            reason_of_exception,
            escape_controls,
            structlog.dev.ConsoleRenderer(colors=False),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    try:
        yield
    finally:
        structlog.configure(**known)


@contextmanager
def ledger_at(path: Path) -> Iterator[Ledger]:
    """`opened_ledger` from the path of the configuration file."""
    with opened_ledger(load_config(path)) as ledger:
        yield ledger


def find_job(ledger: Ledger, wanted: str) -> Job:
    """The job whose id begins with `wanted`. Exits with 1 when there is none or more than one."""
    found = ledger.find_by_prefix(wanted)
    if len(found) == 1:
        return found[0]
    if not found:
        raise fail(f"no job has an id that begins with {wanted!r}; `dicom-node jobs list` shows them")
    raise fail(f"{len(found)} jobs begin with {wanted!r}: {', '.join(job.id[:12] for job in found[:5])}")


def bundle_folders(config: Path) -> tuple[Path, ...]:
    """Where bundles are installed: `[pipeline] bundles`, or its default beside a `config.toml` that is not there."""
    return (node_config(config).pipeline.bundles.resolve(),)


def node_config(config: Path) -> Config:
    """The configuration for a command without a node: the defaults where there is no `config.toml`."""
    return Config() if config == DEFAULT_CONFIG and not config.exists() else load_config(config)


def fail(message: str, code: int = 1) -> typer.Exit:
    """Say what is wrong; the caller raises what comes back: `raise fail("…")`."""
    print_error(message)
    return typer.Exit(code)


def print_error(message: str) -> None:
    """One message is one line, whatever the width: a path must not be cut where a log collector reads it."""
    console_err.print(message, style="red", markup=False, highlight=False, soft_wrap=True)


def parse_time(value: str) -> datetime | None:
    """`2026-11-21`, `2026-11-21T03:00` (local time unless it has an offset), or `90m`, `6h`, `2d`, `1w` ago."""
    if not value:
        return None
    relative = _RELATIVE.match(value)
    if relative:
        return datetime.now(UTC) - timedelta(**{_UNITS[relative[2]]: int(relative[1])})
    try:
        return datetime.fromisoformat(value).astimezone(UTC)
    except ValueError:
        raise typer.BadParameter(f"{value!r}: write 2026-11-21, 2026-11-21T03:00, or 90m, 6h, 2d, 1w") from None


def local_time(moment: datetime | None) -> str:
    """For a person at this machine: local time to the second."""
    return moment.astimezone().strftime("%Y-%m-%d %H:%M:%S") if moment else ""


def to_json(value: Any) -> str:
    """JSON of records: times in ISO 8601 UTC, states as their names."""

    def plain(item: Any) -> Any:
        if isinstance(item, datetime):
            return item.astimezone(UTC).isoformat()
        if isinstance(item, Mapping):
            return dict(item)
        return str(item)

    return json.dumps(value, default=plain, indent=2, ensure_ascii=False)


def print_json(value: Any) -> None:
    sys.stdout.write(to_json(value) + "\n")


def job_dict(job: Job) -> dict[str, Any]:
    """A job as one flat JSON object: the series' identifiers beside the state."""
    whole = asdict(job)
    info = whole.pop("info")
    return {**whole, **info}


def print_csv(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """RFC 4180. A cell that a spreadsheet would run as a formula gets a leading apostrophe."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow([cell(row.get(column, "")) for column in columns])
    sys.stdout.write(out.getvalue())


def cell(value: Any) -> str:
    """A value in a CSV file: nothing that a spreadsheet would run."""
    text = value.isoformat() if isinstance(value, datetime) else str("" if value is None else value)
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text


def safe(text: object) -> Text:
    """A header's text for the terminal: no markup, no control characters."""
    return Text("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(text)))


def table(title: str, *columns: str) -> Table:
    made = Table(title=title, title_justify="left", header_style="bold", show_edge=False, pad_edge=False)
    for column in columns:
        made.add_column(column, overflow="fold")
    return made


def print_outcome(stage_seconds: Mapping[str, float], stats: Sequence[Mapping[str, Any]], notes: Sequence[str]) -> None:
    """Stage times, SUV per district and notes of a finished run: for `run`, `jobs show` and the demo."""
    if stage_seconds:
        times = table("stage times", "stage", "seconds")
        for stage, seconds in stage_seconds.items():
            times.add_row(stage, f"{seconds:.2f}")
        times.add_row("total", f"{sum(stage_seconds.values()):.2f}", style="bold")
        console.print(times)
    if stats:
        suv = table("SYNTHETIC PET, SUV (body weight) per district", "district", "ml", "mean", "max", "confidence")
        with_uncertainty = any(row.get("uncertainty") is not None for row in stats)
        if with_uncertainty:
            suv.add_column("mean SD (flips)")
        for row in stats:
            mean = f"{row['suv_mean']:.2f}" if row["evaluated"] else "not evaluated"
            highest = f"{row['suv_max']:.2f}" if row["evaluated"] else ""
            cells = [str(row["district"]), f"{row['volume_ml']:.0f}", mean, highest, f"{row['confidence']:.2f}"]
            if with_uncertainty:
                deviation = row.get("uncertainty")
                cells.append("" if deviation is None else f"{deviation:.3f}")
            suv.add_row(*cells)
        console.print(suv)
    for note in notes:
        console.print(safe(f"note: {note}"))


def progress_bar() -> Progress:
    """The one look of every progress bar; on a pipe it prints nothing but the end."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description:<28}"),
        BarColumn(bar_width=32),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console_err,
    )
