"""kill -9 of a running node at random instants, and then the count.

    python benchmarks/kill.py [--rounds 50] [--seed 1]      # some 10 minutes
    python benchmarks/kill.py --power-cut [--rounds 50]     # as root, on Linux: the power of its disk is cut, too
    python benchmarks/kill.py --every-call [--power]        # the node's parts killed at each of some 150 system calls

Each round a PACS sends one more CT series and sends again what was not acknowledged; meanwhile the whole node
(receiver processes, assembler, engine, delivery) is killed after a random time and started again. At the end every
series has exactly one DONE job with all its instances, and the PACS has every result once: one content under each
UID, one PET series and one picture for each CT. With `--power` each kill is a power cut at its worst: what was not
synced is gone (tests/crash_at.py).

With `--power-cut` spool and ledger lie on an ext4 of their own in a file, which the kernel shuts down without writing
anything more (EXT4_IOC_SHUTDOWN) before the node is killed; mounted again, it has what its journal has. `--no-sync`
is the control: without syncing, instances that were acknowledged are lost.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import random
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import node_process  # noqa: E402
from fake_pacs import FakePacs  # noqa: E402
from node_process import NodeProcess, write_ct  # noqa: E402
from tiny_bundle import write_tiny_bundle  # noqa: E402

from dicom_node.net.scu import is_stored, send_series  # noqa: E402
from storage.records import FINAL_JOB_STATES, Job, JobFilter, JobState  # noqa: E402

LONGEST_LIFE_S = 6.0
END_S = 900.0
EXT4_IOC_SHUTDOWN, WITHOUT_THE_LOG = 0x8004587D, 2  # linux/fs/ext4/ext4.h
DISK_BYTES = 2 << 30  # sparse
UNMOUNT_S = 60.0


def main() -> None:
    """Print one line a round, and the count as JSON; exit code 1 when something is wrong."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=50)
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--power-cut", action="store_true")
    options.add_argument("--no-sync", action="store_true")
    options.add_argument("--every-call", action="store_true")
    options.add_argument("--power", action="store_true")
    chosen = options.parse_args()
    if chosen.power and not chosen.every_call:
        options.error("--power goes with --every-call")
    if chosen.power_cut and chosen.every_call:
        options.error("--power-cut goes without --every-call, --power goes with it")
    if chosen.no_sync and not chosen.power_cut:
        options.error("--no-sync goes with --power-cut")
    with tempfile.TemporaryDirectory() as folder:
        if chosen.every_call:
            found = kill_at_every_call(Path(folder), power=chosen.power)
        else:
            disk = own_disk(Path(folder)) if chosen.power_cut else nullcontext()
            with disk as power:
                dice = random.Random(chosen.seed)
                found = kill_at_random(Path(folder), chosen.rounds, dice, power, sync=not chosen.no_sync)
    print(json.dumps(found))
    sys.exit(1 if found["wrong"] else 0)


class Power:
    """Of an ext4 in a file, mounted at `at`."""

    def __init__(self, image: Path, at: Path) -> None:
        self._image, self._at = image, at
        with image.open("wb") as file:
            file.truncate(DISK_BYTES)
        subprocess.run(["mkfs.ext4", "-q", image], check=True)
        at.mkdir()
        self.on()

    def on(self) -> None:
        subprocess.run(["mount", "-o", "loop", self._image, self._at], check=True)

    def cut(self) -> None:
        """Nothing more reaches the disk: neither what is in the cache nor the journal's open transaction."""
        handle = os.open(self._at, os.O_RDONLY)
        try:
            fcntl.ioctl(handle, EXT4_IOC_SHUTDOWN, struct.pack("I", WITHOUT_THE_LOG))
        finally:
            os.close(handle)

    def off(self) -> None:
        """Unmount, as soon as the last process that had a file open is gone."""
        until = time.monotonic() + UNMOUNT_S
        while subprocess.run(["umount", self._at], capture_output=True).returncode:
            if time.monotonic() > until:
                raise SystemExit(f"{self._at} is still in use")
            time.sleep(0.1)


@contextmanager
def own_disk(folder: Path) -> Iterator[Power]:
    """Where the node keeps spool and ledger."""
    power = Power(folder / "disk.ext4", folder / "spool")
    try:
        yield power
    finally:
        power.off()


def kill_at_random(
    folder: Path, rounds: int, dice: random.Random, power: Power | None = None, *, sync: bool = True
) -> dict[str, object]:
    """Kill the node once in each round; what is wrong at the end."""
    bundle = write_tiny_bundle(folder / "bundle")
    node_process.UNTIL_S = END_S  # a busy machine starts a node in minutes
    senders, series = [], []
    struck: Counter[str] = Counter()
    with FakePacs(delay_s=0.02, max_associations=20) as pacs, NodeProcess(folder, pacs, bundle) as node:
        text = node.config.read_text().replace("max_attempts = 5", "max_attempts = 20")  # the kills are ours
        # a series of which all was acknowledged, and whose association was cut off, waits so long for more
        intake = f"[intake]\nincomplete_after_s = 15.0\nsync = {str(sync).lower()}"
        node.config.write_text(text.replace("[intake]", intake))
        node.start()
        for number in range(1, rounds + 1):
            series.append(write_ct(folder / f"ct{number}"))
            sender = threading.Thread(target=send_until_stored, args=(node, series[-1]), daemon=True)
            sender.start()
            senders.append(sender)
            life_s = dice.uniform(0.0, LONGEST_LIFE_S)
            time.sleep(life_s)
            if power is not None:
                power.cut()
            node.kill()
            if power is not None:
                power.off()
                power.on()
            struck.update(job.state.value for job in node.jobs() if job.state not in FINAL_JOB_STATES)
            node.start()
            print(f"round {number}: killed after {life_s:.1f} s", flush=True)
        for sender in senders:
            sender.join(END_S)
        jobs = wait_for_the_end(node, rounds)
        wrong = faults(jobs, [len(files) for files in series], pacs)
    return {"rounds": rounds, "jobs": len(jobs), "unfinished when killed": dict(struck), "wrong": wrong}


def send_until_stored(node: NodeProcess, files: list[Path]) -> None:
    """A PACS that keeps its queue: what was not acknowledged is sent again."""
    left: set[str] | None = None
    while left is None or left:
        outcome = send_series(files, node.peer, calling_ae="PACS", only=left)
        missing = {uid for uid, status in outcome.statuses.items() if not is_stored(status)}
        left = missing if left is None else left & missing
        time.sleep(0.2)


def wait_for_the_end(node: NodeProcess, series: int) -> list[Job]:
    """Until every series has a job that has ended."""
    deadline = time.monotonic() + END_S
    while True:
        ledger = node.ledger()
        jobs = ledger.find(JobFilter(limit=10_000))
        ledger.close()
        ended = all(job.state in FINAL_JOB_STATES for job in jobs)
        if (ended and len({job.info.series_uid for job in jobs}) == series) or time.monotonic() > deadline:
            return jobs
        time.sleep(0.5)


def faults(jobs: list[Job], sizes: list[int], pacs: FakePacs) -> list[str]:
    """A sentence for each thing that is not as it must be."""
    wrong = []
    earlier = succeeded(jobs)
    last = [job for job in jobs if job.state is JobState.DONE and job.id not in earlier]
    results = Counter(job.info.series_uid for job in last)
    if len(results) != len(sizes) or set(results.values()) - {1}:
        wrong.append(f"{len(sizes)} series became {sorted(results.values())} results")
    wrong += [f"job {job.id} has {job.instances} of {sizes[0]} instances" for job in last if job.instances != sizes[0]]
    others = Counter((job.state.value, job.reason_code) for job in jobs if job.state is not JobState.DONE)
    wrong += [f"{n} jobs are {what}" for what, n in others.items() if what[1] not in ("duplicate_series", "superseded")]
    wrong += [f"two contents under {uid}" for uid, contents in pacs.received.digests.items() if len(contents) > 1]
    expected = 2 * sum(job.state is JobState.DONE for job in jobs)  # the PET series and the picture of each
    if len(pacs.received.series) != expected:
        wrong.append(f"the PACS has {len(pacs.received.series)} series, {expected} were to be delivered")
    return wrong


def succeeded(jobs: list[Job]) -> set[str]:
    """The jobs that another one, with late slices, takes the place of."""
    return {job.supersedes for job in jobs if job.supersedes}


def kill_at_every_call(folder: Path, *, power: bool) -> dict[str, object]:
    """tests/crash_at.py for every call."""
    import numpy as np
    from ct_factory import write_ct as write_slices
    from pydicom import dcmread

    ct, lives = folder / "ct", folder / "lives"
    lives.mkdir()
    for path in write_slices(ct, np.zeros((4, 8, 8), dtype=np.int16), spacing_mm=(2.0, 2.0, 2.0)):
        path.rename(ct / f"{dcmread(path).SOPInstanceUID}.dcm")
    command = [
        sys.executable,
        str(ROOT / "tests" / "crash_at.py"),
        str(lives),
        str(ct),
        *(["--power"] if power else []),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={"PYTHONPATH": str(ROOT)})
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
