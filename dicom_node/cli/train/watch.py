"""How `train run` and `train all` show where they are: a bar on a terminal, a line a minute in a log file."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from dicom_node.cli.common import console, console_err, safe, table

if TYPE_CHECKING:
    from training.runs import RunRecord

LINE_EVERY_S = 60.0


class Watch:
    """One bar with the time left as training estimates it: steps of different models take different times."""

    def __init__(self, what: str) -> None:
        self._terminal = console_err.is_terminal
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description:<28}"),
            BarColumn(bar_width=32),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=console_err,
            disable=not self._terminal,
        )
        self._task = self._bar.add_task(what, total=None, left="")
        self._said = -LINE_EVERY_S

    def __enter__(self) -> Watch:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def show(self, *, done: int, total: int, seconds_left: float | None, text: str, notable: bool) -> None:
        """Where it is. A notable text is always printed, the others once a minute, on a terminal not at all."""
        left = "" if seconds_left is None else f"{time_text(seconds_left)} left"
        self._bar.update(self._task, completed=done, total=total, left=left)
        if notable or (not self._terminal and time.monotonic() - self._said >= LINE_EVERY_S):
            self._said = self._said if notable else time.monotonic()
            self._bar.console.print(safe(f"{text}; {left}" if left else text), soft_wrap=True)


def time_text(seconds: float) -> str:
    """Time for people: "45 s", "12 min", "3 h 20 min"."""
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def print_records(records: Sequence[RunRecord]) -> None:
    """The final table."""
    shown = table("trained networks", "model", "network", "seed", "steps", "minutes", "L1", "validation MAE")
    for record in records:
        shown.add_row(
            record.model,
            record.network,
            str(record.seed),
            str(record.step),
            f"{record.seconds / 60:.1f}",
            f"{record.losses['l1']:.5f}" if "l1" in record.losses else "",
            f"{record.validation[-1]['mae']:.5f}" if record.validation else "",
        )
    console.print(shown)
