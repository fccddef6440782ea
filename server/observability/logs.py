"""Log lines as text or JSON, each with the id of its request or job.

The ids are context variables: a request's is set in its asyncio task and the threads it waits for, a job's during each
of its steps, also where several jobs share a thread. Passwords in URLs are removed from every line, and lines are cut
at MAX_CHARACTERS: pictures and bodies are never logged, but an exception may quote anything.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Final, Literal, TextIO

from . import tracing

Format = Literal["text", "json"]

REQUEST_ID: Final[ContextVar[str]] = ContextVar("request_id", default="")
JOB_ID: Final[ContextVar[str]] = ContextVar("job_id", default="")

REQUESTS: Final = "server.access"  # the logger of requests
MAX_CHARACTERS: Final = 16_384
_PASSWORD: Final = re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^/\s'\"]+@", re.IGNORECASE)
_CHATTY: Final = ("watchfiles", "uvicorn.error", "uvicorn.access", "httpx", "opentelemetry")


def start(level: str, format_: Format, stream: TextIO | None = None, *, requests: bool = False) -> None:
    """Log to `stream`, by default stderr. `requests`: the lines of requests, which are at DEBUG, whatever the level."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonLines() if format_ == "json" else TextLines())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False  # in no format
    logging.getLogger(REQUESTS).setLevel(logging.DEBUG if requests else logging.NOTSET)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)


@contextmanager
def context(variable: ContextVar[str], value: str) -> Iterator[None]:
    """Put this id of a request or job on all log lines of the block."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def fields(**values: Any) -> dict[str, Any]:
    """The `extra` argument of a logging call: fields that a JSON line has beside its message."""
    return {"fields": values}


class TextLines(logging.Formatter):
    """Text: time, level, logger, message; then the ids of request and job that the message does not contain."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s: %(message)s")
        self._second = (-1, "")  # cached: a busy server writes hundreds of lines a second

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802  # logging's name
        second = int(record.created)
        if self._second[0] != second:
            self._second = (second, time.strftime(self.default_time_format, self.converter(record.created)))
        return f"{self._second[1]},{int(record.msecs):03d}"  # the format of logging's default

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # logging's name
        message = super().formatMessage(record).replace("\n", "\\n")  # a client's text cannot forge a line
        ids = [value for value in (REQUEST_ID.get(), JOB_ID.get()) if value and value not in message]
        return f"{message} [{' '.join(ids)}]" if ids else message

    def format(self, record: logging.LogRecord) -> str:
        return _sanitize(super().format(record))


class JsonLines(logging.Formatter):
    """JSON: an object a line. `time` is UTC, RFC 3339."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _sanitize(record.getMessage()),
            **{key: _sanitize(value) if isinstance(value, str) else value for key, value in _fields(record).items()},
        }
        if record.exc_info:
            line["exception"] = _sanitize(self.formatException(record.exc_info))
        return json.dumps({**line, **_context_ids()}, ensure_ascii=False, default=str)


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    fields: dict[str, Any] = getattr(record, "fields", {})
    return fields


def _context_ids() -> dict[str, str]:
    span_ids = tracing.current_ids()
    ids = {
        "request_id": REQUEST_ID.get(),
        "job_id": JOB_ID.get(),
        "trace_id": span_ids[0] if span_ids else "",
        "span_id": span_ids[1] if span_ids else "",
    }
    return {key: value for key, value in ids.items() if value}


def _sanitize(text: str) -> str:
    """The text without passwords in URLs, cut at MAX_CHARACTERS."""
    clean = _PASSWORD.sub(r"\1***@", text) if "://" in text else text
    return clean if len(clean) <= MAX_CHARACTERS else f"{clean[:MAX_CHARACTERS]}… ({len(clean)} characters)"
