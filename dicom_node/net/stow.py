"""The node as user agent of a DICOMweb service: STOW-RS of a series.

The bytes of the files are what is posted (PS3.18 section 10.5), streamed in requests of about
`batch_bytes`; `dicomweb-client` would decode and encode every data set anew. What happened is a value, as in `scu`.

SendOutcome codes: those of `web.WebFailure`, and "" (every instance was stored), interrupted, instance_unreadable,
instances_refused, instances_deferred, sop_class_refused (of nothing but the SOP class or transfer syntax).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from time import monotonic
from typing import Any
from uuid import uuid4

import requests
from pydicom.errors import InvalidDicomError

from dicom_node.config import WebConfig
from dicom_node.net.answers import AnswerError
from dicom_node.net.part10 import Part10, read_part10
from dicom_node.net.scu import NOT_SENT, SendOutcome, is_stored
from dicom_node.net.status import Outcome, classify, status_text
from dicom_node.net.web import WebFailure, first_value, http_failure, uid_value, unreadable, values, web_session, where

NO_RESPONSE = "no_response"  # sent, and nobody knows what became of it
FAILED_SOP, REFERENCED_SOP = "00081198", "00081199"  # sequences of the answer (PS3.18 annex I.2)
SOP_INSTANCE, WARNING_REASON, FAILURE_REASON = "00081155", "00081196", "00081197"

_BAD_REQUEST = 400
_REFUSALS = (3, 4)  # classes of HTTP statuses that say: not done
# stored all, some, none (PS3.18 table 10.5.3-1); Orthanc says 400 when one file is broken, and names those it stored
_ANSWERS = frozenset({200, 202, 409, _BAD_REQUEST})
_BLOCK = 1 << 16
_PROCESSING_FAILURE, _ALREADY_THERE, _COERCED = 0x0110, 0x0111, 0xB000
_SYNTAX_REFUSED = 0xC122  # PS3.18 table I.2-2; in a C-STORE it has no such meaning
_CLASS_REFUSED = frozenset({"0x0122", "0xC122"})
_AZURE_EXISTS = 0xB00E  # 45070, Microsoft's DICOM service: the instance is already stored


class _Stopped(Exception):
    """`should_stop` said so."""


class _TooSlow(Exception):
    """A request is not on its way in the time that it has."""


@dataclass(frozen=True, slots=True)
class _Instance:
    uid: str
    path: Path
    size: int


def send_series_web(
    files: Sequence[Path],
    service: WebConfig,
    *,
    only: Collection[str] | None = None,
    on_sent: Callable[[int], None] = lambda _: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> SendOutcome:
    """Store the files, in the order given; `only` names the SOP Instance UIDs still missing.

    There is no negotiation in DICOMweb: the files go out as they are, uncompressed. `on_sent(n)` is called after each
    request with the number of instances that the service has. `should_stop` is asked before each instance; a stop is
    a transient outcome ("interrupted") and cuts the request that is on the way.
    """
    began = monotonic()
    try:
        instances = [_instance(part) for part in map(read_part10, files) if _wanted(part, only)]
    except (OSError, InvalidDicomError, AttributeError) as error:
        text = f"a result file cannot be read: {type(error).__name__}"
        return SendOutcome(code="instance_unreadable", text=text, permanent=True)
    statuses = {instance.uid: NOT_SENT for instance in instances}
    try:
        with web_session(service) as session:
            _store_all(session, service, instances, statuses, on_sent, should_stop)
        outcome = _settled(statuses, service)
    except WebFailure as failure:
        outcome = SendOutcome(
            statuses=statuses,
            code=failure.code,
            text=failure.text,
            permanent=failure.permanent,
            retry_after_s=failure.retry_after_s,
        )
    except _Stopped:
        stored = sum(map(is_stored, statuses.values()))
        text = f"stopped after {stored} of {len(statuses)} instances"
        outcome = SendOutcome(statuses=statuses, code="interrupted", text=text)
    return replace(outcome, seconds=monotonic() - began)


def _wanted(part: Part10, only: Collection[str] | None) -> bool:
    return only is None or part.sop_instance_uid in only


def _instance(part: Part10) -> _Instance:
    return _Instance(part.sop_instance_uid, part.path, part.path.stat().st_size)


def _store_all(
    session: requests.Session,
    service: WebConfig,
    instances: Sequence[_Instance],
    statuses: dict[str, str],
    on_sent: Callable[[int], None],
    should_stop: Callable[[], bool],
) -> None:
    """Post batch after batch and write what became of each instance into `statuses`.

    A service or proxy that finds a request too large gets half of it, down to one instance.
    """
    limit, at = service.batch_bytes, 0
    while at < len(instances):
        batch = _first_batch(instances[at:], limit)
        try:
            answer = _post(session, service, batch, should_stop)
        except WebFailure as failure:
            if failure.code == "request_too_large" and len(batch) > 1:
                limit = sum(one.size for one in batch) // 2
                continue
            if failure.status is None or failure.status // 100 not in _REFUSALS:  # it may have stored some of them
                statuses.update(dict.fromkeys((one.uid for one in batch), NO_RESPONSE))
            raise
        except (requests.RequestException, AnswerError):
            statuses.update(dict.fromkeys((one.uid for one in batch), NO_RESPONSE))
            raise
        statuses.update(_batch_statuses(answer, [one.uid for one in batch]))
        at += len(batch)
        on_sent(sum(map(is_stored, statuses.values())))


def _first_batch(instances: Sequence[_Instance], limit: int) -> Sequence[_Instance]:
    """As many of the first instances as `limit` bytes hold; at least one."""
    total = 0
    for number, instance in enumerate(instances):
        total += instance.size
        if total > limit and number:
            return instances[:number]
    return instances


class _Multipart:
    """The body of one request, read from the files while it is sent (RFC 2387).

    It knows its length, so that it goes out with a Content-Length: some services take no chunked request. After
    `limit_s` seconds no further block is given out: a socket limits only how long one block may take.
    """

    def __init__(self, paths: Sequence[Path], should_stop: Callable[[], bool], limit_s: float = inf) -> None:
        boundary = uuid4().hex
        self.content_type = f'multipart/related; type="application/dicom"; boundary={boundary}'
        self._paths, self._should_stop, self._limit_s = paths, should_stop, limit_s
        self._head = f"--{boundary}\r\nContent-Type: application/dicom\r\n\r\n".encode()
        self._tail = f"--{boundary}--\r\n".encode()
        self._length = sum(len(self._head) + path.stat().st_size + 2 for path in paths) + len(self._tail)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[bytes]:
        until = monotonic() + self._limit_s
        for path in self._paths:
            if self._should_stop():
                raise _Stopped
            yield self._head
            with path.open("rb") as file:
                while block := file.read(_BLOCK):
                    if monotonic() > until:
                        raise _TooSlow
                    yield block
            yield b"\r\n"
        yield self._tail


def _post(
    session: requests.Session, service: WebConfig, batch: Sequence[_Instance], should_stop: Callable[[], bool]
) -> Mapping[str, Any]:
    """One request; the Store Instances Response as DICOM JSON, or `WebFailure`."""
    size = sum(instance.size for instance in batch)
    limit_s = service.upload_timeout_s * max(1.0, size / service.batch_bytes)  # one instance can be a large batch
    body = _Multipart([instance.path for instance in batch], should_stop, limit_s)
    try:
        response = session.post(
            f"{service.url}/studies",
            data=body,
            headers={"Content-Type": body.content_type, "Accept": "application/dicom+json"},
            timeout=(service.connect_timeout_s, service.answer_timeout_s),
            allow_redirects=False,
        )
    except _TooSlow as error:
        text = f"{where(service)} did not take a request of {size / 1e6:.1f} MB within {limit_s:.3g} s"
        raise WebFailure("upload_timeout", text, permanent=False) from error
    if response.status_code not in _ANSWERS:
        raise http_failure(service, response)
    try:
        answer = response.json()
    except (ValueError, RecursionError):  # no JSON, a number of 5000 digits, or brackets without end
        answer = None
    if isinstance(answer, list):  # some services wrap it, as in an answer to a search
        answer = next(iter(answer), None)
    if isinstance(answer, dict) and (values(answer, REFERENCED_SOP) or values(answer, FAILED_SOP)):
        return answer
    raise http_failure(service, response) if response.status_code == _BAD_REQUEST else unreadable(service, response)


def _batch_statuses(answer: Mapping[str, Any], uids: Sequence[str]) -> dict[str, str]:
    """The status word of each instance that was posted; one that the answer does not name has none.

    Who is in both sequences has failed.
    """
    told = dict.fromkeys(uids, NO_RESPONSE)
    for item in values(answer, REFERENCED_SOP):
        told[uid_value(item, SOP_INSTANCE)] = _stored_word(_number(item, WARNING_REASON, 0))
    for item in values(answer, FAILED_SOP):
        told[uid_value(item, SOP_INSTANCE)] = _failed_word(_number(item, FAILURE_REASON, _PROCESSING_FAILURE))
    return {uid: told[uid] for uid in uids}


def _stored_word(warning: int) -> str:
    """Success or the warning of an instance that was stored; a warning that no table knows counts as a coercion."""
    return _word(warning if classify(warning) is Outcome.OK else _COERCED)


def _failed_word(reason: int) -> str:
    """The failure reason; one that says "already there" is a success, as we never have two contents for one UID."""
    if reason in (_ALREADY_THERE, _AZURE_EXISTS):
        return _word(_ALREADY_THERE)
    return _word(reason if classify(reason) is not Outcome.OK else _PROCESSING_FAILURE)


def _word(status: int) -> str:
    return f"0x{status:04X}"


def _number(ds: Any, tag: str, default: int) -> int:
    """A value of VR US; `default` where it is none."""
    try:
        number = int(first_value(ds, tag))
    except (TypeError, ValueError, OverflowError):
        return default
    return number if 0 <= number <= 0xFFFF else default


def _settled(statuses: Mapping[str, str], service: WebConfig) -> SendOutcome:
    """What a series is that went through to its last instance."""
    bad = [status for status in statuses.values() if not is_stored(status)]
    if not bad:
        return SendOutcome(statuses=statuses)
    kinds = ", ".join(f"{bad.count(status)} x {_meaning(status)}" for status in sorted(set(bad)))
    text = f"{where(service)} refused {len(bad)} of {len(statuses)} instances: {kinds}"
    permanent = any(status != NO_RESPONSE and classify(int(status, 16)) is Outcome.PERMANENT for status in bad)
    code = "instances_refused" if permanent else "instances_deferred"
    if set(bad) <= _CLASS_REFUSED:
        code = "sop_class_refused"
    return SendOutcome(statuses=statuses, code=code, text=text, permanent=permanent)


def _meaning(status: str) -> str:
    if status == NO_RESPONSE:
        return "not named in its answer"
    if int(status, 16) == _SYNTAX_REFUSED:
        return f"{status} Transfer Syntax not supported"
    return status_text(int(status, 16))
