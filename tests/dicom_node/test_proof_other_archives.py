"""Archives that show what they have, each in its own way: pynetdicom's qrscp (the demo's) and DCMTK's dcmqrscp."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from fake_pacs import free_port
from pydicom import dcmread
from result_factory import write_instances

from dicom_node.cli.demo_pacs import running_pacs
from dicom_node.config import PeerConfig
from dicom_node.net.query import CountOutcome, count_series_instances
from dicom_node.net.scu import send_series

COUNT = 5
DCMQRSCP = """
NetworkTCPPort = {port}
MaxPDUSize = 16384
MaxAssociations = 8
HostTable BEGIN
HostTable END
VendorTable BEGIN
VendorTable END
AETable BEGIN
DCMQRSCP {folder} RW (200, 1024mb) ANY
AETable END
"""


@contextmanager
def dcmqrscp(folder: Path) -> Iterator[PeerConfig]:
    """DCMTK's archive with its files in `folder`."""
    program = shutil.which("dcmqrscp") or pytest.skip("DCMTK is not installed")
    port = free_port()
    (folder / "files").mkdir(parents=True)
    settings = folder / "dcmqrscp.cfg"
    settings.write_text(DCMQRSCP.format(port=port, folder=folder / "files"), encoding="utf-8")
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([program, "-c", str(settings)], stdout=log, stderr=log)
        try:
            for _ in range(600):
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.1)
            yield PeerConfig(name="dcmtk", ae_title="DCMQRSCP", port=port)
        finally:
            process.terminate()
            process.wait(20)


@contextmanager
def qrscp(folder: Path) -> Iterator[PeerConfig]:
    """The demo's archive."""
    with running_pacs(folder, ae_title="QRSCP", port=free_port(), routes={}) as pacs:
        yield PeerConfig(name="demo", ae_title=pacs.ae_title, port=pacs.port)


def count(peer: PeerConfig, study_uid: str, series_uid: str) -> CountOutcome:
    return count_series_instances(peer, study_uid, series_uid, calling_ae="SYNPET")


@pytest.mark.parametrize("archive", [pytest.param(dcmqrscp, marks=pytest.mark.dcmtk), qrscp])
def test_the_archive_shows_exactly_what_it_was_sent(archive, tmp_path: Path) -> None:
    files = write_instances(tmp_path / "result", COUNT)
    head = dcmread(files[0])
    study_uid, series_uid = str(head.StudyInstanceUID), str(head.SeriesInstanceUID)
    with archive(tmp_path / "archive") as peer:
        assert count(peer, study_uid, series_uid).count == 0
        assert send_series(files[:-1], peer, calling_ae="SYNPET").ok
        assert count(peer, study_uid, series_uid).count == COUNT - 1
        assert send_series(files[-1:], peer, calling_ae="SYNPET").ok
        found = count(peer, study_uid, series_uid)
        assert (found.ok, found.count) == (True, COUNT)
