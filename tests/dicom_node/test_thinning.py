"""What repeats is one event a minute, and no stranger makes more than the budget."""

from __future__ import annotations

from intake_tools import Clock

from dicom_node.net.thinning import BUDGET, MOST_NAMES, PERIOD_S, Names, Thinning, without_numbers


def test_what_repeats_is_told_once_a_period_with_a_count() -> None:
    clock = Clock()
    thinning = Thinning(clock)
    assert thinning.told("refused", "10.0.0.1") == {"repeated": 0}
    assert thinning.told("refused", "10.0.0.1") is None
    assert thinning.told("refused", "10.0.0.1", 5) is None
    assert thinning.told("refused", "10.0.0.2") == {"repeated": 0}
    clock.now += PERIOD_S
    assert thinning.told("refused", "10.0.0.1") == {"repeated": 6}


def test_whatever_the_keys_a_period_has_no_more_events_than_the_budget() -> None:
    clock = Clock()
    thinning = Thinning(clock)
    told = [thinning.told("refused", str(number)) for number in range(10 * BUDGET)]
    assert told.count(None) == 9 * BUDGET
    assert thinning.told("dropped", "another code has its own") == {"repeated": 0}
    clock.now += PERIOD_S
    assert thinning.told("refused", "new") == {"repeated": 0, "others_left_out": 9 * BUDGET}
    assert thinning.told("refused", "newer") == {"repeated": 0}


def test_what_is_remembered_is_bounded() -> None:
    clock = Clock()
    thinning = Thinning(clock)
    for number in range(200_000):
        clock.now += 0.1
        thinning.told("refused", str(number))
    assert len(thinning._seen) <= 1000


def test_a_number_that_a_peer_chose_is_no_part_of_a_key() -> None:
    assert without_numbers("PDU type 0xFA of 17 bytes") == without_numbers("PDU type 0x09 of 4294967295 bytes")


def test_the_first_names_of_an_address_are_told_apart_and_the_next_period_begins_anew() -> None:
    clock = Clock()
    names = Names(clock)
    known = [names.known("10.0.0.1", f"CT_{number}") for number in range(20)]
    assert known == [True] * MOST_NAMES + [False] * (20 - MOST_NAMES)
    assert names.known("10.0.0.1", "CT_0")
    assert names.known("10.0.0.2", "CT_19")
    clock.now += PERIOD_S
    assert names.known("10.0.0.1", "CT_19")


def test_the_names_that_are_remembered_are_bounded() -> None:
    names = Names(Clock())
    for number in range(20_000):
        names.known(f"address {number % 5000}", f"title {number}")
    assert len(names._known) == 1000
    assert max(map(len, names._known.values())) <= MOST_NAMES
