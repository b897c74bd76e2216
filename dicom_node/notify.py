"""What systemd wants to know (sd_notify(3)): ready, stopping, still alive.

The protocol is one datagram to the socket that systemd names in NOTIFY_SOCKET; without systemd nothing is sent.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Notifier:
    """Where to send, and how often systemd expects a sign of life (0: it does not watch)."""

    address: str = ""
    watchdog_s: float = 0.0

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> Notifier:
        """The service manager hands its wishes over in the environment; there is no other way."""
        usec = environ.get("WATCHDOG_USEC", "")
        watched = environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        return cls(
            address=environ.get("NOTIFY_SOCKET", ""),
            watchdog_s=int(usec) / 1e6 if usec.isdigit() and watched else 0.0,
        )

    def ready(self) -> None:
        self._send("READY=1")

    def stopping(self) -> None:
        self._send("STOPPING=1")

    def alive(self) -> None:
        self._send("WATCHDOG=1")

    def status(self, text: str) -> None:
        """One line for `systemctl status`."""
        self._send(f"STATUS={' '.join(text.split())}")

    def _send(self, message: str) -> None:
        if not self.address:
            return
        # "@name" is systemd's spelling of an abstract socket
        target = "\0" + self.address[1:] if self.address.startswith("@") else self.address
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            try:
                sock.connect(target)
                sock.sendall(message.encode())
            except OSError:
                return  # a service manager that went away must not take the node with it
