"""The command line: one file per command, tables for people, `--json` for programs.

Exit codes: 0 done, 1 failed or not found, 2 wrong usage or configuration, 3 the ledger is damaged.
"""

from dicom_node.cli.app import app, main

__all__ = ["app", "main"]
