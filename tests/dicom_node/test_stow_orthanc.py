"""STOW-RS and QIDO-RS against a real Orthanc with its DICOMweb plug-in, which asks for a login."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from orthanc import Orthanc, running_orthanc
from pydicom import dcmread
from result_factory import sop_uids, write_instances

from dicom_node.config import WebConfig
from dicom_node.net.qido import check_service, count_series_instances
from dicom_node.net.stow import send_series_web

pytestmark = pytest.mark.orthanc

LOGIN = ("node", "pässword with spaces")
COUNT = 7


@pytest.fixture(scope="module")
def orthanc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orthanc]:
    with running_orthanc(tmp_path_factory.mktemp("orthanc"), modalities={}, dicomweb=True, login=LOGIN) as running:
        yield running


@pytest.fixture
def service(orthanc: Orthanc, tmp_path: Path) -> WebConfig:
    secret = tmp_path / "password"
    secret.write_text(LOGIN[1] + "\n", encoding="utf-8")
    url = f"http://127.0.0.1:{orthanc.http_port}/dicom-web"
    return WebConfig(url=url, username=LOGIN[0], password_file=secret)


def uids_of(path: Path) -> tuple[str, str]:
    ds = dcmread(path, stop_before_pixels=True)
    return str(ds.StudyInstanceUID), str(ds.SeriesInstanceUID)


def shown(orthanc: Orthanc, series_uid: str) -> dict[str, bytes]:
    """What the archive holds of a series: SOP Instance UID to the bytes of the file."""
    query = {"Level": "Instance", "Query": {"SeriesInstanceUID": series_uid}, "Expand": True}
    found = orthanc.post("/tools/find", query)
    return {one["MainDicomTags"]["SOPInstanceUID"]: orthanc.get(f"/instances/{one['ID']}/file") for one in found}


def test_the_archive_has_the_bytes_of_the_files(orthanc: Orthanc, service: WebConfig, tmp_path: Path) -> None:
    files = write_instances(tmp_path / "pet", COUNT)
    outcome = send_series_web(files, service)
    assert (outcome.code, outcome.text) == ("", "")
    assert outcome.statuses == dict.fromkeys(sop_uids(files), "0x0000")
    assert shown(orthanc, uids_of(files[0])[1]) == {
        uid: path.read_bytes() for uid, path in zip(sop_uids(files), files, strict=True)
    }


def test_a_series_goes_in_batches_and_a_second_sending_changes_nothing(
    orthanc: Orthanc, service: WebConfig, tmp_path: Path
) -> None:
    files = write_instances(tmp_path / "pet", COUNT)
    in_threes = service.model_copy(update={"batch_bytes": 3 * files[0].stat().st_size})
    progress: list[int] = []
    for _ in range(2):
        outcome = send_series_web(files, in_threes, on_sent=progress.append)
        assert (outcome.ok, outcome.stored) == (True, COUNT)
    assert progress == [3, 6, 7] * 2
    assert len(shown(orthanc, uids_of(files[0])[1])) == COUNT


def test_only_what_is_missing_is_sent(orthanc: Orthanc, service: WebConfig, tmp_path: Path) -> None:
    files = write_instances(tmp_path / "pet", COUNT)
    wanted = set(sop_uids(files)[2:4])
    assert set(send_series_web(files, service, only=wanted).statuses) == wanted
    assert set(shown(orthanc, uids_of(files[0])[1])) == wanted


def test_the_instances_of_a_series_are_counted(service: WebConfig, tmp_path: Path) -> None:
    files = write_instances(tmp_path / "pet", COUNT)
    study_uid, series_uid = uids_of(files[0])
    assert count_series_instances(service, study_uid, series_uid).count == 0
    assert send_series_web(files[:4], service).ok
    counted = count_series_instances(service, study_uid, series_uid)
    assert (counted.ok, counted.count) == (True, 4)
    assert count_series_instances(service, study_uid, series_uid + ".1").count == 0


def test_a_wrong_password_stores_nothing_and_is_said_so(orthanc: Orthanc, service: WebConfig, tmp_path: Path) -> None:
    assert service.password_file is not None
    service.password_file.write_text("wrong", encoding="utf-8")
    files = write_instances(tmp_path / "pet", COUNT)
    outcome = send_series_web(files, service)
    assert (outcome.code, outcome.permanent, set(outcome.statuses.values())) == ("unauthorized", True, {"not_sent"})
    assert shown(orthanc, uids_of(files[0])[1]) == {}
    assert count_series_instances(service, *uids_of(files[0])).code == "unauthorized"
    failure = check_service(service)
    assert failure is not None
    assert failure.text == f"{service.url} does not accept our credentials (HTTP 401)"


def test_an_address_without_the_service_is_said_so(service: WebConfig, tmp_path: Path) -> None:
    lost = service.model_copy(update={"url": service.url.removesuffix("/dicom-web") + "/wado"})
    outcome = send_series_web(write_instances(tmp_path / "pet", 1), lost)
    assert (outcome.code, outcome.permanent) == ("service_not_found", True)
    assert count_series_instances(lost, "1.2", "1.2.3").code == "not_offered"


def test_of_a_broken_file_and_a_good_one_the_good_one_is_stored(
    orthanc: Orthanc, service: WebConfig, tmp_path: Path
) -> None:
    files = write_instances(tmp_path / "pet", 2)
    good, broken = sop_uids(files)
    ds = dcmread(files[1])
    del ds.SOPInstanceUID  # Orthanc keeps no instance without it
    ds.save_as(files[1])
    outcome = send_series_web(files, service)
    assert (outcome.code, outcome.statuses) == ("instances_deferred", {good: "0x0000", broken: "no_response"})
    outcome = send_series_web(files, service, only={broken})
    assert (outcome.code, outcome.permanent) == ("request_refused", True)
    assert set(shown(orthanc, uids_of(files[0])[1])) == {good}


def test_the_check_asks_the_service(service: WebConfig) -> None:
    assert check_service(service) is None
