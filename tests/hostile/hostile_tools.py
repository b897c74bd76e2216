"""A node's intake under siege, and what must hold after every batch of hostile input.

Nothing crashed, nothing lies outside the spool, the memory was bounded all the while, no association or half file is
left behind, and the next good study is served.
"""

from __future__ import annotations

import contextlib
import errno
import re
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import structlog
from hypothesis import strategies as st
from intake_tools import Intake, config, running_intake, small_ct
from pydicom.uid import CTImageStorage, generate_uid
from raw_sender import associate_request

from dicom_node.config import PeerConfig
from dicom_node.net.receivers import ReceiverPool
from dicom_node.net.scu import send_series
from storage.records import JobState

CT = str(CTImageStorage)
VERIFICATION = "1.2.840.10008.1.1"
MOST_GROWTH = 64 << 20  # bytes of resident memory that a batch may need at its worst, senders included
_SPOOL_FILE = re.compile(
    r"inbox/(incoming/[0-9a-f]+|series/[0-9.]+|segmentations/[0-9.]+)(/[0-9.]+(~[0-9]+)?\.dcm|/sender\.json)?"
    r"|(work|outbox)/[0-9a-f]+(/.*)?|quarantine/[a-z_]+(/[0-9.~]+\.dcm)?|references/[0-9a-f]+\.json"
    r"|inbox|inbox/[a-z]+|work|outbox|quarantine|references|commitments?(/.*)?|fetched(/.*)?|[a-z]+"
)
_LISTENS = "0A"  # a state in /proc/net/tcp
NODE = {"acse_timeout_s": 4, "network_timeout_s": 10, "max_connections_per_address": 0, "max_associations": 200}
BAD_NEWS = ("store.failed", "association.admission_failed", "ledger.note_failed", "assembler.step_failed")

NASTY = (
    "a\nnode.started fake=line",
    "\x1b[2J\x1b]0;title\x07",
    "'; DROP TABLE jobs; --",
    '"; rm -rf / #',
    "$(touch /tmp/x)`id`",
    "<script>alert(1)</script>",
    "=cmd|' /C calc'!A0",
    "+1+1",
    "-2+3",
    "@SUM(A1)",
    "../../../etc/passwd",
    "[red]markup[/red] {0} %s %n",
    "\u202eevil\u2066",
    "\x00\x00",
)


@dataclass(repr=False)  # hypothesis prints it
class Siege:
    """A receiver, its spool and ledger, with what was there before the batch."""

    intake: Intake
    folder: Path
    pool: ReceiverPool | None = None  # the receiver is in processes of its own
    logs: list[dict[str, object]] = field(default_factory=list)
    resident: int = 0
    outside: frozenset[str] = frozenset()
    served: int = 0

    def begin(self) -> None:
        """Remember what there is; a good study first, so that everything that is loaded once is loaded."""
        self.good_study()
        self.outside = self._outside()
        self.watch_memory()

    def watch_memory(self) -> None:
        """From here on: the peak of what is resident counts from now."""
        self.resident = sum(forget_peak(pid) for pid in self._pids())

    def _pids(self) -> Sequence[int | str]:
        """The processes that receive."""
        return ["self"] if self.pool is None else self.pool.pids

    def _growth(self) -> int:
        return sum(peak_bytes(pid) for pid in self._pids()) - self.resident

    def _is_quiet(self) -> bool:
        """No association is open, nor a connection that waits for one."""
        if self.intake.registry.open_tokens():
            return False
        if self.pool is None:
            return not any(server.active_associations for server in self.intake.receiver._servers)
        return all(_connections(pid, self.intake.port) == 0 for pid in self.pool.pids)

    def assert_unharmed(self) -> None:
        """What the module's first lines say."""
        growth = self._growth()
        intake = self.intake
        intake.wait(self._is_quiet)
        assert (self.pool or intake.receiver).alive
        bad_news = [line for line in self.logs if line["event"] in BAD_NEWS]
        self.logs.clear()
        assert not bad_news, bad_news
        assert self._outside() == self.outside
        spool = intake.spool.root
        strange = [str(path.relative_to(spool)) for path in spool.rglob("*")]
        assert [path for path in strange if not _SPOOL_FILE.fullmatch(path)] == []
        self.good_study()
        growth = max(growth, self._growth())
        assert growth < MOST_GROWTH, f"{growth >> 20} MiB more"
        self.watch_memory()

    def good_study(self) -> None:
        """An ordinary study, sent by an ordinary sender, becomes a job."""
        self.served += 1
        series_uid = generate_uid()
        paths = small_ct(self.folder / "good" / str(self.served), 4, series_uid=series_uid)
        node = PeerConfig(name="node", ae_title="SYNPET", port=self.intake.port)
        outcome = send_series(paths, node, calling_ae="PACS")
        assert outcome.ok, outcome.text
        self.intake.wait(lambda: not self.intake.registry.open_tokens())
        self.intake.pass_time(31)
        job = self.intake.job(series_uid)
        assert (job.state, job.instances) == (JobState.QUEUED, 4)

    def send(self, *words: bytes, associate: Sequence[str] = ()) -> None:
        """Say something on a connection of its own, and hang up when the node has had time to read it.

        With `associate`, SOP classes, an association is asked for first, and its answer awaited.
        """
        sock = socket.create_connection(("127.0.0.1", self.intake.port), timeout=60)
        with sock, _hung_up_on():
            if associate:
                sock.sendall(associate_request(associate))
                sock.recv(65536)
            for word in words:
                sock.sendall(word)
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(65536):
                pass

    def _outside(self) -> frozenset[str]:
        ours = ("spool", "good", "ledger.sqlite")
        return frozenset(
            str(path)
            for path in self.folder.parent.rglob("*")
            if path.relative_to(self.folder).parts[:1] and not path.relative_to(self.folder).parts[0].startswith(ours)
        )


@contextlib.contextmanager
def besieged(
    folder: Path, *, reader: str = "stream", max_pdu: int = 262144, max_instance_bytes: int = 4_000_000
) -> Iterator[Siege]:
    """A receiver in this process, so that an exception in any of its threads fails the test."""
    folder.mkdir(parents=True, exist_ok=True)
    limits = {"max_instance_bytes": max_instance_bytes}
    cfg = config(node={**NODE, "max_pdu": max_pdu}, intake={"reader": reader, **limits})
    with structlog.testing.capture_logs() as logs, running_intake(folder, cfg) as intake:
        siege = Siege(intake, folder, logs=logs)
        siege.begin()
        yield siege


@contextlib.contextmanager
def besieged_processes(folder: Path, *, processes: int = 2) -> Iterator[Siege]:
    """Receiver processes, as the node has them. What they log goes to this process's stderr."""
    folder.mkdir(parents=True, exist_ok=True)
    cfg = config(
        node={**NODE, "receiver_processes": processes},
        storage={"root": str(folder / "spool")},
        intake={"max_instance_bytes": 4_000_000},
        log={"level": "warning"},
    )
    with running_intake(folder, cfg, listen=False) as intake:
        pool = ReceiverPool(cfg, intake.ledger, intake.registry, on_lost=intake.spool.drop_halves)
        intake.port = pool.start(port=0)
        try:
            siege = Siege(intake, folder, pool)
            siege.begin()
            yield siege
        finally:
            pool.stop()


@contextlib.contextmanager
def _hung_up_on() -> Iterator[None]:
    """The node may hang up in the middle; it must not keep us waiting."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ECONNRESET, errno.EPIPE, errno.ENOTCONN):
            raise


def _connections(pid: int, port: int) -> int:
    """How many connections to `port` a process has open."""
    inodes = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            inodes.add(str(descriptor.readlink()))
    rows = [line.split() for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]]
    at_port = [row for row in rows if row[1].endswith(f":{port:04X}") and row[3] != _LISTENS]
    return sum(f"socket:[{row[9]}]" in inodes for row in at_port)


def forget_peak(pid: int | str = "self") -> int:
    """The peak of a process becomes what is resident now, in bytes (proc_pid_clear_refs(5))."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")
    return peak_bytes(pid)


def peak_bytes(pid: int | str = "self") -> int:
    """The most that was resident of a process since `forget_peak`: no batch hides it by freeing in time."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * 1024


def assert_one_line_each(logged: str) -> None:
    """Every line of a log in console format begins with its time: nobody else began one."""
    lines = logged.splitlines()
    assert lines
    assert [line for line in lines if not re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", line)] == []


@st.composite
def mutated(draw: st.DrawFn, valid: bytes, most: int = 6) -> bytes:
    """`valid` with some bytes changed, doubled, dropped, or lengths made huge; or cut short."""
    raw = bytearray(valid)
    for _ in range(draw(st.integers(1, most))):
        if not raw:
            break
        at = draw(st.integers(0, len(raw) - 1))
        match draw(st.sampled_from(("flip", "insert", "drop", "huge", "zero", "double", "cut"))):
            case "flip":
                raw[at] ^= 1 << draw(st.integers(0, 7))
            case "insert":
                raw[at:at] = draw(st.binary(min_size=1, max_size=40))
            case "drop":
                del raw[at : at + draw(st.integers(1, 40))]
            case "huge":
                raw[at : at + 4] = b"\xff\xff\xff\xff"
            case "zero":
                raw[at : at + 4] = bytes(4)
            case "double":
                raw[at:at] = raw[at : at + 64]
            case _:
                del raw[at:]
    return bytes(raw)
