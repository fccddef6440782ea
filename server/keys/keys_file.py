"""Keys from a file that an operator's secret manager mounts: a JSON object a line, read again when the file changes.

    {"id": "ci", "scopes": ["predict"], "tasks": "acme-", "token": "…"}           a token, as it is
    {"id": "ops", "scopes": ["admin"], "hash": "sha256:…"}                        or the hash of one that was made here

Also `name`, `images_per_s`, `jobs_per_day`, `bytes_stored`, `weight`, and `expires_at`, such as "2027-01-31T00:00:00Z".
Empty lines and lines that begin with # are ignored.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Final

from pydantic import AwareDatetime, Field, ValidationError

from .key import Allowance, Key, KeyId, Scope, TaskPrefix, is_hash

MAX_BYTES: Final = 2**20
MIN_TOKEN: Final = 20


class BadKeysFile(ValueError):
    """The file cannot be used. The message names the line, never its contents."""


class _Line(Allowance):
    id: KeyId
    name: Annotated[str, Field(max_length=200)] = ""
    scopes: Annotated[frozenset[Scope], Field(min_length=1)]
    tasks: TaskPrefix = ""
    expires_at: AwareDatetime | None = None
    token: Annotated[str | None, Field(min_length=MIN_TOKEN, max_length=300, pattern=r"^[!-~]+$")] = None
    hash: str | None = None


class KeysFile:
    """The file at `path`."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def stamp(self) -> object:
        """Return a value that changes with the file, also when a link is moved; None where it cannot be read."""
        try:
            stat = os.stat(self._path)
        except OSError:
            return None
        return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns

    def read(self) -> list[tuple[Key, str | None]]:
        """Return each key, with its token where the file holds that. Raises BadKeysFile."""
        keys = [*self._lines()]
        ids = [key.id for key, _ in keys]
        if twice := sorted({id_ for id_ in ids if ids.count(id_) > 1}):
            raise BadKeysFile(f"LENSRACK_KEYS_FILE: expected each id once, got {twice[0]!r} twice")
        return keys

    def _lines(self) -> Iterator[tuple[Key, str | None]]:
        for number, text in enumerate(self._text().splitlines(), start=1):
            if text.strip() and not text.lstrip().startswith("#"):
                yield _key(text, number)

    def _text(self) -> str:
        try:
            data = self._path.read_bytes()
            if len(data) > MAX_BYTES:
                raise BadKeysFile(f"LENSRACK_KEYS_FILE: expected at most {MAX_BYTES} bytes, got {len(data)}")
            return data.decode()
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not text"
            raise BadKeysFile(f"LENSRACK_KEYS_FILE: expected a file that can be read: {reason}") from None


def _key(text: str, number: int) -> tuple[Key, str | None]:
    try:
        line = _Line.model_validate_json(text)
    except ValidationError as error:
        finding = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(map(str, finding["loc"])) or "line"
        raise BadKeysFile(f"LENSRACK_KEYS_FILE, line {number}: {where}: {finding['msg']}") from None
    if (line.token is None) == (line.hash is None):
        raise BadKeysFile(f"LENSRACK_KEYS_FILE, line {number}: expected either a token or a hash")
    if line.hash is not None and not is_hash(line.hash):
        raise BadKeysFile(
            f"LENSRACK_KEYS_FILE, line {number}: hash: expected sha256:…, as `keys create --for-file` prints it"
        )
    limits = {name: getattr(line, name) for name in Allowance.model_fields}
    key = Key(
        id=line.id,
        name=line.name,
        scopes=line.scopes,
        tasks=line.tasks,
        hash=line.hash or "",
        expires_at=line.expires_at.timestamp() if line.expires_at else None,
        allowance=Allowance(**limits),
    )
    return key, line.token
