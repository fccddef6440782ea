"""Who is let in where the queue is full."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from server.batching.fair_share import NO_FLOW, FairShares, common_flow, with_reserve


def test_who_is_alone_has_no_neighbours_to_be_protected_from():
    shares = FairShares()
    assert not shares.tenant_under_share("a", 1, 100)
    assert not shares.task_under_share(("a", "fish"), 1, 100)
    shares.take(("a", "fish"), 3)
    assert not shares.tenant_under_share("a", 1, 100)
    assert not shares.task_under_share(("a", "fish"), 1, 100)


def test_a_share_is_what_all_would_have_alike():
    shares = FairShares()
    shares.take(("loud", "x"), 60)
    shares.take(("loud", "y"), 40)
    assert shares.tenant_under_share("quiet", 50, 100)
    assert not shares.tenant_under_share("quiet", 51, 100)
    shares.take(("third", "x"), 1)
    assert shares.tenant_under_share("quiet", 33, 100)
    assert not shares.tenant_under_share("quiet", 34, 100)
    assert not shares.tenant_under_share("loud", 1, 100)


def test_a_task_has_its_share_of_what_its_tenants_would_be():
    shares = FairShares()
    shares.take(("a", "loud"), 100)
    assert shares.task_under_share(("a", "quiet"), 50, 100)
    assert not shares.task_under_share(("a", "quiet"), 51, 100)
    assert not shares.task_under_share(("a", "loud"), 1, 100)
    shares.take(("a", "third"), 2)
    assert shares.task_under_share(("a", "quiet"), 33, 100)
    assert not shares.task_under_share(("a", "quiet"), 34, 100)
    assert shares.task_under_share(("a", "third"), 48, 100)
    assert not shares.task_under_share(("a", "third"), 49, 100)
    shares.take(("b", "loud"), 1)
    assert shares.task_under_share(("a", "quiet"), 16, 100)
    assert not shares.task_under_share(("a", "quiet"), 17, 100)
    assert not shares.task_under_share(("b", "loud"), 1, 100), "alone in its tenant, which is what counts for it"


def test_what_is_for_no_one_task_is_let_in_as_its_tenant_is():
    shares = FairShares()
    shares.take(("a", "loud"), 100)
    assert not shares.task_under_share(("a", ""), 1, 100)
    assert shares.tenant_under_share("b", 1, 100)
    assert common_flow({("a", "x")}) == ("a", "x")
    assert common_flow({("a", "x"), ("a", "y")}) == ("a", "")
    assert common_flow({("a", "x"), ("b", "x")}) == common_flow(set()) == NO_FLOW


def test_who_has_nothing_any_more_does_not_count():
    shares = FairShares()
    shares.take(("loud", "x"), 2)
    shares.take(("gone", "x"), 1)
    shares.take(("loud", "gone"), 1)
    shares.give_back(("gone", "x"), 1)
    shares.give_back(("loud", "gone"), 1)
    assert shares.tenant_under_share("quiet", 5, 10)
    assert shares.task_under_share(("loud", "quiet"), 5, 10)
    shares.give_back(("loud", "x"), 2)
    assert not shares.tenant_under_share("quiet", 1, 10)
    assert not shares.task_under_share(("loud", "quiet"), 1, 10)
    shares.check_integrity(0)


def test_no_rows_leave_nothing():
    shares = FairShares()
    shares.take(NO_FLOW, 0)
    shares.give_back(NO_FLOW, 0)
    shares.check_integrity(0)


def test_a_loud_tenants_quiet_tasks_leave_room_for_quiet_tenants():
    shares = FairShares()
    shares.take(("loud", "x"), 64)
    task, tenant = ("loud", "quiet"), ("quiet", "x")
    assert shares.admits(task, 1, taken=64, most=64, places=64)
    assert shares.admits(task, 1, taken=71, most=64, places=64)
    assert not shares.admits(task, 1, taken=72, most=64, places=64)
    assert shares.admits(tenant, 1, taken=79, most=64, places=64)
    assert not shares.admits(tenant, 1, taken=80, most=64, places=64)
    assert not shares.admits(("loud", "x"), 1, taken=64, most=64, places=64)


def test_what_is_counted_elsewhere_counts():
    shares, beside = FairShares(), {"a": {"loud": 100, "third": 1}, "b": {"x": 1}}
    assert shares.tenant_under_share("c", 33, 100, beside)
    assert not shares.tenant_under_share("c", 34, 100, beside)
    assert shares.task_under_share(("a", "quiet"), 16, 100, beside)
    assert not shares.task_under_share(("a", "quiet"), 17, 100, beside)
    shares.take(("a", "quiet"), 10)
    assert shares.task_under_share(("a", "quiet"), 6, 100, beside)
    assert not shares.task_under_share(("a", "quiet"), 7, 100, beside)
    assert not shares.tenant_under_share("a", 1, 100, beside)


TENANTS = "abcd"
FLOWS = st.tuples(st.sampled_from(TENANTS), st.sampled_from(["w", "x", "y", "z"]))


@given(st.integers(1, 64), st.integers(4, 200), st.lists(st.tuples(FLOWS, st.integers(1, 9)), max_size=60))
def test_quiet_tenants_never_hold_more_than_the_places_between_them(loud: int, places: int, asked):
    """Those that were let in because they were quiet, at the moment when they came."""
    shares = FairShares()
    shares.take(("loud", "x"), loud)
    held: dict[str, int] = {}
    for flow, rows in asked:
        if shares.tenant_under_share(flow[0], rows, places):
            shares.take(flow, rows)
            held[flow[0]] = held.get(flow[0], 0) + rows
            assert held[flow[0]] <= places / 2
    shares.check_integrity(loud + sum(held.values()))


@given(st.integers(1, 64), st.integers(4, 200), st.lists(st.tuples(FLOWS, st.integers(1, 9)), max_size=60))
def test_quiet_tasks_never_hold_more_than_their_tenants_places_between_them(loud: int, places: int, asked):
    shares = FairShares()
    for tenant in TENANTS:
        shares.take((tenant, "loud"), loud)
    held: dict[tuple[str, str], int] = {}
    for flow, rows in asked:
        if shares.task_under_share(flow, rows, places):
            shares.take(flow, rows)
            held[flow] = held.get(flow, 0) + rows
            assert held[flow] <= places / len(TENANTS) / 2
    shares.check_integrity(loud * len(TENANTS) + sum(held.values()))


def test_there_is_room_for_a_quarter_more():
    assert [with_reserve(most) for most in (1, 4, 512)] == [2, 5, 640]
