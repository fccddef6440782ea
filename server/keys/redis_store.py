"""Keys in Redis, for servers on several machines: one hash, changed by compare-and-set."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import astuple
from functools import partial
from typing import Final, cast

from pydantic import ValidationError

from server.errors import Unavailable
from server.storage.redis import answering, connect

from . import store
from .key import Key
from .session import Session, to_end
from .store import Keys, Sessions

MAX_TRIES: Final = 100
_answering = partial(answering, "key store")

# KEYS: the hash; ARGV: id, the record that was read, the new record
_CHANGE: Final = """
if redis.call('HGET', KEYS[1], ARGV[1]) ~= ARGV[2] then return 0 end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[3])
return 1
"""


class RedisKeyStore:
    """The key store on a Redis server. Raises `ValueError` for a URL of another form."""

    KEYS = "{0}:keys"  # hash: id → record as JSON
    SESSIONS = "{0}:sessions"  # hash: digest → the session's other fields as JSON

    def __init__(self, url: str, *, prefix: str = "lensrack") -> None:
        self._hash, self._sessions = self.KEYS.format(prefix), self.SESSIONS.format(prefix)
        self._redis = connect(url)
        self._change_script = self._redis.register_script(_CHANGE)

    def __repr__(self) -> str:
        return f"RedisKeyStore({self._hash!r})"

    def add(self, key: Key) -> None:
        with _answering():
            added = self._redis.hsetnx(self._hash, key.id, key.model_dump_json())
        if not added:
            raise store.exists(key.id)

    def change(self, key_id: str, become: Callable[[Key], Key]) -> Key:
        for _ in range(MAX_TRIES):
            with _answering():
                text = cast("str | None", self._redis.hget(self._hash, key_id))
            if text is None:
                raise store.unknown(key_id)
            changed = become(_key(text))
            with _answering():
                if self._change_script([self._hash], [key_id, text, changed.model_dump_json()]):
                    return changed
        raise Unavailable(f"other writers of the key store were faster {MAX_TRIES} times", code="store_unavailable")

    def list(self) -> Keys:
        with _answering():
            texts = cast("list[str]", self._redis.hvals(self._hash))
        return store.in_order([_key(text) for text in texts])

    def sessions(self) -> Sessions:
        with _answering():
            stored = cast("dict[str, str]", self._redis.hgetall(self._sessions))
        return [Session(digest, *json.loads(fields)) for digest, fields in stored.items()]

    def start_session(self, session: Session, now: float) -> None:
        over = to_end(self.sessions(), session, now)
        digest, *fields = astuple(session)
        with _answering(), self._redis.pipeline(transaction=True) as pipe:
            for ended in over:
                pipe.hdel(self._sessions, ended.digest)
            pipe.hset(self._sessions, digest, json.dumps(fields))
            pipe.execute()

    def end_session(self, digest: str) -> None:
        with _answering():
            self._redis.hdel(self._sessions, digest)

    def close(self) -> None:
        self._redis.close()


def _key(text: str) -> Key:
    try:
        return Key.model_validate_json(text)
    except ValidationError:
        raise Unavailable("the key store holds a key that cannot be read", code="store_unavailable") from None
