"""The study that the readers share; it is written once."""

from __future__ import annotations

import pytest
from reader_study import ENCODINGS, Written, make_study, write_files


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
