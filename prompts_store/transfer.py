"""Exports a store to an archive and imports it again: for backup, and to move to another kind of store.

Bundles keep their bytes and so their versions. An alias is exported with its history, without the states whose versions
no longer exist; the import repeats these states one by one, so revisions and times are the new store's. Both can be
interrupted and started again: bundles that exist are verified and not written twice.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from prompts_store import AliasNotFound, Bundle, CorruptBundle, Store, StoreError, TaskNotFound, VersionNotFound
from prompts_store.archive import (
    INDEX,
    Archive,
    BadArchive,
    Folder,
    Index,
    State,
    States,
    TaskIndex,
    file_name,
    new_tar,
    open_archive,
    read_bundle,
    read_index,
    write_index,
)

MAX_TRIES: Final = 20  # times that a task may change while it is read


class AliasesDiffer(StoreError):
    """An alias has a different history in the store and in the archive."""

    code = "alias_conflict"


@dataclass(frozen=True)
class TransferCounts:
    """What an export or an import has handled; of `versions` bundles, `written` were new."""

    tasks: int
    versions: int
    written: int


# --- export -----------------------------------------------------------------------------------------------------------


def export_store(store: Store, path: Path) -> TransferCounts:
    """Export to the folder `path`, or to a file when its name ends in .tar; an earlier export is updated.

    Raises BadArchive for a folder with other files in it, CorruptBundle for a damaged version, OSError.
    """
    if path.suffix == ".tar":
        with new_tar(path) as tar:
            return _export(store, tar)
    _require_export_folder(path)
    return _export(store, Folder(path))


def _require_export_folder(path: Path) -> None:
    path.mkdir(parents=True, exist_ok=True)
    if others := sorted(entry.name for entry in path.iterdir() if entry.name not in (INDEX, "tasks")):
        raise BadArchive(f"expected an empty folder or an earlier export, got {others[0][:80]!r} in it")


def _export(store: Store, archive: Archive) -> TransferCounts:
    index: Index = {}
    written = 0
    for task in store.tasks():
        for _ in range(MAX_TRIES):
            try:
                index[task] = _snapshot(store, task)
                written += sum(_save_bundle(store, archive, task, version) for version in index[task].versions)
                break
            except (VersionNotFound, AliasNotFound):
                continue  # deleted while it was read: read the task again
            except TaskNotFound:
                index.pop(task, None)
                break
        else:
            raise StoreError(f"task {task}: versions were deleted {MAX_TRIES} times while it was exported")
    archive.write(INDEX, write_index(index))
    return TransferCounts(len(index), sum(len(entry.versions) for entry in index.values()), written)


def _snapshot(store: Store, task: str) -> TaskIndex:
    """Read aliases first: their targets are then among the versions, unless deleted between the two reads."""
    histories = {name: store.history(task, name) for name in store.aliases(task)}
    versions = {info.version: info.bytes for info in store.versions(task)}
    aliases = {name: _existing([alias.targets for alias in history], versions) for name, history in histories.items()}
    for name, history in histories.items():
        if not aliases[name] or aliases[name][-1] != history[-1].targets:
            _require_listed(store, task, name)
    if not versions:
        raise CorruptBundle(f"task {task}: expected versions that can be read, got damaged ones only")
    return TaskIndex(versions, aliases)


def _existing(states: Collection[State], versions: Collection[str]) -> States:
    return tuple(state for state in states if all(target.version in versions for target in state))


def _require_listed(store: Store, task: str, name: str) -> None:
    """Raise CorruptBundle for a damaged target: a store does not list it, yet its alias must not vanish silently."""
    for target in store.history(task, name)[-1].targets:
        store.get(task, target.version)
    raise VersionNotFound(task, name)  # the alias was changed meanwhile


def _save_bundle(store: Store, archive: Archive, task: str, version: str) -> bool:
    """Return whether the bundle had to be written."""
    name = file_name(task, version)
    if archive.holds(name, version):
        return False
    archive.write(name, store.get(task, version).data)
    return True


# --- import -----------------------------------------------------------------------------------------------------------


def import_store(store: Store, path: Path, *, overwrite: bool = False) -> TransferCounts:
    """Import the archive at `path`. Nothing is written unless the whole archive is intact and fits.

    Raises AliasesDiffer for an alias with another history in the store; with `overwrite` the alias takes the archive's
    targets. Raises BadArchive, CorruptBundle, StoreUnavailable, OSError.
    """
    with open_archive(path) as archive:
        index = read_index(archive)
        for _ in _bundles(archive, index):
            pass  # each one is read and verified
        _require_fitting(store, index, overwrite)
        written = sum(_put_bundle(store, bundle) for bundle in _bundles(archive, index))
    for task, name, states in _aliases(index):
        _import_alias(store, task, name, states, overwrite)
    return TransferCounts(len(index), sum(len(entry.versions) for entry in index.values()), written)


def _bundles(archive: Archive, index: Index) -> Iterator[Bundle]:
    for task, entry in index.items():
        for version, size in entry.versions.items():
            yield read_bundle(archive, task, version, size)


def _aliases(index: Index) -> Iterator[tuple[str, str, States]]:
    return ((task, name, states) for task, entry in index.items() for name, states in entry.aliases.items())


def _require_fitting(store: Store, index: Index, overwrite: bool) -> None:
    for task, name, states in _aliases(index):
        _missing(task, name, _current(store, task, name)[0], states, overwrite)


def _put_bundle(store: Store, bundle: Bundle) -> bool:
    """Return whether the bundle had to be put; it is read back in any case."""
    task, version = bundle.manifest.task, bundle.version
    try:
        store.get(task, version)
    except (TaskNotFound, VersionNotFound, CorruptBundle):
        store.put(bundle)
        store.get(task, version)
        return True
    return False


def _import_alias(store: Store, task: str, name: str, archived: States, overwrite: bool) -> None:
    stored, revision = _current(store, task, name)
    for state in _missing(task, name, stored, archived, overwrite):
        revision = store.set_alias(task, name, state, expect=revision).revision


def _current(store: Store, task: str, name: str) -> tuple[States, int | None]:
    """Return the history of an alias in the store, and its revision."""
    try:
        history = store.history(task, name)
    except (TaskNotFound, AliasNotFound):
        return (), None
    return tuple(alias.targets for alias in history), history[-1].revision


def _missing(task: str, name: str, stored: States, archived: States, overwrite: bool) -> States:
    """Return the states that the alias in the store still lacks. Raises AliasesDiffer."""
    if len(stored) <= len(archived) and all(map(_same, stored, archived)):
        return archived[len(stored) :]
    if _same(stored[-1], archived[-1]):
        return ()
    if not overwrite:
        detail = f"task {task}: expected alias {name} to be absent or as in the archive, got other targets"
        raise AliasesDiffer(detail)
    return archived[-1:]


def _same(left: State, right: State) -> bool:
    """Compare targets; weights within rounding, because every change scales them again."""
    return len(left) == len(right) and all(
        a.version == b.version and math.isclose(a.weight, b.weight, rel_tol=1e-9)
        for a, b in zip(left, right, strict=True)
    )
