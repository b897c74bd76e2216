"""Receiving in processes of its own, so that no other work of the node holds up a sender.

The node's process listens, and each receiver process accepts connections from that one socket: the kernel gives a
connection to whoever is free. A receiver has the spool and nothing else. What only the node may do (count the
associations, write the ledger, take a commitment report) it asks for over a pipe:

    tell   (name, arguments)            in order, no answer
    ask    (number, name, arguments)    the answer comes back under its number

Nothing that a C-STORE needs is asked for: a node that stalls holds up new associations and no instance. A receiver
whose pipe closes, because the node was killed, ends at once. One that dies is replaced; its associations count as
aborted, and what it had half written is removed.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from queue import SimpleQueue
from typing import Any

import structlog

from dicom_node.config import Config
from dicom_node.log import configure_logging
from dicom_node.net.associations import Association, AssociationRegistry
from dicom_node.net.commitment import CommitmentReport, Take
from dicom_node.net.receive import Receiver
from dicom_node.net.scp import Listener, listen_all
from dicom_node.net.status import Status
from dicom_node.net.store import Notes
from storage.spool import Spool

log = structlog.get_logger(__name__)

_ASK_S = 60.0  # for an answer of the node's process: a busy ledger may take its time
_READY_S = 120.0  # a cold disk
_JOIN_S = 15.0
_TELL_EVERY_S = 0.5  # how often an association's counts are told while it goes on
_LOOK_S = 1.0  # how often a receiver looks whether its listening threads run
_AGAIN_S = (0.0, 1.0, 5.0, 30.0)  # waits before a receiver that dies again and again is replaced
_MAX_NEWS = 1000  # events that wait for a slow ledger; more are counted
_TRIES = 2  # deaths before it was ready: the node does not start
_STEADY_S = 60.0  # one that lived so long died of something new


@dataclass(frozen=True, kw_only=True, slots=True)
class _Message:
    """What goes through the pipe, both ways: a question or news (`name`), an answer (no name)."""

    number: int = 0  # 0: nobody waits for an answer
    name: str = ""
    arguments: tuple[Any, ...] = ()
    value: Any = None
    failed: bool = False


# ---- the node's side


class ReceiverPool:
    """The receiver processes of one node; the same face as `Receiver`. `start` and `stop` are called once each."""

    def __init__(
        self,
        config: Config,
        notes: Notes,
        registry: AssociationRegistry,
        *,
        take_report: Take | None = None,
        on_lost: Callable[[str], object] = lambda _token: None,
    ) -> None:
        """`on_lost` is called with the token of each association whose receiver died: it may have left half a file."""
        self._config = config
        self._notes = notes
        self._registry = registry
        self._take_report = take_report
        self._on_lost = on_lost
        self._listening: tuple[Listener, ...] = ()
        self._stopping = threading.Event()
        self._seats: list[_Seat] = []
        self._news: SimpleQueue[Callable[[], object] | None] = SimpleQueue()  # what writes to the ledger, in order
        self._not_noted = 0  # events that were too many; guarded by the lock
        self._counting = threading.Lock()
        self._writer = threading.Thread(target=self._write, name="receiver-notes", daemon=True)

    def start(self, *, port: int | None = None) -> int:
        """Listen, start the processes, wait until each accepts; returns the bound port (`port` 0: any free one).

        Raises OSError when the address is taken, or a receiver does not start.
        """
        node = self._config.node
        self._listening = listen_all(self._config, port)
        self._writer.start()
        self._seats = [_Seat(self, number) for number in range(node.receiver_processes)]
        for seat in self._seats:
            seat.thread.start()
        try:
            self._wait_for_all()
        except BaseException:
            self.stop()
            raise
        log.info(
            "receivers.started", ae_title=node.ae_title, host=node.host, ports=self.ports, processes=len(self._seats)
        )
        return self.ports[0]

    def _wait_for_all(self) -> None:
        until = time.monotonic() + _READY_S
        while not all(seat.ready.wait(0.05) for seat in self._seats):
            if time.monotonic() > until or any(seat.deaths >= _TRIES for seat in self._seats):
                raise OSError(0, "a receiver process did not start: see the log")

    @property
    def ports(self) -> list[int]:
        """The ports that are listened on: of `[node]`, and of `[tls]` where that is another one."""
        return [listener.port for listener in self._listening]

    @property
    def alive(self) -> bool:
        """Whether every receiver runs."""
        return bool(self._seats) and all(seat.alive for seat in self._seats)

    @property
    def deaths(self) -> int:
        """How many receivers ended without being asked to, and were replaced."""
        return sum(seat.deaths for seat in self._seats)

    @property
    def pids(self) -> list[int]:
        """The process ids of the receivers that run."""
        return [pid for seat in self._seats if (pid := seat.pid)]

    def stop(self) -> None:
        """Abort what is open, stop listening, join. Instances that were answered with Success are on disk."""
        self._stopping.set()
        for listener in self._listening:
            listener.socket.close()
        for seat in self._seats:
            seat.send(_Message(name="stop"))
        until = time.monotonic() + _JOIN_S
        for seat in self._seats:
            seat.thread.join(max(0.0, until - time.monotonic()))
            if seat.thread.is_alive():
                log.error("receivers.did_not_stop", receiver=seat.number)
                seat.kill()
                seat.thread.join(_JOIN_S)
        self._news.put(None)
        if self._writer.is_alive():
            self._writer.join(_JOIN_S)
        self._seats = []
        log.info("receivers.stopped")

    def _write(self) -> None:
        while (step := self._news.get()) is not None:
            try:
                step()
                self._note_what_was_left_out()
            except Exception:
                log.exception("receivers.note_failed")

    def _note(self, code: str, text: str, details: Mapping[str, Any]) -> None:
        """An event of a receiver, in its turn; a ledger that stalls must not let a stranger fill the memory."""
        if self._news.qsize() < _MAX_NEWS:
            self._news.put(lambda: self._notes.note("", code, text, details=details))
            return
        with self._counting:
            self._not_noted += 1

    def _note_what_was_left_out(self) -> None:
        if not self._not_noted:
            return
        with self._counting:
            count, self._not_noted = self._not_noted, 0
        log.warning("receivers.notes_left_out", events=count)
        text = f"{count} events of receivers were not written down: the ledger could not keep up"
        self._notes.note("", "notes_left_out", text, details={"events": count})

    def _spawn(self, number: int) -> tuple[SpawnProcess, Connection]:
        ours, theirs = multiprocessing.Pipe()
        process = multiprocessing.get_context("spawn").Process(
            target=serve,
            args=(self._config, self._listening, theirs, self._take_report is not None),
            name=f"receiver-{number}",
            daemon=True,
        )
        process.start()
        theirs.close()
        return process, ours

    def _do(self, seat: _Seat, message: _Message, connection: Connection) -> None:
        """One question or piece of news of a receiver; an answer goes to `connection` and to no successor."""
        arguments = message.arguments
        match message.name:
            case "ready":
                seat.ready.set()
            case "open":
                token = self._registry.open(**arguments[0])
                if token is not None:
                    seat.tokens.add(token)
                seat.send(_Message(number=message.number, name="open", value=token), connection)
                self._tell_companions()
            case "carried":
                token, counts = arguments
                self._registry.carried(token, **counts)
            case "close":
                token, aborted = arguments
                seat.tokens.discard(token)
                self._registry.close(token, aborted=aborted)
                self._tell_companions()
            case "rejected":
                self._registry.count_rejection(*arguments)
            case "hung_up":
                self._registry.count_hang_up(*arguments)
            case "note":
                self._note(*arguments)
            case "report":
                self._news.put(lambda: self._answer_report(seat, message, connection))
            case unknown:
                log.error("receivers.unknown_message", name=unknown)

    def _tell_companions(self) -> None:
        """What each association shares its rate with; only who is held to a rate needs to know."""
        if self._config.intake.max_bytes_per_s:
            for seat in self._seats:
                counts = {token: self._registry.companions(token) for token in list(seat.tokens)}
                seat.send(_Message(name="companions", arguments=(counts,)))

    def _answer_report(self, seat: _Seat, message: _Message, connection: Connection) -> None:
        assert self._take_report is not None
        try:
            answer = _Message(number=message.number, value=self._take_report(*message.arguments))
        except Exception:
            log.exception("commitment.report_failed")
            answer = _Message(number=message.number, failed=True)
        seat.send(answer, connection)


class _Seat:
    """The place of one receiver: the process that has it now, and the thread that listens to it."""

    def __init__(self, pool: ReceiverPool, number: int) -> None:
        self._pool = pool
        self.number = number
        self._lock = threading.Lock()  # guards the pair below, and sending
        self._process: SpawnProcess | None = None
        self._connection: Connection | None = None
        self.tokens: set[str] = set()
        self.deaths = 0
        self.ready = threading.Event()
        self.thread = threading.Thread(target=self._run, name=f"receiver-{number}", daemon=True)

    @property
    def alive(self) -> bool:
        return self.pid is not None and self.thread.is_alive()

    @property
    def pid(self) -> int | None:
        process = self._process
        return process.pid if process is not None and process.is_alive() else None

    def send(self, message: _Message, to: Connection | None = None) -> None:
        """To the receiver that is there now, or `to` that one if it still is."""
        with self._lock, suppress(OSError, ValueError):  # it is gone: its thread sees that
            if self._connection is not None and to in (None, self._connection):
                self._connection.send(message)

    def kill(self) -> None:
        process = self._process
        if process is not None and process.is_alive():
            process.kill()
            process.join(_JOIN_S)

    def _run(self) -> None:
        deaths, stopping = 0, self._pool._stopping
        while not stopping.is_set():
            began = time.monotonic()
            try:
                process, connection = self._pool._spawn(self.number)
            except Exception:
                if not stopping.is_set():  # else the listening socket is closed already
                    log.exception("receivers.spawn_failed")
            else:
                with self._lock:
                    self._process, self._connection = process, connection
                if stopping.is_set():
                    self.send(_Message(name="stop"))
                self._listen(connection)
                process.join(_JOIN_S)
                self.kill()  # it closed its pipe and does not end
            if stopping.is_set():
                break
            deaths = 0 if time.monotonic() - began > _STEADY_S else deaths + 1
            self._tell_of_death()
            stopping.wait(_AGAIN_S[min(deaths, len(_AGAIN_S)) - 1] if deaths else 0.0)
        self._close_all()

    def _listen(self, connection: Connection) -> None:
        with suppress(EOFError, OSError):
            while True:
                message = connection.recv()
                try:
                    self._pool._do(self, message, connection)
                except Exception:  # or nobody would listen to this receiver any more
                    log.exception("receivers.message_failed", name=message.name)
        with self._lock:
            self._connection = None
            connection.close()

    def _close_all(self) -> None:
        for token in list(self.tokens):
            self._pool._registry.close(token, aborted=True)
            self._pool._on_lost(token)
        self.tokens.clear()
        self._pool._tell_companions()

    def _tell_of_death(self) -> None:
        process = self._process
        code = process.exitcode if process is not None else None
        self.deaths += 1
        lost = len(self.tokens)
        self._close_all()
        log.error("receiver.died", receiver=self.number, exit_code=code, associations=lost)
        text = f"a receiver process ended (exit code {code}) with {lost} open associations: replaced"
        details = {"exit_code": code, "associations": lost}
        self._pool._news.put(lambda: self._pool._notes.note("", "receiver_died", text, details=details))


# ---- the receiver's side


def serve(config: Config, listening: tuple[Listener, ...], connection: Connection, takes_reports: bool) -> None:
    """The whole life of a receiver process; it ends with a `stop` or when the node's process is gone."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the node tells us; a terminal's Ctrl-C reaches us, too
        signal.signal(number, signal.SIG_IGN)
    _allow_descriptors()
    configure_logging(config.log)
    for listener in listening:
        listener.socket.setblocking(False)
    node = _Node(connection, config.node.max_associations)
    spool = Spool(config.storage.root, min_free_bytes=config.intake.min_free_bytes, sync=config.intake.sync)
    receiver = Receiver(config, spool, node, node, take_report=node.take if takes_reports else None)
    receiver.start(listening=listening)
    node.tell("ready")
    stopping = node.listen(lambda: receiver.alive)
    if stopping:
        receiver.stop()
    # at once, whatever a thread waits for: when the node was killed, the next one must find the port and spool free
    os._exit(0 if stopping else 1)


def _allow_descriptors() -> None:
    """As many as the system lets this user have: the usual 1,024 are for programs that use `select`."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # then it is as it was
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class _Node:
    """The node's process as a receiver sees it: its book of associations, its ledger, its commitments."""

    def __init__(self, connection: Connection, limit: int) -> None:
        self._connection = connection
        self._limit = limit
        self._sending = threading.Lock()
        self._numbers = count(1)
        self._lock = threading.Lock()  # guards what follows
        self._asked: dict[int, Future[Any]] = {}
        self._open: dict[str, Association] = {}
        self._rejected: Counter[str] = Counter()
        self._companions: dict[str, int] = {}

    def listen(self, alive: Callable[[], bool]) -> bool:
        """Read what the node says; True when it says stop, False when it is gone or this process no longer `alive`."""
        with suppress(EOFError, OSError):
            while alive():
                if not self._connection.poll(_LOOK_S):
                    continue
                message: _Message = self._connection.recv()
                match message.name:
                    case "stop":
                        return True
                    case "companions":
                        (self._companions,) = message.arguments
                    case _:
                        self._answered(message)
        return False

    def _answered(self, message: _Message) -> None:
        with self._lock:
            waiting = self._asked.pop(message.number, None)
        if waiting is not None and message.failed:
            waiting.set_exception(RuntimeError("the node's process could not do it: see its log"))
        elif waiting is not None:
            waiting.set_result(message.value)
        elif message.name == "open" and message.value is not None:
            self.tell("close", message.value, True)  # too late: who asked for the place has rejected its caller

    def tell(self, name: str, *arguments: Any) -> None:
        with self._sending:
            self._connection.send(_Message(name=name, arguments=arguments))

    def ask(self, name: str, *arguments: Any) -> Any:
        """Raises TimeoutError, OSError, or RuntimeError when the node could not do it."""
        number, answer = next(self._numbers), Future[Any]()
        with self._lock:
            self._asked[number] = answer
        with self._sending:
            self._connection.send(_Message(number=number, name=name, arguments=arguments))
        try:
            return answer.result(_ASK_S)
        except TimeoutError:
            with self._lock:
                given_up = self._asked.pop(number, None) is not None
            if given_up:
                raise
            return answer.result()  # it came at the last moment

    # -- Notes, Take

    def note(self, job_id: str, code: str, text: str, *, details: Mapping[str, Any]) -> None:  # noqa: ARG002
        self.tell("note", code, text, dict(details))

    def take(self, report: CommitmentReport) -> Status:
        return Status(self.ask("report", report))

    # -- Book

    @property
    def limit(self) -> int:
        return self._limit

    def open(self, *, calling_ae: str, address: str, peer: str, peer_limit: int = 0) -> str | None:
        asked = {"calling_ae": calling_ae, "address": address, "peer": peer, "peer_limit": peer_limit}
        token: str | None = self.ask("open", asked)
        if token is not None:
            now = time.monotonic()
            opened = Association(
                token=token, calling_ae=calling_ae, address=address, peer=peer, opened=now, last_activity=now
            )
            with self._lock:
                self._open[token] = opened
        return token

    def stored(self, token: str, n_bytes: int) -> None:
        now = time.monotonic()
        with self._lock:
            association = self._open.get(token)
            if association is None:
                return
            association.stored += 1
            association.stored_bytes += n_bytes
            if now - association.last_activity < _TELL_EVERY_S and association.stored > 1:
                return
            association.last_activity = now
        self._tell_carried(association)

    def dropped(self, token: str, sop_class_uid: str) -> None:
        with self._lock:
            if token in self._open:
                self._open[token].dropped.update((sop_class_uid,))

    def refused(self, token: str, status: int) -> None:
        with self._lock:
            if token in self._open:
                self._open[token].refused.update((status,))

    def _tell_carried(self, association: Association) -> None:
        with self._lock:
            counts = {
                "stored": association.stored,
                "stored_bytes": association.stored_bytes,
                "dropped": dict(association.dropped),
                "refused": dict(association.refused),
            }
        self.tell("carried", association.token, counts)

    def close(self, token: str, *, aborted: bool = False) -> Association | None:
        with self._lock:
            association = self._open.pop(token, None)
        if association is None:
            return None
        association.aborted = aborted
        self._tell_carried(association)
        self.tell("close", token, aborted)
        return association

    def companions(self, token: str) -> int:
        return self._companions.get(token, 1)

    def count_rejection(self, code: str) -> int:
        self.tell("rejected", code)
        with self._lock:
            self._rejected[code] += 1
            return self._rejected[code]

    def count_hang_up(self, code: str) -> None:
        self.tell("hung_up", code)
