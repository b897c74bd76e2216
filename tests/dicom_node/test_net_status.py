"""The table of DIMSE statuses."""

from __future__ import annotations

from itertools import pairwise

import pytest

from dicom_node.net.status import ANSWERS, MEANINGS, Outcome, Status, classify, status_text


@pytest.mark.parametrize(
    ("status", "outcome"),
    [
        (0x0000, Outcome.OK),
        (0x0110, Outcome.TRANSIENT),
        (0x0111, Outcome.OK),
        (0x0122, Outcome.PERMANENT),
        (0x0124, Outcome.PERMANENT),
        (0x0213, Outcome.TRANSIENT),
        (0xA700, Outcome.TRANSIENT),
        (0xA7FF, Outcome.TRANSIENT),
        (0xA900, Outcome.PERMANENT),
        (0xB000, Outcome.OK),
        (0xB006, Outcome.OK),
        (0xB007, Outcome.OK),
        (0xB101, Outcome.OK),
        (0xC000, Outcome.PERMANENT),
        (0xC123, Outcome.PERMANENT),
        (0x1234, Outcome.PERMANENT),
    ],
)
def test_a_status_is_ok_transient_or_permanent(status: int, outcome: Outcome) -> None:
    assert classify(status) is outcome


def test_the_ranges_of_the_table_do_not_overlap_and_are_in_order() -> None:
    for one, other in pairwise(MEANINGS):
        assert one.first <= one.last < other.first


def test_every_status_that_we_answer_with_is_in_the_table() -> None:
    assert all("Unknown" not in status_text(status) for status in Status)


def test_every_status_that_we_answer_with_says_when() -> None:
    assert set(ANSWERS) == set(Status)
    assert all(ANSWERS.values())
