"""A node in a process of its own, so that a test can kill it: `python node_process.py CONFIG.toml BUSY_TIMEOUT_S`.

with NodeProcess(folder, pacs, bundle) as node:
    node.start(); node.send(files); node.kill(); node.start()
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from fake_pacs import FakePacs, free_port
from pydicom.uid import generate_uid
from tiny_study import write_tiny_study

from dicom_node.config import PeerConfig
from dicom_node.net.scu import SendOutcome, Timeouts, echo, send_series
from storage import database
from storage.database import BUSY_TIMEOUT_S
from storage.ledger import Ledger, open_ledger
from storage.records import Job, JobFilter, JobState

ROOT = Path(__file__).resolve().parent.parent
CONFIG = """
[node]
ae_title = "SYNPET"
host = "127.0.0.1"
port = {port}
acse_timeout_s = 5.0
dimse_timeout_s = 10.0
receiver_processes = 1

[[peers]]
name = "pacs"
ae_title = "PACS"
host = "127.0.0.1"
port = {pacs_port}

[[destinations]]
name = "pacs"
peer = "pacs"
first_retry_s = 0.2
max_retry_s = 0.5
{destination}

[intake]
quiet_period_s = 1.0
study_quiet_period_s = 1.0
scan_interval_s = 0.1
min_free_bytes = 0

[pipeline]
bundle = "{bundle}"
device = "cpu"
threads = 1

[engine]
retry_s = 0.2
max_attempts = 5
"""
UNTIL_S = 120.0  # only a test that fails waits so long


class NodeProcess:
    """Starts, kills and asks one node. `folder` holds its configuration, spool and log.

    `destination` is more lines for the table of its one destination; `busy_timeout_s` is how long it waits for a
    ledger that somebody else keeps locked.
    """

    def __init__(
        self,
        folder: Path,
        pacs: FakePacs,
        bundle: Path,
        *,
        destination: str = "",
        busy_timeout_s: float = BUSY_TIMEOUT_S,
    ) -> None:
        self.folder = folder
        self._busy_timeout_s = busy_timeout_s
        self.peer = PeerConfig(name="node", ae_title="SYNPET", port=free_port())
        self.config = folder / "config.toml"
        self.log = folder / "node.log"
        self.config.write_text(
            CONFIG.format(port=self.peer.port, pacs_port=pacs.port, bundle=bundle, destination=destination)
        )
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> NodeProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._process is not None and self._process.poll() is None:
            self.kill()
        if error is not None and self.log.exists():
            sys.stderr.write(self.log.read_text())

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start it and wait until it answers C-ECHO."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(Path(__file__).resolve()), str(self.config), str(self._busy_timeout_s)],
                stdout=log,
                stderr=log,
                env={**os.environ, "PYTHONPATH": str(ROOT)},  # tests/dicom_node is no package to import from
            )
        self.until(lambda: echo(self.peer, calling_ae="PACS", timeouts=Timeouts(acse_s=2.0)).ok)

    def kill(self) -> None:
        """kill -9: nothing of it runs any more when this returns (the engine ends by itself)."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    @staticmethod
    def until_gone(pids: Sequence[int]) -> None:
        """Wait until processes have ended; an orphan that nobody has waited for yet has ended all the same."""
        deadline = time.monotonic() + UNTIL_S
        while any(_runs(pid) for pid in pids):
            if time.monotonic() > deadline:
                raise AssertionError(f"processes {pids} did not end")
            time.sleep(0.02)

    def wait(self) -> int:
        """The exit code, when it has ended."""
        assert self._process is not None
        return self._process.wait(UNTIL_S)

    def send(self, files: Sequence[Path]) -> SendOutcome:
        """C-STORE a series to it, as the PACS would."""
        return send_series(files, self.peer, calling_ae="PACS")

    def ledger(self) -> Ledger:
        return open_ledger(f"sqlite:///{self.folder / 'spool' / 'ledger.sqlite'}")

    def jobs(self) -> list[Job]:
        ledger = self.ledger()
        try:
            return ledger.find(JobFilter())
        finally:
            ledger.close()

    def until_state(self, *states: JobState) -> Job:
        """Wait until its one job is in one of the states."""
        self.until(lambda: bool(self.jobs()) and self.jobs()[0].state in states)
        return self.jobs()[0]

    def until(self, what: Callable[[], bool]) -> None:
        """Wait for what must come; a node that has ended will not bring it."""
        deadline = time.monotonic() + UNTIL_S
        while not what():
            assert self._process is not None
            if self._process.poll() is not None:
                raise AssertionError(f"the node ended with {self._process.returncode}")
            if time.monotonic() > deadline:
                raise AssertionError(f"it did not come; jobs: {self.jobs()}")
            time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def write_ct(folder: Path) -> list[Path]:
    """A new CT series of the phantom."""
    return write_tiny_study(folder, study_uid=generate_uid(), series_uid=generate_uid())


def main() -> None:
    from dicom_node.config import load_config
    from dicom_node.node import Node

    database.BUSY_TIMEOUT_S = float(sys.argv[2])
    Node(load_config(Path(sys.argv[1]))).run_forever()


if __name__ == "__main__":
    main()
