"""Log lines, for people or for machines, each with the request or the job that it is about.

What a line is about is kept in context variables: a request's for its asyncio task and the threads it waits for, a
job's for every step that it makes, also where several jobs take turns in one thread. Passwords in URLs are taken out of
every line, and no line grows without bound: pictures and bodies are never logged, but an exception may quote anything.
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

MOST_CHARACTERS: Final = 16_384
_PASSWORD: Final = re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^/\s'\"]+@", re.IGNORECASE)
_CHATTY: Final = ("watchfiles", "uvicorn.error", "uvicorn.access", "httpx", "opentelemetry")


def start(level: str, format_: Format, stream: TextIO | None = None) -> None:
    """Log to `stream`, by default stderr."""
    out = logging.StreamHandler(stream or sys.stderr)
    out.setFormatter(JsonLines() if format_ == "json" else Lines())
    logging.basicConfig(level=level.upper(), handlers=[out], force=True)
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False  # no line tells them: not asked for
    for chatty in _CHATTY:
        logging.getLogger(chatty).setLevel(logging.WARNING)


@contextmanager
def about(variable: ContextVar[str], value: str) -> Iterator[None]:
    """Lines inside are about this request or job."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def facts(**known: Any) -> dict[str, Any]:
    """For `extra`: fields of a line that machines want by themselves, beside the sentence."""
    return {"facts": known}


class Lines(logging.Formatter):
    """For people: time, level, who says it, what; then the request or the job, where the sentence does not name it."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s: %(message)s")
        self._second = (-1, "")  # the last one and its text: a busy server writes hundreds of lines in each

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802  # logging's name
        second = int(record.created)
        if self._second[0] != second:
            self._second = (second, time.strftime(self.default_time_format, self.converter(record.created)))
        return f"{self._second[1]},{int(record.msecs):03d}"  # as the default writes it

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # logging's name
        said = super().formatMessage(record).replace("\n", "\\n")  # what a caller sent cannot begin a line of its own
        about_what = [value for value in (REQUEST_ID.get(), JOB_ID.get()) if value and value not in said]
        return f"{said} [{' '.join(about_what)}]" if about_what else said

    def format(self, record: logging.LogRecord) -> str:
        return _safe(super().format(record))


class JsonLines(logging.Formatter):
    """For machines: a JSON object a line. `time` is UTC, RFC 3339."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _safe(record.getMessage()),
            **{key: _safe(value) if isinstance(value, str) else value for key, value in _facts(record).items()},
        }
        if record.exc_info:
            line["exception"] = _safe(self.formatException(record.exc_info))
        return json.dumps({**line, **_whose()}, ensure_ascii=False, default=str)


def _facts(record: logging.LogRecord) -> dict[str, Any]:
    found: dict[str, Any] = getattr(record, "facts", {})
    return found


def _whose() -> dict[str, str]:
    trace = tracing.ids()
    known = {
        "request_id": REQUEST_ID.get(),
        "job_id": JOB_ID.get(),
        "trace_id": trace[0] if trace else "",
        "span_id": trace[1] if trace else "",
    }
    return {key: value for key, value in known.items() if value}


def _safe(text: str) -> str:
    """Without passwords in URLs, and not longer than a line may be."""
    clean = _PASSWORD.sub(r"\1***@", text) if "://" in text else text
    return clean if len(clean) <= MOST_CHARACTERS else f"{clean[:MOST_CHARACTERS]}… ({len(clean)} characters)"
