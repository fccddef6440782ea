"""Fairness between tenants and, inside each, between tasks, as properties over loads, weights and batch sizes."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.batching.fair_queue import FairQueue
from server.batching.row import Row
from server.batching.scheduler import Scheduler
from tests.batching.test_scheduler import fill, row

Loads = dict[tuple[str, str], int]
keys = st.tuples(st.sampled_from("XYZ"), st.sampled_from("abcde"))
loads = st.dictionaries(keys, st.integers(1, 30), min_size=1, max_size=15)
weights = st.fixed_dictionaries({name: st.sampled_from([0.5, 1.0, 2.0, 3.0]) for name in "XYZ"})
sizes = st.integers(1, 9)


def loaded(wanted: Loads, shares: dict[str, float] | None = None) -> tuple[Scheduler, list[Row]]:
    scheduler = Scheduler(10_000, share=lambda tenant: (shares or {}).get(tenant, 1.0))
    return scheduler, fill(scheduler, *(row(task, tenant=name) for (name, task), n in wanted.items() for _ in range(n)))


def served_while_all_wait(scheduler: Scheduler, size: int) -> list[tuple[str, str]]:
    """Flows in the order of service, until the first tenant has nothing left."""
    left = Counter(each.tenant for each in scheduler_rows(scheduler))
    served: list[tuple[str, str]] = []
    while all(left.values()):
        for each in scheduler.take(0.0, size)[0]:
            if all(left.values()):
                served.append(each.flow)
            left[each.tenant] -= 1
        scheduler.check_integrity()
    return served


def scheduler_rows(scheduler: Scheduler) -> list[Row]:
    rows = scheduler.clear()
    fill(scheduler, *rows)
    return rows


def test_a_tenant_with_a_hundred_tasks_gets_what_one_with_one_gets():
    scheduler = Scheduler(1000)
    fill(scheduler, *(row(f"t{number}", tenant="many") for number in range(100) for _ in range(3)))
    fill(scheduler, *(row("only", tenant="one") for _ in range(50)))
    served = Counter(each.tenant for each in scheduler.take(0.0, 60)[0])
    assert served == {"many": 30, "one": 30}


def test_inside_a_tenant_a_noisy_task_leaves_the_others_their_share():
    scheduler = Scheduler(1000)
    fill(scheduler, *(row("noisy", tenant="x") for _ in range(200)), *(row("quiet", tenant="x") for _ in range(20)))
    fill(scheduler, *(row("a", tenant="y") for _ in range(200)))
    served = Counter(each.flow for each in scheduler.take(0.0, 40)[0])
    assert served == {("x", "noisy"): 10, ("x", "quiet"): 10, ("y", "a"): 20}


@given(loads, weights, sizes)
def test_tenants_that_wait_are_within_the_bound_of_start_time_fair_queueing(wanted, shares, size):
    scheduler, _ = loaded(wanted, shares)
    got: Counter[str] = Counter()
    tenants = {name for name, _ in wanted}
    for name, _ in served_while_all_wait(scheduler, size):
        got[name] += 1
        for one in tenants:
            for other in tenants:
                apart = abs(got[one] / shares[one] - got[other] / shares[other])
                assert apart <= 1 / shares[one] + 1 / shares[other] + 1e-9


@given(loads, sizes)
def test_tasks_of_a_tenant_that_wait_are_never_more_than_a_row_apart(wanted, size):
    """Whatever the tenant itself gets beside the others, which comes and goes."""
    scheduler, _ = loaded(wanted)
    got: Counter[tuple[str, str]] = Counter()
    while len(scheduler):
        for each in scheduler.take(0.0, size)[0]:
            got[each.flow] += 1
            for name in {tenant for tenant, _ in wanted}:
                waiting = [got[flow] for flow in wanted if flow[0] == name and got[flow] < wanted[flow]]
                if waiting:
                    assert max(waiting) - min(waiting) <= 1


@given(loads, weights, sizes)
def test_no_place_in_a_batch_is_left_empty_while_somebody_waits(wanted, shares, size):
    scheduler, rows = loaded(wanted, shares)
    left = len(rows)
    while left:
        batch = scheduler.take(0.0, size)[0]
        assert len(batch) == min(size, left)
        left -= len(batch)


@given(loads, sizes)
def test_nobody_starves(wanted, size):
    """The first row of every flow is served before anybody has had more than two turns since."""
    scheduler, rows = loaded(wanted)
    tenants = len({name for name, _ in wanted})
    tasks = Counter(name for name, _ in wanted)
    place = {}
    served = 0
    while len(scheduler):
        for each in scheduler.take(0.0, size)[0]:
            place.setdefault(each.flow, served)
            served += 1
    assert all(at <= tenants * (tasks[name] + 1) for (name, _), at in place.items())
    assert served == len(rows)


@given(loads, weights, sizes, st.sets(st.integers(0, 400)))
def test_rows_of_a_flow_keep_their_order_and_leave_once(wanted, shares, size, leaving):
    scheduler, rows = loaded(wanted, shares)
    for number in leaving:
        rows[number % len(rows)].reply.gone = True
    served: list[Row] = []
    while len(scheduler):
        served += scheduler.take(0.0, size)[0]
        scheduler.check_integrity()
    staying = [each for each in rows if not each.departed]
    for flow in wanted:
        assert [id(r) for r in served if r.flow == flow] == [id(r) for r in staying if r.flow == flow]
    assert {id(r) for r in scheduler.pop_departed()} == {id(r) for r in rows if r.departed}


@given(st.integers(1, 40), sizes)
def test_a_tenant_that_slept_has_saved_nothing_up(slept, size):
    scheduler, _ = loaded({("X", "a"): 200, ("Y", "a"): 1})
    for _ in range(slept):
        scheduler.take(0.0, 3)
    fill(scheduler, *(row("b", tenant="Y") for _ in range(100)))
    served = Counter(each.tenant for each in scheduler.take(0.0, 2 * size)[0])
    assert abs(served["X"] - served["Y"]) <= 2


def shown(tenant: str, tasks: str) -> list[Row]:
    rows = [row(task, tenant=tenant) for task in tasks]
    for each in rows:
        each.companions = rows
    return rows


def test_one_image_for_many_tasks_does_not_take_the_other_tenants_turns():
    scheduler = Scheduler(100)
    fill(scheduler, *shown("x", "abcdefgh"), *(row("t", tenant="y") for _ in range(8)))
    served = [each.tenant for each in scheduler.take(0.0, 8)[0]]
    assert 3 <= served.count("y") <= 5


@pytest.mark.parametrize("weight", [0.25, 4.0])
def test_a_weight_divides_the_service(weight):
    scheduler = Scheduler(1000, share=lambda tenant: weight if tenant == "gold" else 1.0)
    fill(scheduler, *(row("t", tenant=name) for name in ("gold", "plain") for _ in range(300)))
    served = Counter(each.tenant for each in scheduler.take(0.0, 100)[0])
    assert served["gold"] == pytest.approx(100 * weight / (1 + weight), abs=1)


def test_what_a_tenant_took_while_alone_is_not_held_against_it():
    scheduler = Scheduler(100)
    fill(scheduler, *shown("x", "abcdefgh"), *(row("z", tenant="x") for _ in range(8)))
    scheduler.take(0.0, 8)
    fill(scheduler, *(row("t", tenant="y") for _ in range(8)))
    served = [each.tenant for each in scheduler.take(0.0, 6)[0]]
    assert served.count("x") == 3


def test_a_key_that_slept_begins_at_the_present():
    turns = FairQueue(lambda key: 1.0)
    turns.wait("sleeper", 0)
    turns.wait("busy", 1)
    turns.serve("sleeper")
    turns.sleep("sleeper")
    for head in range(2, 12):
        assert turns.first() == "busy"
        turns.serve("busy")
        turns.wait("busy", head)
    turns.wait("sleeper", 99)
    order = []
    for head in range(100, 106):
        key = turns.first()
        assert key is not None
        order.append(key)
        turns.serve(key)
        turns.wait(key, head)
    assert order.count("sleeper") == 3
    turns.check_integrity({"sleeper", "busy"})
