"""Who is let in where the queue is full."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from server.batching.shares import Shares, room_for


def test_who_is_alone_has_no_neighbours_to_be_protected_from():
    shares = Shares()
    assert not shares.quiet("a", 1, 100)
    shares.take("a", 3)
    assert not shares.quiet("a", 1, 100)


def test_a_share_is_what_all_would_have_alike():
    shares = Shares()
    shares.take("loud", 100)
    assert shares.quiet("quiet", 50, 100)
    assert not shares.quiet("quiet", 51, 100)
    shares.take("third", 1)
    assert shares.quiet("quiet", 33, 100)
    assert not shares.quiet("quiet", 34, 100)
    assert not shares.quiet("loud", 1, 100)


def test_who_has_nothing_any_more_does_not_count():
    shares = Shares()
    shares.take("loud", 2)
    shares.take("gone", 1)
    shares.give_back("gone", 1)
    assert shares.quiet("quiet", 5, 10)
    shares.give_back("loud", 2)
    assert not shares.quiet("quiet", 1, 10)


@given(
    st.integers(1, 64),
    st.integers(4, 200),
    st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 9)), max_size=60),
)
def test_the_quiet_alone_never_hold_more_than_the_places_between_them(loud: int, places: int, asked):
    """Those that were let in because they were quiet, at the moment when they came."""
    shares = Shares()
    shares.take("loud", loud)
    held: dict[str, int] = {}
    for tenant, rows in asked:
        if shares.quiet(tenant, rows, places):
            shares.take(tenant, rows)
            held[tenant] = held.get(tenant, 0) + rows
            assert held[tenant] <= places / 2
    shares.check_integrity(loud + sum(held.values()))


def test_there_is_room_for_a_quarter_more():
    assert [room_for(most) for most in (1, 4, 512)] == [2, 5, 640]
