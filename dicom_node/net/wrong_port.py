"""Who speaks TLS to the port for plain DICOM, or plain DICOM to that for TLS, and what to tell of it."""

from __future__ import annotations

from dicom_node.config import Config

_TLS_HANDSHAKE = b"\x16\x03"  # content type and major version of its first record (RFC 8446 section 5.1)


def began_tls(header: bytes) -> bool:
    """Whether what should be a PDU's header is that of a TLS handshake."""
    return header.startswith(_TLS_HANDSHAKE)


def tls_on_plain_port(config: Config) -> str:
    """The reason to tell, with the port that was meant."""
    where = f"DICOM TLS is on {config.tls.port}" if config.tls.cert_file else "TLS is not configured: [tls]"
    return f"began TLS on the plain port; {where}"


def plain_port(config: Config) -> str:
    """Where one that speaks no TLS should call."""
    if config.tls_alone:
        return "nothing without TLS is heard: [tls].port is [node].port"
    return f"plain DICOM is on {config.node.port}"
