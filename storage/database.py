"""Opening the ledger's database: SQLite with the durability we promise, or PostgreSQL by URL; schema brought up."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DataError, DBAPIError, InterfaceError, NoSuchModuleError, OperationalError

from storage.errors import LedgerDamaged, LedgerError, LedgerOutage

_DAMAGED = ("not a database", "malformed")
BUSY_TIMEOUT_S = 30.0  # a writer waits this long for another process (the command line) to finish
WRITE = {"ledger_write": True}
MIGRATIONS = Path(__file__).parent / "migrations"

_GOES_ON = "a running node then goes on by itself"
_REMEDIES = (  # text in the driver's message -> what an operator does
    ("readonly", "the file or its folder is read-only: give the node's user write permission, or remount the disk"),
    ("read-only", "the database is read-only: give the node's user write permission"),
    (
        "not a database",
        "the file is not a SQLite database: stop the node and restore the backup (`dicom-node ledger restore FILE`), "
        "or move it and node.id away to begin a new ledger",
    ),
    ("malformed", "the file is damaged: stop the node and restore the backup (`dicom-node ledger restore FILE`)"),
    ("unable to open", "the file cannot be opened: check that its folder exists and belongs to the node's user"),
    ("locked", f"another process keeps it locked: find it (`fuser -v FILE`) and end it; {_GOES_ON}"),
    ("disk is full", f"the disk is full: make room; {_GOES_ON}"),
    ("disk i/o", f"the disk reports an error: check the disk and its mount (`dmesg`); {_GOES_ON}"),
)
_ELSE = "see deploy/RUNBOOK.md, the ledger"


def default_url(root: Path) -> str:
    """The ledger beside the spool, used when the configuration names no database."""
    return f"sqlite:///{root / 'ledger.sqlite'}"


def open_engine(url: str) -> Engine:
    """Connect and bring the schema to this version. Raises `LedgerError` with the file and the remedy."""
    parsed = _parse(url)
    _check_folder(parsed)
    engine = create_engine(parsed, json_serializer=_to_json, pool_pre_ping=parsed.get_backend_name() != "sqlite")
    if parsed.get_backend_name() == "sqlite":
        _prepare_sqlite(engine)
    try:
        upgrade(engine)
    except DBAPIError as error:
        engine.dispose()
        raise explain(engine, error) from error
    except LedgerError:
        engine.dispose()
        raise
    return engine


def explain(engine: Engine, error: DBAPIError) -> LedgerError:
    """Turn a driver's error into one that names the database and the remedy. No values are in the text."""
    found = str(error.orig).splitlines()[0] if error.orig else type(error).__name__
    if isinstance(error, DataError):  # PostgreSQL's first line may quote the value (SQLSTATE class 22)
        found = type(error.orig).__name__
    remedy = next((text for word, text in _REMEDIES if word in found.lower()), _ELSE)
    text = f"ledger {shown(engine.url)}: {found}; {remedy}"
    if any(word in found.lower() for word in _DAMAGED):
        return LedgerDamaged(text)
    return LedgerOutage(text) if isinstance(error, OperationalError | InterfaceError) else LedgerError(text)


def shown(url: URL) -> str:
    """A URL as it may be printed: the path of a SQLite file, else the URL without its password."""
    if url.get_backend_name() == "sqlite":
        return url.database or ":memory:"
    return url.render_as_string(hide_password=True)


def upgrade(engine: Engine, revision: str = "head") -> None:
    """Run the missing migrations in one transaction; two processes that do it together wait for each other."""
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    script = ScriptDirectory.from_config(config)
    with engine.execution_options(**WRITE).begin() as connection:
        current = MigrationContext.configure(connection).get_current_revision()
        if revision == "head" and current == script.get_current_head():
            # SQLite gives a write lock on a read-only file too: only a write tells, at start and not in mid-job
            connection.exec_driver_sql("UPDATE alembic_version SET version_num = version_num")
            return
        config.attributes["connection"] = connection
        try:
            command.upgrade(config, revision)
        except CommandError as error:
            raise LedgerError(
                f"ledger {shown(engine.url)}: has schema revision {current!r}, which this version does not know; "
                "it was written by a newer version: install that version, or restore the backup"
            ) from error


def _parse(url: str) -> URL:
    try:
        parsed = make_url(url)
        parsed.get_dialect()
    except (ArgumentError, NoSuchModuleError) as error:
        raise LedgerError(
            "[storage].database_url is not a database URL; expected sqlite:///PATH or postgresql+psycopg://USER@HOST/NAME"
        ) from error
    try:
        parsed.get_dialect().import_dbapi()
    except ImportError as error:
        raise LedgerError(f"[storage].database_url: the driver {error.name!r} is not installed") from error
    return parsed


def _check_folder(url: URL) -> None:
    if url.get_backend_name() != "sqlite" or not url.database or url.database.startswith(("file:", ":")):
        return
    path = Path(url.database)
    if not path.parent.is_dir():
        raise LedgerError(f"ledger {path}: the folder {path.parent} does not exist; create it or correct [storage]")
    if path.is_dir():
        raise LedgerError(f"ledger {path}: is a folder, expected a file; correct [storage].database_url")
    with suppress(OSError):  # SQLite says better what is wrong
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))  # its owner's; so are its -wal and -shm


def _prepare_sqlite(engine: Engine) -> None:
    """WAL (readers never wait), FULL (a commit survives a power cut), and transactions begun by us alone."""

    @event.listens_for(engine, "connect")
    def on_connect(dbapi: sqlite3.Connection, _: object) -> None:
        dbapi.isolation_level = None  # the driver begins nothing by itself: DDL is part of the transaction too
        for pragma in (
            f"busy_timeout = {int(BUSY_TIMEOUT_S * 1000)}",
            "journal_mode = WAL",
            "synchronous = FULL",
            "foreign_keys = ON",
        ):
            dbapi.execute(f"PRAGMA {pragma}").close()

    @event.listens_for(engine, "begin")
    def on_begin(connection: Connection) -> None:
        # a deferred transaction that reads and then writes can fail at once instead of waiting
        writes = connection.get_execution_options().get("ledger_write", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _to_json(value: Any) -> str:
    return json.dumps(plain(value), allow_nan=False, separators=(",", ":"))


def plain(value: Any) -> Any:
    """What JSON can hold: numbers of numpy become Python's, NaN and infinity `None`, all other things their text."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if abs(value) != float("inf") and value == value else None
    if isinstance(value, str):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):  # numpy's arrays and scalars, without importing numpy
        return plain(value.tolist())
    if hasattr(value, "isoformat"):
        return value.isoformat()
    return str(value)
