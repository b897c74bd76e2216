"""What `dicom-node check` finds on the node's own ports: free for it, the node itself, or somebody else."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

from dicom_node.cli.findings import Finding, Verdict
from dicom_node.config import Config, PeerConfig

if TYPE_CHECKING:
    from dicom_node.net.who_answers import EchoAnswer


def check_port(config: Config) -> Finding:
    """The port is free for the node, or the node answers on it."""
    node = config.node
    taken = why_taken(node.host, node.port)
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
    from dicom_node.net.who_answers import who_answers

    answer = who_answers(ourselves(config), calling_ae=config.node.ae_title)
    fault = _why_not_ours(config, answer)
    text = fault or f"{config.node.ae_title} answers on port {config.node.port}"
    return Finding(check="node", verdict=Verdict.FAIL if fault else Verdict.OK, text=text)


def _why_not_ours(config: Config, answer: EchoAnswer) -> str:
    """Why it was not the node of this configuration that answered; "" where it was."""
    root = config.storage.root
    if answer.code == "association_rejected" and not answer.permanent and runs_here(config):
        return ""  # it has as many associations as it may; a node lets its own title in else
    if answer.code == "association_rejected":
        return f"{answer.text}: another DICOM application answers there, or a node that was started under another title"
    if not answer.ok:
        return answer.text
    if not answer.is_this_software:
        software = answer.implementation_class_uid
        return f"another DICOM application answers there (Implementation Class UID {software}), and not this node"
    if not runs_here(config):
        return f"another node answers there: none runs on [storage].root = {root}"
    return ""


def runs_here(config: Config) -> bool:
    """Whether a node runs on the storage root; also where its lock cannot be looked at by this user."""
    from dicom_node.net.trial_lock import is_locked

    try:
        return is_locked(config.storage.root / "node.lock")
    except PermissionError:
        return True  # nobody else than a node's user makes the lock


def ourselves(config: Config) -> PeerConfig:
    """The running node as a peer of this machine; over TLS, with its own certificate, where it speaks nothing else."""
    host = "127.0.0.1" if config.node.host in ("0.0.0.0", "::") else config.node.host
    us = PeerConfig(name="self", ae_title=config.node.ae_title, host=host, port=config.node.port)
    if not config.tls_alone:
        return us
    own = {"client_cert_file": config.tls.cert_file, "client_key_file": config.tls.key_file}
    return us.model_copy(update={"tls": True, "ca_file": config.tls.cert_file, "check_host_name": False, **own})
