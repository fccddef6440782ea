"""Runs the steps of a generator in a context of their own.

Jobs that share a worker's thread alternate. Without a separate context, the log fields and the trace that one job sets
in context variables would apply to the steps of the next.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextvars import copy_context
from functools import partial
from typing import TypeVar

Request = TypeVar("Request")
Answer = TypeVar("Answer")
Outcome = TypeVar("Outcome")


def in_separate_context(steps: Generator[Request, Answer, Outcome]) -> Generator[Request, Answer, Outcome]:
    """The same generator, with all its steps in one copy of the context in which the first step runs."""
    context = copy_context()
    step: Callable[[], Request] = partial(next, steps)
    while True:
        try:
            request = context.run(step)
        except StopIteration as end:
            outcome: Outcome = end.value
            return outcome
        try:
            step = partial(steps.send, (yield request))
        except GeneratorExit:
            context.run(steps.close)
            raise
        except Exception as error:
            step = partial(steps.throw, error)
