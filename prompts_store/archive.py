"""A whole store as files that any tool can copy: a folder, or the same files in one tar file.

    store.json                      the index: tasks, their versions, and the history of each alias
    tasks/<task>/<version>.safetensors

A bundle's name is its digest, and `store.json` contains its own, so damage is detected. The index is written last, and
bundles are never changed or removed: a folder without an index is an unfinished export, and an interrupted update
leaves the previous archive. Equal stores give equal archives.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from prompts_store import ANY, MAX_BUNDLE_BYTES, Bundle, StoreError, Target
from prompts_store.alias import MAX_HISTORY, AliasBook
from prompts_store.durable_files import new_file
from prompts_store.names import is_alias, is_task, is_version

FORMAT: Final = "lensrack-store-1"
INDEX: Final = "store.json"
MAX_INDEX_BYTES: Final = 256 * 2**20  # some millions of versions

State = tuple[Target, ...]
States = tuple[State, ...]  # the history of an alias, oldest first


class BadArchive(StoreError):
    """The archive is incomplete or damaged, or is not an archive of a store."""

    code = "bad_archive"


@dataclass(frozen=True)
class TaskIndex:
    """A task in an archive. `versions` maps each version to its size in bytes."""

    versions: Mapping[str, int]
    aliases: Mapping[str, States]


Index = dict[str, TaskIndex]


class Archive(Protocol):
    """The files of an archive, by the names in the module's docstring."""

    def read(self, name: str, max_bytes: int) -> bytes:
        """Return a file's bytes. Raises BadArchive when it is missing or longer than `max_bytes`."""

    def holds(self, name: str, sha256: str) -> bool:
        """Whether the file exists with this content."""

    def write(self, name: str, data: bytes) -> None:
        """Create or replace a file."""


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
        """Write a file whole or not at all, durable on return."""
        path = self._root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(path, path.parent) as file:
            file.write(data)


class Tar:
    """An archive as an open tar file, uncompressed, because bundles hardly compress."""

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
def open_archive(path: Path) -> Iterator[Archive]:
    """Open the archive at `path` for reading. Raises BadArchive, OSError."""
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
    """Write a tar file, which appears at `path` when it is complete."""
    with (
        new_file(path, path.parent) as file,
        tarfile.open(fileobj=file, mode="w:", format=tarfile.PAX_FORMAT) as tar,
    ):
        yield Tar(tar)


def file_name(task: str, version: str) -> str:
    return f"tasks/{task}/{version}.safetensors"


def read_bundle(archive: Archive, task: str, version: str, size: int) -> Bundle:
    """Read a bundle. Raises BadArchive when it is missing or too long, CorruptBundle when it is not that version."""
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
        digest, content = whole["digest"], whole["tasks"]
        if whole["format"] != FORMAT:
            raise BadArchive(f"{INDEX}: expected the format {FORMAT}, got {str(whole['format'])[:40]!r}")
        if _digest(content) != digest:
            raise BadArchive(f"{INDEX}: expected the digest {digest!s:.64}, got {_digest(content)}")
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
    """Read the history of an alias, checked by a store's rules for aliases."""
    if not 1 <= len(states) <= MAX_HISTORY:
        raise BadArchive(f"{INDEX}: expected 1 to {MAX_HISTORY} states of an alias, got {len(states)}")
    history = tuple(tuple(Target(version, float(weight)) for version, weight in state) for state in states)
    try:
        for state in history:
            AliasBook("").set("any", state, expect=ANY, versions=versions, now=0.0)
    except StoreError as error:
        raise BadArchive(f"{INDEX}: {error.detail}") from error
    return history


def _named(fits: Any, name: str) -> str:
    """Check a name, for it becomes a path and a key."""
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
    return BadArchive(
        f"expected {name} in the archive, got none: it is not an archive of a store, or its export did not finish"
    )
