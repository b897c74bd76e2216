"""What a node still holds after much traffic: memory, threads, file handles, files.

    python benchmarks/soak.py [--connections 5000] [--aborted 100] [--series 50] [--seed 1]     # some 10 minutes

A whole node with two receiver processes, over loopback: so many connections that say nothing, as many C-ECHOs on
associations of their own, associations that are cut off or reset at a random byte of a C-STORE, and CT series. A
first tenth of it warms up; then everything is counted, the rest follows, and it is counted again. Exit code 1 when
resident memory has grown by 20 MB or more, or a thread, a file handle, a half file or an association is left, or an
instance that was acknowledged is not there.
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from fake_pacs import FakePacs  # noqa: E402
from node_process import NodeProcess  # noqa: E402
from pydicom.uid import CTImageStorage, generate_uid  # noqa: E402
from raw_sender import Message, RawSender, echo_message, status_of, store_message  # noqa: E402
from tiny_bundle import write_tiny_bundle  # noqa: E402

MAX_GROWTH_MB = 20.0
SLICES = 40
QUIET_S = 75.0  # the slowest clock of a node strikes every 60 s, and its time-outs are shorter
SPARE = 3  # the node's clock starts a thread, and that a connection to the ledger, when two of its tasks fall together
VERIFICATION = "1.2.840.10008.1.1"
CONTEXTS = (str(CTImageStorage), VERIFICATION)
# no job: it is the intake that is looked at
RULE = '\n[log]\nlevel = "warning"\n\n[[rules]]\nname = "soak"\naction = "ignore"\n'
SETTINGS = {"receiver_processes = 1": "receiver_processes = 2", "[node]": "[node]\nmax_associations = 64"}


@dataclass(frozen=True)
class Held:
    """What the processes of a node hold together."""

    processes: int
    each: dict[int, tuple[float, int, int]]  # process: MB, threads, file handles
    resident_mb: float
    threads: int
    handles: int

    @classmethod
    def by(cls, pids: list[int]) -> Held:
        each = {
            pid: (round(_field(pid, "VmRSS") / 1024, 1), int(_field(pid, "Threads")), _handles(pid)) for pid in pids
        }
        resident, threads, handles = (sum(one) for one in zip(*each.values(), strict=True))
        return cls(processes=len(pids), each=each, resident_mb=round(resident, 1), threads=threads, handles=handles)

    def fits(self, before: Held) -> bool:
        """Whether no process holds more threads or file handles than it did; the first one is the node's own."""
        spare = [SPARE] + [0] * (self.processes - 1)
        pairs = zip(self.each.items(), spare, strict=True)
        return all(
            pid in before.each and now[1] <= before.each[pid][1] + more and now[2] <= before.each[pid][2] + more
            for (pid, now), more in pairs
        )


@dataclass(frozen=True)
class Traffic:
    """How much of each kind."""

    connections: int
    aborted: int
    series: int

    def tenth(self) -> Traffic:
        return Traffic(self.connections // 10, self.aborted // 10, max(1, self.series // 10))


def main() -> None:
    """Print the counts before and after, and what is wrong."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--connections", type=int, default=5000)
    options.add_argument("--aborted", type=int, default=100)
    options.add_argument("--series", type=int, default=50)
    options.add_argument("--seed", type=int, default=1)
    chosen = options.parse_args()
    traffic = Traffic(chosen.connections, chosen.aborted, chosen.series)
    with tempfile.TemporaryDirectory() as folder:
        wrong = soak(Path(folder), traffic, random.Random(chosen.seed))
    print(json.dumps({"traffic": asdict(traffic), "wrong": wrong}))
    sys.exit(1 if wrong else 0)


def soak(folder: Path, traffic: Traffic, dice: random.Random) -> list[str]:
    """Run it all; what is wrong at the end, in sentences."""
    bundle = write_tiny_bundle(folder / "bundle")
    with FakePacs() as pacs, NodeProcess(folder, pacs, bundle) as node:
        text = node.config.read_text()
        for known, wanted in SETTINGS.items():
            assert known in text
            text = text.replace(known, wanted)
        node.config.write_text(text + RULE)
        node.start()
        sent = send(node.peer.port, traffic.tenth(), dice)
        before = settled(node)
        print(json.dumps({"before": asdict(before)}), flush=True)
        began = time.monotonic()
        sent += send(node.peer.port, traffic, dice)
        after = settled(node, before)
        print(json.dumps({"after": asdict(after), "seconds": round(time.monotonic() - began)}), flush=True)
        return faults(before, after, folder / "spool", sent)


def send(port: int, traffic: Traffic, dice: random.Random) -> int:
    """All of it, one after the other; how many instances were acknowledged."""
    for _ in range(traffic.connections):
        socket.create_connection(("127.0.0.1", port), timeout=30).close()
        with RawSender(port, CONTEXTS) as sender:
            sender.write(echo_message(3, 1).in_pdus())
            assert status_of(sender.pdu()) == 0
            sender.release()
    for number in range(traffic.aborted):
        raw = slice_of(1, dice).in_pdus(4096)
        sender = RawSender(port, CONTEXTS)
        sender.write(raw[: dice.randrange(len(raw))])
        if number % 2:  # a reset, not an orderly end
            sender.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sender.close()
    return sum(send_series(port, dice) for _ in range(traffic.series))


def send_series(port: int, dice: random.Random) -> int:
    with RawSender(port, CONTEXTS) as sender:
        for number in range(1, SLICES + 1):
            sender.write(slice_of(number, dice).in_pdus(16384))
            assert status_of(sender.pdu()) == 0
        sender.release()
    return SLICES


def slice_of(number: int, dice: random.Random) -> Message:
    """An instance of 64 kB that only its header makes a CT: enough for who sorts it."""
    uid = str(generate_uid())
    header = b"".join(
        struct.pack("<HH2sH", group, element, vr, len(value)) + value
        for group, element, vr, value in (
            (0x0008, 0x0016, b"UI", str(CTImageStorage).encode() + b"\0"),
            (0x0008, 0x0018, b"UI", uid.encode() + b"\0" * (len(uid) % 2)),
            (0x0008, 0x0060, b"CS", b"CT"),
            (0x0020, 0x000D, b"UI", b"1.2.826.0.1.3680043.10.1\0" + b""),
            (0x0020, 0x000E, b"UI", b"1.2.826.0.1.3680043.10.2\0" + b""),
        )
    )
    pixels = dice.randbytes(65536)
    return store_message(
        1, number, CTImageStorage, uid, header + struct.pack("<HH2sHL", 0x7FE0, 0x10, b"OW", 0, len(pixels)) + pixels
    )


def settled(node: NodeProcess, as_few_as: Held | None = None) -> Held:
    """What the node holds after every clock of it has struck; with `as_few_as`, as soon as it holds no more."""
    end = time.monotonic() + QUIET_S
    while time.monotonic() < end:
        time.sleep(1.0)
        now = Held.by(family(node.pid))
        if as_few_as and now.fits(as_few_as):
            return now
    return Held.by(family(node.pid))


def faults(before: Held, after: Held, spool: Path, sent: int) -> list[str]:
    """What must not be, in sentences."""
    grown = after.resident_mb - before.resident_mb
    halves = [path for path in spool.rglob("*.tmp") if path.is_file()]
    kept = len({path.name for path in spool.rglob("*.dcm")})  # a job has links to what one before it has
    empty = [path for path in (spool / "inbox" / "incoming").iterdir() if not any(path.iterdir())]
    checks: list[tuple[bool, Callable[[], str]]] = [
        (grown < MAX_GROWTH_MB, lambda: f"resident memory grew by {grown:.1f} MB"),
        (after.processes == before.processes, lambda: f"{after.processes} processes, not {before.processes}"),
        (after.fits(before), lambda: f"threads or file handles are left: {after.each}, before {before.each}"),
        (not halves, lambda: f"{len(halves)} half files in the spool"),
        (not empty, lambda: f"{len(empty)} empty folders of associations in the inbox"),
        (kept == sent, lambda: f"{kept} instances in the spool, and {sent} were acknowledged"),
    ]
    return [text() for holds, text in checks if not holds]


def family(pid: int) -> list[int]:
    """A process and everything below it."""
    children = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread that ends meanwhile
            children += [int(child) for child in (task / "children").read_text().split()]
    return [pid, *(one for child in children for one in family(child))]


def _handles(pid: int) -> int:
    return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())


def _field(pid: int, name: str) -> float:
    """A number of /proc/PID/status; kB where it has a unit."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return float(value.split()[0])
    return 0.0


if __name__ == "__main__":
    main()
