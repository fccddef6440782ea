"""Prefetch: the next batches are read while the current one is trained on."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

from .augment import Views
from .data import Images, Index, Pixels

BATCHES: Final = 2


def prefetch(
    images: Images, batches: Iterable[Index], views: Views | None, depth: int = BATCHES
) -> Generator[Pixels, None, None]:
    """Yield the pixels of each batch, uint8 [k, S, S, 3], while a thread reads up to `depth` later ones.

    views: one for every picture of `images`, by its number. An error in reading a batch is raised at that batch.
    Closing the iterator waits for the batch that is being read and ends the thread: use `contextlib.closing` where the
    loop may end early.
    """
    waiting, reading = iter(batches), deque[Future[Pixels]]()
    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as thread:
        try:
            while True:
                while len(reading) <= depth and (index := next(waiting, None)) is not None:
                    reading.append(thread.submit(images.read, index, None if views is None else views.take(index)))
                if not reading:
                    return
                yield reading.popleft().result()
        finally:
            for future in reading:
                future.cancel()
