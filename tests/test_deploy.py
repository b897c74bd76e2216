"""The files of deploy/ fit the code: the unit, the image, the compose file, Orthanc's configuration, the runbook."""

from __future__ import annotations

import configparser
import importlib
import json
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import ModuleType

import pytest
from ct_factory import write_ct
from fake_pacs import free_port
from orthanc import running_orthanc

from dicom_node.config import load_config
from storage.records import JobState

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
UNIT = (DEPLOY / "dicom-node.service").read_text(encoding="utf-8")
RUNBOOK = (DEPLOY / "RUNBOOK.md").read_text(encoding="utf-8")
DOCKERFILE = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")


class Unit(configparser.RawConfigParser):
    """systemd's spelling: keys keep their case."""

    def optionxform(self, optionstr: str) -> str:
        return optionstr


def unit(section: str) -> dict[str, str]:
    parser = Unit(strict=False, interpolation=None, delimiters=("=",), comment_prefixes=("#",))
    parser.read_string(UNIT)
    return dict(parser[section])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("Type", "notify"),
        ("User", "dicom-node"),
        ("Restart", "on-failure"),
        ("WatchdogSec", "60"),
        ("KillMode", "mixed"),
        ("OOMPolicy", "continue"),
        ("StateDirectory", "dicom-node"),
        ("UMask", "0077"),
        ("NoNewPrivileges", "yes"),
        ("CapabilityBoundingSet", ""),
        ("ProtectSystem", "strict"),
        ("ProtectHome", "yes"),
        ("PrivateTmp", "yes"),
        ("DevicePolicy", "closed"),
        ("ProtectKernelTunables", "yes"),
        ("ProtectKernelModules", "yes"),
        ("ProtectControlGroups", "yes"),
        ("RestrictNamespaces", "yes"),
        ("RestrictSUIDSGID", "yes"),
        ("LockPersonality", "yes"),
        ("SystemCallFilter", "@system-service"),
    ],
)
def test_the_unit_is_hardened_and_watched(key: str, value: str) -> None:
    assert unit("Service")[key] == value


def test_the_unit_gives_the_node_longer_to_stop_than_it_takes() -> None:
    from dicom_node.node import DRAIN_S

    assert int(unit("Service")["TimeoutStopSec"]) >= 2 * DRAIN_S


def test_systemd_finds_no_fault_in_the_unit(tmp_path: Path) -> None:
    tool = shutil.which("systemd-analyze")
    if tool is None:
        pytest.skip("systemd-analyze is not installed")
    copy = tmp_path / "dicom-node.service"  # verify wants a program that exists
    copy.write_text(UNIT.replace("/opt/dicom-node/venv/bin/dicom-node", sys.executable), encoding="utf-8")
    found = subprocess.run([tool, "verify", "--man=no", str(copy)], capture_output=True, text=True, timeout=60)
    if "Failed to" in found.stderr and "manager" in found.stderr:
        pytest.skip(f"systemd-analyze cannot work here: {found.stderr.strip()}")
    assert (found.returncode, found.stdout + found.stderr) == (0, "")


def test_the_containers_configuration_loads_and_knows_orthanc() -> None:
    config = load_config(DEPLOY / "config.toml")
    assert config.storage.root == Path("/var/lib/dicom-node")
    orthanc = orthanc_json()
    assert orthanc["DicomModalities"]["synpet"] == [config.node.ae_title, "node", config.node.port]
    pacs = config.peer(config.destinations[0].peer)
    assert (pacs.ae_title, pacs.host, pacs.port) == (orthanc["DicomAet"], "orthanc", orthanc["DicomPort"])


def orthanc_json() -> dict:
    text = (DEPLOY / "orthanc" / "orthanc.json").read_text(encoding="utf-8")
    return json.loads(re.sub(r"^\s*//.*$", "", text, flags=re.MULTILINE))


def test_compose_joins_the_two_and_takes_what_a_container_does_not_need() -> None:
    text = (DEPLOY / "compose.yaml").read_text(encoding="utf-8")
    services = re.findall(r"^  (\w+):$", text.split("\nvolumes:")[0], flags=re.MULTILINE)
    assert services == ["orthanc", "node"]  # the names that config.toml and orthanc.json use
    for line in ("read_only: true", "cap_drop: [ALL]", '"no-new-privileges:true"'):
        assert line in text
    assert re.findall(r'"([\d.:]+)"', text.split("ports:")[1].split("volumes:")[0]) == [
        "127.0.0.1:8042:8042",
        "127.0.0.1:4242:4242",
    ]
    if (yaml := _yaml()) is not None:  # PyYAML is no dependency of ours
        assert set(yaml.safe_load(text)["services"]) == {"orthanc", "node"}
        assert "deploy" in yaml.safe_load((DEPLOY / "compose.gpu.yaml").read_text())["services"]["node"]


def _yaml() -> ModuleType | None:
    try:
        return importlib.import_module("yaml")
    except ImportError:
        return None


def test_the_files_that_compose_and_the_image_use_exist() -> None:
    compose = (DEPLOY / "compose.yaml").read_text(encoding="utf-8")
    for name in re.findall(r"- \./(\S+?):", compose):
        assert (DEPLOY / name).exists(), name
    for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, flags=re.MULTILINE):
        for name in line.split()[:-1]:
            assert (ROOT / name).exists(), name
            ignore = (DEPLOY / "Dockerfile.dockerignore").read_text(encoding="utf-8").split()
            assert f"!{name}" in ignore, f"{name} is not sent to the builder"


def test_the_image_runs_as_its_own_user_and_is_asked_by_c_echo() -> None:
    stages = DOCKERFILE.split("FROM ${BASE}")
    last = stages[-1]
    assert re.search(r"^USER dicom-node$", last, flags=re.MULTILINE)
    assert '"check", "--quick"' in last.split("HEALTHCHECK")[1]
    build = stages[1]
    assert build.index('"${TORCH}"') < build.index("pip install . ")  # torch first and alone


def test_every_command_of_the_runbook_exists() -> None:
    import typer

    from dicom_node.cli import app

    root = typer.main.get_command(app)
    called = re.findall(r"\bdn ((?:[a-z]+ ?)+)((?:--[a-z]+|\S)*)", RUNBOOK)
    assert called
    for words, _ in called:
        first, *rest = words.split()
        command = root.commands.get(first)
        assert command is not None, f"dicom-node {first}"
        if hasattr(command, "commands"):
            assert rest, f"dicom-node {first} alone"
            assert rest[0] in command.commands, f"dicom-node {words}"
    for option in re.findall(r"\bdn jobs list (--[a-z-]+)", RUNBOOK):
        assert any(option in parameter.opts for parameter in root.commands["jobs"].commands["list"].params)


def test_the_runbook_names_only_states_that_exist_and_its_links_lead_somewhere() -> None:
    for state in re.findall(r"--state ([A-Z]+)", RUNBOOK):
        assert state in JobState.__members__
    titles = {
        re.sub(r"[^a-z0-9 -]", "", line.lstrip("# ").lower()).replace(" ", "-")
        for line in RUNBOOK.splitlines()
        if line.startswith("#")
    }
    for anchor in re.findall(r"\]\(#([^)]+)\)", RUNBOOK):
        assert anchor in titles, anchor


@pytest.mark.orthanc
def test_orthanc_routes_a_stable_ct_series_once_and_nothing_else(tmp_path: Path) -> None:
    from pynetdicom import AE, evt
    from pynetdicom.sop_class import CTImageStorage, PositronEmissionTomographyImageStorage

    received: list[tuple[int, str]] = []
    whole = threading.Event()

    def on_store(event: evt.Event) -> int:
        received.append((id(event.assoc), event.request.AffectedSOPInstanceUID))
        if len(received) == 4:
            whole.set()
        return 0

    ae = AE(ae_title="SYNPET")
    ae.add_supported_context(CTImageStorage)
    ae.add_supported_context(PositronEmissionTomographyImageStorage)
    port = free_port()
    server = ae.start_server(("127.0.0.1", port), block=False, evt_handlers=[(evt.EVT_C_STORE, on_store)])
    try:
        import numpy as np

        air = np.full((4, 16, 16), -1000, np.int16)
        ct = write_ct(tmp_path / "ct", air, spacing_mm=(5, 5, 5))

        def as_pet(ds: object, _: int) -> None:
            ds.Modality = "PT"  # type: ignore[attr-defined]

        def as_ours(ds: object, _: int) -> None:
            ds.SeriesDescription = "SYNTHETIC FDG PET SUVbw"  # type: ignore[attr-defined]

        others = [
            *write_ct(tmp_path / "pet", air, spacing_mm=(5, 5, 5), modify=as_pet),
            *write_ct(tmp_path / "ours", air, spacing_mm=(5, 5, 5), modify=as_ours),
        ]
        routes = {"synpet": ("SYNPET", port)}
        script = DEPLOY / "orthanc" / "autoroute.lua"
        with running_orthanc(tmp_path / "orthanc", modalities=routes, lua_scripts=[script]) as pacs:
            for path in [*others, *ct]:
                pacs.post("/instances", path.read_bytes())
            assert whole.wait(120), (tmp_path / "orthanc" / "orthanc.log").read_text()[-2000:]
            until = time.monotonic() + 30
            while any(not series["IsStable"] for series in pacs.series("PT")) and time.monotonic() < until:
                time.sleep(0.2)
            time.sleep(0.5)
    finally:
        server.shutdown()
    assert len(received) == len({uid for _, uid in received}) == len(ct)  # the CT, each instance once
    assert len({assoc for assoc, _ in received}) == 1  # over one association
    assert "could not be queued" not in (tmp_path / "orthanc" / "orthanc.log").read_text(errors="replace")
