"""STOW-RS to a scripted service: every way an archive, a proxy or a certificate can be wrong."""

from __future__ import annotations

import gzip
import socket
import ssl
import threading
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Literal

import pytest
import trustme
from fake_pacs import free_port
from fake_web import Answer, FakeWeb, Posted, store_everything, stored
from pydicom import dcmread
from result_factory import sop_uids, write_instances

from dicom_node.config import WebConfig, load_config
from dicom_node.net.answers import MOST_BYTES
from dicom_node.net.qido import check_service
from dicom_node.net.scu import SendOutcome
from dicom_node.net.stow import _Multipart, send_series_web

COUNT = 6
TRANSIENT, PERMANENT = False, True


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    return write_instances(tmp_path / "pet", COUNT)


def in_twos(service: WebConfig, files: list[Path]) -> WebConfig:
    """So that the instances go in three requests; far below what a configuration may say."""
    return service.model_copy(update={"batch_bytes": 2 * max(path.stat().st_size for path in files)})


def verdict(outcome: SendOutcome) -> tuple[str, bool]:
    return outcome.code, outcome.permanent


def test_the_parts_are_the_bytes_of_the_files_in_their_order(files: list[Path]) -> None:
    with FakeWeb() as web:
        outcome = send_series_web(files, web.service())
    assert (outcome.ok, outcome.stored) == (True, COUNT)
    (posted,) = web.posts
    assert list(posted.instances.items()) == [
        (uid, path.read_bytes()) for uid, path in zip(sop_uids(files), files, strict=True)
    ]
    assert posted.path == "/dicom-web/studies"
    assert posted.headers["Content-Type"].startswith('multipart/related; type="application/dicom"; boundary=')
    assert posted.headers["Accept"] == "application/dicom+json"


def test_a_request_is_read_from_the_files_in_small_blocks(tmp_path: Path) -> None:
    large = tmp_path / "large.dcm"
    large.write_bytes(bytes(1_000_000))
    body = _Multipart([large, large], lambda: False)
    blocks = [len(block) for block in body]
    assert sum(blocks) == len(body) > 2_000_000
    assert max(blocks) <= 65536


# ---- what the answer says of each instance


@pytest.mark.parametrize(
    ("reason", "code", "permanent", "word"),
    [
        (0x0110, "instances_deferred", False, "0x0110"),
        (0xA700, "instances_deferred", False, "0xA700"),
        (0xA900, "instances_refused", True, "0xA900"),
        (0xC000, "instances_refused", True, "0xC000"),
        (0x0124, "instances_refused", True, "0x0124"),
        (0x0122, "sop_class_refused", True, "0x0122"),
        (0xC122, "sop_class_refused", True, "0xC122"),
        (0x0111, "", False, "0x0111"),  # already there
        (45070, "", False, "0x0111"),  # already there, in Microsoft's words
        (45071, "instances_deferred", False, "0x0110"),  # "is being created": of the warnings, but not stored
        (0x0000, "instances_deferred", False, "0x0110"),  # failed without a reason
    ],
)
def test_a_failed_item_is_judged_by_its_reason(
    files: list[Path], reason: int, code: str, permanent: bool, word: str
) -> None:
    bad = sop_uids(files)[1]
    with FakeWeb(lambda posted: stored(posted.uids, status=202, failed={bad: reason})) as web:
        outcome = send_series_web(files, web.service())
    assert verdict(outcome) == (code, permanent)
    assert outcome.statuses[bad] == word
    assert {status for uid, status in outcome.statuses.items() if uid != bad} == {"0x0000"}


def test_all_failed_is_a_409_whose_items_are_read(files: list[Path]) -> None:
    reasons = dict.fromkeys(sop_uids(files), 0xA900)
    with FakeWeb(lambda posted: stored(posted.uids, status=409, failed=reasons)) as web:
        outcome = send_series_web(files, web.service())
    assert verdict(outcome) == ("instances_refused", PERMANENT)
    assert outcome.text.endswith("refused 6 of 6 instances: 6 x 0xA900 Data Set Does Not Match SOP Class")


@pytest.mark.parametrize(
    ("warning", "word"), [(0xB000, "0xB000"), (0xB007, "0xB007"), (0xB123, "0xB123"), (7, "0xB000")]
)
def test_a_warning_is_stored_and_kept_in_the_statuses(files: list[Path], warning: int, word: str) -> None:
    coerced = sop_uids(files)[0]
    with FakeWeb(lambda posted: stored(posted.uids, status=202, warned={coerced: warning})) as web:
        outcome = send_series_web(files, web.service())
    assert (outcome.ok, outcome.stored, outcome.statuses[coerced]) == (True, COUNT, word)


def test_an_instance_that_the_answer_does_not_name_is_not_counted_as_stored(files: list[Path]) -> None:
    with FakeWeb(lambda posted: stored(posted.uids[:-1])) as web:
        outcome = send_series_web(files, web.service())
    assert verdict(outcome) == ("instances_deferred", TRANSIENT)
    assert (outcome.stored, outcome.statuses[sop_uids(files)[-1]]) == (COUNT - 1, "no_response")


@pytest.mark.parametrize("padding", ["\0", " "])
def test_a_uid_that_is_padded_as_in_a_file_is_that_uid(files: list[Path], padding: str) -> None:
    bad = sop_uids(files)[0]

    def padded(posted: Posted) -> Answer:
        failed = {f"{bad}{padding}": 0xA700}
        return stored([f"{uid}{padding}" for uid in posted.uids], status=202, failed=failed)

    with FakeWeb(padded) as web:
        outcome = send_series_web(files, web.service())
    assert (outcome.stored, outcome.statuses[bad]) == (COUNT - 1, "0xA700")


def test_an_instance_in_both_sequences_has_failed(files: list[Path]) -> None:
    first = sop_uids(files)[0]

    def both(posted: Posted) -> Answer:
        good, bad = stored(posted.uids), stored([first], failed={first: 0xA700})
        return Answer(body=b"{" + good.body[1:-1] + b"," + bad.body[1:-1].split(b', "00081199"')[0] + b"}")

    with FakeWeb(both) as web:
        assert send_series_web(files, web.service()).statuses[first] == "0xA700"


@pytest.mark.parametrize(
    "answer",
    [
        Answer(body=b"<html>Please log in</html>", media_type="text/html"),
        Answer(body=b"", media_type="application/dicom+json"),
        Answer(body=b"{}"),
        Answer(body=b"[]"),
        Answer(body=b'"stored"'),
        Answer(body=b'{"00081199": 7}'),
        Answer(status=409, body=b"conflict", media_type="text/plain"),
        Answer(status=204),
        Answer(body=b"<NativeDicomModel/>", media_type="application/dicom+xml"),
    ],
)
def test_a_success_that_names_no_instance_is_none(files: list[Path], answer: Answer) -> None:
    with FakeWeb(lambda _: answer) as web:
        outcome = send_series_web(files, web.service())
    assert verdict(outcome) == ("answer_unreadable", PERMANENT)
    assert outcome.stored == 0
    assert set(outcome.statuses.values()) == {"no_response"}  # it was posted: nobody knows what became of it


@pytest.mark.parametrize(
    "answer",
    [
        Answer(body=b"[" * 100_000),
        Answer(body=b'{"00081199": ' + b"9" * 5000 + b"}"),
        Answer(body=b"{}", headers={"Content-Encoding": "gzip"}),
    ],
    ids=["brackets without end", "a number without end", "not packed as it says"],
)
def test_an_answer_that_no_parser_takes_costs_nothing_that_was_stored(files: list[Path], answer: Answer) -> None:
    with FakeWeb(lambda posted: store_everything(posted) if posted.number == 1 else answer) as web:
        outcome = send_series_web(files, in_twos(web.service(), files))
    assert verdict(outcome) == ("answer_unreadable", PERMANENT)
    assert [outcome.statuses[uid] for uid in sop_uids(files)[:2]] == ["0x0000"] * 2


@pytest.mark.parametrize("reason", ["-1", "65536", "Infinity"])
def test_a_failure_reason_that_is_no_status_counts_as_a_processing_failure(files: list[Path], reason: str) -> None:
    bad = sop_uids(files)[0]

    def answer(posted: Posted) -> Answer:
        good = stored(posted.uids, status=202, failed={bad: 4711})
        return Answer(status=202, body=good.body.replace(b"4711", reason.encode()))

    with FakeWeb(answer) as web:
        outcome = send_series_web(files, web.service())
    assert (verdict(outcome), outcome.statuses[bad]) == (("instances_deferred", TRANSIENT), "0x0110")


@pytest.mark.parametrize(
    "answer",
    [
        Answer(body=b" " * (MOST_BYTES + 1)),
        Answer(body=gzip.compress(bytes(MOST_BYTES + 1)), headers={"Content-Encoding": "gzip"}),
    ],
    ids=["plain", "packed"],
)
def test_an_answer_without_measure_is_not_put_into_memory(files: list[Path], answer: Answer) -> None:
    with FakeWeb(lambda posted: store_everything(posted) if posted.number == 1 else answer) as web:
        outcome = send_series_web(files, in_twos(web.service(), files))
    assert verdict(outcome) == ("answer_too_large", PERMANENT)
    assert outcome.text.endswith("answered with more than 16 MB")
    words = [outcome.statuses[uid] for uid in sop_uids(files)]
    assert words == ["0x0000"] * 2 + ["no_response"] * 2 + ["not_sent"] * 2


def test_an_answer_that_is_packed_is_read(files: list[Path]) -> None:
    def packed(posted: Posted) -> Answer:
        return Answer(body=gzip.compress(stored(posted.uids).body), headers={"Content-Encoding": "gzip"})

    with FakeWeb(packed) as web:
        assert send_series_web(files, web.service()).stored == COUNT


# ---- what an HTTP status says of all of them


@pytest.mark.parametrize(
    ("status", "code", "permanent"),
    [
        (400, "request_refused", True),
        (401, "unauthorized", True),
        (403, "forbidden", True),
        (404, "service_not_found", True),
        (405, "service_not_found", True),
        (408, "server_error", False),
        (415, "request_refused", True),
        (429, "service_busy", False),
        (500, "server_error", False),
        (501, "service_not_found", True),
        (502, "server_error", False),
        (503, "service_busy", False),
        (507, "server_error", False),
    ],
)
def test_an_http_status_has_a_name(files: list[Path], status: int, code: str, permanent: bool) -> None:
    with FakeWeb(lambda posted: store_everything(posted) if posted.number == 1 else Answer(status=status)) as web:
        outcome = send_series_web(files, in_twos(web.service(), files))
    assert verdict(outcome) == (code, permanent)
    assert outcome.text.startswith(f"http://127.0.0.1:{web.port}/dicom-web ")
    assert outcome.text.endswith(f"(HTTP {status})")
    uids = sop_uids(files)
    second = "no_response" if status >= 500 else "not_sent"  # a service that fails may have stored some of them
    assert [outcome.statuses[uid] for uid in uids] == ["0x0000"] * 2 + [second] * 2 + ["not_sent"] * 2


@pytest.mark.parametrize(
    ("value", "least", "most"),
    [
        ("120", 120, 120),
        ("in an hour", 1800, 3600),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0, 0),
    ],
)
def test_a_busy_service_says_when_to_come_again(files: list[Path], value: str, least: float, most: float) -> None:
    if value == "in an hour":
        value = format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True)
    with FakeWeb(lambda _: Answer(status=503, headers={"Retry-After": value})) as web:
        after = send_series_web(files, web.service()).retry_after_s
    assert after is not None
    assert least <= after <= most


@pytest.mark.parametrize("value", ["", "soon", "-5", "Wed, 99 Oct 2015", f"Wed, 21 Oct {'9' * 30} 07:28:00 GMT"])
def test_a_retry_after_that_is_none_is_ignored(files: list[Path], value: str) -> None:
    with FakeWeb(lambda _: Answer(status=429, headers={"Retry-After": value})) as web:
        assert send_series_web(files, web.service()).retry_after_s is None


def test_requests_become_smaller_until_the_proxy_takes_them(files: list[Path]) -> None:
    size = files[0].stat().st_size
    with FakeWeb(most_bytes=int(2.5 * size)) as web:
        outcome = send_series_web(files, web.service())
    assert (outcome.ok, outcome.stored) == (True, COUNT)
    assert [uid for posted in web.posts for uid in posted.uids] == sop_uids(files)
    assert max(posted.length for posted in web.posts) <= web.most_bytes


def test_an_instance_that_is_too_large_alone_is_refused_by_name(files: list[Path]) -> None:
    with FakeWeb(most_bytes=100) as web:
        outcome = send_series_web(files, web.service())
    assert verdict(outcome) == ("request_too_large", PERMANENT)
    assert set(outcome.statuses.values()) == {"not_sent"}


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirection_is_not_followed(files: list[Path], status: int, tmp_path: Path) -> None:
    with FakeWeb() as other:
        elsewhere = Answer(status=status, headers={"Location": f"http://127.0.0.1:{other.port}/studies"})
        with FakeWeb(lambda _: elsewhere) as web:
            outcome = send_series_web(files, web.service(token_file=secret(tmp_path, "t0ken")))
    assert verdict(outcome) == ("redirected", PERMANENT)
    assert other.posts == []
    assert other.gets == []


# ---- the connection


def test_a_cut_connection_leaves_its_batch_unknown_and_is_tried_again(files: list[Path]) -> None:
    with FakeWeb(lambda posted: Answer(cut=True) if posted.number == 2 else store_everything(posted)) as web:
        outcome = send_series_web(files, in_twos(web.service(), files))
    assert verdict(outcome) == ("connection_failed", TRANSIENT)
    words = [outcome.statuses[uid] for uid in sop_uids(files)]
    assert words == ["0x0000"] * 2 + ["no_response"] * 2 + ["not_sent"] * 2


def test_a_service_that_does_not_answer_is_given_up(files: list[Path]) -> None:
    with FakeWeb(lambda _: Answer(silent=True)) as web:
        outcome = send_series_web(files, web.service(answer_timeout_s=0.2))
        assert outcome.text == f"http://127.0.0.1:{web.port}/dicom-web did not answer within 0.2 s"
    assert verdict(outcome) == ("no_response", TRANSIENT)


@pytest.mark.parametrize("drip", ["head", "body"])
def test_a_service_that_drips_its_answer_is_given_up(files: list[Path], drip: Literal["head", "body"]) -> None:
    with FakeWeb(lambda _: Answer(drip=drip)) as web:
        outcome = send_series_web(files, web.service(answer_timeout_s=0.4))
    assert verdict(outcome) == ("no_response", TRANSIENT)
    assert outcome.text.endswith("did not answer within 0.4 s")


LARGE = 8_000_000  # more than the kernel takes from us ahead of the service


def _enlarge(path: Path) -> None:
    ds = dcmread(path)
    ds.PixelData = bytes(LARGE)
    ds.Rows, ds.Columns = 2000, 2000
    ds.save_as(path)


def test_a_service_that_takes_a_request_too_slowly_is_given_up_and_tried_again(files: list[Path]) -> None:
    _enlarge(files[0])
    with FakeWeb(slow=1) as web:
        service = web.service(upload_timeout_s=0.3, connect_timeout_s=60)
        late = send_series_web(files, service)
        assert (verdict(late), late.stored) == (("upload_timeout", TRANSIENT), 0)
        assert late.text.endswith("did not take a request of 8.0 MB within 0.3 s")
        again = send_series_web(files, service.model_copy(update={"upload_timeout_s": 60}))
    assert (again.ok, again.stored) == (True, COUNT)


def test_a_service_that_stops_taking_a_request_is_given_up(files: list[Path]) -> None:
    _enlarge(files[0])
    with FakeWeb(slow=1) as web:
        outcome = send_series_web(files, web.service(upload_timeout_s=60, connect_timeout_s=0.02))
    assert verdict(outcome) == ("upload_timeout", TRANSIENT)
    assert outcome.text.endswith("took nothing of what was sent for 0.02 s")


def test_a_slow_service_over_tls_is_given_up_too(files: list[Path], authority: Authority) -> None:
    _enlarge(files[0])
    with FakeWeb(slow=1, tls=authority.server()) as web:
        service = web.service(ca_file=authority.file, upload_timeout_s=0.3, connect_timeout_s=60)
        assert verdict(send_series_web(files, service)) == ("upload_timeout", TRANSIENT)


def test_an_instance_larger_than_a_batch_has_more_time(files: list[Path]) -> None:
    _enlarge(files[0])
    with FakeWeb(slow=1) as web:
        service = web.service(upload_timeout_s=0.05, connect_timeout_s=60, batch_bytes=1_000_000)
        outcome = send_series_web(files[:1], service)
    assert outcome.text.endswith("did not take a request of 8.0 MB within 0.4 s")


def test_nobody_at_the_port_is_transient(files: list[Path]) -> None:
    outcome = send_series_web(files, WebConfig(url=f"http://127.0.0.1:{free_port()}/dicom-web"))
    assert verdict(outcome) == ("connection_failed", TRANSIENT)
    assert set(outcome.statuses.values()) == {"no_response"}


def test_a_host_name_that_does_not_resolve_is_said_so(files: list[Path]) -> None:
    outcome = send_series_web(files, WebConfig(url="https://pacs.invalid/dicom-web"))
    assert verdict(outcome) == ("connection_failed", TRANSIENT)
    assert "the host name cannot be resolved" in outcome.text


def test_proxies_and_passwords_of_the_environment_are_not_used(
    files: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login somebody password else\n", encoding="utf-8")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with FakeWeb() as web:
        assert send_series_web(files, web.service()).ok
    assert "Authorization" not in web.posts[0].headers


def test_a_stop_between_instances_cuts_the_request(files: list[Path]) -> None:
    asked: list[int] = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) > 3  # two instances of the first request, and one of the second

    with FakeWeb() as web:
        outcome = send_series_web(files, in_twos(web.service(), files), should_stop=stop)
    assert verdict(outcome) == ("interrupted", TRANSIENT)
    assert outcome.text == "stopped after 2 of 6 instances"
    assert web.stored == set(sop_uids(files)[:2])


# ---- who we are


def secret(folder: Path, text: str) -> Path:
    path = folder / "secret"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_token_is_read_again_for_every_sending(files: list[Path], tmp_path: Path) -> None:
    path = secret(tmp_path, "first\n")
    with FakeWeb() as web:
        service = web.service(token_file=path)
        send_series_web(files, service)
        path.write_text("second", encoding="utf-8")
        send_series_web(files, service)
    assert [posted.headers["Authorization"] for posted in web.posts] == ["Bearer first", "Bearer second"]


@pytest.mark.parametrize("text", [None, "", "\n", "two\nlines", "a\x00b"])
def test_a_secret_that_cannot_be_used_is_said_so(files: list[Path], tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "missing" if text is None else secret(tmp_path, text)
    with FakeWeb() as web:
        outcome = send_series_web(files, web.service(token_file=path))
    assert verdict(outcome) == ("secret_unreadable", PERMANENT)
    assert "token_file" in outcome.text
    assert (str(path) in outcome.text) == path.exists()
    assert web.posts == []


@pytest.mark.parametrize("key", ["token_file", "password_file", "ca_file", "client_cert_file", "client_key_file"])
@pytest.mark.parametrize("pasted", ["s3cret", "s3cret/" * 60, "/s3cret" + "x" * 300])
def test_a_secret_pasted_where_its_file_belongs_is_not_told(
    files: list[Path], authority: Authority, tmp_path: Path, key: str, pasted: str
) -> None:
    path = tmp_path / "config.toml"
    more = {"password_file": 'username = "u"', "client_key_file": f'client_cert_file = "{authority.file}"'}
    path.write_text(
        f'[[destinations]]\nname = "web"\nurl = "https://127.0.0.1:1/d"\n{key} = "{pasted}"\n{more.get(key, "")}'
    )
    outcome = send_series_web(files, load_config(path).destinations[0])
    assert verdict(outcome) == ("secret_unreadable", PERMANENT)
    assert key in outcome.text
    assert "s3cret" not in outcome.text


# ---- TLS


class Authority:
    """A CA of our own, in a file, and a server's side of TLS for a name."""

    def __init__(self, folder: Path) -> None:
        self._ca = trustme.CA()
        self.file = folder / "ca.pem"
        self._ca.cert_pem.write_to_path(str(self.file))

    def server(self, name: str = "127.0.0.1", *, asks: bool = False) -> ssl.SSLContext:
        """`asks` for a certificate of the client."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._ca.issue_cert(name).configure_cert(context)
        if asks:
            context.verify_mode = ssl.CERT_REQUIRED
            self._ca.configure_trust(context)
        return context

    def client(self, folder: Path) -> tuple[Path, Path]:
        """A certificate of this node and its key."""
        made, cert, key = self._ca.issue_cert("synpet.example"), folder / "node.pem", folder / "node.key"
        made.cert_chain_pems[0].write_to_path(str(cert))
        made.private_key_pem.write_to_path(str(key))
        return cert, key


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def test_a_certificate_of_the_configured_ca_is_trusted(files: list[Path], authority: Authority) -> None:
    with FakeWeb(tls=authority.server()) as web:
        outcome = send_series_web(files, web.service(ca_file=authority.file))
    assert (outcome.ok, outcome.stored) == (True, COUNT)
    assert web.stored == set(sop_uids(files))


@pytest.mark.parametrize(
    ("name", "trusting", "said"),
    [("127.0.0.1", False, "local issuer"), ("pacs.example", True, "127.0.0.1")],
)
def test_a_certificate_that_is_not_trusted_gets_nothing(
    files: list[Path], authority: Authority, name: str, trusting: bool, said: str
) -> None:
    with FakeWeb(tls=authority.server(name)) as web:
        outcome = send_series_web(files, web.service(ca_file=authority.file if trusting else None))
    assert verdict(outcome) == ("tls_untrusted", PERMANENT)
    assert "its certificate is not trusted" in outcome.text
    assert said in outcome.text
    assert web.posts == []


@pytest.mark.filterwarnings("ignore:Unverified HTTPS request")
def test_every_certificate_is_trusted_when_that_is_said(files: list[Path], authority: Authority) -> None:
    with FakeWeb(tls=authority.server("pacs.example")) as web:
        assert send_series_web(files, web.service(verify_tls=False)).ok


def test_https_to_a_port_without_tls_is_said_so(files: list[Path], authority: Authority) -> None:
    with FakeWeb() as web:
        url = f"https://127.0.0.1:{web.port}/dicom-web"
        outcome = send_series_web(files, web.service(url=url, ca_file=authority.file))
    assert verdict(outcome) == ("tls_failed", PERMANENT)


def test_a_connection_that_ends_in_the_handshake_is_tried_again(files: list[Path], authority: Authority) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def hang_up() -> None:
            link, _ = server.accept()
            link.recv(10)
            link.close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        url = f"https://127.0.0.1:{server.getsockname()[1]}/dicom-web"
        outcome = send_series_web(files, WebConfig(url=url, ca_file=authority.file))
        thread.join()
    assert verdict(outcome) == ("connection_failed", TRANSIENT)


def test_a_cut_connection_over_tls_is_tried_again(files: list[Path], authority: Authority) -> None:
    with FakeWeb(lambda _: Answer(cut=True), tls=authority.server()) as web:
        outcome = send_series_web(files, web.service(ca_file=authority.file))
    assert verdict(outcome) == ("connection_failed", TRANSIENT)


@pytest.mark.parametrize("drip", ["head", "body"])
def test_a_service_that_drips_over_tls_is_given_up(
    files: list[Path], authority: Authority, drip: Literal["head", "body"]
) -> None:
    with FakeWeb(lambda _: Answer(drip=drip), tls=authority.server()) as web:
        outcome = send_series_web(files, web.service(ca_file=authority.file, answer_timeout_s=0.4))
    assert verdict(outcome) == ("no_response", TRANSIENT)


def test_a_service_that_asks_who_calls_is_told(files: list[Path], authority: Authority, tmp_path: Path) -> None:
    cert, key = authority.client(tmp_path)
    both = tmp_path / "both.pem"
    both.write_bytes(key.read_bytes() + cert.read_bytes())
    with FakeWeb(tls=authority.server(asks=True)) as web:
        service = web.service(ca_file=authority.file)
        assert check_service(service) is not None  # by its alert, or by hanging up: as TLS 1.3 happens to run
        assert send_series_web(files, service).stored == 0
        assert web.posts == []
        for keys in ({"client_cert_file": cert, "client_key_file": key}, {"client_cert_file": both}):
            assert send_series_web(files, service.model_copy(update=keys)).ok


def test_a_key_that_does_not_fit_is_said_so(files: list[Path], authority: Authority, tmp_path: Path) -> None:
    cert, _ = authority.client(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    _, key = authority.client(other)
    service = WebConfig(url="https://127.0.0.1:1/dicom-web", client_cert_file=cert, client_key_file=key)
    assert verdict(send_series_web(files, service)) == ("secret_unreadable", PERMANENT)


@pytest.mark.parametrize("content", [None, "no certificate"])
def test_a_ca_file_that_is_none_is_said_so(files: list[Path], tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "ca.pem" if content is None else secret(tmp_path, content)
    outcome = send_series_web(files, WebConfig(url="https://127.0.0.1:1/dicom-web", ca_file=path))
    assert verdict(outcome) == ("secret_unreadable", PERMANENT)
    told = f"ca_file {path}" if content else "ca_file, which names no file,"
    assert outcome.text == f"{told} is not a readable PEM file of certificates"


def test_a_file_that_is_no_dicom_is_not_sent(tmp_path: Path) -> None:
    with FakeWeb() as web:
        outcome = send_series_web([secret(tmp_path, "no DICOM")], web.service())
    assert verdict(outcome) == ("instance_unreadable", PERMANENT)
    assert web.posts == []
