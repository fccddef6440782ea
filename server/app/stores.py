"""Opens the stores that the settings name: jobs, data sets, uploads, feedback, keys and their limits."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from typing import Final, Protocol

from prompts_store import BadStoreUrl, redis_connection
from server.datasets.dataset_store import DatasetStore
from server.datasets.feedback_store import FeedbackStore
from server.datasets.upload_store import UploadStore
from server.jobs.redis_store import RedisJobStore
from server.jobs.sqlite_store import SqliteJobStore
from server.jobs.store import JobStore
from server.keys.authenticator import Authenticator
from server.keys.keys_file import KeysFile
from server.keys.meter import Meter
from server.keys.url import open_keys
from server.settings import Settings

CLOSE_S: Final = 2.0


def require_storage(settings: Settings) -> None:
    """Raises ValueError, with the setting to change, for a home that cannot be written, a URL of another form, and a
    Redis server that refuses what is needed. One that is away may come back."""
    _require_home(settings.home)
    done = set()
    for name, url, prefix in (
        ("LENSRACK_STORE", settings.store_url, "lensrack:store"),
        ("LENSRACK_JOBS", settings.jobs_url, "lensrack:jobs"),
        ("LENSRACK_KEYS", settings.keys_url, "lensrack:keys"),
    ):
        if url.startswith(("redis://", "rediss://")) and url not in done:
            done.add(url)
            try:
                why = redis_connection.check(url, prefix)
            except BadStoreUrl as error:
                raise ValueError(f"{name}: {error.detail}") from None
            if why is not None:
                password = " (LENSRACK_REDIS_PASSWORD_FILE)" if "password" in why else ""
                raise ValueError(f"{name}{password}: the Redis server refuses: {why}")


def _require_home(home: Path) -> None:
    try:
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=home):
            pass
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ValueError(f"LENSRACK_HOME: expected a folder that can be written, got {home}: {reason}") from None


def open_jobs(settings: Settings) -> JobStore:
    scheme, separator, path = settings.jobs_url.partition("://")
    if scheme in {"redis", "rediss"}:
        return RedisJobStore(settings.jobs_url)
    if scheme == "sqlite":
        return SqliteJobStore(Path(path))
    got = f"{scheme}://…" if separator else "another form"  # a URL may hold a password
    raise ValueError(f"LENSRACK_JOBS: expected sqlite://FILE or redis://…, got {got}")


def open_authenticator(settings: Settings) -> Authenticator:
    """The authenticator over the configured keys, read once. Raises ValueError and ServiceError."""
    file = KeysFile(settings.keys_file) if settings.keys_file is not None else None
    authenticator = Authenticator(open_keys(settings.keys_url), file)
    authenticator.load()
    return authenticator


def open_meter(settings: Settings) -> Meter:
    """The counter of keys' limits, kept where the keys are: in Redis, else in memory."""
    url = settings.keys_url
    return Meter(url if url.startswith(("redis://", "rediss://")) else None)


def open_datasets(settings: Settings) -> DatasetStore:
    return DatasetStore(
        settings.datasets_dir,
        max_images=settings.max_dataset_images,
        max_unpacked_bytes=settings.max_unpacked_bytes,
        max_image_pixels=settings.max_image_pixels,
    )


def open_uploads(settings: Settings) -> UploadStore:
    return UploadStore(
        settings.datasets_dir / "resumable", max_bytes=settings.max_dataset_bytes, expiry_s=settings.upload_expiry_s
    )


def open_feedback(settings: Settings) -> FeedbackStore:
    return FeedbackStore(
        settings.datasets_dir / "feedback",
        max_images=settings.max_feedback_images,
        max_image_pixels=settings.max_image_pixels,
    )


class Closable(Protocol):
    def close(self) -> None: ...


async def close_all(*stores: Closable) -> None:
    """Close stores in threads. A store that hangs is not waited for, since the process must end by a deadline."""
    closing = [asyncio.ensure_future(asyncio.to_thread(store.close)) for store in stores]
    await asyncio.wait(closing, timeout=CLOSE_S)
