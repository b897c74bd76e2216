"""`dicom-node check` asks a DICOMweb destination, and says why it does not answer."""

from __future__ import annotations

import json
import ssl
from pathlib import Path

import pytest
import trustme
from fake_pacs import free_port
from fake_web import Answer, FakeWeb
from typer.testing import CliRunner

from dicom_node.cli import app
from dicom_node.cli.check import check_web
from dicom_node.cli.findings import Verdict
from dicom_node.config import DestinationConfig


def found(web: FakeWeb | None = None, **keys: object) -> tuple[Verdict, str]:
    base = web.service().model_dump() if web else {}
    finding = check_web(DestinationConfig(**{"name": "web", **base, **keys}))
    assert finding.check == "destination web"
    return finding.verdict, finding.text


def test_an_answering_service_passes() -> None:
    with FakeWeb() as web:
        assert found(web) == (Verdict.OK, f"http://127.0.0.1:{web.port}/dicom-web answers a search")


@pytest.mark.parametrize(
    ("status", "said"),
    [(401, "does not accept our credentials (HTTP 401)"), (403, "does not allow that"), (503, "is busy (HTTP 503)")],
)
def test_a_refusal_is_told(status: int, said: str) -> None:
    with FakeWeb(found=lambda path, query: Answer(status=status)) as web:
        verdict, text = found(web)
    assert verdict is Verdict.FAIL
    assert said in text


@pytest.mark.parametrize(("verify", "expected"), [(True, Verdict.FAIL), (False, Verdict.WARN)])
def test_a_service_without_a_search_is_for_a_destination_that_is_not_verified(verify: bool, expected: Verdict) -> None:
    with FakeWeb(found=lambda path, query: Answer(status=404)) as web:
        verdict, text = found(web, verify=verify)
    assert verdict is expected
    assert "is the url the one before /studies?" in text


def test_a_host_that_is_not_there_is_told() -> None:
    assert found(url="https://pacs.invalid/dicom-web") == (
        Verdict.FAIL,
        "https://pacs.invalid/dicom-web: the host name cannot be resolved",
    )


def test_a_certificate_that_is_not_trusted_is_told() -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(context)
    with FakeWeb(tls=context) as web:
        verdict, text = found(web)
    assert verdict is Verdict.FAIL
    assert "its certificate is not trusted: unable to get local issuer certificate" in text


@pytest.mark.filterwarnings("ignore:Unverified HTTPS request")
def test_a_certificate_that_nobody_looks_at_is_a_warning() -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(context)
    with FakeWeb(tls=context) as web:
        verdict, text = found(web, verify_tls=False)
    assert verdict is Verdict.WARN
    assert "verify_tls = false" in text


def test_the_command_asks_every_web_destination(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    with FakeWeb() as web:
        path.write_text(
            f'[node]\nhost = "127.0.0.1"\nport = {free_port()}\n[intake]\nmin_free_bytes = 1\n'
            f'[pipeline]\ndevice = "cpu"\n[[destinations]]\nname = "cloud"\nurl = "{web.service().url}"\n',
            encoding="utf-8",
        )
        result = CliRunner().invoke(app, ["check", "--json", "--config", str(path)])
    assert result.exit_code == 0, result.output
    verdicts = {one["check"]: one["verdict"] for one in json.loads(result.output)}
    assert verdicts["destination cloud"] == "ok"
