"""Markdown and the names of UIDs, for the pages of the statement."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from textwrap import fill

from pydicom.uid import UID

_CELL = str.maketrans({"|": "\\|", "\n": " ", "<": "&lt;", "*": "\\*"})
WIDTH = 112


def text(words: str) -> list[str]:
    """A paragraph, and the empty line after it."""
    return [fill(" ".join(words.split()), WIDTH, break_long_words=False, break_on_hyphens=False), ""]


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """A table, and the empty line after it; what Markdown would take for its own is escaped."""
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    lines += [f"| {' | '.join(str(cell).translate(_CELL) for cell in row)} |" for row in rows]
    return [*lines, ""]


def name_of(uid: str) -> str:
    """The name of a UID in PS3.6."""
    return UID(uid).name


def named(uids: Iterable[str]) -> str:
    """Their names in a row."""
    return ", ".join(name_of(uid) for uid in uids)


def yes(value: bool) -> str:
    """yes or no."""
    return "yes" if value else "no"
