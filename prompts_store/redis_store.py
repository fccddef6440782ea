"""A store in Redis, shared by any number of servers and workers. Every key begins with a prefix:

    <prefix>:tasks                        set of task names
    <prefix>:stamps                       hash task → stamp, which every change replaces; outlives the task
    <prefix>:task:<task>:versions         hash version → {"bytes", "manifest"}
    <prefix>:task:<task>:aliases          the alias book, as JSON
    <prefix>:task:<task>:bundle:<version> the file
    <prefix>:changes                      channel: the names of tasks that changed

A change reads a task with its stamp, is computed in Python, and is committed by a script that refuses if the stamp has
changed; then it starts again. The writer draws the stamp at random, so a commit whose reply was lost can be sent again
and still counts once. Pub/sub may drop messages; comparing all stamps at intervals finds the changes that it dropped.
"""

from __future__ import annotations

import json
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import redis

from prompts_store.alias import ANY, Alias, AliasBook, Expect, Targets
from prompts_store.broadcast import STOP_CHECK_S
from prompts_store.bundle import Bundle
from prompts_store.errors import (
    BundleError,
    CorruptBundle,
    StoreFull,
    StoreUnavailable,
    TaskNotFound,
    VersionInUse,
    VersionNotFound,
)
from prompts_store.manifest import Manifest
from prompts_store.names import is_task, is_version
from prompts_store.redis_connection import connect, failure
from prompts_store.store import Change, VersionInfo, newest_first

log = logging.getLogger(__name__)
T = TypeVar("T")

MAX_ATTEMPTS: Final = 1000  # commits lost to other writers of the task before giving up; one writer always wins

# KEYS: stamps, tasks, aliases, versions, bundle…   ARGV: task, stamp read, new stamp, aliases, channel, version…
# Deletions come first: out of memory, Redis refuses a script whose first write needs some, and no later one.
_COMMIT: Final = """
local stamp = redis.call('HGET', KEYS[1], ARGV[1]) or ''
if stamp == ARGV[3] then return 1 end
if stamp ~= ARGV[2] then return 0 end
for i = 6, #ARGV do
  redis.call('HDEL', KEYS[4], ARGV[i])
  redis.call('DEL', KEYS[i - 1])
end
if ARGV[4] ~= '' then redis.call('SET', KEYS[3], ARGV[4]) end
if redis.call('EXISTS', KEYS[4]) == 0 then redis.call('SREM', KEYS[2], ARGV[1]) end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[3])
redis.call('PUBLISH', ARGV[5], ARGV[1])
return 1
"""


@dataclass
class _Task:
    """A task as it was at `stamp`, with the change being made to it."""

    stamp: bytes
    book: AliasBook
    versions: frozenset[str]
    removed: tuple[str, ...] = ()


class RedisStore:
    """The store contract over a Redis server (6.2 or newer, not a cluster: a change touches several keys)."""

    def __init__(self, url: str, *, prefix: str = "lensrack:store", reconcile_s: float = 5.0) -> None:
        self._prefix, self._reconcile_s = prefix, reconcile_s
        self._stamps, self._names, self._channel = f"{prefix}:stamps", f"{prefix}:tasks", f"{prefix}:changes"
        self._redis = connect(url)
        self._commit = self._redis.register_script(_COMMIT)

    def put(self, bundle: Bundle) -> str:
        task = bundle.manifest.task
        kept = Bundle.verified(bundle.data, task=task, version=bundle.version)
        info = json.dumps({"bytes": len(kept.data), "manifest": kept.manifest.to_json()})
        with _server(), self._redis.pipeline(transaction=True) as pipe:
            if self._stored(task, kept.version) == (True, kept.data):
                return kept.version
            pipe.set(self._bundle_key(task, kept.version), kept.data)
            pipe.hset(self._key(task, "versions"), kept.version, info)
            pipe.sadd(self._names, task)
            pipe.hset(self._stamps, task, secrets.token_hex(8))
            pipe.publish(self._channel, task)
            pipe.execute()
        return kept.version

    def get(self, task: str, version: str) -> Bundle:
        with _server():
            listed, data = self._stored(task, version) if is_task(task) and is_version(version) else (False, None)
            if not listed:
                self._read(task)
                raise VersionNotFound(task, version)
        if data is None:
            raise CorruptBundle(f"task {task}: expected the bytes of version {version}, got none")
        return Bundle.verified(data, task=task, version=version)

    def tasks(self) -> list[str]:
        with _server():
            return sorted(map(_text, self._redis.smembers(self._names)))

    def versions(self, task: str) -> list[VersionInfo]:
        with _server():
            stored = self._redis.hgetall(self._key(task, "versions")) if is_task(task) else {}
        if not stored:
            raise TaskNotFound(task)
        infos = [_info(task, _text(version), text) for version, text in stored.items()]
        return newest_first(info for info in infos if info is not None)

    def aliases(self, task: str) -> dict[str, Alias]:
        return self._read(task).book.current()

    def set_alias(self, task: str, alias: str, targets: Targets, *, expect: Expect = ANY) -> Alias:
        return self._change(
            task, lambda t: t.book.set(alias, targets, expect=expect, versions=t.versions, now=time.time())
        )

    def delete_alias(self, task: str, alias: str, *, expect: Expect = ANY) -> None:
        self._change(task, lambda t: t.book.delete(alias, expect=expect))

    def history(self, task: str, alias: str) -> list[Alias]:
        return self._read(task).book.history(alias)

    def rollback(self, task: str, alias: str, *, expect: Expect = ANY) -> Alias:
        return self._change(task, lambda t: t.book.rollback(alias, expect=expect, versions=t.versions, now=time.time()))

    def delete_version(self, task: str, version: str) -> None:
        def delete(t: _Task) -> None:
            if version not in t.versions:
                raise VersionNotFound(task, version)
            if users := t.book.users_of(version):
                raise VersionInUse(task, version, users)
            t.removed = (version,)

        self._change(task, delete)

    def delete_task(self, task: str) -> None:
        def delete(t: _Task) -> None:
            t.book.clear()
            t.removed = tuple(t.versions)

        self._change(task, delete)

    def close(self) -> None:
        self._redis.close()

    def __repr__(self) -> str:
        return f"RedisStore(prefix={self._prefix!r})"

    # --- one task -----------------------------------------------------------------------------------------------------

    def _key(self, task: str, part: str) -> str:
        return f"{self._prefix}:task:{task}:{part}"

    def _bundle_key(self, task: str, version: str) -> str:
        return self._key(task, f"bundle:{version}")

    def _stored(self, task: str, version: str) -> tuple[bool, bytes | None]:
        """Return whether the version is listed, and its bytes."""
        with self._redis.pipeline(transaction=True) as pipe:
            pipe.hexists(self._key(task, "versions"), version)
            pipe.get(self._bundle_key(task, version))
            listed, data = pipe.execute()
        return bool(listed), data

    def _read(self, task: str) -> _Task:
        """Read a task in one transaction. Raises TaskNotFound."""
        if not is_task(task):
            raise TaskNotFound(task)
        with _server(), self._redis.pipeline(transaction=True) as pipe:
            pipe.hget(self._stamps, task)
            pipe.get(self._key(task, "aliases"))
            pipe.hkeys(self._key(task, "versions"))
            stamp, book, versions = pipe.execute()
        if not versions:
            raise TaskNotFound(task)
        return _Task(stamp or b"", AliasBook.from_json(task, book or b""), frozenset(v.decode() for v in versions))

    def _change(self, task: str, decide: Callable[[_Task], T]) -> T:
        """Read, decide and commit; start again whenever another writer of the task was faster."""
        for _ in range(MAX_ATTEMPTS):
            state = self._read(task)
            result = decide(state)
            if self._committed(task, state):
                return result
        raise StoreUnavailable(f"task {task}: other writers were faster {MAX_ATTEMPTS} times in a row")

    def _committed(self, task: str, state: _Task) -> bool:
        keys = [self._stamps, self._names, self._key(task, "aliases"), self._key(task, "versions")]
        keys += [self._bundle_key(task, version) for version in state.removed]
        new = secrets.token_hex(8)
        arguments: list[str | bytes] = [task, state.stamp, new, state.book.to_json(), self._channel, *state.removed]
        with _server():
            return bool(self._commit(keys=keys, args=arguments))

    # --- watching -----------------------------------------------------------------------------------------------------

    def watch(self, stop: threading.Event) -> Iterator[Change]:
        with _server():
            channel = self._subscribed()
            return self._changes(stop, channel, self._all_stamps())

    def _subscribed(self) -> redis.client.PubSub:
        channel: redis.client.PubSub = self._redis.pubsub(ignore_subscribe_messages=True)  # type: ignore[no-untyped-call]  # redis-py leaves pubsub untyped
        channel.subscribe(self._channel)
        return channel

    def _all_stamps(self) -> dict[str, str]:
        return {_text(task): _text(stamp) for task, stamp in self._redis.hgetall(self._stamps).items()}

    def _stamp(self, task: str) -> str:
        return _text(self._redis.hget(self._stamps, task) or b"")

    def _changes(self, stop: threading.Event, channel: redis.client.PubSub, seen: dict[str, str]) -> Iterator[Change]:
        """Messages say which task to check; comparing stamps tells what changed, dropped messages included."""
        due = time.monotonic() + self._reconcile_s
        with closing(channel):
            while not stop.is_set():
                if time.monotonic() >= due:  # asked first: a steady stream of messages must not postpone it
                    with _server():
                        now = self._all_stamps()
                    due = time.monotonic() + self._reconcile_s
                    gone = sorted(seen.keys() - now.keys())  # the server was flushed, or lost what it held
                    changed = sorted(task for task, stamp in now.items() if stamp != seen.get(task))
                    seen = now
                    yield from map(Change, [*gone, *changed])
                    continue
                with _server():
                    message = channel.get_message(timeout=STOP_CHECK_S)
                if message is not None:
                    yield from self._announced(_text(message["data"]), seen)

    def _announced(self, task: str, seen: dict[str, str]) -> Iterator[Change]:
        """Report a task that a message names, unless its stamp was `seen`; also where the stamp cannot be read."""
        try:
            with _server():
                stamp = self._stamp(task)
        except StoreUnavailable:
            yield Change(task)
            raise
        if stamp != seen.get(task):
            seen[task] = stamp
            yield Change(task)


# --- the server -------------------------------------------------------------------------------------------------------


@contextmanager
def _server() -> Iterator[None]:
    """Translate an error of Redis or the network into a StoreError that names neither host nor password."""
    try:
        yield
    except redis.exceptions.OutOfMemoryError:
        raise StoreFull("the Redis store is out of memory, and its policy frees none") from None
    except (redis.exceptions.RedisError, OSError) as error:
        raise StoreUnavailable(failure("store", error)) from None


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _info(task: str, version: str, text: bytes | str) -> VersionInfo | None:
    try:
        stored: dict[str, Any] = json.loads(text)
        return VersionInfo(version, int(stored["bytes"]), Manifest.from_json(stored["manifest"]))
    except (BundleError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("task %s: version %s is damaged and not listed: %s", task, version, type(error).__name__)
        return None
