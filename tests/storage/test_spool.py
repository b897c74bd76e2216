"""The spool: durable, whole, within its folders, whatever a peer sends and whenever it is killed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from storage import durable
from storage.errors import BadUid, NoSpace, NotFound, StorageError
from storage.incoming_file import PREAMBLE_BYTES
from storage.spool import Adopted, Spool, check_uid

ASSOC = "a1b2c3"
JOB, NEXT = "0" * 31 + "1", "0" * 31 + "2"
SERIES = "1.2.3"


def tree(root: Path) -> list[str]:
    """The files, without the empty ones that wait for the next instances of an association that is open."""
    files = (path for path in root.rglob("*") if path.is_file())
    return sorted(str(path.relative_to(root)) for path in files if not durable.is_temp(path) or path.stat().st_size)


def content(path: Path) -> bytes:
    return path.read_bytes()[PREAMBLE_BYTES:]


def adopted(spool: Spool, sop: str, content: bytes = b"ct") -> Adopted:
    return spool.adopt(spool.store_incoming(ASSOC, sop, [content]), SERIES)


def test_an_instance_is_stored_whole_under_its_uid(spool: Spool) -> None:
    path = spool.store_incoming(ASSOC, "1.2.3.4", [b"DI", b"", b"CM"])
    assert path == spool.root / "inbox" / "incoming" / ASSOC / "1.2.3.4.dcm"
    assert content(path) == b"DICM"
    assert spool.incoming() == [path]
    assert spool.association_of(path) == ASSOC


def test_bytes_and_seal_are_on_disk_before_the_name(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    file = spool.open_incoming(ASSOC, "1.2")  # its slot is on the disk
    file.write(b"ct")
    done: list[str] = []
    fsync, rename, pwrite = os.fsync, Path.rename, os.pwrite
    folder = spool.root / "inbox" / "incoming" / ASSOC

    def spy_fsync(handle: int) -> None:
        name = Path(f"/proc/self/fd/{handle}").readlink()
        done.append("folder" if name == folder else "file" if name.parent == folder else str(name))
        fsync(handle)

    def spy_rename(path: Path, target: Path) -> Path:
        done.append("rename")
        return rename(path, target)

    def spy_pwrite(handle: int, piece: bytes, at: int) -> int:
        done.append("seal")
        return pwrite(handle, piece, at)

    monkeypatch.setattr(durable.os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "pwrite", spy_pwrite)
    monkeypatch.setattr(Path, "rename", spy_rename)
    file.commit()
    assert done == ["seal", "file", "rename"]


def test_the_same_instance_twice_is_one_file_and_another_content_is_kept_beside_it(spool: Spool) -> None:
    first = spool.store_incoming(ASSOC, "1.2", [b"one"])
    assert spool.store_incoming(ASSOC, "1.2", [b"o", b"ne"]) == first
    second = spool.store_incoming(ASSOC, "1.2", [b"two"])
    assert second.name == "1.2~2.dcm"
    assert spool.store_incoming(ASSOC, "1.2", [b"two"]) == second
    assert spool.store_incoming(ASSOC, "1.2", [b"three"]).name == "1.2~3.dcm"
    assert content(first) == b"one"
    assert len(tree(spool.root)) == 3


def test_a_sender_that_breaks_off_leaves_nothing(spool: Spool) -> None:
    def chunks() -> Iterator[bytes]:
        yield b"half"
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        spool.store_incoming(ASSOC, "1.2", chunks())
    assert tree(spool.root) == []


HOSTILE = [
    "",
    ".",
    "..",
    "../1",
    "1/2",
    "/1.2",
    "1.2.",
    ".1",
    "1..2",
    "1.2\n",
    "1.2\x00",
    "1.a",
    "\u0661.2",
    "1" * 65,
    "1~2",
]


@pytest.mark.parametrize("uid", HOSTILE)
def test_a_hostile_uid_never_becomes_a_path(spool: Spool, uid: str) -> None:
    with pytest.raises(BadUid) as caught:
        spool.store_incoming(ASSOC, uid, [b"x"])
    assert str(caught.value).isprintable()
    path = spool.store_incoming(ASSOC, "1.2", [b"x"])
    for use in (lambda: spool.adopt(path, uid), lambda: spool.series_files(uid), lambda: spool.take_series(JOB, uid)):
        with pytest.raises(BadUid):
            use()
    assert tree(spool.root) == [f"inbox/incoming/{ASSOC}/1.2.dcm"]


@given(st.text(max_size=70) | st.from_regex(r"[0-9./\\~\0]{1,70}", fullmatch=True))
@example("1" * 64)
@example("2.25." + "9" * 39)
def test_whatever_passes_as_a_uid_is_one_plain_file_name(text: str) -> None:
    try:
        uid = check_uid(text)
    except BadUid:
        return
    assert uid == text
    assert 1 <= len(uid) <= 64
    assert set(uid) <= set("0123456789.")
    assert Path("/spool", uid).name == uid
    assert Path(os.path.normpath(f"/spool/{uid}")) == Path("/spool", uid)


@pytest.mark.parametrize("token", ["", "..", "../x", "A1", "a/b", "a" * 65, "a\n"])
def test_a_token_or_job_id_that_is_not_hexadecimal_is_refused(spool: Spool, token: str) -> None:
    for use in (
        lambda: spool.store_incoming(token, "1.2", [b"x"]),
        lambda: spool.work_folder(token),
        lambda: spool.result_folder(token),
        lambda: spool.discard_work(token),
        lambda: spool.take_series(token, SERIES),
    ):
        with pytest.raises(ValueError, match="hexadecimal"):
            use()


def test_nothing_outside_the_spool_is_dropped_or_moved(spool: Spool, tmp_path: Path) -> None:
    outside = tmp_path / "outside.dcm"
    outside.write_bytes(b"x")
    for path in (outside, spool.root / "inbox" / ".." / ".." / "outside.dcm"):
        with pytest.raises(ValueError, match="outside"):
            spool.drop(path)
        with pytest.raises(ValueError, match="outside"):
            spool.quarantine(path, "bad")
    with pytest.raises(ValueError, match="reason"):
        spool.quarantine(spool.store_incoming(ASSOC, "1.2", [b"x"]), "../../etc")
    assert outside.exists()


def test_files_are_sorted_into_their_series(spool: Spool) -> None:
    assert [adopted(spool, "1.1"), adopted(spool, "1.2"), adopted(spool, "1.1")] == ["NEW", "NEW", "SAME"]
    assert adopted(spool, "1.1", b"other") is Adopted.DIFFERENT
    assert spool.series_uids() == [SERIES]
    assert [path.name for path in spool.series_files(SERIES)] == ["1.1.dcm", "1.2.dcm"]
    assert spool.incoming() == []
    [kept] = [path for path in tree(spool.root) if path.startswith("quarantine")]
    assert kept == "quarantine/different_content/1.1.dcm"


def test_another_content_on_the_same_association_goes_to_quarantine(spool: Spool) -> None:
    first, second = (spool.store_incoming(ASSOC, "1.1", [content]) for content in (b"a", b"b"))
    assert spool.adopt(first, SERIES) is Adopted.NEW
    assert spool.adopt(second, SERIES) is Adopted.DIFFERENT
    assert content(spool.series_files(SERIES)[0]) == b"a"


def test_slices_of_an_earlier_job_are_known(spool: Spool) -> None:
    adopted(spool, "1.1")
    spool.take_series(JOB, SERIES)
    path = spool.store_incoming(ASSOC, "1.1", [b"ct"])
    assert spool.adopt(path, SERIES, known=[JOB]) is Adopted.SAME
    assert spool.series_uids() == []
    path = spool.store_incoming(ASSOC, "1.1", [b"changed"])
    assert spool.adopt(path, SERIES, known=[JOB]) is Adopted.DIFFERENT


def test_two_files_of_one_name_have_both_a_place_in_quarantine(spool: Spool) -> None:
    places = [spool.quarantine(spool.store_incoming(ASSOC, "1.2", [b"x"]), "not_dicom").name for _ in range(2)]
    assert places == ["1.2.dcm", "1.2~2.dcm"]


def test_incoming_lists_the_oldest_first(spool: Spool) -> None:
    paths = [spool.store_incoming(token, "1.2", [b"x"]) for token in ("b", "a", "c")]
    for age, path in enumerate(reversed(paths)):
        os.utime(path, (age, age))
    assert spool.incoming() == paths[::-1]


def test_a_series_is_taken_once_and_late_slices_stay_for_a_successor(spool: Spool) -> None:
    adopted(spool, "1.1")
    taken = spool.take_series(JOB, SERIES)
    assert taken == spool.work_folder(JOB) / "ct"
    adopted(spool, "1.2")
    assert spool.take_series(JOB, SERIES) == taken
    assert [path.name for path in spool.ct_files(JOB)] == ["1.1.dcm"]
    spool.take_series(NEXT, SERIES)
    assert spool.link_previous(NEXT, JOB) == 1
    assert spool.link_previous(NEXT, JOB) == 0
    assert [path.name for path in spool.ct_files(NEXT)] == ["1.1.dcm", "1.2.dcm"]
    assert spool.ct_files(NEXT)[0].samefile(spool.ct_files(JOB)[0])
    spool.discard_work(JOB)
    assert content(spool.ct_files(NEXT)[0]) == b"ct"
    assert spool.ct_files(JOB) == []
    with pytest.raises(NotFound, match=r"series 1\.9 is neither in the inbox nor in work"):
        spool.take_series("0" * 32, "1.9")


def test_where_hard_links_are_not_possible_slices_are_copied(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    adopted(spool, "1.1")
    spool.take_series(JOB, SERIES)
    spool.link_previous(NEXT, JOB)
    [copy], [first] = spool.ct_files(NEXT), spool.ct_files(JOB)
    assert copy.read_bytes() == first.read_bytes()
    assert not copy.samefile(first)


def test_files_arriving_while_a_series_is_taken_are_in_one_place_each(spool: Spool) -> None:
    paths = [spool.store_incoming(ASSOC, f"1.{n}", [b"x"]) for n in range(60)]
    spool.adopt(paths.pop(), SERIES)
    thread = threading.Thread(target=lambda: [spool.adopt(path, SERIES) for path in paths])
    thread.start()
    spool.take_series(JOB, SERIES)
    thread.join()
    assert len(spool.ct_files(JOB)) + len(spool.series_files(SERIES)) == 60


def test_a_result_is_there_when_its_summary_is(spool: Spool) -> None:
    folder = spool.result_folder(JOB)
    assert not folder.exists()
    folder.mkdir()
    assert not spool.has_result(JOB)
    (folder / "result.json").write_text("{}")
    assert spool.has_result(JOB)
    spool.discard_result(JOB)
    spool.discard_result(JOB)
    assert not folder.exists()


def test_the_watermark_refuses_before_anything_is_written(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    spool = Spool(tmp_path / "spool", min_free_bytes=free * 2)
    assert not spool.room_for(0)
    with pytest.raises(NoSpace, match="must stay free"):
        spool.store_incoming(ASSOC, "1.2", [b"x"])
    assert tree(spool.root) == []
    assert Spool(tmp_path / "spool", min_free_bytes=0).room_for(1)


FILE_LIMIT = """
import resource, sys
from pathlib import Path
from storage.errors import NoSpace
from storage.spool import Spool
spool = Spool(Path(sys.argv[1]), min_free_bytes=0)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    spool.store_incoming("aa", "1.2", (b"x" * 10_000 for _ in range(100)))
except NoSpace as error:
    print(error)
"""


def test_a_write_beyond_the_file_size_limit_is_no_space_and_leaves_nothing(tmp_path: Path) -> None:
    child = subprocess.run(
        [sys.executable, "-c", FILE_LIMIT, str(tmp_path)], capture_output=True, text=True, timeout=60, check=True
    )
    assert "File too large" in child.stdout
    assert tree(tmp_path) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 256 KiB; only root can mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if os.geteuid() != 0 or mount is None:
        pytest.skip("mounting a small tmpfs needs root")
    made = subprocess.run([mount, "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True, text=True)
    if made.returncode != 0:
        pytest.skip(f"a tmpfs cannot be mounted here: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


SAYS_LESS, SAYS_MORE = "that its disk could take", "No space left on device"


@pytest.mark.parametrize("told", [SAYS_LESS, SAYS_MORE], ids=["seen before", "told by the write"])
def test_a_full_disk_is_no_space_leaves_nothing_half_and_takes_more_when_freed(
    small_disk: Path, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if told == SAYS_MORE:
        monkeypatch.setattr(Spool, "free_bytes", lambda _: 10**12)  # as where others write at the same moment
    spool = Spool(small_disk, min_free_bytes=0)
    stored: list[Path] = []

    def fill() -> None:
        for n in range(100):
            stored.append(spool.store_incoming(ASSOC, f"1.{n}", [bytes(20_000)]))

    with pytest.raises(NoSpace, match=told):
        fill()
    assert 1 < len(stored) < 100
    assert sorted(spool.incoming()) == sorted(stored)
    assert all(path.stat().st_size == PREAMBLE_BYTES + 20_000 for path in stored)
    assert tree(spool.root) == sorted(str(path.relative_to(spool.root)) for path in stored)
    spool.drop(stored[0])
    spool.store_incoming(ASSOC, "1.99", [bytes(20_000)])


def test_instances_that_come_at_once_do_not_take_the_same_room(small_disk: Path) -> None:
    spool = Spool(small_disk, min_free_bytes=100_000)
    one, other = spool.open_incoming("aa", "1.2"), spool.open_incoming("bb", "1.3")
    for file in (one, other):
        file.write(bytes(80_000))
    with pytest.raises(NoSpace, match="must stay free"):
        one.commit()
    assert other.commit().exists()
    assert spool.free_bytes() >= spool.min_free_bytes


STORE_FOREVER = """
import itertools, sys
from pathlib import Path
from storage.spool import Spool
spool = Spool(Path(sys.argv[1]), min_free_bytes=0)
for n in itertools.count():
    path = spool.store_incoming("aa", f"1.{n}", [bytes([n % 256]) * 100_000] * 8)
    print(path.name, flush=True)
"""


def size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # it has its own name now
        return 0


def test_a_kill_while_storing_leaves_only_whole_files_and_all_that_were_acknowledged(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", STORE_FOREVER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    acknowledged = [child.stdout.readline().strip() for _ in range(5)]
    # end it inside a write: a temp file is there while it lives
    folder = tmp_path / "inbox" / "incoming" / "aa"
    while not any(durable.is_temp(path) and size_of(path) for path in folder.iterdir()):
        pass
    child.send_signal(signal.SIGKILL)
    acknowledged += child.communicate(timeout=60)[0].split()
    spool = Spool(tmp_path, min_free_bytes=0)
    spool.clean_temp()
    assert [path for path in tmp_path.rglob("*") if durable.is_temp(path)] == []
    files = {path.name: path for path in spool.incoming()}
    assert set(acknowledged) <= set(files)
    assert len(files) - len(acknowledged) in (0, 1)  # one may be stored and not yet acknowledged
    for name, path in files.items():
        number = int(name.split(".")[1])
        assert content(path) == bytes([number % 256]) * 800_000


def test_a_start_removes_what_a_kill_left_and_nothing_else(spool: Spool) -> None:
    kept = spool.store_incoming(ASSOC, "1.2", [b"x"])
    (kept.parent / ".abc.tmp").write_bytes(b"half")
    (spool.root / "inbox" / "incoming" / "ff").mkdir()
    (spool.root / "outbox" / f"{JOB}.tmp").mkdir()
    (spool.root / "outbox" / f"{JOB}.tmp" / "pet.dcm").write_bytes(b"half")
    assert spool.incoming() == [kept]
    assert spool.clean_temp() == 2
    assert tree(spool.root) == [f"inbox/incoming/{ASSOC}/1.2.dcm"]
    assert not (spool.root / "inbox" / "incoming" / "ff").exists()


def test_retention_removes_what_is_old_and_ended_and_never_the_inbox(spool: Spool) -> None:
    now = datetime.now(UTC)
    old = (now - timedelta(days=10)).timestamp()
    for job_id in (JOB, NEXT):
        (spool.work_folder(job_id) / "ct").mkdir()
        spool.result_folder(job_id).mkdir()
        os.utime(spool.work_folder(job_id), (old, old))
        os.utime(spool.result_folder(job_id), (old, old))
    bad = spool.quarantine(spool.store_incoming(ASSOC, "1.9", [b"x"]), "not_dicom")
    waiting = spool.store_incoming(ASSOC, "1.1", [b"x"])
    for path in (bad, waiting):
        os.utime(path, (old, old))
    keep = {"now": now, "is_final": lambda job_id: job_id == JOB}
    removed = spool.apply_retention(timedelta(days=7), timedelta(days=30), **keep)
    assert removed == [f"work/{JOB}", "quarantine/not_dicom/1.9.dcm"]
    assert spool.apply_retention(timedelta(days=7), timedelta(days=9), **keep) == [f"outbox/{JOB}"]
    assert waiting.exists()
    assert spool.result_folder(NEXT).is_dir()


def test_on_a_full_disk_retention_keeps_the_result_that_it_cannot_name_and_frees_the_rest(spool: Spool) -> None:
    old = (datetime.now(UTC) - timedelta(days=10)).timestamp()
    for job_id in (JOB, NEXT):
        spool.result_folder(job_id).mkdir()
        os.utime(spool.result_folder(job_id), (old, old))
    bad = spool.quarantine(spool.store_incoming(ASSOC, "1.9", [b"x"]), "not_dicom")
    os.utime(bad, (old, old))

    def keep(job_id: str) -> None:
        assert not bad.exists()  # it made room
        if job_id == JOB:
            raise NoSpace("full")

    week = timedelta(days=7)
    removed = spool.apply_retention(week, week, datetime.now(UTC), is_final=lambda _: True, before_result=keep)
    assert removed == ["quarantine/not_dicom/1.9.dcm", f"outbox/{NEXT}"]
    assert spool.result_folder(JOB).is_dir()


def test_what_is_asked_for_again_while_its_names_are_kept_is_not_removed(spool: Spool) -> None:
    """Many results go in one pass, and reading their names takes its time: a delivery may be asked for meanwhile."""
    old = (datetime.now(UTC) - timedelta(days=10)).timestamp()
    noted = "3" * 32
    for job_id in (JOB, NEXT, noted):
        spool.result_folder(job_id).mkdir()
        os.utime(spool.result_folder(job_id), (old, old))
    delivering: set[str] = set()

    def keep(job_id: str) -> None:
        if job_id == JOB:
            delivering.update((JOB, NEXT))  # `jobs redeliver`: one whose turn it is, one whose turn comes
        elif job_id == noted:
            (spool.result_folder(job_id) / "rejection-kos-quality-pet-sc").mkdir()  # its delivery is not open yet

    week = timedelta(days=7)
    removed = spool.apply_retention(
        week, week, datetime.now(UTC), is_final=lambda job_id: job_id not in delivering, before_result=keep
    )
    assert removed == []
    assert all(spool.result_folder(job_id).is_dir() for job_id in (JOB, NEXT, noted))


def test_what_killed_runs_left_goes_after_a_day_also_when_the_node_never_stops(spool: Spool) -> None:
    now = datetime.now(UTC)
    outbox, work = spool.root / "outbox", spool.root / "work"
    mine, others = outbox / f"{JOB}.tmp", outbox / f"{NEXT}.tmp"
    left = [mine, outbox / f"{JOB}.old", outbox / ".ab12.tmp", work / ".cd34.tmp"]
    for folder in (*left, others):
        (folder / "pet-sc").mkdir(parents=True)
        os.utime(folder, ((now - timedelta(hours=25)).timestamp(),) * 2)
    (fresh := work / ".ef56.tmp").mkdir()
    removed = spool.apply_retention(
        timedelta(days=7),
        timedelta(days=7),
        now,
        is_final=lambda job_id: job_id == JOB,  # the next one runs
    )
    assert removed == sorted(str(path.relative_to(spool.root)) for path in left)
    assert not any(path.exists() for path in left)
    assert others.is_dir()
    assert fresh.is_dir()


def test_what_was_kept_of_an_earlier_result_names_no_later_one(spool: Spool) -> None:
    assert not spool.has_references(JOB)
    spool.keep_references(JOB, {"pet-sc": "names"})
    assert spool.has_references(JOB)
    result = spool.result_folder(JOB) / "result.json"
    result.parent.mkdir()
    result.write_text("{}")
    kept = (spool.root / "references" / f"{JOB}.json").stat().st_mtime
    os.utime(result, (kept - 60, kept - 60))
    assert spool.has_references(JOB)
    os.utime(result, (kept + 60, kept + 60))
    assert not spool.has_references(JOB)


def test_a_spool_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match=r"\[storage\]\.root must be a folder"):
        Spool(tmp_path / "file" / "spool", min_free_bytes=0)


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    target = tmp_path / "a"
    durable.write_file(target, [b"one"])
    durable.write_file(target, [b"two"])
    assert target.read_bytes() == b"two"
    assert tree(tmp_path) == ["a"]


CLOSED_FOLDER = """
import sys
from pathlib import Path
from structlog.testing import capture_logs
from storage.spool import Spool
from storage.usage import folder_bytes
with capture_logs() as logs:
    spool = Spool(Path(sys.argv[1]), min_free_bytes=0)
    spool.clean_temp()
    for _ in range(2):
        names = [path.name for path in spool.incoming()]
    found = sorted(spool.find_instances(["1.1", "1.2", "1.3"]))
print(folder_bytes(spool.root / "inbox"), names, found, [(line["event"], line["folder"]) for line in logs])
"""


def test_a_folder_that_another_user_closed_stops_no_other_and_is_told_once_a_minute(spool: Spool) -> None:
    closed = spool.store_incoming("c0", "1.1", [b"of root"]).parent
    spool.store_incoming("a0", "1.2", [b"CT"])
    adopted(spool, "1.3")
    command = [sys.executable, "-c", CLOSED_FOLDER, str(spool.root)]
    if os.geteuid() == 0:  # root keeps to permissions, too, without these
        rights = "-dac_override,-dac_read_search"
        command = ["setpriv", f"--bounding-set={rights}", f"--inh-caps={rights}", *command]
    closed.chmod(0)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    finally:
        closed.chmod(0o755)
    told = [("spool.folder_closed", "inbox/incoming/c0")]
    assert done.stdout.strip() == f"{2 * PREAMBLE_BYTES + len(b'CT' + b'ct')} {['1.2.dcm']} {['1.2', '1.3']} {told}", (
        done.stderr
    )


@pytest.mark.parametrize("count", [3, 200])
def test_instances_are_found_wherever_they_lie(spool: Spool, count: int) -> None:
    uids = [f"1.9.{number}" for number in range(count)]
    for uid in uids:
        adopted(spool, uid)
    spool.take_series(JOB, SERIES)
    waiting = spool.store_incoming(ASSOC, "1.8", [b"CT"])
    adopted(spool, "1.7")
    found = spool.find_instances([*uids, "1.7", "1.8", "1.6"])
    assert {path.parent.parent.name for uid, path in found.items() if uid in uids} == {JOB}
    assert found["1.8"] == waiting
    assert found["1.7"] == spool.root / "inbox" / "series" / SERIES / "1.7.dcm"
    assert len(found) == count + 2
    assert all(path.is_file() for path in found.values())
    assert spool.find_incoming([*uids, "1.8"]) == {"1.8": waiting}
