"""Layouts of the final float32 forward of `bench ladder` over a CPU's threads.

    threads in a product     PyTorch's own: each operation is split, and all threads wait for its last part
    workers of one thread    the rows are split instead, and no thread waits before the end; threads of one process,
                             not processes: one copy of the weights and of the rack, and no copies between processes

CPU time alone says little here: waiting threads may spin, which is CPU time, or sleep, which is not. So the wall time
stands next to it, other load included, and layouts are compared by wall time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch import Tensor

from server.engine.engine import Engine

from .ladder_bench import Answer, Bench, NotAvailable, Step, under
from .ladder_steps import HEADS_APART


def layouts(cores: int) -> tuple[Step, ...]:
    """1, 2, 4 … threads up to the number of cores, and the server's default number for one engine."""
    served = max(1, cores - 1)
    counts = sorted({*(2**power for power in range(cores.bit_length())), served, cores})
    alone = Step("one thread", partial(within, threads=1), served == 1, "attention head by head" if HEADS_APART else "")
    more = [count for count in counts if count > 1]
    return (alone, *(_within(count, count == served) for count in more), *map(_workers, more))


def _within(threads: int, taken: bool) -> Step:
    why = f"attention by PyTorch's kernel, not head by head; {waiting()}" if HEADS_APART else waiting()
    return Step(f"{threads} threads in each product", partial(within, threads=threads), taken, why)


def _workers(count: int) -> Step:
    why = "ahead while cores are idle; the server's engine is one thread, and a core is left to HTTP and decoding"
    return Step(f"{count} workers of one thread, the rows shared out", partial(workers, count=count), False, why)


def waiting() -> str:
    """How OpenMP's threads wait for each other: read from the environment when PyTorch is loaded, and fixed
    afterwards."""
    policy = os.environ.get("OMP_WAIT_POLICY")
    return f"`OMP_WAIT_POLICY={policy}`" if policy else "`OMP_WAIT_POLICY` not set"


def within(bench: Bench, threads: int) -> Answer:
    with using(threads):  # determines the engine's rows per pass
        answer = bench.served(bench.packed)
    return under(partial(using, threads), answer)


def workers(bench: Bench, count: int) -> Answer:
    if bench.tasks < count:
        raise NotAvailable(f"fewer pictures than workers: {bench.tasks}")
    backbone = bench.packed
    rack, seats = bench.seat_lenses(backbone, bench.lenses(backbone, bench.even))
    parts = np.array_split(np.arange(bench.tasks), count)
    with using(1):
        answers = [bench.answer_rows(Engine(backbone, rack), seats, part.tolist()) for part in parts]
    # OpenMP's number of threads is a setting of each thread
    pool = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))
    return under(partial(using, 1), lambda: torch.cat(list(pool.map(_answered, answers))))


def _answered(answer: Answer) -> Tensor:
    return answer()


@contextmanager
def using(threads: int) -> Iterator[None]:
    """Use `threads` threads within an operation; restore the previous number afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
