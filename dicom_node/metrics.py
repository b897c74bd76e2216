"""Figures for Prometheus (docs/metrics.md): what the node counts itself, and what ledger and disk say when asked.

No label holds a patient's data or a stranger's text: peers and destinations are those of the configuration, reasons
and states are our own words, statuses are numbers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from time import monotonic
from wsgiref.simple_server import WSGIServer

import structlog
from prometheus_client import CollectorRegistry, Histogram, ProcessCollector, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from dicom_node import __version__
from dicom_node.config import Config
from dicom_node.net.associations import AssociationRegistry, Totals
from pipeline.bundle_paths import bundle_path, name_and_version
from pipeline.errors import BundleError
from storage.errors import StorageError
from storage.figures import Figures
from storage.ledger import Ledger, utc_now
from storage.records import DeliveryState, JobState
from storage.spool import Spool
from storage.usage import bytes_by_folder

log = structlog.get_logger()

UNKNOWN_PEER = "(unknown)"  # no peer can have that name: a caller who is none of [[peers]], or `check` and `doctor`
STAGE_BUCKETS_S = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0)
SPOOL_EVERY_S = 60.0  # a walk over 100,000 files takes a second
HANG_UPS = ("malformed_pdu", "slow_sender")  # the events of `net.stream`
PULLS = {"pull_ended": "fetched", "pull_failed": "failed"}  # events of the ledger -> outcomes
COMMITMENT_REPORTS = {"commitment_reported": "reported", "commitment_report_failed": "given_up"}
Labelled = dict[tuple[str, ...], float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sources:
    """Whom the collector asks. `receivers` gives how many receivers run, and how many ended and were replaced."""

    config: Config
    registry: AssociationRegistry
    ledger: Ledger
    spool: Spool
    receivers: Callable[[], tuple[int, int]]
    healthy: Callable[[], bool]
    clock: Callable[[], datetime] = utc_now


class Metrics:
    """The node's figures, and the HTTP server that shows them. `watch`, `serve` and `stop` are called once each."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._stages = Histogram(
            "dicom_node_stage_seconds",
            "Seconds of a job's stages that ended",
            ["stage"],
            buckets=STAGE_BUCKETS_S,
            registry=self._registry,
        )
        self._server: tuple[WSGIServer, threading.Thread] | None = None

    def observe_stage(self, stage: str, seconds: float) -> None:
        """A stage of a job ended."""
        self._stages.labels(stage).observe(seconds)

    def watch(self, sources: Sources) -> None:
        """Show what these say."""
        self._registry.register(NodeCollector(sources))
        ProcessCollector(registry=self._registry)

    def serve(self, host: str, port: int) -> int:
        """Answer GET /metrics; returns the bound port (`port` 0: any free one). Raises OSError when it is taken."""
        server, thread = start_http_server(port, host, self._registry)
        self._server = server, thread
        bound = int(server.server_address[1])
        log.info("metrics.started", host=host, port=bound)
        return bound

    def stop(self) -> None:
        """Close the port; fine when it was never opened."""
        if self._server is not None:
            server, thread = self._server
            server.shutdown()
            server.server_close()
            thread.join()
            self._server = None


class NodeCollector(Collector):
    """Asks everybody at each scrape. A ledger that does not answer costs its own figures and no others."""

    def __init__(self, sources: Sources) -> None:
        self._sources = sources
        self._build = _build_labels(sources.config)
        self._lock = threading.Lock()
        self._spool_bytes: dict[str, int] = {}
        self._spool_read: float | None = None

    def describe(self) -> list[Metric]:
        """Nothing beforehand: registering must not ask the ledger."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Every figure of docs/metrics.md but the histogram."""
        sources = self._sources
        peers = [peer.name for peer in sources.config.peers]
        yield from association_metrics(sources.registry.totals(), sources.registry.counts()["open"], peers)
        yield from self._receivers()
        yield from self._ledger()
        yield from self._disk()
        yield _gauge("dicom_node_healthy", "1: every part of the node runs", {(): float(sources.healthy())})
        yield _gauge(
            "dicom_node_build_info", "Version and configured bundle", {tuple(self._build.values()): 1.0}, self._build
        )

    def _receivers(self) -> Iterator[Metric]:
        alive, deaths = self._sources.receivers()
        wanted = max(1, self._sources.config.node.receiver_processes)
        yield _gauge("dicom_node_receivers", "Receivers that run", {(): alive})
        yield _gauge("dicom_node_receivers_configured", "Receivers that shall run", {(): wanted})
        yield _counter("dicom_node_receiver_deaths", "Receivers that ended and were replaced", {(): deaths})

    def _ledger(self) -> Iterator[Metric]:
        try:
            figures: Figures | None = self._sources.ledger.figures(events=(*PULLS, *COMMITMENT_REPORTS))
        except StorageError as error:
            log.warning("metrics.no_ledger", reason=str(error))
            figures = None
        yield _gauge("dicom_node_ledger_ok", "1: the ledger answers", {(): float(figures is not None)})
        if figures is not None:
            names = [destination.name for destination in self._sources.config.destinations]
            yield from ledger_metrics(figures, self._sources.clock(), names)

    def _disk(self) -> Iterator[Metric]:
        sources = self._sources
        yield _gauge("dicom_node_free_bytes", "What the spool's disk has left", {(): sources.spool.free_bytes()})
        reserve = sources.config.intake.min_free_bytes
        yield _gauge("dicom_node_reserved_bytes", "Below it C-STORE is refused (A700)", {(): reserve})
        held: Labelled = {(name,): float(size) for name, size in self._spool_usage().items()}
        yield _gauge("dicom_node_spool_bytes", "Bytes of the spool's files, by folder", held, ["folder"])

    def _spool_usage(self) -> dict[str, int]:
        with self._lock:
            if self._spool_read is None or monotonic() - self._spool_read >= SPOOL_EVERY_S:
                self._spool_bytes = bytes_by_folder(self._sources.spool.root)
                self._spool_read = monotonic()
            return self._spool_bytes


def association_metrics(totals: Totals, opened_now: int, peers: list[str]) -> Iterator[Metric]:
    """What the book of associations says; a peer that never called counts 0, so that a first call is seen."""
    known = [*peers, ""]
    ended: Labelled = {(_peer(p), how): counts[p] for p in known for how, counts in _ends(totals).items()}
    instances: Labelled = {(_peer(p), "stored", "0x0000"): totals.stored[p] for p in known}
    instances |= {(_peer(p), "dropped", "0x0000"): totals.dropped[p] for p in known}
    instances |= {(_peer(p), "refused", f"0x{status:04X}"): n for (p, status), n in totals.refused.items()}
    yield _gauge("dicom_node_associations_open", "Associations that are open", {(): opened_now})
    yield _counter("dicom_node_associations_opened", "Associations let in", _by_peer(totals.opened, known), ["peer"])
    yield _counter("dicom_node_associations_closed", "Associations that ended", ended, ["peer", "how"])
    rejected: Labelled = {(reason,): n for reason, n in totals.rejected.items()}
    yield _counter("dicom_node_associations_rejected", "Association requests refused", rejected, ["reason"])
    hung_up: Labelled = {(reason,): totals.hung_up[reason] for reason in HANG_UPS}
    yield _counter("dicom_node_associations_hung_up", "Connections that we ended in the middle", hung_up, ["reason"])
    yield _counter("dicom_node_instances", "Instances answered", instances, ["peer", "outcome", "status"])
    stored = _by_peer(totals.stored_bytes, known)
    yield _counter("dicom_node_received_bytes", "Bytes of data sets that were stored", stored, ["peer"])


def ledger_metrics(figures: Figures, now: datetime, destinations: list[str]) -> Iterator[Metric]:
    """What the ledger says; every state of every configured destination is there, with 0 where nothing is."""
    jobs: Labelled = {(state.value,): figures.jobs.get(state, 0) for state in JobState}
    yield _gauge("dicom_node_jobs", "Jobs in the ledger", jobs, ["state"])
    for name, text, counts in (
        ("dicom_node_deliveries", "Result series in the ledger, by where they go", figures.deliveries),
        ("dicom_node_rejection_notes", "Rejection notes in the ledger, by where they go", figures.notes),
    ):
        none: Labelled = {(place, state.value): 0 for place in destinations for state in DeliveryState}
        there: Labelled = {(place, state.value): count for (place, state), count in counts.items()}
        yield _gauge(name, text, none | there, ["destination", "state"])
    for name, text, codes in (
        ("dicom_node_pulls", "Studies that were fetched from an archive, by outcome", PULLS),
        ("dicom_node_commitment_reports", "Commitment that peers asked of us, by outcome", COMMITMENT_REPORTS),
    ):
        outcomes: Labelled = {(outcome,): figures.events.get(code, 0) for code, outcome in codes.items()}
        yield _gauge(name, text, outcomes, ["outcome"])
    for name, text, since in (
        ("dicom_node_oldest_queued_seconds", "Since when the oldest queued job waits", figures.queued_since),
        ("dicom_node_oldest_delivery_seconds", "Since when the oldest result is due", figures.delivering_since),
    ):
        yield _gauge(name, text, {(): max(0.0, (now - since).total_seconds()) if since is not None else 0.0})


def _ends(totals: Totals) -> Mapping[str, Mapping[str, int]]:
    return {"released": totals.released, "aborted": totals.aborted}


def _by_peer(counts: Mapping[str, int], known: list[str]) -> Labelled:
    return {(_peer(name),): float(counts[name]) for name in known}


def _peer(name: str) -> str:
    return name or UNKNOWN_PEER


def _gauge(name: str, text: str, values: Labelled, labels: Iterable[str] = ()) -> Metric:
    made = GaugeMetricFamily(name, text, labels=list(labels))
    for key, value in values.items():
        made.add_metric(list(key), value)
    return made


def _counter(name: str, text: str, values: Labelled, labels: Iterable[str] = ()) -> Metric:
    made = CounterMetricFamily(name, text, labels=list(labels))
    for key, value in values.items():
        made.add_metric(list(key), value)
    return made


def _build_labels(config: Config) -> dict[str, str]:
    """Our version, and the bundle's name and version as its manifest has them."""
    labels = {"version": __version__, "bundle": "(unreadable)", "bundle_version": ""}
    try:
        name, version = name_and_version(bundle_path(config.pipeline.bundle, config.pipeline.bundles))
    except BundleError:  # `check` and the first job say what is wrong with it
        return labels
    return labels | {"bundle": name, "bundle_version": version}
