"""Orthanc keeps and shows the result: stored twice, over REST, over DICOMweb, rendered."""

from __future__ import annotations

import json
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
import pytest
from orthanc import Orthanc, running_orthanc
from PIL import Image
from pydicom import Dataset, dcmread
from reader_study import ENCODINGS, Written

from dicom_node.config import PeerConfig
from dicom_node.net.scu import send_series

pytestmark = [pytest.mark.orthanc]

RENDERED_MAX_SUV = 6.0  # the first window, 3 / 6, which Orthanc 1.10 takes for center +- width / 2
RENDERED_TOLERANCE = 1.03  # of 255: Orthanc cuts off the fraction, and the stored SUV is up to half a step away


@pytest.fixture(scope="module", params=ENCODINGS)
def archive(
    request: pytest.FixtureRequest, written: Written, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Orthanc, list[Path]]]:
    """An Orthanc that got every file of the PET series twice, and the files."""
    files = written.files(request.param)
    with running_orthanc(tmp_path_factory.mktemp("orthanc"), modalities={}, dicomweb=True) as orthanc:
        assert [store(orthanc, files), store(orthanc, files)] == [{"0x0000"}, {"0x0000"}]
        yield orthanc, files


def store(orthanc: Orthanc, files: list[Path]) -> set[str]:
    """C-STORE as the node does it; the statuses that came back."""
    peer = PeerConfig(name="archive", ae_title=orthanc.ae_title, port=orthanc.dicom_port)
    return set(send_series(files, peer, calling_ae="TEST").statuses.values())


def dicomweb(orthanc: Orthanc, path: str, accept: str) -> bytes:
    request = Request(f"http://127.0.0.1:{orthanc.http_port}/dicom-web{path}", headers={"Accept": accept})
    with urlopen(request, timeout=120) as answer:
        body: bytes = answer.read()
    return body


def test_a_series_stored_twice_is_there_once(archive: tuple[Orthanc, list[Path]]) -> None:
    orthanc, files = archive
    (series,) = orthanc.series("PT")
    assert len(series["Instances"]) == len(files)
    assert orthanc.get("/statistics")["CountInstances"] == len(files)


def test_it_gives_back_every_element(archive: tuple[Orthanc, list[Path]], tmp_path: Path) -> None:
    orthanc, files = archive
    (series,) = orthanc.series("PT")
    sent = {dcmread(path, stop_before_pixels=True).SOPInstanceUID: path for path in files}
    for path in orthanc.instances(series, tmp_path / "back"):
        ds = dcmread(path)
        ours = dcmread(sent[ds.SOPInstanceUID])
        assert ds == ours
        assert ds.file_meta.TransferSyntaxUID == ours.file_meta.TransferSyntaxUID


def test_rest_shows_what_an_administrator_looks_for(archive: tuple[Orthanc, list[Path]]) -> None:
    (series,) = archive[0].series("PT")
    tags = series["MainDicomTags"]
    assert tags["SeriesDescription"].startswith("SYNTHETIC")
    assert (tags["Modality"], tags["SeriesNumber"]) == ("PT", "9001")


def test_dicomweb_metadata_holds_every_instance_with_its_units(archive: tuple[Orthanc, list[Path]]) -> None:
    orthanc, files = archive
    first = dcmread(files[0], stop_before_pixels=True)
    path = f"/studies/{first.StudyInstanceUID}/series/{first.SeriesInstanceUID}/metadata"
    found: list[dict[str, Any]] = json.loads(dicomweb(orthanc, path, "application/dicom+json"))
    assert len(found) == len(files)
    read = sorted((Dataset.from_json(one, lambda *_: b"") for one in found), key=lambda ds: ds.InstanceNumber)
    assert {(ds.Units, ds.SUVType, float(ds.RescaleSlope)) for ds in read} == {("GML", "BW", float(first.RescaleSlope))}
    assert [ds.SyntheticData for ds in read] == ["YES"] * len(files)
    assert [ds.SOPInstanceUID for ds in read] == [
        dcmread(path, stop_before_pixels=True).SOPInstanceUID for path in files
    ]


def test_a_rendered_slice_maps_the_first_window_onto_the_gray_scale(
    archive: tuple[Orthanc, list[Path]], written: Written
) -> None:
    orthanc, files = archive
    suv = written.study.shown
    index = int(suv.max(axis=(1, 2)).argmax())
    (instance,) = orthanc.post("/tools/lookup", str(dcmread(files[index]).SOPInstanceUID).encode())
    picture = np.asarray(Image.open(BytesIO(orthanc.get(f"/instances/{instance['ID']}/rendered"))), dtype=float)
    expected = np.clip(suv[index] / RENDERED_MAX_SUV, 0, 1) * 255  # SUV 1.5 is 64
    assert np.abs(picture - expected).max() <= RENDERED_TOLERANCE
    assert {0, 255} <= set(picture.ravel())
