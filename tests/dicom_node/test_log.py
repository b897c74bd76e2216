"""Log lines: one each, whatever a peer calls itself, and no header values."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from typing import Literal

import pytest
import structlog

from dicom_node.config import LogConfig
from dicom_node.log import configure_logging, printable

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
