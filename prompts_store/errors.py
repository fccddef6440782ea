"""Errors of bundles and stores: each has a stable code and a sentence.

    StoreError
    ├── BundleError           bad_bundle          the bytes or the parts are not a bundle
    ├── TaskNotFound          task_not_found
    ├── VersionNotFound       version_not_found
    ├── AliasNotFound         alias_not_found
    ├── BadAlias              bad_alias           a name, a weight or a list of targets that no alias can have
    ├── AliasConflict         alias_conflict      compare-and-set met another revision
    ├── VersionInUse          version_in_use      an alias still points at it
    ├── NoHistory             no_history          the alias has no earlier targets to roll back to
    ├── CorruptBundle         corrupt_bundle      the stored bytes do not match their version
    ├── CorruptAliases        corrupt_aliases     the stored aliases of a task cannot be read
    ├── BadStoreUrl           bad_store_url
    └── StoreUnavailable      store_unavailable   the disk or the server did not answer; the outcome may be unknown
        ├── KnownStale                            what is known was replaced, and what replaced it cannot be read
        └── StoreFull         disk_full

`detail` names the expected and the actual value. It never holds a path, a host or a password.
"""

from __future__ import annotations

from collections.abc import Sequence


class StoreError(Exception):
    """A failure with a stable machine-readable code."""

    code = "store_error"

    def __init__(self, detail: str, *, code: str | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.code = code or type(self).code


class BundleError(StoreError):
    code = "bad_bundle"


class TaskNotFound(StoreError):
    code = "task_not_found"

    def __init__(self, task: str) -> None:
        super().__init__(f"no task {excerpt(task)} in the store")
        self.task = task


class VersionNotFound(StoreError):
    code = "version_not_found"

    def __init__(self, task: str, version: str) -> None:
        super().__init__(f"task {excerpt(task)} has no version {excerpt(version)}")
        self.task, self.version = task, version


class AliasNotFound(StoreError):
    code = "alias_not_found"

    def __init__(self, task: str, alias: str) -> None:
        super().__init__(f"task {excerpt(task)} has no alias {excerpt(alias)}")
        self.task, self.alias = task, alias


class BadAlias(StoreError):
    code = "bad_alias"


class AliasConflict(StoreError):
    """`expected` and `actual` are revisions; None stands for an alias that does not exist."""

    code = "alias_conflict"

    def __init__(self, expected: int | None, actual: int | None) -> None:
        super().__init__(f"expected {_revision(expected)}, got {_revision(actual)}")
        self.expected, self.actual = expected, actual


class VersionInUse(StoreError):
    code = "version_in_use"

    def __init__(self, task: str, version: str, aliases: Sequence[str]) -> None:
        names = ", ".join(sorted(aliases))
        super().__init__(f"version {version} of task {task} is still the target of aliases: {names}")
        self.task, self.version, self.aliases = task, version, tuple(sorted(aliases))


class NoHistory(StoreError):
    code = "no_history"

    def __init__(self, task: str, alias: str) -> None:
        super().__init__(f"alias {alias} of task {task} has no earlier versions that still exist")
        self.task, self.alias = task, alias


class CorruptBundle(StoreError):
    code = "corrupt_bundle"


class CorruptAliases(StoreError):
    code = "corrupt_aliases"


class BadStoreUrl(StoreError):
    code = "bad_store_url"


class StoreUnavailable(StoreError):
    code = "store_unavailable"


class KnownStale(StoreUnavailable):
    """The cached value has been replaced in the store, and the store cannot be read for the new one."""


class StoreFull(StoreUnavailable):
    code = "disk_full"


def excerpt(value: object, limit: int = 80) -> str:
    """Return `value` for an error's text: escaped, and cut to `limit` characters, for it may be untrusted input."""
    text = repr(value[: limit + 1] if isinstance(value, str | bytes | list) else value)
    return text if len(text) <= limit else f"{text[:limit]}…"


def _revision(revision: int | None) -> str:
    return "no such alias" if revision is None else f"revision {revision}"
