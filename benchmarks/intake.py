"""How fast a CT series comes in and a result goes out: our node beside DCMTK, Orthanc and pynetdicom, in the same run.

    python benchmarks/intake.py [--slices 600] [--rounds 3] [--senders 1 2 4] [--receivers 2] [--only ours storescp]
    python benchmarks/intake.py --sending [--slices 600] [--rounds 3]
    python benchmarks/intake.py --busy [--slices 600] [--rounds 5]

Receiving: `dcmsend` sends the same slices of 512x512 to each receiver in turn; with several senders each has its share
of them, all at once. Ours runs as in the node: receiver processes, durable before each Success. Sending: each sender
sends them to one `storescp +B`; its start-up, measured with one slice, is taken off. Busy: receiving with and without
the engine beside it, which does one job after the other on a phantom.

"The disk alone" writes the same files as durably, without a network: no durable receiver can be faster. "Bare loop" is
the least that Python can do (benchmarks/bare_loop.py). `--folder /dev/shm` measures without a disk.

Rounds are interleaved, so that a busy machine disturbs all alike: read the ratios. TCP_NODELAY is set everywhere.
Memory is what the receiver's processes have resident at most, sampled; pages that two share count twice. It takes
`dcmsend`, `storescu` and `storescp` (Debian: dcmtk); Orthanc is left out where it is not installed.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from urllib.request import Request, urlopen

import numpy as np
from pydicom import Dataset, dcmwrite
from pydicom.dataset import FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from dicom_node.config import Config, PeerConfig
from dicom_node.engine import EngineStopped
from dicom_node.engine.local import LocalEngine
from dicom_node.log import configure_logging
from dicom_node.net.associations import AssociationRegistry
from dicom_node.net.receivers import ReceiverPool
from dicom_node.net.scu import send_series
from dicom_node.net.sending import Way
from pipeline.types import PipelineOptions, Progress, Stage
from storage.durable import is_temp
from storage.incoming_file import IncomingFolder
from storage.ledger import open_ledger

DCMTK_PATH = "/usr/local/bin:/usr/bin:/bin"  # not a virtual environment's: pynetdicom installs a storescp, too
ENVIRONMENT = {**os.environ, "TCP_NODELAY": "1"}
MAX_PDU = 131072  # the most that DCMTK takes
READY_S, RUN_S = 60.0, 300.0
SAMPLE_S = 0.05
TICKS = os.sysconf("SC_CLK_TCK")
NODELAY = """
import runpy, socket, sys
from pynetdicom.transport import AssociationSocket
create = AssociationSocket._create_socket
def tuned(self, address):
    made = create(self, address)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return made
AssociationSocket._create_socket = tuned
sys.argv = ["storescu", *sys.argv[1:]]
from pynetdicom.apps.storescu.storescu import main
main()
"""


@dataclass
class Receiver:
    """One that is sent to: where it listens, its processes, how many images it holds, and how to empty it."""

    name: str
    ae_title: str
    port: int
    pids: Callable[[], Sequence[int]]
    held: Callable[[], int]
    empty: Callable[[], None]
    most_senders: int = 64


@dataclass
class Figures:
    """What the rounds of one receiver or sender gave."""

    per_second: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)
    resident_mb: list[float] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--senders", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--receivers", type=int, default=2, help="receiver processes of ours")
    parser.add_argument("--only", nargs="+", default=[], help="names from the table")
    parser.add_argument("--sending", action="store_true")
    parser.add_argument("--busy", action="store_true")
    parser.add_argument("--folder", type=Path, help="on the disk to be measured (default: where temporary files are)")
    asked = parser.parse_args()
    configure_logging(Config.model_validate({"log": {"level": "error"}}).log)
    with TemporaryDirectory(prefix="intake-", dir=asked.folder) as folder:
        files = write_series(Path(folder) / "ct", asked.slices)
        if asked.sending:
            compare_senders(Path(folder), files, asked.rounds, asked.only)
        elif asked.busy:
            compare_with_a_job(Path(folder), files, asked.rounds, asked.receivers)
        else:
            compare_receivers(Path(folder), files, asked.rounds, asked.senders, asked.receivers, asked.only)


def write_series(folder: Path, count: int) -> list[Path]:
    """A CT series of 512x512 whose pixels do not compress away."""
    folder.mkdir()
    ds, numbers = Dataset(), np.random.default_rng(7)
    ds.SOPClassUID, ds.Modality, ds.PatientName, ds.PatientID = CTImageStorage, "CT", "BENCHMARK^INTAKE", "BENCHMARK"
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = (generate_uid() for _ in range(3))
    ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PhotometricInterpretation = 512, 512, 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    ds.ImageOrientationPatient, ds.PixelSpacing, ds.SliceThickness = [1, 0, 0, 0, 1, 0], [0.8, 0.8], 1.0
    ds.RescaleSlope, ds.RescaleIntercept = 1, -1024
    paths = []
    for number in range(count):
        ds.SOPInstanceUID, ds.InstanceNumber = generate_uid(), number + 1
        ds.ImagePositionPatient = [-200.0, -200.0, float(number)]
        ds.PixelData = numbers.integers(0, 4096, (512, 512), dtype=np.uint16).tobytes()
        ds.file_meta = FileMetaDataset()
        ds.file_meta.MediaStorageSOPClassUID = CTImageStorage
        ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        paths.append(folder / f"{number:04d}.dcm")
        dcmwrite(paths[-1], ds, enforce_file_format=True)
    return paths


# ---- receiving


def compare_receivers(
    folder: Path, files: Sequence[Path], rounds: int, senders: Sequence[int], processes: int, only: Sequence[str]
) -> None:
    with ExitStack() as stack:
        makers = {
            "ours": lambda: our_node(folder / "ours", processes),
            "ours, no sync": lambda: our_node(folder / "unsynced", processes, sync=False),
            "ours, plain": lambda: our_node(folder / "plain", processes, reader="plain"),
            "bare loop": lambda: bare_loop(folder / "bare", sync=True),
            "bare loop, no sync": lambda: bare_loop(folder / "bare-unsynced", sync=False),
            "storescp": lambda: storescp(folder / "storescp"),
            "storescp --fork": lambda: storescp(folder / "fork", fork=True),
            "Orthanc": lambda: orthanc(folder / "orthanc"),
            "pynetdicom": lambda: pynetdicom_storescp(folder / "pynetdicom"),
        }
        made = [stack.enter_context(make()) for name, make in makers.items() if not only or name in only]
        receivers = [receiver for receiver in made if receiver is not None]
        for count in senders:
            shares = shared_out(folder / f"shares-{count}", files, count)
            figures = {r.name: Figures() for r in receivers if r.most_senders >= count and suits(r, count)}
            figures["the disk alone"] = Figures()
            for _ in range(rounds):
                for receiver in receivers:
                    if receiver.name in figures:
                        receive(receiver, shares, len(files), figures[receiver.name])
                write_alone(folder / "alone", files, count, figures["the disk alone"])
            beside = "storescp" if count == 1 else "storescp --fork"
            show(f"{len(files)} slices from {count} sender(s), median of {rounds} rounds", figures, beside)


def suits(receiver: Receiver, senders: int) -> bool:
    """`storescp` has a mode for one sender and one for several."""
    return receiver.name != "storescp --fork" or senders > 1


def receive(receiver: Receiver, shares: Sequence[Path], count: int, figures: Figures) -> None:
    """Send everything at once, and note what it took."""
    dcmsend = [dcmtk("dcmsend"), "-aet", "BENCHMARK"]
    cpu_before = cpu_seconds(receiver.pids())
    began, resident = time.perf_counter(), 0.0
    running = [
        subprocess.Popen(
            [*dcmsend, "-aec", receiver.ae_title, "127.0.0.1", str(receiver.port), "+sd", str(share)], env=ENVIRONMENT
        )
        for share in shares
    ]
    try:
        for process in running:
            while True:
                try:
                    process.wait(SAMPLE_S)
                    break
                except subprocess.TimeoutExpired:
                    resident = max(resident, resident_mb(receiver.pids()))
                    if time.perf_counter() - began > RUN_S:
                        raise SystemExit(f"{receiver.name} took longer than {RUN_S} s") from None
    finally:
        for process in running:
            process.kill()
            process.wait()
    seconds = time.perf_counter() - began
    if (held := receiver.held()) != count:
        raise SystemExit(f"{receiver.name} holds {held} of {count} images")
    figures.per_second.append(count / seconds)
    figures.cpu_ms.append((cpu_seconds(receiver.pids()) - cpu_before) / count * 1000)
    figures.resident_mb.append(max(resident, resident_mb(receiver.pids())))
    receiver.empty()
    os.sync()  # what one left in the cache is not written in the next one's time


def write_alone(folder: Path, files: Sequence[Path], threads: int, figures: Figures) -> None:
    """What the disk gives without a network: the same files, written and made durable as our node does."""

    def write(number: int) -> None:
        incoming = IncomingFolder(folder / str(number))
        for path in files[number::threads]:
            file = incoming.open(path.stem)
            file.write(path.read_bytes())
            file.commit()
        incoming.close()

    cpu_before, began = own_cpu_seconds(), time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(write, range(threads)))
    figures.per_second.append(len(files) / (time.perf_counter() - began))
    figures.cpu_ms.append((own_cpu_seconds() - cpu_before) / len(files) * 1000)
    shutil.rmtree(folder)
    os.sync()


@contextmanager
def our_node(folder: Path, processes: int, *, sync: bool = True, reader: str = "stream") -> Iterator[Receiver]:
    """The node's receiving side as it runs in the node."""
    config = Config.model_validate(
        {
            "node": {"ae_title": "SYNPET", "host": "127.0.0.1", "receiver_processes": processes},
            "peers": [{"name": "benchmark", "ae_title": "BENCHMARK"}],
            "intake": {"min_free_bytes": 0, "sync": sync, "reader": reader},
            "storage": {"root": str(folder)},
            "log": {"level": "error"},
        }
    )
    folder.mkdir()
    ledger = open_ledger(config.ledger_url)
    registry = AssociationRegistry(limit=config.node.max_associations, clock=time.monotonic)
    pool = ReceiverPool(config, ledger, registry)
    inbox = folder / "inbox"
    name = "ours" + ("" if sync else ", no sync") + (", plain" if reader == "plain" else "")
    try:
        port = pool.start(port=0)
        yield Receiver(name, "SYNPET", port, lambda: pool.pids, counted(inbox), emptied(inbox))
    finally:
        pool.stop()
        ledger.close()


@contextmanager
def bare_loop(folder: Path, *, sync: bool) -> Iterator[Receiver]:
    """What Python can do at all on this machine: no checks, and with `sync` one commit of the disk per image."""
    folder.mkdir()
    port = free_port()
    command = [sys.executable, str(Path(__file__).with_name("bare_loop.py")), str(port), str(folder)]
    with served([*command, *(["--sync"] if sync else [])], port) as pid:
        name = "bare loop" + ("" if sync else ", no sync")
        yield Receiver(name, "BARE", port, lambda: [pid], counted(folder), emptied(folder))


@contextmanager
def storescp(folder: Path, *, fork: bool = False) -> Iterator[Receiver | None]:
    """DCMTK's: bit preserving, so that it writes what it reads, too. It does not sync."""
    folder.mkdir()
    port = free_port()
    command = [dcmtk("storescp"), "+B", "-pdu", str(MAX_PDU), "-od", str(folder), "-aet", "STORESCP"]
    with served([*command, *(["--fork"] if fork else []), str(port)], port) as pid:
        most = 64 if fork else 1
        name = "storescp --fork" if fork else "storescp"
        yield Receiver(name, "STORESCP", port, lambda: [pid], counted(folder), emptied(folder), most)


@contextmanager
def pynetdicom_storescp(folder: Path) -> Iterator[Receiver]:
    """pynetdicom's application. It does not sync."""
    folder.mkdir()
    port = free_port()
    command = [sys.executable, "-m", "pynetdicom", "storescp", str(port), "-q", "-ba", "127.0.0.1"]
    with served([*command, "-od", str(folder), "--max-pdu", str(MAX_PDU)], port) as pid:
        yield Receiver("pynetdicom", "STORESCP", port, lambda: [pid], counted(folder), emptied(folder))


@contextmanager
def orthanc(folder: Path) -> Iterator[Receiver | None]:
    """A whole archive: it reads each data set and keeps an index. It syncs, as it does by default."""
    binary = shutil.which("Orthanc")
    if binary is None:
        print("Orthanc is not installed: left out")
        yield None
        return
    folder.mkdir()
    port, http = free_port(), free_port()
    settings = {
        "StorageDirectory": str(folder / "storage"),
        "IndexDirectory": str(folder / "index"),
        "DicomAet": "ORTHANC",
        "DicomPort": port,
        "HttpPort": http,
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": False,
        "DicomAlwaysAllowStore": True,
        "TcpNoDelay": True,
        "Plugins": [],
    }
    (folder / "orthanc.json").write_text(json.dumps(settings), encoding="utf-8")

    def ask(path: str, method: str = "GET") -> object:
        with urlopen(Request(f"http://127.0.0.1:{http}{path}", method=method), timeout=60) as answer:
            return json.loads(answer.read() or b"null")

    def empty() -> None:
        for study in ask("/studies"):  # type: ignore[attr-defined]
            ask(f"/studies/{study}", "DELETE")

    with served([binary, str(folder / "orthanc.json")], port) as pid:
        yield Receiver(
            "Orthanc",
            "ORTHANC",
            port,
            lambda: [pid],
            lambda: len(ask("/instances")),
            empty,  # type: ignore[arg-type]
        )


# ---- receiving while a job runs


def compare_with_a_job(folder: Path, files: Sequence[Path], rounds: int, processes: int) -> None:
    shares = shared_out(folder / "shares", files, 1)
    engine = LocalEngine(job_timeout_s=RUN_S)
    figures = {"ours": Figures(), "ours, a job runs": Figures()}
    phantom = get_context("spawn").Process(target=write_phantom, args=(folder / "phantom",))
    phantom.start()
    phantom.join()
    ct = sorted((folder / "phantom").iterdir())
    with our_node(folder / "ours", processes) as receiver:
        for _ in range(rounds):
            receive(receiver, shares, len(files), figures["ours"])
            with jobs(engine, ct, folder / "result"):
                receive(receiver, shares, len(files), figures["ours, a job runs"])
    show(f"{len(files)} slices from 1 sender, median of {rounds} rounds", figures, "ours")


def write_phantom(folder: Path) -> None:
    """In a process of its own: what it imports would count as the receivers' memory."""
    from training.phantom import PhantomSpec, make_phantom
    from training.phantom.dicom import write_ct_series

    write_ct_series(make_phantom(PhantomSpec()), folder)


@contextmanager
def jobs(engine: LocalEngine, ct: Sequence[Path], result: Path) -> Iterator[None]:
    """The engine does one job after the other, as in the node; ready means that the networks of one have begun."""
    over, computing = threading.Event(), threading.Event()

    def work() -> None:
        options = PipelineOptions(bundle="phantom", device="cpu")
        while not over.is_set():
            shutil.rmtree(result, ignore_errors=True)
            with suppress(EngineStopped):
                engine.run("busy", ct, options, result, datetime.now(UTC), on_progress=follow, should_stop=over.is_set)

    def follow(progress: Progress) -> None:
        if progress.stage is Stage.SYNTHESIS:
            computing.set()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        if not computing.wait(RUN_S):
            raise SystemExit("the job did not begin to compute")
        yield
    finally:
        over.set()
        thread.join()


# ---- sending


def compare_senders(folder: Path, files: Sequence[Path], rounds: int, only: Sequence[str]) -> None:
    (first,) = shared_out(folder / "first", files[:1], 1)
    (every,) = shared_out(folder / "every", files, 1)
    with storescp(folder / "storescp") as receiver:
        assert receiver is not None
        at = ["127.0.0.1", str(receiver.port)]
        called = ["-aec", receiver.ae_title]
        apps: dict[str, Callable[[Path], list[str]]] = {
            "dcmsend": lambda share: [dcmtk("dcmsend"), *called, *at, "+sd", str(share)],
            "storescu": lambda share: [dcmtk("storescu"), *called, "-R", *at, "+sd", str(share)],
            "pynetdicom": lambda share: [sys.executable, "-c", NODELAY, *called, "-q", "-cx", *at, str(share)],
        }
        peer = PeerConfig(name="storescp", ae_title=receiver.ae_title, port=receiver.port)
        ways: dict[str, Callable[[Path], None]] = {
            "ours": lambda share: send_ours(share, peer, "stream"),
            "ours, plain": lambda share: send_ours(share, peer, "plain"),
            **{name: lambda share, c=command: run(c(share)) for name, command in apps.items()},  # type: ignore[misc]
        }
        figures = {name: Figures() for name in ways if not only or name in only}
        for _ in range(rounds):
            for name in figures:
                seconds = {share: timed(ways[name], share) for share in (first, every)}
                if (held := receiver.held()) != len(files):
                    raise SystemExit(f"{name}: {held} of {len(files)} images arrived")
                receiver.empty()
                os.sync()
                wall, cpu = (last - begun for last, begun in zip(seconds[every], seconds[first], strict=True))
                figures[name].per_second.append((len(files) - 1) / wall)
                figures[name].cpu_ms.append(cpu / (len(files) - 1) * 1000)
    show(f"{len(files)} slices sent to storescp +B, median of {rounds} rounds", figures, "dcmsend")


def send_ours(share: Path, peer: PeerConfig, way: Way) -> None:
    outcome = send_series(sorted(share.iterdir()), peer, calling_ae="BENCHMARK", sender=way)
    if not outcome.ok:
        raise SystemExit(f"ours, {way}: {outcome.text}")


def timed(send: Callable[[Path], None], share: Path) -> tuple[float, float]:
    """Wall seconds and CPU seconds of this process and of the children that it waited for."""
    before, began = own_cpu_seconds(), time.perf_counter()
    send(share)
    return time.perf_counter() - began, own_cpu_seconds() - before


def own_cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


# ---- processes and folders


def run(command: Sequence[str]) -> None:
    subprocess.run(command, check=True, env=ENVIRONMENT, timeout=RUN_S)


def dcmtk(name: str) -> str:
    found = shutil.which(name, path=DCMTK_PATH)
    if found is None:
        raise SystemExit(f"{name} is not installed (Debian: apt-get install dcmtk)")
    return found


@contextmanager
def served(command: Sequence[str], port: int) -> Iterator[int]:
    """A server that runs until the end of the block, from when its port answers; its process id."""
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + READY_S
        while socket.socket().connect_ex(("127.0.0.1", port)):
            if process.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"{command[0]} does not listen")
            time.sleep(0.1)
        yield process.pid
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def shared_out(folder: Path, files: Sequence[Path], count: int) -> list[Path]:
    """`count` folders, each with its share of the files."""
    shares = [folder / str(number) for number in range(count)]
    for number, share in enumerate(shares):
        share.mkdir(parents=True)
        for path in files[number::count]:
            (share / path.name).hardlink_to(path)
    return shares


def cleared(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def counted(folder: Path) -> Callable[[], int]:
    return lambda: sum(path.is_file() and not is_temp(path) for path in folder.rglob("*"))


def emptied(folder: Path) -> Callable[[], None]:
    return lambda: cleared(folder)


def family(pids: Sequence[int]) -> set[int]:
    """These processes and their children that run."""
    found = set(pids)
    for pid in pids:
        try:
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
        except OSError:
            continue
        found |= family([int(child) for child in children])
    return found


def cpu_seconds(pids: Sequence[int]) -> float:
    """User and system time of the processes and of their children that ended."""
    total = 0
    for pid in pids:
        after_name = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        total += sum(int(ticks) for ticks in after_name[11:15])
    return total / TICKS


def resident_mb(pids: Sequence[int]) -> float:
    total = 0
    for pid in family(pids):
        try:
            pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
        except OSError:  # it ended
            continue
        total += pages * resource.getpagesize()
    return total / 1e6


def show(title: str, figures: dict[str, Figures], beside: str) -> None:
    """A table; `x` is how many times the rate of `beside`, the median of the rounds' ratios."""
    print(f"\n{title}\n{'':20} {'images/s':>9} {'x ' + beside:>18} {'CPU ms/image':>13} {'resident MB':>12}")
    for name, one in figures.items():
        reference = figures[beside].per_second if beside in figures else []
        ratios = [mine / theirs for mine, theirs in zip(one.per_second, reference, strict=False)]
        ratio = f"{median(ratios):.2f}" if ratios else "-"
        resident = f"{median(one.resident_mb):.0f}" if one.resident_mb else "-"
        print(f"{name:20} {median(one.per_second):9.0f} {ratio:>18} {median(one.cpu_ms):13.2f} {resident:>12}")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
