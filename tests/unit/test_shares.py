"""Who is let in where the queue is full."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from server.batching.fair_share import NOBODYS, Shares, room_for, together


def test_who_is_alone_has_no_neighbours_to_be_protected_from():
    shares = Shares()
    assert not shares.quiet_tenant("a", 1, 100)
    assert not shares.quiet_task(("a", "fish"), 1, 100)
    shares.take(("a", "fish"), 3)
    assert not shares.quiet_tenant("a", 1, 100)
    assert not shares.quiet_task(("a", "fish"), 1, 100)


def test_a_share_is_what_all_would_have_alike():
    shares = Shares()
    shares.take(("loud", "x"), 60)
    shares.take(("loud", "y"), 40)
    assert shares.quiet_tenant("quiet", 50, 100)
    assert not shares.quiet_tenant("quiet", 51, 100)
    shares.take(("third", "x"), 1)
    assert shares.quiet_tenant("quiet", 33, 100)
    assert not shares.quiet_tenant("quiet", 34, 100)
    assert not shares.quiet_tenant("loud", 1, 100)


def test_a_task_has_its_share_of_what_its_tenants_would_be():
    shares = Shares()
    shares.take(("a", "loud"), 100)
    assert shares.quiet_task(("a", "quiet"), 50, 100)
    assert not shares.quiet_task(("a", "quiet"), 51, 100)
    assert not shares.quiet_task(("a", "loud"), 1, 100)
    shares.take(("a", "third"), 2)
    assert shares.quiet_task(("a", "quiet"), 33, 100)
    assert not shares.quiet_task(("a", "quiet"), 34, 100)
    assert shares.quiet_task(("a", "third"), 48, 100)
    assert not shares.quiet_task(("a", "third"), 49, 100)
    shares.take(("b", "loud"), 1)
    assert shares.quiet_task(("a", "quiet"), 16, 100)
    assert not shares.quiet_task(("a", "quiet"), 17, 100)
    assert not shares.quiet_task(("b", "loud"), 1, 100), "alone in its tenant, which is what counts for it"


def test_what_is_for_no_one_task_is_let_in_as_its_tenant_is():
    shares = Shares()
    shares.take(("a", "loud"), 100)
    assert not shares.quiet_task(("a", ""), 1, 100)
    assert shares.quiet_tenant("b", 1, 100)
    assert together({("a", "x")}) == ("a", "x")
    assert together({("a", "x"), ("a", "y")}) == ("a", "")
    assert together({("a", "x"), ("b", "x")}) == together(set()) == NOBODYS


def test_who_has_nothing_any_more_does_not_count():
    shares = Shares()
    shares.take(("loud", "x"), 2)
    shares.take(("gone", "x"), 1)
    shares.take(("loud", "gone"), 1)
    shares.give_back(("gone", "x"), 1)
    shares.give_back(("loud", "gone"), 1)
    assert shares.quiet_tenant("quiet", 5, 10)
    assert shares.quiet_task(("loud", "quiet"), 5, 10)
    shares.give_back(("loud", "x"), 2)
    assert not shares.quiet_tenant("quiet", 1, 10)
    assert not shares.quiet_task(("loud", "quiet"), 1, 10)
    shares.check_integrity(0)


def test_no_rows_leave_nothing():
    shares = Shares()
    shares.take(NOBODYS, 0)
    shares.give_back(NOBODYS, 0)
    shares.check_integrity(0)


def test_a_loud_tenants_quiet_tasks_leave_room_for_quiet_tenants():
    shares = Shares()
    shares.take(("loud", "x"), 64)
    task, tenant = ("loud", "quiet"), ("quiet", "x")
    assert shares.let_in(task, 1, taken=64, most=64, places=64)
    assert shares.let_in(task, 1, taken=71, most=64, places=64)
    assert not shares.let_in(task, 1, taken=72, most=64, places=64)
    assert shares.let_in(tenant, 1, taken=79, most=64, places=64)
    assert not shares.let_in(tenant, 1, taken=80, most=64, places=64)
    assert not shares.let_in(("loud", "x"), 1, taken=64, most=64, places=64)


def test_what_is_counted_elsewhere_counts():
    shares, beside = Shares(), {"a": {"loud": 100, "third": 1}, "b": {"x": 1}}
    assert shares.quiet_tenant("c", 33, 100, beside)
    assert not shares.quiet_tenant("c", 34, 100, beside)
    assert shares.quiet_task(("a", "quiet"), 16, 100, beside)
    assert not shares.quiet_task(("a", "quiet"), 17, 100, beside)
    shares.take(("a", "quiet"), 10)
    assert shares.quiet_task(("a", "quiet"), 6, 100, beside)
    assert not shares.quiet_task(("a", "quiet"), 7, 100, beside)
    assert not shares.quiet_tenant("a", 1, 100, beside)


TENANTS = "abcd"
FLOWS = st.tuples(st.sampled_from(TENANTS), st.sampled_from(["w", "x", "y", "z"]))


@given(st.integers(1, 64), st.integers(4, 200), st.lists(st.tuples(FLOWS, st.integers(1, 9)), max_size=60))
def test_quiet_tenants_never_hold_more_than_the_places_between_them(loud: int, places: int, asked):
    """Those that were let in because they were quiet, at the moment when they came."""
    shares = Shares()
    shares.take(("loud", "x"), loud)
    held: dict[str, int] = {}
    for flow, rows in asked:
        if shares.quiet_tenant(flow[0], rows, places):
            shares.take(flow, rows)
            held[flow[0]] = held.get(flow[0], 0) + rows
            assert held[flow[0]] <= places / 2
    shares.check_integrity(loud + sum(held.values()))


@given(st.integers(1, 64), st.integers(4, 200), st.lists(st.tuples(FLOWS, st.integers(1, 9)), max_size=60))
def test_quiet_tasks_never_hold_more_than_their_tenants_places_between_them(loud: int, places: int, asked):
    shares = Shares()
    for tenant in TENANTS:
        shares.take((tenant, "loud"), loud)
    held: dict[tuple[str, str], int] = {}
    for flow, rows in asked:
        if shares.quiet_task(flow, rows, places):
            shares.take(flow, rows)
            held[flow] = held.get(flow, 0) + rows
            assert held[flow] <= places / len(TENANTS) / 2
    shares.check_integrity(loud * len(TENANTS) + sum(held.values()))


def test_there_is_room_for_a_quarter_more():
    assert [room_for(most) for most in (1, 4, 512)] == [2, 5, 640]
