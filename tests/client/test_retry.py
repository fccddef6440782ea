"""The retry policy with a clock and dice in hand, and the cursor through a job's events."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from lensrack import ConnectError, RequestTimeout, wire
from lensrack._events import OUTAGE_S, PAUSE_S, EventCursor
from lensrack._retry import LONGEST_PAUSE_S, LONGEST_RETRY_AFTER_S, Attempts, parse_retry_after

NOON = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, None),
        ("0", 0.0),
        ("7", 7.0),
        ("2.5", 2.5),
        ("-1", None),
        ("nan", None),
        ("inf", None),
        ("soon", None),
        ("", None),
        ("Sun, 01 Mar 2026 12:00:30 GMT", 30.0),
        ("Sun, 01 Mar 2026 12:00:30 -0000", 30.0),
        ("Sun, 01 Mar 2026 11:00:00 GMT", 0.0),
    ],
)
def test_retry_after(header: str | None, seconds: float | None) -> None:
    assert parse_retry_after(header, NOON) == seconds


def test_pauses_double_up_to_a_limit() -> None:
    attempts = Attempts(9, None, dice=lambda: 1.0)
    pauses = [attempts.next_pause_s() for _ in range(9)]
    assert pauses == [0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 8.0, 8.0, LONGEST_PAUSE_S]
    assert attempts.next_pause_s() is None


def test_dice_spread_the_pauses_downwards_to_a_half() -> None:
    assert Attempts(1, None, dice=lambda: 0.0).next_pause_s() == 0.125


@pytest.mark.parametrize("dice", [0.0, 1.0])
def test_retry_after_is_a_lower_limit(dice: float) -> None:
    pause = Attempts(1, None, dice=lambda: dice).next_pause_s(3.0)
    assert pause is not None
    assert 3.0 <= pause <= 3.25


def test_retry_after_is_capped() -> None:
    assert Attempts(1, None, dice=lambda: 0.0).next_pause_s(86_400) == LONGEST_RETRY_AFTER_S


def test_the_time_is_for_all_attempts_together() -> None:
    clock = Clock()
    attempts = Attempts(5, 10.0, clock, lambda: 0.0)
    clock.now += 8
    assert attempts.left_s() == 2.0
    assert attempts.next_pause_s(2.0) is None  # nothing would be left for the attempt itself
    assert attempts.retries == 0
    assert attempts.next_pause_s(1.5) == 1.5


def event(seq: int, kind: str = "epoch") -> wire.JobEvent:
    return wire.JobEvent(seq=seq, type=kind, at=1.0)


def page(*seqs: int, finished: bool = False) -> wire.JobEvents:
    return wire.JobEvents(events=[event(seq) for seq in seqs], next=max(seqs, default=0), finished=finished)


def test_a_cursor_gives_each_event_once() -> None:
    cursor = EventCursor("j1", after=1)
    assert [one.seq for one in cursor.take(page(1, 2, 3))] == [2, 3]
    assert ("after", "3") in cursor.call().params
    assert cursor.take(page()) == []
    assert cursor.after == 3
    cursor.take(page(4, finished=True))
    assert cursor.finished


def test_a_cursor_rests_only_where_the_server_did_not_hold_the_request() -> None:
    clock = Clock()
    cursor = EventCursor("j1", clock=clock)
    cursor.call()
    assert cursor.rest_s(cursor.take(page())) == PAUSE_S
    cursor.call()
    assert cursor.rest_s(cursor.take(page(1))) == 0.0
    cursor.call()
    clock.now += 20
    assert cursor.rest_s(cursor.take(page())) == 0.0


def test_a_cursor_bears_an_outage_and_then_gives_up() -> None:
    clock = Clock()
    cursor = EventCursor("j1", clock=clock)
    clock.now += OUTAGE_S - 1
    assert cursor.lost(ConnectError("away")) == PAUSE_S
    cursor.take(page())
    clock.now += OUTAGE_S - 1
    assert cursor.lost(ConnectError("away")) == PAUSE_S
    clock.now += 2
    with pytest.raises(ConnectError, match="away"):
        cursor.lost(ConnectError("away"))


def test_a_cursor_ends_in_time() -> None:
    clock = Clock()
    cursor = EventCursor("j1", timeout_s=5.0, clock=clock)
    clock.now += 3
    assert ("wait_s", "2") in cursor.call().params
    clock.now += 2
    with pytest.raises(RequestTimeout, match="job j1 has not finished within 5 s; it goes on"):
        cursor.call()
