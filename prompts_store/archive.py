"""A whole store as files that any tool can copy: a folder, or the same as one tar file.

    store.json                      what there is: tasks, their versions, and where each alias has pointed
    tasks/<task>/<version>.safetensors

A bundle's name is its digest, and `store.json` carries its own, so whatever was damaged on the way is noticed. It is
written last, and bundles are never changed or removed: a folder without it is an export that has not been finished, and
an update that broke off leaves the archive of before. Equal stores give equal archives.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import secrets
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from prompts_store import ANY, MAX_BUNDLE_BYTES, Bundle, StoreError, Target
from prompts_store.alias import MAX_HISTORY, AliasBook
from prompts_store.names import is_alias, is_task, is_version

FORMAT: Final = "lensrack-store-1"
INDEX: Final = "store.json"
MAX_INDEX_BYTES: Final = 256 * 2**20  # some millions of versions

State = tuple[Target, ...]
States = tuple[State, ...]  # where an alias has pointed, oldest first


class BadArchive(StoreError):
    """The archive is not whole, or not what was exported."""

    code = "bad_archive"


@dataclass(frozen=True)
class TaskIndex:
    """What an archive holds of a task. `versions`, by name: the size of each in bytes."""

    versions: Mapping[str, int]
    aliases: Mapping[str, States]


Index = dict[str, TaskIndex]


class Archive(Protocol):
    """The files of an archive, by the names given above."""

    def read(self, name: str, max_bytes: int) -> bytes:
        """Raises BadArchive when there is no such file, or a longer one."""

    def holds(self, name: str, sha256: str) -> bool:
        """Whether this very content is there already."""

    def write(self, name: str, data: bytes) -> None:
        """A new file, or another content for it."""


class Folder:
    """An archive as a folder."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def read(self, name: str, max_bytes: int) -> bytes:
        try:
            with open(self._root / name, "rb") as file:
                return _whole(file.read(max_bytes + 1), name, max_bytes)
        except FileNotFoundError:
            raise _absent(name) from None

    def holds(self, name: str, sha256: str) -> bool:
        try:
            return hashlib.sha256((self._root / name).read_bytes()).hexdigest() == sha256
        except FileNotFoundError:
            return False

    def write(self, name: str, data: bytes) -> None:
        """Whole or not at all, and durable on return."""
        path = self._root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.parent / f".new-{secrets.token_hex(8)}"
        try:
            with open(new, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(new, path)
        except BaseException:
            new.unlink(missing_ok=True)
            raise
        _sync(path.parent)


class Tar:
    """An archive as an open tar file without compression, which bundles hardly take."""

    def __init__(self, tar: tarfile.TarFile) -> None:
        self._tar = tar

    def read(self, name: str, max_bytes: int) -> bytes:
        try:
            file = self._tar.extractfile(name)  # a member's data, never a path of the disk
        except KeyError:
            file = None
        if file is None:
            raise _absent(name)
        return _whole(file.read(max_bytes + 1), name, max_bytes)

    def holds(self, name: str, sha256: str) -> bool:
        return False  # a tar file is written from beginning to end

    def write(self, name: str, data: bytes) -> None:
        member = tarfile.TarInfo(name)  # no owner, no time: equal stores give equal bytes
        member.size = len(data)
        self._tar.addfile(member, io.BytesIO(data))


@contextmanager
def opened(path: Path) -> Iterator[Archive]:
    """The archive at `path` to read. Raises BadArchive, OSError."""
    if path.is_dir():
        yield Folder(path)
        return
    try:
        with tarfile.open(path, "r:") as tar:
            yield Tar(tar)
    except tarfile.TarError as error:
        raise BadArchive(f"expected a folder or a tar file without compression, got {error}") from error


@contextmanager
def new_tar(path: Path) -> Iterator[Tar]:
    """A tar file that appears at `path` when it is whole."""
    new = path.with_name(f"{path.name}.new-{secrets.token_hex(4)}")
    try:
        with open(new, "xb") as file:
            with tarfile.open(fileobj=file, mode="w:", format=tarfile.PAX_FORMAT) as tar:
                yield Tar(tar)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
        _sync(path.parent)
    finally:
        new.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_name(task: str, version: str) -> str:
    return f"tasks/{task}/{version}.safetensors"


def read_bundle(archive: Archive, task: str, version: str, size: int) -> Bundle:
    """Raises BadArchive when it is absent or longer, CorruptBundle when it is not what the index says."""
    return Bundle.verified(archive.read(file_name(task, version), size), task=task, version=version)


# --- the index --------------------------------------------------------------------------------------------------------


def write_index(index: Index) -> bytes:
    content = {task: _to_json(entry) for task, entry in sorted(index.items())}
    whole = {"format": FORMAT, "digest": _digest(content), "tasks": content}
    return json.dumps(whole, indent=1, sort_keys=True).encode() + b"\n"


def read_index(archive: Archive) -> Index:
    """Raises BadArchive."""
    data = archive.read(INDEX, MAX_INDEX_BYTES)
    try:
        whole = json.loads(data)
        told, content = whole["digest"], whole["tasks"]
        if whole["format"] != FORMAT:
            raise BadArchive(f"{INDEX}: expected the format {FORMAT}, got {str(whole['format'])[:40]!r}")
        if _digest(content) != told:
            raise BadArchive(f"{INDEX}: expected the digest {told!s:.64}, got {_digest(content)}")
        return {_named(is_task, task): _from_json(entry) for task, entry in content.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadArchive(f"{INDEX}: expected an index of a store, got {type(error).__name__}") from error


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _to_json(entry: TaskIndex) -> dict[str, Any]:
    states = {name: [_weights(state) for state in states] for name, states in sorted(entry.aliases.items())}
    return {"versions": dict(sorted(entry.versions.items())), "aliases": states}


def _weights(state: Iterable[Target]) -> list[list[str | float]]:
    return [[target.version, target.weight] for target in state]


def _from_json(entry: Mapping[str, Any]) -> TaskIndex:
    versions = {_named(is_version, version): _size(size) for version, size in entry["versions"].items()}
    aliases = {_named(is_alias, name): _states(states, versions) for name, states in entry["aliases"].items()}
    if not versions:
        raise BadArchive(f"{INDEX}: expected at least one version of each task, got none")
    return TaskIndex(versions, aliases)


def _states(states: Any, versions: Mapping[str, int]) -> States:
    """Checked by the rules that a store has for aliases."""
    if not 1 <= len(states) <= MAX_HISTORY:
        raise BadArchive(f"{INDEX}: expected 1 to {MAX_HISTORY} states of an alias, got {len(states)}")
    read = tuple(tuple(Target(version, float(weight)) for version, weight in state) for state in states)
    try:
        for state in read:
            AliasBook("").set("any", state, expect=ANY, versions=versions, now=0.0)
    except StoreError as error:
        raise BadArchive(f"{INDEX}: {error.detail}") from error
    return read


def _named(fits: Any, name: str) -> str:
    """Names become paths and keys; nothing else may."""
    if not fits(name):
        raise BadArchive(f"{INDEX}: expected the name of a task, a version or an alias, got {name[:80]!r}")
    return name


def _size(size: Any) -> int:
    if type(size) is not int or not 0 < size <= MAX_BUNDLE_BYTES:
        raise BadArchive(f"{INDEX}: expected a bundle of 1 to {MAX_BUNDLE_BYTES} bytes, got {str(size)[:40]}")
    return size


def _whole(data: bytes, name: str, max_bytes: int) -> bytes:
    if len(data) > max_bytes:
        raise BadArchive(f"{name}: expected at most {max_bytes} bytes, got more")
    return data


def _absent(name: str) -> BadArchive:
    return BadArchive(f"expected {name} in the archive, found none: it is not one, or its export was not finished")
