"""The study that the readers share; it is written once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from reader_study import ENCODINGS, ReaderStudy, make_study, write_files


@dataclass(frozen=True, kw_only=True)
class Written:
    """A study with its result written as files: one folder for each encoding, and for the companions."""

    study: ReaderStudy
    pet: dict[str, Path]
    mip: Path
    seg: Path


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    folder = tmp_path_factory.mktemp("reader-study")
    study = make_study(folder / "ct")
    pets = {encoding: folder / encoding for encoding in ENCODINGS}
    for encoding, path in pets.items():
        write_files(study.pet(encoding), path)
    (mip,) = write_files(study.mip(), folder / "mip")
    (seg,) = write_files(study.seg(), folder / "seg")
    return Written(study=study, pet=pets, mip=mip, seg=seg)
