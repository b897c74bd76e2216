"""Counting a series by QIDO-RS where a service does not do as the standard's examples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from fake_web import Answer, FakeWeb

from dicom_node.net.answers import MOST_BYTES
from dicom_node.net.qido import check_service, count_series_instances

STUDY, SERIES = "1.2.3", "1.2.3.4"
Query = Mapping[str, list[str]]


def element(vr: str, *values: Any) -> dict[str, Any]:
    return {"vr": vr, "Value": list(values)}


def series(uid: str = SERIES, **more: Any) -> dict[str, Any]:
    return {"0020000E": element("UI", uid), **more}


def instances(*numbers: int) -> list[dict[str, Any]]:
    return [{"00080018": element("UI", f"{SERIES}.{number}")} for number in numbers]


@pytest.mark.parametrize("number", [412, "412"])
def test_the_number_that_the_service_gives_is_taken(number: int | str) -> None:
    with FakeWeb(found=lambda path, query: [series(**{"00201209": element("IS", number)})]) as web:
        counted = count_series_instances(web.service(), STUDY, SERIES)
    assert (counted.ok, counted.count) == (True, 412)
    (asked,) = web.gets
    assert asked.startswith(f"/dicom-web/studies/{STUDY}/series?")
    assert f"SeriesInstanceUID={SERIES}" in asked
    assert "includefield=00201209" in asked


def test_without_that_number_the_instances_are_counted_page_by_page() -> None:
    def found(path: str, query: Query) -> list[dict[str, Any]]:
        if path.endswith("/instances"):
            start = int(query["offset"][0])
            return instances(*range(start, min(start + 1000, 1234)))
        return [series()]

    with FakeWeb(found=found) as web:
        assert count_series_instances(web.service(), STUDY, SERIES).count == 1234


def test_a_service_that_repeats_its_first_page_does_not_hold_us_up() -> None:
    with FakeWeb(found=lambda path, query: instances(1, 2, 2) if path.endswith("/instances") else [series()]) as web:
        assert count_series_instances(web.service(), STUDY, SERIES).count == 2
    assert len(web.gets) == 3


def test_an_instance_without_a_uid_is_none_and_padding_is_no_part_of_one() -> None:
    shown = [*instances(1), {"00080018": element("UI", f"{SERIES}.1 ")}, {"00080018": {"vr": "UI"}}, {}]
    with FakeWeb(found=lambda path, query: shown if path.endswith("/instances") else [series(f"{SERIES}\0")]) as web:
        assert count_series_instances(web.service(), STUDY, SERIES).count == 1


def test_a_stop_ends_the_counting_before_the_next_page() -> None:
    with FakeWeb(found=lambda path, query: instances(1, 2) if path.endswith("/instances") else [series()]) as web:
        counted = count_series_instances(web.service(), STUDY, SERIES, should_stop=lambda: len(web.gets) >= 2)
    assert (counted.code, counted.permanent, counted.count, len(web.gets)) == ("interrupted", False, None, 2)


@pytest.mark.parametrize("found", [[], [series("1.2.3.5", **{"00201209": element("IS", 9)})]])
def test_a_series_that_is_not_shown_counts_nothing(found: list[dict[str, Any]]) -> None:
    with FakeWeb(found=lambda path, query: found) as web:
        assert count_series_instances(web.service(), STUDY, SERIES).count == 0


@pytest.mark.parametrize(
    ("answer", "code", "permanent"),
    [
        (Answer(status=401), "unauthorized", True),
        (Answer(status=501), "not_offered", True),
        (Answer(status=503), "service_busy", False),
        (Answer(status=302, headers={"Location": "/login"}), "redirected", True),
        (Answer(body=b"<html>", media_type="text/html"), "answer_unreadable", True),
        (Answer(cut=True), "connection_failed", False),
        (Answer(body=b"[" * 100_000), "answer_unreadable", True),
        (Answer(body=b"[" + b"9" * 5000 + b"]"), "answer_unreadable", True),
        (Answer(body=b"7"), "answer_unreadable", True),
        (Answer(body=b" " * (MOST_BYTES + 1)), "answer_too_large", True),
    ],
)
def test_a_search_that_fails_has_a_name(answer: Answer, code: str, permanent: bool) -> None:
    with FakeWeb(found=lambda path, query: answer) as web:
        counted = count_series_instances(web.service(), STUDY, SERIES)
    assert (counted.code, counted.permanent, counted.count) == (code, permanent, None)
    assert len(web.gets) == 1  # no tries that the ledger does not know of


def only_studies(path: str, _query: Query) -> Any:
    return [{"0020000D": element("UI", "1.2.9")}] if path.endswith("/studies") else Answer(status=404)


def test_a_404_of_a_service_that_finds_studies_means_that_the_series_is_not_shown() -> None:
    with FakeWeb(found=only_studies) as web:
        counted = count_series_instances(web.service(), STUDY, SERIES)
    assert (counted.ok, counted.count) == (True, 0)
    assert web.gets[1:] == ["/dicom-web/studies?limit=1"]


@pytest.mark.parametrize(("status", "code"), [(404, "not_offered"), (503, "service_busy"), (401, "unauthorized")])
def test_a_404_of_a_service_that_finds_no_studies_is_what_that_search_says(status: int, code: str) -> None:
    def found(path: str, _query: Query) -> Answer:
        return Answer(status=status if path.endswith("/studies") else 404)

    with FakeWeb(found=found) as web:
        counted = count_series_instances(web.service(), STUDY, SERIES)
    assert (counted.code, counted.count) == (code, None)


def test_a_check_with_nothing_found_is_good() -> None:
    with FakeWeb() as web:
        assert check_service(web.service()) is None
    assert web.gets == ["/dicom-web/studies?limit=1"]
