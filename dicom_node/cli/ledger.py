"""`dicom-node ledger`: is the ledger whole, a copy of it, and the way back from one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dicom_node.backup import backup_folder, check_not_lost
from dicom_node.cli.common import DEFAULT_CONFIG, ConfigPath, check_user, console, fail, local_time, opened_ledger, safe
from dicom_node.config import load_config
from storage.backup import backup_time, backups, by_now, check_file, ledger_file, make_backup, newest_whole, restore
from storage.errors import BackupDamaged
from storage.ledger import utc_now

app = typer.Typer(help="Check, back up and restore the ledger.", no_args_is_help=True)


@app.command("check")
def check(
    config: ConfigPath = DEFAULT_CONFIG,
    quick: Annotated[bool, typer.Option("--quick", help="Only what the node checks at each start.")] = False,
) -> None:
    """Read the whole ledger and say whether it is in order. The node may be running."""
    loaded = load_config(config)
    file = ledger_file(loaded.ledger_url)
    check_not_lost(loaded)
    if not file.exists():
        raise fail(f"ledger {file}: is not there; no node has run with this configuration yet")
    check_file(file, full=not quick)
    size = file.stat().st_size
    console.print(safe(f"ledger {file}: whole, {size / 1e6:.1f} MB"), soft_wrap=True)
    found = backups(backup_folder(loaded))
    if found:
        latest = (by_now(found, utc_now()) or found)[-1]
        newest = f"the newest {latest} of {local_time(backup_time(latest))}"
        console.print(safe(f"backups: {len(found)}, {newest}"), soft_wrap=True)
    else:
        console.print(safe(f"backups: none in {backup_folder(loaded)}"), soft_wrap=True)


@app.command("backup")
def backup(
    config: ConfigPath = DEFAULT_CONFIG,
    to: Annotated[Path | None, typer.Option("--to", help="Another folder than the configured one.")] = None,
) -> None:
    """Make a backup now, beside those of every day. The node may be running."""
    loaded = load_config(config)
    file = ledger_file(loaded.ledger_url)
    if to is None:
        check_user(loaded)
    check_not_lost(loaded)  # a copy of nothing would be the newest backup
    keep = max(loaded.storage.keep_backups, 1) + 1  # one that is asked for pushes no day's out
    made = make_backup(file, to or backup_folder(loaded), keep=keep, now=utc_now())
    console.print(safe(f"{made}: {made.stat().st_size / 1e6:.1f} MB, whole"), soft_wrap=True)


@app.command("restore")
def restore_backup(
    file: Annotated[Path, typer.Argument(help="A backup: `ledger check` names the newest.")],
    config: ConfigPath = DEFAULT_CONFIG,
) -> None:
    """Put a backup in the ledger's place. Stop the node first; the former ledger is kept beside it.

    At its next start the node goes on with what the backup knows, and takes up from the spool what it does not.
    """
    from dicom_node.node import lock_root

    loaded = load_config(config)
    target = ledger_file(loaded.ledger_url)
    if not file.is_file():
        raise fail(f"{file}: is not there")
    check_user(loaded)
    unlock = lock_root(loaded.storage.root)
    try:
        aside = restore(file, target, now=utc_now())
        with opened_ledger(loaded) as ledger:  # brings an older schema up
            ledger.note("", "ledger_restored", f"the ledger was restored from {file.name}")
    except BackupDamaged as error:
        raise fail(f"error: {error}; nothing was changed; {_another(file, backup_folder(loaded))}") from error
    finally:
        unlock()
    console.print(safe(f"{target}: is now {file.name}"), soft_wrap=True)
    if aside is not None:
        console.print(safe(f"the former ledger is {aside}; remove it when all is well"), soft_wrap=True)
    console.print("Start the node: it takes up from the spool what the backup does not know.", soft_wrap=True)


def _another(damaged: Path, folder: Path) -> str:
    """What to restore instead of a backup that is damaged."""
    others = [backup for backup in backups(folder) if backup.resolve() != damaged.resolve()]
    whole = newest_whole(by_now(others, utc_now()) or others)
    if whole is None:
        return f"there is no other whole one in {folder}"
    return f"the newest whole one: `dicom-node ledger restore {whole}`"
