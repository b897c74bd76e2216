"""A real Orthanc on loopback for tests: started, asked over REST, stopped.

Shipped and reviewed like product code. `running_orthanc` ends only the process that it started.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

import pytest
from fake_pacs import free_port

START_TIMEOUT_S = 180.0
DICOMWEB_PLUGINS = (  # Debian's orthanc-dicomweb
    Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so"),
    Path("/usr/lib/orthanc/libOrthancDicomWeb.so"),
)


def orthanc_binary() -> str:
    """The path of Orthanc; skips the test where it is not installed."""
    found = shutil.which("Orthanc") or shutil.which("orthanc")
    if found is None:
        pytest.skip("Orthanc is not installed (Debian: apt-get install orthanc)")
    return found


def dicomweb_plugin() -> Path:
    """Orthanc's DICOMweb plug-in; skips the test where it is not installed."""
    for path in DICOMWEB_PLUGINS:
        if path.is_file():
            return path
    pytest.skip("Orthanc's DICOMweb plug-in is not installed (Debian: apt-get install orthanc-dicomweb)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Orthanc:
    """A running Orthanc. Everything goes over its REST interface."""

    ae_title: str
    dicom_port: int
    http_port: int
    login: tuple[str, str] | None = None  # user name and password of its HTTP side

    def _request(self, path: str, **changes: Any) -> Request:
        request = Request(f"http://127.0.0.1:{self.http_port}{path}", **changes)
        if self.login:
            request.add_header("Authorization", f"Basic {b64encode(':'.join(self.login).encode()).decode()}")
        return request

    def get(self, path: str) -> Any:
        with urlopen(self._request(path), timeout=120) as answer:
            body = answer.read()
        return json.loads(body) if answer.headers["Content-Type"].startswith("application/json") else body

    def post(self, path: str, body: Any) -> Any:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        with urlopen(self._request(path, data=data, method="POST"), timeout=120) as answer:
            return json.loads(answer.read() or b"null")

    def series(self, modality: str) -> list[Mapping[str, Any]]:
        """The series of this modality, as `/series/{id}` shows them."""
        query = {"Level": "Series", "Query": {"Modality": modality}, "Expand": True}
        found: list[Mapping[str, Any]] = self.post("/tools/find", query)
        return found

    def instances(self, series: Mapping[str, Any], folder: Path) -> list[Path]:
        """Write the files of a series into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = []
        for number, instance in enumerate(sorted(series["Instances"])):
            path = folder / f"{number:04d}.dcm"
            path.write_bytes(self.get(f"/instances/{instance}/file"))
            paths.append(path)
        return paths


@contextmanager
def running_orthanc(
    folder: Path,
    *,
    modalities: Mapping[str, tuple[str, int]],
    lua_scripts: Sequence[Path] = (),
    dicomweb: bool = False,
    login: tuple[str, str] | None = None,
) -> Iterator[Orthanc]:
    """Orthanc with its database in `folder`; `modalities` are symbolic name to (AE title, loopback port).

    With `dicomweb` its DICOMweb service is at `/dicom-web/` of the HTTP port; `login` is asked of every HTTP request.
    """
    folder.mkdir(parents=True, exist_ok=True)
    made = Orthanc(ae_title="ORTHANC", dicom_port=free_port(), http_port=free_port(), login=login)
    settings = {
        "Name": "test",
        "StorageDirectory": str(folder / "storage"),
        "IndexDirectory": str(folder / "index"),
        "DicomAet": made.ae_title,
        "DicomPort": made.dicom_port,
        "HttpPort": made.http_port,
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": login is not None,
        "RegisteredUsers": dict([login]) if login else {},
        "Plugins": [str(dicomweb_plugin())] if dicomweb else [],
        "DicomWeb": {"Enable": dicomweb, "Root": "/dicom-web/"},
        "LuaScripts": [str(path) for path in lua_scripts],
        "DicomModalities": {name: [ae, "127.0.0.1", port] for name, (ae, port) in modalities.items()},
        "DicomAlwaysAllowStore": True,
        "SyncStorageArea": False,  # a test's archive need not outlive the machine
        "StableAge": 2,
        "JobsHistorySize": 100,
    }
    path = folder / "orthanc.json"
    path.write_text(json.dumps(settings), encoding="utf-8")
    with (folder / "orthanc.log").open("wb") as log:
        process = subprocess.Popen([orthanc_binary(), str(path)], stdout=log, stderr=log)
        try:
            _wait(made, process)
            yield made
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(orthanc: Orthanc, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < until:
        if process.poll() is not None:
            raise RuntimeError(f"Orthanc ended at once with {process.returncode}: see orthanc.log")
        try:
            orthanc.get("/system")
        except (URLError, ConnectionError, TimeoutError):
            time.sleep(0.2)
        else:
            return
    raise RuntimeError("Orthanc did not answer")
