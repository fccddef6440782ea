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

Each is an environment variable, read once at the start; `serve --host` and `--port` replace theirs. The SDK and the
command line read `LENSRACK_URL`, `LENSRACK_API_KEY`, `LENSRACK_TIMEOUT` (seconds) and `LENSRACK_RETRIES`.
"""
ERRORS_HEAD = """# Errors

Every failure is a problem document (RFC 9457, `application/problem+json`) with a stable `code`, a `status`, a `detail`
for people and the `request_id` that the server's log knows. `Retry-After` comes with 429 and 503. What Python raises is
drawn on the page of the [SDK](sdk.md); all of these are `ApiError`s.
"""
METRICS_HEAD = """# Metrics

At `/metrics`, for Prometheus. A `task` label is given to the busiest tasks only (`LENSRACK_METRICS_TASKS`), the rest
are `other`; a histogram has the series `_bucket`, `_sum` and `_count`.
"""


def settings() -> str:
    """One table for each of the file's own headings."""
    fields, parts = server_settings.Settings.model_fields, [SETTINGS_HEAD]
    for heading, names in _sections():
        rows = [
            (f"`LENSRACK_{name.upper()}`", _default(fields[name].default), fields[name].description or "")
            for name in names
        ]
        parts += [f"\n## {heading[0].upper()}{heading[1:]}\n", table(("setting", "default", "meaning"), rows)]
    return "\n".join(parts)


def _sections() -> list[tuple[str, list[str]]]:
    found: list[tuple[str, list[str]]] = []
    for line in inspect.getsource(server_settings.Settings).splitlines():
        if heading := re.match(r"    # --- (.+?) -+$", line):
            found.append((heading[1], []))
        elif (field := re.match(r"    (\w+): Annotated\[", line)) and field[1] in server_settings.Settings.model_fields:
            found[-1][1].append(field[1])
    return found


def _default(value: object) -> str:
    return "" if value is None or value == "" else f"`{value}`"


def codes() -> dict[str, int]:
    """Every code in the tree at the top of server/errors.py, and its status."""
    found: dict[str, int] = {}
    status = 0
    for line in (server_errors.__doc__ or "").splitlines():
        if kind := re.match(r"\s+[├└]── \w+ (\d{3})(.*)", line):
            status, line = int(kind[1]), kind[2]  # noqa: PLW2901 - the rest of the line is what follows
        elif not line.strip().startswith("│"):
            continue
        found |= dict.fromkeys(re.findall(r"\b[a-z]+(?:_[a-z]+)*\b", line.partition("+")[0]), status)
    return found


def raised() -> set[str]:
    """Every code that the server's source names where it raises something, and every error's own."""
    found = set()
    for file in [*(ROOT / "server").rglob("*.py"), *(ROOT / "prompts_store").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.keyword) and node.arg == "code" and isinstance(node.value, ast.Constant):
                found.add(node.value.value)
    return {code for code in found if isinstance(code, str)}


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
    """Name, meaning, kind and labels of all that server/observability/metrics.py defines, in its order."""
    found = []
    for value in vars(server_metrics).values():
        if hasattr(value, "_labelnames") and hasattr(value, "_documentation"):
            suffix = "_total" if value._type == "counter" else ""
            found.append((value._name + suffix, value._documentation, value._type, tuple(value._labelnames)))
    return found
