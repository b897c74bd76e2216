"""One instance on its way in: what stays of it, and what does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from storage.incoming_file import IncomingFile
from storage.spool import Spool

TOKEN = "ab12"


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(tmp_path, min_free_bytes=0)


def inbox(spool: Spool) -> list[str]:
    return sorted(path.name for path in (spool.root / "inbox" / "incoming").rglob("*"))


def test_an_instance_that_is_given_up_leaves_no_folder_of_its_association(spool: Spool) -> None:
    file = spool.open_incoming(TOKEN, "1.2.3")
    file.write(b"half")
    file.discard()
    file.discard()
    assert inbox(spool) == []


def test_one_that_is_given_up_leaves_the_others_of_its_association(spool: Spool) -> None:
    spool.store_incoming(TOKEN, "1.2.3", (b"whole",))
    spool.open_incoming(TOKEN, "1.2.4").discard()
    assert inbox(spool) == ["1.2.3.dcm", TOKEN]


def test_the_next_instance_makes_the_folder_again(spool: Spool) -> None:
    spool.open_incoming(TOKEN, "1.2.3").discard()
    assert spool.store_incoming(TOKEN, "1.2.4", (b"whole",)).read_bytes() == b"whole"


def test_what_the_assembler_takes_at_that_moment_is_stored_again(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    first = spool.store_incoming(TOKEN, "1.2.3", (b"whole",))

    def taken_away(_one: Path, other: Path) -> bool:
        other.unlink()
        raise FileNotFoundError

    monkeypatch.setattr("storage.incoming_file.same_bytes", taken_away)
    assert spool.store_incoming(TOKEN, "1.2.3", (b"whole",)) == first
    assert first.read_bytes() == b"whole"


def test_the_halves_of_a_killed_process_go_and_what_is_whole_stays(spool: Spool) -> None:
    whole = spool.store_incoming(TOKEN, "1.2.3", (b"whole",))
    killed = spool.open_incoming(TOKEN, "1.2.4")
    killed.write(b"half")
    alone = spool.open_incoming("cd34", "1.2.5")
    for token in (TOKEN, "cd34", "ef56"):
        spool.drop_halves(token)
    assert inbox(spool) == [whole.name, TOKEN]
    for file in (killed, alone):
        file.discard()


def test_pieces_of_any_size_come_together(tmp_path: Path) -> None:
    file = IncomingFile(tmp_path / "1.2.dcm", sync=False)
    for piece in (b"a", memoryview(b"bc"), b"", b"d" * 100_000):
        file.write(piece)
    assert file.commit().read_bytes() == b"abc" + b"d" * 100_000
