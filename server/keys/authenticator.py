"""The keys that are known at this moment, and whose a token is.

    token ─► seen before? ── yes ─► its key, if that still has the hash which the token matched
                └─ no ─► its id ─► the key's hash ─► scrypt, one at a time ─► remembered under a keyed digest

The store and the file are looked at again when what was read is older than FRESH_S, so that a revocation or a rotation
holds everywhere within that time and without a restart. While the store is away the keys that were known go on, and who
asks waits PATIENCE_S for it at most, once.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from server.clock import WallClock
from server.errors import QueueFull, ServiceError

from .key import Key, id_of, matches
from .keys_file import BadKeysFile, KeysFile
from .store import KeyStore

log = logging.getLogger(__name__)

FRESH_S: Final = 1.0
PATIENCE_S: Final = 2.0  # to look a host's name up alone may take many seconds when the host has gone
MISS_S: Final = 0.1  # an id that is not known may have been made a moment ago
REMEMBERED: Final = 10_000  # tokens that matched, and as many that did not
WAITING: Final = 32  # tokens that wait for their scrypt; beyond that they are sent away

_Seen = OrderedDict[tuple[bytes, str], None]


@dataclass(frozen=True)
class _Known:
    """All keys by id, and those whose tokens the file tells by the tokens' digests."""

    keys: Mapping[str, Key] = field(default_factory=dict)
    tokens: Mapping[bytes, str] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)  # by tenant, where a key sets one


class Authenticator:
    """Belongs to an event loop, but for `load`, which is called before there is one."""

    def __init__(
        self, store: KeyStore, file: KeysFile | None = None, *, now: Callable[[], float] | None = None
    ) -> None:
        """`now`: seconds since the epoch; otherwise a clock that, set back, lets no old token in again."""
        self._store, self._file, self._now = store, file, now or WallClock().latest
        self._known = _Known()
        self._stamp: object = None
        self._listed: tuple[tuple[Key, str | None], ...] = ()
        self._pepper = secrets.token_bytes(32)
        self._read_at, self._failing = float("-inf"), False
        self._reading: asyncio.Task[None] | None = None
        self._asked_at = float("-inf")
        self._matched: _Seen = OrderedDict()
        self._refused: _Seen = OrderedDict()
        self._one_at_a_time, self._waiting = asyncio.Lock(), 0
        self._warned: set[str] = set()
        self.locked = False  # there are or have been keys: from then on every request needs one

    def load(self) -> None:
        """Read store and file now. Raises BadKeysFile and ServiceError: a server must not start without its keys."""
        if self._file is not None:
            self._stamp, self._listed = self._file.stamp(), tuple(self._file.read())
        self._take(self._store.list())

    def close(self) -> None:
        self._store.close()

    async def owner(self, token: str) -> Key | None:
        """The key whose token this is, or None. Raises QueueFull rate_limited when too many strange tokens come."""
        await self.refresh()
        if not token.isascii():
            return None  # no token is, and not every text can be hashed
        digest = self._digest(token)
        key_id = self._known.tokens.get(digest) or id_of(token)
        if key_id not in self._known.keys:
            await self.refresh(MISS_S)
            key_id = self._known.tokens.get(digest) or id_of(token)
        key = self._known.keys.get(key_id or "")
        if key is None or key.ended(self._now()):
            return None
        if self._known.tokens.get(digest) == key.id or await self._matches(token, digest, key):
            return key
        return None

    def weight(self, tenant: str) -> float:
        """The tenant's share of a busy engine, in proportion to others': the largest that a key of it sets, else 1."""
        return self._known.weights.get(tenant, 1.0)

    # --- one token --------------------------------------------------------------------------------------------------

    async def _matches(self, token: str, digest: bytes, key: Key) -> bool:
        for kept in key.hashes(self._now()):
            if kept and await self._gives(token, digest, kept):
                return True
        return False

    async def _gives(self, token: str, digest: bytes, kept: str) -> bool:
        if (known := self._remembered(digest, kept)) is not None:
            return known
        if self._waiting >= WAITING:
            detail = "too many API keys are being checked for the first time; try again"
            raise QueueFull(detail, code="rate_limited")
        self._waiting += 1
        try:
            async with self._one_at_a_time:  # a guess costs one core for its time, however many come
                if (known := self._remembered(digest, kept)) is not None:
                    return known
                true = await asyncio.to_thread(matches, token, kept)
        finally:
            self._waiting -= 1
        seen = self._matched if true else self._refused
        seen[digest, kept] = None
        if len(seen) > REMEMBERED:
            seen.popitem(last=False)
        return true

    def _remembered(self, digest: bytes, kept: str) -> bool | None:
        """Whether this token gives this hash, where that is known; under a digest that means nothing elsewhere."""
        for seen, answer in ((self._matched, True), (self._refused, False)):
            if (digest, kept) in seen:
                seen.move_to_end((digest, kept))
                return answer
        return None

    # --- all keys ---------------------------------------------------------------------------------------------------

    async def refresh(self, max_age_s: float = FRESH_S) -> None:
        """See that what is known is no older. A store that failed or hangs is asked again, but not waited for."""
        if time.monotonic() - self._read_at <= max_age_s:
            return
        if self._reading is None or self._reading.done():
            self._reading, self._asked_at = asyncio.create_task(self._read()), time.monotonic()
        reading, left_s = self._reading, self._asked_at + PATIENCE_S - time.monotonic()
        if not self._failing and left_s > 0:
            await asyncio.wait([reading], timeout=left_s)
            if reading.done():
                reading.result()

    async def _read(self) -> None:
        asked_at = time.monotonic()
        await asyncio.to_thread(self._read_file)
        try:
            self._take(await asyncio.to_thread(self._store.list))
        except ServiceError as error:
            if not self._failing:
                log.error("%s; the keys that are known go on", error.detail)
            self._failing = True
        else:
            self._failing = False
        self._read_at = asked_at

    def _read_file(self) -> None:
        """A file that cannot be used changes nothing: a secret that is half written must lock nobody out."""
        if self._file is None or (stamp := self._file.stamp()) == self._stamp:
            return
        try:
            self._listed = tuple(self._file.read())
            log.info("read the keys file again: %d keys", len(self._listed))
        except BadKeysFile as error:
            log.error("%s; the keys that it held before go on", error)
        self._stamp = stamp

    def _take(self, stored: list[Key]) -> None:
        """The file's word counts where both have a key of one id."""
        keys = {key.id: key for key in stored} | {key.id: key for key, _ in self._listed}
        tokens = {self._digest(token): key.id for key, token in self._listed if token is not None}
        self._known = _Known(keys, tokens, _weights(keys.values(), self._now()))
        self._warn(keys.values())
        self.locked = self.locked or bool(keys) or self._file is not None

    def _warn(self, keys: Iterable[Key]) -> None:
        """Once of each key whose prefix two tenants may share without knowing."""
        for key in keys:
            if key.open_ended and key.id not in self._warned:
                self._warned.add(key.id)
                log.warning("key %s covers every task whose name begins with %r, within words too", key.id, key.tasks)

    def _digest(self, token: str) -> bytes:
        return hashlib.blake2b(token.encode(), key=self._pepper, digest_size=32).digest()


def _weights(keys: Iterable[Key], now: float) -> dict[str, float]:
    found: dict[str, float] = {}
    for key in keys:
        if key.allowance.weight is not None and not key.ended(now):
            found[key.tasks] = max(found.get(key.tasks, 0.0), key.allowance.weight)
    return found
