"""Patterns of the names in a store. They must match the whole name: `$` would accept a trailing line break."""

from __future__ import annotations

import re
from typing import Final

TASK: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
ALIAS: Final = re.compile(r"[a-z][a-z0-9_-]{0,31}")
VERSION: Final = re.compile(r"[0-9a-f]{64}")
METHOD: Final = re.compile(r"[a-z][a-z0-9_]{0,63}")
TENSOR: Final = re.compile(r"[a-z0-9_.]{1,200}")


def is_task(name: object) -> bool:
    return isinstance(name, str) and TASK.fullmatch(name) is not None


def is_alias(name: object) -> bool:
    return isinstance(name, str) and ALIAS.fullmatch(name) is not None


def is_version(name: object) -> bool:
    return isinstance(name, str) and VERSION.fullmatch(name) is not None
