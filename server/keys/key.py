"""An API key: scopes, the tasks that it covers, and limits. Its token is shown once and stored as a hash.

    lr_<id>_<secret>        a client's token; the id is public and finds the record, the secret proves it

A key sees what its `tasks` prefix covers: tasks by their names, jobs by their tasks, and data sets and uploads by the
prefix of the key that stored them. Keys with the same prefix therefore share all of it, and the empty
prefix covers everything.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
import secrets
from typing import Annotated, Final, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

Scope = Literal["predict", "train", "admin"]

SCOPES: Final[tuple[Scope, ...]] = get_args(Scope)
SECRET_BYTES: Final = 32
SEPARATORS: Final = "-_."  # where a prefix should end
ID_PATTERN: Final = r"^[a-z0-9][a-z0-9-]{0,31}$"
_ID: Final = re.compile(ID_PATTERN)
_TOKEN: Final = re.compile(r"lr_([a-z0-9][a-z0-9-]{0,31})_([A-Za-z0-9_-]{20,200})")
_ALPHABET: Final = "0123456789abcdefghjkmnpqrstvwxyz"

# A secret of 256 random bits cannot be guessed from a fast hash, and a slow one would let anybody keep the server busy.
_FAST: Final = re.compile(r"sha256:([A-Za-z0-9_=-]+):([A-Za-z0-9_=-]+)")
# scrypt (RFC 7914), of keys that older versions made: some 50 ms for each check
_SLOW: Final = re.compile(r"scrypt:([0-9]{1,2}):([0-9]{1,2}):([0-9]{1,2}):([A-Za-z0-9_=-]+):([A-Za-z0-9_=-]+)")
_MAX_MEMORY: Final = 64 * 2**20

KeyId = Annotated[str, Field(pattern=ID_PATTERN)]
TaskPrefix = Annotated[str, Field(pattern=r"^([a-z0-9][a-z0-9._-]{0,62})?$")]


class Allowance(BaseModel):
    """A key's limits; None sets none. `weight`: its tenant's share of a busy engine, in proportion to others'."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    images_per_s: Annotated[float | None, Field(gt=0, le=1e6)] = None
    jobs_per_day: Annotated[int | None, Field(ge=0, le=10**6)] = None
    bytes_stored: Annotated[int | None, Field(ge=0)] = None
    weight: Annotated[float | None, Field(ge=0.01, le=100)] = None


class Key(BaseModel):
    """A key as it is stored. Times are seconds since the epoch; the old hash is valid until `old_until`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: KeyId
    name: Annotated[str, Field(max_length=200)] = ""
    scopes: Annotated[frozenset[Scope], Field(min_length=1)]
    tasks: TaskPrefix = ""
    allowance: Allowance = Allowance()
    hash: str = ""
    created_at: float = 0.0
    old_hash: str = ""
    old_until: float = 0.0
    revoked_at: float | None = None
    expires_at: float | None = None

    def ended(self, now: float) -> bool:
        return self.revoked_at is not None or (self.expires_at is not None and now >= self.expires_at)

    def may(self, scope: Scope) -> bool:
        return scope in self.scopes or "admin" in self.scopes

    @property
    def open_ended(self) -> bool:
        """Whether its prefix may end within a word: `a` covers names like `ab-1`, which may be another tenant's."""
        return bool(self.tasks) and self.tasks[-1] not in SEPARATORS

    def hashes(self, now: float) -> tuple[str, ...]:
        """Return the hashes that a token may match at `now`."""
        if self.ended(now):
            return ()
        return (self.hash, self.old_hash) if self.old_hash and now < self.old_until else (self.hash,)


# The key of every request while the server has no keys.
NOBODY: Final = Key(id="nobody", scopes=frozenset(SCOPES))


def new_id() -> str:
    return "".join(secrets.choice(_ALPHABET) for _ in range(12))


def new_token(key_id: str) -> str:
    return f"lr_{key_id}_{secrets.token_urlsafe(SECRET_BYTES)}"


def id_of(token: str) -> str | None:
    """Return the public half of a token of this server's form; None for any other text."""
    parts = _TOKEN.fullmatch(token)
    return parts[1] if parts else None


def hashed(token: str) -> str:
    """Return `sha256:salt:hash` of a token that `new_token` made, with a fresh salt."""
    salt = secrets.token_bytes(16)
    return f"sha256:{_text(salt)}:{_text(_sha256(token, salt))}"


def matches(token: str, stored_hash: str) -> bool:
    """Whether a token has this hash, compared in constant time. Where the hash `is_slow`, call it in a thread."""
    try:
        if parts := _FAST.fullmatch(stored_hash):
            salt, expected = map(base64.urlsafe_b64decode, parts.groups())
            got = _sha256(token, salt)
        elif parts := _SLOW.fullmatch(stored_hash):
            salt, expected = map(base64.urlsafe_b64decode, parts.groups()[3:])
            got = _scrypt(token, salt, *map(int, parts.groups()[:3]))
        else:
            return False
    except (binascii.Error, ValueError, TypeError, OverflowError):  # parameters beyond what is allowed
        return False
    return hmac.compare_digest(got, expected)


def is_hash(text: str) -> bool:
    return (_FAST.fullmatch(text) or _SLOW.fullmatch(text)) is not None


def is_slow(stored_hash: str) -> bool:
    return stored_hash.startswith("scrypt:")


def _sha256(token: str, salt: bytes) -> bytes:
    return hashlib.sha256(salt + token.encode()).digest()


def _scrypt(token: str, salt: bytes, log_n: int, r: int, p: int) -> bytes:
    return hashlib.scrypt(token.encode(), salt=salt, n=2**log_n, r=r, p=p, dklen=32, maxmem=_MAX_MEMORY)


def _text(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode()
