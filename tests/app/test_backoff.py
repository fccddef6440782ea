"""Pauses before a restart: longer each time, bounded, and short again once the process has lived long."""

from __future__ import annotations

from server.app.backoff import LONG_LIFE_S, LONGEST_PAUSE_S, Backoff


def test_pauses_double_up_to_the_longest() -> None:
    backoff = Backoff(0.5)
    assert [backoff.pause_s(1.0) for _ in range(9)] == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, LONGEST_PAUSE_S]


def test_a_long_life_starts_over() -> None:
    backoff = Backoff(0.1)
    for _ in range(20):
        backoff.pause_s(LONG_LIFE_S)
    assert backoff.pause_s(LONG_LIFE_S) == LONGEST_PAUSE_S
    assert backoff.pause_s(LONG_LIFE_S + 1) == 0.1
    assert backoff.pause_s(0.0) == 0.2
