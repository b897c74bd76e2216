"""The back-off, as a table."""

from __future__ import annotations

import pytest

from dicom_node.retry import retry_delay_s


@pytest.mark.parametrize(
    ("attempts", "first_s", "longest_s", "expected_s"),
    [
        (1, 30.0, 3600.0, 30.0),
        (2, 30.0, 3600.0, 60.0),
        (3, 30.0, 3600.0, 120.0),
        (7, 30.0, 3600.0, 1920.0),
        (8, 30.0, 3600.0, 3600.0),
        (1000, 30.0, 3600.0, 3600.0),
        (1, 60.0, 10.0, 10.0),
    ],
)
def test_the_pause_doubles_up_to_the_longest(
    attempts: int, first_s: float, longest_s: float, expected_s: float
) -> None:
    assert retry_delay_s(attempts, first_s=first_s, longest_s=longest_s) == expected_s


def test_no_attempt_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        retry_delay_s(0, first_s=1.0, longest_s=2.0)
