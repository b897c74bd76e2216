"""What a DICOMweb service shows: QIDO-RS (PS3.18 section 10.6), to count a series and to see whether it answers at all.

CountOutcome codes: "" (it was counted), not_offered (it has no search), interrupted, and those of `web.WebFailure`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from urllib.parse import urlsplit

import requests
from dicomweb_client import DICOMwebClient

from dicom_node.config import WebConfig
from dicom_node.net.query import CountOutcome
from dicom_node.net.web import WebFailure, first_value, not_dicomweb, uid_value, web_session

SOP_INSTANCE, SERIES_INSTANCE, SERIES_INSTANCES = "00080018", "0020000E", "00201209"
_NOT_FOUND = 404
_PAGE = 1000
_MOST = 100_000  # instances of one series that are counted one by one


def count_series_instances(
    service: WebConfig, study_uid: str, series_uid: str, *, should_stop: Callable[[], bool] = lambda: False
) -> CountOutcome:
    """How many instances of the series the service shows; 0 when it does not show the series.

    Number of Series Related Instances (0020,1209) is the answer; where a service leaves it out its instances are
    searched for, and each SOP Instance UID counts once. Status 404 says that there is no search, or no such study:
    a service that finds studies means the study. `should_stop` is asked before each page.
    """
    began = monotonic()
    try:
        with search_client(service) as client:
            count = _told(client, study_uid, series_uid)
            if count is None:
                count = _counted(client, study_uid, series_uid, should_stop)
    except WebFailure as error:
        failure = check_service(service) if error.status == _NOT_FOUND else error
        seconds = monotonic() - began
        if failure is None:
            return CountOutcome(count=0, seconds=seconds)
        code = "not_offered" if failure.code == "service_not_found" else failure.code
        return CountOutcome(code=code, text=failure.text, permanent=failure.permanent, seconds=seconds)
    return CountOutcome(count=count, seconds=monotonic() - began)


def check_service(service: WebConfig) -> WebFailure | None:
    """Ask for one study: None when the service answers, else why not."""
    try:
        with search_client(service) as client:
            client.search_for_studies(limit=1)
    except WebFailure as failure:
        return failure
    return None


@contextmanager
def search_client(service: WebConfig) -> Iterator[DICOMwebClient]:
    """dicomweb-client on a session of ours. Raises `WebFailure` for whatever goes wrong inside."""
    with web_session(service) as session:
        timeout = (service.connect_timeout_s, service.answer_timeout_s)
        client = DICOMwebClient(service.url, session=session, permissive_uid=True, timeout=timeout)
        client.set_http_retry_params(retry=False)  # the ledger decides on another try
        client.host = urlsplit(service.url).netloc  # it becomes the Host header, to which the port belongs
        try:
            yield client
        except requests.RequestException:  # of which JSONDecodeError is a ValueError as well
            raise
        except (ValueError, RecursionError, AttributeError, TypeError) as error:  # JSON, but not that of DICOMweb
            raise not_dicomweb(service) from error


def _told(client: DICOMwebClient, study_uid: str, series_uid: str) -> int | None:
    """The number that the service gives for the series: 0 without the series, None where it gives none."""
    found = client.search_for_series(
        study_uid, fields=[SERIES_INSTANCES], search_filters={"SeriesInstanceUID": series_uid}
    )
    shown = [one for one in found if uid_value(one, SERIES_INSTANCE) == series_uid]
    if not shown:
        return 0
    numbers = [int(number) for one in shown if str(number := first_value(one, SERIES_INSTANCES)).isdecimal()]
    return max(numbers, default=None)


def _counted(client: DICOMwebClient, study_uid: str, series_uid: str, should_stop: Callable[[], bool]) -> int:
    """Page by page, until a page brings nothing new: some services do not know `offset` and repeat themselves."""
    seen: set[str] = set()
    while len(seen) < _MOST:
        if should_stop():
            raise WebFailure("interrupted", "stopped while counting", permanent=False)
        page = client.search_for_instances(study_uid, series_uid, limit=_PAGE, offset=len(seen))
        new = {uid_value(one, SOP_INSTANCE) for one in page} - seen - {""}
        if not new:
            break
        seen |= new
    return len(seen)
