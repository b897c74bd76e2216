"""A real Orthanc routes a CT study to the node and shows the PET series, sent by C-STORE and STOW-RS, in the study."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from fake_pacs import free_port
from orthanc import Orthanc, running_orthanc

from dicom_node.config import load_config
from dicom_node.node import Node
from pipeline.types import Grid
from training.phantom import PhantomSpec, make_phantom
from training.phantom.dicom import write_ct_series

ROOT = Path(__file__).parent.parent
ROUTE = ROOT / "deploy" / "orthanc" / "autoroute.lua"
JOB_TIMEOUT_S = 400

pytestmark = [pytest.mark.orthanc, pytest.mark.dcmtk, pytest.mark.slow]


def write_config(folder: Path, node_port: int, orthanc: Orthanc) -> Path:
    path = folder / "config.toml"
    path.write_text(
        f"""
[node]
host = "127.0.0.1"
port = {node_port}
[[peers]]
name = "pacs"
ae_title = "{orthanc.ae_title}"
port = {orthanc.dicom_port}
[intake]
quiet_period_s = 1.0
study_quiet_period_s = 2.0
min_free_bytes = 1
[selection]
min_slices = 10
[pipeline]
device = "cpu"
[[destinations]]
name = "as-secondary-capture"
peer = "pacs"
encoding = "sc"
[[destinations]]
name = "as-pet"
url = "http://127.0.0.1:{orthanc.http_port}/dicom-web"
encoding = "pet"
send_mip = false
[log]
level = "warning"
""",
        encoding="utf-8",
    )
    return path


def wait_for_pet(orthanc: Orthanc, instances: int) -> None:
    until = time.monotonic() + JOB_TIMEOUT_S
    while time.monotonic() < until:
        found = orthanc.series("PT")
        if [len(one["Instances"]) for one in found] == [instances, instances] and orthanc.series("OT"):
            return
        time.sleep(0.5)
    raise AssertionError(f"Orthanc shows {[len(one['Instances']) for one in orthanc.series('PT')]}")


def test_orthanc_routes_a_ct_and_shows_the_pet_in_the_same_study(tmp_path: Path) -> None:
    dcmsend = shutil.which("dcmsend") or pytest.skip("DCMTK is not installed")
    phantom = make_phantom(PhantomSpec(seed=7, pose="sides", coverage=(0.45, 1.0), spacing_mm=(5.0, 4.0, 4.0)))
    paths = write_ct_series(phantom, tmp_path / "ct", matrix=128)
    node_port = free_port()
    with running_orthanc(
        tmp_path / "orthanc", modalities={"synpet": ("SYNPET", node_port)}, lua_scripts=[ROUTE], dicomweb=True
    ) as orthanc:
        node = Node(load_config(write_config(tmp_path, node_port, orthanc)))
        node.start()
        try:
            sent = subprocess.run(
                [dcmsend, "127.0.0.1", str(orthanc.dicom_port), "+sd", str(tmp_path / "ct"), "-aec", "ORTHANC"],
                capture_output=True,
                text=True,
                check=False,
            )
            assert sent.returncode == 0, sent.stdout + sent.stderr
            expected = round(len(paths) * 5.0 / 4.0)  # the bundle's 4 mm over the CT's extent
            wait_for_pet(orthanc, expected)
        finally:
            node.stop()
        (ct,), pets, (mip,) = (orthanc.series(modality) for modality in ("CT", "PT", "OT"))
        assert {one["ParentStudy"] for one in (ct, *pets, mip)} == {ct["ParentStudy"]}
        assert all(pet["MainDicomTags"]["SeriesDescription"].startswith("SYNTHETIC") for pet in pets)
        for number, pet in enumerate(pets):
            orthanc.instances(pet, tmp_path / f"pet{number}")
    images = [read_series(tmp_path / f"pet{number}") for number in range(2)]
    one, other = (sitk.GetArrayFromImage(image) for image in images)
    assert np.array_equal(one, other)  # two encodings of the same pixels
    for image in images:
        check_geometry(image, phantom.grid)
    assert 2.0 < one.max() <= 20.01
    assert one.min() == 0.0
    head = one[-40:]  # the brain is the hottest large organ of an FDG PET
    assert np.percentile(head[head > 0.1], 90) > 3.0


def check_geometry(image: sitk.Image, ct: Grid) -> None:
    """The PET has the bundle's spacing and the CT's centre."""
    assert image.GetSpacing() == pytest.approx((4.0, 4.0, 4.0), abs=0.01)
    spacing_xyz = np.array(ct.spacing_mm[::-1])
    centre_ct = np.array(ct.origin_mm) + (np.array(ct.shape[::-1]) - 1) / 2 * spacing_xyz
    centre_pet = np.array(image.TransformContinuousIndexToPhysicalPoint([(n - 1) / 2 for n in image.GetSize()]))
    assert centre_pet == pytest.approx(centre_ct, abs=0.01)


def read_series(folder: Path) -> sitk.Image:
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    return reader.Execute()
