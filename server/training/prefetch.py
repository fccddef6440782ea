"""Reading the next batches while the current one is being fitted."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

from .augment import Views
from .data import Images, Index, Pixels

BATCHES: Final = 2


def ahead(
    images: Images, batches: Iterable[Index], views: Views | None, depth: int = BATCHES
) -> Generator[Pixels, None, None]:
    """The pixels of each batch in turn, uint8 [k, S, S, 3], while up to `depth` later ones are being read.

    views: one for every picture of `images`, by its number. An error of a batch is raised at that batch. Closing the
    iterator waits for the batch that is being read and leaves no thread: use `contextlib.closing` where the loop may
    end early.
    """
    waiting, reading = iter(batches), deque[Future[Pixels]]()
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as thread:
        try:
            while True:
                while len(reading) <= depth and (index := next(waiting, None)) is not None:
                    reading.append(thread.submit(images.read, index, None if views is None else views.take(index)))
                if not reading:
                    return
                yield reading.popleft().result()
        finally:
            for each in reading:
                each.cancel()
