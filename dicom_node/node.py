"""The composition root: joins the parts, starts them in order, stops them in the reverse order.

Start: log, lock, spool, ledger, what an earlier life left, engine, worker, delivery, assembler, clockwork, and the
receiver last, so that nothing is acknowledged before everything that will look after it is there.
"""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import secrets
import signal
import stat
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from types import FrameType

import structlog

from dicom_node import __version__
from dicom_node.assembler import Assembler
from dicom_node.backup import Backups, check_not_lost
from dicom_node.commitments import CommitmentReporter
from dicom_node.config import Config
from dicom_node.delivery import Deliveries
from dicom_node.done import tell_done
from dicom_node.engine import Engine, EngineError
from dicom_node.engine.local import LocalEngine
from dicom_node.errors import NodeError
from dicom_node.log import configure_logging
from dicom_node.metrics import Metrics, Sources
from dicom_node.net.associations import AssociationRegistry
from dicom_node.net.receive import Receiver
from dicom_node.net.receivers import ReceiverPool
from dicom_node.net.security import SecurityError, server_context, warn_of_ends
from dicom_node.notify import Notifier
from dicom_node.proof import Prover
from dicom_node.recover import adopt_unknown, cancel_again
from dicom_node.rejections import reject_superseded
from dicom_node.schedule import Schedule, Ticker
from dicom_node.scheduled_pulls import ScheduledPulls
from dicom_node.started_with import LOCK, digest
from dicom_node.upkeep import Upkeep
from dicom_node.worker import Worker, pipeline_options
from pipeline.bundle_paths import bundle_path, name_and_version
from pipeline.errors import BundleError
from storage.asked import AskedCommitments
from storage.backup import check_file, ledger_file
from storage.ledger import Ledger, open_ledger, utc_now
from storage.spool import Spool

log = structlog.get_logger()

PRIVATE_UMASK = 0o077  # what the node writes is of patients
DRAIN_S = 30.0  # below systemd's default TimeoutStopSec of 90 s
SWEEP_EVERY_S = 60.0
RETENTION_EVERY_S = 3600.0
BACKUP_EVERY_S = 300.0  # how often it is asked whether one is due
REPORT_EVERY_S = 1.0
PULLS_EVERY_S = 60.0
CERTIFICATES_EVERY_S = 86400.0
_LOCK_S = 1.0  # for another node to have ended, and for those who look whether one runs: they hold the lock a moment
REJECT_EVERY_S = 10.0  # a series that a later one replaces is hidden so soon after the later one has arrived


class Node:
    """One running node. `start` and `stop` are called once each, from one thread."""

    def __init__(
        self,
        config: Config,
        *,
        engine: Engine | None = None,
        drain_s: float = DRAIN_S,
        notifier: Notifier | None = None,
    ) -> None:
        self.config = config
        self._engine = engine
        self._drain_s = drain_s
        self._notifier = notifier or Notifier()
        self._parts = ExitStack()
        self._stopping_pulls = threading.Event()
        self._alive: list[Callable[[], bool]] = []
        self.metrics = Metrics()
        self.registry = AssociationRegistry(
            limit=config.node.max_associations, for_peers=config.places_for_peers, clock=time.monotonic
        )
        self.ledger: Ledger
        self.spool: Spool

    def start(self, *, port: int | None = None) -> int:
        """Start everything; returns the port that is listened on. `port` overrides the configuration (0: any).

        Raises:
            NodeError: another node uses the storage root, or the port is taken. LedgerError: no ledger.
        """
        try:
            return self._start(port)
        except BaseException:
            self._parts.close()
            raise

    def stop(self) -> None:
        """Stop receiving, let the running job end within the grace or go back to the queue, then end the rest."""
        log.info("node.stopping")
        self._parts.close()
        log.info("node.stopped")

    def run_forever(self) -> None:
        """Run until a signal. The first SIGTERM or SIGINT drains; the second ends the process at once.

        That is safe at any instant: the next start takes up what this one left.
        """
        os.umask(PRIVATE_UMASK)  # also of the receivers and the engine, which are its children
        configure_logging(self.config.log)
        self._notifier = Notifier.from_environment()
        signals: SimpleQueue[int] = SimpleQueue()  # its put() may be called from a signal handler
        seen: list[int] = []

        def on_signal(number: int, _frame: FrameType | None) -> None:
            seen.append(number)
            if len(seen) > 1:
                for child in multiprocessing.active_children():
                    child.kill()  # it might be the reason why the drain takes so long
                os._exit(128 + number)
            signals.put(number)

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, on_signal)
        self.start()
        self._notifier.ready()
        log.info("node.signal", signal=signal.Signals(signals.get()).name)
        self._notifier.stopping()
        self.stop()

    @property
    def healthy(self) -> bool:
        """Whether every thread that must run does."""
        return all(check() for check in self._alive)

    # ---- the parts

    def _start(self, port: int | None) -> int:
        config, parts = self.config, self._parts
        root = config.storage.root
        self._check_security()
        check_bundles(config)
        try:
            # not its parents: a disk that is not mounted must not be papered over
            root.mkdir(mode=0o700, exist_ok=True)
            _close_to_others(root)
            parts.callback(lock_root(root, digest(config)))
        except OSError as error:
            text = f"{error.strerror} for {error.filename}; it must be a folder that the node's user can write"
            raise NodeError(f"[storage].root = {root}: {text}") from error
        self.spool = Spool(root, min_free_bytes=config.intake.min_free_bytes, sync=config.intake.sync)
        self.spool.clean_temp()
        self._check_ledger()
        self.ledger = open_ledger(config.ledger_url)
        self.ledger.on_done = partial(tell_done, self.ledger)
        parts.callback(self.ledger.close)
        if not (root / "node.id").exists():
            log.warning(
                "node.first_start", root=str(root), reason="a new spool: if there was one, is its disk mounted?"
            )
        owner = _identity(root / "node.id")

        engine = self._engine or LocalEngine(job_timeout_s=config.engine.job_timeout_s)
        parts.callback(engine.close)
        upkeep = Upkeep(config, self.ledger, self.spool)
        upkeep.compare_clocks()
        deliveries = Deliveries(config, self.ledger, self.spool, owner=owner, trusted=lambda: upkeep.clock_trusted)
        worker = Worker(
            config,
            self.ledger,
            self.spool,
            engine,
            owner=owner,
            on_result=deliveries.wake,
            on_stage=self.metrics.observe_stage,
        )
        adopt_unknown(self.ledger, self.spool)
        cancel_again(self.ledger, self.spool)
        worker.reclaim()
        deliveries.reclaim()
        upkeep.sweep()
        self._warm_up(engine)

        worker.start()
        parts.callback(worker.stop, grace_s=self._drain_s)
        deliveries.start()
        parts.callback(deliveries.stop)
        assembler = Assembler(config, self.spool, self.ledger, self.registry)
        ticker = Ticker("assembler", assembler.tick, config.intake.scan_interval_s)
        ticker.start()
        parts.callback(ticker.stop)
        self._alive = [lambda: worker.alive, lambda: deliveries.alive, lambda: ticker.alive]
        schedule = self._schedule(upkeep)
        schedule.start()
        parts.callback(schedule.stop)
        parts.callback(self._stopping_pulls.set)  # before the clockwork is waited for
        self._report_commitments()
        return self._listen(port, deliveries.prover)

    def _report_commitments(self) -> None:
        """Storage Commitment that was asked of us: also what an earlier life of the node was asked."""
        asked = AskedCommitments(self.config.storage.root)
        asked.clean_temp()
        reporter = CommitmentReporter(self.config, asked, self.spool, self.ledger)
        ticker = Ticker("commitment-reporter", reporter.tick, REPORT_EVERY_S)
        ticker.start()
        self._parts.callback(ticker.stop)
        self._parts.callback(reporter.stop)
        self._alive.append(lambda: ticker.alive)

    def _check_ledger(self) -> None:
        """Raise `LedgerDamaged` before anything is written into a file that is broken, or in the place of a lost one.

        A node that does not start loses nothing: senders keep what is not acknowledged. One that began anew would
        send again what persons took back, and its own backups would push the good ones out.
        """
        check_not_lost(self.config)
        if self.config.has_ledger_file and (file := ledger_file(self.config.ledger_url)).exists():
            began = time.monotonic()
            check_file(file)
            log.info("ledger.checked", bytes=file.stat().st_size, seconds=round(time.monotonic() - began, 3))

    def _listen(self, port: int | None, prover: Prover) -> int:
        take_report = prover.take if self.config.asks_commitment else None
        receiver: Receiver | ReceiverPool
        if self.config.node.receiver_processes:
            receiver = ReceiverPool(
                self.config, self.ledger, self.registry, take_report=take_report, on_lost=self.spool.drop_halves
            )
        else:
            receiver = Receiver(self.config, self.spool, self.ledger, self.registry, take_report=take_report)
        try:
            bound = receiver.start(port=port)
        except OSError as error:
            wanted = self.config.node.port if port is None else port
            raise NodeError(f"[node].port = {wanted}: cannot listen: {error.strerror}") from error
        self._parts.callback(receiver.stop)
        self._alive.append(lambda: receiver.alive)
        self._serve_metrics(receiver)
        log.info("node.started", version=__version__, ae_title=self.config.node.ae_title, port=bound)
        return bound

    def _serve_metrics(self, receiver: Receiver | ReceiverPool) -> None:
        metrics = self.config.metrics
        if not metrics.port:
            return

        def receivers() -> tuple[int, int]:
            if isinstance(receiver, ReceiverPool):
                return len(receiver.pids), receiver.deaths
            return int(receiver.alive), 0

        self.metrics.watch(
            Sources(
                config=self.config,
                registry=self.registry,
                ledger=self.ledger,
                spool=self.spool,
                receivers=receivers,
                healthy=lambda: self.healthy,
            )
        )
        try:
            self.metrics.serve(metrics.host, metrics.port)
        except OSError as error:
            raise NodeError(f"[metrics].port = {metrics.port}: cannot listen: {error.strerror}") from error
        self._parts.callback(self.metrics.stop)

    def _check_security(self) -> None:
        """What an administrator must know of who can come in, before anybody can."""
        config = self.config
        if config.tls.cert_file is not None:
            try:
                server_context(config.tls)
            except SecurityError as error:
                raise NodeError(str(error)) from error
        self._warn_of_certificates()
        if config.node.unknown_peers == "accept":
            reason = 'whoever reaches the port may send: say "reject" when every sender is one of [[peers]]'
            log.warning("node.open_to_strangers", key="[node].unknown_peers", reason=reason)

    def _warn_of_certificates(self) -> None:
        warn_of_ends(self.config, utc_now())

    def _warm_up(self, engine: Engine) -> None:
        try:
            engine.warm_up(pipeline_options(self.config))
        except EngineError as error:  # receiving goes on; each job will try again and say so
            log.error("engine.not_ready", code=error.code, reason=error.text)

    def _schedule(self, upkeep: Upkeep) -> Schedule:
        schedule = Schedule()
        schedule.every(SWEEP_EVERY_S, "sweep", upkeep.sweep)
        schedule.every(RETENTION_EVERY_S, "retention", upkeep.retention)
        schedule.every(BACKUP_EVERY_S, "backup", Backups(self.config, self.ledger).tick)
        schedule.every(REJECT_EVERY_S, "rejections", self._reject_superseded)
        schedule.every(CERTIFICATES_EVERY_S, "certificates", self._warn_of_certificates)
        if self.config.pulls:
            stopping = self._stopping_pulls
            pulls = ScheduledPulls(self.config, self.ledger, self.spool, should_stop=stopping.is_set)
            schedule.every(PULLS_EVERY_S, "pulls", pulls.tick)
        if self._notifier.watchdog_s:
            schedule.every(self._notifier.watchdog_s / 2, "watchdog", self._sign_of_life)
        return schedule

    def _reject_superseded(self) -> None:
        reject_superseded(self.config, self.ledger, self.spool)

    def _sign_of_life(self) -> None:
        if self.healthy:
            self._notifier.alive()


def check_bundles(config: Config) -> None:
    """The bundles that jobs will ask for are there, and tell their names. Raises `NodeError`.

    Their files are not read: the engine does that, and `dicom-node check`, which have torch.
    """
    for key in ("bundle", "shadow"):
        if wanted := getattr(config.pipeline, key):
            try:
                name_and_version(bundle_path(wanted, config.pipeline.bundles))
            except BundleError as error:
                raise NodeError(f"[pipeline].{key} = {wanted!r}: {error}") from error


def _close_to_others(root: Path) -> None:
    """The spool is the node's user's alone: patients' data, whatever the modes of the files in it."""
    mode = stat.S_IMODE(root.stat().st_mode)
    if not mode & 0o077:
        return
    try:
        root.chmod(mode & 0o700)
        log.warning("node.spool_closed_to_others", root=str(root), was=f"{mode:04o}", now=f"{mode & 0o700:04o}")
    except OSError as error:  # somebody else's folder, as a mounted volume may be
        log.warning("node.spool_open_to_others", root=str(root), mode=f"{mode:04o}", reason=error.strerror)


def lock_root(root: Path, holder: str = "") -> Callable[[], None]:
    """Hold the storage root for this process; returns how to let go. A killed process lets go by itself.

    `holder` is left in the file, for `started_with`.
    """
    descriptor = os.open(root / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    until = time.monotonic() + _LOCK_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if time.monotonic() > until:
                os.close(descriptor)
                raise NodeError(f"[storage].root = {root}: another node is running on it") from error
            time.sleep(_LOCK_S / 20)
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, holder.encode())
    except OSError as error:  # a full disk: nobody can tell then, and the node runs
        log.warning("node.lock_not_written", reason=error.strerror)
    return lambda: os.close(descriptor)


def _identity(path: Path) -> str:
    """The name of this storage root in leases, the same in every life: so that a start takes back its own leases."""
    try:
        known = path.read_text(encoding="ascii").strip()
    except FileNotFoundError:
        known = ""
    if not known:
        known = f"node-{secrets.token_hex(4)}"
        temp = path.with_suffix(".tmp")
        temp.write_text(known + "\n", encoding="ascii")
        temp.replace(path)
    return known
