"""A generator whose steps run in a context of their own.

Jobs that share a worker's thread take turns. A context variable that one of them sets, for its log lines or its trace,
would otherwise be seen by whoever comes next.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextvars import copy_context
from functools import partial
from typing import TypeVar

Asked = TypeVar("Asked")
Sent = TypeVar("Sent")
Outcome = TypeVar("Outcome")


def in_separate_context(work: Generator[Asked, Sent, Outcome]) -> Generator[Asked, Sent, Outcome]:
    """`work`, each of its steps in one copy of the context in which it began."""
    context = copy_context()
    step: Callable[[], Asked] = partial(next, work)
    while True:
        try:
            asked = context.run(step)
        except StopIteration as end:
            outcome: Outcome = end.value
            return outcome
        try:
            step = partial(work.send, (yield asked))
        except GeneratorExit:
            context.run(work.close)
            raise
        except Exception as error:
            step = partial(work.throw, error)
