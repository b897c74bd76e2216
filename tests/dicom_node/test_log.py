"""Log lines: one each, whatever a peer calls itself, and no header values."""

from __future__ import annotations

import errno
import io
import json
import logging
import re
import ssl
from collections.abc import Callable, Iterator
from typing import Any, Literal

import pytest
import structlog
from pydicom import Dataset, dcmwrite
from pydicom.valuerep import DT

from dicom_node.cli.common import warnings_on_stderr
from dicom_node.config import ConfigError, LogConfig
from dicom_node.engine import EngineCrash
from dicom_node.errors import RerunRefused
from dicom_node.headers import BadInstance
from dicom_node.log import configure_logging, printable, reason_of
from dicom_node.net.answers import AnswerError
from dicom_node.net.security import SecurityError
from dicom_node.net.web import WebFailure
from pipeline.errors import BundleError, OutputError, SegmenterUnavailable, UnsupportedSeries
from storage.errors import BadUid, LedgerDamaged, LedgerError, NoSpace, StaleState

HOSTILE = "EVIL\n2026-01-01 job.completed\r\x1b[2J\x00"
NAME = "DOE^JANE"


@pytest.fixture(autouse=True)
def _own_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers, root.level = handlers, level
    structlog.reset_defaults()
    for name in ("pynetdicom", "pydicom"):
        logging.getLogger(name).setLevel(logging.NOTSET)


def lines(form: Literal["console", "json"]) -> io.StringIO:
    stream = io.StringIO()
    configure_logging(LogConfig(format=form), stream=stream)
    return stream


@pytest.mark.parametrize("form", ["console", "json"])
def test_a_hostile_ae_title_stays_on_its_line(form: Literal["console", "json"]) -> None:
    stream = lines(form)
    structlog.get_logger().info("scp.refused", calling_ae=HOSTILE, nested={"peers": [HOSTILE]})
    text = stream.getvalue()
    assert text.count("\n") == 1
    assert "\r" not in text
    assert "\x00" not in text
    assert "[2J" in text
    assert "\x1b[2J" not in text


def test_a_json_line_has_event_level_time_and_values() -> None:
    stream = lines("json")
    with structlog.contextvars.bound_contextvars(job_id="abc"):
        structlog.get_logger().warning("delivery.deferred", instances=412, seconds=8.3)
    entry = json.loads(stream.getvalue())
    assert entry["event"] == "delivery.deferred"
    assert entry["level"] == "warning"
    assert entry["job_id"] == "abc"
    assert (entry["instances"], entry["seconds"]) == (412, 8.3)
    assert entry["timestamp"].endswith("Z")


@pytest.mark.parametrize("form", ["console", "json"])
def test_an_exception_is_logged_by_type_and_place_without_its_message(form: Literal["console", "json"]) -> None:
    stream = lines(form)
    try:
        raise ValueError(f"bad value {NAME}")
    except ValueError:
        structlog.get_logger().exception("job.error")
        logging.getLogger("library").exception("it failed")
    text = stream.getvalue()
    assert NAME not in text
    assert text.count("ValueError") == 2
    assert "test_log.py" in text
    assert text.count("\n") == 2


SAID = "the disk of /spool has less than 100 bytes free"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (LedgerError(SAID), SAID),
        (LedgerDamaged(SAID), SAID),
        (NoSpace(SAID), SAID),
        (StaleState(SAID), SAID),
        (RerunRefused(SAID), SAID),
        (SecurityError(SAID), SAID),
        (EngineCrash("engine_timeout", SAID), f"engine_timeout: {SAID}"),
        (BundleError("weights_missing", SAID), f"weights_missing: {SAID}"),
        (OutputError("not_written", SAID), f"not_written: {SAID}"),
        (OSError(errno.ENOSPC, "No space left on device", f"/spool/{NAME}.dcm"), "No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", f"/spool/{NAME}.dcm"), "Permission denied"),
    ],
)
def test_our_own_errors_and_the_systems_say_why(error: Exception, reason: str) -> None:
    assert reason_of(error) == reason
    assert logged(error)["reason"] == reason


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError(NAME), ""),
        (OSError(f"unexpected end of {NAME}"), ""),
        (OSError(errno.EIO, f"{NAME} cannot be read"), ""),  # a library may say what it likes under a system's number
        (ssl.SSLError(1, NAME), ""),
        (BadUid(f"{NAME!r} is not a UID"), ""),
        (BadInstance("bad_uid", NAME), ""),
        (ConfigError(NAME), ""),
        (AnswerError(NAME), ""),
        (WebFailure("http_error", NAME, permanent=True), ""),
        (UnsupportedSeries("not_ct", NAME), "not_ct"),
        (SegmenterUnavailable("segmenter_crashed", NAME), "segmenter_crashed"),
    ],
)
def test_what_may_quote_somebody_else_says_its_type_or_code_alone(error: Exception, reason: str) -> None:
    assert reason_of(error) == reason
    line = logged(error)
    assert line["error"] == type(error).__name__
    assert NAME not in json.dumps(line)


def logged(error: Exception) -> dict[str, Any]:
    stream = lines("json")
    try:
        raise error
    except Exception:
        structlog.get_logger().exception("worker.loop_failed")
    entry: dict[str, Any] = json.loads(stream.getvalue())
    return entry


def test_a_reason_that_the_caller_gives_is_kept() -> None:
    stream = lines("json")
    try:
        raise LedgerError(SAID)
    except LedgerError:
        structlog.get_logger().exception("job.error", reason="the caller's")
    assert json.loads(stream.getvalue())["reason"] == "the caller's"


def read_a_date() -> None:
    DT(NAME)


def write_a_number() -> None:
    ds = Dataset()
    ds.add_new("Rows", "US", NAME.encode())
    dcmwrite(io.BytesIO(), ds, implicit_vr=False, little_endian=True)


@pytest.mark.parametrize(("step", "kind"), [(read_a_date, ValueError), (write_a_number, OSError)])
def test_an_exception_of_pydicom_brings_no_header_value_into_the_log(
    step: Callable[[], None], kind: type[Exception]
) -> None:
    with pytest.raises(kind, match=re.escape(NAME)) as caught:  # pydicom does quote it
        step()
    stream = lines("json")
    structlog.get_logger().error("assembler.step_failed", exc_info=caught.value)
    logging.getLogger("library").error("it failed", exc_info=caught.value)
    assert stream.getvalue().count(kind.__name__) == 2
    assert "DOE" not in stream.getvalue()


def test_a_command_that_logs_for_a_person_shows_no_message_of_a_library_and_no_local_variable(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with warnings_on_stderr():
        try:
            name = NAME
            raise ValueError(f"bad value {name}")
        except ValueError:
            structlog.get_logger().exception("pull.failed")
    said = capsys.readouterr().err
    assert "ValueError" in said
    assert NAME not in said


def test_other_libraries_speak_from_warning_on_and_dicom_libraries_not_at_all() -> None:
    stream = lines("json")
    logging.getLogger("apscheduler").info("tick")
    logging.getLogger("pydicom").warning("value %s", NAME)
    logging.getLogger("sqlalchemy").warning("slow")
    assert [json.loads(line)["event"] for line in stream.getvalue().splitlines()] == ["slow"]


def test_a_level_below_the_configured_one_is_not_written() -> None:
    stream = io.StringIO()
    configure_logging(LogConfig(level="warning"), stream=stream)
    structlog.get_logger().info("node.started")
    assert stream.getvalue() == ""


def test_long_texts_are_cut() -> None:
    assert len(printable("x" * 10_000)) < 2_100
