"""What can be wrong with data, runs and reports; each carries a code for machines and a text for people.

TrainingError
├── StudyError      one study cannot be used; the others can
├── DataError       a folder of studies, or what was prepared from it, cannot be used
└── RunError        a run directory, a set of runs, or a report does not fit
"""

from __future__ import annotations


class TrainingError(Exception):
    """Any of these. `code` is a short word, `text` names the thing, what was found and what is expected."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code, self.text = code, text

    def __reduce__(self) -> tuple[type[TrainingError], tuple[str, str]]:  # it travels between processes
        return type(self), (self.code, self.text)


class StudyError(TrainingError):
    """One study cannot be used."""


class DataError(TrainingError):
    """A data folder cannot be used."""


class RunError(TrainingError):
    """A run, a set of runs, or a report does not fit."""
