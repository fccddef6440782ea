"""The learned limit of a batch, with forwards and a clock that are invented."""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from server.batching.batch_limit import EVERY, LEAST_SHARE, BatchLimit
from server.batching.latency_model import WINDOW

Forward = Callable[[int], float]  # rows → seconds


def taught(most: int, target_s: float, forward: Forward, batches: int = 400, seed: int = 0) -> BatchLimit:
    """Fed with batches of any size up to its own limit."""
    limit, chance = BatchLimit(most, target_s), random.Random(seed)
    for _ in range(batches):
        rows = chance.randint(1, limit.rows)
        limit.learn(rows, forward(rows))
    return limit


def a_cpu(rows: int) -> float:
    return 0.002 + 0.010 * rows


def a_gpu(rows: int) -> float:
    return 0.010 + 0.0001 * rows


def test_without_a_target_there_is_no_limit():
    assert taught(32, 0.0, a_cpu).rows == 32


def test_it_is_the_most_for_which_two_forwards_are_in_time():
    assert taught(32, 0.1, a_cpu).rows == 4  # 2 · (2 + 4 · 10) ms


def test_what_varies_counts_at_its_worst():
    chance = random.Random(1)
    assert taught(32, 0.2, lambda rows: a_cpu(rows) + chance.choice((0.0, 0.05))).rows < taught(32, 0.2, a_cpu).rows


def test_a_target_that_all_batches_keep_limits_nothing():
    assert taught(32, 10.0, a_cpu).rows == 32


def test_where_batches_are_nearly_free_a_target_out_of_reach_does_not_ruin_the_throughput():
    limit = taught(32, 0.001, a_gpu)
    assert limit.rows / a_gpu(limit.rows) >= LEAST_SHARE * 32 / a_gpu(32)
    assert limit.rows < 32


def test_it_gets_out_of_single_rows_once_they_are_fast_enough():
    limit = BatchLimit(32, 0.05)
    for _ in range(10 * EVERY):
        limit.learn(1, 0.04)
    assert limit.rows == 1
    for _ in range(4 * WINDOW):
        limit.learn(limit.rows, a_gpu(limit.rows))
    assert limit.rows == 32


def test_it_stays_between_two_looks():
    limit = BatchLimit(32, 0.1)
    seen = []
    for rows in range(1, 8 * EVERY + 1):
        limit.learn(1 + rows % 4, a_cpu(1 + rows % 4))
        seen.append(limit.rows)
    changes = [at for at in range(1, len(seen)) if seen[at] != seen[at - 1]]
    assert all((at + 1) % EVERY == 0 for at in changes)


@example(22, 0.0625, 0.040081485753758556, 0.0, 0)  # where half of the throughput is 11 rows but for the last bit
@given(
    st.integers(1, 64),
    st.floats(1e-4, 1.0),
    st.floats(0, 0.1),
    st.floats(0, 0.1),
    st.integers(0, 100),
)
def test_whatever_it_learns_it_is_a_batch(most, target_s, start, each, seed):
    """And where there is one that is in time, so is the limit, or half of the throughput would be lost."""
    limit = taught(most, target_s, lambda rows: start + each * rows, batches=60, seed=seed)
    assert 1 <= limit.rows <= most
    enough = limit.rows == 1 or (limit.rows - 1) * (start + each * most) < LEAST_SHARE * most * (
        start + each * (limit.rows - 1)
    )
    assert 2 * (start + each * limit.rows) <= target_s * (1 + 1e-6) or enough


@given(st.lists(st.tuples(st.integers(1, 32), st.floats(0, 100)), min_size=EVERY, max_size=3 * WINDOW))
def test_any_measurements_are_borne(measured):
    limit = BatchLimit(32, 0.05)
    for rows, seconds in measured:
        limit.learn(rows, seconds)
        assert 1 <= limit.rows <= 32


@pytest.mark.parametrize(("most", "target_s"), [(0, 1.0), (1, -1.0)])
def test_nonsense_is_refused(most, target_s):
    with pytest.raises(ValueError, match="expected at least one row"):
        BatchLimit(most, target_s)


def quiet_waits(limit: BatchLimit, forward: Forward, rounds: int = 1000) -> list[float]:
    """Seconds until a lone row of another task is answered, beside a task that always has more rows than fit: the row
    comes at a moment of the batch under way, and is in the next one."""
    chance, waits = random.Random(2), deque[float](maxlen=rounds // 2)  # the second half: once it has learned
    for _ in range(rounds):
        rows = limit.rows
        under_way, own = forward(rows), forward(rows)
        limit.learn(rows, under_way)
        limit.learn(rows, own)
        waits.append(under_way * (1 - chance.random()) + own)
    return sorted(waits)


@pytest.mark.parametrize("target_s", [0.08, 0.15, 0.3])
def test_the_target_is_kept_for_a_row_whose_turn_has_come(target_s):
    chance = random.Random(3)

    def forward(rows: int) -> float:
        return a_cpu(rows) * chance.uniform(0.9, 1.2)

    without = quiet_waits(BatchLimit(32), forward)
    limited = quiet_waits(BatchLimit(32, target_s), forward)
    at = math.ceil(0.99 * len(limited)) - 1
    assert without[at] > target_s
    assert limited[at] <= target_s
    assert limited[at] > target_s / 4, "and no more is given up for it than it takes"
