"""From a token to its key, by a snapshot of all keys that is refreshed while the server runs.

    token ─► its id ─► the key's hash ─ sha256 ─► compared at once
                          └─ scrypt, of an older version ─► verified before? ─ yes ─► its key
                                   └─ no ─► one check at a time, keys in turn ─► cached under a keyed digest

Whoever guesses at a key's token keeps only that key's other callers waiting, and of these only those at the same
address: each key has a waiting room of its own, in which an address has few places.

Store and file are read again when the snapshot is older than FRESH_S, so that a revocation or a rotation takes effect
everywhere within that time and without a restart. While the store is away the last snapshot stays valid; one request
waits PATIENCE_S for the store, the others do not.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final

from server.clock import WallClock
from server.errors import QueueFull, ServiceError

from .key import Key, id_of, is_slow, matches
from .keys_file import BadKeysFile, KeysFile
from .session import SESSION_S, Session, digest_of, new_secret
from .store import KeyStore

log = logging.getLogger(__name__)

FRESH_S: Final = 1.0
PATIENCE_S: Final = 2.0  # the look-up of a host name alone may take many seconds when the host has gone
MISS_S: Final = 0.1  # the age allowed for an unknown id, whose key may have just been created
CACHED: Final = 10_000  # tokens that matched, and as many that did not
WAITING: Final = 16  # tokens of one key that may wait for scrypt; more get 429
WAITING_OF_ADDRESS: Final = 2  # of these, the tokens that came from one address

_Seen = OrderedDict[tuple[bytes, str], None]


@dataclass
class _Room:
    """Where a key's tokens wait: one of them at a time stands in the queue that all keys share."""

    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    addresses: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class _Snapshot:
    """All keys by id; and the ids of keys whose tokens the file holds, by the digest of the token."""

    keys: Mapping[str, Key] = field(default_factory=dict)
    tokens: Mapping[bytes, str] = field(default_factory=dict)
    sessions: Mapping[str, Session] = field(default_factory=dict)  # by the digest of their secret
    file_proofs: Mapping[str, str] = field(default_factory=dict)  # by the id of a key whose token the file holds
    weights: Mapping[str, float] = field(default_factory=dict)  # by tenant, where a key sets one


class Authenticator:
    """Belongs to an event loop, but for `load`, which is called before there is one."""

    def __init__(
        self, store: KeyStore, file: KeysFile | None = None, *, now: Callable[[], float] | None = None
    ) -> None:
        """`now`: seconds since the epoch; by default a clock on which a token stays expired when it is set back."""
        self._store, self._file, self._now = store, file, now or WallClock().latest
        self._snapshot = _Snapshot()
        self._stamp: object = None
        self._listed: tuple[tuple[Key, str | None], ...] = ()
        self._pepper = secrets.token_bytes(32)
        self._read_at, self._failing = float("-inf"), False
        self._reading: asyncio.Task[None] | None = None
        self._read_started = float("-inf")
        self._matched: _Seen = OrderedDict()
        self._refused: _Seen = OrderedDict()
        self._scrypt_lock = asyncio.Lock()
        self._rooms: dict[str, _Room] = {}
        self._signed_out: OrderedDict[str, None] = OrderedDict()
        self._checks: dict[tuple[bytes, str], asyncio.Task[bool]] = {}
        self._warned: set[str] = set()
        self.locked = False  # there are or have been keys: from then on every request needs one

    def load(self) -> None:
        """Read store and file now. Raises BadKeysFile and ServiceError: a server must not start without its keys."""
        if self._file is not None:
            self._stamp, self._listed = self._file.stamp(), tuple(self._file.read())
        self._take(self._store.list(), self._store.sessions())

    def close(self) -> None:
        self._store.close()

    async def owner(self, token: str, address: str = "") -> Key | None:
        """Return the token's key, or None. Raises QueueFull (rate_limited) when too many unknown tokens arrive for a
        key that an older version made, or too many of them from this client's `address`."""
        proved = await self._proved(token, address)
        return proved[0] if proved else None

    async def sign_in(self, token: str, address: str = "") -> tuple[Key, str] | None:
        """Start a session; return the token's key and the session's secret. Raises like `owner` and the key store."""
        proved = await self._proved(token, address)
        if proved is None:
            return None
        secret, (key, proof), now = new_secret(), proved, self._now()
        session = Session(digest_of(secret), key.id, proof, now + SESSION_S)
        await asyncio.to_thread(self._store.start_session, session, now)
        return key, secret

    async def sign_out(self, secret: str) -> None:
        """End a session: here at once, everywhere within FRESH_S. Raises the key store's errors."""
        digest = digest_of(secret)
        await asyncio.to_thread(self._store.end_session, digest)
        self._signed_out[digest] = None  # a snapshot that is being read may still have it
        if len(self._signed_out) > CACHED:
            self._signed_out.popitem(last=False)

    async def session_owner(self, secret: str) -> Key | None:
        """Return the key of a session that has not ended, or None."""
        await self.refresh()
        digest, asked_at = digest_of(secret), time.monotonic()
        for _ in range(2):  # it may have begun a moment ago, elsewhere; a read that is under way may be older
            if digest not in self._snapshot.sessions and self._read_at < asked_at:
                await self.refresh(0.0)
        session, now = self._snapshot.sessions.get(digest), self._now()
        if session is None or session.ends_at <= now or digest in self._signed_out:
            return None
        key = self._snapshot.keys.get(session.key)
        if key is None or key.ended(now):
            return None
        return key if session.proof in (self._snapshot.file_proofs.get(key.id), *key.hashes(now)) else None

    async def _proved(self, token: str, address: str) -> tuple[Key, str] | None:
        """The token's key, and what proved it: see `Session`."""
        await self.refresh()
        if not token.isascii():
            return None  # tokens are ASCII, and not every other text can be encoded
        digest = self._digest(token)
        key_id = self._snapshot.tokens.get(digest) or id_of(token)
        if key_id not in self._snapshot.keys:
            await self.refresh(MISS_S)
            key_id = self._snapshot.tokens.get(digest) or id_of(token)
        key = self._snapshot.keys.get(key_id or "")
        if key is None or key.ended(self._now()):
            return None
        if self._snapshot.tokens.get(digest) == key.id:
            return key, digest_of(token)
        proof = await self._matched_hash(token, digest, key, address)
        return (key, proof) if proof else None

    def weight(self, tenant: str) -> float:
        """Return the tenant's weight in a busy engine: the largest that one of its keys sets, else 1."""
        return self._snapshot.weights.get(tenant, 1.0)

    # --- one token --------------------------------------------------------------------------------------------------

    async def _matched_hash(self, token: str, digest: bytes, key: Key, address: str) -> str | None:
        for stored_hash in key.hashes(self._now()):
            if not is_slow(stored_hash):
                matched = matches(token, stored_hash)
            elif (known := self._cached_result(digest, stored_hash)) is not None:
                matched = known
            else:
                matched = await self._check_once(token, digest, stored_hash, key.id, address)
            if matched:
                return stored_hash
        return None

    async def _check_once(self, token: str, digest: bytes, stored_hash: str, key_id: str, address: str) -> bool:
        """Requests that come with the same token at once wait for one check."""
        if (digest, stored_hash) not in self._checks:
            check = asyncio.create_task(self._matches_slowly(token, digest, stored_hash, key_id, address))
            self._checks[digest, stored_hash] = check
            check.add_done_callback(lambda _: self._checks.pop((digest, stored_hash), None))
        return await asyncio.shield(self._checks[digest, stored_hash])

    async def _matches_slowly(self, token: str, digest: bytes, stored_hash: str, key_id: str, address: str) -> bool:
        async with self._waiting(key_id, address) as room, room.turn:
            if (known := self._cached_result(digest, stored_hash)) is not None:
                return known
            async with self._scrypt_lock:  # guesses take one core, however many arrive
                matched = await asyncio.to_thread(matches, token, stored_hash)
            self._remember(digest, stored_hash, matched=matched)
            return matched

    @asynccontextmanager
    async def _waiting(self, key_id: str, address: str) -> AsyncIterator[_Room]:
        room = self._rooms.setdefault(key_id, _Room())
        if room.addresses[address] >= WAITING_OF_ADDRESS or room.addresses.total() >= WAITING:
            raise QueueFull(f"too many tokens of key {key_id} are being checked; try again", code="rate_limited")
        room.addresses[address] += 1
        try:
            yield room
        finally:
            room.addresses -= Counter({address: 1})
            if not room.addresses:
                self._rooms.pop(key_id, None)

    def _remember(self, digest: bytes, stored_hash: str, *, matched: bool) -> None:
        seen = self._matched if matched else self._refused
        seen[digest, stored_hash] = None
        if len(seen) > CACHED:
            seen.popitem(last=False)

    def _cached_result(self, digest: bytes, stored_hash: str) -> bool | None:
        """Whether the token has this hash, where that was computed before; by a digest that is useless elsewhere."""
        for seen, answer in ((self._matched, True), (self._refused, False)):
            if (digest, stored_hash) in seen:
                seen.move_to_end((digest, stored_hash))
                return answer
        return None

    # --- all keys ---------------------------------------------------------------------------------------------------

    async def refresh(self, max_age_s: float = FRESH_S) -> None:
        """Make the snapshot at most `max_age_s` old. A store that failed or hangs is read again, but not waited for."""
        if time.monotonic() - self._read_at <= max_age_s:
            return
        if self._reading is None or self._reading.done():
            self._reading, self._read_started = asyncio.create_task(self._read()), time.monotonic()
        reading, left_s = self._reading, self._read_started + PATIENCE_S - time.monotonic()
        if not self._failing and left_s > 0:
            await asyncio.wait([reading], timeout=left_s)
            if reading.done():
                reading.result()

    async def _read(self) -> None:
        asked_at = time.monotonic()
        await asyncio.to_thread(self._read_file)
        try:
            self._take(*await asyncio.to_thread(lambda: (self._store.list(), self._store.sessions())))
        except ServiceError as error:
            if not self._failing:
                log.error("%s; the keys of the last read stay valid", error.detail)
            self._failing = True
        else:
            self._failing = False
        self._read_at = asked_at

    def _read_file(self) -> None:
        """A file that cannot be parsed changes nothing: one that is half written must lock no client out."""
        if self._file is None or (stamp := self._file.stamp()) == self._stamp:
            return
        try:
            self._listed = tuple(self._file.read())
            log.info("read the keys file again: %d keys", len(self._listed))
        except BadKeysFile as error:
            log.error("%s; the keys that the file held before stay valid", error)
        self._stamp = stamp

    def _take(self, stored: list[Key], sessions: list[Session]) -> None:
        """Take a snapshot. Where store and file have a key of the same id, the file's counts."""
        keys = {key.id: key for key in stored} | {key.id: key for key, _ in self._listed}
        tokens = {self._digest(token): key.id for key, token in self._listed if token is not None}
        self._snapshot = _Snapshot(
            keys,
            tokens,
            sessions={session.digest: session for session in sessions},
            file_proofs={key.id: digest_of(token) for key, token in self._listed if token is not None},
            weights=_weights(keys.values(), self._now()),
        )
        self._warn(keys.values())
        self.locked = self.locked or bool(keys) or self._file is not None

    def _warn(self, keys: Iterable[Key]) -> None:
        """Warn once of each key whose prefix may cover another tenant's names."""
        for key in keys:
            if key.open_ended and key.id not in self._warned:
                self._warned.add(key.id)
                log.warning("key %s covers every task whose name begins with %r, within words too", key.id, key.tasks)

    def _digest(self, token: str) -> bytes:
        return hashlib.blake2b(token.encode(), key=self._pepper, digest_size=32).digest()


def _weights(keys: Iterable[Key], now: float) -> dict[str, float]:
    weights: dict[str, float] = {}
    for key in keys:
        if key.allowance.weight is not None and not key.ended(now):
            weights[key.tasks] = max(weights.get(key.tasks, 0.0), key.allowance.weight)
    return weights
