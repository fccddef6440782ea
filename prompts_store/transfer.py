"""A store into an archive and back: backup, and the way from one kind of store to another.

Bundles keep their bytes and so their versions. Of an alias goes along where it points and has pointed, as far as those
versions still exist; the new store is told so state by state, as if it happened again, so revisions and times are its
own. Both ways can be broken off and started again: what is there already is verified and not written twice.
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
    opened,
    read_bundle,
    read_index,
    write_index,
)

MAX_TRIES: Final = 20  # times that a task may change while it is read


class AliasesDiffer(StoreError):
    """An alias of the store has gone another way than that of the archive."""

    code = "alias_conflict"


@dataclass(frozen=True)
class Transferred:
    """Of `versions` bundles, `written` were not there yet."""

    tasks: int
    versions: int
    written: int


# --- export -----------------------------------------------------------------------------------------------------------


def export_store(store: Store, path: Path) -> Transferred:
    """Into the folder `path`, or into a file when its name ends in .tar; an earlier export is brought up to date.

    Raises BadArchive for a folder with other things in it, CorruptBundle for what is damaged in the store, OSError.
    """
    if path.suffix == ".tar":
        with new_tar(path) as tar:
            return _exported(store, tar)
    _require_ours(path)
    return _exported(store, Folder(path))


def _require_ours(path: Path) -> None:
    path.mkdir(parents=True, exist_ok=True)
    if strange := sorted(entry.name for entry in path.iterdir() if entry.name not in (INDEX, "tasks")):
        raise BadArchive(f"expected an empty folder or an earlier export, found {strange[0][:80]!r} in it")


def _exported(store: Store, archive: Archive) -> Transferred:
    index: Index = {}
    written = 0
    for task in store.tasks():
        for _ in range(MAX_TRIES):
            try:
                index[task] = _snapshot(store, task)
                written += sum(_saved(store, archive, task, version) for version in index[task].versions)
                break
            except (VersionNotFound, AliasNotFound):
                continue  # deleted while it was read: look again at what there is
            except TaskNotFound:
                index.pop(task, None)
                break
        else:
            raise StoreError(f"task {task}: versions were deleted {MAX_TRIES} times while it was exported")
    archive.write(INDEX, write_index(index))
    return Transferred(len(index), sum(len(entry.versions) for entry in index.values()), written)


def _snapshot(store: Store, task: str) -> TaskIndex:
    """Aliases first: what they point at is then among the versions, unless it was deleted between the two looks."""
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
    """A store does not list what is damaged; an alias must not vanish from a backup because of that."""
    for target in store.history(task, name)[-1].targets:
        store.get(task, target.version)
    raise VersionNotFound(task, name)  # it was moved meanwhile


def _saved(store: Store, archive: Archive, task: str, version: str) -> bool:
    """Whether the bundle had to be written."""
    name = file_name(task, version)
    if archive.holds(name, version):
        return False
    archive.write(name, store.get(task, version).data)
    return True


# --- import -----------------------------------------------------------------------------------------------------------


def import_store(store: Store, path: Path, *, overwrite: bool = False) -> Transferred:
    """Add what the archive at `path` holds. Nothing is written unless all of it is whole and fits.

    An alias of the store that has gone another way is AliasesDiffer; with `overwrite` it moves to where the archive's
    points. Raises BadArchive, CorruptBundle, StoreUnavailable, OSError.
    """
    with opened(path) as archive:
        index = read_index(archive)
        for _ in _bundles(archive, index):
            pass  # each one is read and verified
        _require_fitting(store, index, overwrite)
        written = sum(_stored(store, bundle) for bundle in _bundles(archive, index))
    for task, name, states in _aliases(index):
        _follow(store, task, name, states, overwrite)
    return Transferred(len(index), sum(len(entry.versions) for entry in index.values()), written)


def _bundles(archive: Archive, index: Index) -> Iterator[Bundle]:
    for task, entry in index.items():
        for version, size in entry.versions.items():
            yield read_bundle(archive, task, version, size)


def _aliases(index: Index) -> Iterator[tuple[str, str, States]]:
    return ((task, name, states) for task, entry in index.items() for name, states in entry.aliases.items())


def _require_fitting(store: Store, index: Index, overwrite: bool) -> None:
    for task, name, states in _aliases(index):
        _missing(task, name, _current(store, task, name)[0], states, overwrite)


def _stored(store: Store, bundle: Bundle) -> bool:
    """Whether the bundle had to be put; read back in any case."""
    task, version = bundle.manifest.task, bundle.version
    try:
        store.get(task, version)
    except (TaskNotFound, VersionNotFound, CorruptBundle):
        store.put(bundle)
        store.get(task, version)
        return True
    return False


def _follow(store: Store, task: str, name: str, wanted: States, overwrite: bool) -> None:
    found, revision = _current(store, task, name)
    for state in _missing(task, name, found, wanted, overwrite):
        revision = store.set_alias(task, name, state, expect=revision).revision


def _current(store: Store, task: str, name: str) -> tuple[States, int | None]:
    """Where the alias of the store has pointed, and its revision."""
    try:
        history = store.history(task, name)
    except (TaskNotFound, AliasNotFound):
        return (), None
    return tuple(alias.targets for alias in history), history[-1].revision


def _missing(task: str, name: str, found: States, wanted: States, overwrite: bool) -> States:
    """What the alias has still to go through to have gone the archive's way."""
    if len(found) <= len(wanted) and all(map(_same, found, wanted)):
        return wanted[len(found) :]
    if _same(found[-1], wanted[-1]):
        return ()
    if not overwrite:
        detail = f"task {task}: expected alias {name} absent or as in the archive, found it pointing elsewhere"
        raise AliasesDiffer(detail)
    return wanted[-1:]


def _same(one: State, other: State) -> bool:
    """Shares are scaled whenever they are set, which may move their last digit."""
    return len(one) == len(other) and all(
        a.version == b.version and math.isclose(a.weight, b.weight, rel_tol=1e-9)
        for a, b in zip(one, other, strict=True)
    )
