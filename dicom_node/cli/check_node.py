"""What `dicom-node check` finds on the node's own ports: free for it, the node itself, or somebody else."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPException
from typing import TYPE_CHECKING

from dicom_node.cli.findings import Finding, Verdict
from dicom_node.config import Config, MetricsConfig, PeerConfig
from dicom_node.started_with import digest, node_runs_on, started_with

if TYPE_CHECKING:
    from dicom_node.net.scu import EchoAnswer

METRICS_TIMEOUT_S = 10.0
METRICS_BYTES = 10_000_000  # far more than the figures of any node


def check_ports(config: Config) -> Iterator[Finding]:
    """Every port of the node: its own, and those of TLS and metrics where they are switched on."""
    yield check_port(config)
    running = node_runs_on(config.storage.root)
    another = running and started_with(config.storage.root) not in ("", digest(config))

    def asked(host: str, port: int) -> bool:
        """Whether something shall answer there: a node that runs with another configuration may not listen yet."""
        return running and (not another or bool(why_taken(host, port)))

    tls, metrics = config.tls, config.metrics
    if tls.cert_file is not None and not config.tls_alone:
        host = config.node.host
        yield _tls_answers(config) if asked(host, tls.port) else _is_free("tls port", host, tls.port)
    if metrics.port:
        asks = asked(metrics.host, metrics.port)
        yield _metrics_answer(metrics) if asks else _is_free("metrics port", metrics.host, metrics.port)
    if another:
        text = "the running node was started with another configuration: this one counts from its next start"
        yield Finding(check="restart", verdict=Verdict.WARN, text=text)


def _is_free(check: str, host: str, port: int) -> Finding:
    taken = why_taken(host, port)
    text = f"{host}:{port}: {taken}, and no node runs" if taken else f"{host}:{port} is free"
    return Finding(check=check, verdict=Verdict.FAIL if taken else Verdict.OK, text=text)


def _tls_answers(config: Config) -> Finding:
    """The running node on its TLS port. It may want another certificate than its own: that only warns."""
    from dicom_node.net.scu import echo

    port = config.tls.port
    answer = echo(_over_tls(config, _this_node(config)), calling_ae=config.node.ae_title)
    if answer.code in ("tls_failed", "association_aborted"):
        text = f"something listens on port {port}, and the node's own certificate does not open it: {answer.text}"
        return Finding(check="tls port", verdict=Verdict.WARN, text=text)
    fault = _why_not_ours(config, answer)
    text = fault or f"{config.node.ae_title} answers over TLS on port {port}"
    return Finding(check="tls port", verdict=Verdict.FAIL if fault else Verdict.OK, text=text)


def _metrics_answer(metrics: MetricsConfig) -> Finding:
    """The figures of the running node, and what they say of its health."""
    url = f"http://{_reachable(metrics.host)}:{metrics.port}/metrics"
    try:
        connection = HTTPConnection(_reachable(metrics.host), metrics.port, timeout=METRICS_TIMEOUT_S)
        try:
            connection.request("GET", "/metrics")
            figures = connection.getresponse().read(METRICS_BYTES)
        finally:
            connection.close()
    except (OSError, HTTPException) as error:
        text = f"{url}: {getattr(error, 'strerror', None) or type(error).__name__}, although a node runs"
        return Finding(check="metrics port", verdict=Verdict.FAIL, text=text)
    healthy = re.search(rb"^dicom_node_healthy (\S+)$", figures, flags=re.MULTILINE)
    if healthy is None:
        text = f"{url}: another service answers there, and not this node"
    elif float(healthy[1]) != 1:
        text = f"{url}: dicom_node_healthy is {healthy[1].decode()}: a part of the node has stopped, its log says which"
    else:
        return Finding(check="metrics port", verdict=Verdict.OK, text=f"{url}: dicom_node_healthy is 1")
    return Finding(check="metrics port", verdict=Verdict.FAIL, text=text)


def check_port(config: Config) -> Finding:
    """The port is free for the node, or the node answers on it."""
    node = config.node
    taken = why_taken(node.host, node.port)
    if not taken and node_runs_on(config.storage.root) and started_with(config.storage.root) == digest(config):
        text = f"a node runs with this configuration, and nothing listens on {node.host}:{node.port}: it is starting, "
        return Finding(check="port", verdict=Verdict.FAIL, text=f"{text}or its log says why")
    if not taken:
        return Finding(check="port", verdict=Verdict.OK, text=f"{node.host}:{node.port} is free")
    answering = check_answering(config)
    if answering.verdict is Verdict.OK:
        return answering
    text = f"{node.host}:{node.port}: {taken}; {answering.text}"
    return Finding(check="port", verdict=Verdict.FAIL, text=text)


def why_taken(host: str, port: int) -> str:
    """Why nobody can listen there; "" where somebody can."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error.strerror or str(error)
    return ""


def check_answering(config: Config) -> Finding:
    """The node of this configuration answers: our own software, while a node runs on its storage root."""
    from dicom_node.net.scu import echo

    answer = echo(ourselves(config), calling_ae=config.node.ae_title)
    fault = _why_not_ours(config, answer)
    text = fault or f"{config.node.ae_title} answers on port {config.node.port}"
    return Finding(check="node", verdict=Verdict.FAIL if fault else Verdict.OK, text=text)


def _why_not_ours(config: Config, answer: EchoAnswer) -> str:
    """Why it was not the node of this configuration that answered; "" where it was."""
    root = config.storage.root
    runs = node_runs_on(root)
    if answer.code == "association_rejected" and not answer.permanent and runs:
        return ""  # it has as many associations as it may; a node lets its own title in else
    if answer.code == "association_rejected":
        return f"{answer.text}: another DICOM application answers there, or a node that was started under another title"
    if not answer.ok:
        return answer.text
    if not answer.is_this_software:
        software = answer.implementation_class_uid
        return f"another DICOM application answers there (Implementation Class UID {software}), and not this node"
    if not runs:
        return f"another node answers there: none runs on [storage].root = {root}"
    return ""


def ourselves(config: Config) -> PeerConfig:
    """The running node as a peer of this machine; over TLS, with its own certificate, where it speaks nothing else."""
    us = _this_node(config)
    return _over_tls(config, us) if config.tls_alone else us


def _this_node(config: Config) -> PeerConfig:
    node = config.node
    return PeerConfig(name="self", ae_title=node.ae_title, host=_reachable(node.host), port=node.port)


def _over_tls(config: Config, us: PeerConfig) -> PeerConfig:
    own = {"client_cert_file": config.tls.cert_file, "client_key_file": config.tls.key_file}
    over_tls = {"port": config.tls.port, "tls": True, "ca_file": config.tls.cert_file, "check_host_name": False}
    return us.model_copy(update={**over_tls, **own})


def _reachable(host: str) -> str:
    """The address at which this machine reaches what listens on `host`."""
    return "127.0.0.1" if host in ("", "0.0.0.0", "::") else host
