"""A series from an archive: C-MOVE and C-GET, and every way in which an archive does not send one."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ct_factory import write_ct
from fake_retrieve import FIND, MOVE, FakeRetrieve, Script
from intake_tools import Intake, config, running_intake
from pydicom import Dataset, dcmread
from pydicom.uid import generate_uid

from dicom_node.net.link import Timeouts
from dicom_node.net.move import DESTINATION_UNKNOWN, Retrieval, RetrieveOutcome, _Counts, _judged
from dicom_node.net.query import Finder
from dicom_node.net.store import Store

PATIENT = Timeouts(acse_s=60.0, dimse_s=60.0, network_s=60.0)
STUDY, SERIES = generate_uid(), generate_uid()


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_ct(tmp_path_factory.mktemp("ct"), np.zeros((4, 8, 8)), study_uid=STUDY, series_uid=SERIES)


@pytest.fixture(scope="module")
def intake(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Intake]:
    peers = [{"name": "archive", "ae_title": "ARCHIVE"}]
    with running_intake(tmp_path_factory.mktemp("node"), config(peers=peers)) as made:
        yield made


@pytest.fixture(autouse=True)
def empty(intake: Intake) -> None:
    intake.wait(lambda: not intake.registry.open_tokens())  # an archive that was stopped may have sent a moment ago
    for path in intake.spool.incoming():
        intake.spool.drop(path)


def retrieval(archive: FakeRetrieve, **changes: Any) -> Retrieval:
    known: dict[str, Any] = {"peer": archive.peer(), "calling_ae": "SYNPET", "timeouts": PATIENT}
    return Retrieval(**{**known, **changes})


def fetch(
    archive: FakeRetrieve, intake: Intake, method: str, *, store: Store | None = None, **changes: Any
) -> RetrieveOutcome:
    how = retrieval(archive, **changes)
    if method == "move":
        return how.move(STUDY, SERIES)
    token = intake.registry.open(calling_ae="ARCHIVE", address="127.0.0.1", peer="archive")
    assert token is not None
    store = store or Store(intake.config, intake.spool, intake.ledger, intake.registry)
    try:
        return how.get(STUDY, SERIES, store, token)
    finally:
        intake.registry.close(token)


BOTH = pytest.mark.parametrize("method", ["move", "get"])


@BOTH
def test_every_instance_comes_as_the_archive_has_it(paths: list[Path], intake: Intake, method: str) -> None:
    seen: list[tuple[int, int | None]] = []
    with FakeRetrieve(paths, node_port=intake.port) as archive:
        outcome = fetch(archive, intake, method, progress=lambda done, total: seen.append((done, total)))
    assert (outcome.code, outcome.completed, outcome.failed) == ("", 4, 0)
    assert {path.stem for path in intake.spool.incoming()} == {path_uid(path) for path in paths}
    assert seen[-1][1] == 4


def path_uid(path: Path) -> str:
    return str(dcmread(path, specific_tags=["SOPInstanceUID"]).SOPInstanceUID)


@BOTH
@pytest.mark.parametrize(
    ("script", "code", "permanent"),
    [
        (Script.REFUSES, "retrieve_refused", False),
        (Script.HALF, "incomplete", False),
        (Script.NOTHING, "incomplete", False),
        (Script.ABORTS, "no_response", False),
    ],
)
def test_a_retrieval_that_brings_less_is_told_apart(
    paths: list[Path], intake: Intake, method: str, script: Script, code: str, permanent: bool
) -> None:
    with FakeRetrieve(paths, node_port=intake.port, script=script) as archive:
        outcome = fetch(archive, intake, method)
    assert (outcome.code, outcome.permanent) == (code, permanent), outcome.text
    if script is Script.HALF:
        assert (outcome.completed, outcome.failed, len(outcome.failed_uids)) == (2, 2, 2)


def test_an_archive_that_does_not_know_us_is_an_operators_matter(paths: list[Path], intake: Intake) -> None:
    with FakeRetrieve(paths, node_port=intake.port, script=Script.UNKNOWN_DESTINATION) as archive:
        outcome = fetch(archive, intake, "move")
    assert (outcome.code, outcome.permanent) == ("destination_unknown", True)
    assert "does not know SYNPET" in outcome.text
    assert DESTINATION_UNKNOWN == 0xA801


@BOTH
def test_an_archive_that_falls_silent_is_given_up(paths: list[Path], intake: Intake, method: str) -> None:
    with FakeRetrieve(paths, node_port=intake.port, script=Script.SILENT) as archive:
        timeouts = Timeouts(acse_s=60.0, dimse_s=0.3, network_s=60.0)
        outcome = fetch(archive, intake, method, timeouts=timeouts)
        archive.stopped.set()
    assert (outcome.code, outcome.permanent) == ("no_response", False)


@BOTH
def test_answers_without_end_are_cancelled(paths: list[Path], intake: Intake, method: str) -> None:
    with FakeRetrieve(paths, node_port=intake.port, script=Script.ENDLESS) as archive:
        outcome = fetch(archive, intake, method, most_s=0.2)
    assert (outcome.code, outcome.permanent) == ("too_long", False)


def test_a_stop_ends_a_retrieval(paths: list[Path], intake: Intake) -> None:
    with FakeRetrieve(paths, node_port=intake.port, script=Script.ENDLESS) as archive:
        outcome = fetch(archive, intake, "move", should_stop=lambda: True)
    assert outcome.code == "interrupted"


@BOTH
def test_a_stop_does_not_wait_for_a_silent_archive(paths: list[Path], intake: Intake, method: str) -> None:
    with FakeRetrieve(paths, node_port=intake.port, script=Script.SILENT) as archive:
        patient = Timeouts(acse_s=60.0, dimse_s=600.0, network_s=600.0)
        outcome = fetch(archive, intake, method, timeouts=patient, should_stop=lambda: bool(archive.moves))
        assert not archive.stopped.is_set()
    assert outcome.code == "interrupted"


def test_a_service_that_is_not_offered_is_named(paths: list[Path], intake: Intake) -> None:
    with FakeRetrieve(paths, node_port=intake.port, classes=[FIND]) as archive:
        assert fetch(archive, intake, "move").code == "not_offered"
    with FakeRetrieve(paths, node_port=intake.port, classes=[FIND, MOVE]) as archive:
        outcome = fetch(archive, intake, "get")  # it takes the CT contexts, and C-GET not
    assert (outcome.code, outcome.permanent) == ("not_offered", True)
    assert "C-GET" in outcome.text


def test_nothing_is_kept_of_a_get_that_finds_no_room(paths: list[Path], intake: Intake, tmp_path: Path) -> None:
    full = config(intake={"max_instance_bytes": 1_000_000})
    store = Store(full, intake.spool, intake.ledger, intake.registry)
    store.max_bytes = 10
    with FakeRetrieve(paths, node_port=intake.port) as archive:
        outcome = fetch(archive, intake, "get", store=store)
    assert (outcome.code, outcome.completed, outcome.failed) == ("retrieve_refused", 0, 4)
    assert "is there room here?" in outcome.text
    assert intake.spool.incoming() == []


def last_answer(**counts: int) -> _Counts:
    ds, counted = Dataset(), _Counts()
    for keyword, value in counts.items():
        setattr(ds, f"NumberOf{keyword}Suboperations", value)
    counted.read(ds)
    return counted


@pytest.mark.parametrize(
    ("status", "counts", "code"),
    [
        (0x0000, {"Completed": 4, "Failed": 0, "Warning": 0}, ""),
        (0x0000, {}, ""),  # an archive that does not count
        (0x0000, {"Completed": 3, "Failed": 1}, "incomplete"),  # Success, it says
        (0xB000, {"Completed": 2, "Warning": 2, "Failed": 0}, ""),  # nothing failed
        (0xB000, {"Completed": 2, "Failed": 2}, "incomplete"),
        (0xB000, {}, "incomplete"),
        (0xA701, {}, "retrieve_refused"),
        (0xA702, {}, "retrieve_refused"),
        (0xA801, {}, "destination_unknown"),
        (0xA900, {}, "retrieve_refused"),
        (0xC123, {}, "retrieve_refused"),
        (0xFE00, {"Completed": 2}, "retrieve_refused"),
        (0x0122, {}, "not_offered"),
        (0x0211, {}, "not_offered"),
    ],
)
def test_the_last_answer_is_judged_by_its_counts(status: int, counts: dict[str, int], code: str) -> None:
    with FakeRetrieve([]) as archive:
        trouble = _judged(status, last_answer(**counts), retrieval(archive))
    assert (trouble.code if trouble else "") == code


# ---- what is found


def finder(archive: FakeRetrieve) -> Finder:
    return Finder(archive.peer(), calling_ae="SYNPET", timeouts=PATIENT)


def test_a_study_is_found_by_its_accession_number_and_no_other(paths: list[Path]) -> None:
    with FakeRetrieve(paths) as archive:
        [study] = finder(archive).studies_of_accession("ACC1").studies
        assert (study.study_uid, study.accession, study.study_date) == (STUDY, "ACC1", "20240102")
        assert finder(archive).studies_of_accession("ACC2").studies == ()
        archive.shows_all = True  # an archive that ignores what it does not match
        assert finder(archive).studies_of_accession("ACC2").studies == ()
        assert finder(archive).study(generate_uid()).studies == ()
        assert finder(archive).ct_studies(date(2026, 1, 1), date(2026, 1, 2)).studies == ()


def test_ct_series_are_found_with_their_counts(paths: list[Path]) -> None:
    with FakeRetrieve(paths) as archive:
        [series] = finder(archive).ct_series(STUDY).series
        assert (series.series_uid, series.instances, series.description) == (SERIES, 4, "BODY 3.0 B40f")
        archive.counts = False
        [series] = finder(archive).ct_series(STUDY).series
        assert series.instances is None
        archive.modality = "MR"
        assert finder(archive).ct_series(STUDY).series == ()


def test_the_days_are_asked_as_a_range_and_the_modality_as_a_key(paths: list[Path]) -> None:
    with FakeRetrieve(paths) as archive:
        found = finder(archive).ct_studies(date(2024, 1, 1), date(2024, 1, 3))
        finder(archive).ct_studies(date(2024, 1, 2), date(2024, 1, 2))
    assert [study.study_uid for study in found.studies] == [STUDY]
    assert [query.StudyDate for query in archive.queries] == ["20240101-20240103", "20240102"]
    assert {query.ModalitiesInStudy for query in archive.queries} == {"CT"}


def test_a_refused_question_says_so(paths: list[Path]) -> None:
    with FakeRetrieve(paths, find_status=0xA700) as archive:
        outcome = finder(archive).studies_of_accession("ACC1")
    assert (outcome.code, outcome.studies) == ("find_refused", ())
