"""What systemd is told."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from dicom_node.notify import Notifier


def test_systemd_hears_ready_alive_and_stopping(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        notifier = Notifier.from_environment({"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "30000000"})
        notifier.ready()
        notifier.alive()
        notifier.status("3 jobs\nwait")
        notifier.stopping()
        heard = [systemd.recv(100).decode() for _ in range(4)]
    assert heard == ["READY=1", "WATCHDOG=1", "STATUS=3 jobs wait", "STOPPING=1"]
    assert notifier.watchdog_s == 30.0


def test_an_abstract_socket_is_spelled_with_an_at_sign() -> None:
    name = f"@dicom-node-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind("\0" + name[1:])
        Notifier(address=name).ready()
        assert systemd.recv(100) == b"READY=1"


def test_without_systemd_nothing_happens() -> None:
    notifier = Notifier.from_environment({})
    notifier.ready()
    assert notifier.watchdog_s == 0.0


def test_a_watchdog_meant_for_another_process_is_not_ours() -> None:
    assert Notifier.from_environment({"WATCHDOG_USEC": "1000000", "WATCHDOG_PID": "1"}).watchdog_s == 0.0


def test_a_service_manager_that_went_away_does_no_harm(tmp_path: Path) -> None:
    Notifier(address=str(tmp_path / "gone")).ready()
