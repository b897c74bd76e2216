"""The receiver processes: one that dies is replaced, and whatever the node does, none is left behind or in the way."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import structlog
from fake_pacs import free_port
from intake_tools import config
from pydicom.uid import CTImageStorage
from raw_sender import RawSender, associate_request, status_of, store_message
from wire_tools import CONTEXTS, CT

from dicom_node.config import Config
from dicom_node.net import receivers
from dicom_node.net.associations import AssociationRegistry
from dicom_node.net.commitment import CommitmentReport
from dicom_node.net.receivers import ReceiverPool, _Message, _Node, _Seat
from dicom_node.net.status import Status
from storage.spool import Spool

WAIT_S = 60.0  # only a test that fails waits so long
DATA = b"\x08\x00\x60\x00CS\x02\x00CT"


class Notebook:
    """A ledger that a test can hold up."""

    def __init__(self) -> None:
        self.codes: list[str] = []
        self.goes_on = threading.Event()
        self.goes_on.set()

    def note(self, job_id: str, code: str, text: str, *, details: Mapping[str, Any]) -> None:
        assert self.goes_on.wait(WAIT_S)
        self.codes.append(code)


class Running:
    """A pool of two receivers with all that the node gives it."""

    def __init__(self, root: Path, processes: int = 2) -> None:
        self.config = config(
            node={"receiver_processes": processes, "max_associations": 3},
            storage={"root": str(root)},
            log={"level": "error"},
        )
        self.spool = Spool(root, min_free_bytes=0)
        self.notes = Notebook()
        self.registry = AssociationRegistry(limit=3, clock=time.monotonic)
        self.pool = ReceiverPool(self.config, self.notes, self.registry, on_lost=self.spool.drop_halves)
        self.port = self.pool.start(port=0)

    def until(self, holds: Callable[[], bool]) -> None:
        until(holds)

    def one_on_each(self) -> dict[int, RawSender]:
        """A sender for each of the two processes, by process id; the kernel chooses, so more are opened as needed."""
        found: dict[int, RawSender] = {}
        while set(found) != set(self.pool.pids):
            before = {seat.pid: set(seat.tokens) for seat in self.pool._seats}
            sender = RawSender(self.port, CONTEXTS)
            (pid,) = [seat.pid for seat in self.pool._seats if seat.tokens - before[seat.pid]]
            assert pid is not None
            if pid in found:
                sender.release()
                until(lambda: len(self.registry.open_tokens()) == len(found))
            else:
                found[pid] = sender
        return found

    def halves(self) -> list[Path]:
        return list((self.spool.root / "inbox" / "incoming").rglob("*.tmp"))


def until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < end, "what was waited for did not come"
        time.sleep(0.02)


def send(sender: RawSender, instance: str, data: bytes = DATA) -> int:
    sender.write(store_message(CT, 1, CTImageStorage, instance, data).in_pdus())
    return status_of(sender.pdu())


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def is_free(port: int) -> bool:
    """Whether another node can listen there; a killed process's threads end one after the other."""
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            again.bind(("127.0.0.1", port))
            again.listen()
        except OSError:
            return False
    return True


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 1024), hard))
    try:
        running = Running(tmp_path_factory.mktemp("pool"))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    yield running
    running.pool.stop()


@pytest.fixture
def running(shared: Running) -> Iterator[Running]:
    """The shared pool, with both receivers up and no association open."""
    until(lambda: shared.pool.alive and not shared.registry.open_tokens())
    shared.notes.codes.clear()
    yield shared
    shared.notes.goes_on.set()
    until(lambda: not shared.registry.open_tokens())


def test_a_receiver_that_is_killed_is_replaced_and_the_other_goes_on(running: Running) -> None:
    senders = running.one_on_each()
    (killed, of_killed), (other, of_other) = senders.items()
    of_killed.write(store_message(CT, 1, CTImageStorage, "1.2.3", DATA).in_pdus()[:-4])
    until(lambda: len(running.halves()) == 1)
    deaths = running.pool.deaths
    os.kill(killed, signal.SIGKILL)
    # the node is not healthy until it is replaced, which may be sooner than we look
    until(lambda: not running.pool.alive or running.pool.deaths > deaths)
    assert of_killed.pdu() == b""
    until(lambda: len(running.registry.open_tokens()) == 1)
    assert send(of_other, "1.2.4") == 0
    until(lambda: "receiver_died" in running.notes.codes)
    until(lambda: running.pool.alive)
    assert running.pool.deaths == deaths + 1
    assert other in running.pool.pids
    assert killed not in running.pool.pids
    assert running.halves() == []
    of_other.release()
    of_killed.close()
    with RawSender(running.port, CONTEXTS) as again:
        assert send(again, "1.2.5") == 0
        again.release()


def test_a_receiver_may_have_as_many_descriptors_as_the_system_allows(running: Running) -> None:
    for pid in running.pool.pids:
        soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        assert soft == hard


def test_the_association_limit_holds_over_all_processes(running: Running) -> None:
    senders = [*running.one_on_each().values(), RawSender(running.port, CONTEXTS)]
    with socket.create_connection(("127.0.0.1", running.port), timeout=WAIT_S) as fourth:
        fourth.sendall(associate_request(CONTEXTS))
        assert fourth.recv(100)[:1] == b"\x03"
    for sender in senders:
        sender.release()
    until(lambda: running.registry.counts().get("rejected_association_limit", 0) >= 1)
    until(lambda: "association_rejected" in running.notes.codes)


def test_a_ledger_that_stalls_holds_up_no_instance(running: Running) -> None:
    running.notes.goes_on.clear()
    with RawSender(running.port, CONTEXTS) as sender:
        assert send(sender, "../1") == 0xC000  # an event for the ledger
        for number in range(20):
            assert send(sender, f"1.2.9.{number}") == 0
        sender.release()
    until(lambda: not running.registry.open_tokens())  # nor the book of associations
    with RawSender(running.port, CONTEXTS) as sender:
        assert send(sender, "1.2.10") == 0
        sender.release()
    assert running.notes.codes == []
    running.notes.goes_on.set()
    until(lambda: "store_refused" in running.notes.codes)


def test_the_counts_of_an_association_come_through_the_pipe(running: Running) -> None:
    before = running.registry.totals()
    with RawSender(running.port, CONTEXTS) as sender:
        for number in range(5):
            assert send(sender, f"1.2.11.{number}") == 0
        sender.release()
    until(lambda: not running.registry.open_tokens())
    after = running.registry.totals()
    assert after.stored["pacs"] - before.stored["pacs"] == 5
    assert after.released["pacs"] - before.released["pacs"] == 1


def test_stop_aborts_what_is_open_and_leaves_no_process_and_no_port(tmp_path: Path) -> None:
    running = Running(tmp_path, 1)
    pids = running.pool.pids
    sender = RawSender(running.port, CONTEXTS)
    sender.write(store_message(CT, 1, CTImageStorage, "1.2.3", DATA).in_pdus()[:-4])
    until(lambda: len(running.halves()) == 1)
    running.pool.stop()
    assert sender.pdu()[:1] == b"\x07"
    sender.close()
    assert [pid for pid in pids if runs(pid)] == []
    assert running.registry.open_tokens() == ()
    assert running.registry.totals().aborted == {"pacs": 1}
    assert running.halves() == []
    until(lambda: is_free(running.port))


NODE = """
import sys, time
from pathlib import Path
if __name__ == "__main__":  # the receivers import this file, too
    sys.path.insert(0, {tests!r})
    from test_receivers import Running
    running = Running(Path({root!r}), 1)
    told = Path({root!r}).with_name("told")
    told.with_suffix(".new").write_text(" ".join(map(str, (running.port, *running.pool.pids))))
    told.with_suffix(".new").rename(told)
    time.sleep(600)
"""


def test_a_node_that_stands_still_holds_up_no_instance_and_killed_leaves_no_receiver_and_a_free_port(
    tmp_path: Path,
) -> None:
    here = Path(__file__).resolve()
    script = tmp_path / "node.py"
    script.write_text(NODE.format(tests=str(here.parent), root=str(tmp_path / "spool")))
    environment = {**os.environ, "PYTHONPATH": f"{here.parents[2]}:{here.parents[1]}"}
    node = subprocess.Popen([sys.executable, str(script)], env=environment)
    told = tmp_path / "told"
    try:
        until(lambda: told.exists() or node.poll() is not None)
        port, *pids = map(int, told.read_text().split())
    except BaseException:
        node.kill()
        node.wait()
        raise
    sender = RawSender(port, CONTEXTS)
    node.send_signal(signal.SIGSTOP)  # it does nothing more at all
    assert [send(sender, f"1.2.4.{number}") for number in range(10)] == [0] * 10
    sender.write(store_message(CT, 1, CTImageStorage, "1.2.3", DATA).in_pdus()[:-4])
    node.kill()
    node.wait()
    until(lambda: not any(runs(pid) for pid in pids))
    assert sender.pdu() == b""
    sender.close()
    until(lambda: is_free(port))


def test_receivers_that_never_start_stop_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(threading.enumerate())
    monkeypatch.setattr(ReceiverPool, "_spawn", lambda *_: 1 / 0)
    port = free_port()
    settings = config(node={"receiver_processes": 1, "port": port}, storage={"root": str(tmp_path)})
    pool = ReceiverPool(settings, Notebook(), AssociationRegistry(limit=1, clock=time.monotonic))
    with structlog.testing.capture_logs(), pytest.raises(OSError, match="did not start"):
        pool.start()
    assert set(threading.enumerate()) <= before


# -- the pipe


class Pipe:
    """A receiver's view of a node, and the node's end of the pipe in the test's hands."""

    def __init__(self) -> None:
        self.node_end, theirs = multiprocessing.Pipe()
        self.node = _Node(theirs, limit=7)
        self.lives = True
        self.said_stop: list[bool] = []
        self.thread = threading.Thread(target=lambda: self.said_stop.append(self.node.listen(lambda: self.lives)))
        self.thread.start()

    def close(self) -> None:
        self.lives = False
        self.node_end.close()
        self.thread.join()
        self.node._connection.close()


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pipe]:
    monkeypatch.setattr(receivers, "_LOOK_S", 0.05)
    made = Pipe()
    yield made
    made.close()


def test_a_place_that_is_given_too_late_is_given_back(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receivers, "_ASK_S", 0.05)
    with pytest.raises(TimeoutError):
        pipe.node.open(calling_ae="PACS", address="127.0.0.1", peer="pacs")
    question = pipe.node_end.recv()
    pipe.node_end.send(_Message(number=question.number, name="open", value="abc"))
    news = pipe.node_end.recv()
    assert (news.name, news.arguments) == ("close", ("abc", True))


def test_a_connection_that_was_hung_up_on_is_counted_by_the_node(tmp_path: Path, pipe: Pipe) -> None:
    pipe.node.count_hang_up("slow_sender")
    registry = AssociationRegistry(limit=1, clock=time.monotonic)
    pool = ReceiverPool(_config(tmp_path), Notebook(), registry)
    pool._do(_Seat(pool, 0), pipe.node_end.recv(), pipe.node_end)
    assert registry.totals().hung_up == {"slow_sender": 1}


def test_a_report_that_the_node_could_not_take_is_an_error_here(pipe: Pipe) -> None:
    failures: list[BaseException] = []
    report = CommitmentReport(transaction_uid="1.2")

    def take() -> None:
        try:
            pipe.node.take(report)
        except RuntimeError as error:
            failures.append(error)

    asking = threading.Thread(target=take)
    asking.start()
    question = pipe.node_end.recv()
    pipe.node_end.send(_Message(number=question.number, failed=True))
    asking.join()
    assert len(failures) == 1


def test_a_report_goes_to_the_node_and_its_status_comes_back(tmp_path: Path, pipe: Pipe) -> None:
    report = CommitmentReport(transaction_uid="1.2")
    taken: list[CommitmentReport] = []
    statuses: list[Status] = []

    def take(given: CommitmentReport) -> Status:
        taken.append(given)
        return Status.SUCCESS

    pool = ReceiverPool(
        _config(tmp_path), Notebook(), AssociationRegistry(limit=1, clock=time.monotonic), take_report=take
    )
    seat = _Seat(pool, 0)
    seat._connection = pipe.node_end
    asking = threading.Thread(target=lambda: statuses.append(pipe.node.take(report)))
    asking.start()
    pool._do(seat, pipe.node_end.recv(), pipe.node_end)
    pool._news.put(None)
    pool._write()
    asking.join()
    assert (taken, statuses) == ([report], [Status.SUCCESS])


def test_an_answer_for_a_dead_receiver_does_not_reach_its_successor(tmp_path: Path, pipe: Pipe) -> None:
    pool = ReceiverPool(_config(tmp_path), Notebook(), AssociationRegistry(limit=1, clock=time.monotonic))
    seat = _Seat(pool, 0)
    seat._connection = pipe.node_end
    ours, theirs = multiprocessing.Pipe()
    seat.send(_Message(number=1, value="for the dead"), ours)
    assert not pipe.node._connection.poll(0)
    ours.close()
    theirs.close()


def test_of_a_flood_of_events_a_stalled_ledger_gets_a_count_and_every_report_is_taken(tmp_path: Path) -> None:
    notes, taken = Notebook(), []
    report = CommitmentReport(transaction_uid="1.2")

    def take(given: CommitmentReport) -> Status:
        taken.append(given)
        return Status.SUCCESS

    pool = ReceiverPool(_config(tmp_path), notes, AssociationRegistry(limit=1, clock=time.monotonic), take_report=take)
    seat, (ours, theirs) = _Seat(pool, 0), multiprocessing.Pipe()
    for _ in range(1500):
        pool._do(seat, _Message(name="note", arguments=("association_rejected", "no peer", {})), ours)
    pool._do(seat, _Message(number=1, name="report", arguments=(report,)), ours)
    pool._news.put(None)
    pool._write()
    ours.close()
    theirs.close()
    assert taken == [report]
    assert notes.codes.count("association_rejected") == 1000
    assert notes.codes.count("notes_left_out") == 1


def test_a_receiver_whose_listening_thread_died_ends_its_process(pipe: Pipe) -> None:
    pipe.lives = False
    pipe.thread.join()
    assert pipe.said_stop == [False]


def test_a_receiver_is_told_to_stop(pipe: Pipe) -> None:
    pipe.node_end.send(_Message(name="stop"))
    pipe.thread.join()
    assert pipe.said_stop == [True]


def test_what_a_peers_associations_share_is_told(pipe: Pipe) -> None:
    assert pipe.node.companions("abc") == 1
    pipe.node_end.send(_Message(name="companions", arguments=({"abc": 3},)))
    until(lambda: pipe.node.companions("abc") == 3)


def _config(root: Path) -> Config:
    return config(node={"receiver_processes": 1}, storage={"root": str(root)})
