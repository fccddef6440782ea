"""Settings, error codes and metrics, as tables."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

from docs.generator.markdown import table
from lensrack import errors as client_errors
from lensrack._terminal import _NEXT
from lensrack.wire import Problem
from server import errors as server_errors
from server import settings as server_settings
from server.observability import metrics as server_metrics

ROOT = Path(__file__).resolve().parents[2]
SETTINGS_HEAD = """# Settings

Each setting is an environment variable, read once at the start; `serve --host` and `--port` override theirs.
The SDK and the command line read `LENSRACK_URL`, `LENSRACK_API_KEY`, `LENSRACK_TIMEOUT` (seconds) and
`LENSRACK_RETRIES`.
"""
ERRORS_HEAD = """# Errors

Every error is a problem document (RFC 9457, `application/problem+json`) with a stable `code`, a `status`, a readable
`detail` and the `request_id` that is in the server's log. 429 and 503 have a `Retry-After`. The page of the
[SDK](sdk.md) has the exceptions in Python; all of these are `ApiError`s.
"""
METRICS_HEAD = """# Metrics

The server has them at `/metrics`, for Prometheus. Only the busiest tasks have their own `task` label
(`LENSRACK_METRICS_TASKS`), the rest are `other`; a histogram has the series `_bucket`, `_sum` and `_count`.
"""


def settings() -> str:
    """Return one table for each heading of server/settings.py."""
    fields, parts = server_settings.Settings.model_fields, [SETTINGS_HEAD]
    for heading, names in _sections():
        rows = [
            (f"`LENSRACK_{name.upper()}`", _default(fields[name].default), fields[name].description or "")
            for name in names
        ]
        parts += [f"\n## {heading[0].upper()}{heading[1:]}\n", table(("setting", "default", "meaning"), rows)]
    return "\n".join(parts)


def _sections() -> list[tuple[str, list[str]]]:
    sections: list[tuple[str, list[str]]] = []
    for line in inspect.getsource(server_settings.Settings).splitlines():
        if heading := re.match(r"    # --- (.+?) -+$", line):
            sections.append((heading[1], []))
        elif (field := re.match(r"    (\w+): Annotated\[", line)) and field[1] in server_settings.Settings.model_fields:
            sections[-1][1].append(field[1])
    return sections


def _default(value: object) -> str:
    return "" if value is None or value == "" else f"`{value}`"


def codes() -> dict[str, int]:
    """Return every code in the tree at the top of server/errors.py with its status."""
    statuses: dict[str, int] = {}
    status = 0
    for line in (server_errors.__doc__ or "").splitlines():
        if kind := re.match(r"\s+[├└]── \w+ (\d{3})(.*)", line):
            status, line = int(kind[1]), kind[2]  # noqa: PLW2901 - the codes are in the rest of the line
        elif not line.strip().startswith("│"):
            continue
        statuses |= dict.fromkeys(re.findall(r"\b[a-z]+(?:_[a-z]+)*\b", line.partition("+")[0]), status)
    return statuses


def raised() -> set[str]:
    """Return every code that the server's source passes as the argument `code`."""
    names = set()
    for file in [*(ROOT / "server").rglob("*.py"), *(ROOT / "prompts_store").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.keyword) and node.arg == "code" and isinstance(node.value, ast.Constant):
                names.add(node.value.value)
    return {code for code in names if isinstance(code, str)}


def errors() -> str:
    rows = [(f"`{code}`", status, f"`{_raises(status)}`", _NEXT.get(code, "")) for code, status in codes().items()]
    return ERRORS_HEAD + "\n" + table(("code", "status", "the SDK raises", "what to do"), rows)


def _raises(status: int) -> str:
    problem = Problem(title="", status=status, code="")
    return type(client_errors.ApiError.of(problem)).__name__


def metrics() -> str:
    rows = []
    for name, meaning, kind, labels in known_metrics():
        rows.append((f"`{name}`", kind, ", ".join(f"`{label}`" for label in labels), meaning))
    return METRICS_HEAD + "\n" + table(("metric", "kind", "labels", "meaning"), rows)


def known_metrics() -> list[tuple[str, str, str, tuple[str, ...]]]:
    """Return name, meaning, kind and labels of every metric in server/observability/metrics.py, in its order."""
    rows = []
    for value in vars(server_metrics).values():
        if hasattr(value, "_labelnames") and hasattr(value, "_documentation"):
            suffix = "_total" if value._type == "counter" else ""
            rows.append((value._name + suffix, value._documentation, value._type, tuple(value._labelnames)))
    return rows
