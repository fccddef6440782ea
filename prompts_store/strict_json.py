"""Unambiguous JSON: no duplicate keys, no NaN, bounded depth and numbers; and its canonical text."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any, NoReturn

from prompts_store.errors import BundleError, excerpt

MAX_DEPTH = 12
MAX_INTEGER = 2**63


def loads(text: str | bytes, what: str) -> Any:
    """Parse untrusted JSON. Raises BundleError, which names `what`, for malformed or ambiguous text."""
    try:
        source = text.decode("utf-8") if isinstance(text, bytes) else text
        value = json.loads(source, object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise BundleError(f"{what}: expected at most {MAX_DEPTH} levels of nesting, got far more") from None
    except ValueError as error:  # covers bad UTF-8, bad JSON and integers too long to convert
        raise BundleError(f"{what}: expected JSON in UTF-8, got: {error}") from None
    _check(value, what, MAX_DEPTH)
    return value


def dumps(value: object, what: str) -> str:
    """Return the canonical text: sorted keys, no spaces, no NaN, Unicode unescaped. Raises BundleError."""
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise BundleError(f"{what}: expected plain finite JSON values, got: {error}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        duplicate, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {excerpt(duplicate)} more than once in one object")
    return values


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name}, which is not a JSON number")


def _check(value: Any, what: str, depth: int) -> None:
    if isinstance(value, str):
        _check_text(value, what)
    elif isinstance(value, float) and not math.isfinite(value):
        raise BundleError(f"{what}: expected finite numbers, got one that overflows")
    elif isinstance(value, int) and abs(value) >= MAX_INTEGER:
        raise BundleError(f"{what}: expected integers below 2^63, got one of {value.bit_length()} bits")
    elif isinstance(value, dict | list):
        if depth == 0:
            raise BundleError(f"{what}: expected at most {MAX_DEPTH} levels of nesting, got more")
        for item in (*value, *value.values()) if isinstance(value, dict) else value:
            _check(item, what, depth - 1)


def _check_text(text: str, what: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise BundleError(f"{what}: expected Unicode text, got a lone surrogate in {excerpt(text)}") from None
