"""C-FIND of archives whose answers do not end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fake_archive import FakeArchive
from pydicom import Dataset
from pydicom.dataelem import RawDataElement
from pydicom.tag import Tag
from pynetdicom import evt

from dicom_node.net import query
from dicom_node.net.query import CountOutcome, count_series_instances

STUDY, SERIES = "1.2.3", "1.2.3.4"


class Chatty(FakeArchive):
    """Answers fifty times with the same instance, or with the series without a count."""

    def _on_find(self, event: evt.Event) -> Iterator[tuple[int, Dataset | None]]:
        self.levels.append(str(event.identifier.QueryRetrieveLevel))
        for _ in range(50):
            ds = Dataset()
            ds.QueryRetrieveLevel = event.identifier.QueryRetrieveLevel
            ds.StudyInstanceUID, ds.SeriesInstanceUID = STUDY, SERIES
            if ds.QueryRetrieveLevel == "IMAGE":
                ds.SOPInstanceUID = f"{SERIES}.1"
            yield 0xFF00, ds


def count(should_stop: Callable[[], bool] = lambda: False) -> tuple[CountOutcome, list[str]]:
    with Chatty() as archive:
        peer = archive.peer()
        outcome = count_series_instances(peer, STUDY, SERIES, calling_ae="SYNPET", should_stop=should_stop)
    return outcome, archive.levels


def test_an_instance_that_is_shown_often_counts_once() -> None:
    outcome, levels = count()
    assert (outcome.ok, outcome.count, levels) == (True, 1, ["SERIES", "IMAGE"])


def test_more_answers_than_any_series_has_are_not_listened_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(query, "MOST_ANSWERS", 20)
    outcome, levels = count()
    assert (outcome.code, outcome.permanent, outcome.count) == ("too_many_answers", False, None)
    assert levels == ["SERIES"]


def test_answers_that_do_not_end_in_time_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(query, "_MOST_S", -1.0)
    outcome, _ = count()
    assert (outcome.code, outcome.permanent) == ("find_unanswered", False)


def test_a_stop_ends_the_counting() -> None:
    outcome, levels = count(should_stop=lambda: True)
    assert (outcome.code, outcome.count, levels) == ("interrupted", None, ["SERIES"])


def told(value: bytes) -> RawDataElement:
    """Number of Series Related Instances as it comes from the wire."""
    return RawDataElement(Tag("NumberOfSeriesRelatedInstances"), "IS", len(value), value, 0, False, True)


class Odd(FakeArchive):
    """Says of a series what is no number of instances; shows three of it, and one of another series."""

    says: Any = None

    def _on_find(self, event: evt.Event) -> Iterator[tuple[int, Dataset | None]]:
        level = str(event.identifier.QueryRetrieveLevel)
        self.levels.append(level)
        for number in range(4) if level == "IMAGE" else range(1):
            ds = Dataset()
            ds.QueryRetrieveLevel, ds.StudyInstanceUID = level, STUDY
            ds.SeriesInstanceUID = SERIES if number < 3 else f"{SERIES}.9"
            if level == "IMAGE":
                ds.SOPInstanceUID = f"{SERIES}.{number}"
            else:
                ds.add(told(self.says))
            yield 0xFF00, ds


@pytest.mark.parametrize("says", [b"3\\3 ", b"-1", b"0 ", b"  "])
def test_what_is_no_number_of_instances_is_counted_instead(says: bytes) -> None:
    with Odd() as archive:
        archive.says = says
        outcome = count_series_instances(archive.peer(), STUDY, SERIES, calling_ae="SYNPET")
    assert (outcome.ok, outcome.count, archive.levels) == (True, 3, ["SERIES", "IMAGE"])


@pytest.mark.filterwarnings("ignore:Invalid value for VR IS")
@pytest.mark.parametrize("says", [b"many", b"0x3 "])
def test_what_no_parser_takes_for_a_number_is_none(says: bytes) -> None:
    assert query._number(Dataset({Tag("NumberOfSeriesRelatedInstances"): told(says)})) is None


class Bare(FakeArchive):
    """Answers the C-FIND, and does not say about which series."""

    def _on_find(self, event: evt.Event) -> Iterator[tuple[int, Dataset | None]]:
        self.levels.append(str(event.identifier.QueryRetrieveLevel))
        ds = Dataset()
        ds.QueryRetrieveLevel = "SERIES"
        yield 0xFF00, ds


def test_an_answer_that_names_no_series_shows_none() -> None:
    with Bare() as archive:
        outcome = count_series_instances(archive.peer(), STUDY, SERIES, calling_ae="SYNPET")
    assert (outcome.ok, outcome.count) == (True, 0)
