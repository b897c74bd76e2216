"""DICOM TLS by the BCP 195 profile (PS3.15 annex B.12): contexts, the handshake, and when certificates end.

Both sides trust what `ca_file` holds: the CA's certificate, or the other side's own. No session is resumed, so that
every association shows its certificate anew (`ServerContext`). A key with a pass phrase is refused: nobody is there to
type it.
"""

from __future__ import annotations

import os
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from weakref import finalize

import structlog

from dicom_node.config import Config, PeerConfig, TlsConfig

log = structlog.get_logger(__name__)

# RFC 9325 section 4.2, for TLS 1.2; those of TLS 1.3 are all fit
CIPHERS = (
    "ECDHE-ECDSA-AES128-GCM-SHA256",
    "ECDHE-RSA-AES128-GCM-SHA256",
    "ECDHE-ECDSA-AES256-GCM-SHA384",
    "ECDHE-RSA-AES256-GCM-SHA384",
)
_VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}
_VERIFY = {"none": ssl.CERT_NONE, "optional": ssl.CERT_OPTIONAL, "required": ssl.CERT_REQUIRED}

NO_TLS = "what it sent is no TLS"
_WHY = {  # OpenSSL's reason -> a sentence for an administrator
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "it showed no certificate, and one is required",
    "WRONG_VERSION_NUMBER": NO_TLS,
    "HTTP_REQUEST": NO_TLS,
    "UNSUPPORTED_PROTOCOL": "it speaks no version of TLS that is allowed",
    "VERSION_TOO_LOW": "it speaks no version of TLS that is allowed",
    "TLSV1_ALERT_PROTOCOL_VERSION": "it speaks no version of TLS that is allowed",
    "NO_SHARED_CIPHER": "it has no cipher suite of the BCP 195 profile",
    "SSLV3_ALERT_HANDSHAKE_FAILURE": "the two have no cipher suite or version in common",
    "TLSV1_ALERT_UNKNOWN_CA": "it does not know the CA of our certificate",
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "it wants a certificate of ours: client_cert_file",
    "SSLV3_ALERT_BAD_CERTIFICATE": "it does not accept our certificate",
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": "it does not accept our certificate",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "our certificate has expired",
    "UNEXPECTED_EOF_WHILE_READING": "it hung up in the handshake",
}


class SecurityError(Exception):
    """A certificate or key cannot be used; the text names the key of the configuration and the file."""


def server_context(tls: TlsConfig) -> ssl.SSLContext:
    """Our side as the one that is called. Raises `SecurityError`."""
    assert tls.cert_file is not None
    context = _profile(ssl.PROTOCOL_TLS_SERVER, tls.min_version)
    context.num_tickets = 0
    context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_RENEGOTIATION | ssl.OP_CIPHER_SERVER_PREFERENCE
    _load_own(context, tls.cert_file, tls.key_file, "[tls].cert_file and key_file")
    context.verify_mode = _VERIFY[tls.client_certificates]
    if tls.ca_file is not None and tls.client_certificates != "none":
        _load_trusted(context, tls.ca_file, "[tls].ca_file")
    return context


def client_context(peer: PeerConfig) -> ssl.SSLContext:
    """Our side as the one that calls a peer with `tls`. Raises `SecurityError`."""
    context = _profile(ssl.PROTOCOL_TLS_CLIENT, "1.2")
    context.check_hostname = peer.check_host_name
    if peer.ca_file is not None:
        _load_trusted(context, peer.ca_file, f"[peers.{peer.name}].ca_file")
    else:
        context.load_default_certs()
    if peer.client_cert_file is not None:
        keys = f"[peers.{peer.name}].client_cert_file and client_key_file"
        _load_own(context, peer.client_cert_file, peer.client_key_file, keys)
    return context


def _profile(side: int, min_version: str) -> ssl.SSLContext:
    context = ssl.SSLContext(side)
    context.minimum_version = _VERSIONS[min_version]
    context.set_ciphers(":".join(CIPHERS))
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # ca_file may hold the very certificate that is shown
    return context


def _load_own(context: ssl.SSLContext, certificate: Path, key: Path | None, keys: str) -> None:
    def no_pass_phrase() -> str:
        raise SecurityError(f"{keys}: the key in {key or certificate} has a pass phrase: store it without one")

    try:
        context.load_cert_chain(certificate, key, password=no_pass_phrase)
    except OSError as error:  # ssl.SSLError is one
        raise SecurityError(f"{keys}: {_cannot_be_used(certificate, error, beside=key)}") from error


def _load_trusted(context: ssl.SSLContext, path: Path, key: str) -> None:
    try:
        context.load_verify_locations(path)
    except OSError as error:
        raise SecurityError(f"{key}: {_cannot_be_used(path, error)}") from error


def _cannot_be_used(path: Path, error: OSError, *, beside: Path | None = None) -> str:
    names = f"{path} and {beside}" if beside is not None else str(path)
    if isinstance(error, ssl.SSLError):
        reason = (error.reason or "no PEM file of certificates").replace("_", " ").lower()
    else:
        reason = error.strerror or type(error).__name__
    return f"{names} cannot be used: {reason}"


class ServerContext:
    """Makes the contexts of `[tls]`; reads its files again when one of them has changed. Safe for several threads.

    A context for each connection: OpenSSL resumes TLS 1.2 sessions out of its context's cache, which Python cannot
    turn off. Making one takes 1 ms, a handshake with both its sides 3 to 4.
    """

    def __init__(self, tls: TlsConfig) -> None:
        self._tls = tls
        self._lock = threading.Lock()
        self._seen: object = None
        self._held: _Held | None = None

    def fresh(self) -> ssl.SSLContext:
        """For the next connection alone. Files that cannot be used leave what was there, and the log says so once.

        Raises `SecurityError` where there was nothing.
        """
        with self._lock:
            state = self._state()
            if state != self._seen:
                self._seen = state
                self._read_again()
            if self._held is None:
                raise SecurityError("[tls]: its certificate cannot be used: see the log")
            return server_context(self._held.tls)

    def _read_again(self) -> None:
        try:
            server_context(self._tls)  # its faults name the files
            held = _Held(self._tls)
            server_context(held.tls)  # as they were copied, perhaps in the middle of a change
        except (SecurityError, OSError) as error:
            log.error("tls.certificate_not_loaded", reason=str(error))
        else:
            self._held = held
            log.info("tls.certificate_loaded", file=str(self._tls.cert_file))

    def _state(self) -> tuple[tuple[int, int, int], ...]:
        return tuple(_stat(path) for path in (self._tls.cert_file, self._tls.key_file, self._tls.ca_file) if path)


class _Held:
    """Copies in memory of the files of `[tls]`, for when what lies at their paths can no longer be used."""

    def __init__(self, tls: TlsConfig) -> None:
        copies: dict[str, Path] = {}
        for key in ("cert_file", "key_file", "ca_file"):
            path: Path | None = getattr(tls, key)
            if path is not None:
                file = _in_memory(path)
                finalize(self, os.close, file)
                copies[key] = Path(f"/proc/self/fd/{file}")
        self.tls = tls.model_copy(update=copies)


def _in_memory(path: Path) -> int:
    """A file without a name that holds what `path` holds, as OpenSSL reads keys from paths only."""
    data = path.read_bytes()
    file = os.memfd_create("tls")
    os.write(file, data)
    return file


def _stat(path: Path) -> tuple[int, int, int]:
    try:
        found = path.stat()
    except OSError:
        return 0, 0, 0
    return found.st_ino, found.st_mtime_ns, found.st_size


def wrap(sock: socket.socket, context: ssl.SSLContext) -> ssl.SSLSocket:
    """The server's side of a connection, before the handshake. Raises OSError; `why` explains it."""
    return context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)


def shake_hands(sock: ssl.SSLSocket, *, within_s: float) -> None:
    """The handshake, whole within `within_s` seconds. Raises OSError; `why` explains it."""
    sock.settimeout(within_s)  # of the whole handshake, not of each read in it
    sock.do_handshake()


def why(error: OSError) -> str:
    """Why a handshake failed, for an administrator."""
    if isinstance(error, TimeoutError):
        return "it did not finish the TLS handshake in time"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not accepted: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        reason = error.reason or ""
        return _WHY.get(reason, f"the TLS handshake failed: {reason.replace('_', ' ').lower() or 'it hung up'}")
    return f"the connection ended in the TLS handshake: {error.strerror or type(error).__name__}"


def tell_failure(context: ssl.SSLContext, tell: Callable[[OSError], None], made: list[socket.socket]) -> None:
    """Call `tell` with what goes wrong when a socket of this client context connects, and put the socket in `made`.

    pynetdicom only says that a connection did not come to be, and forgets its socket.
    """

    class Telling(ssl.SSLSocket):
        def connect(self, address: Any) -> None:
            made.append(self)
            try:
                super().connect(address)
            except OSError as error:
                tell(error)
                raise

    context.sslsocket_class = Telling


# ---- when certificates end


@dataclass(frozen=True, kw_only=True, slots=True)
class Certificate:
    """A certificate file of the configuration; `ends` is None when it cannot be read."""

    key: str  # as "[tls].cert_file"
    path: Path
    ends: datetime | None

    def fault(self, now: datetime, warn_days: int) -> str:
        """What an administrator should know, or nothing."""
        if self.ends is None:
            return f"{self.key} = {self.path}: no certificate can be read"
        if self.ends <= now:
            return f"{self.key} = {self.path}: the certificate ended on {self.ends:%Y-%m-%d}"
        if self.ends - now <= timedelta(days=warn_days):
            left = (self.ends - now).days
            return f"{self.key} = {self.path}: the certificate ends on {self.ends:%Y-%m-%d}, in {left} days"
        return ""


def certificates(config: Config) -> Iterator[Certificate]:
    """Every certificate file that DICOM TLS uses, ours and those that we trust."""
    tables: list[tuple[str, dict[str, Path | None]]] = []
    if config.tls.cert_file is not None:
        tables.append(("[tls]", {"cert_file": config.tls.cert_file, "ca_file": config.tls.ca_file}))
    for peer in config.peers:
        tables.append((f"[peers.{peer.name}]", {"client_cert_file": peer.client_cert_file, "ca_file": peer.ca_file}))
    for table, files in tables:
        for key, path in files.items():
            if path is not None:
                yield Certificate(key=f"{table}.{key}", path=path, ends=first_end(path))


def warn_of_ends(config: Config, now: datetime) -> None:
    """A log line for every certificate that has ended, soon will, or cannot be read."""
    for one in certificates(config):
        if fault := one.fault(now, config.tls.warn_days):
            log.warning("tls.certificate_ends", reason=fault)


def first_end(path: Path) -> datetime | None:
    """When the first of the certificates in a PEM file ends; None when none can be read."""
    from cryptography.x509 import load_pem_x509_certificates  # not for the processes that only receive

    try:
        return min(one.not_valid_after_utc for one in load_pem_x509_certificates(path.read_bytes()))
    except (OSError, ValueError):
        return None
