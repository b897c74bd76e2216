"""A DICOMweb service as we reach it: one session, and every trouble under a name (PS3.18 section 8).

    with web_session(service) as session:
        session.post(f"{service.url}/studies", ...)

WebFailure codes. Permanent, an operator's matter: secret_unreadable, tls_untrusted, tls_failed, unauthorized,
forbidden, service_not_found, redirected, request_refused, request_too_large, answer_unreadable, answer_too_large.
Worth another try: connection_failed, upload_timeout, no_response, service_busy, server_error.
"""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

import requests
from dicomweb_client.session_utils import create_session
from requests.auth import AuthBase, HTTPBasicAuth

from dicom_node.config import WebConfig
from dicom_node.net.answers import MOST_BYTES, AnswerError, AnswerTooLarge, BoundedAdapter


class WebFailure(Exception):
    """A request to a DICOMweb service came to nothing. `text` is a sentence for a person, without patient data."""

    def __init__(
        self, code: str, text: str, *, permanent: bool, retry_after_s: float | None = None, status: int | None = None
    ) -> None:
        super().__init__(text)
        self.code, self.text, self.permanent, self.retry_after_s = code, text, permanent, retry_after_s
        self.status = status  # of HTTP, where there was one


@dataclass(frozen=True, slots=True)
class _Meaning:
    code: str
    text: str
    permanent: bool


_NOT_FOUND = _Meaning("service_not_found", "no DICOMweb resource there: is the url the one before /studies?", True)
_BUSY = _Meaning("service_busy", "is busy", False)
STATUSES: Mapping[int, _Meaning] = MappingProxyType(
    {
        401: _Meaning("unauthorized", "does not accept our credentials", True),
        403: _Meaning("forbidden", "does not allow that to our account", True),
        404: _NOT_FOUND,
        405: _NOT_FOUND,
        408: _Meaning("server_error", "waited too long for our request", False),
        410: _NOT_FOUND,
        413: _Meaning("request_too_large", "does not take a request of this size", True),
        429: _BUSY,
        501: _NOT_FOUND,
        503: _BUSY,
        507: _Meaning("server_error", "has no room left", False),
    }
)
_REDIRECTED = _Meaning("redirected", "sends us to another address, which we do not follow: correct the url", True)
_REFUSED = _Meaning("request_refused", "refuses the request", True)
_BROKEN = _Meaning("server_error", "failed", False)
_NO_ANSWER = _Meaning("answer_unreadable", "did not answer as a DICOMweb service does", True)


@contextmanager
def web_session(service: WebConfig) -> Iterator[requests.Session]:
    """A session with our credentials, for one piece of work.

    Whatever `requests` raises inside leaves as `WebFailure`, which also says when a file of secrets cannot be read.
    An answer has to be whole within the request's read timeout and `answers.MOST_BYTES`.
    """
    session = create_session()
    try:
        for scheme in ("http://", "https://"):
            session.mount(scheme, BoundedAdapter())
        session.auth = _auth(service)
        session.trust_env = False  # no proxy, CA or .netrc of the environment: the configuration has it all
        session.max_redirects = 0  # a redirected POST would come as a GET, and the data go elsewhere
        session.verify = _ca(service) if service.verify_tls else False
        session.cert = _client_cert(service)
        yield session
    except AnswerTooLarge as error:
        text = f"{where(service)} answered with more than {MOST_BYTES // 1_000_000} MB"
        raise WebFailure("answer_too_large", text, permanent=True) from error
    except AnswerError as error:
        raise not_dicomweb(service) from error
    except requests.RequestException as error:
        raise _failure(service, error) from error
    finally:
        session.close()


def where(service: WebConfig) -> str:
    """The service for a person."""
    return service.url


def http_failure(service: WebConfig, response: requests.Response) -> WebFailure:
    """What a status that is not the one hoped for means. Nothing of the answer's text is repeated."""
    status = response.status_code
    default = {2: _NO_ANSWER, 3: _REDIRECTED, 4: _REFUSED}.get(status // 100, _BROKEN)
    meaning = STATUSES.get(status, default)
    text = f"{where(service)} {meaning.text} (HTTP {status})"
    after = _retry_after_s(response.headers.get("Retry-After", "")) if not meaning.permanent else None
    return WebFailure(meaning.code, text, permanent=meaning.permanent, retry_after_s=after, status=status)


def unreadable(service: WebConfig, response: requests.Response) -> WebFailure:
    """An answer that is not what DICOMweb promises, as the page of a log-in portal."""
    media = response.headers.get("Content-Type", "no content").partition(";")[0][:64]
    text = f"{where(service)} {_NO_ANSWER.text} (HTTP {response.status_code}, {media!a})"
    return WebFailure(_NO_ANSWER.code, text, permanent=True)


def not_dicomweb(service: WebConfig) -> WebFailure:
    """The same of an answer of which nothing more is known."""
    return WebFailure(_NO_ANSWER.code, f"{where(service)} {_NO_ANSWER.text}", permanent=True)


def values(ds: Any, tag: str) -> list[Any]:
    """The values of an element in the DICOM JSON model (PS3.18 annex F.2); none where it is not there or broken."""
    element = ds.get(tag) if isinstance(ds, dict) else None
    found = element.get("Value") if isinstance(element, dict) else None
    return found if isinstance(found, list) else []


def first_value(ds: Any, tag: str) -> Any:
    """The first of them, or None."""
    return next(iter(values(ds, tag)), None)


def uid_value(ds: Any, tag: str) -> str:
    """The first of them as a UID, without the padding that belongs into files only (PS3.5 section 6.2); "" for none."""
    return str(first_value(ds, tag) or "").strip(" \0")


class _Bearer(AuthBase):
    """RFC 6750. As an authentication of the session, not a header of it: it is never sent after a redirect."""

    def __init__(self, token: str) -> None:
        self._token = token

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Bearer {self._token}"
        return request


def _auth(service: WebConfig) -> AuthBase | None:
    if service.token_file:
        return _Bearer(_secret("token_file", service.token_file))
    if service.password_file:
        return HTTPBasicAuth(service.username.encode(), _secret("password_file", service.password_file).encode())
    return None


def _secret(key: str, path: Path) -> str:
    """The file's text without the line break at its end. A header cannot hold any other, nor more than Latin-1."""
    try:
        value = path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:  # not text, or no path
        raise _secret_failure(key, path, "cannot be read") from error
    if not value or not value.isprintable():
        raise _secret_failure(key, path, "is empty or has more than one line")
    return value


def _ca(service: WebConfig) -> str | bool:
    """The CA file, proved to be one; else True, for the public CAs."""
    if service.ca_file is None:
        return True
    try:
        ssl.create_default_context(cafile=service.ca_file)
    except OSError as error:  # also ssl.SSLError: no certificate in it
        raise _secret_failure("ca_file", service.ca_file, "is not a readable PEM file of certificates") from error
    return str(service.ca_file)


def _client_cert(service: WebConfig) -> tuple[str, str] | None:
    """Our certificate and its key, proved to belong together and to need no pass phrase: nobody is there to type it."""
    if service.client_cert_file is None:
        return None
    key = service.client_key_file or service.client_cert_file
    try:
        ssl.create_default_context().load_cert_chain(service.client_cert_file, key, password="")
    except OSError as error:
        text = "is not a readable certificate with its key in client_key_file, or the key has a pass phrase"
        raise _secret_failure("client_cert_file", service.client_cert_file, text) from error
    return str(service.client_cert_file), str(key)


def _secret_failure(key: str, path: Path, why: str) -> WebFailure:
    """The path is shown where it is one: a token that was pasted in its place must not be printed."""
    is_file = os.path.isfile(path)  # noqa: PTH113  # Path.is_file raises where a token is too long for a name
    shown = f"{key} {path}" if is_file else f"{key}, which names no file,"
    return WebFailure("secret_unreadable", f"{shown} {why}", permanent=True)


def _failure(service: WebConfig, error: requests.RequestException) -> WebFailure:
    """Tell apart what `requests` throws: first what it knows itself, then the cause below it."""
    at = where(service)
    if isinstance(error, requests.HTTPError) and error.response is not None:
        return http_failure(service, error.response)
    if isinstance(error, requests.TooManyRedirects):
        return WebFailure(_REDIRECTED.code, f"{at} {_REDIRECTED.text}", permanent=True)
    if isinstance(error, requests.ReadTimeout):
        text = f"{at} did not answer within {service.answer_timeout_s:g} s"
        return WebFailure("no_response", text, permanent=False)
    if isinstance(error, requests.exceptions.JSONDecodeError):
        return not_dicomweb(service)
    if not isinstance(error, requests.Timeout) and any(isinstance(cause, TimeoutError) for cause in _causes(error)):
        text = f"{at} took nothing of what was sent for {service.connect_timeout_s:g} s"
        return WebFailure("upload_timeout", text, permanent=False)
    for cause in _causes(error):
        if isinstance(cause, ssl.SSLCertVerificationError):
            text = f"{at}: its certificate is not trusted: {cause.verify_message}"
            return WebFailure("tls_untrusted", text, permanent=True)
        if isinstance(cause, ssl.SSLEOFError | ssl.SSLZeroReturnError):
            text = f"{at} cut the TLS connection: is it overloaded, or does it want a certificate of ours?"
            return WebFailure("connection_failed", text, permanent=False)
        if isinstance(cause, ssl.SSLError):
            text = f"{at}: no TLS connection: {cause.reason or 'handshake failed'}"
            return WebFailure("tls_failed", text, permanent=True)
        if isinstance(cause, socket.gaierror):
            return WebFailure("connection_failed", f"{at}: the host name cannot be resolved", permanent=False)
    return WebFailure("connection_failed", f"{at} cannot be reached, or cut the connection", permanent=False)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and those it came from, outermost first."""
    seen: set[int] = set()
    now: BaseException | None = error
    while now is not None and id(now) not in seen:
        seen.add(id(now))
        yield now
        now = now.__cause__ or now.__context__


def _retry_after_s(value: str) -> float | None:
    """Seconds from now, of a Retry-After header with seconds or with a date (RFC 9110 section 10.2.3)."""
    if value.strip().isdecimal():
        return float(value)
    try:
        then = parsedate_to_datetime(value)
        if then.tzinfo is None:
            then = then.replace(tzinfo=UTC)
        return max(0.0, (then - datetime.now(UTC)).total_seconds())
    except (ValueError, OverflowError):  # no date, or one that no calendar has
        return None
