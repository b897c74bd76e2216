"""Deliveries to a destination that is a DICOMweb service: from the outbox to VISIBLE."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from delivery_desk import COUNT, SC, Desk, config_for
from fake_pacs import FakePacs
from fake_web import Answer, FakeWeb, Posted, store_everything, stored
from orthanc import running_orthanc
from result_factory import sop_uids

from dicom_node.config import Config, DestinationConfig, StorageConfig, WebConfig
from dicom_node.net.scu import SendOutcome
from dicom_node.settle import settle
from storage.records import Delivery, DeliveryState, JobState


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    made = Desk(tmp_path / "spool")
    yield made
    made.close()


def web_config(root: Path, service: WebConfig, **changes: Any) -> Config:
    """One destination called web; quick retries."""
    keys = {"name": "web", "first_retry_s": 0.05, "max_retry_s": 0.1, **service.model_dump(), **changes}
    return Config(storage=StorageConfig(root=root), destinations=(DestinationConfig(**keys),))


def shows(count: int) -> Any:
    """A search that finds any series with so many instances."""

    def found(path: str, query: Any) -> list[dict[str, Any]]:
        uid = query["SeriesInstanceUID"][0]
        return [{"0020000E": {"vr": "UI", "Value": [uid]}, "00201209": {"vr": "IS", "Value": [count]}}]

    return found


@pytest.mark.orthanc
def test_orthanc_gets_a_result_by_stow_and_again_and_has_it_once(desk: Desk, tmp_path: Path) -> None:
    login = ("node", "secret")
    secret = tmp_path / "password"
    secret.write_text(login[1], encoding="utf-8")
    with running_orthanc(tmp_path / "orthanc", modalities={}, dicomweb=True, login=login) as orthanc:
        url = f"http://127.0.0.1:{orthanc.http_port}/dicom-web"
        service = WebConfig(url=url, username=login[0], password_file=secret)
        config = web_config(desk.root, service, batch_bytes=1_000_000)
        desk.finish_job(config)
        desk.deliver(config)
        for _ in range(2):
            desk.until(lambda: desk.state is JobState.DONE)
            assert (desk.delivery().state, desk.delivery().sent) == (DeliveryState.VISIBLE, COUNT)
            (series,) = orthanc.series("PT")
            held = {path.read_bytes() for path in orthanc.instances(series, tmp_path / "held")}
            assert held == {path.read_bytes() for path in desk.files["pet"]}
            desk.ledger.redeliver(desk.job_id)
        desk.until(lambda: desk.state is JobState.DONE)


def test_a_service_that_is_down_gets_the_missing_instances_when_it_is_back(desk: Desk) -> None:
    uids: list[str] = []

    def half(posted: Posted) -> Answer:
        if posted.number == 2:
            return Answer(status=503, headers={"Retry-After": "0"})
        failed = dict.fromkeys(uids[1::2], 0xA700) if posted.number == 1 else {}
        return stored(posted.uids, status=202, failed=failed)

    with FakeWeb(half, found=shows(COUNT)) as web:
        config = web_config(desk.root, web.service())
        desk.finish_job(config)
        uids += sop_uids(desk.files["pet"])
        desk.deliver(config)
        desk.until(lambda: desk.state is JobState.DONE)
    assert [posted.uids for posted in web.posts] == [uids, uids[1::2], uids[1::2]]
    assert (desk.delivery().state, desk.delivery().attempts) == (DeliveryState.VISIBLE, 3)


def test_what_only_an_operator_can_mend_fails_at_once_with_its_name(desk: Desk) -> None:
    with FakeWeb(lambda _: Answer(status=401)) as web:
        config = web_config(desk.root, web.service())
        desk.finish_job(config)
        desk.deliver(config)
        desk.until(lambda: desk.state is JobState.FAILED)
    assert (desk.delivery().attempts, desk.delivery().reason_code) == (1, "unauthorized")
    assert "does not accept our credentials" in desk.delivery().reason


def test_a_service_that_shows_too_few_is_not_believed(desk: Desk) -> None:
    with FakeWeb(found=shows(COUNT - 1)) as web:
        config = web_config(desk.root, web.service(), max_attempts=2)
        desk.finish_job(config)
        desk.deliver(config)
        desk.until(lambda: desk.state is JobState.FAILED)
    assert desk.delivery().reason_code == "not_visible"
    assert "3 of 4 instances" in desk.delivery().reason


def test_an_optional_object_whose_class_is_refused_is_skipped(desk: Desk) -> None:
    def no_seg(posted: Posted) -> Answer:
        refused = dict.fromkeys(posted.uids, 0x0122) if posted.number > 1 else {}
        return stored(posted.uids, status=409 if refused else 200, failed=refused)

    with FakeWeb(no_seg, found=shows(COUNT)) as web:
        config = web_config(desk.root, web.service())
        desk.finish_job(config, {"pet": SC, "seg": SC})
        desk.deliver(config)
        desk.until(lambda: desk.state is JobState.DONE)
    assert [d.state for d in desk.ledger.deliveries(desk.job_id)] == [DeliveryState.VISIBLE, DeliveryState.CANCELLED]
    assert desk.delivery(1).reason_code == "optional_refused"


def test_a_peer_and_a_service_get_the_same_result(desk: Desk) -> None:
    with FakePacs() as pacs, FakeWeb(store_everything, found=shows(COUNT)) as web:
        by_peer, by_web = config_for(desk.root, pacs), web_config(desk.root, web.service())
        config = by_peer.model_copy(update={"destinations": by_peer.destinations + by_web.destinations})
        desk.finish_job(config)
        desk.deliver(config)
        desk.until(lambda: desk.state is JobState.DONE)
    assert pacs.instances == web.stored == set(sop_uids(desk.files["pet"]))


@pytest.mark.parametrize(("after_s", "pause_s"), [(None, 10.0), (5.0, 10.0), (60.0, 60.0), (7200.0, 900.0)])
def test_the_time_that_a_busy_service_names_is_kept_within_ours(after_s: float | None, pause_s: float) -> None:
    destination = DestinationConfig(name="web", url="https://a", first_retry_s=10, max_retry_s=900)
    delivery = Delivery(
        id=1,
        job_id="ab",
        destination="web",
        kind="pet",
        encoding="sc",
        series_uid="1.2",
        instances=10,
        state=DeliveryState.SENDING,
        attempts=1,
        next_attempt=None,
    )
    verdict = settle(delivery, SendOutcome(code="service_busy", retry_after_s=after_s), 0, destination)
    assert (verdict.state, verdict.retry_in_s) == (DeliveryState.PENDING, pause_s)
