"""The study that the readers share; it is written once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from reader_study import ENCODINGS, ReaderStudy, make_study, write_files


@dataclass(frozen=True, kw_only=True)
class Written:
    """A study with its results written as files: for each encoding, a folder for each kind of series."""

    study: ReaderStudy
    results: dict[str, dict[str, Path]]

    def files(self, encoding: str, kind: str = "pet") -> list[Path]:
        """The files of one series in sending order."""
        return sorted(self.results[encoding][kind].iterdir())


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    folder = tmp_path_factory.mktemp("reader-study")
    study = make_study(folder / "ct")
    results = {
        encoding: {
            kind: write_files(series, folder / encoding / kind)[0].parent
            for kind, series in study.result(encoding).items()
        }
        for encoding in ENCODINGS
    }
    return Written(study=study, results=results)
