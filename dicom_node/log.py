"""One line per stage: structlog on stderr, as JSON for a collector or as text for a person.

Whatever is logged may hold an attacker's text (an AE title, a UID): control characters are escaped, so that a
value never starts a line of its own. Exceptions are logged by type and place, and by a reason only where the words are
our own or the system's: a library's message may quote a header. Other libraries' loggers go through the same door from
WARNING on.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import structlog
from structlog.typing import EventDict, Processor

from dicom_node.config import LogConfig
from dicom_node.engine import EngineError
from dicom_node.errors import NodeError
from dicom_node.net.security import SecurityError
from pipeline.errors import DistrictError, PipelineError, UnsupportedSeries
from storage.errors import BadUid, StorageError

# Their lines quote AE titles and data sets and repeat what our own lines say once.
QUIET_LIBRARIES = ("pynetdicom", "pydicom")
MAX_VALUE = 2000  # characters of one value; longer texts are cut
# Errors whose texts we write, of UIDs, files and numbers. Not among them: ConfigError, BadInstance, AnswerError and
# WebFailure, which may repeat a value of the configuration, of a header or of an answer.
WORDED = (StorageError, PipelineError, EngineError, NodeError, SecurityError)
# Those of them that may repeat what a sender or another program wrote: their code is told, where they have one.
QUOTING = (BadUid, UnsupportedSeries, DistrictError)


def configure_logging(config: LogConfig, *, stream: TextIO | None = None) -> None:
    """Send all log lines of this process to `stream` (default stderr) in the configured format and level."""
    out = sys.stderr if stream is None else stream
    level = getattr(logging, config.level.upper())
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        reason_of_exception,
        escape_controls,
    ]
    renderer = _renderer(config, out)
    structlog.configure(
        processors=[*shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(out),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(out)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(max(level, logging.WARNING))
    for name in QUIET_LIBRARIES:
        logging.getLogger(name).setLevel(logging.CRITICAL)


def _renderer(config: LogConfig, out: TextIO) -> Processor:
    if config.format == "json":
        return structlog.processors.JSONRenderer(sort_keys=False, default=str)
    return structlog.dev.ConsoleRenderer(colors=out.isatty(), pad_event_to=24)


def escape_controls(_logger: Any, _method: str, event: EventDict) -> MutableMapping[str, Any]:
    """Escape control and other unprintable characters in every text, at any depth."""
    return {str(key): _escaped(value) for key, value in event.items()}


def _escaped(value: Any) -> Any:
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, Mapping):
        return {printable(str(key)): _escaped(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_escaped(item) for item in value]
    if value is None or isinstance(value, bool | int | float) or hasattr(value, "levelno"):
        return value
    return printable(str(value))


def printable(text: str) -> str:
    r"""The text on one line: a line break becomes `\n`, an escape character `\x1b`; cut after `MAX_VALUE`."""
    cut = text if len(text) <= MAX_VALUE else text[:MAX_VALUE] + "..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in cut)


def reason_of_exception(_logger: Any, _method: str, event: EventDict) -> EventDict:
    """Replace `exc_info` by `error`, the exception's type, the `place`s it came through, and its `reason` if any."""
    info = event.pop("exc_info", None)
    error = sys.exc_info()[1] if info is True else info[1] if isinstance(info, tuple) else info
    if isinstance(error, BaseException):
        event["error"] = type(error).__name__
        if reason := reason_of(error):
            event.setdefault("reason", reason)
        event["place"] = places(error.__traceback__)
    return event


def reason_of(error: BaseException) -> str:
    """What may be told of an exception beyond its type; "" for a library's, whose message may quote a header."""
    if isinstance(error, QUOTING):
        return getattr(error, "code", "")
    if isinstance(error, WORDED):
        return str(error)
    if isinstance(error, OSError) and error.errno:
        # whoever raises an OSError chooses its text: only what the system itself says of the number is told
        return error.strerror if error.strerror == os.strerror(error.errno) else ""
    return ""


def places(trace: TracebackType | None, *, last: int = 4) -> str:
    """`worker.py:120 in run < scu.py:33 in send`: the innermost `last` frames, innermost first."""
    frames = traceback.extract_tb(trace)[-last:]
    return " < ".join(f"{Path(frame.filename).name}:{frame.lineno} in {frame.name}" for frame in reversed(frames))
