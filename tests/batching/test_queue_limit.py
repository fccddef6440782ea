"""The learned length of the queue, with forwards that are invented."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.batching.queue_limit import QueueLimit

Forward = Callable[[int], float]  # rows → seconds


def taught(places: QueueLimit, forward: Forward, most: int = 32, batches: int = 300, seed: int = 0) -> int:
    chance = random.Random(seed)
    for _ in range(batches):
        rows = chance.randint(1, most)
        places.learn(rows, forward(rows))
    return places.rows


def a_cpu(rows: int) -> float:
    return 0.002 + 0.010 * rows


def a_gpu(rows: int) -> float:
    return 0.010 + 0.0001 * rows


def test_it_is_what_full_batches_work_off_in_the_time():
    assert taught(QueueLimit(512, 32, 1.0), a_cpu) == 100  # 32 rows in 322 ms: 99.4 a second


def test_small_forwards_of_a_quiet_hour_do_not_hide_what_full_ones_do():
    places = QueueLimit(4096, 32, 0.5)
    assert taught(places, a_gpu, most=4) == pytest.approx(0.5 * 32 / a_gpu(32), abs=2)  # 1,212, not 4 / a_gpu(4)


def test_two_full_batches_may_wait_however_slow_the_engine_is():
    assert taught(QueueLimit(512, 32, 0.25), lambda rows: 3.0 * rows) == 64


def test_there_are_never_more_than_there_is_memory_for():
    assert taught(QueueLimit(512, 32, 60.0), a_gpu) == 512


def test_without_a_bound_in_time_and_before_the_first_forward_it_is_the_most():
    assert taught(QueueLimit(512, 32, 0.0), a_cpu) == 512
    assert QueueLimit(512, 32, 0.25).rows == 512


def test_it_follows_an_engine_that_becomes_slower_and_faster():
    places = QueueLimit(512, 8, 1.0)
    fast, slow, again = (taught(places, forward, most=8) for forward in (a_cpu, lambda n: 10 * a_cpu(n), a_cpu))
    assert slow < fast / 5
    assert again == fast


@given(
    st.integers(1, 1000),
    st.integers(1, 64),
    st.floats(0, 10),
    st.lists(st.tuples(st.integers(1, 64), st.floats(0, 100)), min_size=1, max_size=50),
)
def test_whatever_it_is_told_it_stays_between_two_batches_and_the_most(most, batch, wait_s, forwards):
    places = QueueLimit(most, batch, wait_s)
    for rows, seconds in forwards:
        places.learn(rows, seconds)
        assert min(2 * batch, most) <= places.rows <= most


@pytest.mark.parametrize("wrong", [(0, 1, 1.0), (1, 0, 1.0), (1, 1, -1.0)])
def test_what_makes_no_sense_is_refused(wrong):
    with pytest.raises(ValueError, match="expected one row at least"):
        QueueLimit(*wrong)
