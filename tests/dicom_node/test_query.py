"""C-FIND of archives whose answers do not end."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from fake_archive import FakeArchive
from pydicom import Dataset
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
    assert (outcome.code, outcome.permanent) == ("no_response", False)


def test_a_stop_ends_the_counting() -> None:
    outcome, levels = count(should_stop=lambda: True)
    assert (outcome.code, outcome.count, levels) == ("interrupted", None, ["SERIES"])
