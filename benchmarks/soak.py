"""What a node still holds after much traffic: memory, threads, file handles, files, associations; and its jobs.

    python benchmarks/soak.py [--connects 5000] [--aborts 100] [--series 50] [--seed 1]     # some 3 minutes
    python benchmarks/soak.py --connects 50 --aborts 5 --series 3 --short     # the run of tests/test_soak.py

A whole node with two receiver processes, over loopback: so many connections that say nothing, as many C-ECHOs on
associations of their own, associations that are cut off or reset at a random byte of a C-STORE, and CT series, each
of a study of its own. Exit code 1, and a sentence for each fault, when

- resident memory has grown by 20 MB or more, or a thread, a file handle, a half file or an association is left,
- an instance that was acknowledged is not there, or
- there is not exactly one job for each series, REJECTED by the rule of this configuration (`rule_ignore`: it is the
  intake that is looked at), with all of its instances.

The first fiftieth of the traffic warms up, then the node's clocks strike once, and then the base is measured: before
that, memory, threads and handles are those of what a process does once in its life (modules that are loaded at their
first use, the ledger's connections, buffers of the first association). What grows with each association grows in the
other forty-nine fiftieths, too. `--short` waits no minute for the clocks and leaves memory out: a short run says
nothing about it.
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
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.request import urlopen

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from fake_pacs import FakePacs  # noqa: E402
from node_process import NodeProcess  # noqa: E402
from ports import free_port  # noqa: E402
from pydicom.uid import CTImageStorage, generate_uid  # noqa: E402
from raw_sender import Message, RawSender, echo_message, status_of, store_message  # noqa: E402
from tiny_bundle import write_tiny_bundle  # noqa: E402

from dicom_node.net.command import padded  # noqa: E402
from storage.records import Job, JobFilter, JobState  # noqa: E402

MAX_GROWTH_MB = 20.0
SLICES = 40
QUIET_S = 75.0  # the slowest clock of a node strikes every 60 s, and its time-outs are shorter
SHORT_S = 5.0  # of --short
WARM_UP = 50  # one part in so many
SPARE = 3  # the node's clock starts a thread, and that a connection to the ledger, when two of its tasks fall together
VERIFICATION = "1.2.840.10008.1.1"
CONTEXTS = (str(CTImageStorage), VERIFICATION)
ENDED = (JobState.REJECTED, "rule_ignore")  # what this rule makes of a series: it is the intake that is looked at
TABLES = """
[log]
level = "warning"

[metrics]
port = {metrics}

[[rules]]
name = "soak"
action = "ignore"
"""
GAUGE = "dicom_node_associations_open"
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

    connects: int
    aborts: int
    series: int

    def warm_up(self) -> Traffic:
        """A fiftieth of it, and one of each at least."""
        return Traffic(*(max(1, count // WARM_UP) for count in (self.connects, self.aborts, self.series)))

    def without(self, part: Traffic) -> Traffic:
        return Traffic(self.connects - part.connects, self.aborts - part.aborts, self.series - part.series)


def main() -> None:
    """Print the counts before and after, and what is wrong."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--connects", type=_positive, default=5000, help="silent connections, and as many C-ECHOs")
    options.add_argument("--aborts", type=_positive, default=100, help="associations that are cut off")
    options.add_argument("--series", type=_positive, default=50, help=f"CT series of {SLICES} slices")
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--short", action="store_true", help="no minute of rest for the base, and no look at memory")
    chosen = options.parse_args()
    traffic = Traffic(chosen.connects, chosen.aborts, chosen.series)
    with tempfile.TemporaryDirectory() as folder:
        wrong = soak(Path(folder), traffic, random.Random(chosen.seed), short=chosen.short)
    print(json.dumps({"traffic": asdict(traffic), "wrong": wrong}))
    for text in wrong:
        print(text, file=sys.stderr)
    sys.exit(1 if wrong else 0)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


def soak(folder: Path, traffic: Traffic, dice: random.Random, *, short: bool = False) -> list[str]:
    """Run it all; what is wrong at the end, in sentences."""
    bundle = write_tiny_bundle(folder / "bundle")
    metrics = free_port()
    with FakePacs() as pacs, NodeProcess(folder, pacs, bundle) as node:
        text = node.config.read_text()
        for known, wanted in SETTINGS.items():
            assert known in text
            text = text.replace(known, wanted)
        node.config.write_text(text + TABLES.format(metrics=metrics))
        node.start()
        warm_up = traffic.warm_up()
        sent = send(node.peer.port, warm_up, dice)
        before = settled(node, rest_s=SHORT_S if short else QUIET_S)
        print(json.dumps({"warm_up": asdict(warm_up), "before": asdict(before)}), flush=True)
        began = time.monotonic()
        sent += send(node.peer.port, traffic.without(warm_up), dice)
        until(lambda: not wrong_jobs(jobs_of(node), sent) and open_associations(metrics) == 0)
        after = settled(node, before)
        print(json.dumps({"after": asdict(after), "seconds": round(time.monotonic() - began)}), flush=True)
        jobs, still_open = jobs_of(node), open_associations(metrics)
        ended = Counter(f"{job.state.value} {job.reason_code}, {job.instances} instances" for job in jobs)
        print(json.dumps({"jobs": ended, "open_associations": still_open}), flush=True)
        return [
            *([] if short else grown(before, after)),
            *left_over(before, after, folder / "spool", len(sent) * SLICES),
            *([f"{still_open} associations are open"] if still_open else []),
            *wrong_jobs(jobs, sent),
        ]


def send(port: int, traffic: Traffic, dice: random.Random) -> list[str]:
    """All of it, one after the other; the UIDs of the series, whose every instance was acknowledged."""
    for _ in range(traffic.connects):
        socket.create_connection(("127.0.0.1", port), timeout=30).close()
        with RawSender(port, CONTEXTS) as sender:
            sender.write(echo_message(3, 1).in_pdus())
            assert status_of(sender.pdu()) == 0
            sender.release()
    for number in range(traffic.aborts):
        raw = slice_of(1, _uid(), _uid(), dice).in_pdus(4096)
        sender = RawSender(port, CONTEXTS)
        sender.write(raw[: dice.randrange(len(raw))])
        if number % 2:  # a reset, not an orderly end
            sender.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sender.close()
    return [send_series(port, dice) for _ in range(traffic.series)]


def send_series(port: int, dice: random.Random) -> str:
    """A series of a study of its own; its UID."""
    study_uid, series_uid = _uid(), _uid()
    with RawSender(port, CONTEXTS) as sender:
        for number in range(1, SLICES + 1):
            sender.write(slice_of(number, study_uid, series_uid, dice).in_pdus(16384))
            assert status_of(sender.pdu()) == 0
        sender.release()
    return series_uid


def slice_of(number: int, study_uid: str, series_uid: str, dice: random.Random) -> Message:
    """An instance of 64 kB that only its header makes a CT: enough for who sorts it."""
    uid = _uid()
    header = b"".join(
        struct.pack("<HH2sH", group, element, vr, len(value)) + value
        for group, element, vr, value in (
            (0x0008, 0x0016, b"UI", padded(CTImageStorage, b"\0")),
            (0x0008, 0x0018, b"UI", padded(uid, b"\0")),
            (0x0008, 0x0060, b"CS", b"CT"),
            (0x0020, 0x000D, b"UI", padded(study_uid, b"\0")),
            (0x0020, 0x000E, b"UI", padded(series_uid, b"\0")),
        )
    )
    pixels = dice.randbytes(65536)
    return store_message(
        1, number, CTImageStorage, uid, header + struct.pack("<HH2sHL", 0x7FE0, 0x10, b"OW", 0, len(pixels)) + pixels
    )


def _uid() -> str:
    return str(generate_uid())


def until(holds: Callable[[], bool]) -> None:
    """Wait for it, not for ever: what does not hold then is told as a fault."""
    end = time.monotonic() + QUIET_S
    while not holds() and time.monotonic() < end:
        time.sleep(0.2)


def jobs_of(node: NodeProcess) -> list[Job]:
    """All of them, however many."""
    ledger = node.ledger()
    try:
        return ledger.find(JobFilter(limit=1_000_000))
    finally:
        ledger.close()


def open_associations(port: int) -> int:
    """The gauge of the node's own figures (docs/metrics.md)."""
    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    (value,) = [line.split()[1] for line in lines if line.startswith(f"{GAUGE} ")]
    return int(float(value))


def settled(node: NodeProcess, as_few_as: Held | None = None, *, rest_s: float = QUIET_S) -> Held:
    """What the node holds after `rest_s`, in which its clocks strike; with `as_few_as`, as soon as it holds no more."""
    end = time.monotonic() + rest_s
    while time.monotonic() < end:
        time.sleep(1.0)
        now = Held.by(family(node.pid))
        if as_few_as and now.fits(as_few_as):
            return now
    return Held.by(family(node.pid))


def grown(before: Held, after: Held) -> list[str]:
    """More memory than an unlucky layout of it explains, in a sentence."""
    more = after.resident_mb - before.resident_mb
    return [f"resident memory grew by {more:.1f} MB"] if more >= MAX_GROWTH_MB else []


def left_over(before: Held, after: Held, spool: Path, sent: int) -> list[str]:
    """What is left and must not be, or is missing, in sentences."""
    halves = [path for path in spool.rglob("*.tmp") if path.is_file()]
    kept = len({path.name for path in spool.rglob("*.dcm")})  # a job has links to what one before it has
    empty = [path for path in (spool / "inbox" / "incoming").iterdir() if not any(path.iterdir())]
    checks: list[tuple[bool, Callable[[], str]]] = [
        (after.processes == before.processes, lambda: f"{after.processes} processes, not {before.processes}"),
        (after.fits(before), lambda: f"threads or file handles are left: {after.each}, before {before.each}"),
        (not halves, lambda: f"{len(halves)} half files in the spool"),
        (not empty, lambda: f"{len(empty)} empty folders of associations in the inbox"),
        (kept == sent, lambda: f"{kept} instances in the spool, and {sent} were acknowledged"),
    ]
    return [text() for holds, text in checks if not holds]


def wrong_jobs(jobs: Sequence[Job], sent: Sequence[str]) -> list[str]:
    """Every series that has not exactly one job, ended as the rule says and with all of its slices; in sentences."""
    counts = Counter(job.info.series_uid for job in jobs)
    faults = [f"series {uid}: {counts[uid]} jobs" for uid in sent if counts[uid] != 1]
    faults += [f"series {uid}: it has a job and was not sent whole" for uid in counts.keys() - set(sent)]
    for job in jobs:
        state, code = ENDED
        if (job.state, job.reason_code, job.instances) != (state, code, SLICES):
            found = f"{job.state.value} {job.reason_code!r} with {job.instances} instances"
            faults.append(f"job {job.id}: {found}, not {state.value} {code!r} with {SLICES}")
    return faults


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
