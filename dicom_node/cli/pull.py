"""`dicom-node pull`: fetch studies from an archive, by accession number, study UID, or a list of either."""

from __future__ import annotations

import codecs
import csv
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress

from dicom_node.cli.check_node import check_answering
from dicom_node.cli.common import (
    DEFAULT_CONFIG,
    AsJson,
    ConfigPath,
    cell,
    check_user,
    console,
    fail,
    opened_ledger,
    print_json,
    progress_bar,
    safe,
    table,
    warnings_on_stderr,
)
from dicom_node.cli.findings import Verdict
from dicom_node.config import Config, PeerConfig, load_config
from dicom_node.net.peers import shown
from dicom_node.pull import Puller, PullOptions, PullOutcome, Wanted
from storage.errors import BadUid
from storage.spool import Spool, check_uid

COLUMNS = (
    "accession",
    "study_uid",
    "outcome",
    "series",
    "skipped",
    "instances",
    "failed",
    "seconds",
    "text",
)
_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
MAX_ACCESSION = 16  # VR SH (PS3.5 table 6.2-1)


class ListError(ValueError):
    """A list of studies that cannot be used; the text names the line."""


def pull(
    config: ConfigPath = DEFAULT_CONFIG,
    accession: Annotated[list[str] | None, typer.Option(help="An accession number; may be repeated.")] = None,
    study: Annotated[list[str] | None, typer.Option(help="A Study Instance UID; may be repeated.")] = None,
    from_csv: Annotated[
        Path | None, typer.Option(help="A CSV file with a header: accession, study_uid, or both.", dir_okay=False)
    ] = None,
    peer: Annotated[str, typer.Option(help="The peer to ask; needed where several may be asked.")] = "",
    get: Annotated[bool, typer.Option("--get", help="Fetch by C-GET; else the peer sends to us (C-MOVE).")] = False,
    again: Annotated[bool, typer.Option("--again", help="Also studies and series that have a job here.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only ask what would be fetched.")] = False,
    report: Annotated[Path | None, typer.Option(help="Write the outcomes to this CSV file.", dir_okay=False)] = None,
    as_json: AsJson = False,
) -> None:
    """Fetch the CT series of studies from a PACS, one study at a time; the node makes jobs of them.

    Works while the node runs. What was interrupted goes on where it stopped when the command is given again. Exit code
    1 when a study could not be fetched whole, 2 when the request makes no sense.
    """
    loaded = load_config(config)
    try:
        wanted = list(_wanted(accession or [], study or [], from_csv))
        needed = {"find"} if dry_run else {"find", "get" if get else "move"}
        chosen = chosen_peer(loaded, peer, needed)
    except ListError as error:
        raise fail(f"error: {error}", 2) from None
    if not get and not dry_run:
        answering = check_answering(loaded)
        if answering.verdict is not Verdict.OK:
            text = f"{chosen.ae_title} sends to this node, which does not run ({answering.text}): start it, or --get"
            raise fail(f"error: {text}")
    with warnings_on_stderr(), _Report(report) as written:
        outcomes = _pull_all(loaded, chosen, wanted, written, get=get, again=again, dry_run=dry_run)
    rows = [_row(outcome) for outcome in outcomes]
    if as_json:
        print_json(rows)
    else:
        _print(rows, chosen)
    if not all(outcome.ok for outcome in outcomes):
        raise typer.Exit(1)


def _pull_all(
    config: Config,
    peer: PeerConfig,
    wanted: Sequence[Wanted],
    report: _Report,
    *,
    get: bool,
    again: bool,
    dry_run: bool,
) -> list[PullOutcome]:
    outcomes = []
    root = config.storage.root
    if not root.is_dir():
        raise fail(f"error: [storage].root = {root}: is not there; the node makes it when it starts")
    check_user(config)
    spool = Spool(root, min_free_bytes=config.intake.min_free_bytes, sync=config.intake.sync)
    with opened_ledger(config, create=True) as ledger, progress_bar() as bar:
        lines = _Lines(bar, len(wanted))
        options = PullOptions(
            method="get" if get else "move", again=again, dry_run=dry_run, progress=lines.instances_of_series
        )
        puller = Puller(config, peer, ledger, spool, options)
        for outcome in puller.pull_all(wanted):
            outcomes.append(outcome)
            report.add(_row(outcome))
            lines.study_done(len({one.wanted for one in outcomes}))
    return outcomes


@dataclass
class _Lines:
    """Two lines of progress: studies, and the instances of the series that is coming."""

    bar: Progress
    studies: int

    def __post_init__(self) -> None:
        self._all = self.bar.add_task("studies", total=self.studies)
        self._one = self.bar.add_task("instances", total=None)

    def instances_of_series(self, done: int, total: int | None) -> None:
        self.bar.update(self._one, completed=done, total=total)

    def study_done(self, count: int) -> None:
        self.bar.update(self._all, completed=count)


def chosen_peer(config: Config, name: str, needed: set[str]) -> PeerConfig:
    """The peer that is asked: the named one, else the only one that may be. Raises `ListError`."""
    if name:
        peer = next((one for one in config.peers if one.name == name), None)
        if peer is None:
            known = ", ".join(one.name for one in config.peers) or "none"
            raise ListError(f"no peer is named {name!r}; known: {known}")
        missing = sorted(needed.difference(peer.we_may))
        if missing:
            raise ListError(f"peer {name!r} lacks {' and '.join(missing)} in its we_may: see [[peers]] in config.toml")
        return peer
    able = [one for one in config.peers if needed <= set(one.we_may)]
    if len(able) == 1:
        return able[0]
    if not able:
        wanted = ", ".join(f'"{one}"' for one in sorted(needed))
        raise ListError(f"no peer may be asked: add we_may = [{wanted}] to one of [[peers]] in config.toml")
    raise ListError(f"several peers may be asked: name one with --peer ({', '.join(one.name for one in able)})")


def _wanted(accessions: Sequence[str], studies: Sequence[str], listed: Path | None) -> Iterator[Wanted]:
    """Every study once, in the order it was asked for. Raises `ListError`."""
    found = [Wanted(accession=checked_accession(one, "--accession")) for one in accessions]
    found += [Wanted(study_uid=checked_study(one, "--study")) for one in studies]
    if listed is not None:
        found += read_list(listed)
    if not found:
        raise ListError("nothing is asked for: use --accession, --study or --from-csv")
    yield from dict.fromkeys(found)


def read_list(path: Path) -> list[Wanted]:
    """The studies of a CSV file; a row's study_uid decides where it has both. Raises `ListError` with the line."""
    lines = _lines_of(path)
    first = lines[0] if lines else ""
    delimiter = next((one for one in ";\t" if one in first), ",")  # as spreadsheets write it in Europe, or as text
    reader = csv.DictReader(lines, delimiter=delimiter)
    names = {(name or "").strip().lower(): name for name in reader.fieldnames or ()}
    if not {"accession", "study_uid"} & names.keys():
        raise ListError(f"{path}: its first line must have accession, study_uid, or both; it has {shown(first[:60])}")
    found = []
    for row in reader:
        place = f"{path}, line {reader.line_num}"
        study, accession = (str(row.get(names.get(key, "")) or "").strip() for key in ("study_uid", "accession"))
        if study:
            found.append(Wanted(study_uid=checked_study(study, place)))
        elif accession:
            found.append(Wanted(accession=checked_accession(accession, place)))
        elif any((value or "").strip() for value in row.values() if isinstance(value, str)):
            raise ListError(f"{place}: has neither an accession number nor a study UID")
    return found


def _lines_of(path: Path) -> list[str]:
    """The lines of a text file in UTF-8, or in UTF-16 where its first bytes say so. Raises `ListError`."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ListError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        return content.decode("utf-16" if content.startswith(_UTF16_MARKS) else "utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ListError(f'{path}: cannot be read as text: save it as "CSV UTF-8"') from None


def checked_accession(value: str, place: str) -> str:
    """An accession number that names one study: a wildcard would ask for the whole archive. Raises `ListError`."""
    value = value.strip()
    plain = value.isascii() and value.isprintable() and not set(value) & set("*?\\")
    if not value or len(value) > MAX_ACCESSION or not plain:
        raise ListError(
            f"{place}: {shown(value)} is no accession number: 1 to 16 ASCII characters, no * ? or backslash"
        )
    return value


def checked_study(value: str, place: str) -> str:
    """A UID. Raises `ListError`."""
    try:
        return check_uid(value.strip())
    except BadUid:
        raise ListError(f"{place}: {shown(value)} is no Study Instance UID") from None


def _row(outcome: PullOutcome) -> dict[str, Any]:
    return {
        "accession": outcome.wanted.accession,
        "study_uid": outcome.study_uid,
        "outcome": outcome.code,
        "series": outcome.series,
        "skipped": outcome.skipped,
        "instances": outcome.instances,
        "failed": outcome.failed,
        "seconds": round(outcome.seconds, 1),
        "text": outcome.text,
    }


class _Report:
    """The CSV file of outcomes, one row as each is known: an interrupt loses none. Without a path, nothing."""

    def __init__(self, path: Path | None) -> None:
        try:
            self._file = path.open("w", encoding="utf-8", newline="") if path is not None else None
        except OSError as error:
            raise fail(f"error: {path}: cannot be written: {error.strerror}", 2) from None
        self.add(dict(zip(COLUMNS, COLUMNS, strict=True)))

    def __enter__(self) -> _Report:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, row: Mapping[str, Any]) -> None:
        if self._file is not None:
            csv.writer(self._file).writerow([cell(row[column]) for column in COLUMNS])
            self._file.flush()


def _print(rows: Sequence[dict[str, Any]], peer: PeerConfig) -> None:
    made = table(f"pull from {peer.name}", "accession", "study", "outcome", "series", "instances", "what happened")
    for row in rows:
        made.add_row(
            safe(row["accession"]),
            safe(row["study_uid"]),
            row["outcome"],
            str(row["series"]),
            str(row["instances"]),
            safe(row["text"]),
        )
    console.print(made)
    counted = ", ".join(f"{count} {code}" for code, count in sorted(Counter(row["outcome"] for row in rows).items()))
    console.print(safe(counted))
